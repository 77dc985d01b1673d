"""Train an adversarial autoencoder on MNIST:  python train.py  (python train.py --help lists the flags).

Every epoch alternates, batch by batch, one step of the autoencoder's optimizer with one of the discriminator's. A run
leaves its TensorBoard events, settings, weights and pictures in <log_dir>/<YYYY_mm_dd_HH_MM_SS>/, and goes on from its
last checkpoint with --resume, to the same weights to the last bit as if it had never been stopped.
"""

import argparse
import contextlib
import copy
import difflib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import (CheckpointError, clear_after, has_state, latest_run, load_state, locked, run_folder, save_state,
                        weights_on_cpu)
from device import (CapturedStep, CaptureError, PrecisionError, choose_device, device_name, keep_freed_memory,
                    set_precision)
from metrics import ks_distance
from mnist import DataError, MissingData, digits, load_digits, load_mnist, mnist
from models import AdversarialAE
from utils import TensorBoardLogger, write_atomically

SAMPLE_SEED = 0
MAY_DIFFER = {"data_dir", "log_dir", "num_workers", "no_cuda", "checkpoint_every", "resume"}  # when a run is resumed
HYPERPARAMETERS = ("z_dim", "lambda_", "posterior", "networks", "ae_lr", "drop_after", "d_lr", "d_momentum", "averaging",
                   "batch_size", "epochs", "seed", "precision", "trained_on")  # what one compares runs by
BASE = ["--networks", "base", "--drop_after", "0", "--d_momentum", "0", "--averaging", "0"]  # what the assignment suggests
CLIP = 1.0  # largest norm of the discriminator's gradient; why: docs/ABLATION.md
READ_EVERY = 50  # steps between two looks at the losses: for a look, the CPU waits for the device


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class FlagError(RunError):
    """A flag that does not fit the run to be resumed."""


class RunStopped(Exception):
    """A run that a signal stopped, with everything saved; the message says how to go on."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


# Pictures ------------------------------------------------------------------------------------------------------------

def generate_and_save(model, epoch, summary_writer, batch_size=64):
    """Save a grid of `batch_size` samples, 8 a row, to TensorBoard (`samples`) and as a PNG under the run's folder.

    The codes are the same at each call, so that one sees the digits take shape from epoch to epoch.
    """
    with undisturbed(model):
        torch.manual_seed(SAMPLE_SEED)  # for a model that draws from torch's stream; ours has its own, which is put back
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


@contextlib.contextmanager
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
    grid = make_picture(images, columns)
    summary_writer.add_image(tag, grid, epoch)
    results = Path(summary_writer.log_dir) / "results"
    results.mkdir(exist_ok=True)
    write_atomically(results / name, png_bytes(to_pil_image(grid)))


def make_picture(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture with `columns` in a row, uint8 [3, height, width], on the CPU."""
    grid = make_grid(images.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1))
    return (255 * grid).round().byte()


def png_bytes(picture):
    """Return a PIL image as the content of a PNG file."""
    content = io.BytesIO()
    picture.save(content, "png")
    return content.getvalue()


# Measurements on test images -----------------------------------------------------------------------------------------

def reconstruct(model, images):
    """Return reconstructions [N, 1, 28, 28] and codes [N, z_dim] of images, batch by batch; `undisturbed` is the caller's."""
    reconstructions, codes = zip(*(model(batch) for batch in images.split(500)))
    return torch.cat(reconstructions), torch.cat(codes)


def measure(model, images):
    """Return the codes [N, z_dim] of images, on the CPU, and a dict: their reconstruction loss and distance to the prior."""
    with undisturbed(model):
        reconstructions, codes = reconstruct(model, images)
        recon_loss = torch.nn.functional.mse_loss(reconstructions, images)
    distance = ks_distance(codes.cpu() if codes.device.type == "mps" else codes)  # MPS has no float64
    return codes.cpu(), {"recon_loss": recon_loss.item(), "ks_distance": distance}


def save_measurements(model, epoch, summary_writer, images):
    """Write what `measure` finds to TensorBoard, as curves (`test/`) and a histogram of each dimension (`codes/`)."""
    codes, values = measure(model, images)
    for name, value in values.items():
        summary_writer.add_scalar(f"test/{name}", value, epoch)
    if epoch and codes.abs().max() < 1e20:  # before training all are one spike, beside which later ones look flat
        for dimension, column in enumerate(codes.T):
            summary_writer.add_histogram(f"codes/{dimension}", column, epoch)  # fails for NaN and above 1e20


