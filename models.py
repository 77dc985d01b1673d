"""The networks of an adversarial autoencoder for 28x28 images, and its losses.

Makhzani et al., "Adversarial Autoencoders", arXiv:1511.05644. An encoder E and a decoder R are trained to reconstruct
images, while a discriminator D learns to tell codes E(x) from samples of the prior N(0, I), and the encoder learns
to fool it. With V = E_x[log(1 - D(E(x)))] + E_z[log D(z)], the objective is

    min over E, R of { (1 - lambda) max over D of V(D, E) + lambda E_x ||x - R(E(x))||^2 }.

The code takes the mean over the 784 pixels in place of the sum in ||.||^2. Its default lambda 0.995 weights the sum by
0.995 / 784 = 0.00127 and the adversarial term by 0.005: in the formula's units, lambda is 0.20.

This file imports no other file of the project.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

REAL, FAKE = 1.0, 0.0  # the discriminator's labels: prior sample, encoder's code


# The networks that the assignment suggests ---------------------------------------------------------------------------

def base_encoder(outputs):
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(),   # 28x28 -> 14x14
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),  # 14x14 -> 7x7
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),  # 7x7 -> 4x4
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, outputs))


def base_decoder(z_dim):
    return nn.Sequential(
        nn.Linear(z_dim, 64 * 4 * 4), nn.ReLU(),
        nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),                    # 4x4 -> 7x7
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),  # 7x7 -> 14x14
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1), nn.Tanh())   # 14x14 -> 28x28


# Ours: batch normalisation, SiLU, and a residual MLP between convolutions and code -----------------------------------
# To match the prior, the encoder must merge the clusters of the ten digits into one Gaussian without gaps, and the
# decoder must undo this. One linear layer cannot. Convolutions that keep the size, as in the base networks, would
# double the time of a step and gain nothing (docs/ABLATION.md). These have no bias, which BatchNorm2d would cancel.

WIDTH = 128  # of the residual MLP


def residual_encoder(outputs):
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.SiLU(),   # 28x28 -> 14x14
        nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.SiLU(),  # 14x14 -> 7x7
        nn.Conv2d(48, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),  # 7x7 -> 4x4
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, WIDTH), ResidualBlock(), ResidualBlock(), ResidualBlock(), nn.SiLU(),
        nn.Linear(WIDTH, outputs))


def residual_decoder(z_dim):
    return nn.Sequential(
        nn.Linear(z_dim, WIDTH), ResidualBlock(), ResidualBlock(), ResidualBlock(), nn.SiLU(),
        nn.Linear(WIDTH, 64 * 4 * 4), nn.SiLU(),
        nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.SiLU(),  # 4x4 -> 7x7
        nn.ConvTranspose2d(48, 24, 3, stride=2, padding=1, output_padding=1, bias=False), nn.BatchNorm2d(24), nn.SiLU(),
        nn.ConvTranspose2d(24, 1, 3, stride=2, padding=1, output_padding=1), nn.Tanh())  # 7x7 -> 14x14 -> 28x28


class ResidualBlock(nn.Module):
    """Adds to features [B, WIDTH] an MLP of them (He et al. 2016, "Identity mappings in deep residual networks")."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.net(x)


NETWORKS = {"residual": (residual_encoder, residual_decoder), "base": (base_encoder, base_decoder)}


class Network(nn.Module):
    """What encoder, decoder and discriminator share: the layers `net`, and the device of their weights."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    @property
    def device(self):
        return next(self.parameters()).device


class ConvEncoder(Network):
    """Maps images [B, 1, 28, 28] in [-1, 1] to latent codes [B, z_dim] without noise; `networks` is one of NETWORKS."""

    def __init__(self, z_dim, networks="residual"):
        super().__init__(NETWORKS[networks][0](z_dim))


class GaussianEncoder(ConvEncoder):
    """Maps images to samples of q(z|x) = N(mean(x), diag(exp(log_variance(x)))), anew in every call.

    Gradients pass through mean and variance (reparameterization, Kingma and Welling, arXiv:1312.6114, section 2.4).
    """

    def __init__(self, z_dim, networks="residual"):
        super().__init__(2 * z_dim, networks)

    def forward(self, x):
        mean, log_variance = self.net(x).chunk(2, dim=1)
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)


class UniversalEncoder(ConvEncoder):
    """Maps images to samples of a q(z|x) of any form, with noise from N(0, I) as an input (Makhzani et al., section 2).

    The noise, new in every call, is appended to HIDDEN features of the image, and a hidden layer mixes the two.
    """

    HIDDEN, NOISE = 128, 16

    def __init__(self, z_dim, networks="residual"):
        super().__init__(self.HIDDEN, networks)
        self.mix = nn.Sequential(
            nn.Linear(self.HIDDEN + self.NOISE, self.HIDDEN), nn.ReLU(),
            nn.Linear(self.HIDDEN, z_dim))

    def forward(self, x):
        features = F.relu(self.net(x))
        noise = torch.randn(x.shape[0], self.NOISE, device=x.device).to(features)
        return self.mix(torch.cat([features, noise], dim=1))


class ConvDecoder(Network):
    """Maps latent codes [B, z_dim] to images [B, 1, 28, 28] in [-1, 1]; its layers mirror the encoder's."""

    def __init__(self, z_dim, networks="residual"):
        super().__init__(NETWORKS[networks][1](z_dim))
        # Start at MNIST's mean pixel: from a brighter start, the first steps drive tanh to -1, where gradients vanish.
        nn.init.constant_(self.net[-2].bias, math.atanh(-0.74))


