"""A run of train.py: its folder, its flags, and its state, saved after every epoch; everything in `main` but training.

However a run ends, only the epoch in progress is lost, and --resume is the only way back (Candea and Fox, "Crash-only
software", HotOS 2003). It needs one file, <run>/checkpoints/training_state.pt, which is replaced atomically.
"""

import contextlib
import json
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import QUOTA, files
from training.cli import FlagError, UserError, has_width, print_line, shell_command, warn
from training.device import device_name, unused_gpu_warning

FORMAT = "adversarial autoencoder, training state 5"
STATE = "training_state.pt"
OF_THE_MACHINE = {"data_dir", "log_dir", "num_workers", "no_cuda", "no_graph"}  # flags that no run passes on
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def resolve(args, defaults, base):
    """Return a run's flags as a Namespace and, with --resume, its state, in which "folder" is its folder; else None."""
    given, saved, of_run = vars(args), None, {}
    if given.get("base"):
        given = {**base, **given}
    if given.get("resume") is not None:
        folder = find_run(given["resume"], given.get("log_dir", defaults["log_dir"]))
        saved = {**load_state(folder), "folder": folder}
        of_run = {name: saved["settings"][name] for name in saved["settings"].keys() & defaults.keys() - OF_THE_MACHINE}
        for name in sorted(given.keys() & of_run.keys()):
            if given[name] != of_run[name] and not (name == "epochs" and given[name] > of_run[name]):
                raise FlagError(f"--{name} {given[name]} contradicts the run, which has {of_run[name]}; omit the flag, "
                                f"or start a new run")
    # What is given comes before the preset --base, this before a resumed run, and that before the defaults.
    args = Namespace(**{name: value for name, value in {**defaults, **of_run, **given}.items()
                        if name not in ("base", "resume")})
    args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))  # hparams.json is read in other folders, too
    args.log_dir = os.path.expanduser(args.log_dir)
    return args, saved


def find_run(resume, log_dir):
    """Return the folder of the run that --resume names: its folder or training state, or "latest" in `log_dir`."""
    place = Path(os.path.abspath(os.path.expanduser(log_dir if resume == "latest" else resume)))
    folder = place.parent.parent if place.name == STATE else place
    if resume == "latest":
        states = sorted(place.glob(f"*/checkpoints/{STATE}"), key=os.path.getmtime)
        folder = states[-1].parents[1] if states else place
    if not os.path.exists(folder / "checkpoints" / STATE):
        raise UserError(f"{place} cannot be resumed: it has no checkpoints/{STATE}; name a run's folder")
    return folder


def load_state(folder):
    """Return the training state of a run; raise UserError if it is damaged or of another version."""
    path = Path(folder) / "checkpoints" / STATE
    state = files.load_checked(path, "start a new run")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not of this version; finish the run with the commit that made it, or start anew")
    return state


@contextlib.contextmanager
def open_run(args, saved, data, device):
    """Yield a locked Run: a new one or, given a saved state, that one."""
    settings = {**vars(args), "trained_on": data.name, "fallback": data.warning, "device": device.type,
                "device_name": device_name(device), "torch": torch.__version__}
    settings = json.loads(json.dumps(settings, default=str))  # as in hparams.json
    folder = saved["folder"] if saved else files.create_run_folder(args.log_dir)
    with files.locked(folder):
        if saved and load_state(folder)["run"]["seconds"] != saved["run"]["seconds"]:
            raise UserError(f"{folder} was trained further by another process; start the command again")
        run = Run(folder, settings, saved, SummaryWriter(folder, filename_suffix=files.OUR_EVENTS))
        run.print_start(len(data.train_loader.dataset))
        try:
            with run.writer:  # on a full disk, closing it fails, too
                yield run
        except (KeyboardInterrupt, Exception) as error:
            if not isinstance(error, UserError):  # whose sentence says what to do
                error.add_note(run.resume_hint())
            raise
        run.print_end()


