"""A small digit classifier, whose features the evaluation uses to compare images:  python -m evaluation.classifier

Its weights are part of this repository: assets/digit_classifier.pt, 0.6 MB in float16. Its accuracy is 99.66 % on
MNIST's 10,000 test images, and 90.4 % on the 1,797 bundled digits, on which it was not trained. Training took
3 min 46 s on two cores of an AMD EPYC (Zen 5) with torch 2.15.0.
"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from mnist import load_digits, mnist
from training.checkpoint import CheckpointError, load_checked, serialize
from training.cli import OneLineParser, UserError, number, print_line, run_program
from training.device import choose_device, keep_freed_memory, set_precision
from training.files import write_atomically

WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "digit_classifier.pt"
BATCH = 250  # images per forward pass outside training


class DigitClassifier(nn.Module):
    """Maps images [B, 1, 28, 28] in [-1, 1] to digit logits [B, 10]; `features` returns the last layer's input."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *convolution(1, 32), nn.MaxPool2d(2),   # 28x28 -> 14x14
            *convolution(32, 48), nn.MaxPool2d(2),  # 14x14 -> 7x7
            *convolution(48, 96),
            *convolution(96, 96, padding=0),        # 7x7 -> 5x5
            nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(96 * 5 * 5, 64), nn.ReLU())
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.features(x))


def convolution(channels_in, channels_out, padding=1):
    """Return the layers of a 3x3 convolution with batch normalisation and ReLU."""
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=padding, bias=False)
    return layer, nn.BatchNorm2d(channels_out), nn.ReLU()


def load_classifier(device="cpu"):
    """Return the trained classifier in evaluation mode; raise UserError if its file is missing or damaged."""
    classifier = DigitClassifier()
    hint = (f"restore it, for example with: git checkout -- assets/{WEIGHTS.name}, or train it again with: "
            f"python -m evaluation.classifier")
    if not WEIGHTS.is_file():
        raise UserError(f"{WEIGHTS} is missing; {hint}")
    try:
        classifier.load_state_dict(load_checked(WEIGHTS))
    except (CheckpointError, RuntimeError, TypeError):
        raise UserError(f"{WEIGHTS} is damaged, or from another version; {hint}") from None
    return classifier.to(device).eval()


@torch.no_grad()
def features_and_probabilities(classifier, images):
    """Return the features [N, 64], all at least 0, and the digits' probabilities [N, 10] of images in [-1, 1].

    The classifier must be in evaluation mode, in which the functions here return it.
    """
    device = classifier.last.weight.device
    features = torch.cat([classifier.features(batch.to(device)) for batch in images.split(BATCH)])
    return features, classifier.last(features).softmax(1)


def accuracy(classifier, images, labels):
    """Return the share of images, in [0, 1], that are classified correctly."""
    _, probabilities = features_and_probabilities(classifier, images)
    return (probabilities.argmax(1).cpu() == labels.cpu()).double().mean().item()


# Training ------------------------------------------------------------------------------------------------------------

def train_classifier(loader, epochs, seed=0, device="cpu"):
    """Return a classifier trained on slightly distorted batches of a loader such as mnist.mnist's.

    Uses Adam with a one-cycle learning rate of at most 3e-3 (Smith and Topin, arXiv:1708.07120).
    """
    torch.manual_seed(seed)
    classifier = DigitClassifier().to(device, memory_format=torch.channels_last)
    steps = epochs * len(loader)
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", disable=None, leave=False) as bar:
        for _ in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(classifier(distorted(x.to(device))), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.eval()


def distorted(images):
    """Return images [B, 1, 28, 28] in [-1, 1], each slightly rotated, sheared, scaled and shifted at random.

    Each entry of the 2x2 matrix changes by up to 0.15 (0.15 rad, about 9 degrees, or 15 %); the shift is at most 2
    pixels in each direction.
    """
    matrix = torch.eye(2).repeat(len(images), 1, 1) + 0.15 * (2 * torch.rand(len(images), 2, 2) - 1)
    shift = 2 / 14 * (2 * torch.rand(len(images), 2, 1) - 1)  # affine_grid's unit is 14 pixels
    grid = F.affine_grid(torch.cat([matrix, shift], 2).to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # pads with 0, which is the background here


def main(args):
    """Train on MNIST's training set, print the classifier's accuracy, and write its weights."""
    torch.manual_seed(args.seed)
    device = choose_device(args.no_cuda, mps=False)
    set_precision("fp32", device)
    keep_freed_memory()
    test = mnist(args.data_dir, train=False).dataset.tensors
    classifier = train_classifier(mnist(args.data_dir, 128), args.epochs, args.seed, device)
    classifier.half().float()  # rounds the weights to the stored precision
    print_line(f"accuracy on MNIST's test images: {accuracy(classifier, *test):.2%}")
    bundled = [torch.cat(parts) for parts in zip(load_digits(train=True), load_digits(train=False), strict=True)]
    print_line(f"accuracy on the bundled digits: {accuracy(classifier, *bundled):.2%}")
    weights = {name: tensor.cpu().contiguous() for name, tensor in classifier.half().state_dict().items()}
    write_atomically(WEIGHTS, serialize(weights))
    print_line(f"weights saved in {WEIGHTS}")


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser("python -m evaluation.classifier",
                           f"Train the digit classifier that the evaluation uses, and replace {WEIGHTS.name}.")
    parser.add_argument("--data_dir", default="../data/", metavar="DIR",
                        help="MNIST's folder; the files are downloaded if missing")
    parser.add_argument("--epochs", type=number(int, 1), default=12, metavar="N", help="passes over the training set")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="random seed")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    return parser


def cli(argv=None):
    """Run `main` from the command line and return the exit status; report user errors in one sentence."""
    return run_program("python -m evaluation.classifier", main, make_parser().parse_args, argv,
                       "try --no-cuda, or end other programs")


if __name__ == "__main__":
    sys.exit(cli())