def save_summary(model, epoch, summary_writer, images, labels, settings, means):
    """Write what a finished run has come to to TensorBoard: 1,000 test codes for the projector, and settings with results.

    `settings` and `means`, the last epoch's, are dicts; the results are curves of one point each (`final/`).
    """
    codes, values = measure(model, images)
    summary_writer.add_embedding(codes[:1000], labels[:1000].tolist(), (images[:1000].cpu() + 1) / 2, epoch, "codes")
    results = {"final/recon_loss": means["recon_loss"], "final/accuracy": means["accuracy"],
               **{f"final/test_{name}": value for name, value in values.items()}}
    shown = {name: settings[name] for name in HYPERPARAMETERS}
    for summary in hparams(shown, results):  # SummaryWriter.add_hparams would make a second run of them
        summary_writer.file_writer.add_summary(summary)
    for name, value in results.items():
        summary_writer.add_scalar(name, value, epoch)


# Training ------------------------------------------------------------------------------------------------------------

def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1,
              log=None, step=None, stop=None):
    """Train for one epoch and return the mean over its steps of every value that the two losses report.

    Args:
        epoch: its number, from 1, for messages.
        model, train_loader: see models.AdversarialAE and mnist.mnist, or anything with the same interface.
        logger_ae, logger_disc: their `add_values` gets each step's values.
        optimizer_ae: of the encoder's and decoder's parameters, and no other.
        optimizer_disc: of the discriminator's parameters, and no other.
        lambda_: the weight of the reconstruction; the adversarial part has 1 - lambda_.
        log: a StepLog to go on with, if the epoch has been begun; its loggers take the place of the two above.
        step: takes a batch on the device and returns its values, as `train_step` does, which it stands in for.
        stop: called after each step; where it returns something true, the epoch ends there.
    Raises RunError where the autoencoder's loss is NaN or infinite.
    """
    model.train()
    log = log or StepLog(epoch, model.device, (logger_ae, logger_disc))
    step = step or partial(train_step, model, optimizer_ae, optimizer_disc, lambda_)
    for x, _ in train_loader:
        log.add(*step(x.to(model.device, non_blocking=True)))
        if stop and stop():
            break
    return log.finish()


