"""Runs of main of a train.py, and what the tests of train_main.py have to know of them."""

import contextlib
import functools
import inspect
import re
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

__unittest = True

EPOCHS, SECONDS = 11, 60  # some save weights every 10 epochs; a slow run ends with an epoch
FLAGS = {"z_dim": 3, "batch_size": 16, "lambda_": 0.9, "ae_lr": 1e-4, "d_lr": 2e-4, "epochs": EPOCHS, "seed": 1,
         "num_workers": 0, "data_dir": "data/", "log_dir": "logs/", "no_cuda": True}
OTHER = {"seed": 2, "batch_size": 8, "ae_lr": 3e-4, "d_lr": 1e-3, "data_dir": "data2/"}  # of a second run
PICTURES = ("generate_and_save", "save_reconstruction")
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # layers that depend on the mode
LEVELS = torch.linspace(-0.75, 0.75, 7)  # of the ramp in every picture


def pattern_images(numbers):
    """Return images that differ from each other: blocks of black and white, above a ramp of gray LEVELS."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(64, 1, 5, 7, generator=generator)[numbers].round() * 2 - 1
    ramp = LEVELS.view(1, 1, 1, 7).expand(len(blocks), 1, 2, 7)
    return nn.functional.interpolate(torch.cat([blocks, ramp], 2), scale_factor=4)


INPUTS, OUTPUTS = pattern_images(slice(24)), pattern_images(slice(24, 48))  # training images; what decoders return


def shown(picture):
    """Return [(y, x, number of the image, gray levels of its ramp)] of a picture [H, W] in [0, 255].

    Images are found enlarged up to four times, and also with black and white exchanged.
    """
    patterns = torch.cat([INPUTS, OUTPUTS])[:, :, :20]
    kernels = patterns / patterns.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    kernels = kernels - kernels.mean((1, 2, 3), keepdim=True)
    kernels = kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for zoom in (1, 2, 3, 4):
        pixels = torch.from_numpy(picture[::zoom, ::zoom].copy()).float()[None, None]
        if min(pixels.shape[2:]) < 28:
            break
        ones = torch.ones(1, 1, 20, 28)
        mean, square = (nn.functional.conv2d(part, ones) / 560 for part in (pixels, pixels.square()))
        deviation = (square - mean.square()).clamp(min=1).sqrt() * 560 ** 0.5
        found = (nn.functional.conv2d(pixels, kernels) / deviation)[0, :, :pixels.shape[2] - 27].abs() > 0.97
        if found.any():
            return [(int(y), int(x), int(k), pixels[0, 0, y + 24, x + 1:x + 28:4].round().int().tolist())
                    for k, y, x in found.nonzero()]
    return []


# One run of main -----------------------------------------------------------------------------------------------------

class Run:
    """What main does on 24 images until it ends, or calls train_aae more than `limit` times."""

    def __init__(self, train, limit, flags):
        self.train, self.limit, self.end = train, limit, time.monotonic() + SECONDS
        self.train_aae, self.generate_and_save, self.save_reconstruction = [], [], []  # what their calls have shown
        self.order, self.inner = [], None  # the functions in the order of their calls; the call in progress
        self.loaders, self.checkpoints, self.prefixes = [], {}, {}  # arguments of mnist(); contents; of the loggers
        self.error, self.missing_flag = None, ""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
            stack.callback(nn.modules.module._global_forward_hooks_with_kwargs.clear)  # torch leaves them there
            stack.enter_context(contextlib.chdir(folder))
            for name in ("data", "data2"):
                write_mnist(name, train=INPUTS, t10k=OUTPUTS)  # for whoever reads the files
            self.replace_functions(stack)
            torch.manual_seed(limit)  # another one for each run
            try:
                train.main(Namespace(**{**FLAGS, **flags}))
            except (GeneratorExit, Exception, SystemExit) as error:
                self.error, self.missing_flag = error, missing_flag(error)
            if self.train_aae:
                self.look_at_files()
                self.look_at_loggers()

    def replace_functions(self, stack):
        """Observe functions wherever they have been imported."""
        from mnist import mnist
        stand_ins = {id(mnist): self.loader}
        for name in ("train_aae", *PICTURES):
            if (function := getattr(self.train, name, None)) is not None:
                stand_ins[id(function)] = functools.wraps(function)(functools.partial(self.observe, name, function))
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in stand_ins:
                    stack.enter_context(mock.patch.object(module, name, stand_ins[id(value)]))

    def loader(self, root="../data", batch_size=64, *_, **__):
        self.loaders.append({"data_dir": str(root), "batch_size": batch_size})
        return DataLoader(TensorDataset(INPUTS, torch.arange(len(INPUTS)) % 10), batch_size, shuffle=True)

    def observe(self, name, function, *args, **kwargs):
        """Call a function of train.py and note what it does."""
        training, given = name == "train_aae", arguments(function, args, kwargs)
        model = getattr(given[training], "_orig_mod", given[training])  # the original of a compiled one
        if not hasattr(type(model), "get_loss_autoencoder"):
            return function(*args, **kwargs)
        if training and (len(self.train_aae) >= self.limit or time.monotonic() > self.end):
            raise GeneratorExit  # which `except Exception` does not catch
        start = weights(model)
        call = Namespace(given=given, model=model, codes=[], modes=[], lambdas=[], last=None, shift=0,
                         pictures={}, files=files(), random=torch.get_rng_state(), start=start, trained=start,
                         optimizers=[optimizer_facts(optimizer) for optimizer in given[5:7]],
                         steps=[getattr(logger, "global_step", None) for logger in given[3:5]],
                         drew=False, optimizers_after=[], steps_after=[])
        call.made_before = getattr(self.inner, "last", None)  # what the decoder has returned in training
        self.order.append(name)
        getattr(self, name).extend([call] if training else [])
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "inner", self.inner)
            self.inner = call
            self.observe_model(stack, call, training)
            result = function(*args, **kwargs)
        call.trained, call.drew = weights(model), not torch.equal(call.random, torch.get_rng_state())
        call.optimizers_after = [optimizer_facts(optimizer) for optimizer in given[5:7]]
        call.steps_after = [getattr(logger, "global_step", None) for logger in given[3:5]]
        call.pictures = {path: read_png(path) for path, _ in files() - call.files if path.suffix == ".png"}
        getattr(self, name).extend([call] if call.pictures and not training else [])
        return result

    def observe_model(self, stack, call, training):
        """Observe a model, or replace what its networks return for pictures, until the stack is left."""
        model, loss = call.model, call.model.get_loss_autoencoder

        def note_lambda(*args, **kwargs):
            call.lambdas.append(arguments(loss, args, kwargs)[3] or 0)
            return loss(*args, **kwargs)

        hook = nn.modules.module.register_module_forward_hook(functools.partial(self.note_mode, call, training))
        stack.callback(hook.remove)
        for owner, name, replacement in (
                (model, "get_loss_autoencoder", note_lambda),
                (model.encoder, "forward", functools.partial(self.encode, call, training, model.encoder.forward)),
                (model.decoder, "forward", functools.partial(self.decode, call, training, model.decoder.forward))):
            stack.enter_context(mock.patch.object(owner, name, replacement))

    def note_mode(self, call, training, module, args, output):
        modal = isinstance(module, MODAL) and (getattr(module, "p", 0) or getattr(module, "track_running_stats", 0))
        if modal and call is self.inner and (not training or torch.is_grad_enabled()):
            call.modes.append(module.training)

    def encode(self, call, training, forward, *args, **kwargs):
        """Encode; for pictures, the codes of training image k are 10 (k + 1)."""
        codes, images = forward(*args, **kwargs), (*args, *kwargs.values())[0]
        if training or call is not self.inner:
            return codes
        distances = torch.cdist(images.detach().float().cpu().flatten(1), INPUTS.flatten(1))
        known = distances.min(1)
        numbers = 10.0 * (known.indices + 1).to(codes)[:, None].expand_as(codes)
        return codes + (numbers - codes).detach() * (known.values < 1)[:, None].to(codes)

    def decode(self, call, training, forward, *args, **kwargs):
        """Decode; for pictures, codes of training image k give output k, and other codes the outputs in turn."""
        images, z = forward(*args, **kwargs), (*args, *kwargs.values())[0].detach()
        if training or call is not self.inner or images.numel() != 784 * len(images):
            call.last, call.codes = images.detach(), [z]
            return images
        call.codes.append(z.cpu())
        number = (z.flatten(1).mean(1) / 10).round()
        known = (number >= 1) & ((z.flatten(1) / 10 - number[:, None]).abs() < 0.4).all(1)
        turn = (call.shift + torch.arange(len(z))) % len(OUTPUTS)
        call.shift += int((~known).sum())
        shown = OUTPUTS[torch.where(known.cpu(), (number.long().cpu() - 1).clamp(0, len(OUTPUTS) - 1), turn)]
        return images * 0 + shown.to(images).view_as(images)

    def look_at_files(self):
        """Load files as torch.save writes them, and note whether anything is in --log_dir."""
        new = {path for path, _ in files() - self.train_aae[0].files}
        self.written_elsewhere = not [*Path(FLAGS["log_dir"]).rglob("*.*")] and bool(new)
        for path in new:
            if path.read_bytes()[:2] == b"PK":
                self.checkpoints[path.name] = None
                with contextlib.suppress(Exception):
                    self.checkpoints[path.name] = torch.load(path, map_location="cpu", weights_only=True)

    def look_at_loggers(self):
        """Note by which tags the two loggers of the last call log."""
        for player, logger in zip(("ae", "disc"), self.train_aae[-1].given[3:5], strict=True):
            with contextlib.suppress(Exception), mock.patch(
                    "torch.utils.tensorboard.SummaryWriter.add_scalar") as add_scalar:
                for _ in range(200):
                    logger.add_values({"probe": torch.tensor(1.0)})
            tag = [*add_scalar.call_args.args, *add_scalar.call_args.kwargs.values()][0] if add_scalar.called else ""
            self.prefixes[player] = tag.rpartition("/")[0]


def write_mnist(root, **images):
    """Write images [N, 1, 28, 28] in [-1, 1] to the files in which torchvision looks for MNIST."""
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    for kind, pixels in images.items():
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
        for name, sizes, content in ((f"{kind}-images-idx3-ubyte", pixels.squeeze(1).shape, pixels.numpy()),
                                     (f"{kind}-labels-idx1-ubyte", pixels.shape[:1], np.arange(len(pixels)) % 10)):
            header = [2048 + len(sizes), *sizes]
            (raw / name).write_bytes(np.array(header, ">i4").tobytes() + content.astype(np.uint8).tobytes())
    return raw


def read_png(file):
    """Return a picture's red channel, [H, W]."""
    return np.asarray(Image.open(file).convert("RGB"))[:, :, 0]


