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
        states, images = [], []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            with torch.device("meta" if states else "cpu"):  # like torch.set_default_device, which must not matter
                images.append(model.sample(8))
            torch.manual_seed(0)
            states.append(snapshot(model))
        self.assertTrue(same(*states[1:]), "sampling changes the model")
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
        self.assertFalse(torch.equal(*images[1:]))
        torch.manual_seed(6)
        torch.testing.assert_close(images[2], model.eval().sample(8))

    def test_suggested_architecture(self):
        layers = {  # pixels of the kernel, inputs, outputs
            "encoder": ((9, 1, 32), (9, 32, 32), (9, 32, 64), (9, 64, 64), (9, 64, 64), (1, 1024, 8)),
            "decoder": ((1, 8, 1024), (9, 64, 64), (9, 64, 64), (9, 64, 32), (9, 32, 32), (9, 32, 1)),
            "discriminator": ((1, 8, 512), (1, 512, 512), (1, 512, 1))}
        model = self.models.AdversarialAE(z_dim=8, networks="base")
        for part, sizes in layers.items():
            self.assertEqual(sum(weight.numel() for weight in getattr(model, part).parameters()),
                             sum(pixels * inputs * outputs + outputs for pixels, inputs, outputs in sizes), part)
        self.check_close(model.sample(16).mean(), -0.74, "from a start brighter than MNIST's mean pixel, the first "
                         "steps drive the decoder's tanh to -1 everywhere, with every fourth seed", 0.1)

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
            for codes, repeated in ((z, again), evaluated):
                self.assertEqual(torch.equal(codes, repeated), posterior == "deterministic", posterior)

    def test_gaussian_codes_have_the_networks_mean_and_variance(self):
        encoder = self.models.ENCODERS["gaussian"](2)
        outputs = torch.tensor([3.0, -1.0, math.log(4), math.log(0.25)]).expand(100_000, 4)
        with mock.patch.object(encoder.net, "forward", return_value=outputs):
            z = encoder(torch.zeros(100_000, 1, 1, 1))
        torch.testing.assert_close(z.mean(0), torch.tensor([3.0, -1.0]), atol=0.03, rtol=0)
        torch.testing.assert_close(z.T.cov(), torch.diag(torch.tensor([4, 0.25])), atol=0.08, rtol=0)

    @torch.no_grad()
    def test_universal_noise_does_more_than_shift_the_code(self):
        encoder, codes = self.models.ENCODERS["universal"](2), []
        for seed, image in itertools.product((1, 2), images_like_mnist(2)):
            torch.manual_seed(seed)
            codes.append(encoder(image[None]))
        self.check(not torch.allclose(codes[2] - codes[0], codes[3] - codes[1], atol=1e-6),
                   "the noise only shifts the code, by the same amount for every image")
