"""Tests of the adversarial autoencoder, on the CPU and without a network:  python unittests.py

Networks, Losses and Mistakes use nothing but the interface of the assignment. To check your own models.py, put this
file beside it and run:  python unittests.py Networks Losses Mistakes
A test that fails says in words what is wrong. The other groups are about this project's other files.
"""

import contextlib
import copy
import functools
import gc
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

__unittest = True  # keeps the lines of this file out of what a failing test prints; those of the file under test stay

HERE = Path(__file__).resolve().parent
LN2 = math.log(2)


# What the groups share -----------------------------------------------------------------------------------------------

class Group(unittest.TestCase):
    """Tests that need the modules named in `needs`; where one cannot be imported, this group fails and the others run."""

    needs = ()

    @classmethod
    def setUpClass(cls):
        for name in cls.needs:
            setattr(cls, name, importlib.import_module(name))

    def setUp(self):
        torch.manual_seed(0)

    def check(self, condition, words):
        """Fail with nothing but these words unless the condition holds."""
        if not condition:
            raise self.failureException(words)

    def check_close(self, value, expected, words, tolerance=1e-5):
        value, expected = (float(torch.as_tensor(number).detach()) for number in (value, expected))
        self.check(abs(value - expected) <= tolerance * max(1, abs(expected)),
                   f"{words} (it is {value:.6g}, and should be {expected:.6g})")

    def folder(self):
        """Return a new folder, removed when the test ends."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return Path(folder.name)


def setUpModule():
    """Let SIGINT through: a job in the background may have it ignored, and the processes that it starts too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    unittest.addModuleCleanup(signal.signal, signal.SIGINT, before)


class Recorder(nn.Module):
    """Stands in for a network and keeps what goes in and what comes out."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.inputs, self.outputs = [], []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        output = self.net(x)
        self.outputs.append(output.detach().clone())
        return output

    @property
    def device(self):
        return next(self.parameters()).device


class Judge(nn.Module):
    """A discriminator whose logit for a code is the code's first number, times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, z):
        return z[:, :1] @ self.weight


def softplus(logits):
    """log(1 + e^l) in float64: the cross-entropy of logit l against the label 0, and of -l against the label 1."""
    return np.logaddexp(0, np.asarray(logits, dtype=np.float64))


def images_like_mnist(count):
    return torch.rand(count, 1, 28, 28) * 2 - 1


def zeroed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def snapshot(model):
    """Return copies of everything in a model that sampling must not change."""
    return ({name: tensor.clone() for name, tensor in model.state_dict().items()},
            [module.training for module in model.modules()])


def same(state, other):
    """Whether two state_dicts are equal to the last bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class ModelGroup(Group):
    """What the groups on models.py share. Codes are marked, so that codes drawn from the prior can be told from them."""

    needs = ("models",)
    MARK = 1000.0  # second number of the codes made here; no draw of a prior comes near it

    def marked_codes(self, logits, z_dim=8):
        """Return codes that Judge gives these logits."""
        z = torch.zeros(len(logits), z_dim)
        z[:, 0] = torch.as_tensor(logits, dtype=torch.float32)
        z[:, 1] = self.MARK
        return z

    def judged_model(self):
        """Return a model whose discriminator is a recorded Judge."""
        model = self.models.AdversarialAE(z_dim=8)
        model.discriminator = Recorder(Judge())
        return model

    def call(self, loss, *args):
        """Call a loss with a Judge in place, and explain the error that losses of probabilities end in."""
        try:
            return loss(*args)
        except (RuntimeError, ValueError) as error:
            if "between 0 and 1" not in str(error):
                raise
            self.check(False, "Mistake 8: the loss takes the discriminator's output for a probability. The "
                              "discriminator must return logits (no sigmoid), and the loss must be "
                              "binary_cross_entropy_with_logits")

    def autoencoder_loss(self, logits, lambda_=0.0, x=None, recon_x=None):
        x = images_like_mnist(len(logits)) if x is None else x
        recon_x = torch.zeros_like(x) if recon_x is None else recon_x
        with torch.no_grad():
            return self.call(self.judged_model().get_loss_autoencoder, x, recon_x, self.marked_codes(logits), lambda_)

    def discriminator_loss(self, logits):
        """Return the loss, its dict, and the codes that were drawn from the prior for it, [N, 8]."""
        model = self.judged_model()
        with torch.no_grad():
            loss, values = self.call(model.get_loss_discriminator, self.marked_codes(logits))
        seen = torch.cat(model.discriminator.inputs)
        return loss, values, seen[seen[:, 1] != self.MARK]

    def named_network(self, *names):
        """Return the first of these classes that models.py has."""
        for name in names:
            if hasattr(self.models, name):
                return getattr(self.models, name)
        self.check(False, f"models.py has none of {names}")


# Groups on models.py alone -------------------------------------------------------------------------------------------

class Networks(ModelGroup):
    """Shapes, ranges, devices and names of the networks."""

    def test_encoder_maps_images_to_codes(self):
        for z_dim in (2, 8, 20):
            encoder = self.named_network("ConvEncoder", "Encoder")(z_dim).eval()
            for count in (1, 5):
                self.assertEqual(tuple(encoder(images_like_mnist(count)).shape), (count, z_dim))

    def test_decoder_maps_codes_to_images_in_range(self):
        for z_dim in (2, 8, 20):
            decoder = self.named_network("ConvDecoder", "Decoder")(z_dim).eval()
            for count in (1, 5):
                images = decoder(50 * torch.randn(count, z_dim))
                self.assertEqual(tuple(images.shape), (count, 1, 28, 28))
                self.check(images.abs().max() <= 1, "the decoder leaves [-1, 1]: end it with tanh")

    def test_decoder_ends_in_tanh(self):
        images = zeroed(self.named_network("ConvDecoder", "Decoder")(8)).eval()(torch.randn(2, 8))
        self.check(not images.any(), f"with all weights 0 the decoder makes {images.mean().item():.3g}, not 0, the middle of "
                                     f"[-1, 1]: end it with tanh (a sigmoid makes 0.5)")

    def test_discriminator_returns_one_logit_each(self):
        for z_dim in (2, 8, 20):
            for count in (1, 5):
                logits = self.models.Discriminator(z_dim).eval()(torch.randn(count, z_dim))
                self.check(tuple(logits.shape) == (count, 1),
                           f"the discriminator returns {tuple(logits.shape)} for {count} codes, not {(count, 1)}")

    def test_model_has_its_parts(self):
        model = self.models.AdversarialAE()
        self.assertEqual(model.z_dim, 8, "AdversarialAE() must have z_dim 8")
        for name in ("encoder", "decoder", "discriminator"):
            self.assertIsInstance(getattr(model, name), nn.Module)

    def test_device_is_that_of_the_weights(self):
        for part in (lambda model: model, lambda model: model.encoder, lambda model: model.discriminator):
            module = part(self.models.AdversarialAE(z_dim=3))
            self.assertEqual(torch.device(module.device), torch.device("cpu"))
            self.assertEqual(torch.device(module.to("meta").device), torch.device("meta"),
                             "`device` must follow the model when it is moved")

    def test_forward_returns_reconstruction_then_code(self):
        model = self.models.AdversarialAE(z_dim=4).eval()
        recon_x, z = model(images_like_mnist(3))
        self.check(tuple(recon_x.shape) == (3, 1, 28, 28) and tuple(z.shape) == (3, 4),
                   "forward(x) must return (recon_x, z), in that order")
        torch.testing.assert_close(recon_x, model.decoder(z))

    def test_sample_returns_images_without_gradients(self):
        for count in (1, 7):
            images = self.models.AdversarialAE(z_dim=3).eval().sample(count)
            self.assertEqual(tuple(images.shape), (count, 1, 28, 28))
            self.check(images.abs().max() <= 1, "samples leave [-1, 1]")
            self.check(not images.requires_grad, "sample() must not record gradients: use torch.no_grad()")

    def test_samples_differ(self):
        model = self.models.AdversarialAE(z_dim=3).eval()
        images = torch.cat([model.sample(2), model.sample(2)])
        self.check(len(images.unique(dim=0)) == 4, "sample() returns the same image more than once")

    def test_state_dict_round_trip(self):
        model, other = self.models.AdversarialAE(z_dim=3), self.models.AdversarialAE(z_dim=3)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        x = images_like_mnist(2)
        torch.testing.assert_close(model.eval()(x), other.eval()(x))


class Losses(ModelGroup):
    """The two losses against their formulas, written out in float64."""

    LOGITS = [-100.0, -3.0, -0.3, 0.2, 1.5, 100.0]

    def test_reconstruction_is_the_mean_squared_error(self):
        x, recon_x = images_like_mnist(6), images_like_mnist(6)
        _, values = self.autoencoder_loss(self.LOGITS, x=x, recon_x=recon_x)
        expected = np.mean((x.double().numpy() - recon_x.double().numpy()) ** 2)
        self.check_close(values["recon_loss"], expected, "recon_loss is not the mean squared error over pixels")

    def test_generator_is_cross_entropy_against_real(self):
        _, values = self.autoencoder_loss(self.LOGITS)
        self.check_close(values["gen_loss"], softplus(-np.array(self.LOGITS)).mean(),
                         "gen_loss is not the binary cross-entropy of the codes' logits against the label 1")

    def test_autoencoder_loss_is_the_weighted_sum(self):
        x = images_like_mnist(6)
        for lambda_ in (0.0, 0.3, 0.995, 1.0):
            loss, values = self.autoencoder_loss(self.LOGITS, lambda_, x)
            expected = lambda_ * float(values["recon_loss"]) + (1 - lambda_) * float(values["gen_loss"])
            self.check_close(loss, expected, "ae_loss is not lambda_ * recon_loss + (1 - lambda_) * gen_loss")
            self.check_close(values["ae_loss"], loss, "the dict's ae_loss is not the loss")

    def test_lambda_is_1_by_default(self):
        model, x = self.judged_model(), images_like_mnist(6)
        loss, values = self.call(model.get_loss_autoencoder, x, torch.zeros_like(x), self.marked_codes(self.LOGITS))
        self.check_close(loss, values["recon_loss"], "without lambda_ the loss must be the reconstruction's alone")

    def test_discriminator_is_cross_entropy_of_both_halves(self):
        loss, values, real = self.discriminator_loss(self.LOGITS)
        loss_real, loss_fake = softplus(-real[:, 0].numpy()).mean(), softplus(self.LOGITS).mean()
        self.check_close(values["loss_real"], loss_real, "loss_real is not the cross-entropy of the prior's codes "
                                                         "against the label 1")
        self.check_close(values["loss_fake"], loss_fake, "loss_fake is not the cross-entropy of the encoder's codes "
                                                         "against the label 0")
        total = loss_real + loss_fake
        self.check(min(abs(loss.item() - total), abs(loss.item() - total / 2)) < 1e-5 * total,
                   f"disc_loss is {loss.item():.6g}, neither sum ({total:.6g}) nor mean ({total / 2:.6g}) of its halves")
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
        self.check_close(model.get_loss_autoencoder(x, recon_x, z, 0)[0], LN2, "zero weights, lambda 0: ae_loss")
        self.check_close(model.get_loss_autoencoder(x, recon_x, z, 1)[0], 0, "zero weights, lambda 1: ae_loss")
        loss = model.get_loss_discriminator(z)[0].item()
        self.check(min(abs(loss - LN2), abs(loss - 2 * LN2)) < 1e-5,
                   f"zero weights: disc_loss is {loss:.6g}, neither ln 2 (mean of halves) nor 2 ln 2 (their sum)")

    def test_each_loss_trains_its_network(self):
        model, x = self.models.AdversarialAE(z_dim=5), images_like_mnist(4)
        for lambda_ in (0.0, 0.5, 1.0):
            model.zero_grad(set_to_none=True)
            recon_x, z = model(x)
            model.get_loss_autoencoder(x, recon_x, z, lambda_)[0].backward()
            self.check(next(model.encoder.parameters()).grad is not None, "the autoencoder's loss does not reach the "
                                                                          "encoder: is z or recon_x detached?")
        model.get_loss_discriminator(z.detach())[0].backward()
        self.check(next(model.discriminator.parameters()).grad is not None,
                   "the discriminator's loss does not reach the discriminator")

    def test_gradient_is_that_of_the_formula(self):
        model, x = self.models.AdversarialAE(z_dim=3).eval(), images_like_mnist(2)
        weights = [*model.encoder.parameters(), *model.decoder.parameters()]
        recon_x, z = model(x)
        found = torch.autograd.grad(model.get_loss_autoencoder(x, recon_x, z, 0.3)[0], weights, allow_unused=True)
        z = model.encoder(x)
        formula = 0.3 * (model.decoder(z) - x).square().mean() + 0.7 * nn.functional.softplus(-model.discriminator(z)).mean()
        for gradient, expected in zip(found, torch.autograd.grad(formula, weights)):
            self.check(gradient is not None and torch.allclose(gradient, expected, rtol=1e-3, atol=1e-7),
                       "the gradient that ae_loss gives encoder and decoder is not that of 0.3 * recon_loss + 0.7 * gen_loss: is "
                       "z detached somewhere, or computed twice?")


class Mistakes(ModelGroup):
    """Mistakes that people made in models.py. The numbers are those of README.md's list; Training has the others."""

    def test_01_encoder_is_trained_to_deceive(self):
        x = images_like_mnist(8)
        seen_through, believed = (float(self.autoencoder_loss([logit] * 8, x=x)[1]["gen_loss"]) for logit in (-20.0, 20.0))
        self.check(seen_through >= believed,
                   f"Mistake 1: gen_loss is {seen_through:.4g} for codes that the discriminator takes for fake and "
                   f"{believed:.4g} for codes that it takes for real, so that the encoder helps it. Compute gen_loss against "
                   f"the label 1 (real), and do not reuse the discriminator's loss")

    def test_04_discriminator_loss_does_not_reach_the_encoder(self):
        model = self.models.AdversarialAE(z_dim=4)
        model.get_loss_discriminator(model.encoder(images_like_mnist(3)))[0].backward()
        self.check(all(weight.grad is None or not weight.grad.any() for weight in model.encoder.parameters()),
                   "Mistake 4: the discriminator's loss sends gradients into the encoder. Begin "
                   "get_loss_discriminator with z_fake = z_fake.detach()")

    def check_standard_normal(self, codes, words):
        """Kolmogorov-Smirnov distance between all numbers of some codes and the standard normal distribution."""
        values = np.sort(codes.double().numpy().ravel())
        cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values])
        steps = np.arange(len(values) + 1) / len(values)
        distance = max(np.abs(steps[1:] - cdf).max(), np.abs(steps[:-1] - cdf).max())
        self.check(distance < 3.3 / math.sqrt(len(values)),  # chance for the right distribution: below one in 10^9
                   f"{words} (mean {values.mean():.3f}, standard deviation {values.std():.3f}, from {values[0]:.2f} to "
                   f"{values[-1]:.2f})")

    def test_05_real_codes_are_standard_normal(self):
        real, again = (self.discriminator_loss(np.zeros(4096))[2] for _ in range(2))
        self.check(not torch.equal(real, again), "Mistake 5: the codes shown as real are the same each time: draw them anew")
        self.check_standard_normal(real, "Mistake 5: the codes that the discriminator is shown as real are not drawn "
                                         "from N(0, I): use torch.randn, not torch.rand")

    def test_05_samples_are_decoded_from_standard_normal_codes(self):
        model = self.models.AdversarialAE(z_dim=8)
        model.decoder = Recorder(model.decoder)
        model.sample(1024)
        self.check_standard_normal(torch.cat(model.decoder.inputs), "Mistake 5: sample() does not draw its codes from "
                                                                    "the prior N(0, I), which training matches them to")

    def test_06_losses_have_a_lower_bound(self):
        words = ("Mistake 6: {} is negative ({:.4g}), which no cross-entropy is: a label is outside {{0, 1}}, such as -1, "
                 "and the loss has no lower bound")
        for logit in (-60.0, 60.0):
            _, of_autoencoder = self.autoencoder_loss([logit])
            _, of_discriminator, _ = self.discriminator_loss([logit])
            for name in ("gen_loss", "loss_fake"):
                value = float({**of_autoencoder, **of_discriminator}[name])
                self.check(value > -1e-6, words.format(name, value))
        model, z = self.judged_model(), self.marked_codes(np.zeros(64))
        for weight in (-60.0, 60.0):  # the real codes' logits come from the prior: large ones of either sign
            with torch.no_grad():
                model.discriminator.net.weight.fill_(weight)
            value = self.call(model.get_loss_discriminator, z)[1]["loss_real"].item()
            self.check(value > 10, "Mistake 6: loss_real is {:.4g} for a discriminator that takes many of the prior's "
                                   "codes for fake: its label is not 1".format(value))

    def test_07_generator_loss_judges_codes(self):
        x = images_like_mnist(3)
        gen = [float(self.autoencoder_loss([logit] * 3, x=x, recon_x=recon_x)[1]["gen_loss"])
               for logit, recon_x in ((1.0, x), (1.0, -x), (-1.0, x))]
        self.check(abs(gen[0] - gen[1]) < 1e-6, "Mistake 7: gen_loss changes with the reconstructions: it must depend on "
                                               "the discriminator's verdict on the codes alone")
        self.check(abs(gen[0] - gen[2]) > 1e-3, "Mistake 7: gen_loss does not change with the discriminator's verdict on "
                                               "the codes: it must be computed from it")

    def test_08_discriminator_ends_in_a_linear_layer(self):
        outputs = []
        for seed in range(5):
            torch.manual_seed(seed)
            discriminator = self.models.Discriminator(8)
            last = []
            for module in discriminator.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda module, args, output: last.append(output.detach().clone()))
            outputs.append(discriminator(200 * torch.randn(256, 8)).detach())
            self.check(not last or torch.equal(last[-1].view(-1), outputs[-1].view(-1)),
                       "Mistake 8: the discriminator changes the output of its last linear layer: no sigmoid, LeakyReLU "
                       "or other activation belongs there, for it must return logits")
        outputs = torch.cat(outputs)
        self.check(outputs.min() < 0 and outputs.abs().max() > 1,
                   "Mistake 8: the discriminator's output is never below 0, or never leaves [-1, 1]: it must be a logit, "
                   "so let it end in a linear layer, with no sigmoid or other activation")

    def test_08_losses_grow_with_sure_wrong_verdicts(self):
        for name, sign, loss in (("gen_loss", -1, lambda logit: self.autoencoder_loss([logit])[1]),
                                 ("loss_fake", 1, lambda logit: self.discriminator_loss([logit])[1])):
            sure, surer = (float(loss(sign * logit)[name]) for logit in (60.0, 90.0))
            self.check(math.isfinite(surer) and not (sure > 1 and surer - sure < 1),
                       f"Mistake 8: {name} is {sure:.4g} and {surer:.4g} where the discriminator is wrong with logits of 60 and "
                       f"90: it levels off, as log(p + 1e-15) does, and the gradient is lost. Compute it from the logits with "
                       f"binary_cross_entropy_with_logits")

    def test_09_lambda_weighs_the_reconstruction(self):
        x = images_like_mnist(2)
        loss, values = self.autoencoder_loss([-3.0, -3.0], 0.9, x)
        recon_loss, gen_loss = float(values["recon_loss"]), float(values["gen_loss"])
        self.check(abs(float(loss) - (0.1 * recon_loss + 0.9 * gen_loss)) > 1e-4,
                   "Mistake 9: lambda_ weighs the adversarial part; it must weigh the reconstruction, and 1 - lambda_ "
                   "the adversarial part")

    def test_10_no_two_linear_layers_in_a_row(self):
        model = self.models.AdversarialAE(z_dim=4).eval()
        for part, data in (("encoder", images_like_mnist(3)), ("decoder", torch.randn(3, 4)),
                           ("discriminator", torch.randn(3, 4))):
            previous = []  # the last linear layer's output

            def compare(module, args, output):
                self.check(not previous or not torch.equal(previous[-1].flatten(), args[0].flatten()),
                           f"Mistake 10: the {part} has two linear layers in a row with no activation between; together "
                           f"they can do no more than one")
                previous.append(output.detach().clone())

            for module in getattr(model, part).modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(compare)
            getattr(model, part)(data)

    def test_11_sampling_uses_the_evaluation_mode_and_changes_nothing(self):
        model = self.models.AdversarialAE(z_dim=4)
        model.decoder = Recorder(model.decoder)
        for mode in (False, True):
            state, modes = snapshot(model.train(mode))
            model.decoder.inputs.clear()
            images = model.sample(8)
            after, modes_after = snapshot(model)
            self.check(same(state, after), "Mistake 11: sample() changes the model, such as BatchNorm's statistics: call "
                                           "eval() in it")
            self.check(modes == modes_after, "Mistake 11: sample() leaves the model in another mode than it found it in; put "
                                             "back the one that it was in")
        model.eval()
        alone = torch.cat([model.decoder(z[None]) for z in torch.cat(model.decoder.inputs)]).detach()
        self.check(torch.allclose(alone, images, atol=1e-4), "Mistake 11: a sample's picture depends on the others in its "
                                                            "batch: sample() must use the evaluation mode")

    def test_12_accuracy_is_over_both_halves_at_logit_0(self):
        for fake in ([-5.0] * 40, [5.0] * 40, [-5.0] * 10 + [5.0] * 30, [0.3] * 40, [-0.3] * 40):
            _, values, real = self.discriminator_loss(fake)
            right_real, right_fake = float((real[:, 0] > 0).float().mean()), float(np.mean(np.array(fake) < 0))
            self.check_close(values["accuracy"], (right_real + right_fake) / 2,
                             "Mistake 12: accuracy is not the share of right verdicts over the prior's codes (right above "
                             "logit 0) and the encoder's (right below 0) together")

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
                self.check(False, f"Mistake 15: a batch of {count} fails, so a batch size is written into the code: {error}")
            self.assertEqual((recon_x.shape[0], shape[0]), (count, count))
            real = len(self.discriminator_loss(np.zeros(count))[2])
            self.check(real == count, f"Mistake 15: {real} codes of the prior are judged beside {count} of the encoder: draw as "
                                      f"many as there are")