def files():
    """Return the files below the current folder, and when they were written."""
    return {(path.absolute(), path.stat().st_mtime_ns) for path in Path().rglob("*") if path.is_file()}


def arguments(function, args, kwargs):
    """Return what a call gives for the first eight parameters of a function."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return [*bound.arguments.values(), *[None] * 8][:8]


def weights(model):
    """Return the weights of a model as one vector. Lazy layers have none before their first forward pass."""
    return torch.cat([torch.zeros(0), *(w.data.flatten() for w in model.parameters() if not nn.parameter.is_lazy(w))])


def optimizer_facts(optimizer):
    groups = getattr(optimizer, "param_groups", [])
    return Namespace(held={id(weight) for group in groups for weight in group["params"]},
                     rates={float(group["lr"]) for group in groups}, state=bool(getattr(optimizer, "state", None)),
                     maximize=any(group.get("maximize") for group in groups))


def missing_flag(error):
    """Return the flag whose absence has made the error that is handled, if the assignment does not have it."""
    place, name = inspect.trace()[-1], re.findall(r"'(\w+)'", str(error))[-1:]
    unpacked = isinstance(error, TypeError) and "**" in str(place.code_context)
    owners = place.frame.f_locals.values() if unpacked or isinstance(error, KeyError) else [getattr(error, "obj", None)]
    flags = [owner if isinstance(owner, dict) else getattr(owner, "__dict__", {}) for owner in owners]
    return "".join(name if any(FLAGS.keys() <= owner.keys() for owner in flags) else ())


@functools.lru_cache(1)
def watch(train):
    """Return a long run of main, a short one by the same flags, and a short one by others."""
    return Run(train, EPOCHS + 1, {}), Run(train, 2, {"epochs": 1}), Run(train, 2, {"epochs": 1, **OTHER})
