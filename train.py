"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Each batch takes one step of the autoencoder's optimizer, then one of the discriminator's. A run writes its TensorBoard
events, settings, weights and pictures to <log_dir>/<YYYY_mm_dd_HH_MM_SS>/. With --resume, a stopped run continues from
its last checkpoint and ends with the same weights, bit for bit, as an uninterrupted one.
"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import contextlib
import inspect
import sys
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.monitoring import save_measurements, save_summary
from training.cli import run_program
from training.cuda_graph import CapturedStep
from training.data import load_data
from training.device import setup_device
from training.ema import EMA
from training.files import image_grid, png_bytes, write_atomically
from training.optimizers import build_model, build_optimizers, set_learning_rate, to_device
from training.options import parse_args
from training.random_state import evaluation_mode
from training.run import open_run
from training.statistics import LossStatistics
from utils import TensorBoardLogger

SAMPLE_SEED = 0
MAX_GRAD_NORM = 1.0  # gradient clipping of the discriminator; see docs/EXPERIMENTS.md


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

def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1,
              step=None, statistics=None):
    """Train for one epoch and return the mean over its steps of every value that the two losses report.

    Args:
        epoch: number of the epoch, from 1; used in messages.
        model, train_loader: see models.AdversarialAE and mnist.mnist, or anything with the same interface.
        logger_ae, logger_disc: their `add_values` receives each step's values.
        optimizer_ae: optimizes the parameters of encoder and decoder, and no others.
        optimizer_disc: optimizes the parameters of the discriminator, and no others.
        lambda_: weight of the reconstruction loss; the adversarial loss has weight 1 - lambda_.
        step: replacement for `train_step` that takes only a batch, on the device.
        statistics: LossStatistics to use instead of a new one for the two loggers.
    Raises UserError if the autoencoder's loss is NaN or infinite.
    """
    model.train()
    step = step or partial(train_step, model, optimizer_ae, optimizer_disc, lambda_)
    statistics = statistics or LossStatistics(logger_ae, logger_disc)
    statistics.begin(epoch)
    for x, _ in train_loader:
        statistics.add(*step(x.to(model.device, non_blocking=True)))
    return statistics.means()


def train_step(model, optimizer_ae, optimizer_disc, lambda_, x, precision="fp32"):
    """Take one step of each optimizer on images x [B, 1, 28, 28]; return the dicts of values of the two losses.

    With `precision` "bf16", the networks compute in bfloat16; weights, codes, losses and optimizers stay in float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        recon_x, z_fake = (output.float() for output in model(x))
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


def build_step(model, optimizer_ae, optimizer_disc, args):
    """Return the training step; on CUDA as a captured graph, if the model is marked `capturable`.

    AMD GPUs, which torch also calls CUDA, run the step without a graph: graphs are untested there.
    """
    step = partial(train_step, model, optimizer_ae, optimizer_disc, args.lambda_, precision=args.precision)
    nvidia = model.device.type == "cuda" and not torch.version.hip
    return CapturedStep(step) if nvidia and getattr(model, "capturable", False) else step


# The whole run -------------------------------------------------------------------------------------------------------

def main(args):
    """Train as the flags specify and return the run's folder. Flags missing from `args` get their defaults.

    Raises RunStopped after SIGINT, SIGTERM or SIGUSR1, once everything is saved; UserError, mnist.DataError or OSError
    for errors that the user can fix.
    """
    with open_run(args) as run:  # a new run, or with --resume a stopped one: locked, its state loaded
        args = run.args
        torch.manual_seed(args.seed)
        device = setup_device(args)
        data = load_data(args, device, run.resumed and run.resumed["settings"])
        run.start(data, device)  # creates the folder; from here on a signal stops the run between two steps

        model = to_device(build_model(args.z_dim, args.posterior, args.networks), device, args.precision)
        optimizer_ae, optimizer_disc = build_optimizers(model, args)
        ema = EMA(model, args.averaging)  # the averaged weights are shown, evaluated and saved
        logger_ae, logger_disc = (TensorBoardLogger(None, name=name) for name in ("generator", "discriminator"))
        statistics = LossStatistics(logger_ae, logger_disc, progress=run.show_losses)
        options = accepted_options(train_aae, statistics=statistics,
                                   step=build_step(model, optimizer_ae, optimizer_disc, args))
        run.track(model=model, average=ema, statistics=statistics, logger_ae=logger_ae, logger_disc=logger_disc,
                  optimizer_ae=optimizer_ae, optimizer_disc=optimizer_disc)  # contents of a checkpoint

        with run.summary_writer(logger_ae, logger_disc) as writer:
            for epoch in run.epochs():  # from 0 (before training) or where the run stopped
                if epoch > 0:
                    set_learning_rate(optimizer_ae, epoch, args)
                    train_aae(epoch, model, run.batches(after_step=ema.update), logger_ae, logger_disc,
                              optimizer_ae, optimizer_disc, args.lambda_, **options)
                generate_and_save(ema.model, epoch, writer)
                if epoch == 1 or epoch % 5 == 0:
                    save_reconstruction(ema.model, epoch, writer, data.fixed_images, count=len(data.fixed_images))
                    save_measurements(ema.model, epoch, writer, data.test_images)
                run.end_epoch(epoch)  # prints losses, saves checkpoints, stops if a signal is pending
            save_summary(ema.model, args.epochs, writer, data, run.settings, run.state.means)
    return run.folder


def accepted_options(function, **options):
    """Return the options that a function accepts: a student's train_aae has only the assignment's eight parameters."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def cli(argv=None):
    """Run `main` from the command line and return the exit status; report user errors in one sentence."""
    return run_program("train.py", main, parse_args, argv, "try a smaller --batch_size or --z_dim",
                       "free disk space, check the permissions, or choose another folder with --log_dir")


if __name__ == "__main__":
    sys.exit(cli())
