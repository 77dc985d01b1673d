"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Every epoch alternates, batch by batch, one step of the autoencoder's optimizer with one of the discriminator's. A run
leaves its TensorBoard events, settings, weights and pictures in <log_dir>/<YYYY_mm_dd_HH_MM_SS>/.
"""

import argparse
import difflib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from mnist import DataError, MissingData, digits, mnist
from models import AdversarialAE
from utils import TensorBoardLogger, write_atomically

SAMPLE_SEED = 0  # of the codes that every picture of samples is decoded from
READ_EVERY = 50  # steps between two looks at the losses: for a look, the CPU waits for the device


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


# Pictures ------------------------------------------------------------------------------------------------------------

def generate_and_save(model, epoch, summary_writer, batch_size=64):
    """Save a grid of `batch_size` samples, 8 a row, to TensorBoard (`samples`) and as a PNG under the run's folder.

    The codes are the same at each call, so that one sees the digits take shape from epoch to epoch.
    """
    with undisturbed(model):
        torch.manual_seed(SAMPLE_SEED)
        if hasattr(model, "sample_stream"):
            model.sample_stream.manual_seed(SAMPLE_SEED)
        samples = model.sample(batch_size)
    save_grid(samples, 8, "samples", epoch, summary_writer, f"Prior_samples/samples_epoch_{epoch}.png")


def save_reconstruction(model, epoch, summary_writer, data, count=8):
    """Save the first `count` images of `data`, [N, 1, 28, 28] in [-1, 1], in a row over their reconstructions.

    They go to TensorBoard (`reconstructions`) and into a PNG under the run's folder.
    """
    with undisturbed(model):
        images = data[:count].to(model.device)
        pairs = torch.cat([images, model(images)[0]])
    save_grid(pairs, len(images), "reconstructions", epoch, summary_writer,
              f"Reconstruction/reconstruction_{epoch}.png")


@contextmanager
def undisturbed(model):
    """Use a model in evaluation mode and without gradients; its modes and all random streams are put back after."""
    modes, states = [(module, module.training) for module in model.modules()], random_states(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_states(model, states)
        for module, mode in modes:
            module.training = mode


def random_states(model):
    """Return the states of the random streams that training and sampling draw from, tensors on the CPU."""
    states = {"torch": torch.get_rng_state()}
    if model.device.type in ("cuda", "mps"):
        states["device"] = getattr(torch, model.device.type).get_rng_state()
    if hasattr(model, "sample_stream"):  # a models.AdversarialAE of other hands draws from torch's
        states["samples"] = model.sample_stream.get_state()
    return states


def set_random_states(model, states):
    """Put the random streams back to what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if "device" in states:
        getattr(torch, model.device.type).set_rng_state(states["device"])
    if "samples" in states:
        model.sample_stream.set_state(states["samples"])


def save_grid(images, columns, tag, epoch, summary_writer, name):
    """Save images in [-1, 1] as one grid to TensorBoard at step `epoch`, and as <run>/results/<name>."""
    grid = make_grid(images.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1))
    grid = (255 * grid).round().byte()
    summary_writer.add_image(tag, grid, epoch)
    png = io.BytesIO()
    to_pil_image(grid).save(png, "png")
    write_atomically(Path(summary_writer.log_dir) / "results" / name, png.getvalue())


# Training ------------------------------------------------------------------------------------------------------------

def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1,
              progress=None):
    """Train for one epoch and return the mean over its steps of every value that the two losses report.

    Args:
        epoch: its number, from 1, for messages.
        model, train_loader: see models.AdversarialAE and mnist.mnist, or anything with the same interface.
        logger_ae, logger_disc: their `add_values` gets each step's values.
        optimizer_ae: of the encoder's and decoder's parameters, and no other.
        optimizer_disc: of the discriminator's parameters, and no other.
        lambda_: the weight of the reconstruction; the adversarial part has 1 - lambda_.
        progress: called every READ_EVERY steps with (steps since the last call, means over them).
    Raises RunError where the autoencoder's loss is NaN or infinite.
    """
    model.train()
    log = StepLog(epoch, model.device, (logger_ae, logger_disc), progress)
    for x, _ in train_loader:
        x = x.to(model.device, non_blocking=True)
        recon_x, z_fake = model(x)
        ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z_fake, lambda_)
        disc_loss, disc_values = model.get_loss_discriminator(z_fake.detach())

        optimizer_ae.zero_grad()
        ae_loss.backward()
        optimizer_ae.step()

        optimizer_disc.zero_grad()  # after ae_loss.backward(), which may have left gradients on the discriminator
        disc_loss.backward()
        optimizer_disc.step()

        log.add(ae_values, disc_values)
    return log.finish()


