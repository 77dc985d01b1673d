"""Tests of the adversarial autoencoder, on the CPU and without a network:  python unittests.py

The groups in this file use only the assignment's interface. To check your own solution, copy this file next to your
models.py and, if you have them, train.py, mnist.py and utils.py:  python unittests.py Networks Losses Mistakes
The group TrainMistakes in tests/train_mistakes.py checks the rest of train.py, the others there this project's files.
"""

import contextlib
import functools
import importlib
import itertools
import math
import os
import signal
import sys
import tempfile
import traceback
import unittest
from argparse import Namespace
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # Python puts the folder of a symbolic link's target first
    sys.path[0] = str(Path(__file__).absolute().parent)
os.environ["MPLBACKEND"] = "Agg"  # matplotlib opens no windows
if Path(__file__).absolute().with_name("training").joinpath("threads.py").is_file():  # missing in a student's folder
    import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU, as must code that looks for a GPU
# isort: split
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

__unittest = True  # hides the lines of this file in tracebacks, but not those of the code under test

HERE = Path(__file__).absolute().parent
NOWHERE = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (code under test may keep it)
NOWHERE.close = lambda: None  # for the same reason
LIMIT, IMPORT_LIMIT = 40, 180  # seconds for a test of train.py, and for an import, which is slow from a cold disk


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
    """Import a module, within a time limit of its own."""
    try:
        with limit(f"importing {name} did not end within {IMPORT_LIMIT} s: does it train as soon as it is imported? "
                   'put the call of main under if __name__ == "__main__":', IMPORT_LIMIT):
            return importlib.import_module(name)
    except (Overrun, SystemExit) as error:
        raise AssertionError(error if isinstance(error, Overrun) else f"importing {name} exits Python") from None


class Group(unittest.TestCase):
    """Tests that need the modules named in `needs`; if one cannot be imported, only this group fails."""

    needs = ()

    @classmethod
    def setUpClass(cls):
        for name in cls.needs:
            setattr(cls, name.rpartition(".")[2], load(name))

    def setUp(self):
        torch.manual_seed(0)

    def check(self, condition, words):
        """Fail with only these words as message unless the condition holds."""
        if not condition:
            raise self.failureException(words) from None

    def check_close(self, value, expected, words, tolerance=1e-5):
        value, expected = (float(torch.as_tensor(number).detach()) for number in (value, expected))
        self.check(abs(value - expected) <= tolerance * max(1, abs(expected)),  # false for NaN, too
                   f"{words} (it is {value:.6g}, and should be {expected:.6g})")

    def folder(self):
        """Return a new folder, removed when the test ends."""
        return Path(self.enterContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))


class Recorder(nn.Sequential):
    """Wraps a network and records its inputs."""

    device = property(lambda self: next(self.parameters()).device)

    def __init__(self, net):
        super().__init__(net)
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return super().forward(x)


def images_like_mnist(count):
    return torch.rand(count, 1, 28, 28) * 2 - 1


def loader_like_mnist(count=66):
    return DataLoader(TensorDataset(images_like_mnist(count), torch.arange(count) % 10), batch_size=64)