def train_step(model, optimizer_ae, optimizer_disc, lambda_, x, precision="fp32"):
    """Take one step of each optimizer for images x [B, 1, 28, 28]; return the values that the two losses report, two dicts.

    With `precision` "bf16", the layers of the networks compute in bfloat16; weights, codes, losses and optimizers stay in
    float32.
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
    torch.nn.utils.clip_grad_norm_(model.discriminator.parameters(), CLIP)
    optimizer_disc.step()
    return tuple({name: torch.as_tensor(value).detach() for name, value in values.items()}
                 for values in (ae_values, disc_values))


class WeightAverage:
    """A copy of a model, `model`, whose weights are an exponential moving average of the other's over the training steps.

    A step's weights count `decay` times as much after each later step: 0.999 averages over about 1,000 steps. The n-th step's
    decay is (1 + n) / (10 + n) as long as that is less, for 0.999 in the first 9,000 steps, so that the average is over the last
    tenth of them and the initial weights are soon forgotten.
    Statistics, as of batch normalisation, are averaged too (Polyak and Juditsky 1992; Karras et al., arXiv:1710.10196,
    appendix A.1: samples of a model so averaged are better).
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0
        own, current = ([tensor.detach() for tensor in (*one.parameters(), *one.buffers())] for one in (self.model, model))
        pairs = list(zip(own, current))  # each once, even if two layers share it
        self._averaged, self._current = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self):
        """Take in the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)  # one call for all, as in torch.optim.swa_utils
        for own, current in self._counters:
            own.copy_(current)

    def state_dict(self):
        return {"updates": self.updates, "weights": weights_on_cpu(self.model)}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["weights"])


def with_averaging(step, average):
    """Return a training step that also takes the weights after it into a WeightAverage."""
    def step_and_average(x):
        values = step(x)
        average.update()
        return values

    return step_and_average


class StepLog:
    """Keeps the values of each step on the device; every READ_EVERY steps reads, checks and hands on all of them.

    So the CPU waits for the device once in READ_EVERY steps. Each of `loggers` gets one `add_values` a step, of numbers;
    `progress`, if given, is called with (steps, means over them) after each reading. `steps` and `totals`, the sums over
    them, are those of the epoch so far, of what has been read.
    """

    def __init__(self, epoch, device, loggers, progress=None, steps=0, totals=()):
        self.epoch = epoch
        self.device = device
        self.loggers = loggers
        self.progress = progress
        self.steps = steps
        self.totals = dict(totals)
        self._unread = []

    def add(self, *values):
        """Take the values of one step: for each logger a dict of scalar tensors or numbers."""
        self._names = [list(own) for own in values]
        self._unread.append(torch.stack([torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().reshape(())
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
            for name, value in values.items():
                self.totals[name] = self.totals.get(name, 0.0) + value
        if self.progress:
            self.progress(len(rows), {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))})

    def _check(self, values):
        if not math.isfinite(values.get("ae_loss", 0.0)):
            raise RunError(f"the autoencoder's loss is {values['ae_loss']} at step {self.steps} of epoch {self.epoch}: "
                           f"training has diverged; try smaller learning rates (--ae_lr, --d_lr)")


# The whole run -------------------------------------------------------------------------------------------------------

def main(args):
    """Train as the flags say, and return the run's folder. Flags that `args` lacks have their defaults.

    Raises RunStopped after SIGINT, SIGTERM or SIGUSR1, with everything saved; DataError, CheckpointError, RunError or
    OSError for what the user can mend.
    """
    given = set(getattr(args, "given", vars(args)))
    args = argparse.Namespace(**{**vars(parse_args([])), **vars(args)})
    if not args.resume:
        return train_run(args)
    resume = latest_run(args.log_dir) if args.resume == "latest" else args.resume
    run = run_folder(resume)
    with locked(run):
        state = load_state(resume)
        return train_run(resumed_args(args, given, state["settings"]), run, state)


def train_run(args, run=None, state=None):
    """Train a new run from the beginning, or a stopped one from its state; return the run's folder."""
    torch.manual_seed(args.seed)
    device = choose_device(args.no_cuda, args.deterministic)
    try:
        set_precision(args.precision, device)
    except PrecisionError:
        if not state:
            raise
        raise CheckpointError(f"{run} was trained with --precision {args.precision}, which this device cannot do well; go on "
                              f"with it where it began") from None
    keep_freed_memory()
    loader, trained_on, warning = load_data(args, device, state and state["settings"])
    test = load_test(args, trained_on, device)
    settings = {**vars(args), "trained_on": trained_on, "fallback": warning, "device": device.type,
                "device_name": device_name(device), "torch": torch.__version__}
    with stop_signals() as received, contextlib.ExitStack() as stack:
        if run is None:
            run = create_run_folder(args.log_dir)
            stack.enter_context(locked(run))
        say(f"device: {device.type} ({settings['device_name']}), torch {torch.__version__}")
        say(f"data:   {len(loader.dataset):,} images of {'MNIST' if trained_on == 'mnist' else 'the bundled digits'}")
        say(f"run:    {run}")
        model = place(build_model(args.z_dim, args.posterior, args.networks), device, args.precision)
        session = Session(run, settings, loader, test, model, args, state)
        try:
            session.train(received)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at once; {resume_hint(run)}") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(run)) from None
    say(f"done:   {args.epochs} epoch{'s' * (args.epochs > 1)} in {duration(session.seconds)}; last epoch: "
        f"{describe(session.means)}")
    say(f"see:    pictures in {run / 'results'}, curves with: tensorboard --logdir {shlex.quote(str(run))}")
    if warning:
        warn(warning)
    return run