class Promises(ModelGroup):
    """What this project's models.py does beyond the interface; skipped for a models.py that does not."""

    def setUp(self):
        super().setUp()
        if not hasattr(self.models.AdversarialAE(), "sample_stream"):
            self.skipTest("this models.py's model has no sample_stream: it promises the interface alone")

    def test_autoencoder_phase_leaves_the_discriminator_alone(self):
        model, x = self.models.AdversarialAE(), images_like_mnist(3)
        recon_x, z = model(x)
        model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].backward()
        self.check(all(weight.grad is None for weight in model.discriminator.parameters()),
                   "the autoencoder's loss computes gradients for the discriminator's weights")
        self.check(all(weight.requires_grad for weight in model.parameters()), "a weight was left frozen")

    def test_sampling_takes_nothing_from_the_training_stream(self):
        model, before = self.models.AdversarialAE(), torch.get_rng_state()
        model.sample(4)
        self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_sampling_follows_the_seed(self):
        samples = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            model = self.models.AdversarialAE()
            with torch.no_grad():
                model.load_state_dict({name: torch.full_like(value, 0.01) for name, value in model.state_dict().items()})
            samples.append(model.sample(4))
        self.assertTrue(torch.equal(samples[0], samples[1]))
        self.assertFalse(torch.equal(samples[0], samples[2]))

    def test_sampling_with_batch_norm(self):
        model = self.models.AdversarialAE(z_dim=4).train()
        model.decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5))
        model.decoder[2].eval()  # a mixed state, to be put back as it was
        before = snapshot(model)
        model.sample_stream.manual_seed(5)
        images = model.sample(8)
        after = snapshot(model)
        self.assertTrue(same(before[0], after[0]) and before[1] == after[1], "sampling changed the model")
        model.sample_stream.manual_seed(5)
        torch.testing.assert_close(images, model.eval().sample(8))

    def test_suggested_architecture(self):
        model = self.models.AdversarialAE(z_dim=8, networks="base")
        convolutions = lambda channels: sum(9 * i * o + o for i, o in zip(channels, channels[1:]))
        linears = lambda widths: sum(i * o + o for i, o in zip(widths, widths[1:]))
        expected = {"encoder": convolutions([1, 32, 32, 64, 64, 64]) + linears([1024, 8]),
                    "decoder": linears([8, 1024]) + convolutions([64, 64, 64, 32, 32, 1]),
                    "discriminator": linears([8, 512, 512, 1])}
        for part, count in expected.items():
            self.assertEqual(sum(weight.numel() for weight in getattr(model, part).parameters()), count, part)

    def test_every_posterior_keeps_the_interface(self):
        x = images_like_mnist(5)
        for posterior, networks in itertools.product(self.models.ENCODERS, self.models.NETWORKS):
            torch.manual_seed(0)
            model = self.models.AdversarialAE(z_dim=3, posterior=posterior, networks=networks)
            recon_x, z = model(x)
            self.assertEqual((recon_x.shape, z.shape, model.sample(2).shape), ((5, 1, 28, 28), (5, 3), (2, 1, 28, 28)))
            model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].backward()
            self.assertTrue(all(weight.grad.abs().sum() > 0 for weight in model.encoder.parameters()), posterior)
            model.zero_grad()
            model.get_loss_discriminator(z)[0].backward()
            self.assertTrue(all(weight.grad is None for weight in model.encoder.parameters()), posterior)
            with torch.no_grad():
                again, evaluated = model.encoder(x), [model.eval().encoder(x) for _ in range(2)]
            for one, other in ((z, again), evaluated):
                self.assertEqual(torch.equal(one, other), posterior == "deterministic", posterior)
        self.assertRaises(KeyError, self.models.AdversarialAE, posterior="normal")
        self.assertRaises(ValueError, self.models.AdversarialAE, networks="other")

    def test_gaussian_codes_have_the_mean_and_variance_that_the_network_gives(self):
        encoder = self.models.ENCODERS["gaussian"](2)
        outputs = torch.tensor([3.0, -1.0, math.log(4), math.log(0.25)]).expand(100_000, 4)
        with mock.patch.object(encoder.net, "forward", return_value=outputs):
            z = encoder(torch.zeros(100_000, 1, 28, 28))
        for dimension, (mean, deviation) in enumerate([(3, 2), (-1, 0.5)]):
            self.check_close(z[:, dimension].mean(), mean, f"mean of dimension {dimension}", 0.02)
            self.check_close(z[:, dimension].std(), deviation, f"standard deviation of dimension {dimension}", 0.02)
        self.check_close(z.T.corrcoef()[0, 1], 0, "correlation of the two dimensions", 0.02)

    def test_universal_noise_does_more_than_shift_the_code(self):
        encoder, x = self.models.ENCODERS["universal"](2), images_like_mnist(2)
        with torch.no_grad():
            torch.manual_seed(1)
            first = encoder(x[:1])
            torch.manual_seed(1)
            other = encoder(x[1:])
            torch.manual_seed(2)
            shift = encoder(x[:1]) - first
            torch.manual_seed(2)
            self.check(not torch.allclose(encoder(x[1:]) - other, shift, atol=1e-6), "noise is added to the code, whatever the image")


# Groups on the other files -------------------------------------------------------------------------------------------

class TinyAAE(nn.Module):
    """The interface with one number for every network: small enough to follow, and careless about gradients.

    It neither detaches the codes for the discriminator's loss nor spares the discriminator in the autoencoder's, so
    that train_aae must keep the two players apart. Its codes from the prior are always the same.
    """

    def __init__(self):
        super().__init__()
        self.z_dim = 1
        self.encoder, self.decoder, self.discriminator = (Scale(start) for start in (0.7, 0.9, 0.5))
        self.batches = []

    @property
    def device(self):
        return self.encoder.weight.device

    def forward(self, x):
        self.batches.append(len(x))
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        recon_loss = (x - recon_x).square().mean()
        gen_loss = nn.functional.softplus(-self.discriminator(z_fake)).mean()
        ae_loss = lambda_ * recon_loss + (1 - lambda_) * gen_loss
        return ae_loss, {"gen_loss": gen_loss, "recon_loss": recon_loss, "ae_loss": ae_loss}

    def get_loss_discriminator(self, z_fake):
        z_real = torch.linspace(-1, 2, len(z_fake)).view(-1, 1, 1, 1)
        loss_real = nn.functional.softplus(-self.discriminator(z_real)).mean()
        loss_fake = nn.functional.softplus(self.discriminator(z_fake)).mean()
        disc_loss = (loss_real + loss_fake) / 2
        return disc_loss, {"disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake,
                           "accuracy": torch.tensor(0.5)}

    def sample(self, batch_size):
        return torch.randn(batch_size, 1, 28, 28).clamp(-1, 1)


class Scale(nn.Module):
    """Multiplies by one number, which it learns."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return self.weight * x


class ValueList:
    """Stands in for a logger and keeps what it is given."""

    def __init__(self):
        self.values = []

    def add_values(self, values):
        self.values.append({name: float(value) for name, value in values.items()})


class Stop(Exception):
    """Ends a run from within, where a test has seen enough."""


def read_events(folder):
    """Return TensorBoard's own reader of the event files in a folder, with everything loaded."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def run_contents(run):
    """Return all that a run has left, by name, in a form in which two runs can be compared to the last bit."""
    from checkpoint import load_state

    contents = {}

    def flatten(name, value):
        if isinstance(value, (dict, list)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(f"{name}/{key}", part)
        else:
            contents[name] = value.numpy().tobytes() if torch.is_tensor(value) else value

    flatten("state", {name: value for name, value in load_state(run).items()
                      if name not in ("settings", "events", "seconds", "path")})
    events = read_events(run)
    for tag in events.Tags()["scalars"]:
        contents[tag] = sorted((event.step, event.value) for event in events.Scalars(tag))
    for tag in events.Tags()["images"]:  # sorted: files of one second and one process may be read in another order
        contents[tag] = sorted((event.step, event.encoded_image_string) for event in events.Images(tag))
    for tag in events.Tags()["histograms"]:
        contents[tag] = sorted((event.step, tuple(event.histogram_value.bucket)) for event in events.Histograms(tag))
    for file in (*run.glob("[0-9]*/*/*"), *run.glob("*.pbtxt")):  # the projector's
        contents[str(file.relative_to(run))] = file.read_bytes()
    weights = torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)
    flatten("model_checkpoint.pt", dict(weights))
    for file in (run / "results").rglob("*.png"):
        contents[str(file.relative_to(run))] = read_png(file).tobytes()
    return contents


def read_png(file):
    """Return the pixels of a picture's red channel, [H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))[:, :, 0].astype(int)


class TrainGroup(Group):
    needs = ("train", "mnist", "models")

    def setUp(self):
        super().setUp()
        no_mps = mock.patch("torch.backends.mps.is_available", return_value=False)  # --no-cuda would leave it
        no_mps.start()
        self.addCleanup(no_mps.stop)
        few = [tensor[:100] for tensor in self.mnist.load_digits()]
        self.few_digits = mock.patch.object(self.train, "digits", lambda batch_size, device:
                                            self.mnist.BatchLoader(*few, batch_size, device=device))

    def run_cli(self, *flags):
        """Run the command line in this process; return its exit status, standard output and standard error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = self.train.cli([str(flag) for flag in flags])
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def train_quietly(self, *flags):
        """Run `main` on a hundred of the bundled digits; return the run's folder and the weights that it saved."""
        with self.few_digits, contextlib.redirect_stdout(io.StringIO()):
            run = self.train.main(self.train.parse_args(["--dataset", "digits", "--no-cuda", "--log_dir",
                                                         str(self.folder()), *flags]))
        return run, torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)

    def writer(self):
        writer = self.train.SummaryWriter(self.folder())
        self.addCleanup(writer.close)
        return writer


