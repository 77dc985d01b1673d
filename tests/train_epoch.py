"""Runs a train.py, and one epoch of its train_aae with optimizers that move nothing: its calls, its steps, its logs."""

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import tempfile
import traceback
import weakref
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unittests import ModelGroup

__unittest = True

NOWHERE = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (code under test may keep it)
NOWHERE.close = lambda: None  # for the same reason
LIMIT = 180  # seconds for an import and for a test of train.py, which may be slow where the machine is
PLAYERS = ("ae", "disc")  # as in ae_loss, optimizer_disc
PARTS = ("encoder", "decoder", "discriminator")
PARTIAL = "Mistake 15: train_aae does not train a last batch of 2:"
NOT_DETACHED = ("Mistake 4: the discriminator's loss also trains the encoder: call get_loss_discriminator(z.detach()), "
                "and zero_grad() before each backward()")


# Running code of others ----------------------------------------------------------------------------------------------

class Overrun(BaseException):
    """Code has exceeded its time limit. It is a BaseException, so `except Exception` does not catch it."""

    first = None  # what the first one says


@contextlib.contextmanager
def limit(words, seconds):
    """Raise Overrun(words) in a block after some seconds; after the first time, fail at once."""
    def stop(*_):
        Overrun.first = Overrun.first or words
        raise Overrun(words)

    if Overrun.first:
        raise AssertionError(f"not run, because {Overrun.first.partition(':')[0]}")
    with contextlib.ExitStack() as stack:
        if hasattr(signal, "setitimer"):  # Windows has none
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # repeated every second, in case an `except:` catches it
        yield


def load(name):
    """Import a module within a time limit; where PyTorch Lightning is missing, a stand-in has its seed_everything."""
    for package in ("pytorch_lightning", "lightning"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].seed_everything = lambda seed=0, *_, **__: torch.manual_seed(seed)
    with limit(f"importing {name} did not end within {LIMIT} s: does it train as soon as it is imported? "
               'put the call of main under if __name__ == "__main__":', LIMIT):
        return importlib.import_module(name)


class TrainGroup(ModelGroup):
    """Runs a student's train.py; what is absent is skipped, what crashes fails."""

    working = set()  # models whose networks and losses do not crash

    def working_model(self):
        """Skip the test if the networks or losses of the model do not work, which other tests tell."""
        if self.models.AdversarialAE in TrainGroup.working:
            return
        model, x = self.model(), block_images(16)
        try:
            for loss, _ in (*[model.get_loss_autoencoder(x, *model(x), lambda_) for lambda_ in (0.0, 1.0)],
                            model.get_loss_discriminator(model(x)[1].detach())):
                loss.backward()
                if not loss.isfinite():
                    raise ValueError
            TrainGroup.working.add(self.models.AdversarialAE)
        except Exception:
            self.skipTest("what needs working losses: see the failures")

    def attempt(self, what, call, module="train"):
        """Return call(module), run silently and without a network; `what` names what is not checked if that fails."""
        with contextlib.redirect_stdout(NOWHERE), contextlib.redirect_stderr(NOWHERE), \
                mock.patch("sys.argv", ["train.py"]), mock.patch("urllib.request.urlopen", side_effect=OSError) as web:
            try:
                loaded = load(module)
                with limit(f"{self.id()} did not end within {LIMIT} s: does train.py have an infinite loop?", LIMIT):
                    return call(loaded)
            except Overrun as error:
                self.check(False, str(error))
            except (AssertionError, Exception, SystemExit) as caught:
                error, owner = caught, getattr(caught, "obj", None)  # the owner of an attribute that is missing
        lines = [f" (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})" for frame in
                 traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem in ("train", "models")]
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            self.skipTest(f"{what}: there is no {module}.py")
        if (web.called or isinstance(error, (OSError, ImportError))
                or isinstance(owner, (Namespace, DataLoader, TensorDataset))  # what train.py has been given here
                or getattr(owner, "__name__", "") in ("train", "mnist")
                or any(words in str(error) for words in ("CUDA", "NVIDIA", "Dataset not found"))):
            self.skipTest(f"{what}: {error!r}{lines[-1] if lines else ''}")
        if isinstance(error, AssertionError) and not lines:
            raise error
        self.check(False, getattr(error, "mistake", None) or
                   f"train.py raises {type(error).__name__}: {error}{lines[-1] if lines else ''}")


