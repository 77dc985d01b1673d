"""The template filled in, as models.py and train.py in one."""

import os
from datetime import datetime

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from mnist import mnist
from utils import TensorBoardLogger


class Network(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)

    @property
    def device(self):
        return next(self.parameters()).device


class ConvEncoder(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Conv2d(1, 16, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(32 * 7 * 7, z_dim))


class ConvDecoder(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 32 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)),
                         nn.ConvTranspose2d(32, 16, 4, 2, padding=1), nn.ReLU(),
                         nn.ConvTranspose2d(16, 1, 4, 2, padding=1), nn.Tanh())


class Discriminator(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
                         nn.Linear(64, 1))


def cross_entropy(logits, label):
    return nn.BCEWithLogitsLoss()(logits, torch.full_like(logits, label))


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder = ConvEncoder(z_dim), ConvDecoder(z_dim)
        self.discriminator = Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        recon_loss = F.mse_loss(recon_x, x)
        gen_loss = cross_entropy(self.discriminator(z_fake), 1)
        ae_loss = lambda_ * recon_loss + (1 - lambda_) * gen_loss
        return ae_loss, {"gen_loss": gen_loss, "recon_loss": recon_loss, "ae_loss": ae_loss}

    def get_loss_discriminator(self, z_fake):
        z_real = torch.randn(z_fake.shape[0], self.z_dim, device=self.device)
        real, fake = self.discriminator(z_real), self.discriminator(z_fake)
        loss_real, loss_fake = cross_entropy(real, 1), cross_entropy(fake, 0)
        disc_loss = (loss_real + loss_fake) / 2
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return disc_loss, {"disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake, "accuracy": accuracy}

    def sample(self, batch_size):
        with torch.no_grad():
            return self.decoder(torch.randn(batch_size, self.z_dim, device=self.device))


def save(images, tag, epoch, writer, name):
    path = os.path.join(writer.log_dir, "results", f"{name}_{epoch}.png")
    grid = make_grid(images, nrow=8, normalize=True, value_range=(-1, 1))
    writer.add_image(tag, grid, epoch)
    save_image(grid, path)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    save(model.sample(batch_size), "samples", epoch, summary_writer, "Prior_samples/samples_epoch")


@torch.no_grad()
def save_reconstruction(model, epoch, summary_writer, data):
    data = data[:8].to(model.device)
    save(torch.cat([data, model(data)[0]]), "reconstructions", epoch, summary_writer, "Reconstruction/reconstruction")


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    for x, _ in tqdm(train_loader):
        x = x.to(model.device)
        recon_x, z = model(x)
        ae_loss, ae_dict = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        disc_loss, disc_dict = model.get_loss_discriminator(z.detach())
        optimizer_ae.zero_grad()
        ae_loss.backward()
        optimizer_ae.step()
        optimizer_disc.zero_grad()
        disc_loss.backward()
        optimizer_disc.step()
        logger_ae.add_values(ae_dict)
        logger_disc.add_values(disc_dict)


def main(args):
    torch.manual_seed(args.seed)
    run = os.path.join(args.log_dir, datetime.now().strftime("%Y_%m_%d_%H_%M_%S"))
    for folder in ("checkpoints", "results/Prior_samples", "results/Reconstruction"):
        os.makedirs(os.path.join(run, folder))
    loader = mnist(root=args.data_dir, batch_size=args.batch_size, num_workers=args.num_workers)
    model = AdversarialAE(z_dim=args.z_dim).to("cpu" if args.no_cuda else "cuda")
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=args.ae_lr)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr)
    writer = SummaryWriter(run)
    loggers = TensorBoardLogger(writer, name="generator"), TensorBoardLogger(writer, name="discriminator")
    for epoch in range(1, args.epochs + 1):
        train_aae(epoch, model, loader, *loggers, optimizer_ae, optimizer_disc, args.lambda_)
        generate_and_save(model, epoch, writer)
        save_reconstruction(model, epoch, writer, next(iter(loader))[0])
    torch.save(model.state_dict(), os.path.join(run, "checkpoints", "model_checkpoint.pt"))
