"""Loading of a trained model, from a run or from its weights alone, and of the data set that it was trained on."""

import contextlib
import hashlib
import itertools
import json
import re
from pathlib import Path

from mnist import load_digits, load_mnist
from models import ENCODERS, NETWORKS, AdversarialAE
from training.cli import UserError
from training.files import WEIGHTS, load_checked


def load_run(path):
    """Return the trained model of a run, its settings, and the folder for what is measured.

    `path` is the run's folder or a file of weights, also outside a run. Raises UserError for weights of another model.
    """
    path = Path(path).expanduser()
    file = path / "checkpoints" / WEIGHTS if path.is_dir() else path
    model, settings = load_model(file)
    folder = file.absolute().parent
    if folder.name != "checkpoints":
        return model, settings, folder / f"{file.stem}_evaluation"
    return model, read_settings(folder.parent / "hparams.json", settings), folder.parent / "evaluation"


def load_model(file):
    """Return the model that has the weights in a file, and its settings: those that the weights fit, and MNIST."""
    content = file.read_bytes()  # once, as a run may save others at any time
    saved = load_checked(file, content=content)
    # Without the prefixes of names that DataParallel and compile add:
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in
               (saved.items() if isinstance(saved, dict) else ())}
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    z_dim = (shapes.get("decoder.net.0.weight") or ())[1:]
    for posterior, networks in itertools.product(ENCODERS, NETWORKS) if len(z_dim) == 1 else ():
        model = AdversarialAE(*z_dim, posterior, networks)
        if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()
                      if name in shapes or not name.startswith("discriminator.")}:  # which no measure uses
            break
    else:
        raise UserError(f"{file} does not have weights of models.AdversarialAE, or models.py has changed since; name a "
                        f"{WEIGHTS} of train.py")
    model.load_state_dict(weights, strict=False)
    return model, {"weights": str(file), "weights_md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
                   "trained_on": "mnist", "data_dir": "../data/",
                   "z_dim": model.z_dim, "posterior": posterior, "networks": networks}


def read_settings(hparams, inferred):
    """Return the settings of a run, or the inferred ones that it does not record; raise UserError if they disagree."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        settings = {**inferred, **json.loads(hparams.read_bytes())}
        if (all(settings[name] == inferred[name] for name in ("z_dim", "posterior", "networks"))
                and settings["trained_on"] in ("mnist", "digits") and isinstance(settings["data_dir"], str)):
            return settings
    raise UserError(f"{hparams} is missing, damaged, or from another run; copy checkpoints/{WEIGHTS} to another folder "
                    f"and name the copy, so that the settings are inferred from the weights")


def load_images(settings, data_dir=None):
    """Return the training images, test images and test labels of the data set of a run."""
    if settings["trained_on"] == "digits":
        return load_digits(train=True)[0], *load_digits(train=False)
    root = data_dir or settings["data_dir"]
    return load_mnist(root, train=True)[0], *load_mnist(root, train=False)
