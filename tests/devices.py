"""Training and evaluation on a CUDA device without data, which refuses what CUDA refuses; no GPU is needed."""

import contextlib
import functools
import io
import itertools
from importlib import import_module
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.common import Stop, TrainGroup
from unittests import images_like_mnist

__unittest = True

CUDA = torch.device("cuda:0")


class Reads(TorchDispatchMode):
    """Lets the CPU read fake tensors, and counts these reads; amid every sixteen numbers is a maximum."""

    def __init__(self):
        super().__init__()
        self.count, self.numbers = 0, itertools.cycle([0.5] * 8 + [1.0] + [0.5] * 7)

    def tolist(self, tensor):
        self.count += 1
        return np.full(tensor.shape, 0.5).tolist()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if operation is aten._local_scalar_dense.default:
            self.count += 1
            number = next(self.numbers)
            return int(number) if args[0].dtype is torch.int64 else number  # a truth value is true
        if operation in (aten.nonzero.default, aten._unique2.default, aten.bincount.default):  # of labels
            return {aten.nonzero.default: torch.arange(len(args[0]), device=args[0].device)[:, None],
                    aten.bincount.default: args[0].new_empty(10)}.get(operation, (args[0].new_empty(10), None, None))
        if operation is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype is torch.bool:
            args = args[0], [torch.arange(len(args[0]), device=args[1][0].device)]
        return operation(*args, **kwargs or {})


# What stands in for parts of torch that need a GPU -------------------------------------------------------------------

def moved(module, device, memory_format):
    """Return a module with new tensors on the device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                layout = memory_format if tensor is not None and tensor.dim() == 4 else torch.preserve_format
                new = None if tensor is None else tensor.detach().to(device, memory_format=layout)
                tensors[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return module


def deepcopy(tensor, memo):
    copy = tensor.detach().clone() if isinstance(tensor, FakeTensor) else tensor  # not those of random states
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def index(tensor, key):
    """Replace Tensor.__getitem__, which sets the CUDA device in torch 2.7."""
    place = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            tensor = tensor.unsqueeze(place)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, place, part.start, part.stop, part.step or 1)
        elif torch.is_tensor(part):
            tensor = torch.ops.aten.index(tensor, [*[None] * place, part])
        else:
            tensor, place = tensor.select(place, part), place - 1
        place += 1
    return tensor


def assert_like(weights, *lists):
    """Check what a fused kernel needs: tensors of the weights' device, shape, type and strides."""
    for weight, *tensors in zip(weights, *lists, strict=True):
        kinds = {(tensor.device, tensor.shape, tensor.dtype, tensor.stride()) for tensor in (weight, *tensors)}
        assert len(kinds) == 1 and weight.device == CUDA, kinds


def fused_adam(weights, gradients, means, squares, max_squares, steps, *, lr, **options):
    assert_like(weights, gradients, means, squares)
    assert {tensor.device for tensor in (lr, *steps)} == {CUDA}


def fused_sgd(weights, gradients, momenta, **options):
    assert_like(weights, gradients, *([momenta] if any(momentum is not None for momentum in momenta) else []))


