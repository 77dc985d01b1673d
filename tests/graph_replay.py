"""The training step as a CUDA graph holds it, on the CPU: recorded once, and replayed."""

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

SIZES = (4, 4, 3)  # of the batches in turn, the last a partial one
REPLAYS = 30       # steps that graphs take, of both sizes together


class RecordedGraph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: records every operation of torch, and runs them again on the same memory.

    As a CUDA graph does, it knows addresses and no Python: a replay reads and writes the storages of the recording, and
    no number that Python has computed since, and no tensor that has taken another's place, reaches it. Random draws are
    new at each replay. Views are addresses and not run again. Recording leaves no trace in tensors, as capturing runs
    nothing: what was there before gets its values back, and everything else is filled with NaN. An operation for whose
    result the CPU waits, or that copies between host and device, is refused with a RuntimeError.

    It shows that a graph can hold a step's operations. It cannot show what is below them, in CUDA: kernels that wait
    for the host or race with others, streams, and memory pools, as it keeps all tensors of the recording alive. Nor
    does it see what reads the CPU's memory without an operation: `tolist` of a vector, or `numpy`.
    """

    def __init__(self):
        super().__init__()
        self.calls = []    # operation, arguments, results
        self.replays = 0
        self._before = {}  # storages that the recording found: the storage and a copy of what it held
        self._made = {}    # those that it has made

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._before.setdefault(storage._cdata, (storage, storage.clone()))
        results = operation(*args, **kwargs)
        refuse(operation, (args, kwargs, results))
        self._made.update((storage._cdata, storage) for storage in storages(results)
                          if storage._cdata not in self._before)
        if tensors((args, kwargs, results)):  # not a mark for the profiler
            self.calls.append((operation, args, kwargs, results))
        return results

    @contextlib.contextmanager
    def record(self):
        """Record what is run in this block, without a trace."""
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
                    if old.data_ptr() != new.data_ptr():  # it is the same where the operation has worked in place
                        old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def storages(tree):
    return [tensor.untyped_storage() for tensor in tensors(tree)]


def is_view(operation):
    """Whether an operation returns another view of its argument's memory, and does no more."""
    aliases = [result.alias_info for result in operation._schema.returns]
    return any(alias and not alias.is_write for alias in aliases)


def refuse(operation, tree):
    """Raise RuntimeError for what CUDA refuses while it captures."""
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags):
        raise RuntimeError(f"{operation}: the CPU would have to wait for the device")
    if operation is torch.ops.aten.lift_fresh.default or len({tensor.device for tensor in tensors(tree)}) > 1:
        raise RuntimeError(f"{operation}: a copy between host and device")


@contextlib.contextmanager
def cuda_on_the_cpu(model):
    """Let a model on the CPU pass for one on CUDA, whose graphs are RecordedGraphs; give the list of them.

    What is made on its device is made on the CPU.
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
    """Steps replayed from what was captured once, against the same steps run one by one, to the last bit."""

    needs = (*TrainGroup.needs, "training.cuda_graph", "training.optimizers")

    def trained(self, captured, *flags, before=None, between=None):
        """Return everything that 36 steps leave, tensors by name.

        Captured, 30 of them are replays, and the first three of either batch size are not. The learning rate drops
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
        """Return the names of all that replayed steps leave otherwise than the same steps run one by one."""
        run, replayed = (self.trained(captured, *flags, **mistake) for captured in (False, True))
        self.assertEqual(run.keys(), replayed.keys())
        self.assertTrue(all(tensor.isfinite().all() for tensor in run.values()))
        return [name for name, tensor in run.items() if not torch.equal(tensor, replayed[name])]

    def first_difference(self, **mistake):
        """Return the number of the first step whose values a mistake makes others in a graph."""
        return int(self.differences("--networks", "base", **mistake)[0].partition(" of step ")[2])

    def test_replayed_step_is_the_step(self):
        for flags in ("", "--networks base", "--posterior gaussian", "--posterior universal --z_dim 20",
                      "--precision bf16", "--networks base --posterior gaussian --precision bf16"):
            with self.subTest(flags=flags):
                self.assertEqual(self.differences(*flags.split()), [])

    def test_what_is_loaded_before_the_capture_counts(self):
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

    # What a graph cannot hold, each once -----------------------------------------------------------------------------

    def test_float_learning_rate_is_frozen(self):
        def before(model, optimizer_ae, optimizer_disc):
            optimizer_ae.param_groups[0]["lr"] = 1e-3

        self.assertEqual(self.first_difference(before=before), 19)  # it drops for step 18, which later values show

    def test_python_counter_stands_still(self):
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
                if number != 4:  # captured with gradients there, to which each replay adds; zeroing makes new ones
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

    def test_number_from_the_device_is_refused(self):
        def before(model, *optimizers):
            loss = model.get_loss_autoencoder

            def with_number(*args):
                value, values = loss(*args)
                return value, {**values, "recon_loss": values["recon_loss"].item()}

            model.get_loss_autoencoder = with_number

        self.trained(False, before=before)
        with self.assertRaisesRegex(self.commandline.UserError, r"cannot be captured .*_local_scalar_dense"):
            self.trained(True, before=before)

    def test_what_cuda_refuses_is_refused(self):
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
