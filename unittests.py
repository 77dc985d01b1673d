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
                   f"{words} (it is {value:.6g}{' from a division by 0 or infinity' * math.isnan(value)}, "
                   f"and should be {expected:.6g})")


def images_like_mnist(count):
    return torch.rand(count, 1, 28, 28) * 2 - 1


def listen(network):
    """Return a list that collects the input and the output of each call of a network, however it is called."""
    calls, forward = [], network.forward
    network.forward = lambda *args, **kwargs: calls.append((
        (*args, *kwargs.values())[0], forward(*args, **kwargs))) or calls[-1][1]
    return calls


class ModelGroup(Group):
    """Shared by the groups on models.py. The codes made here are marked, to tell them from prior samples."""

    needs = ("models",)
    NAMES = {"get_loss_autoencoder": ("gen_loss", "recon_loss", "ae_loss"),
             "get_loss_discriminator": ("loss_real", "loss_fake", "disc_loss", "accuracy")}
    MARK = 1000.0  # second component of the codes made here, far from any prior sample

    @classmethod
    def model(cls, z_dim=4):
        """Return a new model; lazy layers get their weights in a first forward pass."""
        model = cls.models.AdversarialAE(z_dim=z_dim)
        if any(isinstance(weight, nn.UninitializedParameter) for weight in model.parameters()):
            with torch.no_grad():
                model.discriminator(model(images_like_mnist(2))[1])
        return model

    def call(self, name, logits, *args, images=(), model=None):
        """Return a loss, its dict (terms exchanged there are exchanged back), and its prior samples."""
        model, z = model or self.model(8), torch.zeros(len(logits), 8)
        z[:, 0], z[:, 1] = torch.as_tensor(np.array(logits)), self.MARK
        model.discriminator.forward = lambda *args, **kwargs: (*args, *kwargs.values())[0][:, :1]
        calls = listen(model.discriminator)
        try:
            with torch.no_grad():
                loss, values = getattr(model, name)(*images, z, *args)
        except (RuntimeError, ValueError) as error:
            self.check("between 0 and 1" not in str(error), "Mistake 8: the loss treats the discriminator's output as "
                       "a probability: return logits (no sigmoid), and use binary_cross_entropy_with_logits")
            raise
        for key in self.NAMES[name]:
            self.check(torch.is_tensor(values.get(key)) and values[key].numel() == 1,
                       f"{key} in the dict of {name} must be a scalar tensor")
        if not calls:
            self.skipTest(f"{name} does not call self.discriminator(z_fake), so its values were not checked")
        codes = torch.cat([z for z, _ in calls])
        real, (one, other, *_) = codes[codes[:, 1] != self.MARK], self.NAMES[name]
        right = (images[0] - images[1]).square() if images else nn.functional.softplus(z[:, 0])
        if [math.isclose(values[key], right.mean(), rel_tol=1e-4) for key in (one, other)] == [True, False]:
            values = {**values, one: values[other], other: values[one], "exchanged": True}
        return loss, values, real

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
            expected = {"Encoder": (count, z_dim), "Decoder": (count, 1, 28, 28), "Discriminator": (count, 1)}[part]
            for output in (network(z_dim).eval()(given), getattr(self.model(z_dim).eval(), part.lower())(given)):
                self.check(output.shape == expected, f"{part}({z_dim}) returns {tuple(output.shape)}, not {expected}")
                self.check(part != "Decoder" or output.abs().max() <= 1, "the decoder leaves [-1, 1]: end it in tanh")

    def test_model_has_its_parts_and_device(self):
        self.assertEqual(self.models.AdversarialAE().z_dim, 8, "AdversarialAE() must have z_dim 8")
        for part in ("", "encoder", "discriminator"):
            module = self.model(3).get_submodule(part)
            for device in (torch.device("cpu"), torch.device("meta")):
                self.assertEqual(torch.device(module.to(device).device), device, "`device` must be the weights' device")

    def test_forward_returns_reconstruction_then_code_also_when_loaded(self):
        model, other, x, passes = self.model().eval(), self.model().eval(), images_like_mnist(3), []
        recon_x, z = model(x)
        self.assertEqual((recon_x.shape, z.shape), ((3, 1, 28, 28), (3, 4)), "forward(x) must return (recon_x, z)")
        torch.testing.assert_close(recon_x, model.decoder(z))
        other.load_state_dict(model.state_dict())
        for network in (model, model, other):  # an encoder may add noise
            torch.manual_seed(1)
            passes.append(torch.cat([output.flatten() for output in network(x)]))
        self.check(torch.allclose(passes[0], passes[2], atol=1e-5) or not torch.equal(passes[0], passes[1]),
                   "a model with the same state_dict() returns other outputs")

    def test_sample_returns_different_images_without_gradients(self):
        model = self.model(3).eval()
        calls, image, images = listen(model.decoder), model.sample(1), model.sample(7)
        self.assertEqual((tuple(image.shape), tuple(images.shape)), ((1, 1, 28, 28), (7, 1, 28, 28)))
        self.check(not images.requires_grad, "sample() must not record gradients: use torch.no_grad()")
        self.check(len(torch.cat([image, images]).unique(dim=0)) == 8 or torch.equal(*model.decoder(torch.randn(2, 3))),
                   "sample() returns the same image more than once")
        made = torch.cat([output.flatten() for _, output in calls])[-images.numel():] if calls else images.flatten()
        self.check(torch.allclose(made, images.flatten(), atol=1e-4),
                   "sample() changes the decoder's images: return them as they are, in [-1, 1]")


