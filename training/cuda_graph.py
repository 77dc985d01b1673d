"""A training step as a CUDA graph: one launch for all its kernels."""

from collections import Counter

import torch

from training.commandline import UserError, gpu_is_taken

WARM_UP = 3  # steps of a size before it is captured: libraries choose kernels and allocate in the first ones


class CapturedStep:
    """A training step on CUDA, captured as a CUDA graph for each batch size, and replayed.

    `step` takes a batch on the device and returns tensors in lists or dicts. It may neither copy between host and
    device nor depend on a value. The first WARM_UP calls for a size run it as it is, and are training steps like all
    others; capturing runs nothing. What a call returns is overwritten by the next. Each replay has new
    random numbers. Optimizer state loaded after a capture would be ignored: the graph knows the tensors of before.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for the rules.
    """

    def __init__(self, step):
        self.step = step
        self._warm = Counter()  # shape -> calls so far
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
            with torch.cuda.graph(graph, stream=self._stream):  # where the libraries have their handles and workspaces
                values = self.step(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a failed capture raises another one
            if gpu_is_taken(first):
                raise first from None
            cause = str(first).partition("\n")[0]
            raise UserError(f"the training step cannot be captured as a CUDA graph ({cause}): a loss copies between "
                            f"host and device, or depends on a value; set `capturable = False` in the model's "
                            f"class") from error
        return graph, batch, values
