"""Tests of the adversarial autoencoder, on the CPU and without a network:  python unittests.py

The groups in this file, Networks, Losses and Mistakes, use nothing but the interface of the assignment. To check your own
models.py, put this file beside it and run:  python unittests.py Networks Losses Mistakes
A test that fails says in words what is wrong. The other groups are in tests/; python unittests.py Resume runs one of them.
"""

import importlib
import io
import math
import signal
import sys
import tempfile
import unittest
from pathlib import Path

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
            setattr(cls, name.rpartition(".")[2], importlib.import_module(name))

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


# All groups ----------------------------------------------------------------------------------------------------------

def load_groups():
    """Add the groups in this project's tests/ to those of this file; do nothing where that folder is missing."""
    if not (HERE / "tests" / "common.py").is_file():
        return
    sys.modules["unittests"] = sys.modules[__name__]  # what tests/ import from here is of this module, not of a second one
    for file in sorted((HERE / "tests").glob("*.py")):
        for name, group in vars(importlib.import_module(f"tests.{file.stem}")).items():
            if isinstance(group, type) and issubclass(group, Group):
                globals()[name] = group


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background, and so its children, may ignore it
    load_groups()
    unittest.main()
