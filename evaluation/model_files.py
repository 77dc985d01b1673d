"""Loading of a model, from a run or from its weights alone, and of the data that it was trained on."""

import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import torch

from mnist import load_digits, load_mnist
from models import ENCODERS, NETWORKS, AdversarialAE
from training.checkpoint import WEIGHTS, load_checked
from training.cli import UserError

DEFAULTS = {"posterior": "deterministic", "networks": "base", "trained_on": "mnist",
            "data_dir": "../data/"}  # for what older runs and weights alone do not record


def find_run(path):
    """Return the folder for evaluation/, the file of the weights, and the run's settings (None without a run)."""
    path = Path(path).expanduser()
    if path.is_dir() and not os.path.isfile(path / "hparams.json"):
        raise UserError(f"{path} is not a run's folder, because it has no hparams.json; name a folder that train.py "
                        f"created, or a {WEIGHTS}")
    weights = path / "checkpoints" / WEIGHTS if path.is_dir() else path
    if not os.path.isfile(weights):  # Path.is_file raises PermissionError for a folder of somebody else
        raise UserError(f"{weights} does not exist, or cannot be read; name a run's folder, or a {WEIGHTS}")
    folder = weights.absolute().parent
    settings = folder.parent / "hparams.json"
    if folder.name == "checkpoints" and os.path.isfile(settings):
        return path if path.is_dir() else folder.parent, weights, read_settings(settings)
    return folder, weights, None


def read_settings(path):
    """Return the settings in a run's hparams.json; raise UserError if those used here are invalid."""
    try:
        settings = {**DEFAULTS, **json.loads(path.read_bytes())}
        if (type(settings["z_dim"]) is int and settings["z_dim"] > 0 and settings["posterior"] in ENCODERS
                and settings["networks"] in NETWORKS and settings["trained_on"] in ("mnist", "digits")
                and isinstance(settings["data_dir"], str)):
            return settings
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, or not from train.py; copy the run's checkpoints/{WEIGHTS} to another folder "
                    f"and name the copy, so that the settings are inferred from the weights")


def read_weights(path):
    """Return the state_dict in a file, on the CPU, without the prefixes of names that DataParallel and compile add.

    Raises UserError if there is none, or one with NaN.
    """
    weights = load_checked(path)
    if not isinstance(weights, dict) or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        raise UserError(f"{path} does not contain a model's weights; name a {WEIGHTS}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} has weights that are NaN or infinite: its training has diverged; evaluate another run")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in weights.items()}


def settings_from_weights(path, weights):
    """Return the settings of a model without a run: those that its weights fit; the data set is MNIST."""
    for posterior, networks in itertools.product(ENCODERS, NETWORKS):
        with contextlib.suppress(KeyError, IndexError, UserError):
            settings = {**DEFAULTS, "z_dim": weights["decoder.net.0.weight"].shape[1], "posterior": posterior,
                        "networks": networks}
            load_model(path, weights, settings)
            return settings
    raise UserError(f"{path} has weights of another model than models.AdversarialAE; name a {WEIGHTS} of train.py")


def load_model(path, weights, settings):
    """Return the model with a run's settings and weights; raise UserError if the weights do not fit the settings.

    Without weights of the discriminator, which no measure uses, it keeps its initial ones.
    """
    model = AdversarialAE(settings["z_dim"], settings["posterior"], settings["networks"])
    needed = {name: tensor.shape for name, tensor in model.state_dict().items()
              if name in weights or not name.startswith("discriminator.")}
    if {name: tensor.shape for name, tensor in weights.items()} != needed:
        raise UserError(f"{path} does not fit a models.AdversarialAE with z_dim {settings['z_dim']}, "
                        f"{settings['posterior']} encoder and {settings['networks']} networks: hparams.json is from "
                        f"another run, or models.py has changed since; evaluate another run")
    model.load_state_dict(weights, strict=False)
    return model


def load_images(settings, data_dir=None):
    """Return the training images, test images and test labels of the data set of a run."""
    if settings["trained_on"] == "digits":
        return load_digits(train=True)[0], *load_digits(train=False)
    root = data_dir or settings["data_dir"]
    return load_mnist(root, train=True)[0], *load_mnist(root, train=False)
