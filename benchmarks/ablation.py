"""Measure the effect of each change to the base networks and their training:  python benchmarks/ablation.py

Every variant is trained on the first 55,000 training images of MNIST and evaluated, with the metrics of python -m
evaluation, on the last 5,000, so that the test set influences no choice. docs/EXPERIMENTS.md has the results of
everything that was tried. Finished variants are kept in --results and not repeated.
"""

import argparse
import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import torch
import torch.nn as nn
from tables import ablation
from tqdm import tqdm

import mnist
import train
from evaluation.measures import evaluate
from models import ResidualBlock
from training.cli import UserError
from training.data import Batches
from training.device import PrecisionError, choose_device, keep_freed_memory, set_precision
from training.files import write_atomically
from training.statistics import LossStatistics

HELD_OUT = 5_000  # of the training images


# Variants ------------------------------------------------------------------------------------------------------------

class Noise(nn.Module):
    """Adds noise from N(0, scale^2) in training mode."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * torch.randn_like(x) if self.training else x


def without_batch_norm(model):
    for part in (model.encoder, model.decoder):
        for layer in part.net:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        part.net = nn.Sequential(*(nn.Identity() if isinstance(layer, nn.BatchNorm2d) else layer for layer in part.net))


def with_layer_norm_in_discriminator(model):
    layers = model.discriminator.net
    model.discriminator.net = nn.Sequential(layers[0], nn.LayerNorm(512), *layers[1:3], nn.LayerNorm(512), *layers[3:])


def without_perceptron(model):
    kept = [layer for layer in model.encoder.net if not on_vectors(layer)]
    model.encoder.net = nn.Sequential(*kept[:-1], nn.Linear(1024, model.z_dim))  # the last one is the MLP's SiLU
    first = next(index for index, layer in enumerate(model.decoder.net) if isinstance(layer, nn.Unflatten))
    model.decoder.net = nn.Sequential(nn.Linear(model.z_dim, 1024), nn.SiLU(), *model.decoder.net[first:])


def with_batch_norm_in_perceptron(model):
    for part in (model.encoder, model.decoder):
        for block in part.net:
            if on_vectors(block) and not isinstance(block, nn.Linear):
                width = block.net[1].in_features
                block.net = nn.Sequential(nn.BatchNorm1d(width), *block.net[:2], nn.BatchNorm1d(width), *block.net[2:])


def with_dropout(model):
    model.encoder.net = nn.Sequential(*(part for layer in model.encoder.net for part in
                                        ((layer, nn.Dropout(0.2)) if isinstance(layer, nn.Flatten) else (layer,))))


def with_noise_before_decoder(model):
    model.decoder.net = nn.Sequential(Noise(0.1), *model.decoder.net)


def with_noise_before_discriminator(model):
    model.discriminator.net = nn.Sequential(Noise(0.2), *model.discriminator.net)


def on_vectors(layer):
    """Return whether a layer is one of those between convolutions and code."""
    return isinstance(layer, (nn.Linear, ResidualBlock))


VARIANTS = {  # name: flags of train.py, function that changes the model
    "base": (("--base",), None),
    "base, momentum": (("--base", "--d_momentum", "0.95"), None),
    "base, momentum, averaging": (("--base", "--d_momentum", "0.95", "--averaging", "0.999"), None),
    "final": ((), None),
    "final without momentum": (("--d_momentum", "0"), None),
    "final without averaging": (("--averaging", "0"), None),
    "final without batch normalisation": ((), without_batch_norm),
    "final without perceptron": ((), without_perceptron),
    "final, momentum 0.98": (("--d_momentum", "0.98"), None),
    "final, layer normalisation in the discriminator": ((), with_layer_norm_in_discriminator),
    "final, batch normalisation in the perceptron": ((), with_batch_norm_in_perceptron),
    "final, dropout 0.2 before the perceptron": ((), with_dropout),
    "final, noise 0.1 on codes before the decoder": ((), with_noise_before_decoder),
    "final, noise 0.2 on codes before the discriminator": ((), with_noise_before_discriminator),
}


# Training and measuring ----------------------------------------------------------------------------------------------

def run_variant(name, args, seed, device):
    """Train and evaluate a variant; return its results, a dict of numbers."""
    flags, change = VARIANTS[name]
    flags = train.parse_args([*flags, "--epochs", str(args.epochs), "--seed", str(seed), "--precision", args.precision])
    torch.manual_seed(seed)
    images, labels = mnist.load_mnist(args.data_dir)
    loader = mnist.BatchLoader(images[:-HELD_OUT], labels[:-HELD_OUT], flags.batch_size, device=device)
    model = train.build_model(flags.z_dim, networks=flags.networks)
    if change:
        change(model)
    model = train.to_device(model, device, flags.precision)
    accuracy, model = train_variant(model, loader, flags, name)
    metrics = evaluate(model, images[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:])
    quality = metrics["digit_classifier"]
    return {"mse": metrics["reconstruction"]["mse"], "ks": metrics["prior_match"]["codes"]["ks"],
            "samples": quality["samples"]["frechet_to_test_images"],
            "reconstructions": quality["reconstructions"]["frechet_to_test_images"],
            "parzen": metrics["log_likelihood"]["mean"], "accuracy": accuracy}


def train_variant(model, loader, flags, name):
    """Train as train.py does; return the discriminator's accuracy in the last epoch, and the weight-averaged model."""
    optimizers, ema = train.build_optimizers(model, flags), train.EMA(model, flags.averaging)
    step, statistics = train.build_step(model, *optimizers, flags), LossStatistics()
    with tqdm(total=flags.epochs * len(loader), desc=name, leave=False, disable=None) as bar:
        for epoch in range(1, flags.epochs + 1):
            train.set_learning_rate(optimizers[0], epoch, flags)
            means = train.train_aae(epoch, model, Batches(loader, ema.update), None, None, *optimizers, flags.lambda_,
                                    step, statistics)
            bar.update(len(loader))
    return means["accuracy"], ema.model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":  ")[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"variants: {'; '.join(VARIANTS)}")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="MNIST's folder")
    parser.add_argument("--results", type=Path, default=PROJECT / "AAE_logs" / "ablation.json",
                        help="file with the results of finished variants")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    args = parser.parse_args()
    device = choose_device(args.no_cuda, mps=False)
    keep_freed_memory()
    try:
        finished = json.loads(args.results.read_text()) if args.results.is_file() else {}
    except ValueError as error:
        sys.exit(f"ablation.py: error: {args.results} is damaged ({error}); delete it, or name another file "
                 f"with --results")
    results = {}
    try:
        set_precision(args.precision, device)
        for seed in args.seeds:
            for name in args.only:
                key = f"{name}; {args.epochs} epochs; seed {seed}; {args.precision}"
                if key not in finished:
                    try:
                        finished[key] = run_variant(name, args, seed, device)
                    except UserError as error:  # training has diverged
                        finished[key] = {"failed": str(error)}
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(args.results, (json.dumps(finished, indent=2) + "\n").encode())
                results[key] = finished[key]
    except (mnist.DataError, PrecisionError) as error:
        sys.exit(f"ablation.py: error: {error}")
    print(f"\n{ablation({'ablation': results})}")


if __name__ == "__main__":
    main()