class ModelGroup(Group):
    """Shared by the groups on models.py. The codes made here are marked, to tell them from prior samples."""

    needs = ("models",)
    NAMES = {"get_loss_autoencoder": {"gen_loss", "recon_loss", "ae_loss"},
             "get_loss_discriminator": {"disc_loss", "loss_real", "loss_fake", "accuracy"}}
    MARK = 1000.0  # second component of the codes made here, far from any prior sample

    @classmethod
    def model(cls, z_dim=4):
        """Return a new model; lazy layers get their weights in a first forward pass."""
        model = cls.models.AdversarialAE(z_dim=z_dim)
        if any(isinstance(weight, nn.UninitializedParameter) for weight in model.parameters()):
            with torch.no_grad():
                model.discriminator(model(images_like_mnist(2))[1])
        return model

    def call(self, name, logits, *args, weight=1.0, images=()):
        """Return a loss, its dict, and its prior samples; a code's logit is `weight` times its first component."""
        model, linear = self.model(8), nn.Linear(8, 1, bias=False)
        linear.weight = nn.Parameter(weight * torch.eye(1, 8))
        model.discriminator = Recorder(linear)
        z = nn.functional.pad(torch.tensor([(logit, self.MARK) for logit in logits], dtype=torch.float32), (0, 6))
        try:
            with torch.no_grad():
                loss, values = getattr(model, name)(*images, z, *args)
        except (RuntimeError, ValueError) as error:
            self.check("between 0 and 1" not in str(error), "Mistake 8: the loss treats the discriminator's output as "
                       "a probability: return logits (no sigmoid), and use binary_cross_entropy_with_logits")
            raise
        self.assertEqual(set(values), self.NAMES[name])
        self.check(all(torch.is_tensor(value) and value.numel() == 1 for value in values.values()),
                   f"the values of {name}'s dict must be scalar tensors")
        codes = torch.cat([z, *model.discriminator.inputs])
        return loss, values, codes[codes[:, 1] != self.MARK]

    def autoencoder_loss(self, logits, *lambda_, images=None):
        images = images or (images_like_mnist(len(logits)), torch.zeros(len(logits), 1, 28, 28))
        return self.call("get_loss_autoencoder", logits, *lambda_, images=images)[:2]

    discriminator_loss = functools.partialmethod(call, "get_loss_discriminator")


class Networks(ModelGroup):
    """Shapes, ranges, devices and names of the networks."""

    def test_shapes(self):
        for part, z_dim, count in itertools.product(("Encoder", "Decoder", "Discriminator"), (2, 8, 20), (1, 5)):
            given = images_like_mnist(count) if part == "Encoder" else 50 * torch.randn(count, z_dim)
            network = getattr(self.models, f"Conv{part}", None) or getattr(self.models, part)
            output = network(z_dim).eval()(given)
            expected = {"Encoder": (count, z_dim), "Decoder": (count, 1, 28, 28), "Discriminator": (count, 1)}[part]
            self.check(output.shape == expected, f"{part}({z_dim}) returns {tuple(output.shape)}, not {expected}")
            self.check(part != "Decoder" or output.abs().max() <= 1, "the decoder leaves [-1, 1]: end it in tanh")

    def test_model_has_its_parts_and_device(self):
        self.assertEqual(self.models.AdversarialAE().z_dim, 8, "AdversarialAE() must have z_dim 8")
        for part in ("", "encoder", "discriminator"):
            module = self.model(3).get_submodule(part)
            for device in (torch.device("cpu"), torch.device("meta")):
                self.assertEqual(torch.device(module.to(device).device), device, "`device` must be the weights' device")

    def test_forward_returns_reconstruction_then_code_also_when_loaded(self):
        model, other, x = self.model().eval(), self.model().eval(), images_like_mnist(3)
        recon_x, z = model(x)
        self.assertEqual((recon_x.shape, z.shape), ((3, 1, 28, 28), (3, 4)), "forward(x) must return (recon_x, z)")
        torch.testing.assert_close(recon_x, model.decoder(z))
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), model(x))

    def test_sample_returns_different_images_without_gradients(self):
        model = self.model(3).eval()
        image, images = model.sample(1), model.sample(7)
        self.assertEqual((tuple(image.shape), tuple(images.shape)), ((1, 1, 28, 28), (7, 1, 28, 28)))
        self.check(not images.requires_grad, "sample() must not record gradients: use torch.no_grad()")
        self.check(len(torch.cat([image, images]).unique(dim=0)) == 8, "sample() returns the same image more than once")