class Session:
    """A run as it trains: all that changes from step to step, and so all that a resume needs."""

    PARTS = ("optimizer_ae", "optimizer_disc", "average", "logger_ae", "logger_disc")

    def __init__(self, run, settings, loader, test, model, args, state=None):
        self.run, self.loader, self.test, self.model, self.args, self.resumed = run, loader, test, model, args, state
        self.settings = {name: value for name, value in json.loads(json.dumps(settings, default=str)).items()
                         if name not in ("given", "resume")}
        self.optimizer_ae, self.optimizer_disc = build_optimizers(model, args)
        self.average = WeightAverage(model, args.averaging)  # what is shown, measured and saved for others
        self.step = with_averaging(build_step(model, self.optimizer_ae, self.optimizer_disc, args), self.average)
        self.logger_ae = TensorBoardLogger(None, name="generator")
        self.logger_disc = TensorBoardLogger(None, name="discriminator")
        self.epoch = 0    # whole epochs done
        self.steps = 0    # steps done of the next one
        self.totals = {}  # sums over those steps
        self.means = {}   # over the last whole epoch
        self.seconds = 0.0
        self._started = time.monotonic()
        if state:
            self.load_state_dict(state)

    def train(self, received):
        """Train to the last epoch, with pictures, curves and checkpoints, or until there is a signal in `received`."""
        if self.resumed:
            clear_after(self.run, self.resumed)
        write_atomically(self.run / "hparams.json", (json.dumps(self.settings, indent=2) + "\n").encode())
        shown = one_of_each_label(self.loader.dataset)
        with SummaryWriter(self.run) as writer:
            self.logger_ae.summary_writer = self.logger_disc.summary_writer = writer
            if not self.resumed:
                self.save_pictures(writer, shown)
            self.save(writer, keep=False)  # of a resumed run too: its settings may be new, its weights older than its state
            try:
                self.train_epochs(writer, shown, received)
                if self.test:
                    save_summary(self.average.model, self.epoch, writer, *self.test, self.settings, self.means)
            finally:  # after the last checkpoint, for a resume goes on with the loggers' open windows
                self.logger_ae.flush()
                self.logger_disc.flush()

    def train_epochs(self, writer, shown, received):
        """Train, save pictures of each epoch and checkpoints, until the last epoch is done or a signal is received."""
        with tqdm(total=self.args.epochs * len(self.loader), initial=self.epoch * len(self.loader) + self.steps,
                  bar_format="{desc}|{bar}|{remaining} left{postfix}", disable=None, dynamic_ncols=True) as bar:
            while self.epoch < self.args.epochs:
                self.train_epoch(bar, received)
                if self.steps == 0:
                    self.save_pictures(writer, shown)
                signals = tuple(received)  # one that comes later is seen after the next step
                last = self.epoch == self.args.epochs
                if signals or last or self.steps == 0 and self.epoch % self.args.checkpoint_every == 0:
                    self.save(writer)
                if signals and not last:
                    raise RunStopped(f"stopped by {signal.Signals(signals[0]).name} after {self.epoch} epochs and "
                                     f"{self.steps} steps; {resume_hint(self.run)}", signals[0])

    def train_epoch(self, bar, received):
        """Train what is left of the next epoch, or the part of it until a signal is received."""
        start, epochs, epoch = time.monotonic(), self.args.epochs, self.epoch + 1
        bar.set_description(f"epoch {epoch}/{epochs}")

        def progress(steps, means):
            bar.set_postfix_str(f"recon {means['recon_loss']:.3f}, gen {means['gen_loss']:.3f}, disc {means['disc_loss']:.3f}, "
                                f"acc {means['accuracy']:.0%}", refresh=False)
            bar.update(steps)

        loggers = (self.logger_ae, self.logger_disc)
        log = StepLog(epoch, self.model.device, loggers, progress, self.steps, self.totals)
        self.loader.epoch, self.loader.skip = self.epoch, self.steps
        set_rate(self.optimizer_ae, epoch, self.args)
        means = train_aae(epoch, self.model, self.loader, *loggers, self.optimizer_ae, self.optimizer_disc,
                          self.args.lambda_, log, self.step, stop=lambda: received)
        if log.steps < len(self.loader):
            self.steps, self.totals = log.steps, log.totals
            return
        self.epoch, self.steps, self.totals, self.means = epoch, 0, {}, means
        if bar.disable or not sys.stdout.isatty():
            say(f"epoch {epoch}/{epochs}: {describe(means)}, {time.monotonic() - start:.1f} s")

    def save_pictures(self, writer, shown):
        """Save samples, and at epoch 0, 1 and every fifth reconstructions of the images `shown`, and measurements."""
        generate_and_save(self.average.model, self.epoch, writer)
        if self.epoch == 1 or self.epoch % 5 == 0:
            save_reconstruction(self.average.model, self.epoch, writer, shown, count=len(shown))
            if self.test:
                save_measurements(self.average.model, self.epoch, writer, self.test[0])

    def save(self, writer, keep=True):
        """Save everything that a resume needs, and the weights; `keep` the state before."""
        writer.flush()  # what is logged so far belongs to this state, what comes later does not
        self.seconds += time.monotonic() - self._started
        self._started = time.monotonic()
        save_state(self.run, self.state_dict(), weights_on_cpu(self.average.model), keep)

    def state_dict(self):
        """Return where the run stands."""
        return {"settings": self.settings, "model": weights_on_cpu(self.model), "epoch": self.epoch, "steps": self.steps,
                "totals": self.totals, "means": self.means, "seconds": self.seconds, "random": random_states(self.model),
                "types": self.types(), **{name: getattr(self, name).state_dict() for name in self.PARTS}}

    def types(self):
        """Return the names of the optimizers' classes, whose states do not say whose they are."""
        return [type(optimizer).__name__ for optimizer in (self.optimizer_ae, self.optimizer_disc)]

    def load_state_dict(self, state):
        """Go on from where a run stood."""
        differing = [name for name in ("device", "device_name", "torch") if self.settings[name] != state["settings"][name]]
        try:
            if state["types"] != self.types():
                raise ValueError(f"its optimizers are {state['types']}, not {self.types()}")
            self.model.load_state_dict(state["model"])
            for name in self.PARTS:
                part = getattr(self, name)
                for group, own in zip(state[name].get("param_groups", ()), getattr(part, "param_groups", ())):
                    group.update({flag: own[flag] for flag in ("fused", "capturable", "lr") if flag in own})  # of this device
                part.load_state_dict(state[name])
            for optimizer in (self.optimizer_ae, self.optimizer_disc):
                lay_out_like_weights(optimizer)
            for name in ("epoch", "steps", "totals", "means", "seconds"):
                setattr(self, name, state[name])
            set_rate(self.optimizer_ae, self.epoch + (self.steps > 0), self.args)
            set_random_states(self.model, {name: stream for name, stream in state["random"].items()
                                           if name != "device" or "device" not in differing})
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint of {self.run} does not fit models.py or train.py as they are now: "
                                  f"{' '.join(str(error).split())[:200]}") from None
        for name in differing:
            warn(f"the run began with {state['settings'][name]} and goes on with {self.settings[name]} ({name}): the results may "
                 f"not be the same to the last bit")


