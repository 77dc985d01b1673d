"""Loading of a trained model, from a run or from its weights alone, and of the data set that it was trained on."""

import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import torch

from mnist import load_digits, load_mnist
from models import ENCODERS, NETWORKS, AdversarialAE
from training.cli import UserError
from training.files import WEIGHTS, load_checked


def load_run(path):
    """Return the trained model of a run, its settings, the file of its weights, and the folder for evaluation/.

    `path` is the run's folder or a file of weights, also outside a run. Raises UserError if there is no such model.
    """
    path = Path(os.path.expanduser(path))
    is_folder = os.path.isdir(path)  # Path.is_dir and is_file raise PermissionError in a folder of somebody else
    if is_folder and not os.path.isfile(path / "hparams.json"):
        raise UserError(f"{path} is not a run's folder, because it has no hparams.json; name a folder that train.py "
                        f"created, or a {WEIGHTS}")
    file = path / "checkpoints" / WEIGHTS if is_folder else path
    if not os.path.isfile(file):
        raise UserError(f"{file} does not exist, or cannot be read; name a run's folder, or a {WEIGHTS}")
    model, settings = load_model(file)
    folder = file.absolute().parent
    hparams = folder.parent / "hparams.json"
    if folder.name == "checkpoints" and os.path.isfile(hparams):
        return model, read_settings(hparams, settings), file, path if is_folder else folder.parent
    return model, settings, file, folder


def load_model(file):
    """Return the model that has the weights in a file, and its settings: those that the weights fit, and MNIST."""
    content = load_checked(file)
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{file} does not contain a model's weights; name a {WEIGHTS}")
    if not all(tensor.isfinite().all() for tensor in content.values()):
        raise UserError(f"{file} has weights that are NaN or infinite: its training has diverged; evaluate another run")
    # Without the prefixes of names that DataParallel and compile add:
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in content.items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    z_dim = shapes.get("decoder.net.0.weight", ())[1:]
    for posterior, networks in itertools.product(ENCODERS, NETWORKS) if len(z_dim) == 1 else ():
        model = AdversarialAE(*z_dim, posterior, networks)
        if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()
                      if name in shapes or not name.startswith("discriminator.")}:  # which no measure uses
            model.load_state_dict(weights, strict=False)
            return model, {"z_dim": model.z_dim, "posterior": posterior, "networks": networks,
                           "trained_on": "mnist", "data_dir": "../data/"}
    raise UserError(f"{file} has weights of another model than models.AdversarialAE, or models.py has changed since; "
                    f"name a {WEIGHTS} of train.py")


def read_settings(hparams, inferred):
    """Return the settings of a run, or the inferred ones that it does not record; raise UserError if they disagree."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        settings = {**inferred, **json.loads(hparams.read_bytes())}
        if (all(settings[name] == inferred[name] for name in ("z_dim", "posterior", "networks"))
                and settings["trained_on"] in ("mnist", "digits") and isinstance(settings["data_dir"], str)):
            return settings
    raise UserError(f"{hparams} cannot be read, is damaged, or is from another run; copy checkpoints/{WEIGHTS} to "
                    f"another folder and name the copy, so that the settings are inferred from the weights")


def load_images(settings, data_dir=None):
    """Return the training images, test images and test labels of the data set of a run."""
    if settings["trained_on"] == "digits":
        return load_digits(train=True)[0], *load_digits(train=False)
    root = data_dir or settings["data_dir"]
    return load_mnist(root, train=True)[0], *load_mnist(root, train=False)
