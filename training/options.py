"""The flags of train.py, and which of them may change when a run is resumed."""

import argparse
import sys

from training.cli import FlagError, OneLineParser, number

RESUME_OVERRIDES = {"data_dir", "log_dir", "num_workers", "no_cuda", "checkpoint_every", "resume"}
HYPERPARAMETERS = ("z_dim", "lambda_", "posterior", "networks", "ae_lr", "drop_after", "d_lr", "d_momentum",
                   "averaging", "batch_size", "epochs", "seed", "precision", "trained_on")  # by which runs are compared
BASE = ["--networks", "base", "--drop_after", "0", "--d_momentum", "0", "--averaging", "0"]  # --base
EXAMPLES = """examples:
  python train.py --epochs 5                      short run
  python train.py --base --epochs 20              the networks and training that the assignment suggests
  python train.py --resume latest --epochs 200    continue the last run up to epoch 200
"""


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser("train.py", "Train an adversarial autoencoder on MNIST.", usage="python train.py [flags]",
                           epilog=EXAMPLES)

    add = parser.add_argument_group("model").add_argument
    add("--z_dim", type=number(int, 1), default=8, metavar="N", help="dimension of the latent code")
    add("--posterior", choices=("deterministic", "gaussian", "universal"), default="deterministic",
        help="encoder distribution q(z|x); universal: of any form, with noise as an extra input of the encoder")
    add("--networks", choices=("residual", "base"), default="residual",
        help="encoder and decoder; base: as the assignment suggests them")

    add = parser.add_argument_group("training").add_argument
    add("--base", action="store_true", help=f"preset of the assignment's suggestions, short for {' '.join(BASE)}; "
                                            "flags given explicitly take precedence")
    add("--epochs", type=number(int, 1), default=100, metavar="N", help="passes over the training set")
    add("--batch_size", type=number(int, 1), default=64, metavar="N", help="images per training step")
    add("--lambda_", type=number(float, 0, 1), default=0.995, metavar="X",
        help="weight of the reconstruction loss, in [0, 1]; the adversarial loss has weight 1 - X")
    add("--ae_lr", type=number(float, 0), default=1e-3, metavar="X",
        help="learning rate of the encoder and decoder (Adam)")
    add("--drop_after", type=number(int, 0), default=90, metavar="N",
        help="after this epoch --ae_lr is divided by 10; 0: never")
    add("--d_lr", type=number(float, 0), default=5e-3, metavar="X", help="learning rate of the discriminator (SGD)")
    add("--d_momentum", type=number(float, 0, 0.999), default=0.95, metavar="X",
        help="momentum of the discriminator's SGD")
    add("--averaging", type=number(float, 0, 0.99999), default=0.999, metavar="X",
        help="decay per step of the moving average of the weights, which is shown, evaluated and saved; "
             "0: no averaging")
    add("--seed", type=number(int, 0, 2**63 - 1), default=42, metavar="N",
        help="random seed; bitwise reproducible on the CPU, and on CUDA with --deterministic")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("auto", "mnist", "digits"), default="auto",
        help="training data; auto: MNIST if available, otherwise the bundled digits")
    add("--data_dir", default="../data/", metavar="DIR", help="MNIST's folder; the files are downloaded if missing")
    add("--num_workers", type=number(int, 0), default=0, metavar="N",
        help="no effect, because the data are in memory; part of the assignment's interface")

    add = parser.add_argument_group("output").add_argument
    add("--log_dir", default="AAE_logs/", metavar="DIR", help="each run creates its own folder in this one")
    add("--checkpoint_every", type=number(int, 1), default=10, metavar="N", help="epochs between two checkpoints")
    add("--resume", metavar="RUN",
        help="resume a stopped run: its folder, or `latest` for the last one saved in --log_dir; "
             "--epochs may be raised")

    add = parser.add_argument_group("hardware").add_argument
    add("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="arithmetic precision; tf32 and bf16 are faster and less exact, and rejected on hardware without units "
             "for them")
    add("--deterministic", action="store_true", help="use only deterministic kernels on CUDA")
    return parser


def parse_args(argv=None):
    """Return the flags as a Namespace; its `explicit_flags` lists the names of those in argv, --base spelled out.

    For an invalid flag, print one sentence and exit with status 2.
    """
    parser, argv = make_parser(), list(sys.argv[1:] if argv is None else argv)
    if "--base" in argv:  # a flag's value never starts with --
        argv = [*BASE, *argv]  # of a flag given twice, the later value counts
    args = parser.parse_args(argv)
    parser.set_defaults(**dict.fromkeys(vars(args)))
    given = vars(parser.parse_args(argv))
    del args.base
    args.explicit_flags = [name for name in vars(args) if given[name] is not None]
    return args


def with_defaults(args):
    """Return a Namespace of all flags: those missing from `args` have their defaults, the others are explicit."""
    return argparse.Namespace(**{**vars(parse_args([])), "explicit_flags": list(vars(args)), **vars(args)})


def resumed_args(args, settings):
    """Return a stopped run's flags, those in RESUME_OVERRIDES as given now; raise FlagError if others contradict it."""
    explicit = set(args.explicit_flags)
    settings = {**vars(parse_args([])), "drop_after": 0, **settings}  # missing from older runs
    for name in sorted(explicit & set(settings) - RESUME_OVERRIDES - {"epochs"}):
        if getattr(args, name) != settings[name]:
            raise FlagError(f"--{name} {getattr(args, name)} contradicts the run, which has {settings[name]}; omit "
                            f"the flag, or start a new run")
    if "epochs" in explicit and args.epochs < settings["epochs"]:
        raise FlagError(f"--epochs {args.epochs} is less than the run's {settings['epochs']}; give a larger "
                        f"number, or omit the flag")
    overrides = {name: getattr(args, name) for name in explicit & (RESUME_OVERRIDES | {"epochs"})}
    flags = {name: settings[name] for name in vars(args) if name in settings}
    return argparse.Namespace(**{**vars(args), **flags, **overrides})