@contextlib.contextmanager
def stop_signals():
    """Give a list that SIGINT, SIGTERM and SIGUSR1 put their number in; a second SIGINT raises KeyboardInterrupt."""
    received = []

    def handle(signum, frame):
        if signum == signal.SIGINT and signum in received:
            raise KeyboardInterrupt
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield received
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def resumed_args(args, given, settings):
    """Return a stopped run's flags, with those that may differ as they are given now; refuse the others by name."""
    settings = {**vars(make_parser().parse_args([])), "drop_after": 0, **settings}  # an older run has not that one
    for name in sorted(given & set(settings) - MAY_DIFFER - {"epochs"}):
        if getattr(args, name) != settings[name]:
            raise FlagError(f"--{name} {getattr(args, name)} contradicts the run, which has {settings[name]}; leave the flag "
                            f"out, or begin a new run")
    if "epochs" in given and args.epochs < settings["epochs"]:
        raise FlagError(f"--epochs {args.epochs} is less than the run's {settings['epochs']}; give more, or leave it out")
    now = {name: getattr(args, name) for name in given & (MAY_DIFFER | {"epochs"})}
    flags = {name: settings[name] for name in vars(args) if name in settings}
    return argparse.Namespace(**{**vars(args), **flags, **now})


def resume_hint(run):
    """Return what to do to go on with a run."""
    if not has_state(run):
        return "it had no checkpoint yet, so begin a new run"
    return f"go on with: python {shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(str(run))}"


def build_model(z_dim, posterior="deterministic", networks="residual"):
    """Return a new model; one of other hands, as the assignment has it, knows no arguments but z_dim."""
    chosen = {"posterior": posterior} if posterior != "deterministic" else {}
    if networks != "residual":
        chosen["networks"] = networks
    return AdversarialAE(z_dim=z_dim, **chosen)