class Training(TrainGroup):
    """train_aae, with the mistakes that people made in it."""

    LAMBDA, AE_LR, D_LR = 0.4, 0.5, 2.0

    def batches(self):
        return [(images_like_mnist(count), torch.zeros(count)) for count in (6, 6, 2)]

    def reference(self, batches):
        """Return the weights of a TinyAAE after one epoch in which each player follows its own gradient alone."""
        model = TinyAAE()
        for x, _ in batches:
            recon_x, z = model(x)
            ae_loss, _ = model.get_loss_autoencoder(x, recon_x, z, self.LAMBDA)
            disc_loss, _ = model.get_loss_discriminator(z.detach())
            autoencoder = [model.encoder.weight, model.decoder.weight]
            gradients = torch.autograd.grad(ae_loss, autoencoder)
            gradient, = torch.autograd.grad(disc_loss, [model.discriminator.weight])
            with torch.no_grad():
                for weight, slope in zip(autoencoder, gradients):
                    weight -= self.AE_LR * slope
                model.discriminator.weight -= self.D_LR * gradient
        return model

    def trained(self, batches, loggers=None):
        model = TinyAAE()
        optimizer_ae = torch.optim.SGD([model.encoder.weight, model.decoder.weight], self.AE_LR)
        optimizer_disc = torch.optim.SGD([model.discriminator.weight], self.D_LR)
        try:
            return model, self.train.train_aae(1, model, batches, *(loggers or (ValueList(), ValueList())), optimizer_ae,
                                               optimizer_disc, self.LAMBDA)
        except self.train.RunError:
            raise
        except RuntimeError as error:  # autograd's, where both losses share the encoder's graph
            self.check(False, f"Mistake 4: train_aae fails with a model whose get_loss_discriminator does not detach the codes; "
                              f"give it z.detach() ({str(error).split('.')[0]})")

    def test_02_each_optimizer_has_its_own_parameters(self):
        with self.few_digits, mock.patch.object(self.train, "train_aae", side_effect=Stop) as train_aae, \
                contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Stop):
            self.train.main(Namespace(dataset="digits", log_dir=self.folder(), no_cuda=True))
        _, model, _, _, _, optimizer_ae, optimizer_disc, *_ = train_aae.call_args.args
        names = {id(weight): name for name, weight in model.named_parameters()}
        held = lambda optimizer: {names[id(weight)] for group in optimizer.param_groups for weight in group["params"]}
        discriminator = {name for name in names.values() if name.startswith("discriminator.")}
        self.check(held(optimizer_ae) == set(names.values()) - discriminator,
                   "Mistake 2: the autoencoder's optimizer must hold the parameters of encoder and decoder, and no others")
        self.check(held(optimizer_disc) == discriminator,
                   "Mistake 2: the discriminator's optimizer must hold the discriminator's parameters, and no others")

    def test_03_discriminator_steps_along_its_own_gradient(self):
        batches = self.batches()
        self.check_close(self.trained(batches)[0].discriminator.weight, self.reference(batches).discriminator.weight,
                         "Mistake 3: the discriminator's step is not along its own loss's gradient. What the autoencoder's "
                         "loss left there must be cleared (zero_grad) before disc_loss.backward()")

    def test_04_autoencoder_steps_along_its_own_gradient(self):
        batches = self.batches()
        model, reference = self.trained(batches)[0], self.reference(batches)
        for part in ("encoder", "decoder"):
            self.check_close(getattr(model, part).weight, getattr(reference, part).weight,
                             f"Mistake 4: the {part}'s step is not along the autoencoder's gradient alone: detach the codes "
                             f"for the discriminator's loss, and clear gradients before each backward()")

    def test_14_every_step_is_logged_at_a_step_of_its_own(self):
        writer, batches = self.writer(), self.batches()
        loggers = [self.train.TensorBoardLogger(writer, avg_window=1, name=name) for name in ("generator", "discriminator")]
        for _ in range(2):
            self.trained(batches, loggers)
        writer.flush()
        events = read_events(writer.log_dir)
        for tag in ("generator/ae_loss", "discriminator/accuracy"):
            self.check([event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5, 6],
                       f"Mistake 14: two epochs of three steps are logged at {[e.step for e in events.Scalars(tag)]}, but "
                       f"every step needs a number of its own, counted on over epochs")

    def test_15_partial_last_batch_is_trained(self):
        model, _ = self.trained(self.batches())
        self.check(model.batches == [6, 6, 2], f"Mistake 15: batches of 6, 6 and 2 were trained as {model.batches}")

    def test_loggers_get_every_value_once_and_means_are_returned(self):
        loggers, batches = (ValueList(), ValueList()), [(images_like_mnist(2), None) for _ in range(120)]
        _, means = self.trained(batches, loggers)
        for logger, names in zip(loggers, ({"gen_loss", "recon_loss", "ae_loss"},
                                           {"disc_loss", "loss_real", "loss_fake", "accuracy"})):
            self.assertEqual(len(logger.values), 120)
            self.assertEqual(set(logger.values[0]), names)
            for name in names:
                self.check_close(means[name], np.mean([values[name] for values in logger.values]), f"mean of {name}")

    def test_progress_counts_every_step(self):
        calls, model = [], TinyAAE()
        optimizers = [torch.optim.SGD(part.parameters(), 0.0) for part in (model.encoder, model.discriminator)]
        loggers = (ValueList(), ValueList())
        log = self.train.StepLog(1, "cpu", loggers, progress=lambda steps, means: calls.append((steps, set(means))))
        self.train.train_aae(1, model, [(images_like_mnist(2), None)] * 120, *loggers, *optimizers, log=log)
        self.assertEqual([steps for steps, _ in calls], [50, 50, 20])
        self.assertIn("accuracy", calls[0][1])

    def test_divergence_names_epoch_and_step(self):
        batches = self.batches()
        batches[1][0][0, 0, 0, 0] = math.inf
        with self.assertRaisesRegex(self.train.RunError, r"at step 2 of epoch 1\b"):
            self.trained(batches)

    def test_takes_off_with_seeds_that_start_bright(self):
        for seed in (1, 2):  # with the decoder's last bias as torch draws it, every fourth seed ended in black images
            torch.manual_seed(seed)
            flags = self.train.parse_args(["--networks", "base", "--d_momentum", "0"])
            model, loader = self.models.AdversarialAE(networks="base"), self.mnist.digits()
            optimizers = self.train.build_optimizers(model, flags)
            for epoch in (1, 2):
                means = self.train.train_aae(epoch, model, loader, ValueList(), ValueList(), *optimizers, 0.995)
            self.check(means["recon_loss"] < 0.25, f"with seed {seed} the reconstruction loss stays at {means['recon_loss']:.3f}: "
                       "the first steps drive the decoder's tanh to -1 everywhere; start its last bias at the mean pixel")

    def test_average_is_that_of_the_formula(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        average, decays = self.train.WeightAverage(model, 0.5), []
        expected = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        for step in range(1, 12):
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)
            average.update()
            decays.append(min(0.5, (1 + step) / (10 + step)))
            for name, tensor in model.state_dict().items():
                expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * tensor.double().numpy()
        self.assertLess(decays[0], decays[5])
        self.assertEqual(decays[-1], 0.5)
        self.assertEqual(average.model.state_dict()["1.num_batches_tracked"], 11)
        for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
            np.testing.assert_allclose(average.model.state_dict()[name], expected[name], rtol=1e-5, err_msg=name)

    def test_average_takes_in_a_shared_weight_once(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        average = self.train.WeightAverage(model, 0.5)
        expected = 2 / 11 * model[0].weight.detach().clone() + 9 / 11
        nn.init.ones_(model[0].weight)
        average.update()
        self.assertTrue(torch.allclose(average.model[1].weight, expected), "a shared weight is averaged more than once a step")

    def test_average_goes_on_from_its_state(self):
        model = nn.Linear(2, 3)
        average = self.train.WeightAverage(model, 0.9)
        nn.init.zeros_(model.weight)
        average.update()
        other = self.train.WeightAverage(model, 0.9)
        other.load_state_dict(average.state_dict())
        for one in (average, other):
            one.update()
        self.assertTrue(torch.equal(average.model.weight, other.model.weight))
        self.assertGreater(average.model.weight.abs().sum(), 0)

    def test_bf16_differs_by_rounding_alone(self):
        def after_one_step(precision):
            torch.manual_seed(1)
            model, x = self.models.AdversarialAE(), images_like_mnist(16)
            optimizers = self.train.build_optimizers(model, self.train.parse_args([]))
            with mock.patch.object(model, "get_loss_discriminator", wraps=model.get_loss_discriminator) as judged:
                values = self.train.train_step(model, *optimizers, 0.5, x, precision)
            self.assertEqual(judged.call_args.args[0].dtype, torch.float32)  # the codes, and so the prior's draws beside them
            return model, {**values[0], **values[1]}

        (model, values), (rounded, rounded_values) = (after_one_step(precision) for precision in ("fp32", "bf16"))
        for name, value in values.items():
            self.check_close(rounded_values[name], value, f"{name} in bf16 is not that in fp32", 0.02)
        self.assertNotEqual(rounded_values["ae_loss"], values["ae_loss"])
        self.assertEqual({weight.dtype for weight in rounded.parameters()}, {torch.float32})
        self.assertEqual({value.dtype for value in rounded_values.values()}, {torch.float32})
        self.assertFalse(any(value.requires_grad for value in rounded_values.values()))


class Hardware(TrainGroup):
    """Precisions and CUDA graphs, as far as they can be tried without the hardware."""

    needs = (*TrainGroup.needs, "device")

    def processor(self, text):
        """Let the processor say this of itself."""
        file = self.folder() / "cpuinfo"
        file.write_text(text)
        patch = mock.patch.object(self.device, "CPUINFO", file)
        patch.start()
        self.addCleanup(patch.stop)

    def assert_refused(self, precision, words):
        log_dir = self.folder()
        status, _, err = self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 1, "--precision", precision, "--log_dir",
                                      log_dir)
        self.assertEqual((status, err.count("\n"), list(log_dir.iterdir())), (2, 1, []))
        self.assertIn(words, err)

    def test_what_the_hardware_cannot_do_well_is_refused(self):
        self.assert_refused("tf32", "needs an NVIDIA GPU")
        self.processor("model name\t: Old\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n")
        self.assertEqual(self.device.device_name(torch.device("cpu")), f"Old, {torch.get_num_threads()} threads")
        self.assert_refused("bf16", "AVX512-BF16")
        self.processor("nothing\n")
        self.assert_refused("bf16", "AVX512-BF16")

    def test_bf16_run_is_repeated_and_resumed_to_the_bit(self):
        self.processor("flags\t\t: fpu amx_bf16\n")
        flags = ("--epochs", "2", "--precision", "bf16")
        with mock.patch.object(self.train, "train_step", wraps=self.train.train_step) as step:
            run, weights = self.train_quietly(*flags)
        self.assertEqual({call.kwargs["precision"] for call in step.call_args_list}, {"bf16"})
        self.assertEqual(json.loads((run / "hparams.json").read_text())["precision"], "bf16")
        stopped, _ = self.train_quietly("--epochs", "1", *flags[2:])
        with mock.patch.object(self.device, "cpu_multiplies_bf16", return_value=False), self.few_digits:
            status, _, err = self.run_cli("--resume", stopped, "--epochs", 2)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn(f"{stopped} was trained with --precision bf16", err)
        with self.few_digits:
            self.assertEqual(self.run_cli("--resume", stopped, "--epochs", 2)[0], 0)
        resumed = torch.load(stopped / "checkpoints" / "model_checkpoint.pt", weights_only=True)
        self.check(same(resumed, weights), "a resumed bf16 run has other weights than one in one go")

    def test_tf32_is_set_for_tf32_alone(self):
        cuda, before = torch.device("cuda"), torch.backends.cudnn.conv.fp32_precision
        self.addCleanup(setattr, torch.backends.cudnn.conv, "fp32_precision", before)
        self.addCleanup(setattr, torch.backends.cuda.matmul, "fp32_precision", torch.backends.cuda.matmul.fp32_precision)
        with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
            for precision, expected in (("tf32", "tf32"), ("bf16", "ieee"), ("fp32", "ieee")):
                self.device.set_precision(precision, cuda)
                self.assertEqual(torch.backends.cudnn.conv.fp32_precision, expected)
                self.assertEqual(torch.backends.cuda.matmul.fp32_precision, expected)
        with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
            for precision in ("tf32", "bf16"):
                self.assertRaises(self.device.PrecisionError, self.device.set_precision, precision, cuda)

    def test_every_batch_is_trained_once_whether_run_or_replayed(self):
        capturing, trained = [], []

        class Graph:
            """Records what is run while it is the one that captures, and runs it again on what its input holds by then."""

            def replay(self):
                self.recorded()

        def step(x):
            def run():
                trained.append(x.tolist())
                return values.fill_(x.sum())

            values = torch.zeros(())
            if not capturing:
                return run()
            capturing[-1].recorded = run
            return values

        @contextlib.contextmanager
        def graph(one):
            capturing.append(one)
            yield
            capturing.remove(one)

        batches = [torch.arange(start, start + count).float() for start in range(0, 600, 100) for count in (4, 4, 3)]
        with mock.patch.multiple("torch.cuda", CUDAGraph=Graph, graph=graph, Stream=mock.Mock(), stream=mock.MagicMock(),
                                 current_stream=mock.Mock()):
            captured = self.device.CapturedStep(step)
            sums = [float(captured(batch)) for batch in batches]
            with mock.patch("torch.cuda.graph", side_effect=RuntimeError("copy")), \
                    self.assertRaisesRegex(self.device.CaptureError, r"\(copy\)"):
                one = self.device.CapturedStep(lambda x: x)
                for _ in range(4):
                    one(batches[0])
        self.assertEqual(trained, [batch.tolist() for batch in batches])
        self.assertEqual(sums, [float(batch.sum()) for batch in batches])


class Pictures(TrainGroup):
    """generate_and_save and save_reconstruction: what is written, and that nothing else changes."""

    def picture_model(self):
        """Return an AdversarialAE with BatchNorm and Dropout in its decoder, in training mode."""
        model = self.models.AdversarialAE(z_dim=3)
        model.decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Tanh())
        return model.train()

    def test_13_pictures_are_rescaled(self):
        writer, model = self.writer(), TinyAAE()
        levels = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 28, 28)
        model.sample = lambda batch_size: levels
        self.train.generate_and_save(model, 7, writer, batch_size=5)
        pixels = read_png(Path(writer.log_dir) / "results" / "Prior_samples" / "samples_epoch_7.png")
        shown = [int(pixels[16, 16 + 30 * i]) for i in range(5)]
        self.check(np.abs(np.array(shown) - [0, 63.75, 127.5, 191.25, 255]).max() <= 1,
                   f"Mistake 13: the levels -1, -0.5, 0, 0.5, 1 are saved as {shown}, not as 0, 64, 128, 191, 255: rescale "
                   f"from [-1, 1] before saving, or the dark half is clipped")
        writer.flush()
        event, = read_events(writer.log_dir).Images("samples")
        self.assertEqual(event.step, 7)
        self.assertTrue(np.array_equal(read_png(io.BytesIO(event.encoded_image_string)), pixels))

    def test_samples_are_8_a_row_and_of_the_same_codes_each_time(self):
        writer, model = self.writer(), self.models.AdversarialAE()
        pictures = []
        for epoch in range(2):
            self.train.generate_and_save(model, epoch, writer)
            pictures.append(read_png(Path(writer.log_dir) / f"results/Prior_samples/samples_epoch_{epoch}.png"))
            torch.rand(1)  # what training would draw in between
        self.assertEqual(pictures[0].shape, (8 * 30 + 2, 8 * 30 + 2))
        self.assertTrue(np.array_equal(*pictures))

    def test_reconstructions_are_below_their_inputs(self):
        writer, x = self.writer(), images_like_mnist(20)
        for count, given in ((8, {}), (10, {"count": 10})):
            self.train.save_reconstruction(TinyAAE(), count, writer, x, **given)
            pixels = read_png(Path(writer.log_dir) / "results" / "Reconstruction" / f"reconstruction_{count}.png")
            self.assertEqual(pixels.shape, (2 * 30 + 2, count * 30 + 2))
            for i in (0, count - 1):
                for row, images in enumerate((x, 0.9 * 0.7 * x)):
                    found = pixels[2 + 30 * row:30 + 30 * row, 2 + 30 * i:30 + 30 * i]
                    expected = (images[i, 0].numpy() + 1) * 127.5
                    self.assertLessEqual(np.abs(found - expected).max(), 1)

    def test_fewer_inputs_than_columns(self):
        writer = self.writer()
        self.train.save_reconstruction(TinyAAE(), 1, writer, images_like_mnist(3))
        pixels = read_png(Path(writer.log_dir) / "results" / "Reconstruction" / "reconstruction_1.png")
        self.assertEqual(pixels.shape, (62, 92))

    def test_11_pictures_change_nothing(self):
        model, writer, x = self.picture_model(), self.writer(), images_like_mnist(8)
        model.decoder[2].eval()
        before, streams = snapshot(model), self.train.random_states(model)
        self.train.generate_and_save(model, 0, writer)
        self.train.save_reconstruction(model, 0, writer, x)
        after = snapshot(model)
        self.check(same(before[0], after[0]), "Mistake 11: saving pictures changes the model, such as BatchNorm's statistics")
        self.check(before[1] == after[1], "Mistake 11: saving pictures leaves the model in another mode")
        self.check(same(streams, self.train.random_states(model)), "saving pictures draws from a random stream and does not "
                                                                   "put it back")

    def test_careless_sample_takes_nothing_from_the_training_stream(self):
        model, stream = TinyAAE(), torch.get_rng_state()
        self.train.generate_and_save(model, 0, self.writer())
        self.assertTrue(torch.equal(stream, torch.get_rng_state()))


