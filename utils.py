"""Logging to TensorBoard: losses and pictures. This file imports no other file of the project."""

import torch
from torchvision.utils import make_grid


class TensorBoardLogger:
    """Logs the mean of every value over windows of `avg_window` steps, at the last step of each window.

    Values are summed on their own device; the CPU waits for it only when a window is complete and when an epoch ends.
    """

    def __init__(self, summary_writer, avg_window=50, name=None):
        self.summary_writer = summary_writer
        self.avg_window = avg_window
        self.prefix = "" if name is None else f"{name}/"
        self.global_step = 0
        self.latest = {}  # the means of the last window that was logged
        self._unread, self._window, self._epoch = {}, {}, {}  # each: name -> (sum, number of values)

    def add_values(self, values):
        """Add the values of one step, a dict of names to scalar tensors or numbers; other tensors are left out."""
        self.global_step += 1
        tensors = {name: torch.as_tensor(value).detach().float() for name, value in values.items()}
        add(self._unread, {name: (tensor, 1) for name, tensor in tensors.items() if tensor.numel() == 1})
        if self.global_step % self.avg_window == 0:
            self.flush()

    def flush(self):
        """Log the means of the open window, complete or not, and start a new one. Without values, do nothing."""
        self._read()
        self.latest, self._window = means(self._window), {}
        for name, mean in self.latest.items():
            self.summary_writer.add_scalar(self.prefix + name, mean, self.global_step)

    def end_epoch(self):
        """Return the mean of each value over the epoch's steps that reported it, and start a new epoch."""
        self._read()
        epoch, self._epoch = means(self._epoch), {}
        return epoch

    def _read(self):
        """Add the sums on the device, for which the CPU waits once, to those of the window and of the epoch."""
        totals = [total.reshape(()) for total, _ in self._unread.values()]
        numbers = torch.stack([total.to(totals[0].device) for total in totals]).tolist() if totals else []
        read = {name: (number, count) for (name, (_, count)), number in zip(self._unread.items(), numbers, strict=True)}
        self._unread = {}
        for sums in (self._window, self._epoch):
            add(sums, read)

    def state_dict(self):
        """Return the logger's step and its open window; call `end_epoch` before."""
        return {"global_step": self.global_step, "window": self._window}

    def load_state_dict(self, state):
        self.global_step, self._window = state["global_step"], state["window"]


def add(sums, others):
    """Add to each sum and its number of values those of another dict."""
    for name, (value, number) in others.items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = total + value, count + number


def means(sums):
    return {name: total / count for name, (total, count) in sums.items()}


def log_images(summary_writer, tag, images, step, columns=8):
    """Log images [N, 1, 28, 28] in [-1, 1] as one picture, and return it; see `image_grid`."""
    grid = image_grid(images, columns)
    summary_writer.add_image(tag, grid, step)
    return grid


def image_grid(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture with `columns` per row, uint8 [3, H, W], on the CPU."""
    grid = make_grid(images.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1))
    return (255 * grid).round().byte()
