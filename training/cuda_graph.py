"""A training step as a CUDA graph: one launch for all its kernels."""

from collections import Counter

import torch

from training.cli import UserError, gpu_is_taken

WARM_UP = 3  # eager steps before a capture, in which libraries choose kernels and allocate memory


class CapturedStep:
    """A training step on CUDA, captured as one CUDA graph per batch size and replayed.

    `step` takes a batch on the device and returns tensors in lists or dicts. It must not copy between host and device
    or branch on a tensor's value. The first WARM_UP calls for a batch size run it eagerly and count as training steps;
    the capture itself runs nothing. Each call overwrites the values that the previous one returned. Each replay has new
    random numbers. Load optimizer states before the first call: a captured graph keeps using the old tensors.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for the rules.
    """

    def __init__(self, step):
        self.step = step
        self._warm = Counter()  # shape -> eager calls so far
        self._graphs = {}       # shape -> the graph, the batch that it reads, the values that it writes
        self._stream = torch.cuda.Stream()

    def __call__(self, x):
        if x.shape not in self._graphs:
            if self._warm[x.shape] < WARM_UP:
                self._warm[x.shape] += 1
                return self._on_side_stream(x)
            self._graphs[x.shape] = self._capture(x)
        graph, batch, values = self._graphs[x.shape]
        batch.copy_(x)
        graph.replay()
        return values

    def _on_side_stream(self, x):
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            values = self.step(x)
        torch.cuda.current_stream().wait_stream(self._stream)
        return values

    def _capture(self, x):
        graph, batch = torch.cuda.CUDAGraph(), x.clone()
        try:
            with torch.cuda.graph(graph, stream=self._stream):  # the stream for which libraries have workspaces
                values = self.step(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error.__context__ or error  # ending a failed capture raises a second error
            if gpu_is_taken(first):
                raise first from None
            cause = str(first).partition("\n")[0]
            raise UserError(f"the training step cannot be captured as a CUDA graph ({cause}): a loss copies between "
                            f"host and device or branches on a tensor's value; set `capturable = False` in the model's "
                            f"class") from error
        return graph, batch, values
