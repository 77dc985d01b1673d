"""A training step as a CUDA graph: one launch for all its kernels."""

from collections import Counter

import torch

from training.cli import gpu_is_taken, warn

WARM_UP = 3  # eager steps before a capture, in which libraries choose kernels and allocate memory


class CapturedStep:
    """A training step on CUDA, captured as one CUDA graph per batch size and replayed; eager once a capture fails.

    `step` takes a batch on the device, sets all gradients to None before it computes them, and returns tensors in lists
    or dicts. It must not copy between host and device or branch on a tensor's value. The first WARM_UP calls for a
    batch size run it eagerly and count as training steps; the capture itself runs nothing. Each call overwrites the
    values that the previous one returned. Each replay has new random numbers. Load optimizer states before the first
    call: a captured graph keeps using the old tensors.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for the rules.
    """

    def __init__(self, step):
        self.step = step
        self.capturable = True  # until a capture fails
        self._warm = Counter()  # shape -> eager calls so far
        self._graphs = {}       # shape -> the graph, the batch that it reads, the values that it writes
        self._stream = torch.cuda.Stream()

    def __call__(self, x):
        if x.shape in self._graphs:
            graph, batch, values = self._graphs[x.shape]
            batch.copy_(x)
            graph.replay()
            return values
        if self.capturable and self._warm[x.shape] < WARM_UP:
            self._warm[x.shape] += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                values = self.step(x)
            torch.cuda.current_stream().wait_stream(self._stream)
            return values
        if self.capturable:
            self._capture(x)
        return self._graphs[x.shape][2] if self.capturable else self.step(x)

    def _capture(self, x):
        """Capture the step on x and replay it once; if that fails, nothing has run, and steps are eager from now on.

        If ending the capture fails, the side stream stays current and, in torch 2.7, the random generator in capture
        mode; both are repaired here. The gradients of a failed capture, never written, are dropped by the next step.
        """
        stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[x.device.index]
        random, graph, batch = generator.clone_state(), torch.cuda.CUDAGraph(), x.clone()
        try:
            # On the stream for which libraries have workspaces; in this mode, other threads may allocate pinned memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                values = self.step(batch)
            graph.replay()
            self._graphs[x.shape] = graph, batch, values
        except Exception as error:
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random)
            self._give_up(error)

    def _give_up(self, error):
        """Warn of a failed capture and end capturing; raise the error of a full or busy GPU.

        Keeps no reference to the error, whose traceback holds the memory of the failed step.
        """
        first = error.__context__ or error  # ending a failed capture raises a second error
        if gpu_is_taken(first):
            raise first from None
        self.capturable = False
        self._graphs.clear()  # those of other batch sizes use the generator's old state
        cause = (str(first) or repr(first)).partition("\n")[0]
        warn(f"training continues without a CUDA graph, and more slowly, because capturing a step failed ({cause}); "
             f"--no-graph, or `capturable = False` in the model's class, takes such steps from the start")
