"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Each batch takes one step of the autoencoder's optimizer, then one of the discriminator's. A run writes its TensorBoard
events, settings, weights and pictures to <log_dir>/<YYYY_mm_dd_HH_MM_SS>/. With --resume, a stopped run continues from
its last checkpoint; on the same CPU, it ends with the same weights, bit for bit, as an uninterrupted one.
"""

import training  # noqa: F401 isort: skip (before torch, which reads the variables that it sets)

import argparse
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from training.cli import OneLineParser, number, run_program
from training.cuda_graph import captured
from training.data import load_data
from training.device import RandomState, default_torch_state, setup_device
from training.files import serialize, write_atomically
from training.model import EMA, build_model, evaluation_mode
from training.monitoring import save_measurements, save_summary
from training.run import open_run, resolve
from utils import TensorBoardLogger, log_images

MAX_GRAD_NORM = 1.0  # gradient clipping of the discriminator; see docs/EXPERIMENTS.md
BASE = {"networks": "base", "drop_after": 0, "d_momentum": 0.0, "averaging": 0.0}  # --base
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
    add("--z_dim", **number(int, 1), default=8, help="dimension of the latent code")
    add("--posterior", choices=("deterministic", "gaussian", "universal"), default="deterministic",
        help="encoder distribution q(z|x); universal: of any form, with noise as an extra input of the encoder")
    add("--networks", choices=("residual", "base"), default="residual",
        help="encoder and decoder; base: as the assignment suggests them")
    add = parser.add_argument_group("training").add_argument
    preset = " ".join(f"--{name} {value}" for name, value in BASE.items())
    add("--base", action="store_true",
        help=f"preset of the assignment's suggestions, short for {preset}; flags given explicitly take precedence")
    add("--epochs", **number(int, 1), default=100, help="passes over the training set")
    add("--batch_size", **number(int, 1), default=64, help="images per training step")
    add("--lambda_", **number(float, 0, 1), default=0.995,
        help="weight of the reconstruction loss, in [0, 1]; the adversarial loss has weight 1 - X")
    add("--ae_lr", **number(float, 0), default=1e-3, help="learning rate of the encoder and decoder (Adam)")
    add("--drop_after", **number(int, 0), default=90, help="after this epoch --ae_lr is divided by 10; 0: never")
    add("--d_lr", **number(float, 0), default=5e-3, help="learning rate of the discriminator (SGD)")
    add("--d_momentum", **number(float, 0, 0.999), default=0.95, help="momentum of the discriminator's SGD")
    add("--averaging", **number(float, 0, 0.99999), default=0.999,
        help="decay per step of the weights' moving average, which is shown, evaluated and saved; 0: no averaging")
    add("--seed", **number(int, 0, 2**63 - 1), default=42,
        help="random seed; same bits on the same CPU with as many threads, on CUDA at most with --deterministic")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("auto", "mnist", "digits"), default="auto",
        help="training data; auto: MNIST if available, otherwise the bundled digits")
    add("--data_dir", default="../data/", metavar="DIR", help="MNIST's folder; the files are downloaded if missing")
    add("--num_workers", **number(int, 0), default=0,
        help="no effect, because the data are in memory; part of the assignment's interface")
    add = parser.add_argument_group("output").add_argument
    add("--log_dir", default="AAE_logs/", metavar="DIR", help="each run creates its own folder in this one")
    add("--resume", metavar="RUN",
        help="resume a run: its folder, or `latest` for the one saved last in --log_dir; --epochs may be raised")
    add = parser.add_argument_group("hardware").add_argument
    add("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    add("--no-graph", action="store_true", help="on CUDA, run each step eagerly instead of replaying a CUDA graph")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="arithmetic precision; bf16 is less exact, and rejected on hardware without units for it")
    add("--deterministic", action="store_true", help="use only deterministic kernels on CUDA")
    return parser


DEFAULTS = vars(make_parser().parse_args([]))


def parse_args(argv=None):
    """Return a Namespace of the flags that are given alone; for an invalid flag, print one sentence and exit."""
    flags = make_parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(DEFAULTS)))
    return argparse.Namespace(**{name: value for name, value in vars(flags).items() if value is not None})


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    """Save a grid of `batch_size` samples, 8 a row, to TensorBoard and as a PNG; every call decodes the same codes."""
    with evaluation_mode(model):
        torch.manual_seed(0)  # evaluation_mode restores the random state
        samples = model.sample(batch_size)
    save_grid(samples, 8, "samples", epoch, summary_writer, f"Prior_samples/samples_epoch_{epoch}.png")


def save_reconstruction(model, epoch, summary_writer, data, count=8):
    """Save a row of the first `count` images of `data`, [N, 1, 28, 28] in [-1, 1], above one of reconstructions."""
    with evaluation_mode(model):
        images = data[:count].to(model.device)
        pairs = torch.cat([images, model(images)[0]])
    save_grid(pairs, len(images), "reconstructions", epoch, summary_writer,
              f"Reconstruction/reconstruction_{epoch}.png")


def save_grid(images, columns, tag, epoch, summary_writer, name):
    """Save images in [-1, 1] as one grid, to TensorBoard at step `epoch` and as <run>/results/<name>."""
    grid = log_images(summary_writer, tag, images, epoch, columns)
    results = Path(summary_writer.log_dir) / "results"
    results.mkdir(exist_ok=True)
    write_atomically(results / name, serialize(to_pil_image(grid)))


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    """Train for one epoch, with weight lambda_ for the reconstruction loss and 1 - lambda_ for the adversarial loss.

    Model and loader are those of models.py and mnist.py, or have their interface; the loggers get each step's values.
    optimizer_ae has the parameters of encoder and decoder, optimizer_disc those of the discriminator, and no others.
    """
    model.train()
    for x, _ in train_loader:
        x = x.to(model.device, non_blocking=True)
        ae_values, disc_values = train_step(model, optimizer_ae, optimizer_disc, lambda_, x)
        logger_ae.add_values(ae_values)
        logger_disc.add_values(disc_values)


@captured  # on CUDA: recorded as a CUDA graph, then replayed
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


def set_learning_rate(optimizer_ae, epoch, args):
    """Set the autoencoder's learning rate for an epoch, counted from 1: args.ae_lr, a tenth after args.drop_after."""
    # Codes that move less are told from the prior by finer differences. Independent of --epochs: runs can be extended.
    rate = args.ae_lr / 10 if 0 < args.drop_after < epoch else args.ae_lr
    for group in optimizer_ae.param_groups:
        group["lr"] = rate


