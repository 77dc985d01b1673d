"""Tests of the adversarial autoencoder, on the CPU and without a network:  python unittests.py

Networks, Losses and Mistakes, the groups in this file, use nothing but the assignment's interface. Put this file beside
your models.py, train.py, mnist.py and utils.py (or models.py alone):  python unittests.py Networks Losses Mistakes
A test that fails says what is wrong, one that is skipped what was not looked at. The other groups are in tests/;
python unittests.py Resume runs one of them.
"""

import contextlib
import functools
import importlib
import io
import itertools
import math
import signal
import sys
import tempfile
import unittest
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

__unittest = True  # keeps the lines of this file out of what a failing test prints; those of the file under test stay

HERE = Path(__file__).resolve().parent
LN2 = math.log(2)
LIMIT = 40  # seconds that a test of train.py may take


# What the groups share -----------------------------------------------------------------------------------------------

class Overrun(BaseException):
    """Ends what does not end by itself; no `except Exception` on its way holds it up."""

    first = None  # what was ended first


def limit(name, add_cleanup):
    """End what comes before the cleanup after LIMIT seconds, by an Overrun; once that has been, fail at once."""
    def stop(*_):
        Overrun.first = Overrun.first or name
        raise Overrun(f"{name} did not end within {LIMIT} s: does train.py have a loop that never ends?")

    if Overrun.first:
        raise AssertionError(f"not run, for {Overrun.first} did not end within {LIMIT} s")
    if hasattr(signal, "setitimer"):  # Windows has none
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, LIMIT, 1)  # again each second, should an `except:` hold it up
        add_cleanup(signal.setitimer, signal.ITIMER_REAL, 0)


class Group(unittest.TestCase):
    """Tests that need the modules named in `needs`; where one cannot be imported, only this group fails."""

    needs = ()

    @classmethod
    def setUpClass(cls):
        try:
            if "train" in cls.needs:
                limit(f"the import of {', '.join(cls.needs)}", cls.addClassCleanup)
            for name in cls.needs:
                setattr(cls, name.rpartition(".")[2], importlib.import_module(name))
        except Overrun as overrun:
            raise AssertionError(overrun) from None

    def setUp(self):
        if "train" in self.needs:
            limit(self.id(), self.addCleanup)
        torch.manual_seed(0)

    def check(self, condition, words):
        """Fail with nothing but these words unless the condition holds."""
        if not condition:
            raise self.failureException(words)

    def check_close(self, value, expected, words, tolerance=1e-5):
        value, expected = (float(torch.as_tensor(number).detach()) for number in (value, expected))
        self.check(math.isfinite(value) and math.isfinite(expected), f"{words}: it is infinite or NaN, as after log(0) "
                   "or exp of a large number; binary_cross_entropy_with_logits is finite for all logits")
        self.check(abs(value - expected) <= tolerance * max(1, abs(expected)),
                   f"{words} (it is {value:.6g}, and should be {expected:.6g})")

    def folder(self):
        """Return a new folder, removed when the test ends."""
        return Path(self.enterContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))


class Recorder(nn.Module):
    """Stands in for a network and keeps what goes in."""

    def __init__(self, net):
        super().__init__()
        self.net, self.inputs = net, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.net(x)

    @property
    def device(self):
        return next(self.parameters()).device


def softplus(logits):
    """log(1 + e^l) in float64: the cross-entropy of logit l against the label 0, and of -l against the label 1."""
    return np.logaddexp(0, np.asarray(logits, dtype=np.float64))


def images_like_mnist(count):
    return torch.rand(count, 1, 28, 28) * 2 - 1


def loader_like_mnist(count=66):
    return DataLoader(TensorDataset(images_like_mnist(count), torch.arange(count) % 10), batch_size=64)


def zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def snapshot(model):
    """Return copies of everything in a model that sampling must not change."""
    return ({name: tensor.clone() for name, tensor in model.state_dict().items()},
            [module.training for module in model.modules()])


def same(state, other):
    """Whether two state_dicts are equal to the last bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def read_png(file):
    """Return the pixels of a picture's red channel, [H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))[:, :, 0].astype(int)


