"""Only main calls eval() for the pictures of a BatchNorm decoder; clipping, switched requires_grad, two Adams."""

import os
from datetime import datetime

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.tensorboard import SummaryWriter

from mnist import mnist
from utils import TensorBoardLogger


class ConvEncoder(nn.Module):
    def __init__(self, z_dim, width=16):
        super().__init__()
        layers, channels = [], 1
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, outputs, 3, 2, 1), nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.1)]
            channels = outputs
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, z_dim, 4), nn.Flatten())

    def forward(self, x):
        return self.net(x)

    @property
    def device(self):
        return self.net[0].weight.device


class ConvDecoder(nn.Module):
    def __init__(self, z_dim, width=16):
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(z_dim, 4 * width, 4), nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh())

    def forward(self, z):
        return self.net(z[:, :, None, None])


class Discriminator(nn.Module):
    def __init__(self, z_dim, hidden=100):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(z_dim, hidden), nn.Linear(hidden, hidden)])
        self.logit = nn.Linear(hidden, 1)

    def forward(self, z):
        for layer in self.hidden:
            z = F.leaky_relu(layer(z), negative_slope=0.2)
        return self.logit(z)

    @property
    def device(self):
        return self.logit.weight.device


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder, self.discriminator = ConvEncoder(z_dim), ConvDecoder(z_dim), Discriminator(z_dim)
        self.criterion = nn.BCEWithLogitsLoss()

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        valid = torch.full((x.shape[0], 1), 1.0, device=x.device)
        recon_loss = F.mse_loss(recon_x, x)
        gen_loss = self.criterion(self.discriminator(z_fake), valid)
        ae_loss = lambda_ * recon_loss + (1 - lambda_) * gen_loss
        return ae_loss, {"gen_loss": gen_loss.detach(), "recon_loss": recon_loss.detach(), "ae_loss": ae_loss.detach()}

    def get_loss_discriminator(self, z_fake):
        valid = torch.full((z_fake.shape[0], 1), 1.0, device=z_fake.device)
        z_real = torch.randn(z_fake.size(), device=z_fake.device)
        pred_real, pred_fake = self.discriminator(z_real), self.discriminator(z_fake)
        loss_real, loss_fake = self.criterion(pred_real, valid), self.criterion(pred_fake, 1 - valid)
        disc_loss = torch.stack([loss_real, loss_fake]).mean()
        hits = (pred_real > 0).sum() + (pred_fake < 0).sum()
        accuracy = torch.tensor(hits.item() / (len(pred_real) + len(pred_fake)))
        return disc_loss, {"disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake, "accuracy": accuracy}

    @torch.no_grad()
    def sample(self, batch_size):
        return self.decoder(torch.randn(batch_size, self.z_dim).to(self.device))


def store(images, file, tag, epoch, summary_writer):
    images = torch.clamp((images + 1) * 127.5, 0, 255).to(torch.uint8)
    grid = torchvision.utils.make_grid(images, nrow=8)
    summary_writer.add_image(tag, grid, epoch)
    path = os.path.join(summary_writer.log_dir, "results", file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torchvision.io.write_png(grid.cpu(), path)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    store(model.sample(batch_size), f"Prior_samples/samples_epoch_{epoch}.png", "samples", epoch, summary_writer)


def save_reconstruction(model, epoch, summary_writer, data):
    with torch.no_grad():
        images = torch.cat([data[:8].cpu(), model(data[:8].to(model.device))[0].cpu()])
    store(images, f"Reconstruction/reconstruction_{epoch}.png", "reconstructions", epoch, summary_writer)


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    for x, _ in train_loader:
        x = x.to(model.device)
        for weight in model.discriminator.parameters():  # phase of the autoencoder
            weight.requires_grad = False
        recon_x, z = model(x)
        ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        optimizer_ae.zero_grad()
        ae_loss.backward()
        nn.utils.clip_grad_norm_(model.encoder.parameters(), 0.01)
        optimizer_ae.step()
        for weight in model.discriminator.parameters():  # phase of the discriminator
            weight.requires_grad = True
        disc_loss, disc_values = model.get_loss_discriminator(z.detach())
        optimizer_disc.zero_grad()
        disc_loss.backward()
        nn.utils.clip_grad_norm_(model.discriminator.parameters(), 0.01)
        optimizer_disc.step()
        logger_ae.add_values(ae_values)
        logger_disc.add_values({name: value.detach() for name, value in disc_values.items()})


def main(args):
    run = args.log_dir + datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
    os.makedirs(run + "/checkpoints")
    loader = mnist(args.data_dir, args.batch_size, args.num_workers)
    model = AdversarialAE(z_dim=args.z_dim)
    ae_parameters = list(model.encoder.parameters()) + list(model.decoder.parameters())
    optimizer_ae = torch.optim.Adam(ae_parameters, lr=args.ae_lr, betas=(0.5, 0.999))
    optimizer_disc = torch.optim.Adam(model.discriminator.parameters(), lr=args.d_lr, betas=(0.5, 0.999))
    writer = SummaryWriter(run)
    logger_ae = TensorBoardLogger(writer, name="generator")
    logger_disc = TensorBoardLogger(writer, name="discriminator")
    for epoch in range(1, args.epochs + 1):
        train_aae(epoch, model, loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, args.lambda_)
        model.eval()
        generate_and_save(model, epoch, writer)
        save_reconstruction(model, epoch, writer, next(iter(loader))[0])
        model.train()
    torch.save(model.state_dict(), run + "/checkpoints/model_checkpoint.pt")
