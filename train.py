"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Each batch takes one step of the autoencoder's optimizer, then one of the discriminator's. A run writes its TensorBoard
events, settings, weights and pictures to <log_dir>/<YYYY_mm_dd_HH_MM_SS>/. With --resume, a stopped run continues from
its last checkpoint; on the same CPU, it ends with the same weights, bit for bit, as an uninterrupted one.
"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import argparse
import functools
import itertools
import sys
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image

from evaluation.monitoring import save_measurements, save_summary
from models import AdversarialAE
from training.cli import OneLineParser, number, run_program
from training.cuda_graph import CapturedStep
from training.data import load_data
from training.device import setup_device
from training.ema import EMA
from training.files import image_grid, png_bytes, write_atomically
from training.random_state import evaluation_mode
from training.run import open_run
from utils import TensorBoardLogger

SAMPLE_SEED = 0
MAX_GRAD_NORM = 1.0  # gradient clipping of the discriminator; see docs/EXPERIMENTS.md
BASE = ["--networks", "base", "--drop_after", "0", "--d_momentum", "0", "--averaging", "0"]  # --base
EXAMPLES = """examples:
  python train.py --epochs 5                      short run
  python train.py --base --epochs 20              the networks and training that the assignment suggests
  python train.py --resume latest --epochs 200    continue the last run up to epoch 200
"""


# Flags ---------------------------------------------------------------------------------------------------------------

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
        help="random seed; bitwise reproducible on the same CPU with as many threads, on CUDA at most with "
             "--deterministic")

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
        help="resume a stopped run: its folder, a training state in it, or `latest` for the last one saved in "
             "--log_dir; --epochs may be raised")

    add = parser.add_argument_group("hardware").add_argument
    add("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    add("--no-graph", action="store_true", help="on CUDA, run each step eagerly instead of replaying a CUDA graph")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="arithmetic precision; tf32 and bf16 are less exact, and rejected on hardware without units for them")
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
    given = {name: value for name, value in vars(args).items() if name != "base"}
    defaults = vars(parse_args(["--base"] if getattr(args, "base", False) else []))
    return argparse.Namespace(**{**defaults, "explicit_flags": [*defaults["explicit_flags"], *given], **given})


# Pictures ------------------------------------------------------------------------------------------------------------

def generate_and_save(model, epoch, summary_writer, batch_size=64):
    """Save a grid of `batch_size` samples, 8 a row, to TensorBoard (`samples`) and as a PNG under the run's folder.

    Every call decodes the same codes, so the pictures show how the digits take shape over the epochs.
    """
    with evaluation_mode(model):
        torch.manual_seed(SAMPLE_SEED)  # for models that sample from torch's global generator; ours has its own
        samples = model.sample(batch_size)
    save_grid(samples, 8, "samples", epoch, summary_writer, f"Prior_samples/samples_epoch_{epoch}.png")


def save_reconstruction(model, epoch, summary_writer, data, count=8):
    """Save a row of the first `count` images of `data`, [N, 1, 28, 28] in [-1, 1], above a row of reconstructions.

    The picture goes to TensorBoard (`reconstructions`) and, as a PNG, to the run's folder.
    """
    with evaluation_mode(model):
        images = data[:count].to(model.device)
        pairs = torch.cat([images, model(images)[0]])
    save_grid(pairs, len(images), "reconstructions", epoch, summary_writer,
              f"Reconstruction/reconstruction_{epoch}.png")


def save_grid(images, columns, tag, epoch, summary_writer, name):
    """Save images in [-1, 1] as one grid, to TensorBoard at step `epoch` and as <run>/results/<name>."""
    grid = image_grid(images, columns)
    summary_writer.add_image(tag, grid, epoch)
    results = Path(summary_writer.log_dir) / "results"
    results.mkdir(exist_ok=True)
    write_atomically(results / name, png_bytes(to_pil_image(grid)))


# Training ------------------------------------------------------------------------------------------------------------

def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    """Train for one epoch.

    Args:
        epoch: number of the epoch, from 1; part of the assignment's interface.
        model, train_loader: see models.AdversarialAE and mnist.mnist, or anything with the same interface.
        logger_ae, logger_disc: their `add_values` receives each step's values.
        optimizer_ae: optimizes the parameters of encoder and decoder, and no others.
        optimizer_disc: optimizes the parameters of the discriminator, and no others.
        lambda_: weight of the reconstruction loss; the adversarial loss has weight 1 - lambda_.

    On CUDA, the values of a step are overwritten by the next one, and a captured graph keeps the tensors and the float
    learning rates that it was captured with: call build_step.cache_clear() after replacing them.
    """
    model.train()
    step = build_step(model, optimizer_ae, optimizer_disc, lambda_)
    for x, _ in train_loader:
        ae_values, disc_values = step(x.to(model.device, non_blocking=True))
        logger_ae.add_values(ae_values)
        logger_disc.add_values(disc_values)


def train_step(model, optimizer_ae, optimizer_disc, lambda_, x):
    """Take one step of each optimizer on images x [B, 1, 28, 28]; return the dicts of values of the two losses."""
    recon_x, z_fake = model(x)
    ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z_fake, lambda_)
    disc_loss, disc_values = model.get_loss_discriminator(z_fake.detach())

    optimizer_ae.zero_grad()
    ae_loss.backward()
    optimizer_ae.step()

    optimizer_disc.zero_grad()  # clears what ae_loss.backward() may have left on the discriminator
    disc_loss.backward()
    torch.nn.utils.clip_grad_norm_(model.discriminator.parameters(), MAX_GRAD_NORM)
    optimizer_disc.step()
    return tuple({name: torch.as_tensor(value).detach() for name, value in values.items()}
                 for values in (ae_values, disc_values))


