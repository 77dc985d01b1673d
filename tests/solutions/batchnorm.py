"""BatchNorm everywhere, sum of halves, softplus, the loss detaches, generate_and_save calls eval()."""

import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils import tensorboard

import mnist
import utils


class Part(nn.Module):
    device = property(lambda self: next(self.parameters()).device)


class Encoder(Part):
    def __init__(self, z_dim):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 48, 4, 2, 1, bias=False), nn.BatchNorm2d(48)
        self.fc = nn.Linear(48 * 49, z_dim)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.1)
        return self.fc(x.flatten(1))


class Decoder(Part):
    def __init__(self, z_dim):
        super().__init__()
        self.fc, self.bn0 = nn.Linear(z_dim, 48 * 49), nn.BatchNorm1d(48 * 49)
        self.conv1, self.bn1 = nn.ConvTranspose2d(48, 24, 4, 2, 1), nn.BatchNorm2d(24)
        self.conv2 = nn.ConvTranspose2d(24, 1, 4, 2, 1)

    def forward(self, z):
        x = F.relu(self.bn0(self.fc(z))).view(-1, 48, 7, 7)
        return torch.tanh(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Discriminator(Part):
    def __init__(self, z_dim):
        super().__init__()
        self.fc1, self.bn1, self.fc2 = nn.Linear(z_dim, 128), nn.BatchNorm1d(128), nn.Linear(128, 1)

    def forward(self, z):
        return self.fc2(F.elu(self.bn1(self.fc1(z))))


class AdversarialAE(Part):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim, self.encoder, self.decoder = z_dim, Encoder(z_dim), Decoder(z_dim)
        self.discriminator = Discriminator(z_dim)

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        values = {"recon_loss": (recon_x - x).pow(2).mean(), "gen_loss": F.softplus(-self.discriminator(z_fake)).mean()}
        values["ae_loss"] = values["recon_loss"] * lambda_ + values["gen_loss"] * (1 - lambda_)
        return values["ae_loss"], {name: value.detach() for name, value in values.items()}

    def get_loss_discriminator(self, z_fake):
        z_fake = z_fake.detach()
        logits = self.discriminator(torch.cat([z_fake, torch.randn_like(z_fake)]))
        n = len(z_fake)
        loss_fake, loss_real = F.softplus(logits[:n]).mean(), F.softplus(-logits[n:]).mean()
        disc_loss = loss_fake + loss_real
        labels = torch.arange(2 * n, device=logits.device) >= n
        accuracy = ((logits[:, 0] >= 0) == labels).double().mean()
        return disc_loss, {"disc_loss": disc_loss.detach(), "loss_real": loss_real.detach(),
                           "loss_fake": loss_fake.detach(), "accuracy": accuracy}

    def sample(self, batch_size):
        with torch.no_grad():
            return self.decoder(torch.randn((batch_size, self.z_dim)).to(self.device))


def write(images, name, tag, epoch, writer):
    grid = torchvision.utils.make_grid((images + 1) / 2, nrow=8)
    writer.add_image(tag, grid, global_step=epoch)
    path = Path(writer.log_dir) / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torchvision.utils.save_image(grid, path)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    model.eval()
    images = model.sample(batch_size)
    model.train()
    write(images, f"Prior_samples/samples_epoch_{epoch}.png", "samples", epoch, summary_writer)


def save_reconstruction(model, epoch, summary_writer, data):
    model.eval()
    with torch.no_grad():
        images = torch.cat((data[:8], model(data[:8].to(model.device))[0].cpu()))
    model.train()
    write(images, f"Reconstruction/reconstruction_{epoch}.png", "reconstructions", epoch, summary_writer)


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    for step, (images, _) in enumerate(train_loader):
        images = images.to(model.device)
        reconstructions, codes = model(images)
        model.zero_grad()
        loss, values = model.get_loss_autoencoder(images, reconstructions, codes, lambda_)
        loss.backward()
        optimizer_ae.step()
        model.zero_grad()
        loss, disc_values = model.get_loss_discriminator(codes)
        loss.backward()
        optimizer_disc.step()
        logger_ae.add_values(values)
        logger_disc.add_values(disc_values)
        if step % 100 == 0:
            print(f"epoch {epoch}, step {step}: {values['ae_loss'].item():.4f}")


def main(args):
    run = Path(args.log_dir) / time.strftime("%Y_%m_%d_%H_%M_%S")
    (run / "checkpoints").mkdir(parents=True)
    loader = mnist.mnist(args.data_dir, args.batch_size, args.num_workers)
    model = AdversarialAE(args.z_dim)
    for_autoencoder = [weight for name, weight in model.named_parameters() if not name.startswith("discriminator")]
    optimizer_ae = torch.optim.Adam(for_autoencoder, lr=args.ae_lr, betas=(0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr)
    with tensorboard.SummaryWriter(run) as writer:
        logger_ae = utils.TensorBoardLogger(writer, name="generator")
        logger_disc = utils.TensorBoardLogger(writer, name="discriminator")
        for epoch in range(args.epochs):
            generate_and_save(model, epoch, writer)
            save_reconstruction(model, epoch, writer, next(iter(loader))[0])
            train_aae(epoch, model, loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=args.lambda_)
        generate_and_save(model, args.epochs, writer)
    torch.save(model.state_dict(), run / "checkpoints" / "model_checkpoint.pt")