class Logging(Group):
    """TensorBoardLogger, read back with TensorBoard's own reader, and files written whole."""

    needs = ("utils",)

    def setUp(self):
        super().setUp()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder())
        self.addCleanup(self.writer.close)

    def points(self, tag):
        self.writer.flush()
        return [(event.step, event.value) for event in read_events(self.writer.log_dir).Scalars(tag)]

    def assert_points(self, tag, expected):
        points = self.points(tag)
        self.assertEqual([step for step, _ in points], [step for step, _ in expected])
        np.testing.assert_allclose([value for _, value in points], [value for _, value in expected], rtol=1e-6)

    def test_state_carries_the_open_window(self):
        logger, other = (self.utils.TensorBoardLogger(self.writer, avg_window=4, name="part") for _ in range(2))
        for i in range(3):
            logger.add_values({"value": torch.tensor(float(i))})
        other.load_state_dict(json.loads(json.dumps(logger.state_dict())))
        other.add_values({"value": 7})
        self.assertEqual(other.global_step, 4)
        self.assert_points("part/value", [(4, 2.5)])

    def test_means_of_windows(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4, name="part")
        values = np.random.default_rng(0).normal(size=10)
        for i, value in enumerate(values):
            logger.add_values({"tensor": torch.tensor(value, requires_grad=True), "number": float(value),
                               "count": i if i % 2 else np.int64(i)})
        self.assertEqual(logger.global_step, 10)
        for tag in ("part/tensor", "part/number"):
            self.assert_points(tag, [(4, values[:4].mean()), (8, values[4:8].mean())])
        logger.flush()
        logger.flush()
        self.assert_points("part/tensor", [(4, values[:4].mean()), (8, values[4:8].mean()), (10, values[8:].mean())])
        self.assert_points("part/count", [(4, 1.5), (8, 5.5), (10, 8.5)])

    def test_values_that_are_not_always_there(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4)
        for i in range(4):
            logger.add_values({"always": i} if i % 2 else {"always": i, "seldom": 10 * i})
        self.assert_points("always", [(4, 1.5)])
        self.assert_points("seldom", [(4, 10)])

    def test_default_window_is_50(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        for i in range(120):
            logger.add_values({"i": i})
        self.assert_points("i", [(50, 24.5), (100, 74.5)])

    def test_values_are_read_once_a_window(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        with mock.patch.object(self.utils, "to_numbers", wraps=self.utils.to_numbers) as to_numbers:
            for _ in range(120):
                logger.add_values({"loss": torch.ones((), device="cpu"), "accuracy": torch.ones(())})
        self.assertEqual(to_numbers.call_count, 2)

    def test_any_shape_and_precision_of_a_scalar(self):
        values = {"a": torch.ones(1), "b": torch.ones((), dtype=torch.float64), "c": torch.tensor(1), "d": np.float32(1),
                  "e": True}
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=1)
        logger.add_values(values)
        for name in values:
            self.assert_points(name, [(1, 1.0)])

    def test_values_wait_on_their_device(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        logger.add_values({"loss": torch.ones((), device="meta")})  # a device from which nothing can be read

    def test_writing_is_all_or_nothing(self):
        path = self.folder() / "new" / "file"
        self.utils.write_atomically(path, b"zeroth")
        self.utils.write_atomically(path, b"first", keep=path.with_name("old"))
        self.assertEqual(path.with_name("old").read_bytes(), b"zeroth")
        path.with_name("old").unlink()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            with self.assertRaises(OSError) as caught:
                self.utils.write_atomically(path, b"second")
        self.assertEqual(caught.exception.filename, str(path))
        self.assertEqual([(file.name, file.read_bytes()) for file in path.parent.iterdir()], [("file", b"first")])


class Data(Group):
    """The loader, MNIST's files (small made-up ones), their download (from this machine), and the bundled digits."""

    needs = ("mnist",)

    def setUp(self):
        super().setUp()
        self.root = self.folder()
        self.raw = self.root / "MNIST" / "raw"
        self.raw.mkdir(parents=True)
        self.files = {}
        for names, count in zip(self.mnist.MNIST_FILES.values(), (130, 20)):
            pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
            pixels[0, 0, :2] = 0, 255
            labels = np.arange(count, dtype=np.uint8) % 10
            for name, array in zip(names, (pixels, labels)):
                header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
                self.files[name] = header + array.tobytes()
        for patch in (mock.patch.object(self.mnist, "MNIST_MD5", {name: hashlib.md5(content).hexdigest()
                                                                  for name, content in self.files.items()}),
                      mock.patch("torchvision.datasets.MNIST.mirrors", []),
                      mock.patch.dict(os.environ, {"no_proxy": "*"})):
            patch.start()
            self.addCleanup(patch.stop)

    def put(self, ending="", names=None):
        for name in names or self.files:
            content = self.files[name]
            (self.raw / (name + ending)).write_bytes(gzip.compress(content) if ending == ".gz" else content)

    def serve(self, answer):
        """Serve the files as a mirror would; `answer` makes of a file's packed content what is sent."""
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = answer(gzip.compress(test.files[self.path.strip("/").removesuffix(".gz")]))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/"

    def mirrors(self, *mirrors):
        patch = mock.patch("torchvision.datasets.MNIST.mirrors", list(mirrors))
        patch.start()
        self.addCleanup(patch.stop)

    def test_signature(self):
        defaults = [(p.name, p.default) for p in inspect.signature(self.mnist.mnist).parameters.values()]
        self.assertEqual(defaults[:4], [("root", "../data"), ("batch_size", 64), ("num_workers", 4), ("download", True)])

    def test_agrees_with_torchvision(self):
        from torchvision import datasets, transforms

        self.put()
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        for train, count in ((True, 130), (False, 20)):
            reference = datasets.MNIST(self.root, train=train, transform=transform)
            images, labels = self.mnist.load_mnist(self.root, train)
            self.assertEqual((images.dtype, images.shape), (torch.float32, (count, 1, 28, 28)))
            self.assertEqual((labels.dtype, images.min(), images.max()), (torch.int64, -1, 1))
            torch.testing.assert_close(images, torch.stack([x for x, _ in reference]), atol=1e-6, rtol=0)
            self.assertEqual(labels.tolist(), [y for _, y in reference])

    def test_loader(self):
        self.put()
        loader = self.mnist.mnist(self.root, 64, 0, False)
        epochs = [list(loader) for _ in range(2)]
        self.assertEqual(len(loader), 3)
        for batches in epochs:
            self.assertEqual([len(x) for x, _ in batches], [64, 64, 2])
            torch.testing.assert_close(torch.cat([x for x, _ in batches]).sum((1, 2, 3)).sort().values,
                                       loader.dataset.tensors[0].sum((1, 2, 3)).sort().values)
        pairs = {(tuple(x[0, 0].tolist()), int(y)) for x, y in zip(*loader.dataset.tensors)}
        self.assertTrue(all((tuple(x[0, 0].tolist()), int(y)) in pairs for xs, ys in epochs[0] for x, y in zip(xs, ys)),
                        "images and labels are no longer together")
        self.assertFalse(torch.equal(epochs[0][0][0], epochs[1][0][0]), "both epochs have the same order")

    def test_order_follows_the_seed(self):
        self.put()
        orders = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            loader, stream = self.mnist.mnist(self.root, 130), torch.get_rng_state()
            orders.append([next(iter(loader))[0] for _ in range(2)])
            self.assertTrue(torch.equal(stream, torch.get_rng_state()), "shuffling draws from torch's own stream")
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(orders[0], orders[1])))
        self.assertFalse(torch.equal(orders[0][0], orders[2][0]))

    def test_test_set_keeps_its_order(self):
        self.put()
        labels = torch.cat([y for _, y in self.mnist.mnist(self.root, train=False, batch_size=7)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)])

    def test_packed_files(self):
        self.put()
        expected = self.mnist.load_mnist(self.root)[0]
        for file in self.raw.iterdir():
            file.unlink()
        self.put(".gz")
        self.assertTrue(torch.equal(self.mnist.load_mnist(self.root)[0], expected))

    def test_damaged_file_is_named_and_not_used(self):
        name = self.mnist.MNIST_FILES[True][0]
        for ending in ("", ".gz"):
            for damage in (lambda content: content[:-1], lambda content: content[:40] + b"?" + content[41:],
                           lambda content: b"", lambda content: b"not MNIST at all"):
                self.put(ending)
                path = self.raw / (name + ending)
                path.write_bytes(damage(path.read_bytes()))
                with self.assertRaisesRegex(self.mnist.DamagedData, f"{path} is damaged"):
                    self.mnist.load_mnist(self.root)
                path.unlink()

    def test_damaged_file_with_a_whole_packed_one_beside_it(self):
        self.put(".gz")
        (self.raw / self.mnist.MNIST_FILES[True][0]).write_bytes(b"half")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)
        self.assertIn("is damaged", err.getvalue())

    def test_missing_files_are_downloaded(self):
        self.mirrors("http://127.0.0.1:9/", self.serve(lambda content: content))
        self.assertEqual(len(self.mnist.load_mnist(self.root / "new")[0]), 130)
        self.assertEqual({file.name for file in (self.root / "new/MNIST/raw").iterdir()}, set(self.mnist.MNIST_FILES[True]))
        self.mirrors()
        self.assertEqual(len(self.mnist.load_mnist(self.root / "new", download=False)[0]), 130)

    def test_damaged_files_are_downloaded_again(self):
        self.put()
        (self.raw / self.mnist.MNIST_FILES[True][0]).write_bytes(b"half")
        self.mirrors(self.serve(lambda content: content))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)

    def test_damaged_downloads_are_not_kept(self):
        self.mirrors(self.serve(lambda content: content[:-9]), self.serve(lambda content: gzip.compress(b"other")),
                     self.serve(lambda content: b"<html>log in</html>"))
        with self.assertRaisesRegex(self.mnist.MissingData, "something else"):
            self.mnist.load_mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [])

    def test_answers_that_are_no_http(self):
        self.enterContext(warnings.catch_warnings(action="ignore", category=ResourceWarning))
        self.addCleanup(gc.collect)  # before the line above ends: urllib leaves the socket of a broken redirect open
        for answer in (b"nonsense\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: xyz\r\n\r\n",
                       b"HTTP/1.0 302 Found\r\nLocation: http://[\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf"):
            class Handler(socketserver.BaseRequestHandler):
                def handle(self):
                    self.request.recv(1000)
                    self.request.sendall(answer)

            with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
                threading.Thread(target=server.handle_request, daemon=True).start()
                self.mirrors(f"http://127.0.0.1:{server.server_address[1]}/")
                with self.assertRaises(self.mnist.MissingData):
                    self.mnist.load_mnist(self.root)

    def test_silent_network_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
            self.mirrors(f"http://127.0.0.1:{silent.getsockname()[1]}/")
            with mock.patch.object(self.mnist, "PATIENCE", 1), \
                    self.assertRaisesRegex(self.mnist.MissingData, "no answer|timed out"):
                self.mnist.load_mnist(self.root)

    def test_silent_name_service_is_given_up(self):
        self.mirrors("http://nowhere.invalid/")
        ended = threading.Event()
        self.addCleanup(ended.set)
        with mock.patch("socket.getaddrinfo", side_effect=lambda *args: ended.wait()), \
                mock.patch.object(self.mnist, "PATIENCE", 1):
            with self.assertRaisesRegex(self.mnist.MissingData, "no answer"):
                self.mnist.load_mnist(self.root)

    def test_trickling_network_is_given_up(self):
        def trickle(content):
            time.sleep(0.4)
            return content

        self.mirrors(self.serve(trickle))
        with mock.patch.object(self.mnist, "TRANSFER_LIMIT", 0.2), \
                self.assertRaisesRegex(self.mnist.MissingData, "not complete"):
            self.mnist.load_mnist(self.root)

    def test_patience_is_below_20_seconds(self):
        self.assertLess(self.mnist.PATIENCE, 20)

    def test_missing_files_without_download(self):
        with self.assertRaisesRegex(self.mnist.MissingData, "switched off"):
            self.mnist.mnist(self.root, download=False)

    def test_folder_that_is_a_file(self):
        (self.root / "file").write_text("")
        with self.assertRaisesRegex(self.mnist.DataError, "--data_dir"):
            self.mnist.mnist(self.root / "file")

    def test_digits(self):
        (x, y), (held_out, _) = self.mnist.load_digits(), self.mnist.load_digits(train=False)
        self.assertEqual((x.dtype, x.shape, y.dtype), (torch.float32, (1498, 1, 28, 28), torch.int64))
        self.assertEqual(held_out.shape, (299, 1, 28, 28))
        self.assertEqual((x.min(), x.max()), (-1, 1))
        self.assertEqual(sorted(set(y.tolist())), list(range(10)))
        border = x.clone()
        border[:, :, 4:24, 4:24] = -1
        self.assertTrue((border == -1).all(), "the border of 4 pixels is not empty")
        centre = x[0, 0, 4:24, 4:24].view(1, 1, 20, 20)
        with gzip.open(self.mnist.DIGITS_FILE, "rt") as file:
            first = np.array(file.readline().split(","), float)[:64].reshape(8, 8) / 8 - 1
        blocks = nn.functional.adaptive_avg_pool2d(centre, 4)[0, 0].numpy()
        np.testing.assert_allclose(blocks, first.reshape(4, 2, 4, 2).mean((1, 3)), atol=0.2)

    def test_damaged_digits(self):
        damaged = self.root / "digits.csv.gz"
        damaged.write_bytes(self.mnist.DIGITS_FILE.read_bytes()[:-100])
        with mock.patch.object(self.mnist, "DIGITS_FILE", damaged), self.assertRaises(self.mnist.DamagedData):
            self.mnist.load_digits()


class RealMnist(Group):
    """The real files, where they are in ../data."""

    needs = ("mnist",)

    def test_real_mnist(self):
        root = HERE.parent / "data"
        try:
            loader = self.mnist.mnist(root, download=False)
            test = self.mnist.mnist(root, download=False, train=False)
        except self.mnist.MissingData:
            self.skipTest(f"MNIST is not in {root}")
        self.assertEqual((len(loader), len(test)), (938, 157))
        images, labels = loader.dataset.tensors
        self.assertEqual((images.shape, images.min(), images.max()), ((60000, 1, 28, 28), -1, 1))
        self.assertEqual(labels[:5].tolist(), [5, 0, 4, 1, 9])
        self.assertAlmostEqual(float(images.double().mean()), 2 * 0.1307 - 1, places=3)  # the known mean of MNIST
        self.assertEqual([len(x) for x, _ in loader][-2:], [64, 32])