class Discriminator(Network):
    """Maps latent codes [B, z_dim] to logits [B, 1]: above 0 for "from the prior", below 0 for "from the encoder"."""

    def __init__(self, z_dim):
        super().__init__(nn.Sequential(
            nn.Linear(z_dim, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1)))


Encoder, Decoder = ConvEncoder, ConvDecoder  # names that other solutions of the assignment use
ENCODERS = {"deterministic": ConvEncoder, "gaussian": GaussianEncoder, "universal": UniversalEncoder}  # by their q(z|x)


class AdversarialAE(nn.Module):
    """An adversarial autoencoder, its losses and sampling; `posterior` is a key of ENCODERS, `networks` of NETWORKS."""

    capturable = True  # the losses copy nothing between host and device, so a CUDA graph can capture them

    def __init__(self, z_dim=8, posterior="deterministic", networks="residual"):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = ENCODERS[posterior](z_dim, networks)
        self.decoder = ConvDecoder(z_dim, networks)
        self.discriminator = Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        """Return the reconstructions [B, 1, 28, 28] of images x and their codes [B, z_dim], in that order."""
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        """Return the loss of encoder and decoder, a scalar, and a dict of scalar tensors: the loss and its two parts.

        recon_loss is the mean squared error over pixels; gen_loss = -E_x[log D(E(x))], the non-saturating form of the
        encoder's adversarial term (Goodfellow et al., arXiv:1406.2661, section 3). Its gradient reaches the
        discriminator's weights too; clear it before their step.
        """
        recon_loss = F.mse_loss(recon_x, x)
        gen_loss = cross_entropy(self.discriminator(z_fake), REAL)
        ae_loss = lambda_ * recon_loss + (1 - lambda_) * gen_loss
        return ae_loss, {"gen_loss": gen_loss, "recon_loss": recon_loss, "ae_loss": ae_loss}

    def get_loss_discriminator(self, z_fake):
        """Return the discriminator's loss, a scalar, and a dict of scalar tensors: loss, its two halves, accuracy.

        disc_loss = -(E_z[log D(z)] + E_x[log(1 - D(E(x)))]) / 2, with as many prior samples z as there are codes z_fake
        [B, z_dim]. accuracy is over both halves, in [0, 1], with the threshold at logit 0. No gradient reaches the
        encoder.
        """
        z_fake = z_fake.detach()
        z_real = torch.randn_like(z_fake)
        logits_real, logits_fake = self.discriminator(torch.cat([z_real, z_fake])).chunk(2)
        loss_real = cross_entropy(logits_real, REAL)
        loss_fake = cross_entropy(logits_fake, FAKE)
        disc_loss = (loss_real + loss_fake) / 2
        accuracy = torch.cat([logits_real > 0, logits_fake < 0]).float().mean()
        return disc_loss, {"disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake,
                           "accuracy": accuracy}

    @torch.no_grad()
    def sample(self, batch_size):
        """Return images [batch_size, 1, 28, 28] in [-1, 1], decoded from prior samples; the model does not change."""
        z = torch.randn(batch_size, self.z_dim, device="cpu")  # the same seed gives the same codes on every device
        z = z.to(next(self.decoder.parameters()))
        modes = [(module, module.training) for module in self.decoder.modules()]
        try:
            return self.decoder.eval()(z)
        finally:
            for module, mode in modes:
                module.training = mode


def cross_entropy(logits, label):
    """Return the mean binary cross-entropy of logits [B, 1] with the same label for all, a scalar."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
