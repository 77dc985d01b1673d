"""A training step as a CUDA graph: one launch for all its kernels."""

import functools
import weakref
from collections import Counter
from collections.abc import Hashable

import torch

from training.cli import warn

WARM_UP = 3  # eager steps of a batch size before it is recorded, in which libraries choose kernels and allocate memory
MOST = 8     # recordings of a run; options that change more often are trained eagerly


def captured(step):
    """Decorate `step(model, optimizer_ae, optimizer_disc, lambda_, x)`: on CUDA, record a CUDA graph and replay it.

    Each shape of x, lambda_ and set of options of the optimizers, such as learning rates, has a recording of its own.
    Each step has new random numbers, and overwrites the values that the previous one returned. Eager are models that
    are not `capturable`, and AMD GPUs, where graphs are untested. For whoever edits a step: docs/DEVELOPING.md.
    """
    recordings = weakref.WeakKeyDictionary()  # optimizer_ae -> Recordings

    @functools.wraps(step)
    def call(model, optimizer_ae, optimizer_disc, lambda_, x):
        eager = functools.partial(step, model, optimizer_ae, optimizer_disc, lambda_)
        if torch.device(model.device).type != "cuda" or torch.version.hip or not getattr(model, "capturable", False):
            return eager(x)
        if optimizer_ae not in recordings:
            recordings[optimizer_ae] = Recordings()
        options = [value for optimizer in (optimizer_ae, optimizer_disc) for group in optimizer.param_groups
                   for value in group.values() if isinstance(value, Hashable)]
        key = x.shape, weakref.ref(model), weakref.ref(optimizer_disc), lambda_, *options
        return recordings[optimizer_ae].step(eager, key, x)

    return call


class Recordings:
    """The CUDA graphs of one optimizer's steps. They hold no reference to model and optimizers, which can be freed."""

    def __init__(self):
        self._warm = Counter()  # shape -> eager steps so far
        self._graphs = {}       # key -> the graph, the batch that it reads, the values that it writes; None: given up
        self._stream = torch.cuda.Stream()

    def step(self, eager, key, x):
        if self._graphs is None:
            return eager(x)
        if key in self._graphs:
            graph, batch, values = self._graphs[key]
            batch.copy_(x)
            graph.replay()
            return values
        if self._warm[x.shape] < WARM_UP:
            self._warm[x.shape] += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                values = eager(x)
            torch.cuda.current_stream().wait_stream(self._stream)
            return values
        if len(self._graphs) == MOST:
            self._give_up(f"learning rates or other options need more than {MOST} recordings")
            return eager(x)
        return self._record(eager, key, x)

    def _record(self, eager, key, x):
        """Record the step on x and replay it once; if that fails, nothing has run, and steps are eager from now on."""
        # If ending the capture fails, the side stream stays current and, in torch 2.7, the random generator in capture
        # mode; both are repaired. The gradients of a failed capture, never written, are dropped by the next step.
        stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[x.device.index]
        random, graph, batch = generator.clone_state(), torch.cuda.CUDAGraph(), x.clone()
        try:
            # On the stream for which libraries have workspaces; in this mode, other threads may allocate pinned memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                values = eager(batch)
            graph.replay()
            self._graphs[key] = graph, batch, values
            return values
        except Exception as error:
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random)
            first = error.__context__ or error  # ending a failed capture raises a second error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            cause, _, _ = (str(first) or repr(first)).partition("\n")
            self._give_up(f"capturing a step failed ({cause})")
        return eager(x)  # not within `except`, as the error's traceback holds the memory of the failed step

    def _give_up(self, reason):
        """Record nothing more, forget what is recorded, and warn once."""
        self._graphs = None  # after a failed capture, the others use the random generator's old state
        warn(f"training continues without a CUDA graph, and more slowly, because {reason}; --no-graph, or "
             f"`capturable = False` in the model's class, takes such steps from the start")
