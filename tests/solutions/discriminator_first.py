"""The discriminator steps first, on codes of a forward pass without gradients; Dropout; log-sigmoids; sigmoid > 0.5."""

import datetime
import json
import pathlib

import torch
from torch import nn, optim
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import utils
from mnist import mnist as load_mnist


def conv(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GELU())


class ConvEncoder(nn.Sequential):
    def __init__(self, z_dim):
        super().__init__(conv(1, 16, 2), conv(16, 16, 1), conv(16, 32, 2), nn.Flatten(),
                         nn.Linear(32 * 49, 64), nn.GELU(), nn.Linear(64, z_dim))

    @property
    def device(self):
        return self[-1].weight.device


class ConvDecoder(nn.Sequential):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 32 * 49), nn.GELU(), nn.Unflatten(1, (32, 7, 7)), nn.Upsample(scale_factor=2),
                         conv(32, 16, 1), nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, 1, 1), nn.Tanh())


class Discriminator(nn.Sequential):
    def __init__(self, z_dim):
        super().__init__(nn.Linear(z_dim, 96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 96), nn.ReLU(),
                         nn.Dropout(0.2), nn.Linear(96, 1))

    @property
    def device(self):
        return self[0].weight.device


class AdversarialAE(nn.Module):
    def __init__(self, z_dim=8):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder, self.discriminator = ConvEncoder(z_dim), ConvDecoder(z_dim), Discriminator(z_dim)
        self.prior = torch.distributions.Normal(0.0, 1.0)

    @property
    def device(self):
        return self.encoder.device

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), z

    def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
        rec = nn.functional.mse_loss(recon_x, x, reduction="sum") / x.numel()
        gen = -nn.functional.logsigmoid(self.discriminator(z_fake)).mean()
        loss = lambda_ * rec + (1.0 - lambda_) * gen
        return loss, dict(gen_loss=gen, recon_loss=rec, ae_loss=loss)

    def get_loss_discriminator(self, z_fake):
        out_real = self.discriminator(self.prior.sample(z_fake.shape).to(z_fake))
        out_fake = self.discriminator(z_fake)
        real = -nn.functional.logsigmoid(out_real).mean()
        fake = -nn.functional.logsigmoid(-out_fake).mean()
        loss = 0.5 * real + 0.5 * fake
        right = (torch.sigmoid(out_real) > 0.5).sum() + (torch.sigmoid(out_fake) <= 0.5).sum()
        return loss, dict(disc_loss=loss, loss_real=real, loss_fake=fake, accuracy=right / (2 * z_fake.size(0)))

    @torch.no_grad()
    def sample(self, batch_size):
        was_training = self.training
        self.eval()
        images = self.decoder(self.prior.sample((batch_size, self.z_dim)).to(self.device))
        self.train(was_training)
        return images


def save_picture(images, file, tag, epoch, summary_writer):
    grid = make_grid(images.mul(0.5).add(0.5).clamp(0, 1), nrow=8)
    summary_writer.add_image(tag, grid, epoch)
    file = pathlib.Path(summary_writer.log_dir, "results", file)
    file.parent.mkdir(exist_ok=True, parents=True)
    to_pil_image(grid).save(file)


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    save_picture(model.sample(batch_size), f"Prior_samples/samples_epoch_{epoch}.png", "samples", epoch, summary_writer)


def save_reconstruction(model, epoch, summary_writer, data):
    with torch.no_grad():
        recon_x, _ = model(data[:8].to(model.device))
    save_picture(torch.cat([data[:8], recon_x.cpu()]), f"Reconstruction/reconstruction_{epoch}.png", "reconstructions",
                 epoch, summary_writer)


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    total = 0.0
    for x, _ in train_loader:
        x = x.to(model.device)
        with torch.no_grad():
            z = model.encoder(x)
        disc_loss, disc_values = model.get_loss_discriminator(z)
        optimizer_disc.zero_grad(set_to_none=True)
        disc_loss.backward()
        optimizer_disc.step()
        logger_disc.add_values({name: value.item() for name, value in disc_values.items()})

        recon_x, z = model(x)
        ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        optimizer_ae.zero_grad(set_to_none=True)
        ae_loss.backward()
        optimizer_ae.step()
        logger_ae.add_values({name: value.item() for name, value in ae_values.items()})
        total += ae_loss.item()
    return total / len(train_loader)


def main(args):
    torch.manual_seed(args.seed)
    run = pathlib.Path(args.log_dir, f"{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}")
    (run / "checkpoints").mkdir(parents=True)
    (run / "hparams.json").write_text(json.dumps(vars(args)))
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    model, loader = AdversarialAE(args.z_dim).to(device), load_mnist(args.data_dir, args.batch_size, args.num_workers)
    optimizers = (optim.Adam(list(model.encoder.parameters()) + list(model.decoder.parameters()), lr=args.ae_lr),
                  optim.SGD(model.discriminator.parameters(), lr=args.d_lr))
    writer = SummaryWriter(run)
    loggers = [utils.TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator")]
    for epoch in range(args.epochs + 1):
        if epoch > 0:
            print(epoch, train_aae(epoch, model, loader, *loggers, *optimizers, args.lambda_))
        generate_and_save(model, epoch, writer)
        save_reconstruction(model, epoch, writer, next(iter(loader))[0])
    torch.save(model.state_dict(), run / "checkpoints" / "model_checkpoint.pt")