class ModelGroup(Group):
    """What the groups on models.py share. Codes are marked, so that the prior's draws can be told from them."""

    needs = ("models",)
    MARK = 1000.0  # second number of the codes made here; no draw of a prior comes near it

    def marked_codes(self, logits):
        """Return codes [N, 8] whose first number is the logit that the discriminator of `linear_model` gives them."""
        z = torch.zeros(len(logits), 8)
        z[:, 0], z[:, 1] = torch.as_tensor(logits, dtype=torch.float32), self.MARK
        return z

    def linear_model(self, weight=1.0):
        """Return a model whose discriminator multiplies a code's first number by `weight`, and is recorded."""
        model, linear = self.models.AdversarialAE(z_dim=8), nn.Linear(8, 1, bias=False)
        linear.weight = nn.Parameter(weight * torch.eye(1, 8))
        model.discriminator = Recorder(linear)
        return model

    def call(self, loss, *args):
        """Call a loss of `linear_model` without gradients, and explain the error of losses of probabilities."""
        try:
            with torch.no_grad():
                return loss(*args)
        except (RuntimeError, ValueError) as error:
            if "between 0 and 1" not in str(error):
                raise
            self.check(False, "Mistake 8: the loss takes the discriminator's output for a probability. It "
                              "must return logits (no sigmoid), and the loss use binary_cross_entropy_with_logits")

    def autoencoder_loss(self, logits, *lambda_, x=None, recon_x=None):
        x = images_like_mnist(len(logits)) if x is None else x
        recon_x = torch.zeros_like(x) if recon_x is None else recon_x
        return self.call(self.linear_model().get_loss_autoencoder, x, recon_x, self.marked_codes(logits), *lambda_)

    def discriminator_loss(self, logits, weight=1.0):
        """Return the loss, its dict, and the codes that were drawn from the prior for it, [N, 8]."""
        model = self.linear_model(weight)
        loss, values = self.call(model.get_loss_discriminator, self.marked_codes(logits))
        seen = torch.cat(model.discriminator.inputs)
        return loss, values, seen[seen[:, 1] != self.MARK]

    def network(self, part):
        """Return the class of a network, by either of its names."""
        found = [getattr(self.models, name) for name in (f"Conv{part}", part) if hasattr(self.models, name)]
        self.check(found, f"models.py has no {part}")
        return found[0]


class Networks(ModelGroup):
    """Shapes, ranges, devices and names of the networks."""

    def test_shapes(self):
        for part, z_dim, count in itertools.product(("Encoder", "Decoder", "Discriminator"), (2, 8, 20), (1, 5)):
            given = images_like_mnist(count) if part == "Encoder" else 50 * torch.randn(count, z_dim)
            output = self.network(part)(z_dim).eval()(given)
            expected = {"Encoder": (count, z_dim), "Decoder": (count, 1, 28, 28), "Discriminator": (count, 1)}[part]
            self.check(tuple(output.shape) == expected,
                       f"{part} with z_dim {z_dim} returns {tuple(output.shape)} for {count}, not {expected}")
            self.check(part != "Decoder" or output.abs().max() <= 1, "the decoder leaves [-1, 1]: end it with tanh")

    def test_decoder_ends_in_tanh(self):
        images = zeroed(self.network("Decoder")(8)).eval()(torch.randn(2, 8))
        self.check(not images.any(), f"with all weights 0 the decoder makes {images.mean().item():.3g}, not 0, the "
                                     f"middle of [-1, 1]: end it with tanh (a sigmoid makes 0.5)")

    def test_model_has_its_parts_and_device(self):
        self.assertEqual(self.models.AdversarialAE().z_dim, 8, "AdversarialAE() must have z_dim 8")
        self.assertIsInstance(self.models.AdversarialAE().decoder, nn.Module)
        for part in ("", "encoder", "discriminator"):
            module = self.models.AdversarialAE(z_dim=3).get_submodule(part)
            for device in (torch.device("cpu"), torch.device("meta")):
                self.assertEqual(torch.device(module.to(device).device), device, "`device` must be that of the weights")

    def test_forward_returns_reconstruction_then_code(self):
        model = self.models.AdversarialAE(z_dim=4).eval()
        recon_x, z = model(images_like_mnist(3))
        self.check(tuple(recon_x.shape) == (3, 1, 28, 28) and tuple(z.shape) == (3, 4),
                   "forward(x) must return (recon_x, z), in that order")
        torch.testing.assert_close(recon_x, model.decoder(z))

    def test_sample_returns_different_images_without_gradients(self):
        model = self.models.AdversarialAE(z_dim=3).eval()
        one, more = model.sample(1), model.sample(7)
        self.assertEqual((tuple(one.shape), tuple(more.shape)), ((1, 1, 28, 28), (7, 1, 28, 28)))
        self.check(not more.requires_grad, "sample() must not record gradients: use torch.no_grad()")
        self.check(more.abs().max() <= 1, "samples leave [-1, 1]")
        self.check(len(torch.cat([one, more]).unique(dim=0)) == 8, "sample() returns the same image more than once")

    def test_state_dict_round_trip(self):
        model, other, file = self.models.AdversarialAE(z_dim=3), self.models.AdversarialAE(z_dim=3), io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        x = images_like_mnist(2)
        torch.testing.assert_close(model.eval()(x), other.eval()(x))


