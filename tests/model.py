"""Features of models.py beyond the assignment's interface."""

import itertools
import math
from unittest import mock

import torch
import torch.nn as nn

from tests.common import same, snapshot
from unittests import ModelGroup, images_like_mnist

__unittest = True


class Promises(ModelGroup):
    """Features of this project's models.py beyond the interface; skipped for other models."""

    def setUp(self):
        super().setUp()
        if not hasattr(self.models.AdversarialAE(), "sample_stream"):
            self.skipTest("this model has no sample_stream, so it is not this project's")

    def test_sampling_follows_the_seed_and_changes_nothing(self):
        samples = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            model = self.models.AdversarialAE()
            with torch.no_grad():
                weights = {name: torch.full_like(value, 0.01) for name, value in model.state_dict().items()}
                model.load_state_dict(weights)
            samples.append(model.sample(4))
        self.assertTrue(torch.equal(samples[0], samples[1]))
        self.assertFalse(torch.equal(samples[0], samples[2]))
        model.train().decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5).eval())  # mixed modes
        states = []
        for _ in range(2):
            model.sample_stream.manual_seed(5)
            states.append(snapshot(model))
            images = model.sample(8)
        self.assertTrue(same(*states), "sampling changes the model or torch's random state")
        model.sample_stream.manual_seed(5)
        torch.testing.assert_close(images, model.eval().sample(8))

    def test_suggested_architecture(self):
        model = self.models.AdversarialAE(z_dim=8, networks="base")
        convolutions = sum(9 * i * o + o for i, o in itertools.pairwise((1, 32, 32, 64, 64, 64)))
        mirrored = convolutions - (32 + 32 + 64 + 64 + 64) + (64 + 64 + 32 + 32 + 1)  # other biases
        for part, count in (("encoder", convolutions + 1024 * 8 + 8), ("decoder", 8 * 1024 + 1024 + mirrored),
                            ("discriminator", 8 * 512 + 512 + 512 * 512 + 512 + 512 + 1)):
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
            self.assertTrue(all(weight.grad is None for weight in model.discriminator.parameters()))
            model.zero_grad()
            model.get_loss_discriminator(z)[0].backward()
            self.assertTrue(all(weight.grad is None for weight in model.encoder.parameters()), posterior)
            with torch.no_grad():
                again, evaluated = model.encoder(x), [model.eval().encoder(x) for _ in range(2)]
            for codes, repeated in ((z, again), evaluated):
                self.assertEqual(torch.equal(codes, repeated), posterior == "deterministic", posterior)
        self.assertRaises(KeyError, self.models.AdversarialAE, posterior="normal")
        self.assertRaises(KeyError, self.models.AdversarialAE, networks="other")

    def test_gaussian_codes_have_the_networks_mean_and_variance(self):
        encoder = self.models.ENCODERS["gaussian"](2)
        outputs = torch.tensor([3.0, -1.0, math.log(4), math.log(0.25)]).expand(100_000, 4)
        with mock.patch.object(encoder.net, "forward", return_value=outputs):
            z = encoder(torch.zeros(100_000, 1, 28, 28))
        for dimension, (mean, deviation) in enumerate([(3, 2), (-1, 0.5)]):
            self.check_close(z[:, dimension].mean(), mean, f"mean of dimension {dimension}", 0.02)
            self.check_close(z[:, dimension].std(), deviation, f"standard deviation of dimension {dimension}", 0.02)
        self.check_close(z.T.corrcoef()[0, 1], 0, "correlation of the two dimensions", 0.02)

    def test_universal_noise_does_more_than_shift_the_code(self):
        encoder, shifts = self.models.ENCODERS["universal"](2), []
        for x in images_like_mnist(2).split(1):
            torch.manual_seed(1)  # the same noise for both images
            with torch.no_grad():
                shifts.append(encoder(x) - encoder(x))
        self.check(not torch.allclose(*shifts, atol=1e-6), "the noise only shifts the codes, equally for all images")