class Losses(ModelGroup):
    """The two losses, compared with their formulas in float64."""

    LOGITS = np.array([-100.0, -3.0, -0.3, 0.2, 1.5, 100.0])  # logaddexp(0, l): cross-entropy of l and the label 0

    def test_autoencoder_loss_is_the_weighted_sum_of_its_parts(self):
        x, recon_x = images_like_mnist(6), images_like_mnist(6)
        recon_loss, gen_loss = float((x.double() - recon_x).square().mean()), np.logaddexp(0, -self.LOGITS).mean()
        for given in ([0.0], [0.3], [0.995], [1.0], []):
            loss, values = self.autoencoder_loss(self.LOGITS, *given, images=(x, recon_x))
            lambda_, = given or [1.0]
            self.check_close(values["recon_loss"], recon_loss, "recon_loss is not the mean squared error over pixels")
            self.check_close(values["gen_loss"], gen_loss, "gen_loss is not the codes' cross-entropy, label 1")
            self.check_close(loss, lambda_ * values["recon_loss"] + (1 - lambda_) * values["gen_loss"],
                             f"ae_loss is not lambda_ * recon_loss + (1 - lambda_) * gen_loss, lambda_ {lambda_}")
            self.check_close(values["ae_loss"], loss, "the dict's ae_loss is not the returned loss")

    def test_discriminator_is_cross_entropy_of_both_halves(self):
        loss, values, real = self.discriminator_loss(self.LOGITS)
        loss_real, loss_fake = np.logaddexp(0, -real[:, 0].double().numpy()).mean(), np.logaddexp(0, self.LOGITS).mean()
        self.check_close(values["loss_real"], loss_real, "loss_real is not the prior samples' cross-entropy, label 1")
        self.check_close(values["loss_fake"], loss_fake, "loss_fake is not the codes' cross-entropy, label 0")
        total = loss_real + loss_fake
        self.check_close(loss if loss > 0.75 * total else 2 * loss, total, "disc_loss is not its halves' sum or mean")
        self.check_close(values["disc_loss"], loss, "the dict's disc_loss is not the returned loss")

    def test_zero_weights(self):
        model, x = self.model(5), torch.zeros(4, 1, 28, 28)
        for weight in model.parameters():
            nn.init.zeros_(weight)
        recon_x, z = model(x)
        self.check(not recon_x.any(), "with zero weights the decoder is not 0: end it in tanh")
        ae_loss, disc_loss = model.get_loss_autoencoder(x, recon_x, z, 0)[0], model.get_loss_discriminator(z)[0].item()
        self.check_close(ae_loss, math.log(2), "ae_loss of zero weights and lambda_ 0")
        self.check_close(disc_loss, math.log(2 if disc_loss < 1 else 4), "disc_loss of zero weights (mean or sum)")

    def test_gradients_are_those_of_the_formulas(self):
        model, x = self.model(3).eval(), images_like_mnist(2)
        weights = [*model.encoder.parameters(), *model.decoder.parameters()]
        for lambda_ in (0.0, 0.3, 1.0):
            recon_x, z = model(x)
            ae_loss = model.get_loss_autoencoder(x, recon_x, z, lambda_)[0]
            z = model.encoder(x)
            gen_loss = nn.functional.softplus(-model.discriminator(z)).mean()
            formula = lambda_ * (model.decoder(z) - x).square().mean() + (1 - lambda_) * gen_loss
            self.check(torch.allclose(gradient(ae_loss, weights), gradient(formula, weights), rtol=1e-3, atol=1e-7),
                       "the gradient of ae_loss is not its formula's: is z or recon_x detached, or computed twice?")
        model.get_loss_discriminator(z.detach())[0].backward()
        self.check(next(model.discriminator.parameters()).grad is not None, "disc_loss misses the discriminator")


def gradient(loss, weights):
    """Return the gradient of a loss with respect to weights as one vector; it is 0 for weights not in the graph."""
    if not loss.requires_grad or not all(weight.requires_grad for weight in weights):
        return torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float64)
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradients]).double()