class Losses(ModelGroup):
    """The two losses against their formulas, written out in float64."""

    LOGITS = [-100.0, -3.0, -0.3, 0.2, 1.5, 100.0]

    def test_parts_of_the_autoencoder_loss(self):
        x, recon_x = images_like_mnist(6), images_like_mnist(6)
        _, values = self.autoencoder_loss(self.LOGITS, x=x, recon_x=recon_x)
        expected = np.mean((x.double().numpy() - recon_x.double().numpy()) ** 2)
        self.check_close(values["recon_loss"], expected, "recon_loss is not the mean squared error over pixels")
        self.check_close(values["gen_loss"], softplus(-np.array(self.LOGITS)).mean(),
                         "gen_loss is not the binary cross-entropy of the codes' logits against the label 1")

    def test_autoencoder_loss_is_the_weighted_sum(self):
        for given in ((0.0,), (0.3,), (0.995,), (1.0,), ()):
            loss, values = self.autoencoder_loss(self.LOGITS, *given)
            lambda_ = given[0] if given else 1
            expected = lambda_ * float(values["recon_loss"]) + (1 - lambda_) * float(values["gen_loss"])
            self.check_close(loss, expected, "ae_loss is not lambda_ * recon_loss + (1 - lambda_) * gen_loss, lambda_ "
                                             f"{'being' if given else 'by default'} {lambda_}")
            self.check_close(values["ae_loss"], loss, "the dict's ae_loss is not the loss")

    def test_discriminator_is_cross_entropy_of_both_halves(self):
        loss, values, real = self.discriminator_loss(self.LOGITS)
        loss_real, loss_fake = softplus(-real[:, 0].numpy()).mean(), softplus(self.LOGITS).mean()
        self.check_close(values["loss_real"], loss_real, "loss_real is not the prior's codes' cross-entropy with 1")
        self.check_close(values["loss_fake"], loss_fake, "loss_fake is not the encoder's codes' cross-entropy with 0")
        total = loss_real + loss_fake
        self.check_close(min(loss, 2 * loss, key=lambda value: abs(value - total)), total,
                         "disc_loss is neither the sum nor the mean of its two halves")
        self.check_close(values["disc_loss"], loss, "the dict's disc_loss is not the loss")

    def test_dicts_hold_scalar_tensors_under_the_agreed_names(self):
        _, of_autoencoder = self.autoencoder_loss(self.LOGITS)
        _, of_discriminator, _ = self.discriminator_loss(self.LOGITS)
        self.assertEqual(set(of_autoencoder), {"gen_loss", "recon_loss", "ae_loss"})
        self.assertEqual(set(of_discriminator), {"disc_loss", "loss_real", "loss_fake", "accuracy"})
        for name, value in {**of_autoencoder, **of_discriminator}.items():
            self.check(torch.is_tensor(value) and value.numel() == 1, f"{name} is no scalar tensor")

    def test_zero_weights(self):
        model, x = zeroed(self.models.AdversarialAE(z_dim=5)), torch.zeros(4, 1, 28, 28)
        recon_x, z = model(x)
        for lambda_, expected in ((0, LN2), (1, 0)):
            loss = model.get_loss_autoencoder(x, recon_x, z, lambda_)[0]
            self.check_close(loss, expected, f"zero weights, lambda {lambda_}: ae_loss")
        loss = model.get_loss_discriminator(z)[0].item()
        self.check_close(loss, LN2 if loss < 1 else 2 * LN2, "zero weights: disc_loss, the halves' mean or their sum")

    def test_each_loss_trains_its_network(self):
        model, x = self.models.AdversarialAE(z_dim=5), images_like_mnist(4)
        for lambda_ in (0.0, 0.5, 1.0):
            model.zero_grad(set_to_none=True)
            recon_x, z = model(x)
            model.get_loss_autoencoder(x, recon_x, z, lambda_)[0].backward()
            self.check(next(model.encoder.parameters()).grad is not None,
                       "the autoencoder's loss does not reach the encoder: is z or recon_x detached?")
        model.get_loss_discriminator(z.detach())[0].backward()
        self.check(next(model.discriminator.parameters()).grad is not None,
                   "the discriminator's loss does not reach the discriminator")

    def test_gradient_is_that_of_the_formula(self):
        model, x = self.models.AdversarialAE(z_dim=3).eval(), images_like_mnist(2)
        weights = [*model.encoder.parameters(), *model.decoder.parameters()]
        recon_x, z = model(x)
        found = torch.autograd.grad(model.get_loss_autoencoder(x, recon_x, z, 0.3)[0], weights, allow_unused=True)
        z = model.encoder(x)
        gen_loss = nn.functional.softplus(-model.discriminator(z)).mean()
        formula = 0.3 * (model.decoder(z) - x).square().mean() + 0.7 * gen_loss
        for gradient, expected in zip(found, torch.autograd.grad(formula, weights)):
            self.check(gradient is not None and torch.allclose(gradient, expected, rtol=1e-3, atol=1e-7),
                       "ae_loss does not give encoder and decoder the gradient of 0.3 * recon_loss + 0.7 * gen_loss: "
                       "is z detached somewhere, or computed twice?")


