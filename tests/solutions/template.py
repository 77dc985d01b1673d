"""The train.py that is handed out, with its gaps filled in."""

import json
import os
from datetime import datetime

import pytorch_lightning as pl
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from mnist import mnist
from models import AdversarialAE
from utils import TensorBoardLogger


def generate_and_save(model, epoch, summary_writer, batch_size=64):
    x = model.sample(batch_size)
    grid = make_grid(x, nrow=8, normalize=True, value_range=(-1, 1), pad_value=0.5)
    summary_writer.add_image("samples", grid, global_step=epoch)
    save_image(grid, os.path.join(summary_writer.log_dir, "results", "Prior_samples", f"samples_epoch_{epoch}.png"))


def save_reconstruction(model, epoch, summary_writer, data):
    data = data[:8]
    recon_x, _ = model(data)
    images = torch.cat([data, recon_x])
    grid = make_grid(images, nrow=8, normalize=True, value_range=(-1, 1), pad_value=0.5)
    summary_writer.add_image("reconstructions", grid, global_step=epoch)
    name = f"reconstruction_{epoch}.png"
    save_image(images, os.path.join(summary_writer.log_dir, "results", "Reconstruction", name))


def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
    model.train()
    train_loss_ae, train_loss_disc = 0.0, 0.0
    for i, (x, _) in enumerate(train_loader):
        x = x.to(model.device)
        recon_x, z = model(x)
        ae_loss, ae_dict = model.get_loss_autoencoder(x, recon_x, z, lambda_)
        optimizer_ae.zero_grad()
        ae_loss.backward()
        optimizer_ae.step()
        disc_loss, disc_dict = model.get_loss_discriminator(z.detach())
        optimizer_disc.zero_grad()
        disc_loss.backward()
        optimizer_disc.step()
        train_loss_ae += ae_loss.item()
        train_loss_disc += disc_loss.item()
        if i == 0 and (epoch < 2 or epoch % 5 == 0):
            save_reconstruction(model, epoch, logger_ae.summary_writer, x)
    print(f"epoch {epoch}: {train_loss_ae / len(train_loader):.4f}, {train_loss_disc / len(train_loader):.4f}")


def main(args):
    pl.seed_everything(args.seed)
    run = os.path.join(args.log_dir, datetime.now().strftime("%Y_%m_%d_%H_%M_%S"))
    checkpoints = os.path.join(run, "checkpoints")
    os.makedirs(checkpoints)
    os.makedirs(os.path.join(run, "results", "Prior_samples"))
    os.makedirs(os.path.join(run, "results", "Reconstruction"))
    args.cuda = not args.no_cuda and torch.cuda.is_available()
    with open(os.path.join(run, "hparams.json"), "w") as file:
        json.dump(vars(args), file, indent=4)
    writer = SummaryWriter(run)
    train_loader = mnist(root=args.data_dir, batch_size=args.batch_size, num_workers=args.num_workers)
    model = AdversarialAE(z_dim=args.z_dim).to("cuda" if args.cuda else "cpu")
    optimizer_ae = torch.optim.Adam(list(model.encoder.parameters()) + list(model.decoder.parameters()),
                                    lr=args.ae_lr, betas=(0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr)
    logger_ae = TensorBoardLogger(writer, avg_window=len(train_loader), name="generator")
    logger_disc = TensorBoardLogger(writer, avg_window=len(train_loader), name="discriminator")
    generate_and_save(model, 0, writer)
    for epoch in range(args.epochs):
        train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, args.lambda_)
        if epoch == 0 or (epoch + 1) % 5 == 0:
            generate_and_save(model, epoch + 1, writer)
        if (epoch + 1) % 10 == 0:
            torch.save(model.state_dict(), os.path.join(checkpoints, "model_checkpoint.pt"))
