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
    """Features of this project's models.py beyond the interface."""

    def test_sampling_follows_the_seed_and_changes_nothing_else(self):
        model = self.models.AdversarialAE().train()
        model.decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5).eval())  # mixed modes
        torch.manual_seed(0)
        before, images = snapshot(model), []
        for seed, default_device in ((5, "cpu"), (5, "meta"), (6, "cpu")):  # torch's default must not matter
            torch.manual_seed(seed)
            with torch.device(default_device):
                images.append(model.sample(8))
            torch.manual_seed(0)
            self.assertTrue(same(snapshot(model), before), "sampling changes the model")
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
        self.assertFalse(torch.equal(*images[1:]))

    def test_suggested_networks(self):
        model = self.models.AdversarialAE(z_dim=8, networks="base")
        self.assertEqual([sum(weight.numel() for weight in part.parameters()) for part in model.children()],
                         [110120, 111073, 267777], "the layers are not those of the assignment")
        self.check_close(model.sample(16).mean(), -0.74, "from a start brighter than MNIST's mean pixel, the first "
                         "steps drive the decoder's tanh to -1 everywhere, with every fourth seed", 0.1)

    def test_every_posterior_keeps_the_interface(self):
        x = images_like_mnist(5)
        for posterior, networks in itertools.product(self.models.ENCODERS, self.models.NETWORKS):
            torch.manual_seed(0)
            model = self.models.AdversarialAE(z_dim=3, posterior=posterior, networks=networks)
            recon_x, z = model(x)
            self.assertEqual((recon_x.shape, z.shape), ((5, 1, 28, 28), (5, 3)))
            model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].backward()
            self.assertTrue(all(weight.grad.abs().sum() > 0 for weight in model.encoder.parameters()), posterior)
            model.zero_grad()
            model.get_loss_discriminator(z)[0].backward()
            self.assertTrue(all(weight.grad is None for weight in model.encoder.parameters()), posterior)
            with torch.no_grad():
                again, evaluated = model.encoder(x), [model.eval().encoder(x) for _ in range(2)]
            for codes, repeated in ((z, again), evaluated):
                self.assertEqual(torch.equal(codes, repeated), posterior == "deterministic", posterior)

    def test_gaussian_codes_have_the_networks_mean_and_variance(self):
        encoder = self.models.ENCODERS["gaussian"](2)
        outputs = torch.tensor([3.0, -1.0, math.log(4), math.log(0.25)]).expand(100_000, 4)
        with mock.patch.object(encoder.net, "forward", return_value=outputs):
            z = encoder(torch.zeros(100_000, 1, 1, 1))
        torch.testing.assert_close(z.mean(0), torch.tensor([3.0, -1.0]), atol=0.03, rtol=0)
        torch.testing.assert_close(z.T.cov(), torch.diag(torch.tensor([4, 0.25])), atol=0.08, rtol=0)