class StepLog:
    """Keeps the values of each step on the device; every READ_EVERY steps reads, checks and hands on all of them.

    So the CPU waits for the device once in READ_EVERY steps. Each of `loggers` gets one `add_values` a step, of numbers.
    """

    def __init__(self, epoch, device, loggers, progress=None):
        self.epoch = epoch
        self.device = device
        self.loggers = loggers
        self.progress = progress
        self.steps = 0    # read and handed on
        self.totals = {}  # over those steps
        self._unread = []

    def add(self, *values):
        """Take the values of one step: for each logger a dict of scalar tensors or numbers."""
        self._names = [list(own) for own in values]
        self._unread.append(torch.stack([torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
                                         for own in values for value in own.values()]))
        if len(self._unread) == READ_EVERY:
            self._read()

    def finish(self):
        """Hand on what is left, and return the mean of each value over all steps."""
        if self._unread:
            self._read()
        return {name: total / self.steps for name, total in self.totals.items()}

    def _read(self):
        rows = torch.stack(self._unread).tolist()  # the CPU waits for the device here
        self._unread = []
        names = [name for own in self._names for name in own]
        for row in rows:
            self.steps += 1
            values = dict(zip(names, row))
            self._check(values)
            for logger, own in zip(self.loggers, self._names):
                logger.add_values({name: values[name] for name in own})
        sums = {name: sum(column) for name, column in zip(names, zip(*rows))}
        self.totals = {name: self.totals.get(name, 0.0) + total for name, total in sums.items()}
        if self.progress:
            self.progress(len(rows), {name: total / len(rows) for name, total in sums.items()})

    def _check(self, values):
        if not math.isfinite(values.get("ae_loss", 0.0)):
            raise RunError(f"the autoencoder's loss is {values['ae_loss']} at step {self.steps} of epoch {self.epoch}: "
                           f"training has diverged; try smaller learning rates (--ae_lr, --d_lr)")


# The whole run -------------------------------------------------------------------------------------------------------

def main(args):
    """Train as the flags say, and return the run's folder. Flags that `args` lacks have their defaults.

    Raises DataError, RunError or OSError for what the user can mend; KeyboardInterrupt, with its message, on Ctrl-C.
    """
    args = argparse.Namespace(**{**vars(parse_args([])), **vars(args)})
    start = time.monotonic()
    torch.manual_seed(args.seed)
    device = choose_device(args)
    keep_freed_memory()
    loader, trained_on, warning = load_data(args, device)
    run = create_run_folder(args.log_dir)
    say(f"device: {device.type} ({device_name(device)}), torch {torch.__version__}")
    say(f"data:   {len(loader.dataset):,} images of {'MNIST' if trained_on == 'mnist' else 'the bundled digits'}")
    say(f"run:    {run}")
    settings = {**vars(args), "trained_on": trained_on, "fallback": warning, "device": device.type,
                "device_name": device_name(device), "torch": torch.__version__}
    write_atomically(run / "hparams.json", (json.dumps(settings, indent=2, default=str) + "\n").encode())

    model = AdversarialAE(z_dim=args.z_dim).to(device)
    try:
        with SummaryWriter(run) as writer:
            means = train(model, loader, args, writer)
    except KeyboardInterrupt:
        save_weights(model, run)
        raise KeyboardInterrupt(f"interrupted; the weights and pictures so far are in {run}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(run)) from None

    say(f"done:   {args.epochs} epoch{'s' * (args.epochs > 1)} in {duration(time.monotonic() - start)}; last epoch: {describe(means)}")
    say(f"see:    pictures in {run / 'results'}, curves with: tensorboard --logdir {shlex.quote(str(run))}")
    if warning:
        warn(warning)
    return run


def train(model, loader, args, writer):
    """Train for all epochs with their pictures, curves and weights; return the last epoch's means."""
    optimizer_ae, optimizer_disc = build_optimizers(model, args)
    logger_ae = TensorBoardLogger(writer, name="generator")
    logger_disc = TensorBoardLogger(writer, name="discriminator")
    shown = one_of_each_label(loader.dataset)
    generate_and_save(model, 0, writer)
    save_reconstruction(model, 0, writer, shown, count=len(shown))
    with tqdm(total=args.epochs * len(loader), unit="step", disable=None, dynamic_ncols=True) as bar:
        for epoch in range(1, args.epochs + 1):
            start = time.monotonic()
            bar.set_description(f"epoch {epoch}/{args.epochs}")

            def progress(steps, means):
                bar.set_postfix_str(describe(means), refresh=False)
                bar.update(steps)

            means = train_aae(epoch, model, loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc,
                              args.lambda_, progress)
            if not sys.stdout.isatty():
                say(f"epoch {epoch}/{args.epochs}: {describe(means)}, {time.monotonic() - start:.1f} s")
            generate_and_save(model, epoch, writer)
            if epoch == 1 or epoch % 5 == 0:
                save_reconstruction(model, epoch, writer, shown, count=len(shown))
            save_weights(model, writer.log_dir)
    logger_ae.flush()
    logger_disc.flush()
    return means


def build_optimizers(model, args):
    """Return Adam for encoder and decoder, and SGD for the discriminator, each over its own parameters only."""
    fused = model.device.type in ("cpu", "cuda")  # one call for all weights; not tried elsewhere
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=args.ae_lr,
                                    betas=(0.5, 0.999), fused=fused)
    return optimizer_ae, torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr, fused=fused)