# One epoch with frozen weights ---------------------------------------------------------------------------------------

class Frozen(torch.optim.Optimizer):
    """An optimizer that moves nothing: each step notes the gradient of each network, [number of weights]."""

    def __init__(self, networks):
        super().__init__([weight for network in networks for weight in network.parameters()], {
            "lr": 0.01, "betas": (0.5, 0.999), "momentum": 0.0, "weight_decay": 0.0})  # which schedules may read
        self.networks, self.steps = networks, []

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.steps.append([gradient(network) for network in self.networks])
        for weight in self.param_groups[0]["params"]:
            weight.add_(0)  # so that autograd still notices a step between a loss and its backward pass
        return loss


def gradient(network):
    """Return the gradient of a network as one vector; it is 0 where there is none."""
    return torch.cat([(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().double()
                      for weight in network.parameters()])


class Loader(DataLoader):
    """Batches in their order, which tell an epoch when they are drawn."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            self.epoch.drawn = i
            self.epoch.look_for_graphs(i)
            yield batch


class Epoch:
    """What train_aae does in one epoch with frozen weights: its calls, its steps, and what it logs."""

    def __init__(self, train_aae, model, images, lambda_, batch_size, epoch=90):  # some save pictures every fifth
        self.model, self.batches, self.drawn = model, images.split(batch_size), -1
        self.encoded, self.decoded = [], []  # Namespaces: batch in turn, input, output
        self.losses = {player: [] for player in PLAYERS}  # Namespaces: batch in turn, arguments, values
        self.logged, self.points = {player: [] for player in PLAYERS}, []  # dicts of losses; (tag, step)
        self.root = None  # the loss whose backward pass came last
        self.graphs, self.kept = [], False  # weak references to what graphs hold; whether old graphs are kept
        self.steps = {}
        loader = Loader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size)
        loader.epoch, optimizers = self, []
        for player, networks in (("ae", [model.encoder, model.decoder]), ("disc", [model.discriminator])):
            optimizers.append(Frozen(networks))
            self.steps[player] = optimizers[-1].steps
        model.train().zero_grad()
        with contextlib.ExitStack() as stack:
            loggers = self.make_loggers(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            for owner, name, replacement in (
                    (model, "get_loss_autoencoder", functools.partial(self.loss, "ae")),
                    (model, "get_loss_discriminator", functools.partial(self.loss, "disc")),
                    (model.encoder, "forward", functools.partial(self.forward, self.encoded)),
                    (model.decoder, "forward", functools.partial(self.forward, self.decoded))):
                replacement = functools.partial(replacement, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, replacement))
            try:
                train_aae(epoch, model, loader, *loggers, *optimizers, lambda_)
            except Exception as error:
                error.mistake = self.explain(str(error))
                raise

    def make_loggers(self, folder):
        """Return loggers, the student's own if there are any, that note what they get."""
        for name in ("checkpoints", "results/Prior_samples", "results/Reconstruction"):
            Path(folder, name).mkdir(parents=True)
        writer = mock.MagicMock(log_dir=folder)
        writer.get_logdir.return_value = folder
        writer.add_scalar = lambda tag, value, global_step=None, *_, **__: self.points.append((tag, global_step))
        Logger = getattr(sys.modules.get("utils"), "TensorBoardLogger", mock.MagicMock)

        def noting(player, add_values):
            def add(values):
                self.logged[player].append(numbers(values))
                return add_values(values)
            return add

        loggers = [Logger(writer, avg_window=1, name=name) for name in ("generator", "discriminator")]
        for player, logger in zip(PLAYERS, loggers, strict=True):
            logger.summary_writer, logger.add_values = writer, noting(player, logger.add_values)
        return loggers

    def forward(self, calls, forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        given = (*args, *kwargs.values())[0]
        calls.append(Namespace(turn=self.drawn, given=given.detach().clone(), output=output.detach().clone()))
        if calls is self.encoded and output.requires_grad:
            hook = Hook()  # which the graph holds
            output.register_hook(hook)
            self.graphs.append((self.drawn, weakref.ref(hook)))
        return output

    def loss(self, player, function, *args, **kwargs):
        result = function(*args, **kwargs)
        if result[0].requires_grad:
            result[0].register_hook(lambda _: setattr(self, "root", player))
        names = ("x", "recon_x", "z_fake", "lambda_") if player == "ae" else ("z_fake",)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        z = given["z_fake"]
        self.losses[player].append(Namespace(
            turn=self.drawn, cut=[name for name in ("recon_x", "z_fake") if not given.get(name, z).requires_grad
                                  and any(weight.requires_grad for weight in self.model.encoder.parameters())],
            reaches_encoder=reaches(result[0].grad_fn, z.grad_fn), attached=result[0].requires_grad,
            values=numbers(result[1]),
            given={name: value.detach().clone() for name, value in given.items() if torch.is_tensor(value)}))
        return result

    def look_for_graphs(self, turn):
        """Note whether the graphs of all batches but the last two still exist when another batch is drawn."""
        def alive():
            return {drawn for drawn, reference in self.graphs if drawn < turn - 2 and reference()}

        if turn > 4 and len(alive()) == turn - 2:
            gc.collect()  # slow, so it is not done before
            self.kept |= len(alive()) == turn - 2

    def origin_of_images(self, images):
        """Return the number of the batch that images are, or that they show with changes, or what else they are."""
        if any(close(images, call.output) for call in self.decoded):
            return "reconstructions"
        alike = [i for i, batch in enumerate(self.batches) if images.shape == batch.shape
                 and likeness(images, batch) > 0.7]
        return alike[0] if alike else "other images"

    def origins_of_codes(self, z):
        """Return what the encoder has coded so, up to noise: a set of numbers of batches, and of other things."""
        calls = [call for call in self.encoded if call.output.shape == z.shape]
        found = [call for call in calls if close(z, call.output)] or [
            call for call in calls if likeness(z, call.output) > 0.6 or (z - call.output).square().mean() < 0.25]
        return {self.origin_of_images(call.given) for call in found} or {"no image"}

    def explain(self, error):
        """Return the mistake behind an error of autograd, or None."""
        disc = self.losses["disc"][-1:]
        if "does not require grad" in error:
            for player, calls in self.losses.items():
                if calls and not calls[-1].attached:
                    number = 19 if player == "ae" else 17
                    return (f"Mistake {number}: {player}_loss has no gradient: remove the detach(), torch.no_grad() or "
                            "requires_grad_(False) before it")
        if disc and disc[0].reaches_encoder and ("second time" in error or "inplace" in error and self.root == "disc"):
            return NOT_DETACHED
        if "inplace" in error and (disc or self.losses["ae"]):
            return ("Mistake 16: an optimizer's step() stands between a loss and its backward(), and changes weights "
                    "that it needs. An order that works: both losses (disc_loss of z.detach()), then zero_grad(), "
                    "backward() and step() of the autoencoder, then the three of the discriminator")
        if 0 < self.drawn == len(self.batches) - 1 and len(self.batches[-1]) < len(self.batches[0]):
            return f"{PARTIAL} it raises {error}"
        return None


class Hook:
    """A hook of a tensor that does nothing; the tensor's graph holds it."""

    def __call__(self, _):
        return None


def reaches(node, target):
    """Whether the graph below a node of autograd contains another node."""
    nodes = [node] if node else []
    for node in nodes:
        nodes.extend({following for following, _ in node.next_functions if following} - {*nodes})
    return target is not None and target in nodes


def likeness(one, other):
    """Return the correlation of two tensors of the same shape, over what differs within the batch."""
    one, other = (tensor.double().flatten(1) - tensor.double().flatten(1).mean(0) for tensor in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm() + 1e-300))


def close(one, other):
    return one.shape == other.shape and float((one - other).norm()) <= 1e-3 * float(other.norm())


def numbers(values):
    """Return those values of a dict that are single numbers, as floats."""
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    return {name: tensor.item() for name, tensor in tensors.items() if tensor.numel() == 1}


def block_images(count):
    """Return images of 7x7 random blocks, [count, 1, 28, 28] in [-1, 1]; any two differ clearly."""
    return nn.functional.interpolate(torch.rand(count, 1, 7, 7) * 2 - 1, scale_factor=4)