def distance(step, gradients):
    """Return the distance of a vector from the span of others, relative to its norm."""
    columns = torch.stack(gradients, 1)
    return (step - columns @ torch.linalg.lstsq(columns, step[:, None]).solution[:, 0]).norm() / step.norm()


@functools.lru_cache(4)
def watch_training(train_aae, new_model, count):
    """Train a new model, initially in evaluation mode, for two epochs of `count` images; return what was observed.

    Losses and steps may come in any order. `mixed` names the players, "autoencoder" and "discriminator", of which a
    step mixed the gradient of the player's own loss with those of the other's loss or of earlier steps.
    """
    seen, writer = Namespace(sizes=[], stepped=set(), mixed=set(), points={}), mock.MagicMock()
    writer.add_scalar = lambda tag, scalar_value, global_step=None, *_, **__: \
        seen.points.setdefault(tag, []).append(global_step)
    model, since, backward = new_model().eval(), {}, [(None, None)]  # since: whose loss -> whose later step
    model.encoder.register_forward_hook(lambda module, args, z: seen.sizes.append(len(z)))
    weights = {"autoencoder": [*model.encoder.parameters()], "discriminator": [*model.discriminator.parameters()]}
    gradients = {pair: [] for pair in itertools.product(weights, weights)}  # (whose loss, whose weights): gradients

    def watched(player, loss, *args, **kwargs):
        result = loss(*args, **kwargs)
        for other, part in weights.items():
            gradients[player, other].append(None)  # stays if the autoencoder's backward() has freed a shared graph
            gradients[player, other][-1] = gradient(result[0], part)
        since.pop(player, None)
        if result[0].requires_grad:
            result[0].register_hook(lambda _: backward.append((player, since.get(player))))
        return result

    def before_step(player, *_):
        seen.stepped.add(player)
        since.update(dict.fromkeys(weights, player))
        step = torch.cat([torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
                          for weight in weights[player]]).double()
        if min((distance(step, [slope]) for slope in gradients[player, player]), default=0) > 1e-4 > \
                distance(step, [*gradients["autoencoder", player], *gradients["discriminator", player]]):
            seen.mixed.add(player)

    optimizers = [torch.optim.SGD(learning, 0.01) for learning in (
        [*model.encoder.parameters(), *model.decoder.parameters()], model.discriminator.parameters())]
    for player, optimizer in zip(weights, optimizers, strict=True):
        setattr(model, f"get_loss_{player}", functools.partial(watched, player, getattr(model, f"get_loss_{player}")))
        optimizer.register_step_pre_hook(functools.partial(before_step, player))
    Logger = getattr(sys.modules.get("utils"), "TensorBoardLogger", mock.MagicMock)
    loader, loggers = loader_like_mnist(count), [Logger(writer, avg_window=1, name=name) for name in weights]
    try:
        for epoch in (1, 2):
            train_aae(epoch, model, loader, *loggers, *optimizers, 0.5)
    except Exception as error:
        reached = any(slope is None or slope.any() for slope in gradients["discriminator", "autoencoder"])
        error.mistake = explain(str(error), *backward[-1], reached)
        raise
    return seen


NOT_DETACHED = ("Mistake 4: the discriminator's loss also trains the encoder: call get_loss_discriminator(z.detach()), "
                "and zero_grad() before each backward()")


def explain(error, loss, step, codes_attached):
    """Return the mistake behind an error in the backward() of a player's loss, after a player's step, if it is one."""
    changed = "inplace operation" in error and step
    if codes_attached and ("second time" in error or changed and (loss, step) == ("discriminator", "autoencoder")):
        return NOT_DETACHED
    loss, step = ("ae" if player == "autoencoder" else "disc" for player in (loss, step))
    return changed and (
        f"Mistake 16: optimizer_{step}.step() stands between {loss}_loss and {loss}_loss.backward(), "
        "and changes weights that this needs. An order that works: both losses (disc_loss of z.detach()), then "
        "zero_grad(), backward() and step() of the autoencoder, then the three of the discriminator")


