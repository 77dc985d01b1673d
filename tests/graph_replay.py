"""The training step recorded once and replayed like a CUDA graph, on the CPU."""

import contextlib
import copy
import functools
import gc
import io
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.common import TrainGroup, same
from unittests import images_like_mnist

__unittest = True

SIZES = (4, 4, 3)  # batch sizes in turn, the last one partial
STEPS, REPLAYS = 15, 9  # the others are the warm-up of the two batch sizes
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # rejects NaN, too


class RecordedGraph(TorchDispatchMode):
    """Replaces torch.cuda.CUDAGraph: records all operations of torch and repeats them on the same memory.

    Like a capture, recording runs nothing: afterwards, existing tensors have their old values, and new ones are NaN.
    What CUDA rejects raises RuntimeError, but reads of memory without an operation, such as `numpy`, go unnoticed.
    """

    def __init__(self):
        super().__init__()
        self.replays, self.calls = 0, []  # calls: operation, arguments, results
        self._storages = {}  # by address: the storage, and a copy of its content if it is older than the recording

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in (tensor.untyped_storage() for tensor in tensors((args, kwargs))):
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage, storage.clone()
        results = operation(*args, **kwargs)
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags):
            raise RuntimeError(f"{operation}: the CPU would have to wait for the device")
        devices = {tensor.device for tensor in tensors((args, kwargs, results))}
        if operation is torch.ops.aten.lift_fresh.default or len(devices) > 1:
            raise RuntimeError(f"{operation}: a copy between host and device")
        for storage in (tensor.untyped_storage() for tensor in tensors(results)):
            self._storages.setdefault(storage._cdata, (storage, None))
        if devices:  # not a marker for the profiler
            self.calls.append((operation, args, kwargs, results))
        return results

    @contextlib.contextmanager
    def record(self):
        """Record the operations in this block; then undo their effects."""
        random = torch.get_rng_state()
        try:
            with self:
                yield
        finally:
            torch.set_rng_state(random)
            for storage, content in self._storages.values():
                if content is None:
                    storage.fill_(255)  # a NaN in every floating-point format
                else:
                    storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, results in self.calls:
            aliases = [result.alias_info for result in operation._schema.returns]
            if not any(alias and not alias.is_write for alias in aliases):  # a view
                for old, new in zip(tensors(results), tensors(operation(*args, **kwargs)), strict=True):
                    old.copy_(new)  # itself, for operations in place


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


@contextlib.contextmanager
def cuda_on_the_cpu(group, failing=None):
    """Make models on the CPU look like models on CUDA; yield a namespace of RecordedGraphs and mocks of torch.cuda.

    Runs draw no pictures. Capture number `failing` fails when it ends, and one that fails in its block once more there.
    """
    graphs, generator = [], mock.Mock()

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        assert (stream, capture_error_mode) == (mocks["Stream"].return_value, "thread_local")
        graphs.append(graph)
        try:
            with graph.record():
                yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        if len(graphs) == failing:
            raise RuntimeError("CUDA error: capture failed\nCUDA kernel errors might be reported at some other call")

    pictures = dict.fromkeys(("generate_and_save", "save_reconstruction", "save_measurements"), mock.Mock())
    mocks = {name: mock.MagicMock() for name in ("Stream", "stream", "current_stream", "set_stream")}
    with mock.patch.object(group.models.AdversarialAE, "device", torch.device("cuda")), \
            mock.patch("torch.version.hip", None), mock.patch.multiple(group.train, **pictures), \
            mock.patch.multiple("torch.cuda", **mocks, CUDAGraph=RecordedGraph, graph=capture,
                                default_generators={None: generator},  # of the CPU's index
                                get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state):
        yield SimpleNamespace(graphs=graphs, generator=generator, **mocks)