class Losses(ModelGroup):
    """The two losses, compared with their formulas in float64."""

    LOGITS = np.array([-100.0, -3.0, -0.3, 0.2, 1.5, 100.0])  # logaddexp(0, l): cross-entropy of l and the label 0

    def test_autoencoder_loss_is_the_weighted_sum_of_its_parts(self):
        x, recon_x = images_like_mnist(6), images_like_mnist(6)
        recon_loss, gen_loss = float((x.double() - recon_x).square().mean()), np.logaddexp(0, -self.LOGITS).mean()
        for given in ([0.0], [0.3], [0.995], [1.0], []):
            loss, values = self.autoencoder_loss(self.LOGITS, *given, images=(x, recon_x))
            lambda_, = given or [1.0]
            self.check("exchanged" not in values, "gen_loss and recon_loss are exchanged in the dict")
            self.check_close(values["recon_loss"], recon_loss, "recon_loss is not the mean squared error over pixels")
            self.check_close(values["gen_loss"], gen_loss, "gen_loss is not the codes' cross-entropy, label 1")
            self.check_close(loss, lambda_ * values["recon_loss"] + (1 - lambda_) * values["gen_loss"],
                             f"ae_loss is not lambda_ * recon_loss + (1 - lambda_) * gen_loss, lambda_ {lambda_}")
            self.check_close(values["ae_loss"], loss, "the dict's ae_loss is not the returned loss")

    def test_discriminator_is_cross_entropy_of_both_halves(self):
        loss, values, real = self.discriminator_loss(self.LOGITS)
        self.check("exchanged" not in values, "loss_real and loss_fake are exchanged in the dict")
        loss_real, loss_fake = np.logaddexp(0, -real[:, 0].double().numpy()).mean(), np.logaddexp(0, self.LOGITS).mean()
        self.check_close(values["loss_real"], loss_real, "loss_real is not the prior samples' cross-entropy, label 1")
        self.check_close(values["loss_fake"], loss_fake, "loss_fake is not the codes' cross-entropy, label 0")
        total = loss_real + loss_fake
        self.check_close(loss if loss > 0.75 * total else 2 * loss, total, "disc_loss is not its halves' sum or mean")
        self.check_close(values["disc_loss"], loss, "the dict's disc_loss is not the returned loss")

    def test_19_gradients_are_those_of_the_formulas(self):
        model, x, codes = self.model(3).eval(), images_like_mnist(2), torch.randn(2, 3)
        for lambda_ in (0.0, 0.3, 1.0):
            recon_x, z, same = (tensor.clone().requires_grad_() for tensor in (-x, codes, codes))
            torch.manual_seed(1)
            nn.functional.softplus(-model.discriminator(same)).mean().backward()
            torch.manual_seed(1)  # the same for both passes
            (model.get_loss_autoencoder(x, recon_x, z, lambda_)[0] + 0 * (recon_x.sum() + z.sum())).backward()
            for name, own, right in (("recon_x", recon_x.grad, -4 * lambda_ / x.numel() * x),
                                     ("z_fake", z.grad, (1 - lambda_) * same.grad)):
                self.check(own.any() or not right.any(), f"Mistake 19: get_loss_autoencoder passes no gradient to "
                           f"{name}: use no detach(), and no torch.no_grad() around the discriminator")
                self.check(torch.allclose(own, right, rtol=1e-3, atol=1e-7),
                           f"the gradient of ae_loss with respect to {name} is not its formula's")
        model(x)[0].sum().backward()
        self.check(any(weight.grad is not None or not weight.requires_grad for weight in model.encoder.parameters()),
                   "Mistake 19: forward(x) cuts the encoder off from recon_x: decode z, not z.detach()")


