"""A training step as a CUDA graph: one launch for all its kernels."""

import functools
import weakref
from collections import Counter
from collections.abc import Hashable

import torch

from training.cli import warn

WARM_UP = 3  # eager steps of a batch size before it is recorded, in which libraries choose kernels and allocate memory
FEW, MOST = 20, 8  # after so few steps at a learning rate a recording was in vain; so often in a row, it is the last


def captured(step):
    """Decorate `step(model, optimizer_ae, optimizer_disc, lambda_, x)`: on CUDA, record a CUDA graph and replay it.

    Models that are not `capturable` are trained eagerly, and so is everything on AMD GPUs, where graphs are untested. A
    recording is made for each shape of x, and made anew when lambda_ or an option of the optimizers, such as a learning
    rate, has changed; it lives at most as long as optimizer_ae. It runs nothing; the WARM_UP steps before it are
    training steps. Each step has new random numbers, and overwrites the values that the previous one returned. For
    whoever edits a step: docs/DEVELOPING.md.
    """
    recordings = weakref.WeakKeyDictionary()  # optimizer_ae -> StepRecordings

    @functools.wraps(step)
    def call(model, optimizer_ae, optimizer_disc, lambda_, x):
        eager = functools.partial(step, model, optimizer_ae, optimizer_disc, lambda_)
        if model.device.type != "cuda" or torch.version.hip or not getattr(model, "capturable", False):
            return eager(x)
        if optimizer_ae not in recordings:
            recordings[optimizer_ae] = StepRecordings()
        options = [value for optimizer in (optimizer_ae, optimizer_disc) for group in optimizer.param_groups
                   for value in group.values() if isinstance(value, Hashable)]
        return recordings[optimizer_ae](eager, (weakref.ref(model), weakref.ref(optimizer_disc), lambda_, *options), x)

    return call


class StepRecordings:
    """The CUDA graphs of one optimizer's steps. They hold no reference to model and optimizers, which can be freed."""

    def __init__(self):
        self._recording = True  # until one fails, or the options change too often
        self._warm = Counter()  # shape -> eager steps so far
        self._graphs = {}       # shape -> the graph, the batch that it reads, the values that it writes
        self._options, self._replays = None, FEW  # of the graphs
        self._short = 0         # sets of options in a row with fewer replays
        self._stream = torch.cuda.Stream()

    def __call__(self, step, options, x):
        if self._recording and self._warm[x.shape] < WARM_UP:
            self._warm[x.shape] += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                values = step(x)
            torch.cuda.current_stream().wait_stream(self._stream)
            return values
        if self._recording and options != self._options:
            self._forget(options)
        if self._recording and x.shape not in self._graphs:
            self._record(step, x)
        elif self._recording:
            graph, batch, _ = self._graphs[x.shape]
            batch.copy_(x)
            graph.replay()
        self._replays += 1
        return self._graphs[x.shape][2] if self._recording else step(x)

    def _forget(self, options):
        """Forget the graphs of other options, which frees their memory; give up if the options change too often."""
        self._short = self._short + 1 if self._replays < FEW else 0
        self._options, self._replays, self._graphs = options, 0, {}
        if self._short == MOST:
            self._give_up(f"learning rates or other options changed {MOST} times in a row after fewer than {FEW} steps")

    def _record(self, step, x):
        """Record the step on x and replay it once; if that fails, nothing has run, and steps are eager from now on.

        If ending the capture fails, the side stream stays current and, in torch 2.7, the random generator in capture
        mode; both are repaired here. The gradients of a failed capture, never written, are dropped by the next step.
        """
        stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[x.device.index]
        random, graph, batch = generator.clone_state(), torch.cuda.CUDAGraph(), x.clone()
        try:
            # On the stream for which libraries have workspaces; in this mode, other threads may allocate pinned memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                values = step(batch)
            graph.replay()
            self._graphs[x.shape] = graph, batch, values
        except Exception as error:
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random)
            first = error.__context__ or error  # ending a failed capture raises a second error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            # No reference to the error is kept, whose traceback holds the memory of the failed step.
            cause = (str(first) or repr(first)).partition("\n")[0]
            self._give_up(f"capturing a step failed ({cause})")

    def _give_up(self, reason):
        """Record nothing more, forget what is recorded, and warn once."""
        self._recording = False
        self._graphs.clear()  # after a failed capture, the others use the random generator's old state
        warn(f"training continues without a CUDA graph, and more slowly, because {reason}; --no-graph, or "
             f"`capturable = False` in the model's class, takes such steps from the start")