# Mistakes ------------------------------------------------------------------------------------------------------------

def vector(weights, gradients):
    """Return the gradients of weights as one vector, 0 where there is none."""
    return torch.cat([(torch.zeros_like(weight) if gradient is None else gradient).flatten()
                      for weight, gradient in zip(weights, gradients)]).double()


def distance(step, gradients):
    """Return how far a vector is from all combinations of others, relative to its length."""
    columns = torch.stack(gradients, 1)
    return (step - columns @ torch.linalg.lstsq(columns, step[:, None]).solution[:, 0]).norm() / step.norm()


@functools.lru_cache(4)
def watch_training(train_aae, AdversarialAE, Logger, count):
    """Let train_aae train a model, at first in evaluation mode, for two epochs of `count` images; return what was seen.

    Losses and steps may come in any order. `mixed` names the players, "autoencoder" and "discriminator", of whom a step
    was along a mixture of gradients: of the player's own loss, and of the other's or of earlier steps.
    """
    seen, writer = Namespace(error=None, sizes=[], stepped=set(), mixed=set(), points={}), mock.MagicMock()
    writer.add_scalar = lambda tag, scalar_value, global_step=None, *_, **__: \
        seen.points.setdefault(tag, []).append(global_step)
    model = AdversarialAE(z_dim=4).eval()
    model.encoder.register_forward_hook(lambda module, args, z: seen.sizes.append(len(z)))
    weights = {"autoencoder": [*model.encoder.parameters()], "discriminator": [*model.discriminator.parameters()]}
    found = {pair: [] for pair in itertools.product(weights, weights)}  # gradients: of whose loss, along whose weights

    def watched(player, loss, *args, **kwargs):
        result = loss(*args, **kwargs)
        for other, own in weights.items():
            learns = result[0].requires_grad and all(weight.requires_grad for weight in own)
            gradients = torch.autograd.grad(result[0], own, retain_graph=True, allow_unused=True) if learns else \
                [None] * len(own)
            found[player, other].append(vector(own, gradients))
        return result

    def before_step(player, *_):
        seen.stepped.add(player)
        step = vector(weights[player], [weight.grad for weight in weights[player]])
        if min((distance(step, [own]) for own in found[player, player]), default=0) > 1e-4 > \
                distance(step, [gradient for loss in weights for gradient in found[loss, player]]):
            seen.mixed.add(player)

    optimizers = [torch.optim.SGD(learning, 0.01) for learning in (
        [*model.encoder.parameters(), *model.decoder.parameters()], model.discriminator.parameters())]
    for player, optimizer in zip(weights, optimizers):
        name = f"get_loss_{player}"
        setattr(model, name, functools.partial(watched, player, getattr(model, name)))
        optimizer.register_step_pre_hook(functools.partial(before_step, player))
    try:
        loader, loggers = loader_like_mnist(count), [Logger(writer, avg_window=1, name=name) for name in weights]
        for epoch in (1, 2):
            train_aae(epoch, model, loader, *loggers, *optimizers, 0.5)
    except Exception as error:
        seen.error = error
    return seen


