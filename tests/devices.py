"""Training and evaluation on a CUDA device whose memory is the CPU's, and which refuses what CUDA refuses."""

import contextlib
import functools
import io
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.common import TrainGroup

__unittest = True

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
aten = torch.ops.aten


class OnCuda(torch.Tensor):
    """A tensor on the device; `content`, a tensor on the CPU, has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    copy_, nonzero = map(functools.partialmethod, (aten.copy_, aten.nonzero))  # torch's own methods need a GPU
    __float__ = torch.Tensor.item

    def __new__(cls, content):
        tensor = cls._make_wrapper_subclass(cls, content.shape, content.stride(), content.storage_offset(),
                                            dtype=content.dtype, device=CUDA)
        tensor.content = content
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, *_):
        raise AssertionError(f"{operation} outside of a Device")

    def __getitem__(self, key):
        return OnCuda(self.content[tree_map(content_of, key)])

    def tolist(self):
        return self.cpu().tolist()


def content_of(value):
    return value.content if isinstance(value, OnCuda) else value


class Device(TorchDispatchMode):
    """Runs the operations of the device, and counts how often the CPU waits for it."""

    waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cuda = any(isinstance(tensor, OnCuda) for tensor in tensors)
        device = kwargs.pop("device", None) or (CUDA if on_cuda else CPU)
        if on_cuda:
            refuse_mixtures(operation, args, tensors)
            unknown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags)
            self.waits += bool(device == CPU or unknown and operation is not aten.index.Tensor
                               or operation is aten.copy_.default and args[0].is_cpu)
        results = operation(*tree_map(content_of, args), **tree_map(content_of, kwargs))
        given = {id(content_of(tensor)): tensor for tensor in tensors}  # the results of operations in place

        def wrapped(result):
            new = OnCuda(result) if device == CUDA and isinstance(result, torch.Tensor) else result
            return given.get(id(result), new)

        return tree_map(wrapped, results)


def refuse_mixtures(operation, args, tensors):
    """Raise AssertionError for an operation that mixes devices, or whose fused kernel mixes memory layouts."""
    if operation is aten.copy_.default or operation is aten.index.Tensor and args[0].is_cuda:  # by indices on the CPU
        return
    numbers = torch.Tag.pointwise in operation.tags
    others = [tensor for tensor in tensors if tensor.is_cpu and not (numbers and tensor.dim() == 0)]
    assert not others, f"{operation} on {CUDA} and on the CPU"
    if operation.name().startswith("aten::_fused_"):
        for weight, *others in zip(*filter(None, args[:4]), strict=True):  # the gradient and moments
            assert {tensor.stride() for tensor in others} == {weight.stride()}, operation


class Devices(TrainGroup):
    """No operation mixes devices, and the CPU reads nothing from the device between two reads of the losses."""

    needs = (*TrainGroup.needs, "evaluation.measures", "evaluation.pictures")

    @contextlib.contextmanager
    def cuda(self):
        """Let torch use the device without a GPU."""
        stand_ins = {"torch.cuda._lazy_init": None, "torch.cuda.is_bf16_supported": True,
                     "torch.cuda.amp.common.amp_definitely_not_available": False,
                     "torch.__future__.get_overwrite_module_params_on_conversion": True}
        with contextlib.ExitStack() as stack:
            for target, value in stand_ins.items():
                stack.enter_context(mock.patch(target, return_value=value))
            for name in ("get_rng_state", "set_rng_state"):
                stack.enter_context(mock.patch(f"torch.cuda.{name}", getattr(torch, name)))
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor then copies from the CPU
            stack.callback(torch._C._set_only_lift_cpu_tensors, False)
            stack.enter_context(mock.patch("torch.inference_mode", contextlib.nullcontext))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.no_grad())  # in main, too: torch's engine for gradients needs a GPU
            self.device = stack.enter_context(Device())
            yield

    def test_a_new_run_and_one_from_the_cpu_that_is_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")
        train_aae = self.train.train_aae

        def checked(epoch, model, *args):
            def backward(loss):  # gives every weight a gradient of its own layout
                assert loss.device == CUDA and not loss.shape, loss
                for weight in model.parameters():
                    weight.grad = weight.clone() if weight.grad is None else weight.grad + weight

            before = self.device.waits
            with mock.patch.object(OnCuda, "backward", backward):
                train_aae(epoch, model, *args)
            self.assertEqual(self.device.waits - before, 2)  # a window of two loggers
            for weight, moments in (item for optimizer in args[-3:-1] for item in optimizer.state.items()):
                self.assertEqual({moment.device for moment in (weight, *moments.values())}, {CUDA})

        for flags in (("--resume", str(run), "--epochs", "2"),
                      ("--epochs", "1", "--base", "--posterior", "gaussian"),
                      ("--epochs", "1", "--posterior", "universal", "--precision", "bf16", "--d_momentum", "0")):
            with self.subTest(flags=flags), self.cuda(), contextlib.redirect_stderr(io.StringIO()), \
                    mock.patch("training.run.device_name", str), mock.patch.multiple(
                        self.train, setup_device=lambda *args: CUDA, train_aae=checked,
                        TensorBoardLogger=functools.partial(self.train.TensorBoardLogger, avg_window=2)):
                self.train_quietly("--no-graph", *flags)

    def test_evaluation(self):
        images, labels = self.few_tests
        with self.cuda(), mock.patch.object(self.measures, "SAMPLES", 30):
            model = self.models.AdversarialAE(z_dim=2).to(CUDA)
            self.measures.evaluate(model, images, images, labels)
            self.pictures.draw_pictures(model, images, images, labels)
