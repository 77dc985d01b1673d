"""Measure the effect of each change to the base networks and their training:  python -m benchmarks.ablation

Every variant is trained by train.py on the first 55,000 training images of MNIST and evaluated, with the metrics of
python -m evaluation, on the last 5,000, so that the test set influences no choice. Variants in --results are not
repeated. docs/ABLATION.md has the table of docs/results/ablation.json.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

import mnist
import train
from benchmarks.tables import ablation, figures_of
from evaluation.measures import evaluate
from evaluation.model_files import find_run, load_model, read_weights
from models import AdversarialAE
from training.checkpoint import load_state
from training.cli import FlagError, RunStopped, UserError
from training.device import choose_device
from training.files import write_atomically

PROJECT = Path(__file__).resolve().parent.parent
HELD_OUT = 5_000  # of the training images


def unchanged(model):
    pass


def without_batch_norm(model):
    """Replace batch normalisation by biases in the convolutions before it."""
    for part in (model.encoder, model.decoder):
        for layer in part.net:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        part.net = nn.Sequential(*(nn.Identity() if isinstance(layer, nn.BatchNorm2d) else layer for layer in part.net))


def without_residual_blocks(model):
    """Leave one linear layer between convolutions and code, as in the base networks."""
    encoder, decoder = model.encoder.net, model.decoder.net
    flatten = next(index for index, layer in enumerate(encoder) if isinstance(layer, nn.Flatten))
    unflatten = next(index for index, layer in enumerate(decoder) if isinstance(layer, nn.Unflatten))
    model.encoder.net = nn.Sequential(*encoder[:flatten + 1], nn.Linear(1024, model.z_dim))
    model.decoder.net = nn.Sequential(nn.Linear(model.z_dim, 1024), nn.SiLU(), *decoder[unflatten:])


VARIANTS = {  # name: flags of train.py, function that changes the model
    "base": (["--base"], unchanged),
    "final": ([], unchanged),
    "final without momentum": (["--d_momentum", "0"], unchanged),
    "final without averaging": (["--averaging", "0"], unchanged),
    "final without batch normalisation": ([], without_batch_norm),
    "final without residual blocks": ([], without_residual_blocks),
    "final, rate divided by 10 in the last epoch": (["--drop_after", "5"], unchanged),
}


@contextlib.contextmanager
def changed(change):
    """Within the context, every new model is changed, and the training set lacks its last HELD_OUT images."""
    init, load_mnist = AdversarialAE.__init__, mnist.load_mnist

    @functools.wraps(init)
    def changed_init(model, *args, **options):
        init(model, *args, **options)
        change(model)

    def most_of_mnist(root, train=True, *others):
        tensors = load_mnist(root, train, *others)
        return tuple(tensor[:-HELD_OUT] for tensor in tensors) if train else tensors

    with (mock.patch.object(AdversarialAE, "__init__", changed_init),
          mock.patch.object(mnist, "load_mnist", most_of_mnist)):
        yield


def run_variant(name, seed, args):
    """Train and evaluate a variant; return its figures."""
    flags, change = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder, changed(change):
        run = train.main(train.parse_args([
            *flags, "--epochs", str(args.epochs), "--seed", str(seed), "--precision", args.precision, "--dataset",
            "mnist", "--data_dir", args.data_dir, "--log_dir", folder, *["--no-cuda"] * args.no_cuda]))
        accuracy = load_state(run)["means"]["accuracy"]
        _, path, settings = find_run(run)
        model = load_model(path, read_weights(path), settings).to(choose_device(args.no_cuda, mps=False))
    images, labels = mnist.load_mnist(args.data_dir)
    metrics = evaluate(model, images[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:])
    return {**figures_of(metrics), "accuracy": accuracy}


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.ablation", description="Measure each change to the base.")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"variants: {'; '.join(VARIANTS)}")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="MNIST's folder")
    parser.add_argument("--results", type=Path, default=PROJECT / "docs" / "results" / "ablation.json",
                        help="file with the figures of finished variants")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    args = parser.parse_args()
    figures = json.loads(args.results.read_text()) if args.results.is_file() else {}
    for name in args.only:
        for seed in args.seeds:
            key = f"{name}; {args.epochs} epochs; seed {seed}; {args.precision}"
            if key not in figures:
                try:
                    figures[key] = run_variant(name, seed, args)
                except (FlagError, RunStopped, mnist.DataError) as error:
                    sys.exit(f"{parser.prog}: error: {error}")
                except UserError as error:  # training has diverged
                    figures[key] = {"failed": str(error)}
                write_atomically(args.results, (json.dumps(figures, indent=1) + "\n").encode())
    print(f"\n{ablation({'ablation': figures})}")


if __name__ == "__main__":
    main()
