"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Every epoch alternates, batch by batch, one step of the autoencoder's optimizer with one of the discriminator's. A run
leaves its TensorBoard events, settings, weights and pictures in <log_dir>/<YYYY_mm_dd_HH_MM_SS>/. With --resume it
continues from its last checkpoint, to the same weights to the last bit as if it had never been stopped.
"""

import training.threads  # noqa: F401 (before torch, which reads there what it sets)

# isort: split

import contextlib
import inspect
import sys
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.monitoring import save_measurements, save_summary
from runs.files import image_grid, png_bytes, write_atomically
from runs.random_state import evaluation_mode
from runs.run import open_run
from training.commandline import run_program
from training.cuda_graph import CapturedStep
from training.data import load_data
from training.device import setup_device
from training.ema import EMA
from training.optimizers import build_model, build_optimizers, set_learning_rate, to_device
from training.options import parse_args
from training.statistics import LossStatistics
from utils import TensorBoardLogger

SAMPLE_SEED = 0
MAX_GRAD_NORM = 1.0  # of the discriminator; why: docs/ABLATION.md


# Pictures ------------------------------------------------------------------------------------------------------------

def generate_and_save(model, epoch, summary_writer, batch_size=64):
    """Save a grid of `batch_size` samples, 8 a row, to TensorBoard (`samples`) and as a PNG under the run's folder.

    The codes are the same at each call, so that one sees the digits take shape from epoch to epoch.
    """
    with evaluation_mode(model):
        torch.manual_seed(SAMPLE_SEED)  # for a student's model, which draws from torch's stream; ours has its own
        samples = model.sample(batch_size)
    save_grid(samples, 8, "samples", epoch, summary_writer, f"Prior_samples/samples_epoch_{epoch}.png")


def save_reconstruction(model, epoch, summary_writer, data, count=8):
    """Save the first `count` images of `data`, [N, 1, 28, 28] in [-1, 1], in a row over their reconstructions.

    They go to TensorBoard (`reconstructions`) and into a PNG under the run's folder.
    """
    with evaluation_mode(model):
        images = data[:count].to(model.device)
        pairs = torch.cat([images, model(images)[0]])
    save_grid(pairs, len(images), "reconstructions", epoch, summary_writer,
              f"Reconstruction/reconstruction_{epoch}.png")


def save_grid(images, columns, tag, epoch, summary_writer, name):
    """Save images in [-1, 1] as one grid to TensorBoard at step `epoch`, and as <run>/results/<name>."""
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
        epoch: its number, from 1, for messages.
        model, train_loader: see models.AdversarialAE and mnist.mnist, or anything with the same interface.
        logger_ae, logger_disc: their `add_values` gets each step's values.
        optimizer_ae: of the encoder's and decoder's parameters, and no other.
        optimizer_disc: of the discriminator's parameters, and no other.
        lambda_: the weight of the reconstruction loss; the adversarial loss has 1 - lambda_.
        step: takes a batch on the device and returns its values, as `train_step` does, which it stands in for.
        statistics: a LossStatistics in the place of the two loggers.
    Raises UserError where the autoencoder's loss is NaN or infinite.
    """
    model.train()
    step = step or partial(train_step, model, optimizer_ae, optimizer_disc, lambda_)
    statistics = statistics or LossStatistics(logger_ae, logger_disc)
    statistics.begin(epoch)
    for x, _ in train_loader:
        statistics.add(*step(x.to(model.device, non_blocking=True)))
    return statistics.means()


