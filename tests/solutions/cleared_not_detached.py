"""Nothing is detached: what the discriminator's loss leaves on the encoder is cleared before the encoder's step."""

import os
import time

import torch
import torch.nn as nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import mnist
from utils import TensorBoardLogger


class Network(nn.Module):
    """Layers one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def device(self):
        return next(self.parameters()).device


class Encoder(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Conv2d(1, 8, 3, 2, 1), nn.PReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.PReLU(), nn.Flatten(),
                         nn.Linear(16 * 49, 50), nn.Dropout(0.1), nn.Tanh(), nn.Linear(50, z_dim))


class Decoder(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 50), nn.PReLU(), nn.Dropout(0.1), nn.Linear(50, 784),
                         nn.Unflatten(1, (1, 28, 28)), nn.Tanh())


class Discriminator(Network):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 50), nn.PReLU(), nn.Linear(50, 50), nn.PReLU(), nn.Linear(50, 1))


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder, self.discriminator = Encoder(z_dim), Decoder(z_dim), Discriminator(z_dim)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def bce(self, logits, label):
        labels = torch.tensor([[float(label)]] * len(logits), device=logits.device)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        recon_loss = ((x - recon_x) ** 2).sum() / x.nelement()
        gen_loss = self.bce(self.discriminator(z_fake), 1)
        ae_loss = lambda_ * recon_loss + (1 - lambda_) * gen_loss
        return ae_loss, {"ae_loss": ae_loss, "recon_loss": recon_loss, "gen_loss": gen_loss}

    def get_loss_discriminator(self, z_fake):
        z_real = torch.randn_like(z_fake)
        logits_fake, logits_real = self.discriminator(z_fake), self.discriminator(z_real)
        loss_real, loss_fake = self.bce(logits_real, 1), self.bce(logits_fake, 0)
        disc_loss = loss_real + loss_fake
        accuracy = 0.5 * (logits_real.gt(0).float().mean() + logits_fake.le(0).float().mean())
        return disc_loss, {"accuracy": accuracy, "disc_loss": disc_loss, "loss_real": loss_real, "loss_fake": loss_fake}

    def sample(self, batch_size):
        self.eval()
        with torch.no_grad():
            return self.decoder(torch.randn(batch_size, self.z_dim, device=self.device))


def save(images, tag, epoch, summary_writer, *path):
    grid = make_grid((images + 1).div(2), 8)
    summary_writer.add_image(tag, grid, epoch)
    path = os.path.join(summary_writer.log_dir, "results", *path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    to_pil_image(grid).convert("L").save(path)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    save(model.sample(batch_size), "samples", epoch, summary_writer, "Prior_samples", f"samples_epoch_{epoch}.png")


def save_reconstruction(model, epoch, summary_writer, data):
    model.eval()
    with torch.no_grad():
        images = torch.cat([data[:8], model(data[:8].to(model.device))[0].cpu()])
    save(images, "reconstructions", epoch, summary_writer, "Reconstruction", f"reconstruction_{epoch}.png")


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    for x, _ in tqdm(train_loader, desc=f"epoch {epoch}", leave=False):
        x = x.to(model.device)
        recon_x, z = model(x)
        disc_loss, disc_dict = model.get_loss_discriminator(z)
        optimizer_disc.zero_grad()
        disc_loss.backward(retain_graph=True)
        optimizer_disc.step()
        ae_loss, ae_dict = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        optimizer_ae.zero_grad()
        ae_loss.backward()
        optimizer_ae.step()
        logger_disc.add_values(disc_dict)
        logger_ae.add_values(ae_dict)


def main(args):
    torch.manual_seed(args.seed)
    use_cuda = torch.cuda.is_available() and not args.no_cuda
    model = AdversarialAE(z_dim=args.z_dim).to("cuda:0" if use_cuda else "cpu")
    loader = mnist.mnist(root=args.data_dir, batch_size=args.batch_size, num_workers=args.num_workers)
    writer = SummaryWriter(os.path.join(args.log_dir, time.strftime("%Y_%m_%d_%H_%M_%S")))
    os.makedirs(os.path.join(writer.log_dir, "checkpoints"))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr)
    ae_weights = [weight for part in (model.encoder, model.decoder) for weight in part.parameters()]
    optimizer_ae = torch.optim.Adam(ae_weights, lr=args.ae_lr)
    loggers = [TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator")]
    generate_and_save(model, 0, writer)
    for epoch in range(1, args.epochs + 1):
        train_aae(epoch, model, loader, *loggers, optimizer_ae, optimizer_disc, args.lambda_)
        generate_and_save(model, epoch, writer)
    torch.save(model.state_dict(), os.path.join(writer.log_dir, "checkpoints", "model_checkpoint.pt"))
