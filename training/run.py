"""A run of train.py, from its folder to its last checkpoint: everything in `main` that is not training."""

import contextlib
import json
import shlex
import signal
import sys
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import CheckpointError, load_state, remove_unstarted, rewind, save_state
from training.cli import RunStopped, duration, print_line, warn
from training.data import Batches
from training.device import device_name, unused_gpu_warning
from training.ema import weights_on_cpu
from training.files import write_atomically
from training.folder import create_run_folder, has_state, latest_run, locked, resume_hint, run_folder
from training.options import resumed_args, with_defaults
from training.signals import stop_signals
from training.threads import QUOTA
from training.training_state import TrainingState


@contextlib.contextmanager
def open_run(args):
    """Yield the Run that the flags specify: a new one, or with --resume a stopped one, locked and its state loaded.

    At the end, the lock is released, and a new run without a checkpoint is removed.
    """
    args = with_defaults(args)
    with contextlib.ExitStack() as stack:
        if args.resume:
            resume = latest_run(args.log_dir) if args.resume == "latest" else args.resume
            folder = run_folder(resume)
            stack.enter_context(locked(folder))
            state = load_state(resume)
            args = resumed_args(args, state["settings"])
            args.resume = str(folder)
            run = Run(args, stack, folder, state)
        else:
            run = Run(args, stack)
        try:
            yield run
        except BaseException as error:
            hint = run.folder and resume_hint(run.folder)
            if run.folder and not has_state(run.folder):
                remove_unstarted(run.folder)
            if run.folder and isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped at once; {hint}") from None
            if run.folder and isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, error.filename or str(run.folder)) from None
            raise
    run.print_end()


class Run:
    """A run as `main` uses it: the epochs to train, batches that stop at a signal, and checkpoints.

    Attributes: `args`, the flags; `folder`; `settings`, the content of hparams.json; `resumed`, the training state if
    the run is resumed, else None.
    """

    def __init__(self, args, stack, folder=None, state=None):
        self.args = args
        self.folder = folder
        self.resumed = state
        self._stack = stack  # contexts that end with the run

    def start(self, data, device):
        """Create the folder of a new run, and print device, data and folder. From now on, signals stop the run."""
        settings = {**vars(self.args), "trained_on": data.name, "fallback": data.warning, "device": device.type,
                    "device_name": device_name(device), "torch": torch.__version__}
        self.settings = {name: value for name, value in json.loads(json.dumps(settings, default=str)).items()
                         if name not in ("explicit_flags", "resume")}
        self._loader = data.train_loader
        self._pending_signals = self._stack.enter_context(stop_signals())
        if not self.resumed:
            self.folder = create_run_folder(self.args.log_dir)
            self._stack.enter_context(locked(self.folder))
        quota = f", quota of {QUOTA:g} CPUs" if QUOTA else ""
        print_line(f"device: {device.type} ({self.settings['device_name']}{quota}), torch {torch.__version__}")
        name = "MNIST" if data.name == "mnist" else "the bundled digits"
        print_line(f"data:   {len(self._loader.dataset):,} images of {name}")
        print_line(f"run:    {self.folder}")

    def track(self, **parts):
        """Set the contents of a checkpoint (see TrainingState); if the run is resumed, restore their states."""
        self.state = TrainingState(**parts)
        if self.resumed:
            try:
                self.state.load_state_dict(self.resumed, self.settings)
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder} cannot be resumed: {error}") from None

    @contextlib.contextmanager
    def summary_writer(self, *loggers):
        """Yield the run's SummaryWriter, which the loggers use too."""
        if self.resumed:
            rewind(self.folder, self.resumed)
        write_atomically(self.folder / "hparams.json", (json.dumps(self.settings, indent=2) + "\n").encode())
        with SummaryWriter(self.folder) as writer:
            self._writer = writer
            for logger in loggers:
                logger.summary_writer = writer
            try:
                yield writer
            finally:  # after the last checkpoint, because a resume continues open windows
                for logger in loggers:
                    logger.flush()

    def epochs(self):
        """Yield the numbers of the remaining epochs: from 0 (before training) or where the run stopped."""
        if self.resumed:
            self._save(keep=False)  # settings may be new, and the weights file older than the state
        steps = len(self._loader)
        with tqdm(total=self.args.epochs * steps, initial=self.state.epoch * steps + self.state.steps, disable=None,
                  bar_format="{desc}|{bar}|{remaining} left{postfix}", dynamic_ncols=True) as self._bar:
            yield from range(self.state.epoch + 1 if self.resumed else 0, self.args.epochs + 1)

    def batches(self, after_step):
        """Return the remaining batches of the next epoch; call `after_step` after each batch's step.

        If a signal is then pending, save everything and raise RunStopped, except after the epoch's last step.
        """
        epoch = self.state.epoch + 1
        self._loader.epoch, self._loader.skip = self.state.epoch, self.state.steps
        self.state.statistics.begin(epoch)
        self._bar.set_description(f"epoch {epoch}/{self.args.epochs}")
        self._epoch_started = time.monotonic()

        def step_done():
            after_step()
            self.state.steps += 1
            self._bar.update()
            if self._pending_signals and self.state.steps < len(self._loader):
                self._save()
                self._stop()

        return Batches(self._loader, step_done)

    def show_losses(self, means):
        """Show the means of the latest steps next to the progress bar."""
        self._bar.set_postfix_str(describe(means), refresh=False)

    def end_epoch(self, epoch):
        """Print the epoch's losses, and save a checkpoint if one is due; stop if a signal is pending."""
        if epoch:
            self.state.end_epoch(epoch)
            if self._bar.disable or not sys.stdout.isatty():
                print_line(f"epoch {epoch}/{self.args.epochs}: {describe(self.state.means)}, "
                           f"{time.monotonic() - self._epoch_started:.1f} s")
        signals = tuple(self._pending_signals)  # a later signal is handled after the next step
        last = epoch == self.args.epochs
        if signals or last or epoch % self.args.checkpoint_every == 0:
            self._save(keep=epoch > 0)
        if signals and not last:
            self._stop()

    def print_end(self):
        """Print how the run ended and where its results are."""
        epochs = self.args.epochs
        print_line(f"done:   {epochs} epoch{'s' * (epochs > 1)} in {duration(self.state.seconds)}; last epoch: "
                   f"{describe(self.state.means)}")
        print_line(f"see:    pictures in {self.folder / 'results'}, curves with: tensorboard --logdir "
                   f"{shlex.quote(str(self.folder))}")
        for warning in (self.settings["fallback"], unused_gpu_warning(self.args.no_cuda)):
            if warning:  # repeated for those who read only the end
                warn(warning)

    def _save(self, keep=True):
        """Save the training state and the averaged weights; `keep` the previous state."""
        state = self.state.state_dict(self.settings)
        self._writer.flush()  # events logged so far belong to this state, later ones do not
        save_state(self.folder, state, weights_on_cpu(self.state.parts["average"].model), keep)

    def _stop(self):
        signum = self._pending_signals[0]
        raise RunStopped(f"stopped by {signal.Signals(signum).name} after {self.state.epoch} epochs and "
                         f"{self.state.steps} steps; {resume_hint(self.folder)}", signum)


def describe(means):
    """Format those of the losses and the accuracy that are known."""
    texts = [f"{name} {means[name]:.4f}" for name in ("recon_loss", "gen_loss", "disc_loss") if name in means]
    texts += [f"accuracy {means['accuracy']:.1%}"] if "accuracy" in means else []
    return ", ".join(texts) or "no losses reported"