def train_step(model, optimizer_ae, optimizer_disc, lambda_, x, precision="fp32"):
    """Take one step of each optimizer for images x [B, 1, 28, 28]; return the two dicts that the losses report.

    With `precision` "bf16", the layers of the networks compute in bfloat16; weights, codes, losses and optimizers stay
    in float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        recon_x, z_fake = (output.float() for output in model(x))
        ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z_fake, lambda_)
        disc_loss, disc_values = model.get_loss_discriminator(z_fake.detach())

    optimizer_ae.zero_grad()
    ae_loss.backward()
    optimizer_ae.step()

    optimizer_disc.zero_grad()  # after ae_loss.backward(), which may have left gradients on the discriminator
    disc_loss.backward()
    torch.nn.utils.clip_grad_norm_(model.discriminator.parameters(), MAX_GRAD_NORM)
    optimizer_disc.step()
    return tuple({name: torch.as_tensor(value).detach() for name, value in values.items()}
                 for values in (ae_values, disc_values))


def build_step(model, optimizer_ae, optimizer_disc, args):
    """Return the training step: on CUDA as a captured graph, if the model says that its losses allow it.

    Not on AMD's GPUs, which torch calls CUDA too: nobody has tried graphs there.
    """
    step = partial(train_step, model, optimizer_ae, optimizer_disc, args.lambda_, precision=args.precision)
    nvidia = model.device.type == "cuda" and not torch.version.hip
    return CapturedStep(step) if nvidia and getattr(model, "capturable", False) else step


# The whole run -------------------------------------------------------------------------------------------------------

def main(args):
    """Train as the flags say and return the run's folder. Flags that `args` lacks have their defaults.

    Raises RunStopped after SIGINT, SIGTERM or SIGUSR1, with everything saved; UserError, mnist.DataError or OSError for
    what the user can mend.
    """
    with open_run(args) as run:  # a new run, or with --resume an old one: locked, its state read
        args = run.args
        torch.manual_seed(args.seed)
        device = setup_device(args)
        data = load_data(args, device, run.resumed and run.resumed["settings"])
        run.start(data, device)  # makes the folder; from here on a signal stops the run between two steps

        model = to_device(build_model(args.z_dim, args.posterior, args.networks), device, args.precision)
        optimizer_ae, optimizer_disc = build_optimizers(model, args)
        ema = EMA(model, args.averaging)  # the weights that are shown, measured and saved
        logger_ae, logger_disc = (TensorBoardLogger(None, name=name) for name in ("generator", "discriminator"))
        statistics = LossStatistics(logger_ae, logger_disc, progress=run.show_losses)
        options = accepted_options(train_aae, statistics=statistics,
                                   step=build_step(model, optimizer_ae, optimizer_disc, args))
        run.track(model=model, average=ema, statistics=statistics, logger_ae=logger_ae, logger_disc=logger_disc,
                  optimizer_ae=optimizer_ae, optimizer_disc=optimizer_disc)  # what a checkpoint holds

        with run.summary_writer(logger_ae, logger_disc) as writer:
            for epoch in run.epochs():  # from 0, which is before training, or from where the run stopped
                if epoch > 0:
                    set_learning_rate(optimizer_ae, epoch, args)
                    train_aae(epoch, model, run.batches(after_step=ema.update), logger_ae, logger_disc,
                              optimizer_ae, optimizer_disc, args.lambda_, **options)
                generate_and_save(ema.model, epoch, writer)
                if epoch == 1 or epoch % 5 == 0:
                    save_reconstruction(ema.model, epoch, writer, data.fixed_images, count=len(data.fixed_images))
                    save_measurements(ema.model, epoch, writer, data.test_images)
                run.end_epoch(epoch)  # prints, saves a checkpoint, stops where a signal has come
            save_summary(ema.model, args.epochs, writer, data, run.settings, run.state.means)
    return run.folder


def accepted_options(function, **options):
    """Return those of the options that a function takes: a student's own train_aae has the assignment's eight alone."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def cli(argv=None):
    """Run `main` from the command line and return the exit status; what the user can mend is said in one sentence."""
    return run_program("train.py", main, parse_args, argv, "try a smaller --batch_size or --z_dim",
                       "make room or rights there, or choose another folder with --log_dir")


if __name__ == "__main__":
    sys.exit(cli())
