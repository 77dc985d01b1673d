"""Both losses, both backward passes with retain_graph, then both steps; the discriminator is frozen for ae_loss."""

import os
import time

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

import mnist
from utils import TensorBoardLogger


class Encoder(nn.Module):
    """A perceptron on pixels."""

    def __init__(self, z_dim):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(784, 128), nn.Linear(128, 128), nn.Linear(128, z_dim)

    def forward(self, x):
        h = F.silu(self.l1(x.flatten(1)))
        return self.l3(F.silu(self.l2(h)))

    @property
    def device(self):
        return self.l1.weight.device


class Decoder(nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(z_dim, 128), nn.Linear(128, 128), nn.Linear(128, 784)

    def forward(self, z):
        return self.l3(F.silu(self.l2(F.silu(self.l1(z))))).tanh().view(-1, 1, 28, 28)


class Discriminator(nn.Module):
    """A residual layer, and a linear one on both codes and features."""

    def __init__(self, z_dim):
        super().__init__()
        self.l1, self.l2 = nn.Linear(z_dim, 64), nn.Linear(64, 64)
        self.skip, self.out = nn.Linear(z_dim, 1), nn.Linear(64, 1)

    def forward(self, z):
        h = F.relu(self.l1(z))
        return self.out(h + F.relu(self.l2(h))) + self.skip(z)

    @property
    def device(self):
        return self.l1.weight.device


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(z_dim)
        self.decoder = Decoder(z_dim)
        self.discriminator = Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        recon_loss = F.mse_loss(recon_x, x)
        self.discriminator.requires_grad_(False)  # its weights are constants here
        logits = self.discriminator(z_fake)
        self.discriminator.requires_grad_(True)
        gen_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        ae_loss = torch.lerp(gen_loss, recon_loss, float(lambda_))
        return ae_loss, {"gen_loss": gen_loss, "recon_loss": recon_loss, "ae_loss": ae_loss}

    def get_loss_discriminator(self, z_fake):
        B = z_fake.shape[0]
        labels = torch.cat([torch.ones(B, 1), torch.zeros(B, 1)]).to(z_fake.device)
        logits = self.discriminator(torch.cat([torch.randn_like(z_fake), z_fake.detach()]))
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        correct = (logits.sign() == 2 * labels - 1).float()
        return losses.mean(), {"disc_loss": losses.mean(), "loss_real": losses[:B].mean(),
                               "loss_fake": losses[B:].mean(), "accuracy": correct.mean()}

    def sample(self, batch_size):
        with torch.inference_mode():
            return self.decoder(torch.randn(batch_size, self.z_dim, device=self.device))


def save(images, folder, name, tag, epoch, writer):
    os.makedirs(os.path.join(writer.log_dir, "results", folder), exist_ok=True)
    images = images.cpu().clone() * 0.5 + 0.5
    writer.add_images(tag, images, epoch)
    save_image(images, os.path.join(writer.log_dir, "results", folder, name), nrow=8)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    save(model.sample(batch_size), "Prior_samples", f"samples_epoch_{epoch}.png", "samples", epoch, summary_writer)


def save_reconstruction(model, epoch, summary_writer, data):
    x = data[:8].to(model.device)
    images = torch.cat([x, model(x)[0].detach()])
    save(images, "Reconstruction", f"reconstruction_{epoch}.png", "reconstructions", epoch, summary_writer)


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    for x, _ in train_loader:
        x = x.to(model.device)
        recon_x, z = model(x)
        ae_loss, ae_log = model.get_loss_autoencoder(x, recon_x, z, lambda_=lambda_)
        disc_loss, disc_log = model.get_loss_discriminator(z)
        optimizer_ae.zero_grad()
        optimizer_disc.zero_grad()
        ae_loss.backward(retain_graph=True)
        disc_loss.backward(retain_graph=True)
        optimizer_ae.step()
        optimizer_disc.step()
        logger_ae.add_values(ae_log)
        logger_disc.add_values(disc_log)


def main(args):
    device = "cpu" if args.no_cuda else "cuda"
    run = os.path.join(args.log_dir, time.strftime("%Y_%m_%d_%H_%M_%S"))
    os.makedirs(os.path.join(run, "checkpoints"))
    model = AdversarialAE(args.z_dim).to(device)
    loader = mnist.mnist(root=args.data_dir, batch_size=args.batch_size, num_workers=args.num_workers)
    groups = [{"params": model.encoder.parameters()}, {"params": model.decoder.parameters()}]
    optimizer_ae = torch.optim.Adam(groups, args.ae_lr)
    optimizer_disc = torch.optim.SGD([{"params": model.discriminator.parameters()}], args.d_lr)
    writer = SummaryWriter(log_dir=run)
    logger_ae, logger_disc = (TensorBoardLogger(writer, 50, name) for name in ("generator", "discriminator"))
    for epoch in range(1, 1 + args.epochs):
        train_aae(epoch=epoch, model=model, train_loader=loader, logger_ae=logger_ae, logger_disc=logger_disc,
                  optimizer_ae=optimizer_ae, optimizer_disc=optimizer_disc, lambda_=args.lambda_)
        generate_and_save(model, epoch, writer)
    torch.save(model.state_dict(), os.path.join(run, "checkpoints", "model_checkpoint.pt"))