class MistakesGroup(ModelGroup):
    """Shared by the groups on mistakes; a test is skipped if what it needs is absent, but fails if code crashes."""

    def attempt(self, words, call, crash="train.py raises"):
        """Return call(train), run silently and without a network; `crash` begins the message if it raises."""
        with contextlib.redirect_stdout(NOWHERE), contextlib.redirect_stderr(NOWHERE), \
                mock.patch("sys.argv", ["train.py"]), mock.patch("urllib.request.urlopen", side_effect=OSError) as web:
            try:
                train = load("train")
                with limit(f"{self.id()} did not end within {LIMIT} s: does train.py have an infinite loop?", LIMIT):
                    return call(train)
            except (Exception, SystemExit) as caught:
                error, owner = caught, getattr(caught, "obj", None)  # the owner of an attribute that is missing
        if (web.called or isinstance(error, (OSError, ModuleNotFoundError))
                or isinstance(error, ImportError) and error.name in ("mnist", "utils")  # another one than the student's
                or isinstance(owner, (Namespace, DataLoader, TensorDataset))  # what train.py has been given here
                or getattr(owner, "__name__", "") in ("train", "mnist")
                or any(words in str(error) for words in ("CUDA", "NVIDIA", "Dataset not found"))):
            self.skip(words, error)
        lines = [f" (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})" for frame in
                 traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem in ("train", "models")]
        words = f"{crash} {type(error).__name__}: {error}{lines[-1] if lines else ''}"
        self.check(False, getattr(error, "mistake", None) or words)

    def skip(self, words, error):
        self.skipTest(f"{words}: train.py was not checked ({error if isinstance(error, str) else repr(error)})")


