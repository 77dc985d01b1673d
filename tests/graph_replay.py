"""The training step recorded once and replayed like a CUDA graph, on the CPU."""

import contextlib
import copy
import io
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.common import TrainGroup
from unittests import images_like_mnist

__unittest = True

SIZES = (4, 4, 3)  # batch sizes in turn, the last one partial
REPLAYS = 30       # replayed steps of both batch sizes together


class RecordedGraph(TorchDispatchMode):
    """Replaces torch.cuda.CUDAGraph: records all operations of torch and repeats them on the same memory.

    Like a CUDA graph, it knows addresses and no Python: a replay reads and writes the storages of the recording, and
    ignores numbers that Python has computed since and tensors that have replaced recorded ones. Random numbers are new
    at each replay. Views are addresses and not repeated. Like a capture, recording runs nothing: afterwards, existing
    tensors have their old values, and new ones are filled with NaN. An operation that makes the CPU wait, or that
    copies between host and device, raises RuntimeError.

    It shows that a graph can capture a step's operations. It does not show what happens below them, in CUDA: kernels
    that wait for the host or race with others, streams, and memory pools, because it keeps all recorded tensors alive.
    Nor does it notice reads of the CPU's memory without an operation: `tolist` of a vector, or `numpy`.
    """

    def __init__(self):
        super().__init__()
        self.calls = []    # operation, arguments, results
        self.replays = 0
        self._before = {}  # existing storages: the storage and a copy of its content
        self._made = {}    # storages created by the recording

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._before.setdefault(storage._cdata, (storage, storage.clone()))
        results = operation(*args, **kwargs)
        refuse(operation, (args, kwargs, results))
        self._made.update((storage._cdata, storage) for storage in storages(results)
                          if storage._cdata not in self._before)
        if tensors((args, kwargs, results)):  # not a marker for the profiler
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
            for storage, content in self._before.values():
                storage.copy_(content)
            for storage in self._made.values():
                storage.fill_(255)  # a NaN in every floating-point format

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, results in self.calls:
            if not is_view(operation):
                for old, new in zip(tensors(results), tensors(operation(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # equal for in-place operations
                        old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def storages(tree):
    return [tensor.untyped_storage() for tensor in tensors(tree)]


def is_view(operation):
    """Whether an operation only returns a view of its argument's memory."""
    aliases = [result.alias_info for result in operation._schema.returns]
    return any(alias and not alias.is_write for alias in aliases)


def refuse(operation, tree):
    """Raise RuntimeError for an operation that CUDA rejects during a capture."""
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags):
        raise RuntimeError(f"{operation}: the CPU would have to wait for the device")
    if operation is torch.ops.aten.lift_fresh.default or len({tensor.device for tensor in tensors(tree)}) > 1:
        raise RuntimeError(f"{operation}: a copy between host and device")


@contextlib.contextmanager
def cuda_on_the_cpu(model):
    """Make a model on the CPU look like one on CUDA, with RecordedGraphs as graphs; yield their list.

    Tensors for its device are created on the CPU.
    """
    graphs, tensor = [], torch.tensor

    def new_graph():
        graphs.append(RecordedGraph())
        return graphs[-1]

    with mock.patch.object(type(model), "device", torch.device("cuda")), \
            mock.patch("torch.version.hip", None), \
            mock.patch("torch.tensor", lambda *args, device=None, **options: tensor(*args, **options)), \
            mock.patch.multiple("torch.cuda", CUDAGraph=new_graph, graph=lambda graph, **_: graph.record(),
                                Stream=mock.Mock(), stream=mock.MagicMock(), current_stream=mock.Mock()):
        yield graphs


class GraphReplay(TrainGroup):
    """Steps replayed from one capture, compared bit for bit with the same steps run eagerly."""

    needs = (*TrainGroup.needs, "training.cuda_graph", )

    def trained(self, captured, *flags, before=None, between=None):
        """Return all tensors after 36 steps, by name.

        If captured, 30 steps are replays; the first three of each batch size are eager. The learning rate drops
        halfway. `before(model, *optimizers)` is called once, `between(number, model, *optimizers)` before each step.
        """
        torch.manual_seed(1)
        args = self.train.parse_args(flags)
        model = self.optimizers.build_model(args.z_dim, args.posterior, args.networks)
        model = self.optimizers.to_device(model, torch.device("cpu"), args.precision)
        model.capturable = captured
        images, average = images_like_mnist(40), self.train.EMA(model, args.averaging)
        contents = {"images": images}
        steps = self.cuda_graph.WARM_UP * len(set(SIZES)) + REPLAYS
        with cuda_on_the_cpu(model) as graphs:
            optimizers = self.train.build_optimizers(model, args)
            if before:
                before(model, *optimizers)
            step = self.train.build_step(model, *optimizers, args)
            for number in range(steps):
                if between:
                    between(number, model, *optimizers)
                self.train.set_learning_rate(optimizers[0], args.drop_after + 2 * number // steps, args)
                parts = step(images[number:][:SIZES[number % len(SIZES)]])
                contents.update({f"{name} of step {number}": value.clone()  # which the next step may overwrite
                                 for part in parts for name, value in part.items()})
                average.update()
        self.assertEqual([len(graphs), sum(graph.replays for graph in graphs)], [2, REPLAYS] if captured else [0, 0])
        contents.update({f"average {name}": tensor for name, tensor in average.model.state_dict().items()})
        contents.update(model.state_dict(), stream=torch.get_rng_state())
        for player, optimizer in zip(("autoencoder", "discriminator"), optimizers, strict=True):
            contents.update({f"{player}'s {name} {number}": tensor for number, moments in
                             optimizer.state_dict()["state"].items() for name, tensor in moments.items()})
        return contents

    def differences(self, *flags, **mistake):
        """Return the names of the tensors that differ between replayed and eager steps."""
        run, replayed = (self.trained(captured, *flags, **mistake) for captured in (False, True))
        self.assertEqual(run.keys(), replayed.keys())
        self.assertTrue(all(tensor.isfinite().all() for tensor in run.values()))
        return [name for name, tensor in run.items() if not torch.equal(tensor, replayed[name])]

    def first_difference(self, **mistake):
        """Return the number of the first step whose values differ in a graph because of a mistake."""
        return int(self.differences("--networks", "base", **mistake)[0].partition(" of step ")[2])

    def test_replayed_steps_equal_eager_steps(self):
        for flags in ("", "--networks base", "--posterior gaussian", "--posterior universal --z_dim 20",
                      "--precision bf16", "--networks base --posterior gaussian --precision bf16"):
            with self.subTest(flags=flags):
                self.assertEqual(self.differences(*flags.split()), [])

    def test_state_loaded_before_the_capture_is_used(self):
        file = io.BytesIO()

        def save(number, *parts):
            if number == 20:
                torch.save([part.state_dict() for part in parts], file)

        def load(model, *optimizers):
            file.seek(0)
            weights, *states = torch.load(file, weights_only=True)
            model.load_state_dict(weights)
            for optimizer, state in zip(optimizers, states, strict=True):
                self.assertEqual(len(state["state"]), len(optimizer.param_groups[0]["params"]))
                self.optimizers.load_optimizer(optimizer, state)

        self.trained(False, between=save)
        self.assertEqual(self.differences(before=load), [])

    # What a graph cannot capture, one test each ----------------------------------------------------------------------

    def test_float_learning_rate_is_frozen(self):
        def before(model, optimizer_ae, optimizer_disc):
            optimizer_ae.param_groups[0]["lr"] = 1e-3

        self.assertEqual(self.first_difference(before=before), 19)  # it drops at step 18; the next values show it

    def test_python_counter_is_frozen(self):
        def before(model, *optimizers):
            loss, calls = model.get_loss_autoencoder, []

            def weighted(x, recon_x, z_fake, lambda_):
                calls.append(x)
                return loss(x, recon_x, z_fake, lambda_ ** len(calls))

            model.get_loss_autoencoder = weighted

        self.assertEqual(self.first_difference(before=before), 6)  # the second from the graph captured for step 4

    def test_gradients_zeroed_outside_are_summed(self):
        def between(number, model, *optimizers):
            for optimizer in optimizers:
                optimizer.zero_grad = lambda: None
                if number != 4:  # then the capture has gradients, to which each replay adds
                    type(optimizer).zero_grad(optimizer)

        self.assertEqual(self.first_difference(between=between), 7)

    def test_state_loaded_after_the_capture_is_ignored(self):
        states = []

        def between(number, model, *optimizers):
            if number == 2:
                states.extend(copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
            if number == 20:
                for optimizer in optimizers:
                    self.optimizers.load_optimizer(optimizer, states.pop(0))

        self.assertEqual(self.first_difference(between=between), 21)

    def test_capture_without_warm_up_zeroes_the_moments_at_each_replay(self):
        with mock.patch.object(self.cuda_graph, "WARM_UP", 0):
            self.assertEqual(self.first_difference(), 2)

    def test_number_read_from_the_device_is_rejected(self):
        def before(model, *optimizers):
            loss = model.get_loss_autoencoder

            def with_number(*args):
                value, values = loss(*args)
                return value, {**values, "recon_loss": values["recon_loss"].item()}

            model.get_loss_autoencoder = with_number

        self.trained(False, before=before)
        with self.assertRaisesRegex(self.cli.UserError, r"cannot be captured .*_local_scalar_dense"):
            self.trained(True, before=before)

    def test_operations_that_cuda_rejects_are_rejected(self):
        x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
        for name, call in {"item": x[0].item, "nonzero": x.nonzero, "unique": x.unique,
                           "if": lambda: bool(x[0]), "mask": lambda: x[mask], "equal": lambda: torch.equal(x, x),
                           "slice": lambda: x[x[0].long():], "tensor": lambda: torch.tensor(0.5) * x,
                           "to": lambda: x.to("meta"), "repeat": lambda: x.repeat_interleave(mask.long())}.items():
            with self.subTest(name), self.assertRaisesRegex(RuntimeError, "wait for the device|host and device"), \
                    RecordedGraph().record():
                call()
        with RecordedGraph().record():
            x.add_(1)
            result = x.double().sum().sqrt()
        self.assertEqual((x.tolist(), result.isnan()), ([0, 0, 0], True))
