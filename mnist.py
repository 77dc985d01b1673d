"""The training data: MNIST or the bundled digits, decoded once into tensors, and the loader that shuffles them.

MNIST (LeCun, Cortes and Burges) is in `<root>/MNIST/raw/`, as torchvision has it; the digits: assets/README.md.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import socket
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.csv.gz"
TIMEOUT = 20  # seconds without data after which another address of a mirror, then the next mirror is tried


class DataError(RuntimeError):
    """A file is damaged, or a folder cannot be used; the message says what to do."""


class MissingData(DataError):
    """The files are missing and could not be downloaded."""


def mnist(root="../data", batch_size=64, num_workers=4, download=True, train=True, device="cpu"):
    """Return a loader of MNIST: batches (x, y), x float32 [B, 1, 28, 28] in [-1, 1], y int64 [B].

    The training set is reshuffled each epoch; the test set (`train=False`) keeps its order. The last, partial batch is
    included. `num_workers` has no effect: the images are in memory, on `device`. Raises MissingData or DataError.
    """
    return BatchLoader(*load_mnist(root, train, download), batch_size, shuffle=train, device=device)


def digits(batch_size=64, train=True, device="cpu"):
    """Return a loader of the bundled digits, like `mnist`: 1,498 for training, 299 for testing."""
    return BatchLoader(*load_digits(train), batch_size, shuffle=train, device=device)


class BatchLoader:
    """Batches (images, labels) of the TensorDataset `dataset`; `epoch` is the number of the next epoch, from 0."""

    def __init__(self, images, labels, batch_size, shuffle=True, device="cpu"):
        self.dataset = TensorDataset(images.to(device), labels.to(device))
        self.batch_size, self.shuffle = batch_size, shuffle
        self.seed, self.epoch = torch.initial_seed(), 0  # together, they determine the order of an epoch

    def state_dict(self):
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.seed, self.epoch = state["seed"], state["epoch"]

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self):
        images, labels = self.dataset.tensors
        order = torch.arange(len(images), device="cpu")  # "cpu": torch's default device may be another
        if self.shuffle:  # the same order on every device, and without torch's global generator
            generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(len(images), generator=generator, device="cpu")
        order, self.epoch = order.to(images.device), self.epoch + 1
        for chosen, y in zip(order.split(self.batch_size), labels[order].split(self.batch_size), strict=True):
            yield images[chosen], y  # labels are gathered once an epoch


def load_mnist(root="../data", train=True, download=True):
    """Return the images, float32 [N, 1, 28, 28] in [-1, 1], and labels, int64 [N], of MNIST; N is 60,000 or 10,000."""
    raw, kind = Path(root).expanduser() / "MNIST" / "raw", "train" if train else "t10k"
    pixels = np.frombuffer(read_idx(raw, f"{kind}-images-idx3-ubyte", download), np.uint8, offset=16)  # past a header
    labels = np.frombuffer(read_idx(raw, f"{kind}-labels-idx1-ubyte", download), np.uint8, offset=8)
    images = torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1)
    return images.view(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64))


def load_digits(train=True):
    """Return images and labels of the bundled digits, like `load_mnist`; every sixth digit is in the test set."""
    try:
        table = np.loadtxt(DIGITS_FILE, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error):
        raise DataError(f"{DIGITS_FILE} is missing or damaged; restore it: git checkout -- assets") from None
    table = torch.from_numpy(table[(np.arange(len(table)) % 6 != 5) == train])
    # From 8x8 and values from 0 to 16, enlarged to 20x20 and padded to 28x28, the layout of MNIST's digits.
    images = F.interpolate((table[:, :64] / 8 - 1).view(-1, 1, 8, 8), size=(20, 20), mode="bilinear")
    return F.pad(images, (4, 4, 4, 4), value=-1.0), table[:, 64].long()


def read_idx(raw, name, download):
    """Return the content of MNIST's file `name`, which may be .gz, have a dot or lie in a subfolder; or download it."""
    pattern = name.replace("-idx", "[-.]idx")
    paths = [path for place in (pattern, f"{pattern}.gz", f"*/{pattern}") for path in raw.glob(place)]
    found = [path for path in paths if path.is_file()]  # no pipe, which could block forever
    for path in found:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == MNIST_MD5[name]:
                return content
    if found:  # what others have put there is never replaced
        raise DataError(f"{found[0]} is damaged, unreadable or not MNIST's; move it away, so that MNIST is downloaded, "
                        f"or choose another --data_dir")
    for path in filter(os.path.isfile, (raw, *raw.parents)):
        raise DataError(f"{path} is a file; choose a folder for MNIST with --data_dir")
    if failures := download_mnist(raw) if download else ["downloading is disabled"]:
        raise MissingData(
            f"MNIST is not in {raw} and could not be downloaded ({'; '.join(failures)}); put its four files there, "
            f"{', '.join(MNIST_MD5)}, as they are or .gz, check network and disk, or choose another --data_dir")
    return read_idx(raw, name, download=False)


def download_mnist(raw):
    """Download MNIST and move its files to `raw` where they are missing; return what failed, if it did."""
    from torchvision.datasets import MNIST  # imported here because it takes a second and is rarely needed

    failures, before = [], socket.getdefaulttimeout()
    for mirror in MNIST.mirrors:
        print(f"downloading MNIST from {mirror}, waiting at most {TIMEOUT} s for data", file=sys.stderr)
        socket.setdefaulttimeout(TIMEOUT)
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw, ignore_cleanup_errors=True) as folder:
                type("MNIST", (MNIST,), {"mirrors": [mirror]})(folder, download=True)
                for name in MNIST_MD5:
                    if not (raw / name).exists():
                        os.replace(Path(folder, "MNIST", "raw", name), raw / name)
            return []
        except Exception as error:  # of any kind: an answer may be anything
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise DataError(f"the disk of {raw} is full; free space, or choose another --data_dir") from None
            _, _, reason = (str(error).strip() or repr(error)).rpartition("\n")
            failures.append(f"{mirror}: {reason}")
        finally:
            socket.setdefaulttimeout(before)
    return failures
