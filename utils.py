"""Logging to TensorBoard. This file imports no other file of the project."""

import torch


class TensorBoardLogger:
    """Logs the mean of every value over windows of `avg_window` steps, at the last step of each window.

    Values are summed on their own device; the CPU waits for it only when a window is complete.
    """

    def __init__(self, summary_writer, avg_window=50, name=None):
        self.summary_writer = summary_writer
        self.avg_window = avg_window
        self.prefix = "" if name is None else f"{name}/"
        self.global_step = 0
        self._sums = {}    # name -> sum over the open window
        self._counts = {}  # name -> number of values in that sum

    def add_values(self, values):
        """Add the values of one step, a dict of names to scalar tensors or numbers."""
        self.global_step += 1
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.global_step % self.avg_window == 0:
            self.flush()

    def flush(self):
        """Log the means of the open window, complete or not, and start a new one. Without values, do nothing."""
        means = to_numbers({name: total / self._counts[name] for name, total in self._sums.items()})
        for name, mean in means.items():
            self.summary_writer.add_scalar(self.prefix + name, mean, self.global_step)
        self._sums, self._counts = {}, {}

    def state_dict(self):
        """Return the logger's step and open window."""
        return {"global_step": self.global_step, "sums": to_numbers(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""
        self.global_step, self._sums, self._counts = state["global_step"], dict(state["sums"]), dict(state["counts"])


def to_numbers(values):
    """Convert a dict's values, scalar tensors or numbers, to floats. The CPU waits for the device once."""
    tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
    if tensors:
        device = next(iter(tensors.values())).device
        numbers = torch.stack([value.to(device).reshape(()) for value in tensors.values()]).tolist()
        values = {**values, **dict(zip(tensors, numbers, strict=True))}
    return {name: float(value) for name, value in values.items()}
