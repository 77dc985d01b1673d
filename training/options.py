"""The flags of train.py, and what of them a resumed run may change."""

import argparse

from training.commandline import FlagError, OneLineParser, number

RESUME_OVERRIDES = {"data_dir", "log_dir", "num_workers", "no_cuda", "checkpoint_every", "resume"}
HYPERPARAMETERS = ("z_dim", "lambda_", "posterior", "networks", "ae_lr", "drop_after", "d_lr", "d_momentum",
                   "averaging", "batch_size", "epochs", "seed", "precision", "trained_on")  # what one compares runs by
BASE = ["--networks", "base", "--drop_after", "0", "--d_momentum", "0", "--averaging", "0"]  # the assignment's hints


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser(prog="train.py", description="Train an adversarial autoencoder on MNIST.",
                           allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--z_dim", type=number(int, 1), default=8, help="dimensions of the latent code")
    add("--posterior", choices=("deterministic", "gaussian", "universal"), default="deterministic",
        help="the encoder's q(z|x): a function of the image alone, Gaussian, or of any form")
    add("--networks", choices=("residual", "base"), default="residual",
        help="encoder and decoder: ours, or as the assignment suggests them")
    add("--batch_size", type=number(int, 1), default=64, help="images per step")
    add("--lambda_", type=number(float, 0, 1), default=0.995,
        help="weight of the reconstruction loss in [0, 1]; the adversarial loss has the rest")
    add("--ae_lr", type=number(float, 0), default=1e-3, help="learning rate of encoder and decoder, Adam")
    add("--drop_after", type=number(int, 0), default=90, help="after this epoch --ae_lr is divided by 10 (0: never)")
    add("--d_lr", type=number(float, 0), default=5e-3, help="learning rate of the discriminator, SGD")
    add("--d_momentum", type=number(float, 0, 0.999), default=0.95, help="momentum of the discriminator's SGD")
    add("--averaging", type=number(float, 0, 0.99999), default=0.999,
        help="decay per step of the moving average of the weights that is shown, measured and saved; 0: no averaging")
    add("--data_dir", default="../data/", help="folder where MNIST is, or is downloaded to")
    add("--dataset", choices=("auto", "mnist", "digits"), default="auto",
        help="what to train on; auto: MNIST if available, otherwise the bundled digits")
    add("--epochs", type=number(int, 1), default=100, help="passes through the training set")
    add("--seed", type=number(int, 0, 2**63 - 1), default=42,
        help="random seed; bitwise reproducible on the CPU, and on CUDA with --deterministic")
    add("--deterministic", action="store_true", help="on CUDA use only kernels that give the same bits each time")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="arithmetic precision: tf32 and bf16 are faster and less exact, and rejected on hardware "
             "without units for them")
    add("--num_workers", type=number(int, 0), default=0,
        help="of the data loader; MNIST sits in memory, so that none are started")
    add("--log_dir", default="AAE_logs/", help="folder to make the run's own folder in")
    add("--checkpoint_every", type=number(int, 1), default=10, help="epochs from one checkpoint to the next")
    add("--resume", metavar="RUN",
        help="resume a stopped run, given by its folder, or the `latest` one under --log_dir; --epochs may be raised")
    add("--no-cuda", action="store_true", help="do not use CUDA where there is one")
    return parser


def parse_args(argv=None):
    """Return the flags as a Namespace, with the names of those that are in argv as `explicit_flags`.

    On a wrong one, say so and exit with status 2.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.set_defaults(**dict.fromkeys(vars(args)))
    args.explicit_flags = [name for name, value in vars(parser.parse_args(argv)).items() if value is not None]
    return args


def with_defaults(args):
    """Return a Namespace of all flags: those that `args` lacks have their defaults, those that it has are explicit."""
    return argparse.Namespace(**{**vars(parse_args([])), "explicit_flags": list(vars(args)), **vars(args)})


def resumed_args(args, settings):
    """Return a stopped run's flags, with those that may differ as given now; raise FlagError if others differ."""
    explicit = set(args.explicit_flags)
    settings = {**vars(parse_args([])), "drop_after": 0, **settings}  # an older run lacks drop_after
    for name in sorted(explicit & set(settings) - RESUME_OVERRIDES - {"epochs"}):
        if getattr(args, name) != settings[name]:
            raise FlagError(f"--{name} {getattr(args, name)} contradicts the run, which has {settings[name]}; leave "
                            f"the flag out, or begin a new run")
    if "epochs" in explicit and args.epochs < settings["epochs"]:
        raise FlagError(f"--epochs {args.epochs} is less than the run's {settings['epochs']}; give more, "
                        f"or leave it out")
    overrides = {name: getattr(args, name) for name in explicit & (RESUME_OVERRIDES | {"epochs"})}
    flags = {name: settings[name] for name in vars(args) if name in settings}
    return argparse.Namespace(**{**vars(args), **flags, **overrides})