class Devices(TrainGroup):
    """No operation mixes devices, and the CPU reads nothing from the device between two reads of the losses."""

    needs = (*TrainGroup.needs, "evaluation.measures", "evaluation.pictures", "evaluation.classifier")

    @contextlib.contextmanager
    def cuda(self):
        """Make all tensors fake, and replace what needs a GPU in torch; yield the mode and the reads.

        Every loss gives every weight a gradient of its own layout: torch's engine needs a GPU, in torch 2.7 even to
        record operations. (So no operation is checked in the backward pass, whose devices are those of the forward.)
        """
        mode, reads, weights = FakeTensorMode(), Reads(), []

        def to(module, device, memory_format=torch.preserve_format):
            weights.extend(moved(module, device, memory_format).parameters())
            return module

        def backward(loss):
            assert loss.device == CUDA and not loss.shape, loss
            for weight in weights:
                weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad + weight

        with contextlib.ExitStack() as stack:
            for target, stand_in in (
                    ("torch.Tensor.backward", backward), ("torch.nn.Module.to", to),
                    ("torch.Tensor.__deepcopy__", deepcopy), ("torch.Tensor.__getitem__", index),
                    ("torch.Tensor.copy_", lambda tensor, source, *_: torch.ops.aten.copy_(tensor, source)),
                    ("torch._subclasses.fake_tensor.FakeTensor.tolist", lambda tensor: reads.tolist(tensor)),
                    ("torch._fused_adam_", fused_adam), ("torch._fused_sgd_", fused_sgd),
                    ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
                    ("torch.cuda.is_bf16_supported", lambda *_: True),
                    ("torch.cuda.get_rng_state", torch.get_rng_state),
                    ("torch.cuda.set_rng_state", torch.set_rng_state)):
                stack.enter_context(mock.patch(target, stand_in))
            for context in (torch.no_grad(), mode, reads):
                stack.enter_context(context)
            yield mode, reads

    def train_on_cuda(self, *flags, state=None):
        """Run main through its first epoch, or the one after `state`; return train_aae's arguments and its reads."""
        data = self.data.load_data(self.train.parse_args(["--dataset", "digits"]), "cpu")
        run, train_aae, kept, read = import_module("training.run"), self.train.train_aae, [], []
        writer = mock.MagicMock(log_dir=self.folder())
        writer.__enter__.return_value = writer

        def fake_state(path):
            return {name: part if name == "random" else tree_map(fake, part) for name, part in state.items()}

        def fake(tensor):
            return mode.from_tensor(tensor) if torch.is_tensor(tensor) else tensor

        def load_data(args, device, settings=None):
            images, labels, fixed, test = map(fake, (*data.train_loader.dataset.tensors, *data[3:5]))
            loader = self.mnist.BatchLoader(images[:70], labels[:70], 20, device=device)
            return data._replace(train_loader=loader, fixed_images=fixed[:8].to(device), test_images=test.to(device))

        @functools.wraps(train_aae)
        def counted(*args, **options):
            before = reads.count
            train_aae(*args, **options)
            kept.extend(args)
            read.append(reads.count - before)

        def end_epoch(_, epoch):
            if epoch > (state["epoch"] if state else 0):
                raise Stop

        with self.cuda() as (mode, reads), contextlib.suppress(Stop), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()), mock.patch.multiple(
                    self.train, load_data=load_data, setup_device=lambda args: CUDA, train_aae=counted,
                    to_pil_image=mock.Mock(), png_bytes=lambda picture: b""), mock.patch.multiple(
                    run, SummaryWriter=lambda folder: writer, device_name=str, load_state=fake_state,
                    save_state=mock.Mock()), mock.patch.object(run.Run, "end_epoch", end_epoch), \
                mock.patch.object(self.models.AdversarialAE, "capturable", False):
            self.train.main(self.train.parse_args(["--log_dir", str(self.folder()), *flags]))
        return kept, read

    def test_an_epoch_of_training(self):
        for flags in ("", "--posterior universal --precision bf16 --d_momentum 0", "--base --posterior gaussian"):
            with self.subTest(flags=flags):
                (_, model, *_, optimizer_ae, optimizer_disc, _), [reads] = self.train_on_cuda(*flags.split())
                self.assertLess(reads, 4)  # fewer than steps
                for optimizer in (optimizer_ae, optimizer_disc):
                    for weight, moments in optimizer.state.items():
                        self.assertEqual({moment.device for moment in moments.values()}, {weight.device}, CUDA)

    def test_a_run_from_the_cpu_is_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = import_module("training.checkpoint").load_state(run)
        _, [reads] = self.train_on_cuda("--resume", str(run), "--epochs", "2", state=state)
        self.assertLess(reads, 4)

    def test_evaluation(self):
        def load_classifier(device):
            return self.classifier.DigitClassifier().eval().to(device)

        for flags in ({}, {"z_dim": 2, "networks": "base", "posterior": "gaussian"}):
            with self.subTest(**flags), self.cuda(), \
                    mock.patch.multiple(self.measures, SAMPLES=500, load_classifier=load_classifier), \
                    mock.patch.multiple(self.pictures, grid=self.pictures.image_grid, draw_codes=mock.Mock()):
                model = self.models.AdversarialAE(**flags).to(CUDA)
                images, labels = images_like_mnist(2000), torch.arange(2000) % 10
                self.measures.evaluate(model, images, images[:500], labels[:500])
                self.pictures.draw_pictures(model, images, images[:500], labels[:500])