@functools.lru_cache(maxsize=1)  # a captured graph serves all epochs of a run
def build_step(model, optimizer_ae, optimizer_disc, lambda_):
    """Return `train_step` as a function of the batch alone; on CUDA as a captured graph, if the model is `capturable`.

    AMD GPUs, which torch also calls CUDA, run the step without a graph: graphs are untested there.
    """
    step = functools.partial(train_step, model, optimizer_ae, optimizer_disc, lambda_)
    nvidia = model.device.type == "cuda" and not torch.version.hip
    return CapturedStep(step) if nvidia and getattr(model, "capturable", False) else step


def set_learning_rate(optimizer_ae, epoch, args):
    """Set the autoencoder's learning rate for an epoch, counted from 1: args.ae_lr, a tenth after args.drop_after.

    With the lower rate, the codes move less from step to step, so the discriminator learns finer differences between
    them and the prior. The rate does not depend on the number of epochs, so a run can be extended.
    """
    rate = args.ae_lr / 10 if 0 < args.drop_after < epoch else args.ae_lr
    for group in optimizer_ae.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# The whole run -------------------------------------------------------------------------------------------------------

class Batches:
    """A loader's batches for any train_aae, and what follows the step on each."""

    def __init__(self, loader, ema, run):
        self.loader, self.ema, self.run = loader, ema, run

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in itertools.islice(self.loader, self.run.steps, None):  # without those taken before a stop
            yield batch
            self.ema.update()     # runs when the next batch is requested
            self.run.step_done()  # counts the step; stops the run if a signal is pending

    def __getattr__(self, name):
        return getattr(self.loader, name)


def main(args):
    """Train as the flags specify and return the run's folder. Flags missing from `args` get their defaults.

    Raises RunStopped after SIGINT, SIGTERM or SIGUSR1, once everything is saved; UserError or mnist.DataError for
    errors that the user can fix.
    """
    with open_run(with_defaults(args)) as run:  # a new run, or with --resume a stopped one: locked, its state loaded
        args = run.args
        torch.manual_seed(args.seed)
        device = setup_device(args.no_cuda, args.precision, args.deterministic)
        data = load_data(args, device, run.resumed and run.resumed["settings"])

        options = {"posterior": args.posterior, "networks": args.networks}
        if options == {"posterior": "deterministic", "networks": "residual"}:
            options = {}  # a student's model may accept z_dim only
        model = AdversarialAE(z_dim=args.z_dim, **options)
        if any(isinstance(weight, torch.nn.UninitializedParameter) for weight in model.parameters()):
            with evaluation_mode(model):  # lazy layers get their weights in a first forward pass
                model.discriminator(model(torch.zeros(1, 1, 28, 28))[1])
        channels_last = device.type == "cpu" or args.precision == "bf16"  # the fastest memory layout there
        model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
        model.capturable = getattr(model, "capturable", False) and not args.no_graph
        ema = EMA(model, args.averaging)  # the averaged weights are shown, evaluated and saved
        if args.precision == "bf16":  # after the copy in EMA, which stays in float32
            forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
            model.forward = lambda x: tuple(output.float() for output in forward(x))

        cuda = model.device.type == "cuda"
        fused = model.device.type in ("cpu", "cuda")  # one call for all weights; untested on other devices
        ae_lr = torch.tensor(args.ae_lr, device=device) if cuda else args.ae_lr  # a CUDA graph reads it at each replay
        optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=ae_lr,
                                        betas=(0.5, 0.999), fused=fused, capturable=cuda)
        optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr, momentum=args.d_momentum,
                                         fused=fused)
        run.start(data, device, model, ema, optimizer_ae=optimizer_ae, optimizer_disc=optimizer_disc)

        with SummaryWriter(run.folder) as writer:
            logger_ae = TensorBoardLogger(writer, name="generator")
            logger_disc = TensorBoardLogger(writer, name="discriminator")
            batches = Batches(data.train_loader, ema, run)
            for epoch in run.epochs(writer, logger_ae, logger_disc):  # from 0 (before training) or the last checkpoint
                if epoch > 0:
                    set_learning_rate(optimizer_ae, epoch, args)
                    train_aae(epoch, model, batches, logger_ae, logger_disc, optimizer_ae, optimizer_disc, args.lambda_)
                generate_and_save(ema.model, epoch, writer)
                if epoch == 1 or epoch % 5 == 0:
                    save_reconstruction(ema.model, epoch, writer, data.fixed_images, count=len(data.fixed_images))
                    save_measurements(ema.model, epoch, writer, data.test_images)
                run.end_epoch(epoch)  # prints losses, saves checkpoints, stops if a signal is pending
            save_summary(ema.model, args.epochs, writer, data, run.settings, run.means)
        build_step.cache_clear()  # frees the model, and on CUDA the memory of its graphs
    return run.folder


def cli(argv=None):
    """Run `main` from the command line and return the exit status; report user errors in one sentence."""
    return run_program("train.py", main, parse_args, argv,
                       "end other programs, try a smaller --batch_size or --z_dim")


if __name__ == "__main__":
    sys.exit(cli())
