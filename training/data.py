"""The training and test data of a run."""

from typing import NamedTuple

import torch

from mnist import DataError, MissingData, digits, load_digits, load_mnist, mnist
from training.cli import warn


class Data(NamedTuple):
    """The data of a run: images [N, 1, 28, 28] in [-1, 1], and labels [N]."""

    train_loader: object
    name: str                         # "mnist" or "digits"
    warning: str | None               # set if the bundled digits replace MNIST
    fixed_images: torch.Tensor        # one of each label, shown with its reconstruction
    test_images: torch.Tensor | None  # None if they are not available
    test_labels: torch.Tensor | None


def load_data(args, device, settings):
    """Return the Data that the flags specify; for a resumed run, which has `settings` already, the Data of that run."""
    dataset, warning = (settings["trained_on"], settings["fallback"]) if settings else (args.dataset, None)
    if dataset != "digits":
        try:
            dataset, loader = "mnist", mnist(args.data_dir, args.batch_size, args.num_workers, device=device)
        except MissingData as error:
            if dataset == "mnist":
                raise
            dataset, warning = "digits", f"this run trains on the bundled digits instead of MNIST: {error}"
            warn(warning)
    if dataset == "digits":
        loader = digits(args.batch_size, device=device)
    return Data(loader, dataset, warning, one_of_each_label(loader.dataset), *load_test_set(args, dataset, device))


def load_test_set(args, name, device):
    """Return the test images and labels; if they are not available, warn and return None twice."""
    try:
        images, labels = load_digits(train=False) if name == "digits" else load_mnist(args.data_dir, train=False)
    except DataError as error:
        warn(f"nothing is measured on test images: {error}")
        return None, None
    return images.to(device), labels


def one_of_each_label(dataset):
    """Return the first image of each label of a TensorDataset, in the order of the labels."""
    images, labels = dataset.tensors
    return torch.stack([images[(labels == label).nonzero()[0, 0]] for label in labels.unique()])