class Run:
    """A run as `main` uses it: its folder, TensorBoard writer, settings (hparams.json) and last epoch's mean losses."""

    def __init__(self, folder, settings, saved, writer):
        self.folder, self.settings, self.writer, self._saved = folder, settings, writer, saved
        progress = saved["run"] if saved else {"epoch": None, "means": {}, "seconds": 0}
        self._epoch, self.means = progress["epoch"], progress["means"]  # of the last saved epoch; 0: before training
        self._epoch_started = time.monotonic()
        self._started = self._epoch_started - progress["seconds"]
        self._parts, self._loggers, self._steps, self._bar = {}, (), 0, None  # steps of an epoch

    def restore(self, **parts):
        """Take the parts of the run by name, all that has a state; give them that of a stopped run, if it is one."""
        self._parts = {name: part for name, part in parts.items()
                       if hasattr(part, "state_dict")}  # a loader may have none, such as torch's
        self._loggers, self._steps = (parts["logger_ae"], parts["logger_disc"]), len(parts["loader"])
        if self._saved:
            self._load()
            files.rewind(self.folder, self._saved["events"])
        files.write_atomically(self.folder / "hparams.json", (json.dumps(self.settings, indent=2) + "\n").encode())
        if self._saved:
            self._save(self._epoch)  # settings may be new, and the weights file older than the state

    def _load(self):
        """Load the saved state of all parts; raise UserError if it does not fit."""
        try:
            for name, part in self._parts.items():
                load = load_optimizer if isinstance(part, torch.optim.Optimizer) else type(part).load_state_dict
                load(part, self._saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"{self.folder} cannot be resumed: the checkpoint does not fit models.py or train.py, as "
                            f"they are now: {' '.join(str(error).split())[:200]}") from None
        for name in ("device", "device_name", "torch"):
            before, now = self._saved["settings"][name], self.settings[name]
            if before != now:
                warn(f"the run began with {before} and continues with {now} ({name}): its bits may differ")

    def epochs(self):
        """Yield the numbers of the epochs to come: from 0, before training, or from the one after the saved epoch."""
        last, first = self.settings["epochs"], 0 if self._epoch is None else self._epoch + 1
        with tqdm(total=last * self._steps, initial=max(0, first - 1) * self._steps, dynamic_ncols=True,
                  bar_format="{desc}|{bar}|{remaining} left{postfix}", disable=not has_width(sys.stderr)) as self._bar:
            for epoch in range(first, last + 1):
                self._bar.set_description(f"epoch {epoch}/{last}")
                self._epoch_started = time.monotonic()
                yield epoch
        for logger in self._loggers:  # after the last checkpoint, because a resumed run continues their open windows
            logger.flush()

    def step_done(self):
        """Move the progress bar; raise UserError if the autoencoder's loss was not finite in the last logged window."""
        self._bar.update()
        logger_ae, logger_disc = self._loggers
        if latest := logger_ae.latest | logger_disc.latest:
            self._show(latest)

    def end_epoch(self, epoch):
        """Print the epoch's losses, and save everything; raise UserError if training has diverged."""
        if epoch:
            logger_ae, logger_disc = self._loggers
            self.means = logger_ae.end_epoch() | logger_disc.end_epoch()
            self._show(self.means)
            print_line(f"epoch {epoch}/{self.settings['epochs']}: {format_means(self.means)}, "
                       f"{time.monotonic() - self._epoch_started:.1f} s")
        self._save(epoch)

    def _show(self, means):
        """Show the means of the losses next to the progress bar; raise UserError if training has diverged."""
        self._bar.set_postfix_str(format_means(means), refresh=False)
        if not math.isfinite(means.get("ae_loss", 0)):
            raise UserError(f"the autoencoder's loss became {means['ae_loss']} in epoch {self._epoch + 1}: training "
                            f"has diverged; try smaller learning rates (--ae_lr, --d_lr)")

    def _save(self, epoch):
        """Save the state of all parts after an epoch, and the averaged weights alone."""
        self.writer.flush()  # events logged so far belong to this state, later ones do not
        progress = {"epoch": epoch, "means": self.means, "seconds": time.monotonic() - self._started}
        state = {"format": FORMAT, "settings": self.settings, "events": files.sync_event_files(self.folder),
                 "run": progress, **{name: part.state_dict() for name, part in self._parts.items()}}
        files.write_atomically(self.folder / "checkpoints" / STATE, files.serialize(state))
        self._epoch = epoch
        files.write_atomically(self.folder / "checkpoints" / files.WEIGHTS, files.serialize(state["ema"]["weights"]))

    def print_start(self, images):
        """Print the device, the data and the folder."""
        settings, quota = self.settings, f", quota of {QUOTA:g} CPUs" if QUOTA else ""
        name = "MNIST" if settings["trained_on"] == "mnist" else "the bundled digits"
        print_line(f"device: {settings['device']} ({settings['device_name']}{quota}), torch {settings['torch']}\n"
                   f"data:   {images:,} images of {name}\nrun:    {self.folder}")

    def print_end(self):
        """Print how the run ended and where its results are, and for those who read only the end its warnings."""
        epochs, seconds = self.settings["epochs"], time.monotonic() - self._started
        command = shell_command("tensorboard", "--logdir", str(self.folder))
        print_line(f"done:   {epochs} epoch{'s' * (epochs > 1)} in {tqdm.format_interval(seconds)}; last epoch: "
                   f"{format_means(self.means)}\n"
                   f"see:    pictures in {self.folder / 'results'}, curves with: {command}")
        for warning in filter(None, (self.settings["fallback"], unused_gpu_warning(self.settings["no_cuda"]))):
            warn(warning)

    def resume_hint(self):
        """Return a clause on what is saved, and how to resume the run on this machine."""
        if self._epoch is None:
            return "nothing is saved yet, so start a new run"
        flags = [f"--{name.replace('_', '-')}" for name in ("no_cuda", "no_graph") if self.settings[name]]
        if self.settings["trained_on"] == "mnist":
            flags += ["--data_dir", self.settings["data_dir"]]
        command = shell_command("python", str(TRAIN), "--resume", str(self.folder), *flags)
        return f"epoch {self._epoch} is saved; resume the run with: {command}"


def load_optimizer(optimizer, state):
    """Load a state_dict, saved on any device, into an optimizer, but keep this device's flags and memory layouts."""
    for group, current in zip(state["param_groups"], optimizer.param_groups, strict=False):
        group.update({flag: current[flag] for flag in ("fused", "capturable") if flag in current})
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if torch.is_tensor(moment) and moment.shape == weight.shape:  # fused steps read both in memory order
                moments[name] = torch.empty_like(weight).copy_(moment)


def format_means(means):
    """Format those of the losses and the accuracy that are known."""
    texts = [f"{name} {means[name]:.4f}" for name in ("recon_loss", "gen_loss", "disc_loss") if name in means]
    texts += [f"accuracy {means['accuracy']:.1%}"] if "accuracy" in means else []
    return ", ".join(texts) or "no losses reported"