PLAYERS = {"autoencoder": "ae", "discriminator": "disc"}  # and the short names of their losses and optimizers
PARTS, TAGS = ("encoder", "decoder", "discriminator"), ("generator", "discriminator")


@functools.lru_cache(8)
class Observer:
    """Watches epochs of train_aae. Losses, backward passes and steps may come in any order."""

    NOT_DETACHED = ("Mistake 4: the discriminator's loss also trains the encoder: call get_loss_discriminator("
                    "z.detach()), and zero_grad() before each backward()")

    def __init__(self, train_aae, new_model, count, lambda_, epochs):
        self.model = new_model().eval()
        parts = {part: [*getattr(self.model, part).parameters()] for part in PARTS}
        self.weights = {"autoencoder": parts["encoder"] + parts["decoder"], "discriminator": parts["discriminator"]}
        self.calls, self.passes, self.steps = ({player: [] for player in PLAYERS} for _ in range(3))
        self.roots, self.rooted = [], set()  # the losses of the last backward pass, and of all
        self.sizes, self.points, self.ends, self.uncleared, self.mixed, self.repeated = [], [], [], set(), set(), set()
        before = {part: [weight.detach().clone() for weight in weights] for part, weights in parts.items()}
        optimizers = [torch.optim.SGD(weights, 0.01) for weights in self.weights.values()]
        for player, optimizer in zip(PLAYERS, optimizers, strict=True):
            name = f"get_loss_{player}"
            setattr(self.model, name, functools.partial(self.loss, player, getattr(self.model, name)))
            optimizer.register_step_post_hook(functools.partial(self.step, player))
        self.model.encoder.register_forward_hook(lambda module, args, z: self.sizes.append(len(z)))
        Logger, writer = getattr(sys.modules.get("utils"), "TensorBoardLogger", mock.MagicMock), mock.MagicMock()
        writer.add_scalar, loggers = self.point, [Logger(writer, avg_window=1, name=name) for name in TAGS]
        images = 2 * torch.rand(count, 1, 28, 28) ** 3 - 1  # mostly dark
        loader = DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=64)
        with mock.patch.object(torch.autograd, "backward", functools.partial(self.backward, torch.autograd.backward)):
            for epoch in epochs:
                try:
                    train_aae(epoch, self.model, loader, *loggers, *optimizers, lambda_)
                except Exception as error:
                    error.mistake = self.explain(str(error))
                    raise
                self.ends.append({player: len(calls) for player, calls in self.calls.items()})
        self.spread, self.stopped = torch.std_mean(images), max(self.ends[0].values()) == 1  # after one batch
        self.moved = {part: not all(map(torch.equal, before[part], parts[part])) for part in PARTS}
        cuts = [call.cut for call in self.calls["autoencoder"] if parts["encoder"][0].requires_grad]
        self.cut = set.intersection(*cuts) if cuts else set()  # arguments of its loss that never had a gradient

    def loss(self, player, function, *args, **kwargs):
        loss, values = function(*args, **kwargs)
        names = ("x", "recon_x", "z_fake", "lambda_")  # of the autoencoder's
        given = dict(zip(names, args, strict=False), **kwargs) if player == "autoencoder" else {}
        nodes = [loss.grad_fn] if loss.requires_grad else []  # of the graph, down to the weights
        for node in nodes:
            nodes.extend({following for following, _ in node.next_functions if following} - {*nodes})
        leaves = {id(getattr(node, "variable", None)) for node in nodes}
        goes_to = {other for other, weights in self.weights.items() if leaves & {*map(id, weights)}}
        self.calls[player].append(Namespace(
            goes_to=goes_to, attached=loss.requires_grad, lambda_=float(given.get("lambda_", 1)),
            cut={name for name in ("recon_x", "z_fake") if not getattr(given.get(name), "requires_grad", True)},
            spread=torch.std_mean(given["x"].detach()) if "x" in given else None,
            value=float(values.get(f"{PLAYERS[player]}_loss", math.nan))))
        if loss.requires_grad:
            loss.register_hook(lambda _: self.roots.append((player, goes_to)))
        return loss, values

    def gradient(self, player):  # some 10,000 of its entries; where there is none, it is 0
        flat = torch.cat([(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten()
                          for weight in self.weights[player]])
        return flat[::1 + len(flat) // 10_000].double()

    def backward(self, backward, *args, **kwargs):
        """Run a backward pass; note what it adds to each player's gradients, and if it is of the own loss alone."""
        self.roots, before = [], {player: self.gradient(player) for player in PLAYERS}
        with mock.patch.object(torch.autograd, "backward", backward):  # a checkpoint has a pass within this one
            backward(*args, **kwargs)
        self.rooted |= {*dict(self.roots)}
        for player in PLAYERS:
            added = self.gradient(player) - before[player]
            own = all(root == player or player not in goes_to for root, goes_to in self.roots)
            if added.any():
                self.passes[player].append((own and (not self.roots or player in dict(self.roots)), added))

    def step(self, player, *_):
        """Compare a step with what backward passes added: it may follow any sum of own losses since the last step."""
        step, passes, last = self.gradient(player), self.passes[player], [0, *self.steps[player]][-1]
        fresh, own = ([added for is_own, added in part if is_own] for part in (passes[last:], passes))
        if step.any() and passes and last == len(passes):
            self.repeated.add(player)
        elif distance(step, fresh) > 1e-4 > distance(step, [added for _, added in passes]):
            (self.mixed if player == "autoencoder" and distance(step, own) > 1e-4 else self.uncleared).add(player)
        self.steps[player].append(len(passes))

    def point(self, tag, scalar_value, global_step=None, *_, **__):
        calls = {player: len(calls) for player, calls in self.calls.items()}
        self.points.append(Namespace(tag=tag, value=float(scalar_value), step=global_step, calls=calls))

    def explain(self, error):  # as the mistake behind it, if it is one
        for player, loss in PLAYERS.items():
            if "does not require grad" in error and self.calls[player] and not self.calls[player][-1].attached:
                return (f"Mistake {19 if loss == 'ae' else 17}: {loss}_loss has no gradient: remove the detach(), "
                        "torch.no_grad() or requires_grad_(False) before it")
        loss, changed = [None, *dict(self.roots)][-1], "inplace" in error and any(self.steps.values())
        if any("autoencoder" in call.goes_to for call in self.calls["discriminator"]) and (
                "second time" in error or changed and loss == "discriminator"):
            return self.NOT_DETACHED
        return changed and (
            f"Mistake 16: an optimizer's step() stands between {PLAYERS.get(loss)}_loss and its backward(), and "
            "changes weights that it needs. An order that works: both losses (disc_loss of z.detach()), then "
            "zero_grad(), backward() and step() of the autoencoder, then the three of the discriminator")


def distance(step, gradients):
    """Return the distance of a vector from the span of others, relative to its norm."""
    if not (gradients and step.any() and step.isfinite().all()):
        return float(step.any())
    columns = torch.stack(gradients, 1)
    return float((step - columns @ torch.linalg.lstsq(columns, step[:, None]).solution[:, 0]).norm() / step.norm())


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
            self.skipTest(f"{words}: train.py was not checked ({error!r})")
        lines = [f" (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})" for frame in
                 traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem in ("train", "models")]
        words = f"{crash} {type(error).__name__}: {error}{lines[-1] if lines else ''}"
        self.check(False, getattr(error, "mistake", None) or words)


class Mistakes(MistakesGroup):
    """Common mistakes, numbered as in the documentation."""

    def watch(self, words, lambda_=0.5, count=192, epochs=(1, 2), crash="train.py raises"):
        """Return what is seen of train_aae, by default in two epochs of three whole batches."""
        return self.attempt(words, lambda train: Observer(train.train_aae, self.model, count, lambda_, epochs), crash)

    def test_01_encoder_is_trained_to_deceive(self):
        gen = [float(self.autoencoder_loss([logit] * 8)[1]["gen_loss"]) for logit in (-20, 20)]
        fake = [float(self.discriminator_loss([logit] * 8)[1]["loss_fake"]) for logit in (-20, 20)]
        why = "since all labels are swapped" if fake[0] > fake[1] else "which helps the discriminator"
        self.check(gen[0] >= gen[1], f"Mistake 1: gen_loss is {gen[0]:.4g} at logits of -20 and {gen[1]:.4g} at 20, "
                   f"{why}: logits above 0 mean real, and gen_loss is the cross-entropy with the label 1 (real)")

    def test_03_gradients_are_cleared(self):
        for player in self.watch("Mistake 3").uncleared:
            self.check(False, f"Mistake 3: the {player}'s step includes gradients of other losses or steps: call "
                       f"optimizer_{PLAYERS[player]}.zero_grad() before {PLAYERS[player]}_loss.backward()")

    def test_04_discriminator_loss_does_not_reach_the_encoder(self):
        seen = self.watch("Mistake 4")
        self.check("autoencoder" not in seen.mixed, seen.NOT_DETACHED)

    def prior_samples(self):  # and their names
        model = self.model(8)
        samples = [(self.discriminator_loss(np.zeros(4096), model=model)[2], "the real codes") for _ in range(2)]
        calls, _ = listen(model.decoder), model.sample(1024)
        if not calls:
            self.skipTest("sample() does not call self.decoder(z), so the codes that it decodes were not checked")
        return [*samples, (torch.cat([z for z, _ in calls]), "sample()'s codes")]

    def test_05_codes_are_standard_normal(self):
        samples = self.prior_samples()
        self.check(not torch.equal(samples[0][0], samples[1][0]),
                   "Mistake 5: all calls use the same prior samples: draw new ones")
        for codes, source in samples:
            values = codes.double().flatten().sort().values
            distances = torch.special.ndtr(values) - torch.arange(len(values)) / len(values)  # Kolmogorov-Smirnov
            self.check(distances.abs().max() < 3.3 / math.sqrt(len(values.unique())),  # N(0, I): not once in 1e9
                       f"Mistake 5: {source} are not samples of N(0, I) (mean {values.mean():.3f}, standard deviation "
                       f"{values.std():.3f}): draw them with torch.randn")

    def test_06_losses_have_a_lower_bound(self):
        for logit in (-60.0, 60.0):
            values = {**self.autoencoder_loss([logit])[1], **self.discriminator_loss([logit])[1]}
            for name, label in (("gen_loss", 1), ("loss_fake", 0)):
                self.check(values[name] > -1e-6, f"Mistake 6: {name} is negative ({float(values[name]):.4g}), and has "
                           f"no lower bound: use the cross-entropy with the label {label}, and no minus before it")

    def test_07_generator_loss_is_that_of_codes(self):
        model, (x, other), (z, far) = self.model().eval(), images_like_mnist(8).chunk(2), torch.randn(2, 4, 4)
        terms, blind = [], torch.equal(model.discriminator(z), model.discriminator(far))
        for recon_x, codes in ((x, z), (other, z), (x, far)):
            torch.manual_seed(1)
            values = model.get_loss_autoencoder(x, recon_x, codes, 0.5)[1]
            terms.append([float(values["gen_loss"]), float(values["recon_loss"])])  # in case that they are exchanged
        self.check(any(abs(one - two) < 1e-6 and (blind or one != far) for one, two, far in zip(*terms, strict=True)),
                   "Mistake 7: gen_loss must depend on the discriminator's logits for the codes, not on recon_x")

    def linear_calls(self, network):  # flat copies of the input and output of each
        calls = []
        for module in (module for module in network.modules() if isinstance(module, nn.Linear)):
            module.register_forward_hook(lambda module, args, output: calls.append(
                [tensor.detach().clone().flatten() for tensor in (args[0], output)]))
        return calls

    def can_reach(self, value, new, call):  # whether Adam brings the mean of call(new()) half of the way to a value
        network = new().eval().requires_grad_()
        optimizer = torch.optim.Adam(network.parameters(), 0.03)
        for _ in range(100):
            output = call(network)
            if output.mean() / value > 0.5 or not output.requires_grad:  # the latter is another mistake
                return True
            optimizer.zero_grad()
            (output - value).abs().mean().backward()
            optimizer.step()
        return False

    def test_08_discriminator_returns_logits(self):
        for new in (lambda: self.models.Discriminator(8), lambda: self.model(8).discriminator) * 5:
            calls = self.linear_calls(discriminator := new())
            logits = discriminator(200 * torch.randn(256, 8)).detach().flatten()
            last = calls[-1][1] if calls else logits[:0]
            if len(last) == 256 and last.std() > 1e-6 and (logits[last.argsort()].diff() >= 0).all():  # determines them
                self.check(torch.stack([last, logits]).double().corrcoef()[0, 1] > 0.99999, "Mistake 8: the "
                           "discriminator has an activation after its last linear layer, such as a sigmoid: remove it")
            elif logits.min() >= 0 or logits.abs().max() <= 1:
                reached = [self.can_reach(value, new, lambda network: network(torch.ones(2, 8))) for value in (-4, 4)]
                self.check(all(reached), "Mistake 8: the discriminator's output cannot reach -2 and 2, unlike logits: "
                                         "end it in a linear layer")

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
        for part in PARTS:
            calls = self.linear_calls(getattr(model, part))
            getattr(model, part)(50 * (images_like_mnist(8) if part == "encoder" else torch.randn(8, 4)))
            self.check(not any(torch.equal(first, second) and first.any()  # 50: no activation is the identity there
                               for (_, first), (second, _) in itertools.pairwise(calls)),
                       f"Mistake 10: the {part} has two linear layers in a row: put an activation between them")

    def test_12_accuracy_is_over_both_halves_at_logit_0(self):
        for fake in ([-5.0] * 40, [5.0] * 40, [-5.0] * 10 + [5.0] * 30, [0.3] * 40, [-0.3] * 40):
            _, values, real = self.discriminator_loss(fake)
            right_real, right_fake = float((real[:, 0] > 0).float().mean()), float(np.mean(np.array(fake) < 0))
            self.check_close(values["accuracy"], (right_real + right_fake) / 2, "Mistake 12: accuracy must be the "
                             "share of right logits in both halves: above 0 for prior samples, below 0 for codes")

    def test_14_every_point_is_logged_at_a_step_of_its_own(self):
        points = self.watch("Mistake 14").points or self.skipTest(
            "Mistake 14: train.py was not checked (nothing was logged)")
        for tag in {point.tag for point in points}:
            steps = [point.step for point in points if point.tag == tag]
            self.check(len(set(steps)) == len(steps), f"Mistake 14: two epochs of three batches are logged at steps "
                       f"{steps} of {tag}: log each batch at its own step, counted across epochs")

    def test_15_any_batch_size(self):
        model = self.model().eval()
        for count in (64, 5, 1, 33):
            try:
                self.autoencoder_loss(np.zeros(count), 0.5)
                counts = [len(model(images_like_mnist(count))[0]), len(model.sample(count)),
                          len(self.discriminator_loss(np.zeros(count))[2])]
            except (RuntimeError, ValueError) as error:
                if count == 64:  # the default: another fault
                    raise
                counts = error
            self.check(counts == [count] * 3, f"Mistake 15: a batch of {count} should give as many reconstructions, "
                       f"samples and prior samples, and gives {counts}: is a batch size hard-coded?")

    def test_15_partial_batch_is_trained(self):
        words, stopped = "Mistake 15: train_aae does not train a last batch of 2:", self.watch("Mistake 15").stopped
        sizes = self.watch("Mistake 15", count=66, crash=f"{words} it raises").sizes
        self.check(sum(sizes) % 64 or stopped, f"{words} it is skipped")

    def test_16_no_step_between_a_loss_and_its_backward(self):
        self.watch("Mistake 16")

    def test_17_every_network_is_trained(self):
        seen = self.watch("Mistake 17")
        for part, loss in (("encoder", "ae"), ("decoder", "ae"), ("discriminator", "disc")):
            if not seen.moved[part] and not (loss == "ae" and seen.cut):  # the latter is Mistake 19
                late = self.watch("Mistake 17", count=1280, epochs=(90,))  # after any warm-up
                self.check(late.moved[part], f"Mistake 17: train_aae does not train the {part}: for each batch, call "
                           f"{loss}_loss.backward() and optimizer_{loss}.step(), clear nothing between, freeze nothing")

    def test_18_lambda_reaches_the_loss(self):
        seen = self.watch("Mistake 18", 0.0, epochs=(90,))
        got = [call.lambda_ for call in seen.calls["autoencoder"] if seen.moved["decoder"]]
        self.check(not got or "autoencoder" in seen.rooted and not any(got), "Mistake 18: lambda_ is lost, since at 0 "
                   "the decoder is trained: call get_loss_autoencoder(x, recon_x, z, lambda_) and ae_loss.backward()")

    def test_19_train_aae_passes_gradients_on(self):
        for lambda_, name, parts in ((0.0, "z_fake", ["encoder"]), (1.0, "recon_x", ["encoder", "decoder"])):
            seen = self.watch("Mistake 19", lambda_, epochs=(90,))
            self.check(name not in seen.cut or all(seen.moved[part] for part in parts), f"Mistake 19: train_aae gives "
                       f"get_loss_autoencoder a {name} without gradient: use no detach() or torch.no_grad()")

    def test_20_outputs_can_get_where_they_must(self):
        for part, value, end, call in (
                ("encoder", 4, "a linear layer", lambda model: model(torch.ones(2, 1, 28, 28))[1]),
                ("decoder", 0.9, "tanh", lambda model: model.decoder(torch.ones(2, 4)))):
            right = self.can_reach(-value, self.model, call) and self.can_reach(value, self.model, call)
            self.check(right, f"Mistake 20: the {part} cannot reach {-value / 2:g} and {value / 2:g}: end it in {end}")

    def test_22_one_step_a_batch(self):
        seen = self.watch("Mistake 22")
        self.check(not seen.stopped, "Mistake 22: train_aae stops after one batch: is a break left in the loop?")
        for player, loss in PLAYERS.items():
            self.check(player not in seen.repeated, f"Mistake 22: optimizer_{loss}.step() is called twice on the same "
                       f"gradient: call zero_grad(), {loss}_loss.backward() and step() once a batch")
            late = self.watch("Mistake 22", count=1280, epochs=(90,)) if len(seen.steps[player]) == 2 else seen
            self.check(len(late.steps[player]) != 1, f"Mistake 22: call optimizer_{loss}.step() once for each batch")

    def test_23_losses_get_the_images_of_the_loader(self):
        seen = self.watch("Mistake 23")
        for (std, mean), right in ((call.spread, seen.spread) for call in seen.calls["autoencoder"]):
            self.check(abs(mean - right[1]) < 0.1 and 0.85 < std / right[0] < 1.15, "Mistake 23: train_aae changes the "
                       f"loader's images (their mean from {right[1]:.2f} to {mean:.2f}): leave them in [-1, 1]")

    def test_28_prior_samples_are_independent(self):
        for codes, source in self.prior_samples():
            self.check(len(codes.unique(dim=0)) > len(codes) / 2 and codes.T.corrcoef().triu(1).abs().max() < 0.3,
                       f"Mistake 28: the numbers of {source} depend on each other: draw one for each, with torch.randn")

    def test_29_curves_show_every_batch(self):
        seen = self.watch("Mistake 29")
        for (player, loss), other in zip(PLAYERS.items(), TAGS[::-1], strict=True):
            points = [point for point in seen.points if point.tag.rpartition("/")[2] == f"{loss}_loss"]
            advice = f"call logger_{loss}.add_values({loss}_dict) in the loop"
            self.check(f"{other}/{loss}_loss" not in [point.tag for point in points],
                       f"Mistake 29: {loss}_loss is logged as {other}/{loss}_loss: {advice}")
            logged = [[i for i, call in enumerate(seen.calls[player][:point.calls[player]])
                       if math.isclose(call.value, point.value, rel_tol=1e-5)] for point in points]  # of which batch
            late = sum(calls[-1:] < [point.calls[player] - 1] for calls, point in zip(logged, points, strict=True))
            last = [[end[player] - 1] for end in seen.ends]
            right = [] in logged or len(seen.calls[player]) == 2 or logged != last and (late < 2 or last[-1] in logged)
            self.check(right, f"Mistake 29: {loss}_loss is not logged for each batch, before the next: {advice}")


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