class Batches:
    """A loader's batches for any train_aae. When the next batch is requested, the average of the weights moves."""

    def __init__(self, loader, ema, run):
        self.loader, self.ema, self.run = loader, ema, run

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield batch
            self.ema.update()  # before the first step, if all batches are collected first
            self.run.step_done()

    def __getattr__(self, name):
        return getattr(self.loader, name)


@default_torch_state()
def main(args):
    """Train as the flags specify, missing ones by default; return the run's folder. Errors note how to resume it."""
    args, saved = resolve(args, DEFAULTS, BASE)  # with --resume, the flags and the state of a stopped run
    torch.manual_seed(args.seed)
    device = setup_device(args.no_cuda, args.precision, args.deterministic)
    data = load_data(args, device, saved["settings"] if saved else None)
    model = build_model(args, device)
    ema = EMA(model, args.averaging)  # the averaged weights are shown, evaluated and saved

    autoencoder = torch.nn.ModuleList([model.encoder, model.decoder])  # yields weights that they share once
    optimizer_ae = torch.optim.Adam(autoencoder.parameters(), lr=args.ae_lr, betas=(0.5, 0.999), fused=True,
                                    capturable=device.type == "cuda")  # fused: one call for all weights
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), args.d_lr, args.d_momentum, fused=True)
    with open_run(args, saved, data, device) as run:
        logger_ae = TensorBoardLogger(run.writer, name="generator")
        logger_disc = TensorBoardLogger(run.writer, name="discriminator")
        run.restore(model=model, ema=ema, optimizer_ae=optimizer_ae, optimizer_disc=optimizer_disc,
                    logger_ae=logger_ae, logger_disc=logger_disc, loader=data.train_loader, random=RandomState(device))
        batches = Batches(data.train_loader, ema, run)
        for epoch in run.epochs():  # from 0, which is before training
            if epoch > 0:
                set_learning_rate(optimizer_ae, epoch, args)
                with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
                    train_aae(epoch, model, batches, logger_ae, logger_disc, optimizer_ae, optimizer_disc, args.lambda_)
            generate_and_save(ema.model, epoch, run.writer)
            save_reconstruction(ema.model, epoch, run.writer, data.fixed_images, count=len(data.fixed_images))
            if epoch == 1 or epoch % 5 == 0:
                save_measurements(ema.model, epoch, run.writer, data.test_images)
            run.end_epoch(epoch)  # prints the losses, saves everything
        save_summary(ema.model, args.epochs, run.writer, data, run.settings, run.means)
    return run.folder


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, parse_args, None))
