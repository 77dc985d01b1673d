"""Train the digit classifier that the evaluation uses:  python -m benchmarks.classifier

Accuracy: 99.66 % on MNIST's 10,000 test images, and 90.4 % on the 1,797 bundled digits, on which it was not trained.
Training took 3 min 46 s on two cores of an AMD EPYC (Zen 5) with torch 2.15.0.
"""

import argparse

import torch
import torch.nn.functional as F

from evaluation.classifier import CLASSIFIER, digit_classifier, features_and_probabilities
from mnist import load_digits, load_mnist, mnist
from training.device import setup_device
from training.files import serialize, write_atomically


def train_classifier(loader, epochs=12, seed=0, device="cpu"):
    """Return a classifier trained on slightly distorted batches of a loader such as mnist.mnist's.

    Uses Adam with a one-cycle learning rate of at most 3e-3 (Smith and Topin, arXiv:1708.07120).
    """
    torch.manual_seed(seed)
    classifier = digit_classifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(classifier(distorted(x.to(device))), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def distorted(images):
    """Return images [B, 1, 28, 28] in [-1, 1], rotated, sheared and scaled by up to 0.15, and shifted by 2 pixels."""
    matrix = torch.eye(2).repeat(len(images), 1, 1) + 0.15 * (2 * torch.rand(len(images), 2, 2) - 1)
    shift = 2 / 14 * (2 * torch.rand(len(images), 2, 1) - 1)  # affine_grid's unit is 14 pixels
    grid = F.affine_grid(torch.cat([matrix, shift], 2).to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # pads with 0, which is the background here


def accuracy(classifier, images, labels):
    """Return the share of images, in [0, 1], that are classified correctly."""
    _, probabilities = features_and_probabilities(classifier, images)
    return (probabilities.argmax(1).cpu() == labels.cpu()).double().mean().item()


def main(args):
    """Train on MNIST's training set, print the classifier's accuracy, and write its weights."""
    device = setup_device()
    torch.manual_seed(0)  # of the batches' order, too
    classifier = train_classifier(mnist(args.data_dir, 128), device=device)
    classifier.half().float()  # rounds the weights to the stored precision
    print(f"accuracy on MNIST's test images: {accuracy(classifier, *load_mnist(args.data_dir, train=False)):.2%}")
    bundled = [torch.cat(parts) for parts in zip(load_digits(train=True), load_digits(train=False), strict=True)]
    print(f"accuracy on the bundled digits: {accuracy(classifier, *bundled):.2%}")
    weights = {name: tensor.cpu().contiguous() for name, tensor in classifier.half().state_dict().items()}
    write_atomically(CLASSIFIER, serialize(weights))
    print(f"weights saved in {CLASSIFIER}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"Train the digit classifier; replaces {CLASSIFIER.name}.")
    parser.add_argument("--data_dir", default="../data/", help="MNIST's folder")
    main(parser.parse_args())
