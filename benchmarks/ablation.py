"""Measure the effect of each change to the base networks and their training:  python -m benchmarks.ablation

Every variant is trained on the first 55,000 training images of MNIST and evaluated on the last 5,000, so that the test
set influences no choice. The figures go into docs/results/ablation.json; what is there is not repeated.
"""

import contextlib
import itertools
import json
import sys
import tempfile
from unittest import mock

import torch
import torch.nn as nn

import mnist
import train
from benchmarks.report import FIGURES, PROJECT
from benchmarks.tables import ablation, figures_of
from evaluation.measures import evaluate
from evaluation.model_files import load_run
from models import AdversarialAE
from training.cli import OneLineParser, run_program
from training.files import write_atomically
from training.run import load_state

RESULTS = FIGURES / "ablation.json"
HELD_OUT = 5_000  # of the training images
EPOCHS, SEEDS, PRECISION = 6, (42, 1, 2), "bf16"


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
    "base": (["--base"], None),
    "final": ([], None),
    "final without momentum": (["--d_momentum", "0"], None),
    "final without averaging": (["--averaging", "0"], None),
    "final without batch normalisation": ([], without_batch_norm),
    "final without residual blocks": ([], without_residual_blocks),
    "final, rate divided by 10 in the last epoch": (["--drop_after", str(EPOCHS - 1)], None),
}


@contextlib.contextmanager
def changed(change):
    """Within the context, every new model is changed, and the training set lacks its last HELD_OUT images."""
    init, load_mnist = AdversarialAE.__init__, mnist.load_mnist

    def changed_init(model, *args, **options):
        init(model, *args, **options)
        if change:
            change(model)

    def most_of_mnist(root, train=True, download=True):
        tensors = load_mnist(root, train, download)
        return [tensor[:-HELD_OUT] for tensor in tensors] if train else tensors

    with (mock.patch.object(AdversarialAE, "__init__", changed_init),
          mock.patch.object(mnist, "load_mnist", most_of_mnist)):
        yield


def run_variant(flags, change, data_dir):
    """Train and evaluate a variant; return its figures."""
    with tempfile.TemporaryDirectory() as folder, changed(change):
        run = train.main(train.parse_args([*flags, "--dataset", "mnist", "--data_dir", data_dir, "--log_dir", folder]))
        model, settings, *_ = load_run(run)
        accuracy = load_state(run)["run"]["means"]["accuracy"]
    images, labels = mnist.load_mnist(data_dir)
    metrics = evaluate(model.to(settings["device"]), images[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:])
    return {**figures_of(metrics), "accuracy": accuracy}


def main(args):
    """Train and measure what is not in RESULTS, and print the table."""
    figures = json.loads(RESULTS.read_text())
    for (name, (flags, change)), seed in itertools.product(VARIANTS.items(), SEEDS):
        key = f"{name}; {EPOCHS} epochs; seed {seed}; {PRECISION}"
        if key not in figures:
            flags = [*flags, "--epochs", str(EPOCHS), "--seed", str(seed), "--precision", PRECISION]
            figures[key] = run_variant(flags, change, args.data_dir)
            write_atomically(RESULTS, (json.dumps(figures, indent=1) + "\n").encode())
    print(f"\n{ablation({'ablation': figures})}")


def parse_args(argv=None):
    parser = OneLineParser("python -m benchmarks.ablation", "Measure the effect of each change to the base.")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="MNIST's folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m benchmarks.ablation", main, parse_args, None))
