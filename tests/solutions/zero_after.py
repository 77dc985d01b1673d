"""Gradients are cleared after the steps, the codes encoded again for the discriminator; LayerNorm, logaddexp."""

import os
import time

import torch
import torch.nn as nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

import mnist
from utils import TensorBoardLogger


def norm_linear(inputs, outputs):
    return [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]


class ConvEncoder(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 32, 5, 2, 2), nn.ReLU())
        self.head = nn.Sequential(*norm_linear(32 * 49, 64), nn.Linear(64, z_dim))

    def forward(self, x):
        return self.head(self.features(x).flatten(start_dim=1))

    @property
    def device(self):
        return next(self.parameters()).device


class ConvDecoder(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.head = nn.Sequential(*norm_linear(z_dim, 32 * 49))
        self.deconv = nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1))

    def forward(self, z):
        return self.deconv(self.head(z).unflatten(1, (32, 7, 7))).tanh()


class Discriminator(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.model = nn.Sequential(*norm_linear(z_dim, 128), *norm_linear(128, 128), nn.Linear(128, 1))

    def forward(self, z):
        return self.model(z)

    @property
    def device(self):
        return next(self.parameters()).device


def cross_entropy(logits, label):
    """log(1 + exp(-l)) for the label 1, log(1 + exp(l)) for the label 0."""
    return torch.logaddexp(torch.zeros_like(logits), logits * (1 - 2 * label)).mean()


class AdversarialAE(nn.Module):
    REAL, FAKE = 1, 0

    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = ConvEncoder(z_dim)
        self.decoder = ConvDecoder(z_dim)
        self.discriminator = Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def draw_prior(self, count):
        return torch.empty(count, self.z_dim, device=self.device).normal_()

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        terms = {"recon_loss": torch.mean((x - recon_x) ** 2),
                 "gen_loss": cross_entropy(self.discriminator(z_fake), self.REAL)}
        terms["ae_loss"] = terms["recon_loss"] * lambda_ + terms["gen_loss"] * (1 - lambda_)
        return terms["ae_loss"], terms

    def get_loss_discriminator(self, z_fake):
        on_real, on_fake = self.discriminator(self.draw_prior(len(z_fake))), self.discriminator(z_fake)
        terms = {"loss_real": cross_entropy(on_real, self.REAL), "loss_fake": cross_entropy(on_fake, self.FAKE)}
        terms["disc_loss"] = terms["loss_real"] + terms["loss_fake"]
        with torch.no_grad():
            terms["accuracy"] = torch.cat([on_real >= 0, on_fake < 0]).float().mean()
        return terms["disc_loss"], terms

    def sample(self, batch_size):
        return self.decoder(self.draw_prior(batch_size)).detach()


def picture(images):
    return make_grid(images, nrow=8, normalize=True)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    grid = picture(model.sample(batch_size))
    summary_writer.add_image("samples", grid, epoch)
    save_image(grid, os.path.join(summary_writer.log_dir, f"results/Prior_samples/samples_epoch_{epoch}.png"))


def save_reconstruction(model, epoch, summary_writer, data):
    with torch.no_grad():
        grid = picture(torch.cat([data[:8].to(model.device), model(data[:8].to(model.device))[0]], dim=0))
    summary_writer.add_image("reconstructions", grid, epoch)
    save_image(grid, os.path.join(summary_writer.log_dir, f"results/Reconstruction/reconstruction_{epoch}.png"))


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    model.zero_grad()
    for batch in train_loader:
        images = batch[0].to(model.device)
        recon_images, codes = model(images)
        ae_loss, ae_terms = model.get_loss_autoencoder(images, recon_images, codes, lambda_)
        ae_loss.backward()
        optimizer_ae.step()
        model.zero_grad()

        disc_loss, disc_terms = model.get_loss_discriminator(model.encoder(images).detach())
        disc_loss.backward()
        optimizer_disc.step()
        model.zero_grad()
        for logger, terms in ((logger_ae, ae_terms), (logger_disc, disc_terms)):
            logger.add_values({name: term.item() for name, term in terms.items()})


def main(args):
    torch.manual_seed(args.seed)
    writer = SummaryWriter(os.path.join(args.log_dir, time.strftime("%Y_%m_%d_%H_%M_%S")))
    for folder in ("results/Prior_samples", "results/Reconstruction", "checkpoints"):
        os.makedirs(os.path.join(writer.log_dir, folder), exist_ok=True)
    model = AdversarialAE(args.z_dim)
    loader = mnist.mnist(args.data_dir, args.batch_size, args.num_workers, True)
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=args.ae_lr)
    optimizer_disc = torch.optim.SGD([*model.discriminator.parameters()], lr=args.d_lr)
    logger_ae, logger_disc = (TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator"))
    generate_and_save(model, 0, writer)
    for epoch in range(1, args.epochs + 1):
        train_aae(epoch, model, loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, args.lambda_)
        generate_and_save(model, epoch, writer)
        torch.save(model.state_dict(), os.path.join(writer.log_dir, "checkpoints", "model_checkpoint.pt"))