def place(model, device, precision):
    """Return the model on the device, in the memory layout that measures fastest: channels last on the CPU and in bf16."""
    channels_last = device.type == "cpu" or precision == "bf16"
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def build_optimizers(model, args):
    """Return Adam for encoder and decoder, and SGD for the discriminator, each over its own parameters only."""
    fused = model.device.type in ("cpu", "cuda")  # one call for all weights; not tried elsewhere
    cuda = model.device.type == "cuda"
    rate = torch.tensor(args.ae_lr, device=model.device) if cuda else args.ae_lr  # a CUDA graph reads it anew at each replay
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=rate, betas=(0.5, 0.999),
                                    fused=fused, capturable=cuda)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr, momentum=args.d_momentum, fused=fused)
    return optimizer_ae, optimizer_disc


def lay_out_like_weights(optimizer):
    """Give an optimizer's moments the memory layout of the weights: fused steps go through both in the order of memory.

    Those of a state that was saved on another device may have another one.
    """
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if torch.is_tensor(moment) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)


def set_rate(optimizer_ae, epoch, args):
    """Set the autoencoder's learning rate for an epoch, counted from 1: args.ae_lr, and a tenth after args.drop_after epochs.

    The codes then move less from step to step, and the discriminator sees finer differences between them and the prior. What
    an epoch does does not depend on how many there are, so that a run with more of them is the longer run.
    """
    rate = args.ae_lr / 10 if 0 < args.drop_after < epoch else args.ae_lr
    for group in optimizer_ae.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_step(model, optimizer_ae, optimizer_disc, args):
    """Return the training step: on CUDA as a captured graph, if the model says that its losses allow it."""
    step = partial(train_step, model, optimizer_ae, optimizer_disc, args.lambda_, precision=args.precision)
    return CapturedStep(step) if model.device.type == "cuda" and getattr(model, "capturable", False) else step


def load_data(args, device, settings=None):
    """Return the loader, the name of what is in it, and a warning where it is not what was hoped for, else None.

    With the settings of a stopped run, it is what that was trained on or nothing.
    """
    dataset, warning = (settings["trained_on"], settings["fallback"]) if settings else (args.dataset, None)
    if dataset == "digits":
        return digits(args.batch_size, device=device), "digits", warning
    try:
        return mnist(args.data_dir, args.batch_size, args.num_workers, device=device), "mnist", None
    except MissingData as error:
        if dataset == "mnist":
            raise
        warning = f"this run trains on the bundled digits instead of MNIST: {error}"
    warn(warning)
    return digits(args.batch_size, device=device), "digits", warning


def load_test(args, trained_on, device):
    """Return images and labels that are not trained on; None, with a warning, where they cannot be had."""
    try:
        images, labels = load_digits(train=False) if trained_on == "digits" else load_mnist(args.data_dir, train=False)
    except DataError as error:
        warn(f"nothing is measured on test images: {error}")
        return None
    return images.to(device), labels


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


# The command line ----------------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one sentence, without the usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_args(argv=None):
    """Return the flags as a Namespace, with the names of those that are in argv as `given`.

    On a wrong one, say so and exit with status 2.
    """
    parser, argv = make_parser(), with_negative_numbers(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], re.findall(r"--[\w-]+", parser.format_usage()), n=1)
        parser.error(f"unknown flag {unknown[0]}" + (f", perhaps {close[0]} is meant" if close else ""))
    parser.set_defaults(**dict.fromkeys(vars(args)))
    args.given = [name for name, value in vars(parser.parse_args(argv)).items() if value is not None]
    return args