class Flags(TrainGroup):
    """The command line: defaults, help, and what is refused before anything is made."""

    def test_defaults(self):
        expected = {"z_dim": 8, "batch_size": 64, "lambda_": 0.995, "ae_lr": 1e-3, "d_lr": 5e-3, "data_dir": "../data/",
                    "epochs": 100, "seed": 42, "log_dir": "AAE_logs/", "no_cuda": False}
        args = vars(self.train.parse_args([]))
        self.assertEqual({name: args[name] for name in expected}, expected)
        self.assertIn(args["num_workers"], (0, 4))

    def test_help_explains_every_flag(self):
        status, out, _ = self.run_cli("--help")
        self.assertEqual(status, 0)
        actions = self.train.make_parser()._actions
        self.assertGreaterEqual(len(actions), 14)
        for action in actions:
            self.assertRegex(action.help, r"\A[^\n]{10,}\Z", action.option_strings)
            self.assertIn(action.option_strings[-1], out)

    def test_wrong_flags_are_refused_in_one_sentence(self):
        log_dir = self.folder() / "none"
        for flags in ("--lambda_ 1.01", "--lambda_ -0.1", "--lambda_ nan", "--lambda_ half", "--z_dim 0", "--z_dim 2.5",
                      "--batch_size 0", "--batch_size -64", "--epochs 0", "--ae_lr -1e-3", "--ae_lr nan", "--ae_lr inf",
                      "--d_lr -1", "--num_workers -1", "--seed -1", "--seed 9999999999999999999999", "--seed x",
                      "--dataset cifar", "--epoch 3", "--lamda_ 1", "--z_dim", "digits", "--nonsense", "--epochs 1" + "0" * 400,
                      "--batch_size 99999999999999999999", "--lambda_ -inf", "--checkpoint_every 0"):
            with mock.patch.object(self.train, "main", side_effect=AssertionError("the run was started")):
                status, out, err = self.run_cli(*flags.split(), *([] if flags == "--z_dim" else ["--log_dir", log_dir]))
            self.assertEqual((status, out), (2, ""), flags)
            self.assertRegex(err, r"\Atrain\.py: error: .+\n\Z|\A\S+: error: [^\n]+\n\Z", flags)

    def test_a_misspelt_flag_is_guessed(self):
        self.assertIn("perhaps --lambda_ is", self.run_cli("--lamda", "1")[2])
        self.assertIn("perhaps --no-cuda is", self.run_cli("--no_cuda")[2])

    def test_a_negative_number_is_a_value(self):
        for flag in ("--ae_lr", "--d_lr", "--lambda_"):
            self.assertIn("'-1e-3' is not a number from 0", self.run_cli(flag, "-1e-3")[2])

    def test_given_flags_are_known(self):
        self.assertEqual(self.train.parse_args(["--z_dim", "8", "--no-cuda"]).given, ["z_dim", "no_cuda"])


class BadInput(TrainGroup):
    """What the user can mend ends a run with status 1 and one sentence."""

    def assert_refused(self, result, *fragments):
        status, _, err = result
        self.assertEqual(status, 1, err)
        self.assertEqual(len(err.strip().splitlines()), 1, err)
        self.assertNotIn("Traceback", err)
        for fragment in fragments:
            self.assertIn(str(fragment), err)

    def run_digits(self, *flags):
        with self.few_digits:
            return self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 1, *flags)

    def test_log_dir_that_is_a_file(self):
        file = self.folder() / "file"
        file.write_text("")
        self.assert_refused(self.run_digits("--log_dir", file), file, "--log_dir")
        self.assert_refused(self.run_digits("--log_dir", file / "below"), file, "--log_dir")

    def test_data_dir_that_is_a_file(self):
        folder = self.folder()
        (folder / "file").write_text("")
        for dataset in ("auto", "mnist"):
            self.assert_refused(self.run_cli("--dataset", dataset, "--data_dir", folder / "file", "--log_dir",
                                             folder / "logs"), folder / "file", "--data_dir")
        self.assertFalse((folder / "logs").exists())

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "root may write everywhere")
    def test_folders_that_cannot_be_written(self):
        folder = self.folder()
        folder.chmod(0o500)
        self.addCleanup(folder.chmod, 0o700)
        self.assert_refused(self.run_digits("--log_dir", folder), folder, "--log_dir")
        self.assert_refused(self.run_cli("--data_dir", folder, "--log_dir", self.folder()), folder, "--data_dir")

    def test_damaged_data(self):
        folder = self.folder()
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / self.mnist.MNIST_FILES[True][0]).write_bytes(b"half")
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            for dataset in ("auto", "mnist"):
                self.assert_refused(self.run_cli("--dataset", dataset, "--data_dir", folder, "--log_dir", folder / "logs"),
                                    "is damaged")
        self.assertFalse((folder / "logs").exists())

    def test_mnist_never_falls_back(self):
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_refused(self.run_cli("--dataset", "mnist", "--data_dir", self.folder(), "--log_dir", self.folder()),
                                "could not be downloaded")

    def test_not_enough_memory(self):
        self.assert_refused(self.run_digits("--log_dir", self.folder(), "--z_dim", 2**31 - 1), "not enough memory")

    def test_programming_errors_keep_their_traceback(self):
        with mock.patch.object(self.train, "main", side_effect=RuntimeError("a bug")), self.assertRaises(RuntimeError):
            self.run_cli()

    def test_interrupt_before_training(self):
        with mock.patch.object(self.train, "digits", side_effect=KeyboardInterrupt):
            status, _, err = self.run_cli("--dataset", "digits")
        self.assertEqual((status, err.strip()), (130, "interrupted"))

    def test_full_disk(self):
        folder = self.folder()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            self.assert_refused(self.run_digits("--log_dir", folder), "hparams.json", "No space left")

    def test_full_disk_for_events(self):
        folder = self.folder()
        with mock.patch("tensorboard.summary.writer.record_writer.RecordWriter.write",
                        side_effect=OSError(28, "No space left on device")):
            self.assert_refused(self.run_digits("--log_dir", folder), folder, "No space left")

    def test_divergence(self):
        self.assert_refused(self.run_digits("--log_dir", self.folder(), "--ae_lr", "1e9"), "of epoch 1", "diverged")


