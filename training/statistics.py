"""The losses of an epoch's steps, read from the device every SYNC_EVERY steps."""

import math

import torch

from training.cli import UserError

SYNC_EVERY = 50  # steps between two reads of the losses; at a read, the CPU waits for the device


class LossStatistics:
    """Keeps the losses of each step on the device; reads, checks and logs them every SYNC_EVERY steps.

    Each of `loggers` gets one `add_values` call per step, with numbers. `progress`, if given, is called after each read
    with the means over the steps just read. `steps`, `totals` (sums) and `counts` cover the epoch's steps read so far.
    """

    def __init__(self, *loggers, progress=None):
        self.loggers = loggers
        self.progress = progress
        self.epoch = 0
        self.steps, self.totals, self.counts = 0, {}, {}
        self._unread = []  # per step: for each logger the names of its values, and all values, float32
        self._owners = {}  # name -> number of the logger that reported it first

    def begin(self, epoch):
        """Start an epoch, or continue the one whose first steps `load_state_dict` has restored."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.steps, self.totals, self.counts = 0, {}, {}

    def add(self, *values):
        """Add the values of one step: for each logger a dict of scalar tensors or numbers."""
        device = next((value.device for part in values for value in part.values() if torch.is_tensor(value)), None)
        row = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(())
                           for part in values for value in part.values()])
        self._unread.append(([list(part) for part in values], row))
        if len(self._unread) == SYNC_EVERY:
            self.read()

    def read(self):
        """Read the unread steps, log them, and add them to the totals."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        numbers = iter(torch.cat([row for _, row in unread]).tolist())  # the CPU waits for the device here
        sums, counts = {}, {}
        for names, _ in unread:
            self.steps += 1
            parts = [{name: next(numbers) for name in part} for part in names]
            for name, value in self._merged(parts):
                self._check(name, value)
                for into, counted in ((self.totals, self.counts), (sums, counts)):
                    into[name] = into.get(name, 0.0) + value
                    counted[name] = counted.get(name, 0) + 1
            for logger, part in zip(self.loggers, parts, strict=False):
                logger.add_values(part)
        if self.progress:
            self.progress({name: total / counts[name] for name, total in sums.items()})

    def means(self):
        """Return the mean of each value over the epoch's steps that reported it."""
        self.read()
        return {name: total / self.counts[name] for name, total in self.totals.items()}

    def state_dict(self):
        """Return an unfinished epoch's steps, the sums over them, and counts of values that not all steps reported."""
        self.read()
        counts = {name: count for name, count in self.counts.items() if count != self.steps}
        return {"steps": self.steps, "totals": dict(self.totals), **({"counts": counts} if counts else {})}

    def load_state_dict(self, epoch, state):
        """Restore the first steps of an epoch from a state."""
        self.epoch, self.steps, self.totals = epoch, state["steps"], dict(state["totals"])
        self.counts = {**dict.fromkeys(self.totals, self.steps), **state.get("counts", {})}

    def _merged(self, parts):
        """Yield names and values of all loggers; a name belongs to its first logger, the others append their number."""
        for number, part in enumerate(parts, 1):
            for name, value in part.items():
                yield (name if self._owners.setdefault(name, number) == number else f"{name}_{number}"), value

    def _check(self, name, value):
        if name == "ae_loss" and not math.isfinite(value):
            raise UserError(f"the autoencoder's loss is {value} at step {self.steps} of epoch {self.epoch}: training "
                            f"has diverged; try smaller learning rates (--ae_lr, --d_lr)")