def keep_freed_memory():
    """Let glibc hand the memory of one step to the next, which took a third off the time of a step on the CPU.

    Freeing a block of just below 32 MB makes it keep up to twice as much (mallopt(3), M_MMAP_THRESHOLD); else it gives
    pages back to the kernel after every step. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def choose_device(args):
    """Return the device to train on: CUDA, else Apple's MPS, else the CPU."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available() and not args.no_cuda:
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device):
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without the line
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def load_data(args, device):
    """Return the loader, the name of what is in it, and a warning where it is not what was hoped for, else None."""
    if args.dataset == "digits":
        return digits(args.batch_size, device=device), "digits", None
    try:
        return mnist(args.data_dir, args.batch_size, args.num_workers, device=device), "mnist", None
    except MissingData as error:
        if args.dataset == "mnist":
            raise
        warning = f"this run trains on the bundled digits instead of MNIST: {error}"
    warn(warning)
    return digits(args.batch_size, device=device), "digits", warning


def create_run_folder(log_dir):
    """Make <log_dir>/<YYYY_mm_dd_HH_MM_SS>/ and return its path. Of runs in the same second, one waits for the next."""
    while True:
        run = Path(log_dir) / datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
        try:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.mkdir()
            return run
        except FileExistsError as error:
            if not run.is_dir():
                raise RunError(f"{log_dir} is no folder; choose another one with --log_dir") from None
            time.sleep(0.1)
        except OSError as error:
            raise RunError(f"no folder can be made in {log_dir}: {error.strerror}; choose another one with --log_dir, "
                           f"or make room or rights there") from None


def one_of_each_label(dataset):
    """Return the first image of each label of a TensorDataset, in the order of the labels."""
    images, labels = dataset.tensors
    return torch.stack([images[(labels == label).nonzero()[0, 0]] for label in labels.unique()])


def save_weights(model, run):
    """Save the model's state_dict, on the CPU, as <run>/checkpoints/model_checkpoint.pt."""
    content = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, content)
    write_atomically(Path(run) / "checkpoints" / "model_checkpoint.pt", content.getvalue())


# The command line ----------------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one sentence, without the usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_args(argv=None):
    """Return the flags as a Namespace; on a wrong one, say so and exit with status 2."""
    parser = OneLineParser(description="Train an adversarial autoencoder on MNIST.", allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--z_dim", type=number(int, 1), default=8, help="dimensions of the latent code")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="images per step")
    parser.add_argument("--lambda_", type=number(float, 0, 1), default=0.995,
                        help="weight of the reconstruction in [0, 1]; the adversarial part has the rest")
    parser.add_argument("--ae_lr", type=number(float, 0), default=1e-3, help="learning rate of encoder and decoder, Adam")
    parser.add_argument("--d_lr", type=number(float, 0), default=5e-3, help="learning rate of the discriminator, SGD")
    parser.add_argument("--data_dir", default="../data/", help="folder where MNIST is, or is downloaded to")
    parser.add_argument("--dataset", choices=("auto", "mnist", "digits"), default="auto",
                        help="what to train on; auto: MNIST, or where it cannot be had, the bundled digits")
    parser.add_argument("--epochs", type=number(int, 1), default=100, help="passes through the training set")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42,
                        help="of every random draw: the same one gives the same bits on the CPU, on CUDA with "
                             "--deterministic")
    parser.add_argument("--deterministic", action="store_true",
                        help="on CUDA use only kernels that give the same bits each time, which is slower")
    parser.add_argument("--num_workers", type=number(int, 0), default=0,
                        help="of the data loader; MNIST sits in memory, so that none are started")
    parser.add_argument("--log_dir", default="AAE_logs/", help="folder to make the run's own folder in")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA where there is one")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        parser.error(f"unknown flag {unknown[0]}" + (f", perhaps {close[0]} is meant" if close else ""))
    return args


def number(convert, low, high=math.inf):
    """Return a type for argparse: numbers of type `convert` within [low, high], neither NaN nor infinite."""
    kind = {int: "a whole number", float: "a number"}[convert]
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {bounds}")
        return value

    return parse


def describe(means):
    """Return the losses and the accuracy of a dict of means as text for people."""
    return ", ".join([*(f"{name} {means[name]:.4f}" for name in ("recon_loss", "gen_loss", "disc_loss")),
                      f"accuracy {means['accuracy']:.1%}"])


def duration(seconds):
    """Return seconds as text, such as 1 h 02 min 03 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {seconds:02} s" if hours else f"{minutes} min {seconds:02} s"


def say(text):
    print(text, flush=True)


def warn(text):
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def cli(argv=None):
    """Run `main` from the command line. Return the exit status; what the user can mend is said in one sentence."""
    threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) \
        else threading.__excepthook__(failure)  # a full disk in TensorBoard's thread: its writer raises it here as well
    try:
        main(parse_args(argv))
        return 0
    except (DataError, RunError) as error:
        message = str(error)
    except OSError as error:
        message = (f"{error.filename or 'a file'} cannot be written: {error.strerror}; make room or rights there, or "
                   f"choose another folder with --log_dir")
    except KeyboardInterrupt as interruption:
        print(f"\n{interruption or 'interrupted'}", file=sys.stderr)
        return 130
    print(f"train.py: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(cli())
