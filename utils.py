"""Logging to TensorBoard, and files that are whole or not there at all. This file needs no other file of the project."""

import os
from contextlib import suppress
from pathlib import Path

import torch


class TensorBoardLogger:
    """Writes the mean of every value over windows of `avg_window` calls, at the number of the window's last call.

    Values are summed on their own device; the CPU waits for it only when a window is complete.
    """

    def __init__(self, summary_writer, avg_window=50, name=None):
        self.summary_writer = summary_writer
        self.avg_window = avg_window
        self.prefix = "" if name is None else f"{name}/"
        self.global_step = 0
        self._sums = {}    # name -> sum over the open window
        self._counts = {}  # name -> how many values that sum has

    def add_values(self, values):
        """Take one iteration's values, a dict of names to scalar tensors or plain numbers."""
        self.global_step += 1
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.global_step % self.avg_window == 0:
            self.flush()

    def flush(self):
        """Write the means of the window as far as it has come, and begin a new one. Without values, do nothing."""
        means = to_numbers({name: total / self._counts[name] for name, total in self._sums.items()})
        for name, mean in means.items():
            self.summary_writer.add_scalar(self.prefix + name, mean, self.global_step)
        self._sums, self._counts = {}, {}

    def state_dict(self):
        """Return where the logger stands: its step and the open window."""
        return {"global_step": self.global_step, "sums": to_numbers(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state):
        """Go on from where another logger stood."""
        self.global_step, self._sums, self._counts = state["global_step"], dict(state["sums"]), dict(state["counts"])


def to_numbers(values):
    """Return a dict of scalar tensors or plain numbers as one of floats. The CPU waits for the device, once."""
    tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
    if tensors:
        device = next(iter(tensors.values())).device
        numbers = torch.stack([value.to(device).reshape(()) for value in tensors.values()]).tolist()
        values = {**values, **dict(zip(tensors, numbers))}
    return {name: float(value) for name, value in values.items()}


def write_atomically(path, content, keep=None):
    """Write bytes to a file so that whoever looks finds either all of them or what was there before.

    What was there before is kept as the file `keep`, if that is given. The file's folder is made where it is missing,
    but not the one around it: a run's folder that somebody removed does not come back with a part of its files.
    Raises OSError with the path as its `filename`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # it is there only where something failed
            temporary.unlink()


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk; Windows cannot do that for folders."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
