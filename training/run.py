"""A run of train.py, from its folder to its last checkpoint: everything in `main` that is not training."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from argparse import Namespace

import torch
from tqdm import tqdm

from training import checkpoint
from training.cli import FlagError, RunStopped, UserError, print_line, shell_command, warn
from training.device import device_name, unused_gpu_warning
from training.ema import weights_on_cpu
from training.files import write_atomically
from training.random_state import random_states, set_random_states
from training.threads import QUOTA

RESUME_OVERRIDES = {"data_dir", "log_dir", "num_workers", "no_cuda", "no_graph", "checkpoint_every", "epochs"}
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; kill, batch queues; a batch queue's warning before the time limit


@contextlib.contextmanager
def open_run(args):
    """Yield the Run that the flags specify: a new one, or with --resume a stopped one, locked and its state loaded."""
    args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))  # hparams.json is read in other folders, too
    args.log_dir = os.path.expanduser(args.log_dir)
    with contextlib.ExitStack() as stack:
        folder = state = None
        if args.resume is not None:
            resume = checkpoint.latest_run(args.log_dir) if args.resume == "latest" else os.path.expanduser(args.resume)
            folder = checkpoint.run_folder(resume)
            stack.enter_context(checkpoint.locked(folder))
            state = checkpoint.load_state(resume)
            args = resumed_args(args, state["settings"])
        run = Run(args, stack, folder, state)
        try:
            yield run
        except KeyboardInterrupt:
            hint = f"stopped at once; {checkpoint.resume_hint(run.folder)}" if run.folder else "interrupted"
            raise KeyboardInterrupt(hint) from None
    run.print_end()


def resumed_args(args, settings):
    """Return a stopped run's flags, those in RESUME_OVERRIDES as given now; raise FlagError if others contradict it.

    Flags that the run's settings lack, because they are newer, are as given or have their defaults.
    """
    explicit = set(args.explicit_flags)
    for name in sorted(explicit & set(settings) - RESUME_OVERRIDES):
        if getattr(args, name) != settings[name]:
            raise FlagError(f"--{name} {getattr(args, name)} contradicts the run, which has {settings[name]}; omit "
                            f"the flag, or start a new run")
    if "epochs" in explicit and args.epochs < settings["epochs"]:
        raise FlagError(f"--epochs {args.epochs} is less than the run's {settings['epochs']}; give a larger "
                        f"number, or omit the flag")
    kept = set(vars(args)) & set(settings) - explicit
    return Namespace(**{**vars(args), **{name: settings[name] for name in kept}})


class Run:
    """A run as `main` uses it: the epochs to train, what follows a step, and checkpoints.

    Attributes: `args`, the flags; `folder`; `settings`, the content of hparams.json; `resumed`, the training state if
    the run is resumed, else None; `epoch`, completed epochs; `steps`, completed steps of the next one; `means` of the
    losses, over the last complete epoch.
    """

    def __init__(self, args, stack, folder, state):
        self.args, self.folder, self.resumed = args, folder, state
        self.epoch, self.steps, self.means = 0, 0, {}
        self._stack = stack  # contexts that end with the run

    def start(self, data, device, model, ema, **optimizers):
        """Create the folder of a new run, or restore the state of a resumed one. From now on, signals stop the run."""
        settings = {**vars(self.args), "trained_on": data.name, "fallback": data.warning, "device": device.type,
                    "device_name": device_name(device), "torch": torch.__version__}
        self.settings = {name: value for name, value in json.loads(json.dumps(settings, default=str)).items()
                         if name not in ("explicit_flags", "resume")}
        self._loader, self._model, self._ema, self._optimizers = data.train_loader, model, ema, optimizers
        self._types = [type(optimizer).__name__ for optimizer in optimizers.values()]  # not recorded in their states
        self._started = time.monotonic()  # for a resumed run, less the seconds before
        if self.resumed:
            self._restore(self.resumed)
            checkpoint.rewind(self.folder, self.resumed)
        else:
            self.folder = checkpoint.create_run_folder(self.args.log_dir)
            self._stack.enter_context(checkpoint.locked(self.folder))
        self._pending_signals = self._stack.enter_context(stop_signals())
        write_atomically(self.folder / "hparams.json", (json.dumps(self.settings, indent=2) + "\n").encode())
        quota = f", quota of {QUOTA:g} CPUs" if QUOTA else ""
        print_line(f"device: {device.type} ({self.settings['device_name']}{quota}), torch {torch.__version__}")
        name = "MNIST" if data.name == "mnist" else "the bundled digits"
        print_line(f"data:   {len(self._loader.dataset):,} images of {name}")
        print_line(f"run:    {self.folder}")

    def epochs(self, writer, *loggers):
        """Yield the numbers of the remaining epochs: from 0 (before training) or where the run stopped."""
        self._writer, self._loggers, self._shown = writer, loggers, None
        if self.resumed:
            for logger, state in zip(loggers, self.resumed["loggers"], strict=True):
                logger.load_state_dict(state)
            self._save(keep=False)  # settings may be new, and the weights file older than the state
        steps, first = len(self._loader), self.epoch + 1 if self.resumed else 0
        with tqdm(total=self.args.epochs * steps, initial=self.epoch * steps + self.steps, disable=None,
                  bar_format="{desc}|{bar}|{remaining} left{postfix}", dynamic_ncols=True) as self._bar:
            for epoch in range(first, self.args.epochs + 1):
                self._loader.epoch = self.epoch
                self._bar.set_description(f"epoch {epoch}/{self.args.epochs}")
                self._epoch_started = time.monotonic()
                yield epoch
        self._close_windows()

    def step_done(self):
        """Count a step; stop if a signal is pending, except after an epoch's last step.

        Raises UserError if the autoencoder's loss was NaN or infinite in the last logged window.
        """
        self.steps += 1
        self._bar.update()
        latest = [logger.latest for logger in self._loggers]
        if latest != self._shown:
            self._shown = latest
            self._show(merged(latest))
        if self._pending_signals and self.steps < len(self._loader):
            self._stop()

    def end_epoch(self, epoch):
        """Print the epoch's losses, and save a checkpoint if one is due; stop if a signal is pending."""
        if epoch:
            self.means = merged(logger.end_epoch() for logger in self._loggers)
            self._show(self.means)
            self.epoch, self.steps = epoch, 0
            if self._bar.disable or not sys.stdout.isatty():
                print_line(f"epoch {epoch}/{self.args.epochs}: {describe(self.means)}, "
                           f"{time.monotonic() - self._epoch_started:.1f} s")
        last = epoch == self.args.epochs
        if self._pending_signals and not last:
            self._stop()
        if last or epoch % self.args.checkpoint_every == 0:
            self._save()

    def print_end(self):
        """Print how the run ended and where its results are."""
        epochs, seconds = self.args.epochs, time.monotonic() - self._started
        print_line(f"done:   {epochs} epoch{'s' * (epochs > 1)} in {tqdm.format_interval(seconds)}; last epoch: "
                   f"{describe(self.means)}")
        print_line(f"see:    pictures in {self.folder / 'results'}, curves with: "
                   f"{shell_command('tensorboard', '--logdir', str(self.folder))}")
        for warning in (self.settings["fallback"], unused_gpu_warning(self.args.no_cuda)):
            if warning:  # repeated for those who read only the end
                warn(warning)

    def _show(self, means):
        """Show the means of the losses next to the progress bar; raise UserError if training has diverged."""
        self._bar.set_postfix_str(describe(means), refresh=False)
        if not math.isfinite(means.get("ae_loss", 0)):
            raise UserError(f"the autoencoder's loss became {means['ae_loss']} before step {self.steps + 1} of epoch "
                            f"{self.epoch + 1}: training has diverged; try smaller learning rates (--ae_lr, --d_lr)")

    def _save(self, keep=True):
        """Save the training state and the averaged weights; `keep` the previous state."""
        state = {"settings": self.settings, "types": self._types, "model": weights_on_cpu(self._model),
                 "ema": self._ema.state_dict(), "loggers": [logger.state_dict() for logger in self._loggers],
                 **{name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
                 "epoch": self.epoch, "steps": self.steps, "means": self.means,
                 "seconds": time.monotonic() - self._started, "random": random_states(self._model)}
        self._writer.flush()  # events logged so far belong to this state, later ones do not
        checkpoint.save_state(self.folder, state, keep)

    def _restore(self, state):
        """Restore a stopped run's state; raise CheckpointError if it does not fit."""
        differing = [name for name in ("device", "device_name", "torch")
                     if self.settings[name] != state["settings"][name]]
        try:
            if state["types"] != self._types:
                raise ValueError(f"its optimizers are {state['types']}, not {self._types}")
            self._model.load_state_dict(state["model"])
            self._ema.load_state_dict(state["ema"])
            for name, optimizer in self._optimizers.items():
                load_optimizer(optimizer, state[name])
            self.epoch, self.steps, self.means = state["epoch"], state["steps"], state["means"]
            self._started -= state["seconds"]
            streams = {name: stream for name, stream in state["random"].items()
                       if name != "device" or "device" not in differing}
            set_random_states(self._model, streams)
        except (RuntimeError, ValueError, KeyError) as error:
            raise checkpoint.CheckpointError(
                f"{self.folder} cannot be resumed: the checkpoint does not fit models.py or train.py, which may have "
                f"changed since: {' '.join(str(error).split())[:200]}") from None
        for name in differing:
            warn(f"the run began with {state['settings'][name]} and continues with {self.settings[name]} ({name}): the "
                 f"results may not be bitwise reproducible")

    def _close_windows(self):
        """Log the means of the loggers' open windows; after the last checkpoint, because a resume continues these."""
        for logger in self._loggers:
            logger.flush()

    def _stop(self):
        """Save the training state, and raise RunStopped."""
        self._save()
        self._close_windows()
        signum = self._pending_signals[0]
        raise RunStopped(f"stopped by {signal.Signals(signum).name} after {self.epoch} epochs and {self.steps} steps; "
                         f"{checkpoint.resume_hint(self.folder)}", signum)


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects the numbers of received signals; a second SIGINT raises KeyboardInterrupt."""
    pending_signals = []

    def handle(signum, frame):
        if signum == signal.SIGINT and signum in pending_signals:
            raise KeyboardInterrupt
        pending_signals.append(signum)

    in_main_thread = threading.current_thread() is threading.main_thread()  # handlers can only be set there
    numbers = [getattr(signal, name) for name in SIGNALS if in_main_thread and hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield pending_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def load_optimizer(optimizer, state):
    """Load a state_dict, saved on any device, into an optimizer, but keep this device's flags and memory layouts."""
    for group, current in zip(state["param_groups"], optimizer.param_groups, strict=False):
        group.update({flag: current[flag] for flag in ("fused", "capturable") if flag in current})
        rate = float(group["lr"])
        group["lr"] = torch.full_like(current["lr"], rate) if torch.is_tensor(current["lr"]) else rate
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if torch.is_tensor(moment) and moment.shape == weight.shape:  # fused steps read both in memory order
                moments[name] = torch.empty_like(weight).copy_(moment)


def merged(means):
    """Return the means of several loggers as one dict."""
    return {name: mean for part in means for name, mean in part.items()}


def describe(means):
    """Format those of the losses and the accuracy that are known."""
    texts = [f"{name} {means[name]:.4f}" for name in ("recon_loss", "gen_loss", "disc_loss") if name in means]
    texts += [f"accuracy {means['accuracy']:.1%}"] if "accuracy" in means else []
    return ", ".join(texts) or "no losses reported"
