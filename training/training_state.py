"""Everything that changes during a run, and therefore everything that a resume needs."""

import time

from training.checkpoint import CheckpointError
from training.cli import warn
from training.ema import weights_on_cpu
from training.optimizers import load_optimizer
from training.random_state import random_states, set_random_states


class TrainingState:
    """Model, averaged weights, optimizers, loggers and statistics of a run, and its progress."""

    OPTIMIZERS, OTHERS = ("optimizer_ae", "optimizer_disc"), ("average", "logger_ae", "logger_disc")

    def __init__(self, model, statistics, **parts):
        self.model = model
        self.statistics = statistics
        self.parts = parts  # by the names in OPTIMIZERS and OTHERS
        self.epoch = 0      # completed epochs
        self.steps = 0      # completed steps of the next epoch
        self.means = {}     # of the losses, over the last complete epoch
        self.earlier, self.started = 0.0, time.monotonic()

    @property
    def seconds(self):
        """The time the run has taken, including the time before it was resumed."""
        return self.earlier + time.monotonic() - self.started

    def end_epoch(self, epoch):
        self.epoch, self.steps, self.means = epoch, 0, self.statistics.means()

    def state_dict(self, settings):
        """Return the run's state as a dict of tensors on the CPU, numbers, strings, lists and dicts."""
        self.statistics.read()
        sums = self.statistics.state_dict() if self.steps else {"totals": {}}  # first: it logs the unread steps
        return {**sums, "settings": settings, "types": self._types(), "model": weights_on_cpu(self.model),
                "epoch": self.epoch, "steps": self.steps, "means": self.means, "seconds": self.seconds,
                "random": random_states(self.model),
                **{name: self.parts[name].state_dict() for name in (*self.OPTIMIZERS, *self.OTHERS)}}

    def load_state_dict(self, state, settings):
        """Restore a run's state; raise CheckpointError if it does not fit. `settings` are the current ones."""
        differing = [name for name in ("device", "device_name", "torch") if settings[name] != state["settings"][name]]
        try:
            if state["types"] != self._types():
                raise ValueError(f"its optimizers are {state['types']}, not {self._types()}")
            self.model.load_state_dict(state["model"])
            for name in self.OPTIMIZERS:
                load_optimizer(self.parts[name], state[name])
            for name in self.OTHERS:
                self.parts[name].load_state_dict(state[name])
            self.epoch, self.steps = state["epoch"], state["steps"]
            self.means, self.earlier = state["means"], state["seconds"]
            if self.steps:
                self.statistics.load_state_dict(self.epoch + 1, state)
            streams = dict(state["random"])
            if "device" in differing:
                streams.pop("device", None)
            set_random_states(self.model, streams)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint does not fit models.py or train.py, which may have changed since: "
                                  f"{' '.join(str(error).split())[:200]}") from None
        for name in differing:
            warn(f"the run began with {state['settings'][name]} and continues with {settings[name]} ({name}): the "
                 f"results may not be bitwise reproducible")

    def _types(self):
        """Return the names of the optimizers' classes, which their states do not record."""
        return [type(self.parts[name]).__name__ for name in self.OPTIMIZERS]