class Mistakes(ModelGroup):
    """Mistakes that people made, by the numbers of README.md's list; what cannot be found in a train.py is skipped."""

    @contextlib.contextmanager
    def attempt(self, words):
        """Run a train.py, silently and without a network; skip the test where it lacks something or fails."""
        limit(self.id(), self.addCleanup)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                    mock.patch("urllib.request.urlopen", side_effect=OSError), mock.patch("sys.argv", ["train.py"]):
                yield
        except (Exception, SystemExit) as error:
            self.skip(words, error)

    def skip(self, words, error):
        self.skipTest(f"{words}: train.py was not looked at ({error if isinstance(error, str) else repr(error)})")

    def training(self, words, count=66):
        """Return what watch_training sees of the train.py beside this file, with batches of 64 and 2 images."""
        with self.attempt(words):
            train_aae = importlib.import_module("train").train_aae
            Logger = getattr(sys.modules.get("utils"), "TensorBoardLogger", mock.MagicMock)
            return watch_training(train_aae, self.models.AdversarialAE, Logger, count)

    def check_steps(self, player, words, skipped):
        seen = self.training(skipped)
        of_shared_graph = any(text in str(seen.error) for text in ("second time", "inplace operation"))
        self.check(player not in seen.mixed and not (of_shared_graph and player == "autoencoder"), words)
        if seen.error or player not in seen.stepped:
            self.skip(skipped, seen.error or f"it takes no step of the {player}")

    def run_main(self, words, train_aae, generate_and_save=mock.Mock()):
        """Run train.py's main on made-up images, with stand-ins that may raise SystemExit."""
        folder = f"{self.folder()}/"
        with self.attempt(words), contextlib.ExitStack() as stack:
            train, mnist = importlib.import_module("train"), importlib.import_module("mnist")
            for original, stand_in in ((mnist.mnist, lambda *_, **__: loader_like_mnist()),
                                       (train.train_aae, train_aae), (train.generate_and_save, generate_and_save),
                                       (train.save_reconstruction, mock.Mock())):
                for module in list(sys.modules.values()):  # wherever it has been imported to
                    for name in [name for name, value in getattr(module, "__dict__", {}).items() if value is original]:
                        stack.enter_context(mock.patch.object(module, name, stand_in))
            with contextlib.suppress(SystemExit):
                train.main(Namespace(z_dim=3, batch_size=64, lambda_=0.9, ae_lr=1e-3, d_lr=5e-3, data_dir=folder,
                                     epochs=1, seed=1, num_workers=0, log_dir=folder, no_cuda=True))

    def stand_in_writer(self):
        folder = self.folder()
        for name in ("Prior_samples", "Reconstruction"):
            (folder / "results" / name).mkdir(parents=True)
        return mock.MagicMock(log_dir=str(folder))

    def test_01_encoder_is_trained_to_deceive(self):
        x = images_like_mnist(8)
        found_out, believed = (float(self.autoencoder_loss([logit] * 8, x=x)[1]["gen_loss"]) for logit in (-20.0, 20.0))
        self.check(found_out >= believed,
                   f"Mistake 1: gen_loss is {found_out:.4g} for codes that the discriminator takes for fake and "
                   f"{believed:.4g} for codes that it takes for real, so that the encoder helps it. Compute gen_loss "
                   f"against the label 1 (real), and do not reuse the discriminator's loss")

    def test_02_each_optimizer_has_its_own_parameters(self):
        held, owned = [], []

        def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, *_, **__):
            held.extend({id(weight) for group in optimizer.param_groups for weight in group["params"]}
                        for optimizer in (optimizer_ae, optimizer_disc))
            owned.extend({id(weight) for part in parts for weight in part.parameters() if weight.requires_grad}
                         for parts in ((model.encoder, model.decoder), (model.discriminator,)))
            raise SystemExit

        self.run_main("Mistake 2", train_aae)
        if not owned:
            self.skip("Mistake 2", "main does not call train_aae")
        for i, player, parts in ((0, "autoencoder", "encoder and decoder"), (1, "discriminator", "the discriminator")):
            self.check(owned[i] <= held[i] and not owned[1 - i] & held[i],
                       f"Mistake 2: the {player}'s optimizer must hold the parameters of {parts}, and no others")

    def test_03_discriminator_steps_along_its_own_gradient(self):
        self.check_steps("discriminator", "Mistake 3: the discriminator's step is not along its own loss's gradient "
                         "alone: clear what the autoencoder's loss and earlier steps left, optimizer_disc.zero_grad(), "
                         "before disc_loss.backward()", "Mistake 3")

    def test_04_discriminator_loss_does_not_reach_the_encoder(self):
        model = self.models.AdversarialAE(z_dim=4)
        model.get_loss_discriminator(model.encoder(images_like_mnist(3)))[0].backward()
        if any(weight.grad is not None and weight.grad.any() for weight in model.encoder.parameters()):
            self.check_steps("autoencoder", "Mistake 4: the encoder is trained along the discriminator's loss too: "
                             "detach the codes, get_loss_discriminator(z.detach()), and clear gradients before each step",
                             "Mistake 4: models.py's get_loss_discriminator does not detach the codes, so its "
                             "caller has to, get_loss_discriminator(z.detach())")

    def check_standard_normal(self, codes, words):
        """Kolmogorov-Smirnov distance between all numbers of some codes and the standard normal distribution."""
        values = np.sort(codes.double().numpy().ravel())
        cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values])
        steps = np.arange(len(values) + 1) / len(values)
        distance = max(np.abs(steps[1:] - cdf).max(), np.abs(steps[:-1] - cdf).max())
        self.check(distance < 3.3 / math.sqrt(len(values)),  # chance for the right distribution: below one in 10^9
                   f"Mistake 5: {words} (mean {values.mean():.3f}, standard deviation {values.std():.3f}, from "
                   f"{values[0]:.2f} to {values[-1]:.2f})")

    def test_05_codes_are_standard_normal(self):
        real, again = (self.discriminator_loss(np.zeros(4096))[2] for _ in range(2))
        self.check(not torch.equal(real, again), "Mistake 5: the real codes are the same each time: draw them anew")
        self.check_standard_normal(real, "the codes that the discriminator is shown as real are not drawn from N(0, I)"
                                         ": use torch.randn, not torch.rand")
        model = self.models.AdversarialAE(z_dim=8)
        model.decoder = Recorder(model.decoder)
        model.sample(1024)
        self.check_standard_normal(torch.cat(model.decoder.inputs),
                                   "sample() does not draw its codes from the prior N(0, I)")

    def test_06_losses_have_a_lower_bound(self):
        for logit in (-60.0, 60.0):
            values = {**self.autoencoder_loss([logit])[1], **self.discriminator_loss([logit])[1]}
            for name in ("gen_loss", "loss_fake"):
                self.check(values[name] > -1e-6, f"Mistake 6: {name} is negative ({float(values[name]):.4g}), which no "
                           f"cross-entropy is: a label is outside {{0, 1}}, such as -1; the loss has no lower bound")
        for weight in (-60.0, 60.0):  # the real codes' logits come from the prior: large ones of either sign
            value = self.discriminator_loss(np.zeros(64), weight)[1]["loss_real"].item()
            self.check(value > 10, f"Mistake 6: loss_real is {value:.4g} for a discriminator that takes many of the "
                                   f"prior's codes for fake: its label is not 1")

    def test_07_generator_loss_is_that_of_codes(self):
        x = images_like_mnist(3)
        gen = [float(self.autoencoder_loss([logit] * 3, x=x, recon_x=recon_x)[1]["gen_loss"])
               for logit, recon_x in ((1.0, x), (1.0, -x), (-1.0, x))]
        self.check(abs(gen[0] - gen[1]) < 1e-6 and abs(gen[0] - gen[2]) > 1e-3,
                   "Mistake 7: gen_loss must change with the discriminator's logits for the codes, and not with the "
                   "reconstructions")

    def linear_calls(self, network):
        """Return a list that gets the input and the output of each call of a linear layer, flat copies."""
        calls = []
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, args, output: calls.append(
                    [tensor.detach().clone().flatten() for tensor in (args[0], output)]))
        return calls

    def check_no_activation_at_the_end(self, discriminator):
        calls = self.linear_calls(discriminator)
        logits = discriminator(200 * torch.randn(256, 8)).detach().flatten()
        last = calls[-1][1] if calls else logits[:0]
        if len(last) == 256 and (logits[last.argsort()].diff() >= 0).all():  # the one is a function of the other
            self.check(torch.stack([last, logits]).double().corrcoef()[0, 1] > 0.99999, "Mistake 8: there is an "
                       "activation after the discriminator's last linear layer, such as a sigmoid or LeakyReLU")
        else:
            self.check(logits.min() < 0 and logits.abs().max() > 1, "Mistake 8: the discriminator's output is never "
                       "below 0, or never leaves [-1, 1]; a logit does: let it end in a linear layer alone")

    def test_08_discriminator_returns_logits(self):
        for seed in range(5):
            torch.manual_seed(seed)
            self.check_no_activation_at_the_end(self.models.Discriminator(8))
            self.check_no_activation_at_the_end(self.models.AdversarialAE(z_dim=8).discriminator)

    def test_08_losses_grow_with_large_wrong_logits(self):
        for name, sign, loss in (("gen_loss", -1, lambda logit: self.autoencoder_loss([logit])[1]),
                                 ("loss_fake", 1, lambda logit: self.discriminator_loss([logit])[1])):
            large, larger = (float(loss(sign * logit)[name]) for logit in (60.0, 90.0))
            self.check(math.isfinite(larger) and not (large > 1 and larger - large < 1),
                       f"Mistake 8: {name} is {large:.4g} and {larger:.4g} where the discriminator errs with logits of "
                       f"60 and 90: it levels off, as log(p + 1e-15) does, and the gradient is lost. Compute it from the "
                       f"logits, with binary_cross_entropy_with_logits")

    def test_09_lambda_weighs_the_reconstruction(self):
        loss, values = self.autoencoder_loss([-3.0, -3.0], 0.9)
        self.check(abs(float(loss) - (0.1 * float(values["recon_loss"]) + 0.9 * float(values["gen_loss"]))) > 1e-4,
                   "Mistake 9: lambda_ weighs the adversarial part; it must weigh the reconstruction, and 1 - lambda_ "
                   "the adversarial part")

    def test_10_no_two_linear_layers_in_a_row(self):
        model = self.models.AdversarialAE(z_dim=4).eval()
        for part, data in (("encoder", images_like_mnist(3)), ("decoder", torch.randn(3, 4)),
                           ("discriminator", torch.randn(3, 4))):
            calls = self.linear_calls(getattr(model, part))
            getattr(model, part)(data)
            self.check(not any(torch.equal(before[1], after[0]) for before, after in zip(calls, calls[1:])),
                       f"Mistake 10: the {part} has two linear layers in a row with no activation between; together "
                       f"they can do no more than one")

    def caller_uses_the_evaluation_mode(self, words):
        """Whether generate_and_save, or else main, has the model in evaluation mode when it samples."""
        modes, model = [], self.models.AdversarialAE(z_dim=4).train()
        model.decoder.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        with self.attempt(words):
            importlib.import_module("train").generate_and_save(model, 1, self.stand_in_writer())
        if any(modes):
            modes.clear()
            self.run_main(words, lambda epoch, model, *_, **__: model.train(),
                          lambda model, *_, **__: modes.append(model.decoder.training))
        return not any(modes)

    def test_11_sampling_uses_the_evaluation_mode(self):
        model = self.models.AdversarialAE(z_dim=4).train()
        model.decoder = Recorder(model.decoder)
        state, images = snapshot(model)[0], model.sample(8)
        changed = not same(state, model.state_dict())
        model.eval()
        alone = torch.cat([model.decoder(z[None]) for z in torch.cat(model.decoder.inputs)]).detach()
        if changed or not torch.allclose(alone, images, atol=1e-4):
            words = "Mistake 11: sample() does not call eval(), so that its caller has to, and train() after it"
            self.check(self.caller_uses_the_evaluation_mode(words), "Mistake 11: samples are drawn in training mode: "
                       "BatchNorm makes each depend on the others, and changes its statistics; call eval() before")

    def test_12_accuracy_is_over_both_halves_at_logit_0(self):
        for fake in ([-5.0] * 40, [5.0] * 40, [-5.0] * 10 + [5.0] * 30, [0.3] * 40, [-0.3] * 40):
            _, values, real = self.discriminator_loss(fake)
            right_real, right_fake = float((real[:, 0] > 0).float().mean()), float(np.mean(np.array(fake) < 0))
            self.check_close(values["accuracy"], (right_real + right_fake) / 2,
                             "Mistake 12: accuracy is not the share of logits that are right, above 0 for the prior's "
                             "codes and below 0 for the encoder's, over both together")

    def test_13_pictures_are_rescaled(self):
        levels = torch.linspace(-1, 1, 7).repeat_interleave(4).view(28, 1).expand(8, 1, 28, 28)
        for name, argument in (("generate_and_save", 8), ("save_reconstruction", levels)):
            model, writer = self.models.AdversarialAE(z_dim=4), self.stand_in_writer()
            model.sample = lambda *_, **__: levels
            model.decoder.register_forward_hook(lambda module, args, images: levels[:1].expand(images.shape))
            with self.attempt("Mistake 13"):
                getattr(importlib.import_module("train"), name)(model, 7, writer, argument)
                pixels = read_png(next(Path(writer.log_dir, "results").rglob("*.png")))
            values, counts = np.unique(pixels, return_counts=True)
            shown = values[counts > 100]
            self.check(all(np.abs(shown - level).min() < 2 for level in np.linspace(0, 255, 7)),
                       f"Mistake 13: {name} saves seven levels from -1 to 1 as {shown.tolist()}, not as seven from 0 "
                       f"to 255: rescale from [-1, 1] before saving, or the dark half is clipped")

    def test_14_every_point_is_logged_at_a_step_of_its_own(self):
        seen = self.training("Mistake 14")
        for tag, steps in seen.points.items():
            self.check(len(set(steps)) == len(steps), f"Mistake 14: two epochs of two batches are logged at steps "
                       f"{steps} of {tag}; each needs a step of its own, counted on over epochs")
        if not seen.points:
            self.skip("Mistake 14", seen.error or "nothing was logged")

    def test_15_any_batch_size(self):
        model = self.models.AdversarialAE(z_dim=4)
        for count in (64, 5, 1, 33):
            x = images_like_mnist(count)
            try:
                recon_x, z = model.eval()(x)
                model.get_loss_autoencoder(x, recon_x, z, 0.5)
                model.get_loss_discriminator(z)
                shape = model.sample(count).shape
            except (RuntimeError, ValueError) as error:
                self.check(False, f"Mistake 15: a batch of {count} fails, is a size written into the code? {error}")
            self.assertEqual((recon_x.shape[0], shape[0]), (count, count))
            real = len(self.discriminator_loss(np.zeros(count))[2])
            self.check(real == count, f"Mistake 15: {real} codes of the prior beside {count} of the encoder: draw "
                                      f"as many as there are")

    def test_15_partial_batch_is_trained(self):
        seen = self.training("Mistake 15")
        if seen.error and (len(seen.sizes) == 0 or self.training("Mistake 15", 128).error):
            self.skip("Mistake 15", seen.error)
        self.check(not seen.error and 2 in seen.sizes, f"Mistake 15: train_aae trains 64 images, but not a last 2: "
                                                      f"{seen.error or 'it leaves them out'}")


# All groups ----------------------------------------------------------------------------------------------------------

def load_groups():
    """Add the groups in this project's tests/ to those of this file; do nothing where that folder is missing."""
    if not (HERE / "tests" / "common.py").is_file():
        return
    sys.modules["unittests"] = sys.modules[__name__]  # what tests/ import is of this module, not of a second one
    for file in sorted((HERE / "tests").glob("*.py")):
        for name, group in vars(importlib.import_module(f"tests.{file.stem}")).items():
            if isinstance(group, type) and issubclass(group, Group):
                globals()[name] = group


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    load_groups()
    program = unittest.main(exit=False)
    for words in dict.fromkeys(words for _, words in program.result.skipped):
        print(f"skipped: {words}", file=sys.stderr)
    sys.exit(not program.result.wasSuccessful())