def with_negative_numbers(argv):
    """Join each flag with a negative number after it by "=": argparse takes -1e-3 or -inf alone for another flag."""
    joined = []
    for word in argv:
        with contextlib.suppress(ValueError):
            if word.startswith("-") and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
                float(word)
                joined[-1] += f"={word}"
                continue
        joined.append(word)
    return joined


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser(description="Train an adversarial autoencoder on MNIST.", allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--z_dim", type=number(int, 1), default=8, help="dimensions of the latent code")
    parser.add_argument("--posterior", choices=("deterministic", "gaussian", "universal"), default="deterministic",
                        help="the encoder's q(z|x): a function of the image alone, Gaussian, or of any form")
    parser.add_argument("--networks", choices=("residual", "base"), default="residual",
                        help="encoder and decoder: ours, or as the assignment suggests them")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="images per step")
    parser.add_argument("--lambda_", type=number(float, 0, 1), default=0.995,
                        help="weight of the reconstruction in [0, 1]; the adversarial part has the rest")
    parser.add_argument("--ae_lr", type=number(float, 0), default=1e-3, help="learning rate of encoder and decoder, Adam")
    parser.add_argument("--drop_after", type=number(int, 0), default=90,
                        help="epochs after which ae_lr is a tenth, however many there are; 0: never")
    parser.add_argument("--d_lr", type=number(float, 0), default=5e-3, help="learning rate of the discriminator, SGD")
    parser.add_argument("--d_momentum", type=number(float, 0, 0.999), default=0.95,
                        help="momentum of the discriminator's SGD")
    parser.add_argument("--averaging", type=number(float, 0, 0.99999), default=0.999,
                        help="decay per step of the average of all weights that is saved, shown and measured; 0: the weights "
                             "of the last step alone")
    parser.add_argument("--data_dir", default="../data/", help="folder where MNIST is, or is downloaded to")
    parser.add_argument("--dataset", choices=("auto", "mnist", "digits"), default="auto",
                        help="what to train on; auto: MNIST, or where it cannot be had, the bundled digits")
    parser.add_argument("--epochs", type=number(int, 1), default=100, help="passes through the training set")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42,
                        help="of every random draw: the same one gives the same bits on the CPU, on CUDA with "
                             "--deterministic")
    parser.add_argument("--deterministic", action="store_true",
                        help="on CUDA use only kernels that give the same bits each time")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                        help="of the products in the networks; tf32 (CUDA) and bf16 (CUDA, or processors made for it) round "
                             "more, and are refused where they would be slow")
    parser.add_argument("--num_workers", type=number(int, 0), default=0,
                        help="of the data loader; MNIST sits in memory, so that none are started")
    parser.add_argument("--log_dir", default="AAE_logs/", help="folder to make the run's own folder in")
    parser.add_argument("--checkpoint_every", type=number(int, 1), default=10, help="epochs from one checkpoint to the next")
    parser.add_argument("--resume", metavar="RUN",
                        help="go on with a stopped run, given by its folder, or with the `latest` one under --log_dir; "
                             "--epochs may be raised")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA where there is one")
    return parser


def number(convert, low, high=2**31 - 1):
    """Return a type for argparse: numbers of type `convert` within [low, high], not NaN."""
    kind = {int: "a whole number", float: "a number"}[convert]
    bounds = f"from {low} to {high}"

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
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


def say(text, stream=None):
    """Print a line; where nobody can read it any more, or its disk is full, the run goes on without."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text):
    say(f"WARNING: {text}", sys.stderr)


def cli(argv=None):
    """Run `main` from the command line. Return the exit status; what the user can mend is said in one sentence."""
    threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) \
        else threading.__excepthook__(failure)  # a full disk in TensorBoard's thread: its writer raises it here as well
    try:
        main(parse_args(argv))
        return 0
    except RunStopped as stop:
        say(f"\n{stop}", sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt as interruption:
        say(f"\n{str(interruption) or 'interrupted'}", sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        explain("train.py", error, (CaptureError, CheckpointError, DataError, PrecisionError, RunError),
                "try a smaller --batch_size or --z_dim", "make room or rights there, or choose another folder with --log_dir")
        return 2 if isinstance(error, (FlagError, PrecisionError)) else 1


def explain(program, error, known, memory_advice, disk_advice="make room or rights there"):
    """Say in one sentence what is wrong and what to do, where the user can mend it; else raise the error again.

    The errors of the classes `known` bring their own sentence; want of memory and of room on the disk get one here.
    """
    if isinstance(error, known):
        message = str(error)
    elif isinstance(error, OSError):
        message = f"{error.filename or 'a file'} cannot be written: {error.strerror}; {disk_advice}"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
            isinstance(error, RuntimeError) and "allocate memory" in str(error):
        message = f"there is not enough memory; {memory_advice}"
    else:
        raise error
    say(f"{program}: error: {message}", sys.stderr)


if __name__ == "__main__":
    sys.exit(cli())