class Mistakes(MistakesGroup):
    """Common mistakes, numbered as in the documentation."""

    def watch(self, words, count=128, crash="train.py raises"):
        """Return what watch_training observes of train.py, by default with two whole batches."""
        seen = self.attempt(words, lambda train: watch_training(train.train_aae, self.model, count), crash)
        for player in {"autoencoder", "discriminator"} - seen.stepped:
            self.skip(words, f"no optimizer step of the {player}")
        return seen

    def test_01_encoder_is_trained_to_deceive(self):
        gen = [float(self.autoencoder_loss([logit] * 8)[1]["gen_loss"]) for logit in (-20, 20)]
        fake = [float(self.discriminator_loss([logit] * 8)[1]["loss_fake"]) for logit in (-20, 20)]
        why = "since all labels are swapped" if fake[0] > fake[1] else "which helps the discriminator"
        self.check(gen[0] >= gen[1], f"Mistake 1: gen_loss is {gen[0]:.4g} at logits of -20 and {gen[1]:.4g} at 20, "
                   f"{why}: logits above 0 mean real, and gen_loss is the cross-entropy with the label 1 (real)")

    def test_03_discriminator_steps_along_its_own_gradient(self):
        self.check("discriminator" not in self.watch("Mistake 3").mixed, "Mistake 3: the discriminator's step includes "
                   "gradients of other losses or steps: call optimizer_disc.zero_grad() before disc_loss.backward()")

    def test_04_discriminator_loss_does_not_reach_the_encoder(self):
        model = self.model()
        disc_loss = model.get_loss_discriminator(model.encoder(images_like_mnist(3)))[0]
        if gradient(disc_loss, [*model.encoder.parameters()]).any():
            seen = self.watch("Mistake 4: get_loss_discriminator does not detach the codes, so its caller must")
            self.check("autoencoder" not in seen.mixed, NOT_DETACHED)

    def test_05_codes_are_standard_normal(self):
        real, again = (self.discriminator_loss(np.zeros(4096))[2] for _ in range(2))
        self.check(not torch.equal(real, again), "Mistake 5: all calls use the same prior samples: draw new ones")
        model = self.model(8)
        model.decoder = Recorder(model.decoder)
        model.sample(1024)
        for codes, source in ((real, "the real codes"), (torch.cat(model.decoder.inputs), "sample()'s codes")):
            values = codes.double().flatten().sort().values
            distances = torch.special.ndtr(values) - torch.arange(len(values)) / len(values)  # Kolmogorov-Smirnov
            self.check(distances.abs().max() < 3.3 / math.sqrt(len(values)),  # N(0, I) exceeds it with probability 1e-9
                       f"Mistake 5: {source} are not samples of N(0, I) (mean {values.mean():.3f}, standard deviation "
                       f"{values.std():.3f}): draw them with torch.randn")

    def test_06_losses_have_a_lower_bound(self):
        for logit in (-60.0, 60.0):  # as `weight`: large logits of either sign for prior samples
            values = {**self.autoencoder_loss([logit])[1], **self.discriminator_loss([logit])[1]}
            for name in ("gen_loss", "loss_fake"):
                self.check(values[name] > -1e-6, f"Mistake 6: {name} is negative ({float(values[name]):.4g}) and has "
                           "no lower bound, unlike a cross-entropy: use only the labels 0 and 1")
            loss_real = self.discriminator_loss(np.zeros(64), weight=logit)[1]["loss_real"].item()
            self.check(loss_real > 10, f"Mistake 6: loss_real is only {loss_real:.4g}, though prior samples have large "
                                       "negative logits: use the label 1")

    def test_07_generator_loss_is_that_of_codes(self):
        x = images_like_mnist(3)
        gen = [float(self.autoencoder_loss([logit] * 3, images=(x, recon_x))[1]["gen_loss"])
               for logit, recon_x in ((1.0, x), (1.0, -x), (-1.0, x))]
        self.check(abs(gen[0] - gen[1]) < 1e-6 and abs(gen[0] - gen[2]) > 1e-3,
                   "Mistake 7: gen_loss must depend on the discriminator's logits for the codes, not on recon_x")

    def linear_calls(self, network):
        """Return a list that collects flat copies of the input and output of each call of a linear layer."""
        calls = []
        for module in (module for module in network.modules() if isinstance(module, nn.Linear)):
            module.register_forward_hook(lambda module, args, output: calls.append(
                [tensor.detach().clone().flatten() for tensor in (args[0], output)]))
        return calls

    def test_08_discriminator_returns_logits(self):
        for new in (lambda: self.models.Discriminator(8), lambda: self.model(8).discriminator) * 5:
            discriminator = new()
            calls = self.linear_calls(discriminator)
            logits = discriminator(200 * torch.randn(256, 8)).detach().flatten()
            last = calls[-1][1] if calls else logits[:0]
            if len(last) == 256 and (logits[last.argsort()].diff() >= 0).all():  # the last layer determines the logits
                self.check(torch.stack([last, logits]).double().corrcoef()[0, 1] > 0.99999, "Mistake 8: the "
                           "discriminator has an activation after its last linear layer, such as a sigmoid: remove it")
            else:
                self.check(logits.min() < 0 and logits.abs().max() > 1, "Mistake 8: the discriminator's output is "
                           "never negative or never leaves [-1, 1], unlike logits: end it in a linear layer")

    def test_08_losses_grow_with_large_wrong_logits(self):
        for name, sign, loss in (("gen_loss", -1, self.autoencoder_loss), ("loss_fake", 1, self.discriminator_loss)):
            large, larger = (float(loss([sign * logit])[1][name]) for logit in (60.0, 90.0))
            self.check(math.isfinite(larger) and not (large > 1 and larger - large < 1),
                       f"Mistake 8: {name} saturates ({large:.4g}, {larger:.4g} at wrong logits of 60, 90), as "
                       "log(p + 1e-15) does: use binary_cross_entropy_with_logits")

    def test_09_lambda_weighs_the_reconstruction(self):
        loss, values = self.autoencoder_loss([-3.0, -3.0], 0.9)
        self.check(abs(float(loss) - (0.1 * float(values["recon_loss"]) + 0.9 * float(values["gen_loss"]))) > 1e-4,
                   "Mistake 9: lambda_ weights gen_loss: weight recon_loss by lambda_, and gen_loss by 1 - lambda_")

    def test_10_no_two_linear_layers_in_a_row(self):
        model = self.model().eval()
        for part in ("encoder", "decoder", "discriminator"):
            calls = self.linear_calls(getattr(model, part))
            getattr(model, part)(images_like_mnist(3) if part == "encoder" else torch.randn(3, 4))
            self.check(not any(torch.equal(first[1], second[0]) for first, second in itertools.pairwise(calls)),
                       f"Mistake 10: the {part} has two linear layers in a row: put an activation between them")

    def test_12_accuracy_is_over_both_halves_at_logit_0(self):
        for fake in ([-5.0] * 40, [5.0] * 40, [-5.0] * 10 + [5.0] * 30, [0.3] * 40, [-0.3] * 40):
            _, values, real = self.discriminator_loss(fake)
            right_real, right_fake = float((real[:, 0] > 0).float().mean()), float(np.mean(np.array(fake) < 0))
            self.check_close(values["accuracy"], (right_real + right_fake) / 2, "Mistake 12: accuracy must be the "
                             "share of right logits in both halves: above 0 for prior samples, below 0 for codes")

    def test_14_every_point_is_logged_at_a_step_of_its_own(self):
        seen = self.watch("Mistake 14")
        for tag, steps in seen.points.items():
            self.check(len(set(steps)) == len(steps), f"Mistake 14: two epochs of two batches are logged at steps "
                       f"{steps} of {tag}: log each batch at its own step, counted across epochs")
        if not seen.points:
            self.skip("Mistake 14", "nothing was logged")

    def test_15_any_batch_size(self):
        model = self.model()
        for count in (64, 5, 1, 33):
            x = images_like_mnist(count)
            try:
                recon_x, z = model.eval()(x)
                model.get_loss_autoencoder(x, recon_x, z, 0.5)
                model.get_loss_discriminator(z)
                counts = [len(recon_x), len(model.sample(count)), len(self.discriminator_loss(np.zeros(count))[2])]
            except (RuntimeError, ValueError) as error:
                if count == 64:  # the default: another fault
                    raise
                counts = error
            self.check(counts == [count] * 3, f"Mistake 15: a batch of {count} should give as many reconstructions, "
                       f"samples and prior samples, and gives {counts}: is a batch size hard-coded?")

    def test_15_partial_batch_is_trained(self):
        self.watch("Mistake 15")
        words = "Mistake 15: train_aae trains whole batches, but not a last one of 2 images:"
        seen = self.watch("Mistake 15", 66, f"{words} it raises")
        self.check(2 in seen.sizes, f"{words} it is skipped")

    def test_16_no_step_between_a_loss_and_its_backward(self):
        self.watch("Mistake 16")


def load_groups():
    """Add the groups of those files in tests/ that have any."""
    files = [file for file in sorted((HERE / "tests").glob("*.py")) if b"__unittest = True" in file.read_bytes()]
    sys.modules["unittests"] = sys.modules[__name__]  # tests/ import this module, not a second copy
    for file in files:
        sys.modules.setdefault("tests", type(sys)("tests")).__path__ = [str(HERE / "tests")]  # whoever else is named so
        globals().update({name: group for name, group in vars(importlib.import_module(f"tests.{file.stem}")).items()
                          if isinstance(group, type) and issubclass(group, Group)})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    load_groups()
    program = unittest.main(exit=False, testRunner=getattr(sys.modules.get("tests.parallel"), "Runner", None))
    for words in dict.fromkeys(words for _, words in program.result.skipped):
        print(f"skipped: {words}", file=sys.__stderr__)
    with contextlib.suppress(Exception):  # whatever the code under test has put there
        sys.stdout.flush()
    os._exit(not program.result.wasSuccessful())  # ends threads that the code under test has started, too
