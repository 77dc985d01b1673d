"""Training and evaluation on a CUDA device without data, which refuses what CUDA refuses; no GPU is needed."""

import contextlib
import functools
import io
import itertools
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.common import TrainGroup
from unittests import images_like_mnist

__unittest = True

CUDA = torch.device("cuda:0")


class Reads(TorchDispatchMode):
    """Lets the CPU read fake tensors, and counts these reads; amid every sixteen numbers is a maximum."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.restart()

    def restart(self):
        self.numbers = itertools.cycle([0.5] * 8 + [1.0] + [0.5] * 7)

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
        elif isinstance(part, (torch.Tensor, list)):
            part = torch.as_tensor(part, device=None if torch.is_tensor(part) else tensor.device)
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

    needs = (*TrainGroup.needs, "training.checkpoint", "evaluation.measures", "evaluation.metrics",
             "evaluation.pictures", "evaluation.classifier")

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
            for context in (torch.no_grad(), torch.backends.cudnn.flags(enabled=False), mode, reads):
                stack.enter_context(context)
            yield mode, reads

    def train_on_cuda(self, *flags, state):
        """Run main, with --resume from a state; return train_aae's arguments, and how often it reads the device."""
        data = self.data.load_data(self.train.parse_args(["--dataset", "digits"]), "cpu")
        writer, kept, train_aae = mock.MagicMock(log_dir=self.folder()), [], self.train.train_aae
        writer.__enter__.return_value = writer

        def fake(tensor):
            return mode.from_tensor(tensor) if torch.is_tensor(tensor) else tensor

        def load_data(args, device, resumed=None):
            images, labels, *test = map(fake, (*data.train_loader.dataset.tensors, *data[3:]))
            loader = self.mnist.BatchLoader(images[:70], labels[:70], 20, device=device)
            return self.data.Data(loader, "digits", None, test[0].to(device), test[1].to(device), test[2])

        def counted(*args):
            before = reads.count
            train_aae(*args)
            kept.extend((*args, reads.count - before))

        with self.cuda() as (mode, reads), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()), mock.patch("training.run.device_name", str), \
                mock.patch.multiple("training.checkpoint", save_state=mock.Mock(), load_state=lambda path: {
                    name: part if name == "random" else tree_map(fake, part) for name, part in state.items()}), \
                mock.patch.multiple(
                    self.train, load_data=load_data, setup_device=lambda *_: CUDA, train_aae=counted,
                    SummaryWriter=lambda folder: writer, to_pil_image=mock.Mock(), png_bytes=lambda picture: b"",
                    TensorBoardLogger=functools.partial(self.train.TensorBoardLogger, avg_window=2)):
            self.train.main(self.train.parse_args(["--log_dir", str(self.folder()), "--no-graph", *flags]))
        return kept

    def test_a_new_run_and_one_from_the_cpu_that_is_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = self.checkpoint.load_state(run)
        for flags in (("--epochs", "1"), ("--resume", str(run), "--epochs", "2"),
                      ("--epochs", "1", "--base", "--posterior", "gaussian"),
                      ("--epochs", "1", "--posterior", "universal", "--precision", "bf16", "--d_momentum", "0")):
            with self.subTest(flags=flags):
                _, _, _, _, _, *optimizers, _, reads = self.train_on_cuda(*flags, state=state)
                self.assertEqual(reads, 4)  # two windows of two loggers
                for weight, moments in (item for optimizer in optimizers for item in optimizer.state.items()):
                    self.assertEqual({moment.device for moment in (weight, *moments.values())}, {CUDA})

    def test_evaluation(self):
        def load_classifier(device):
            return self.classifier.DigitClassifier().eval().to(device)

        def choose_sigma(*args):
            reads.restart()
            return sigma(*args)

        sigma = self.metrics.choose_sigma
        for flags in ({}, {"z_dim": 2, "networks": "base", "posterior": "gaussian"}):
            with self.subTest(**flags), self.cuda() as (_, reads), \
                    mock.patch.multiple(self.measures, SAMPLES=500, load_classifier=load_classifier), \
                    mock.patch.multiple(self.metrics, choose_sigma=choose_sigma,
                                        train_mlp=lambda codes, *_: lambda part: part[:, :1]), \
                    mock.patch.multiple(self.pictures, grid=self.pictures.image_grid, draw_codes=mock.Mock()):
                model = self.models.AdversarialAE(**flags).to(CUDA)
                images, labels = images_like_mnist(2000), torch.arange(2000) % 10
                self.measures.evaluate(model, images, images[:500], labels[:500])
                self.pictures.draw_pictures(model, images, images[:500], labels[:500])
