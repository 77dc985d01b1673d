"""One backward pass for the sum of both losses, each of which holds the other player fixed; margins, einsum."""

import os
import time
from copy import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from mnist import mnist
from utils import TensorBoardLogger


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(F.relu(x))))


class ConvEncoder(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 4, 4), Block(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, z_dim))

    def forward(self, x):
        return self.body(x)

    @property
    def device(self):
        return next(self.parameters()).device


class ConvDecoder(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(z_dim, 16 * 49), nn.Unflatten(1, (16, 7, 7)), Block(16), nn.ReLU(),
                                  nn.Conv2d(16, 16, 1), nn.PixelShuffle(4), nn.Tanh())

    def forward(self, z):
        return self.body(z)


class Discriminator(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.hidden, self.features = nn.Linear(z_dim, 80), nn.Linear(80, 80)
        self.direction, self.bias = nn.Parameter(torch.randn(80) / 9), nn.Parameter(torch.zeros(1))

    def forward(self, z):
        features = F.silu(self.features(F.silu(self.hidden(z))))
        return torch.einsum("bi,i->b", features, self.direction).unsqueeze(1) + self.bias

    @property
    def device(self):
        return self.direction.device


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = ConvEncoder(z_dim)
        self.decoder = ConvDecoder(z_dim)
        self.discriminator = Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        gen_loss = F.softplus(-functional_call(self.discriminator, fixed, (z_fake,))).mean()
        recon_loss = (recon_x - x).square().flatten(1).mean(1).mean()
        ae_loss = gen_loss + lambda_ * (recon_loss - gen_loss)
        return ae_loss, {"gen_loss": gen_loss, "recon_loss": recon_loss, "ae_loss": ae_loss}

    def get_loss_discriminator(self, z_fake):
        z = torch.cat([torch.randn_like(z_fake), z_fake.detach()])
        sign = torch.tensor([1.0, -1.0], device=z.device).repeat_interleave(len(z_fake)).unsqueeze(1)  # 1: real
        margin = sign * self.discriminator(z)
        loss_real, loss_fake = (half.mean() for half in F.softplus(-margin).chunk(2))
        disc_loss = 0.5 * (loss_real + loss_fake)
        return disc_loss, {"disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake,
                           "accuracy": (margin > 0).float().mean()}

    @torch.no_grad()
    def sample(self, batch_size):
        z = torch.randn(batch_size, self.z_dim, device=self.device)
        return copy(self.decoder)(z)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    grid = make_grid(model.sample(batch_size), 8, normalize=True, value_range=(-1.0, 1.0))
    _save(grid, "samples", epoch, summary_writer, "Prior_samples/samples_epoch_")


def save_reconstruction(model, epoch, summary_writer, data):
    pictures = torch.cat([data[:8].to(model.device), model(data[:8].to(model.device))[0].detach()])
    grid = make_grid(pictures, 8, normalize=True, value_range=(-1.0, 1.0))
    _save(grid, "reconstructions", epoch, summary_writer, "Reconstruction/reconstruction_")


def _save(grid, tag, epoch, summary_writer, name):
    summary_writer.add_image(tag, grid, epoch)
    path = os.path.join(summary_writer.log_dir, "results", f"{name}{epoch}.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_image(grid, path)


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    for x, _ in train_loader:
        x = x.to(model.device)
        recon_x, z = model(x)
        ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        disc_loss, disc_values = model.get_loss_discriminator(z)
        model.zero_grad()
        (ae_loss + disc_loss).backward()
        optimizer_disc.step()
        optimizer_ae.step()
        logger_ae.add_values(ae_values)
        logger_disc.add_values(disc_values)


def main(args):
    torch.manual_seed(args.seed)
    model = AdversarialAE(args.z_dim)
    train_loader = mnist(args.data_dir, args.batch_size, args.num_workers)
    run = os.path.join(args.log_dir, time.strftime("%Y_%m_%d_%H_%M_%S"))
    writer = SummaryWriter(run)
    loggers = [TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator")]
    optimizer_ae = torch.optim.Adam((*model.encoder.parameters(), *model.decoder.parameters()), args.ae_lr)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), args.d_lr)
    for epoch in range(1, args.epochs + 1):
        train_aae(epoch, model, train_loader, *loggers, optimizer_ae, optimizer_disc, args.lambda_)
        generate_and_save(model, epoch, writer)
        save_reconstruction(model, epoch, writer, next(iter(train_loader))[0])
    os.makedirs(os.path.join(run, "checkpoints"), exist_ok=True)
    torch.save(model.state_dict(), os.path.join(run, "checkpoints", "model_checkpoint.pt"))