class WholeRun(TrainGroup):
    """`main` from beginning to end on a hundred of the bundled digits."""

    def test_everything_is_written(self):
        run, state = self.train_quietly("--epochs", "6", "--z_dim", "3")
        self.assertRegex(run.name, r"\A\d{4}(_\d\d){5}\Z")
        self.assertEqual({file.name for file in (run / "results/Prior_samples").iterdir()},
                         {f"samples_epoch_{epoch}.png" for epoch in range(7)})
        self.assertEqual({file.name for file in (run / "results/Reconstruction").iterdir()},
                         {f"reconstruction_{epoch}.png" for epoch in (0, 1, 5)})
        self.models.AdversarialAE(z_dim=3).load_state_dict(state)
        events = read_events(run)
        expected = {"generator/gen_loss", "generator/recon_loss", "generator/ae_loss", "discriminator/disc_loss",
                    "discriminator/loss_real", "discriminator/loss_fake", "discriminator/accuracy"}
        self.assertLessEqual(expected, set(events.Tags()["scalars"]))
        for tag in expected:  # 12 steps, less than a window
            self.assertEqual([event.step for event in events.Scalars(tag)], [12])
        self.assertEqual([event.step for event in events.Images("samples")], list(range(7)))
        self.assertEqual([event.step for event in events.Images("reconstructions")], [0, 1, 5])
        settings = json.loads((run / "hparams.json").read_text())
        self.assertEqual((settings["z_dim"], settings["lambda_"], settings["trained_on"], settings["fallback"]),
                         (3, 0.995, "digits", None))
        self.assertEqual([file.name for file in run.rglob("*.tmp")], [])

    def outputs_on_test_images(self, state):
        """Return test images, their labels, reconstructions and codes, of a model of 3 dimensions with these weights."""
        images, labels = self.mnist.load_digits(train=False)
        model = self.models.AdversarialAE(z_dim=3).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return images, labels, *model(images)

    def test_test_images_are_measured(self):
        run, state = self.train_quietly("--epochs", "6", "--z_dim", "3")
        images, _, recon_x, codes = self.outputs_on_test_images(state)
        events = read_events(run)
        for tag in ("test/recon_loss", "test/ks_distance"):
            self.assertEqual([event.step for event in events.Scalars(tag)], [0, 1, 5])
        for dimension in range(3):
            histograms = events.Histograms(f"codes/{dimension}")
            self.assertEqual([(event.step, event.histogram_value.num) for event in histograms], [(1, 299), (5, 299)])
        [loss], [distance] = events.Scalars("final/test_recon_loss"), events.Scalars("final/test_ks_distance")
        self.assertEqual((loss.step, distance.step), (6, 6))
        self.check_close(loss.value, (recon_x - images).square().mean(), "the reconstruction loss of the test images", 1e-4)
        self.check_close(distance.value, self.train.ks_distance(codes), "the codes' distance to the prior", 1e-4)

    def test_settings_and_results_are_in_the_same_run(self):
        from tensorboard.plugins.hparams import plugin_data_pb2

        run, _ = self.train_quietly("--epochs", "1", "--z_dim", "3")
        self.assertEqual(len(list(run.rglob("events.out.tfevents.*"))), 1)
        content = read_events(run).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        self.assertEqual((settings["z_dim"].number_value, settings["posterior"].string_value), (3, "deterministic"))

    def test_projector_has_codes_pictures_and_labels(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "3")
        images, labels, _, codes = self.outputs_on_test_images(state)
        folder = run / "00001" / "codes"
        np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), codes, rtol=1e-3, atol=1e-4)
        self.assertEqual((folder / "metadata.tsv").read_text().split(), [str(label) for label in labels.tolist()])
        sprite = read_png(folder / "sprite.png")
        np.testing.assert_allclose(sprite[:28, 28:56], 127.5 * (images[1, 0] + 1), atol=1.5)
        self.assertIn("00001/codes/tensors.tsv", (run / "projector_config.pbtxt").read_text())

    def test_codes_that_are_infinite_do_not_end_a_run(self):
        model, images = self.models.AdversarialAE(), images_like_mnist(4)
        with torch.no_grad():
            model.encoder.net[-1].bias.fill_(math.inf)
        self.train.save_measurements(model, 1, self.writer(), images)

    def test_without_test_files_a_run_goes_on_with_a_warning(self):
        for error in (self.mnist.MissingData("gone"), self.mnist.DamagedData("gone")):
            with mock.patch.object(self.train, "load_digits", side_effect=error), \
                    contextlib.redirect_stderr(io.StringIO()) as err:
                run, _ = self.train_quietly("--epochs", "1")
            self.assertIn("WARNING: nothing is measured on test images: gone", err.getvalue())
            self.assertNotIn("test/recon_loss", read_events(run).Tags()["scalars"])

    def test_inputs_of_reconstructions_stay_the_same_and_have_all_labels(self):
        run, _ = self.train_quietly("--epochs", "1")
        first, later = (read_png(run / f"results/Reconstruction/reconstruction_{epoch}.png") for epoch in (0, 1))
        self.assertTrue(np.array_equal(first[:31], later[:31]))
        self.assertFalse(np.array_equal(first[31:], later[31:]))
        images, labels = self.mnist.load_digits()
        for label in range(10):
            column = first[2:30, 2 + 30 * label:30 + 30 * label]
            shown = (images - torch.from_numpy(column / 127.5 - 1)).abs().amax((1, 2, 3)).argmin()
            self.assertEqual(int(labels[shown]), label)

    def test_training_learns(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.train.main(Namespace(dataset="digits", epochs=3, log_dir=self.folder(), no_cuda=True))
        losses = [float(line.split("recon_loss ")[1].split(",")[0]) for line in out.getvalue().splitlines()
                  if line.startswith("epoch")]
        self.assertEqual(len(losses), 3)
        self.assertLess(losses[2], 0.12, f"reconstruction losses of three epochs: {losses}")

    def test_same_seed_same_bits(self):
        runs = [self.train_quietly("--epochs", "2", "--seed", seed)[1] for seed in ("3", "3", "4")]
        self.assertTrue(same(runs[0], runs[1]), "two runs with one seed ended with different weights")
        self.assertFalse(same(runs[0], runs[2]), "two seeds gave the same weights")

    def test_pictures_do_not_touch_training(self):
        _, with_pictures = self.train_quietly("--epochs", "2")
        with mock.patch.object(self.train, "generate_and_save"), mock.patch.object(self.train, "save_reconstruction"):
            _, without = self.train_quietly("--epochs", "2")
        self.assertTrue(same(with_pictures, without))

    def test_recommended_optimizers(self):
        args = self.train.parse_args([])
        optimizer_ae, optimizer_disc = self.train.build_optimizers(self.models.AdversarialAE(), args)
        self.assertIsInstance(optimizer_ae, torch.optim.Adam)
        self.assertIsInstance(optimizer_disc, torch.optim.SGD)
        self.assertEqual((optimizer_ae.defaults["lr"], optimizer_ae.defaults["betas"][0], optimizer_disc.defaults["lr"]),
                         (1e-3, 0.5, 5e-3))
        self.assertEqual((optimizer_disc.defaults["momentum"], args.averaging), (0.95, 0.999))

    def test_discriminators_gradient_is_clipped(self):
        model, x = self.models.AdversarialAE(), images_like_mnist(16)
        nn.init.constant_(model.discriminator.net[-1].weight, 10.0)
        optimizers = self.train.build_optimizers(model, self.train.parse_args(["--d_momentum", "0"]))
        before = nn.utils.parameters_to_vector(model.discriminator.parameters()).clone()
        self.train.train_step(model, *optimizers, 0.5, x)
        moved = (nn.utils.parameters_to_vector(model.discriminator.parameters()) - before).norm()
        self.check_close(moved, 5e-3 * self.train.CLIP, "a large gradient of the discriminator is not clipped", 1e-4)

    def test_rate_drops_after_the_epochs_of_the_flag(self):
        for on_device in (False, True):  # on CUDA the rate is a tensor, which a captured graph reads: it must stay the same one
            args = self.train.parse_args(["--drop_after", "10"])
            optimizer, _ = self.train.build_optimizers(self.models.AdversarialAE(), args)
            if on_device:
                optimizer.param_groups[0]["lr"] = torch.tensor(args.ae_lr)
            before = optimizer.param_groups[0]["lr"]
            for epoch, expected in ((1, 1e-3), (10, 1e-3), (11, 1e-4), (40, 1e-4)):
                self.train.set_rate(optimizer, epoch, args)
                self.check_close(1e3 * optimizer.param_groups[0]["lr"], 1e3 * expected, f"the rate of epoch {epoch} is wrong")
            self.assertTrue(not on_device or optimizer.param_groups[0]["lr"] is before)
        self.train.set_rate(optimizer, 1000, self.train.parse_args(["--drop_after", "0"]))
        self.check_close(1e3 * optimizer.param_groups[0]["lr"], 1, "the rate drops with --drop_after 0")

    def test_rate_drops_in_a_run(self):
        runs = [self.train_quietly("--epochs", "2", "--drop_after", str(after))[1] for after in (1, 2)]
        self.assertFalse(same(*runs), "the rate of the second epoch does not matter")

    def test_namespace_of_the_assignments_flags_alone(self):
        args = Namespace(z_dim=2, batch_size=64, lambda_=1.0, ae_lr=1e-3, d_lr=5e-3, data_dir=str(self.folder()), epochs=1,
                         seed=42, num_workers=4, log_dir=str(self.folder()), no_cuda=True)
        with self.few_digits, mock.patch("torchvision.datasets.MNIST.mirrors", []), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.assertTrue(self.train.main(args).is_dir())

    def test_fallback_is_loud_at_both_ends_and_recorded(self):
        folder = self.folder()
        with self.few_digits, mock.patch("torchvision.datasets.MNIST.mirrors", []):
            status, _, err = self.run_cli("--data_dir", folder, "--log_dir", folder / "logs", "--epochs", 1, "--no-cuda")
        self.assertEqual(status, 0)
        warning = r"WARNING: this run trains on the bundled digits instead of MNIST.*put its four files"
        self.assertRegex(err, f"(?s)\\A{warning}.*{warning}")
        run, = (folder / "logs").iterdir()
        settings = json.loads((run / "hparams.json").read_text())
        self.assertEqual((settings["dataset"], settings["trained_on"]), ("auto", "digits"))
        self.assertIn("could not be downloaded", settings["fallback"])

    def test_end_says_where_everything_is(self):
        with self.few_digits:
            _, out, _ = self.run_cli("--dataset", "digits", "--epochs", 1, "--no-cuda", "--log_dir", self.folder() / "a b")
        self.assertRegex(out, r"(?s)device: cpu \(.+\).*epoch 1/1: recon_loss \d\.\d+.*done: .*accuracy [\d.]+%")
        self.assertRegex(out, r"tensorboard --logdir '.*/a b/[\d_]+'")

    def test_digits_never_touch_the_network(self):
        with mock.patch("socket.socket.connect", side_effect=AssertionError("the network was touched")), \
                mock.patch("socket.getaddrinfo", side_effect=AssertionError("a name was looked up")):
            self.train_quietly("--epochs", "1", "--data_dir", str(self.folder()))

    def test_two_runs_in_one_second_have_two_folders(self):
        log_dir = self.folder()
        self.assertNotEqual(*(self.train.create_run_folder(log_dir) for _ in range(2)))

    def test_closed_standard_output_does_not_end_a_run(self):
        log_dir = self.folder()
        command = [sys.executable, str(HERE / "train.py"), "--dataset", "digits", "--epochs", "1", "--no-cuda", "--log_dir",
                   str(log_dir)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            err = process.stderr.read()
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertEqual(len(list(log_dir.glob("*/checkpoints/model_checkpoint.pt"))), 1)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT to send")
    def test_interrupted_run_leaves_everything_readable(self):
        log_dir = self.folder()
        command = [sys.executable, str(HERE / "train.py"), "--dataset", "digits", "--epochs", "1000", "--no-cuda",
                   "--log_dir", str(log_dir)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                for line in process.stdout:
                    if line.startswith("epoch 2"):
                        process.send_signal(signal.SIGINT)
                        break
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
        run, = log_dir.iterdir()
        self.assertEqual(process.returncode, 130, err)
        self.assertRegex(err, rf"stopped by SIGINT after \d+ epochs and \d+ steps; go on with: python .*train.py --resume {run}")
        self.models.AdversarialAE().load_state_dict(torch.load(run / "checkpoints/model_checkpoint.pt", weights_only=True))
        events = read_events(run)
        self.assertGreaterEqual(len(events.Images("samples")), 2)
        self.assertGreaterEqual(events.Scalars("generator/recon_loss")[-1].step, 48)
        pictures = list((run / "results").rglob("*"))
        self.assertGreaterEqual(len([read_png(file) for file in pictures if file.is_file()]), 4)
        self.assertEqual([file for file in pictures if file.suffix == ".tmp"], [])


class Resume(TrainGroup):
    """Runs that are stopped, and go on as if they had not been."""

    needs = ("train", "mnist", "models", "checkpoint")
    STEPS = 2  # of an epoch of a hundred digits in batches of 64

    def stop_after(self, steps, *flags, signum=signal.SIGTERM):
        """Train until a signal comes right after so many steps; return the run's folder and what was raised."""
        log_dir = self.folder()
        add, count = self.train.StepLog.add, iter(range(1, 1000))

        def add_and_stop(log, *values):
            add(log, *values)
            if next(count) == steps:
                signal.raise_signal(signum)

        with mock.patch.object(self.train.StepLog, "add", add_and_stop), self.assertRaises(self.train.RunStopped) as caught:
            with self.few_digits, contextlib.redirect_stdout(io.StringIO()):
                self.train.main(self.train.parse_args(["--dataset", "digits", "--no-cuda", "--log_dir", str(log_dir), *flags]))
        run, = log_dir.iterdir()
        return run, caught.exception

    def go_on(self, run, *flags):
        with self.few_digits:
            return self.run_cli("--resume", run, *flags)

    def assert_same_run(self, run, other):
        self.assert_same_contents(run_contents(run), run_contents(other))

    def assert_same_contents(self, contents, others):
        differing = sorted(name for name in contents.keys() | others.keys() if contents.get(name) != others.get(name))
        self.check(not differing, f"the runs differ in {differing[:10]}")

    def test_resumed_run_is_the_uninterrupted_one(self):
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)):  # windows across every stop
            whole, _ = self.train_quietly("--epochs", "4", "--drop_after", "1")
            for steps in (1, 2, 5):  # within an epoch, at its end, and within a later one
                run, stopped = self.stop_after(steps, "--epochs", "4", "--drop_after", "1")
                self.assertIn(f"after {steps // self.STEPS} epochs and {steps % self.STEPS} steps", str(stopped))
                for _ in range(2):  # the second time there is nothing left to do
                    self.assertEqual(self.go_on(run)[0], 0)
                    self.assert_same_run(run, whole)

    def test_rate_of_an_older_run_stays(self):
        run, _ = self.stop_after(2, "--epochs", "2")
        path = run / "checkpoints" / "training_state.pt"
        state = torch.load(path, weights_only=True)
        del state["settings"]["drop_after"]
        torch.save(state, path)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertEqual(json.loads((run / "hparams.json").read_text())["drop_after"], 0)

    def test_base_networks_are_resumed(self):
        whole, weights = self.train_quietly("--epochs", "2", "--networks", "base")
        self.models.AdversarialAE(networks="base").load_state_dict(weights)
        run, _ = self.stop_after(3, "--epochs", "2", "--networks", "base")
        self.assertEqual(self.go_on(run, "--networks", "residual")[0], 2)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, whole)

    def test_every_posterior_is_resumed(self):
        for posterior in ("gaussian", "universal"):
            whole, weights = self.train_quietly("--epochs", "2", "--posterior", posterior)
            self.models.AdversarialAE(posterior=posterior).load_state_dict(weights)
            run, _ = self.stop_after(3, "--epochs", "2", "--posterior", posterior)
            self.assertEqual(self.go_on(run, "--posterior", "deterministic")[0], 2)
            self.assertEqual(self.go_on(run)[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())["posterior"], posterior)

    def test_saved_weights_are_the_average_and_training_goes_on_with_the_others(self):
        runs = {decay: self.train_quietly("--epochs", "3", "--averaging", decay) for decay in ("0", "0.9")}
        (last, last_saved), (averaged, averaged_saved) = runs.values()
        states = [self.checkpoint.load_state(run) for run in (last, averaged)]
        for name in states[0]["model"]:
            self.assertTrue(torch.equal(states[0]["model"][name], states[1]["model"][name]), f"{name} depends on the average")
            self.assertTrue(torch.equal(averaged_saved[name], states[1]["average"]["weights"][name]), name)
            if states[0]["model"][name].is_floating_point():
                self.assertTrue(torch.equal(last_saved[name], states[0]["model"][name]), f"{name} with --averaging 0")
                self.assertFalse(torch.equal(last_saved[name], averaged_saved[name]), f"{name} is not averaged")

    def test_pictures_and_measurements_are_of_the_average(self):
        names, seen = ("generate_and_save", "save_reconstruction", "save_measurements", "save_summary"), {}
        with contextlib.ExitStack() as stack:
            for name in names:
                record = lambda model, *_, name=name, **__: seen.update({name: copy.deepcopy(model.state_dict())})
                stack.enter_context(mock.patch.object(self.train, name, side_effect=record))
            _, saved = self.train_quietly("--epochs", "5", "--averaging", "0.9")
        for name in names:
            self.assertTrue(same(seen[name], saved), f"{name} gets other weights than the averaged ones")

    def test_more_epochs_are_the_longer_run(self):
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)):
            whole, _ = self.train_quietly("--epochs", "4")
            run, _ = self.train_quietly("--epochs", "2")
            self.assertEqual(self.go_on(run, "--epochs", "4")[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)

    def test_finished_run_stays_as_it_is(self):
        run, _ = self.train_quietly("--epochs", "2")
        before = run_contents(run)
        status, out, _ = self.go_on(run)
        self.assertEqual(status, 0)
        self.assertIn("done:", out)
        self.assert_same_contents(run_contents(run), before)

    def test_killed_run_goes_on_from_its_checkpoint(self):
        whole, _ = self.train_quietly("--epochs", "3", "--checkpoint_every", "1")
        log_dir = self.folder()
        save_state, count = self.train.save_state, iter(range(100))

        def save_and_die(*args):  # as a kill would: with later events and pictures already written
            if next(count) in (2, 3):
                raise Stop
            save_state(*args)

        with mock.patch.object(self.train, "save_state", save_and_die), self.few_digits:
            with self.assertRaises(Stop):
                self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 3, "--checkpoint_every", 1, "--log_dir", log_dir)
            run, = log_dir.iterdir()
            with self.assertRaises(Stop):
                self.run_cli("--resume", run)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 1)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, whole)
        self.assertEqual(list(run.rglob("*.tmp")), [])

    def test_signals_have_their_exit_status_and_the_command_to_go_on(self):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if not hasattr(signal, name):
                continue
            signum = getattr(signal, name)
            before = signal.getsignal(signum)
            run, stopped = self.stop_after(1, "--epochs", "2", signum=signum)
            self.assertEqual(signal.getsignal(signum), before, "the handler was not put back")
            with mock.patch.object(self.train, "main", side_effect=stopped):
                status, _, err = self.run_cli()
            self.assertEqual(status, 128 + signum)
            self.assertRegex(err, f"{name} after 0 epochs and 1 steps; go on with: python .*train.py --resume {run}")

    def test_signal_after_the_last_step_of_an_epoch(self):
        log_dir, describe = self.folder(), self.train.describe

        def signal_late(means):  # the line of an epoch is printed after its last step
            signal.raise_signal(signal.SIGTERM)
            return describe(means)

        with mock.patch.object(self.train, "describe", signal_late), self.few_digits:
            status, _, err = self.run_cli("--dataset", "digits", "--epochs", 3, "--no-cuda", "--log_dir", log_dir)
        run, = log_dir.iterdir()
        state = self.checkpoint.load_state(run)
        self.assertEqual(status, 128 + signal.SIGTERM)
        self.assertIn(f"after {state['epoch']} epochs and {state['steps']} steps", err)

    def test_ignored_signals_stay_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with self.train.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
        self.assertEqual(received, [])

    def test_second_interrupt_stops_at_once(self):
        with self.train.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(received, [signal.SIGINT])
            with self.assertRaises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_latest_run(self):
        log_dir = self.folder()
        with self.few_digits:
            for _ in range(2):
                self.assertEqual(self.run_cli("--dataset", "digits", "--epochs", 1, "--log_dir", log_dir, "--no-cuda")[0], 0)
            (log_dir / "2999_01_01_00_00_00").mkdir()  # has no checkpoint
            _, out, _ = self.run_cli("--resume", "latest", "--log_dir", log_dir)
        self.assertIn(str(sorted(log_dir.iterdir())[1]), out)

    def assert_refused(self, result, status, *fragments):
        self.assertEqual(result[0], status, result[2])
        self.assertEqual(len(result[2].strip().splitlines()), 1, result[2])
        for fragment in fragments:
            self.assertIn(str(fragment), result[2])

    def test_flag_that_an_older_run_lacks_is_its_default(self):
        parse = lambda *flags: self.train.parse_args(flags)
        settings = {name: value for name, value in vars(parse()).items() if name not in ("given", "precision")}
        self.assertEqual(self.train.resumed_args(parse(), set(), settings).precision, "fp32")
        with self.assertRaisesRegex(self.train.FlagError, "--precision bf16 contradicts the run, which has fp32"):
            self.train.resumed_args(parse("--precision", "bf16"), {"precision"}, settings)

    def test_contradicting_flags_are_refused_by_name(self):
        run, _ = self.train_quietly("--epochs", "2", "--z_dim", "3")
        before = run_contents(run)
        for flag, value in (("--z_dim", 8), ("--batch_size", 32), ("--lambda_", 1), ("--ae_lr", 0.1), ("--d_lr", 0.1),
                            ("--seed", 1), ("--dataset", "auto"), ("--epochs", 1)):
            self.assert_refused(self.go_on(run, flag, value), 2, flag)
        self.assertEqual(self.go_on(run, "--z_dim", 3, "--num_workers", 2)[0], 0)
        self.assert_same_contents(run_contents(run), before)

    def test_what_cannot_be_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")
        empty, file = self.folder(), self.folder() / "training_state.pt"
        file.write_bytes(b"")
        for wrong in (empty, empty / "none", file, run / "checkpoints" / "model_checkpoint.pt", "latest"):
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, empty if wrong == "latest" else wrong)

    def test_run_of_an_older_version_is_refused_by_name(self):
        run, _ = self.train_quietly("--epochs", "1")
        file = run / "checkpoints" / "training_state.pt"
        state = torch.load(file, weights_only=True)
        torch.save({**state, "format": "adversarial autoencoder, training state 1"}, file)
        self.assert_refused(self.go_on(run), 1, file, "older version")

    def test_damaged_checkpoint_is_refused_and_the_one_before_offered(self):
        run, _ = self.train_quietly("--epochs", "2", "--checkpoint_every", "1")
        whole, current = run_contents(run), run / "checkpoints" / "training_state.pt"
        previous, content = current.with_name("training_state.previous.pt"), current.read_bytes()
        random = np.random.default_rng(0)
        damages = [lambda: content[:random.integers(len(content))], lambda: b"", lambda: b"not a checkpoint", self.weights_alone]
        damages += [lambda: self.flipped(content, random)] * 4
        for damage in damages:
            current.write_bytes(damage())
            self.assert_refused(self.go_on(run), 1, current, f"--resume {previous}")
        self.assertEqual(self.checkpoint.load_state(previous)["epoch"], 1)
        self.assertEqual(self.go_on(previous)[0], 0)
        self.assert_same_contents(run_contents(run), whole)
        previous.write_bytes(b"")
        current.write_bytes(b"")
        self.assert_refused(self.go_on(run), 1, current)

    def weights_alone(self):
        return self.checkpoint.packed(self.models.AdversarialAE().state_dict())

    def flipped(self, content, random):
        """Return the content with one bit of some tensor's data the other way."""
        content, place = bytearray(content), int(random.integers(len(content) // 4, len(content) // 2))
        content[place] ^= 1 << int(random.integers(8))
        return bytes(content)

    def test_checkpoint_of_another_architecture(self):
        run, _ = self.train_quietly("--epochs", "1")
        before = run_contents(run)

        class Wider(self.models.AdversarialAE):
            def __init__(self, z_dim):
                super().__init__(z_dim)
                self.encoder.extra = nn.Linear(2, 2)

        with mock.patch.object(self.train, "AdversarialAE", Wider):
            self.assert_refused(self.go_on(run), 1, run, "does not fit models.py")
        self.assert_same_contents(run_contents(run), before)

    def test_checkpoint_of_another_optimizer(self):
        run, _ = self.train_quietly("--epochs", "1")
        build = self.train.build_optimizers
        with mock.patch.object(self.train, "build_optimizers", lambda model, args:
                               (torch.optim.RMSprop(model.encoder.parameters()), build(model, args)[1])):
            self.assert_refused(self.go_on(run, "--epochs", 2), 1, run, "RMSprop")

    def test_a_run_of_another_device_goes_on_with_a_warning(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = self.checkpoint.load_state(run)
        state["settings"]["device"], state["random"]["device"] = "cuda", torch.zeros(16, dtype=torch.uint8)
        del state["path"]
        (run / "checkpoints" / "training_state.pt").write_bytes(self.checkpoint.packed(state))
        status, _, err = self.go_on(run, "--epochs", 2)
        self.assertEqual(status, 0)
        self.assertIn("began with cuda and goes on with cpu", err)

    def test_moments_of_another_layout(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = self.checkpoint.load_state(run)
        del state["path"]
        for moments in state["optimizer_ae"]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = moments[name].contiguous()  # as CUDA has them
        (run / "checkpoints" / "training_state.pt").write_bytes(self.checkpoint.packed(state))
        self.assertEqual(self.go_on(run, "--epochs", 2)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "2")[0])

    def test_more_epochs_survive_a_kill(self):
        run, _ = self.train_quietly("--epochs", "2")
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.go_on(run, "--epochs", 4)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "4")[0])

    def test_weights_older_than_the_state_are_written_again(self):
        run, weights = self.train_quietly("--epochs", "2")
        (run / "checkpoints" / "model_checkpoint.pt").unlink()
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertTrue(same(weights, torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)))

    def test_what_came_after_the_checkpoint_is_removed(self):
        run, _ = self.train_quietly("--epochs", "2")
        late = [run / "results" / "Prior_samples" / "samples_epoch_10.png", run / "events.out.tfevents.9999999999.host.1.0"]
        for file in late:
            file.write_bytes(b"half")
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertEqual([file.name for file in late if file.exists()], [])

    def test_state_named_from_within_its_folder(self):
        run, _ = self.train_quietly("--epochs", "1")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(run / "checkpoints")
        self.assertEqual(self.go_on("training_state.pt")[0], 0)
        os.chdir(run)
        self.assertEqual(self.go_on(".")[0], 0)

    def test_file_system_without_locks(self):
        if self.checkpoint.fcntl is None:
            self.skipTest("runs are not locked here")
        run, _ = self.train_quietly("--epochs", "1")
        with mock.patch.object(self.checkpoint.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
            status, _, err = self.go_on(run)
        self.assertEqual(status, 0)
        self.assertIn("cannot be locked", err)

    def test_a_run_in_use_is_refused(self):
        run, _ = self.train_quietly("--epochs", "1")
        if self.checkpoint.fcntl is None:
            self.skipTest("runs are not locked here")
        with self.checkpoint.locked(run):
            self.assert_refused(self.go_on(run), 1, run, "in use")
        self.assertEqual(self.go_on(run)[0], 0)

    def test_full_disk_leaves_the_last_checkpoint(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while a second training state is written
            if all(any(log_dir.glob(f"*/checkpoints/training_state.pt{ending}")) for ending in ("", ".tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full), self.few_digits:
            self.assert_refused(self.run_cli("--dataset", "digits", "--epochs", 2, "--checkpoint_every", 1, "--no-cuda",
                                             "--log_dir", log_dir), 1, "training_state.pt", "No space left")
        run, = log_dir.iterdir()
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 0)
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "2")[0])

    def test_removed_run_folder_is_said_and_does_not_come_back(self):
        log_dir = self.folder()
        save_pictures = self.train.Session.save_pictures

        def remove_folder(session, *args):
            if session.epoch:
                os.rename(session.run, log_dir / "elsewhere")
            save_pictures(session, *args)

        with mock.patch.object(self.train.Session, "save_pictures", remove_folder), self.few_digits:
            result = self.run_cli("--dataset", "digits", "--epochs", 2, "--no-cuda", "--log_dir", log_dir)
        self.assert_refused(result, 1, log_dir, "No such file")
        self.assertEqual([folder.name for folder in log_dir.iterdir()], ["elsewhere"])

    def test_training_state_may_be_loaded_safely(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = torch.load(run / "checkpoints" / "training_state.pt", weights_only=True)
        self.assertEqual((state["epoch"], state["steps"]), (1, 0))


class Metrics(Group):
    """The functions of metrics.py, each against the same number computed in another way."""

    needs = ("metrics",)

    def codes(self, count=40, z_dim=3):
        """Return codes with correlated dimensions that are far from N(0, I)."""
        return torch.randn(count, z_dim) @ torch.randn(z_dim, z_dim) + torch.randn(z_dim)

    def test_ks_distance_is_the_largest_step_between_two_distribution_functions(self):
        codes = self.codes()[:, :1]
        values = [float(value) for value in codes[:, 0]]
        largest, normal = {}, lambda value: (1 + math.erf(value / math.sqrt(2))) / 2
        for sign in (-1, 1):  # the only directions in one dimension
            signed = [sign * value for value in values]
            largest[sign] = max(abs(sum(other <= point for other in signed) / len(signed) - normal(value))
                                for value in signed for point in (value, value - 1e-9))
        self.check_close(largest[1], largest[-1], "the reference is wrong")
        self.check_close(self.metrics.ks_distance(codes, projections=5), largest[1], "the KS distance is wrong")

    def test_ks_distance_is_the_mean_over_projections(self):
        codes = self.codes(30, 4)
        directions = torch.randn(4, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        each = [self.metrics.ks_distance(codes.double() @ (direction / direction.norm())[:, None])
                for direction in directions.T]
        self.check_close(self.metrics.ks_distance(codes, 7, seed=5), sum(each) / 7, "the mean over the projections is wrong")

    def test_ks_distance_of_the_prior_and_of_a_point(self):
        self.check_close(self.metrics.ks_distance(torch.randn(10_000, 8)), 0.8687 / 100,
                         "the KS distance of 10,000 draws from the prior is not what Kolmogorov's distribution says", 1e-3)
        self.check_close(self.metrics.ks_distance(torch.zeros(50, 8)), 0.5, "a point in the middle has a distance of 1/2")

    def test_frechet_to_prior(self):
        codes = self.codes().double().numpy()
        mean, covariance = codes.mean(0), np.cov(codes.T)
        expected = mean @ mean + np.trace(covariance) + 3 - 2 * np.sqrt(np.linalg.eigvals(covariance)).sum()
        self.check_close(self.metrics.frechet_to_prior(torch.from_numpy(codes)), expected,
                         "the Frechet distance to the prior is wrong")
        shifted = torch.tensor([[-2.0], [2.0], [-2.0], [2.0]]) * math.sqrt(3) / 2 + 5  # mean 5, standard deviation 2
        self.check_close(self.metrics.frechet_to_prior(shifted), 5**2 + (2 - 1)**2, "the distance to N(5, 4) is 25 + 1")

    def test_frechet_distance_of_two_sets(self):
        one, two = self.codes(50, 5).double().numpy(), self.codes(60, 5).double().numpy()
        product = np.linalg.eigvals(np.cov(one.T) @ np.cov(two.T))  # of a matrix that is not symmetric
        difference = one.mean(0) - two.mean(0)
        expected = difference @ difference + np.trace(np.cov(one.T) + np.cov(two.T)) - 2 * np.sqrt(product.real).sum()
        self.check_close(self.metrics.frechet(torch.from_numpy(one), torch.from_numpy(two)), expected,
                         "the Frechet distance is wrong")

    def test_frechet_distance_of_gaussians_with_the_same_axes(self):
        axes = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        points = torch.cat([torch.eye(4), -torch.eye(4)]).double() * math.sqrt(7 / 2)  # mean 0, covariance 1
        one, two = torch.tensor([1.0, 2, 3, 0]).double(), torch.tensor([2.0, 0.5, 3, 1]).double()  # 0: a dead feature
        self.check_close(self.metrics.frechet(points * one @ axes, points * two @ axes + 1), (one - two).square().sum() + 4,
                         "the Frechet distance of Gaussians with the same axes is the sum over them")

    def test_frechet_distance_of_a_set_to_itself(self):
        features = torch.randn(20, 64) @ torch.randn(64, 64)  # fewer than dimensions: a singular covariance
        self.check_close(self.metrics.frechet(features, features), 0, "the distance of a set to itself is not 0", 1e-4)

    def test_mmd_is_the_unbiased_estimate(self):
        codes, prior = self.codes(6).tolist(), torch.randn(5, 3).tolist()
        kernel = lambda x, y: 6 / (6 + sum((a - b)**2 for a, b in zip(x, y)))
        pairs = lambda points: [kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j]
        across = [kernel(x, y) for x in codes for y in prior]
        expected = sum(pairs(codes)) / 30 + sum(pairs(prior)) / 20 - 2 * sum(across) / 30
        self.check_close(self.metrics.mmd(torch.tensor(codes), torch.tensor(prior)), expected, "the MMD is wrong", 1e-7)

    def test_mmd_in_chunks_and_of_the_prior(self):
        codes, prior = torch.randn(1200, 2), torch.randn(1100, 2)
        with mock.patch.object(self.metrics, "CHUNK", 10_000):
            whole = self.metrics.mmd(codes, prior)
        self.check_close(self.metrics.mmd(codes, prior), whole, "the MMD depends on the chunks", 1e-10)
        several = [self.metrics.mmd(torch.randn(100, 2), torch.randn(100, 2)) for _ in range(200)]
        self.check(abs(np.mean(several)) < 4 * np.std(several) / math.sqrt(200),
                   f"the MMD of the prior to itself is not 0 on average, but {np.mean(several):.2g}")

    def test_parzen_log_likelihood(self):
        samples, images, sigma = torch.rand(30, 1, 28, 28), torch.rand(7, 1, 28, 28), 0.3
        expected = []
        for image in images.double():
            logs = [-0.5 * ((image - sample) / sigma).square().sum() - 784 * math.log(sigma * math.sqrt(2 * math.pi))
                    for sample in samples.double()]
            expected.append(torch.logsumexp(torch.stack(logs), 0) - math.log(30))
        values = self.metrics.parzen_log_likelihood(samples, images, sigma)
        self.assertEqual(values.shape, (7,))
        for value, right in zip(values, expected):
            self.check_close(value, right, "the Parzen log-likelihood is wrong", 1e-6)

    def test_parzen_window_of_one_sample_is_a_gaussian(self):
        image = torch.rand(1, 784)
        normal = torch.distributions.Normal(torch.zeros(784, dtype=torch.float64), 0.2)
        value = self.metrics.parzen_log_likelihood(torch.zeros(1, 784), image, 0.2)
        self.check_close(value, normal.log_prob(image.double()).sum(),
                         "the Parzen log-likelihood with one sample is not that of a Gaussian", 1e-6)

    def test_sigma_is_the_best_one(self):
        samples = torch.rand(1, 784).expand(20, 784)
        images = samples[:1] + 0.37 * torch.randn(600, 784)
        best = (images - samples[:1]).square().mean().sqrt()  # the likeliest sigma of a Gaussian around a known mean
        self.check_close(self.metrics.choose_sigma(samples, images), best, "sigma is not the likeliest one", 0.005)

    def test_sigma_at_the_edge_of_the_grid_is_refused(self):
        samples = torch.rand(20, 784)
        for edges in ({"low": 0.5}, {"high": 0.1}):
            with self.assertRaises(ValueError):
                self.metrics.choose_sigma(samples, samples[:1] + 0.2 * torch.randn(30, 784), **edges)

    def test_near_images_do_not_suffer_from_cancellation(self):
        samples = torch.ones(3, 784)
        images = samples + 1e-3
        distances = self.metrics.squared_distances(*self.metrics.centered(samples, images))
        self.check_close(distances.mean() / 784e-6, 1, "squared distances of like images are lost in rounding", 1e-3)


class Evaluation(TrainGroup):
    """evaluate.py on a model of the bundled digits, and classifier.py."""

    needs = ("evaluate", "classifier", "train", "mnist", "models", "metrics")

    def setUp(self):
        super().setUp()
        few = mock.patch.object(self.evaluate, "SAMPLES", 300)
        few.start()
        self.addCleanup(few.stop)

    def a_run(self, z_dim=3, **settings):
        """Return a run's folder with the weights of a new model."""
        run = self.folder() / "run"
        (run / "checkpoints").mkdir(parents=True)
        settings = {"z_dim": z_dim, "networks": "residual", "trained_on": "digits", "data_dir": "nowhere", **settings}
        (run / "hparams.json").write_text(json.dumps(settings))
        torch.save(self.models.AdversarialAE(z_dim).state_dict(), run / "checkpoints" / "model_checkpoint.pt")
        return run

    def evaluate_cli(self, *flags):
        """Run the command line in this process; return its exit status, standard output and standard error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = self.evaluate.cli([str(flag) for flag in flags] + ["--no-cuda"])
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def metrics_of(self, run, *flags):
        status, out, err = self.evaluate_cli(run, *flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads((run / "evaluation" / "metrics.json").read_text()), out

    def assert_refused(self, *fragments, flags):
        status, _, err = self.evaluate_cli(*flags)
        self.assertEqual(status, 1, err)
        self.assertRegex(err, r"\Aevaluate\.py: error: [^\n]+\n\Z")
        for fragment in fragments:
            self.assertIn(str(fragment), err)

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_of(run)
        for file, content in before.items():
            self.assertEqual(file.read_bytes(), content, f"{file} was changed")
        model = self.models.AdversarialAE(z_dim=2)
        model.load_state_dict(state)
        images, labels = self.mnist.load_digits(train=False)
        with torch.no_grad():
            recon_x, codes = model.eval()(images)
        errors = ((recon_x - images).double()**2).mean((1, 2, 3))
        self.check_close(metrics["reconstruction"]["mse"], errors.mean(), "the reconstruction error is wrong")
        for label in range(10):
            self.check_close(metrics["reconstruction"]["mse_per_label"][str(label)], errors[labels == label].mean(),
                             f"the reconstruction error of label {label} is wrong")
        match = metrics["prior_match"]
        self.check_close(match["codes"]["std"][1], codes[:, 1].double().std(), "the standard deviation of the codes is wrong")
        self.check_close(match["codes"]["ks"], self.metrics.ks_distance(codes), "the KS distance is not the test codes'")
        with torch.no_grad():
            seen = model.encoder(self.mnist.load_digits(train=True)[0][:749])
        self.check_close(match["training_codes"]["mean"][1], seen[:, 1].double().mean(), "the training codes' mean is wrong")
        self.check_close(match["prior_draws"]["ks"], 0.8687 / math.sqrt(299), "the prior's draws are not from the prior", 0.03)
        self.check(abs(match["prior_draws"]["mmd"]) < 0.005, "the prior's draws are not from the prior")
        self.assertEqual((metrics["test_images"], metrics["z_dim"], metrics["trained_on"]), (299, 2, "digits"))
        self.assertRegex(out, r"(?s)z_dim 2, deterministic encoder, residual networks, 299 test images of the bundled digits.*"
                              r"Parzen log-likelihood of.*  nats +-?\d+\.\d \+- \d+\.\d")
        self.assertIn(f"{errors.mean():.4f}", out)

    def test_pictures(self):
        from PIL import Image

        run = self.a_run(z_dim=2)
        self.metrics_of(run)
        side = lambda count: 2 * (30 * count + 2)
        expected = {"samples.png": (side(8), side(8)), "nearest.png": (side(8), side(2)), "manifold.png": (side(20), side(20)),
                    "reconstructions.png": (side(10), side(8)), "interpolations.png": (side(12), side(10)),
                    "codes.png": (910, 800)}
        sizes = {}
        for file in (run / "evaluation").glob("*.png"):
            with Image.open(file) as image:
                sizes[file.name] = image.size
        self.assertEqual(sizes, expected)
        images, labels = self.mnist.load_digits(train=False)
        shown = read_png(run / "evaluation" / "reconstructions.png")[4:60:2, 4 + 3 * 60:60 * 4:2]
        third = images[labels == 3][0, 0]
        self.assertTrue(np.array_equal(shown, ((third + 1) * 127.5).round()), "the fourth column does not begin with a 3")

    def test_training_images_are_split_evenly(self):
        images = torch.arange(60_000)
        seen, last = self.evaluate.split_training_images(images)
        self.assertEqual((len(seen), len(last), last[0], last[-1]), (10_000, 1_000, 59_000, 59_999))
        self.assertEqual(seen.diff().unique().tolist(), [5])
        seen, last = self.evaluate.split_training_images(images[:10])
        self.assertEqual((seen.tolist(), last.tolist()), ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]))

    def test_log_likelihood_is_compared_with_that_of_training_images(self):
        model, (images, labels) = self.models.AdversarialAE(z_dim=2), self.mnist.load_digits()
        with mock.patch.object(self.evaluate, "SAMPLES", 300):
            found = self.evaluate.evaluate(model, images, images[-300:], labels[-300:])["log_likelihood"]
        with torch.no_grad():
            reconstructions = model.eval()(images[:749])[0]
        for name, windows in (("training_images", images[:749]), ("training_reconstructions", reconstructions)):
            expected = self.evaluate.log_likelihood(windows, images[749:], images[-300:])
            self.assertEqual(found[name]["samples"], 749)
            self.check_close(found[name]["mean"], expected["mean"], f"the log-likelihood with {name} is wrong")
        self.assertGreater(found["training_images"]["mean"], found["training_reconstructions"]["mean"] + 10)

    def test_log_likelihood_is_that_of_images_in_0_1(self):
        images, _ = self.mnist.load_digits()
        samples, held_out, test = images[:300], images[300:500], images[500:600]
        result = self.evaluate.log_likelihood(samples, held_out, test)
        values = self.metrics.parzen_log_likelihood((samples + 1) / 2, (test + 1) / 2, result["sigma"])
        self.assertTrue(0.06 < result["sigma"] < 0.15, result)  # it would be twice as much for images in [-1, 1]
        self.check_close(result["mean"], values.mean(), "the mean log-likelihood is wrong")
        self.check_close(result["standard_error"], values.std() / 10, "the standard error is wrong")

    def test_classifier_quality_knows_good_samples_from_bad_ones(self):
        images, labels = self.mnist.load_digits()
        quality = self.evaluate.classifier_quality({
            "good": images[:500], "threes": images[labels == 3], "noise": images_like_mnist(300),
            "test_images": images[500:1000]})
        distances = [quality[name]["frechet_to_test_images"] for name in ("good", "threes", "noise")]
        self.assertLess(5 * distances[0], min(distances[1:]), distances)
        self.assertGreater(quality["threes"]["labels"]["3"], 0.8)
        for own in (quality["good"], quality["noise"]):
            self.check_close(sum(own["labels"].values()), 1, "the shares of the labels do not add up to 1")
        classifier = self.classifier.load_classifier()
        with torch.no_grad():
            sure = (classifier(images[:500]).softmax(1).amax(1) >= 0.95).double().mean()
        self.check_close(quality["good"]["sure"], sure, "the share that the classifier is sure of is wrong")

    def test_same_seed_same_numbers(self):
        run = self.a_run()
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            metrics, _ = self.metrics_of(run, "--seed", seed)
            results.append({name: value for name, value in metrics.items() if name not in ("seconds", "seed")})
        self.assertEqual(results[0], results[1])
        self.assertNotEqual(results[0]["log_likelihood"], results[2]["log_likelihood"])

    def test_model_is_left_as_it_was(self):
        model = self.models.AdversarialAE(z_dim=2).train()
        images, labels = self.mnist.load_digits(train=False)
        before, streams = snapshot(model), self.train.random_states(model)
        self.evaluate.evaluate(model, images, images[:50], labels[:50])
        self.evaluate.draw_pictures(model, images, images[:50], labels[:50])
        self.assertTrue(same(before[0], snapshot(model)[0]))
        self.assertEqual(before[1], snapshot(model)[1])
        for name, stream in self.train.random_states(model).items():
            self.assertTrue(torch.equal(stream, streams[name]), f"the random stream {name} was moved")

    def test_interpolation_goes_along_the_sphere(self):
        start, end = torch.randn(8), 2 * torch.randn(8)
        path = self.evaluate.interpolate(start, end, torch.linspace(0, 1, 5))
        for code, expected in ((path[0], start), (path[4], end)):
            self.assertTrue(torch.allclose(code, expected, atol=1e-5), "the path does not lead from one code to the other")
        norms = path.norm(dim=1)
        self.assertTrue(torch.allclose(norms.diff(), norms.diff().mean().expand(4), atol=1e-5), "the norm changes unevenly")
        turns = nn.functional.cosine_similarity(path[1:], path[:-1]).acos()
        self.assertTrue(torch.allclose(turns, turns.mean().expand(4), atol=1e-3), "the direction turns unevenly")
        for end in (-start, start, torch.zeros(8)):
            self.assertTrue(self.evaluate.interpolate(start, end, torch.linspace(0, 1, 5)).isfinite().all())

    def test_nearest_training_image(self):
        images, _ = self.mnist.load_digits()
        found = self.evaluate.nearest(images[[700, 3]] + 0.1 * images_like_mnist(2), images)
        self.assertTrue(torch.equal(found, images[[700, 3]]))

    def test_manifold_has_the_prior_quantiles(self):
        model = TinyAAE()
        model.decoder = Recorder(self.models.ConvDecoder(2))
        with torch.no_grad():
            self.evaluate.draw_manifold(model, side=4)
        codes, = model.decoder.inputs
        quantiles = torch.erf(codes / math.sqrt(2)) / 2 + 0.5
        self.assertTrue(torch.allclose(quantiles[:5, 0], torch.tensor([1, 3, 5, 7, 1]) / 8),
                        "the first dimension does not grow to the right, over the quantiles")
        self.assertTrue(torch.allclose(quantiles[::4, 1], torch.tensor([7, 5, 3, 1]) / 8),
                        "the second dimension does not grow upwards, over the quantiles")

    def test_weights_without_a_run(self):
        folder = self.folder()
        torch.save(self.models.AdversarialAE(5).state_dict(), folder / "some.pt")
        few = [tensor[:200] for tensor in self.mnist.load_digits()]
        with mock.patch.object(self.evaluate, "load_mnist", return_value=few) as load:
            status, out, err = self.evaluate_cli(folder / "some.pt", "--data_dir", "there")
        self.assertEqual((status, err, load.call_args.args[0]), (0, "", "there"))
        self.assertIn("z_dim 5, deterministic encoder, residual networks, 200 test images of MNIST", out)
        self.assertTrue((folder / "evaluation" / "metrics.json").is_file())

    def test_each_posterior_with_and_without_a_run(self):
        for kind in (("gaussian", "residual"), ("universal", "residual"), ("deterministic", "base"), ("universal", "base")):
            run = self.a_run(**dict(zip(("posterior", "networks"), kind)))
            model, path = self.models.AdversarialAE(3, *kind), run / "checkpoints" / "model_checkpoint.pt"
            torch.save(model.state_dict(), path)
            found = self.evaluate.settings_from_weights(path, model.state_dict())
            for settings in (self.metrics_of(run)[0], found):
                self.assertEqual((settings["posterior"], settings["networks"]), kind)

    def test_older_runs_have_base_networks(self):
        run = self.a_run(networks="base")
        settings = json.loads((run / "hparams.json").read_text())
        del settings["networks"]
        (run / "hparams.json").write_text(json.dumps(settings))
        torch.save(self.models.AdversarialAE(3, networks="base").state_dict(), run / "checkpoints" / "model_checkpoint.pt")
        self.assertEqual(self.metrics_of(run)[0]["networks"], "base")

    def test_weights_within_a_run(self):
        run = self.a_run()
        self.assertEqual(self.evaluate_cli(run / "checkpoints" / "model_checkpoint.pt")[0], 0)
        self.assertTrue((run / "evaluation" / "metrics.json").is_file())

    def test_what_is_no_run(self):
        folder = self.folder()
        self.assert_refused(folder / "none", "is not there", flags=[folder / "none"])
        self.assert_refused(folder, "no hparams.json", flags=[folder])
        (folder / "hparams.json").write_text('{"z_dim": 8}')
        self.assert_refused(folder, "model_checkpoint.pt yet", flags=[folder])
        self.assertEqual(self.evaluate_cli()[0], 2)
        self.assertEqual(self.evaluate_cli(folder, "--seed", -1)[0], 2)

    def test_diverged_model_is_refused(self):
        run = self.a_run()
        file = run / "checkpoints" / "model_checkpoint.pt"
        weights = torch.load(file, weights_only=True)
        torch.save({name: 1e10 * tensor for name, tensor in weights.items()}, file)
        status, _, err = self.evaluate_cli(run)
        self.assertEqual((status, err.count("\n")), (1, 1), err)
        self.assertIn("its training has diverged", err)

    def test_damaged_settings(self):
        run = self.a_run()
        for content in ("", "{", "[]", "null", "{}", '{"z_dim": "8"}', '{"z_dim": 0}', '{"z_dim": true}', "\ud8ff",
                        '{"z_dim": 8, "trained_on": "cifar"}', '{"z_dim": 8, "posterior": "none"}',
                        '{"z_dim": 8, "posterior": []}', '{"z_dim": 8, "data_dir": 3}', "[" * 100_000):
            (run / "hparams.json").write_bytes(content.encode("utf-8", "surrogatepass"))
            self.assert_refused("hparams.json is damaged", flags=[run])

    def test_damaged_weights(self):
        run = self.a_run()
        weights = run / "checkpoints" / "model_checkpoint.pt"
        whole = weights.read_bytes()
        for content in (b"", b"nonsense", whole[:-100], whole[:5000] + bytes(64) + whole[5064:]):
            weights.write_bytes(content)
            self.assert_refused(weights, "is damaged", flags=[run])
        for content, words in (([1, 2], "something else"), ({"encoder": {}}, "something else"), ({}, "does not fit"),
                               (self.models.AdversarialAE(4).state_dict(), "does not fit"),
                               ({"weight": torch.tensor([math.nan])}, "diverged")):
            torch.save(content, weights)
            self.assert_refused(weights, words, flags=[run])
        torch.save({"weight": torch.zeros(3)}, run / "other.pt")
        self.assert_refused(run / "other.pt", "another model", flags=[run / "other.pt"])

    def test_missing_mnist(self):
        run = self.a_run(trained_on="mnist")
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_refused("could not be downloaded", flags=[run, "--data_dir", self.folder()])

    def test_folder_that_cannot_be_written(self):
        run = self.a_run()
        (run / "evaluation").write_text("a file in its place")
        self.assert_refused(run / "evaluation", "cannot be written", flags=[run])

    def test_full_disk(self):
        run = self.a_run()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            self.assert_refused(run / "evaluation", "No space left", flags=[run])
        self.assertEqual(list((run / "evaluation").iterdir()), [])

    def test_programming_errors_keep_their_traceback(self):
        with mock.patch.object(self.evaluate, "main", side_effect=RuntimeError("a bug")), self.assertRaises(RuntimeError):
            self.evaluate_cli("run")

    def test_missing_or_damaged_classifier(self):
        run, weights = self.a_run(), self.folder() / "digit_classifier.pt"
        with mock.patch.object(self.classifier, "WEIGHTS", weights):
            self.assert_refused(weights, "is missing; put it back", flags=[run])
            whole = bytearray(self.classifier.packed(self.classifier.DigitClassifier().half().state_dict()))
            whole[len(whole) // 2] ^= 64  # one bit, which torch.load alone does not notice
            for content in (b"half", bytes(whole), self.classifier.packed([1])):
                weights.write_bytes(content)
                self.assert_refused(weights, "is damaged", flags=[run])
        self.assertFalse((run / "evaluation").exists())

    def test_classifier_knows_digits(self):
        classifier = self.classifier.load_classifier()
        images, labels = self.mnist.load_digits(train=False)
        self.assertGreater(self.classifier.accuracy(classifier, images, labels), 0.85)
        features, probabilities = self.classifier.features_and_probabilities(classifier, images)
        self.assertEqual((features.shape, probabilities.shape), ((299, 64), (299, 10)))
        self.assertGreaterEqual(float(features.min()), 0)
        self.assertTrue(torch.allclose(probabilities, classifier(images).softmax(1), atol=1e-5))
        self.assertEqual({tensor.dtype for tensor in classifier.parameters()}, {torch.float32})
        self.assertLess(self.classifier.WEIGHTS.stat().st_size, 1e6)

    def test_classifier_is_trained(self):
        images, labels = (tensor[:600] for tensor in self.mnist.load_digits())
        trained = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            trained.append(self.classifier.train_classifier(self.mnist.BatchLoader(images, labels, 60), 2, seed))
        self.assertGreater(self.classifier.accuracy(trained[0], images, labels), 0.7)
        self.assertTrue(same(trained[0].state_dict(), trained[1].state_dict()), "two trainings with one seed differ")
        self.assertFalse(same(trained[0].state_dict(), trained[2].state_dict()), "two seeds gave the same weights")

    def test_distorted_images_stay_digits(self):
        image = self.mnist.load_digits()[0][:1].expand(200, 1, 28, 28)
        distorted = self.classifier.distorted(image)
        self.assertLessEqual(float(distorted.abs().max()), 1 + 1e-6)
        self.assertTrue((distorted[:, :, 0, 0] == -1).all(), "what comes in from outside is not the background")
        ink = lambda images: (images + 1).sum((1, 2, 3)).mean()
        self.check_close(ink(distorted) / ink(image), 1, "the digits lose or gain ink", 0.05)
        self.assertLess(float((distorted.mean(0) - image[0]).abs().mean()), 0.3)


@unittest.skipUnless(torch.cuda.is_available(), "there is no CUDA here")
class Cuda(TrainGroup):
    """What only a GPU can show."""

    needs = (*TrainGroup.needs, "device")

    def setUp(self):
        super().setUp()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when the first test multiplies matrices
        self.device.set_precision("fp32", torch.device("cuda"))

    def train_on_cuda(self, *flags):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run = self.train.main(self.train.parse_args(["--dataset", "digits", "--epochs", "2", "--log_dir",
                                                         str(self.folder()), *flags]))
        self.assertIn("device: cuda", out.getvalue())
        return torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)

    def test_checkpoint_is_on_the_cpu(self):
        state = self.train_on_cuda()
        self.assertEqual({tensor.device.type for tensor in state.values()}, {"cpu"})
        self.models.AdversarialAE().load_state_dict(state)

    def test_same_bits_with_deterministic_kernels(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        self.assertTrue(same(*(self.train_on_cuda("--deterministic") for _ in range(2))))

    def test_pictures_leave_the_streams_alone(self):
        model, writer = self.models.AdversarialAE().cuda(), self.writer()
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        self.train.generate_and_save(model, 0, writer)
        model.sample = lambda count: model.decoder(torch.randn(count, model.z_dim, device="cuda"))
        self.train.generate_and_save(model, 1, writer)
        for state, after in zip(before, (torch.get_rng_state(), torch.cuda.get_rng_state())):
            self.assertTrue(torch.equal(state, after))

    def test_losses_agree_with_the_cpu(self):
        model, x = self.models.AdversarialAE(), images_like_mnist(16)
        losses = []
        for device in ("cpu", "cuda"):
            model, x = model.to(device), x.to(device)
            recon_x, z = model(x)
            losses.append(model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].item())
        self.check_close(losses[1], losses[0], "the autoencoder's loss on CUDA is not that on the CPU", 1e-3)

    def test_evaluation_agrees_with_the_cpu(self):
        evaluate = importlib.import_module("evaluate")
        model, (images, labels) = self.models.AdversarialAE(), self.mnist.load_digits(train=False)
        results = []
        with mock.patch.object(evaluate, "SAMPLES", 300):
            for device in ("cpu", "cuda"):
                results.append(evaluate.evaluate(model.to(device), images, images, labels))
                evaluate.draw_pictures(model, images, images, labels)
        for names in (("reconstruction", "mse"), ("prior_match", "codes", "ks"), ("prior_match", "codes", "mmd"),
                      ("log_likelihood", "mean"), ("digit_classifier", "samples", "frechet_to_test_images")):
            values = [functools.reduce(dict.get, names, result) for result in results]
            self.check_close(values[1], values[0], f"{'/'.join(names)} on CUDA is not that on the CPU", 1e-3)

    def trained_for_200_steps(self, capturable):
        """Return weights and values after 200 steps, captured or not; batches of two sizes, the same draws."""
        torch.manual_seed(0)
        model, images = self.models.AdversarialAE().cuda(), images_like_mnist(64).cuda()
        model.capturable = capturable
        args = self.train.parse_args([])
        optimizers = self.train.build_optimizers(model, args)
        step = self.train.build_step(model, *optimizers, args)
        self.assertEqual(isinstance(step, self.train.CapturedStep), capturable)
        values = []
        for number in range(200):
            self.train.set_rate(optimizers[0], 90 + number // 100, args)  # drops halfway, when the graphs are captured
            parts = step(images[:32] if number % 4 == 3 else images)
            values.append(torch.stack([value.clone() for part in parts for value in part.values()]))
        return model.state_dict(), torch.stack(values).cpu()

    def test_captured_step_is_the_eager_step(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        self.train.choose_device(deterministic=True)
        self.train.set_precision("fp32", torch.device("cuda"))
        weights, values = self.trained_for_200_steps(capturable=True)
        eager_weights, eager_values = self.trained_for_200_steps(capturable=False)
        torch.testing.assert_close(values, eager_values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, eager_weights, rtol=1e-3, atol=1e-4)

    def test_every_precision_trains(self):
        for precision in ("fp32", "tf32", "bf16"):
            state = self.train_on_cuda("--precision", precision)
            self.assertTrue(all(tensor.isfinite().all() and tensor.dtype in (torch.float32, torch.int64)
                                for tensor in state.values()))

    def test_resumed_to_the_bit(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        weights = self.train_on_cuda("--deterministic")
        log_dir = self.folder()
        self.run_cli("--dataset", "digits", "--epochs", 1, "--deterministic", "--log_dir", log_dir)
        self.assertEqual(self.run_cli("--resume", "latest", "--epochs", 2, "--log_dir", log_dir)[0], 0)
        [file] = log_dir.glob("*/checkpoints/model_checkpoint.pt")
        self.assertTrue(same(torch.load(file, weights_only=True), weights))


if __name__ == "__main__":
    unittest.main()