class GraphReplay(TrainGroup):
    """Steps replayed from one capture, compared bit for bit with the same steps run eagerly."""

    needs = (*TrainGroup.needs, "training.cuda_graph")

    def trained(self, captured, *flags, bf16=False, before=lambda *optimizers: None, failing=None, replays=REPLAYS,
                rate=lambda number: 1e-3 if number < STEPS / 2 else 1e-4):
        """Call `before`; return all tensors of 15 steps and after them. If captured, `replays` of them are replays."""
        values, flags = [], flags if captured else (*flags, "--no-graph")
        with cuda_on_the_cpu(self, failing) as self.cuda:
            model, *optimizers = self.parts(*flags)
            torch.manual_seed(1)
            average, images = self.train.EMA(model, 0.9), images_like_mnist(40)
            before(*optimizers)
            for number in range(STEPS):
                optimizers[0].param_groups[0]["lr"] = rate(number)
                x = images[number:][:SIZES[number % len(SIZES)]]
                with torch.autocast("cpu", torch.bfloat16, bf16, cache_enabled=False):  # as in `main`
                    values.append(copy.deepcopy(self.train.train_step(model, *optimizers, 0.995, x)))  # is overwritten
                average.update()
        self.assertEqual(sum(graph.replays for graph in self.cuda.graphs), replays if captured else 0)
        return [values, model.state_dict(), average.state_dict(), torch.get_rng_state(),
                [optimizer.state_dict()["state"] for optimizer in optimizers]]

    def test_replayed_steps_equal_eager_steps(self):
        for flags, bf16 in (("", False), ("--networks base --posterior gaussian", True),
                            ("--networks base --posterior universal --z_dim 20", False)):
            eager, replayed = (self.trained(captured, *flags.split(), bf16=bf16) for captured in (False, True))
            assert_equal(replayed, eager)
        self.assertEqual(self.cuda.stream.call_args_list, 6 * [mock.call(self.cuda.Stream.return_value)])  # the warm-up

    def test_training_goes_on_after_a_capture_that_fails(self):
        def before(optimizer_ae, optimizer_disc):  # reads a number when both players have gradients
            weight = optimizer_disc.param_groups[0]["params"][0]
            optimizer_disc.register_step_pre_hook(lambda *_: self.assertTrue(weight.grad.isfinite().all().item()))

        flags = "--networks", "base", "--posterior", "gaussian"
        eager = self.trained(False, *flags)
        for cause, replays, options in (("CUDA error: capture failed", 0, {"failing": 1}),
                                        ("CUDA error: capture failed", 5, {"failing": 3}),  # the other batch size
                                        ("aten._local_scalar_dense.default: the CPU .*", 0, {"before": before})):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                assert_equal(self.trained(True, *flags, replays=replays, **options), eager)
            self.assertRegex(err.getvalue(), rf"\AWARNING: .*a step failed \({cause}\); --no-graph, or .*\n\Z")
            self.cuda.set_stream.assert_called_once_with(self.cuda.current_stream.return_value)
            state = self.cuda.generator.clone_state.return_value
            self.cuda.generator.graphsafe_set_state.assert_called_once_with(state)
        hook = mock.Mock(side_effect=[*4 * [None], torch.OutOfMemoryError("CUDA out of memory.")])  # in the capture
        with self.assertRaises(torch.OutOfMemoryError):
            self.trained(True, before=lambda _, optimizer_disc: optimizer_disc.register_step_pre_hook(hook))

    def test_a_rate_for_each_step_ends_in_eager_steps_with_one_warning(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            eager, replayed = (self.trained(captured, rate=lambda number: 1e-3 * 0.9 ** number,
                                            replays=self.cuda_graph.MOST) for captured in (False, True))
        assert_equal(replayed, eager)
        self.assertRegex(err.getvalue(), r"\AWARNING: .* need more than 8 recordings; --no-graph, or .*\n\Z")

    def test_a_second_run_trains_its_own_model_and_the_first_is_freed(self):
        parts = []  # model and optimizer

        def train_aae(epoch, model, loader, logger_ae, logger_disc, *others):
            parts.extend(map(weakref.ref, (model, others[0])))
            for x, _ in loader:
                self.train.train_step(model, *others, x)

        with cuda_on_the_cpu(self) as cuda, mock.patch.object(self.train, "train_aae", train_aae):
            weights = [self.train_quietly("--epochs", "1", "--batch_size", "8")[1] for _ in range(2)]
        gc.collect()
        self.assertEqual([graph.replays for graph in cuda.graphs], [2, 2])
        self.assertTrue(same(*weights) and not any(part() for part in parts))
