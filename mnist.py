"""The training data: MNIST or the bundled digits, decoded once into tensors, and the loader that shuffles them.

MNIST (LeCun, Cortes and Burges) is read from its four files in `<root>/MNIST/raw/`, where torchvision keeps them, and
downloaded with torchvision. The bundled digits, which replace it without a network, are those of assets/README.md.
"""

import gzip
import hashlib
import io
import os
import shutil
import sys
import tempfile
import threading
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
DIGITS_MD5 = "a0339c30a8a5312a1b6f9e5c719dcce5"
TIMEOUT = 8  # seconds without data after which the next of torchvision's two mirrors is tried


class DataError(RuntimeError):
    """A file is damaged, or a folder cannot be used; the message says what to do."""


class MissingData(DataError):
    """The files are missing and could not be downloaded."""


def mnist(root="../data", batch_size=64, num_workers=4, download=True, train=True, device="cpu"):
    """Return a loader of MNIST: batches (x, y), x float32 [B, 1, 28, 28] in [-1, 1], y int64 [B].

    The training set is reshuffled each epoch; the test set (`train=False`) keeps its order. The last, partial batch is
    included. `num_workers` is part of the interface but has no effect: the images are in memory, on `device`.
    Raises MissingData or DataError.
    """
    return BatchLoader(*load_mnist(root, train, download), batch_size, shuffle=train, device=device)


def digits(batch_size=64, train=True, device="cpu"):
    """Return a loader of the bundled digits, like `mnist`: 1,498 for training, 299 for testing."""
    return BatchLoader(*load_digits(train), batch_size, shuffle=train, device=device)


class BatchLoader:
    """Batches of tensors in memory. Torch's seed at construction and an epoch's number determine the epoch's order.

    Attributes: `dataset`, a TensorDataset of (images, labels); `batch_size`; `epoch`, the number of the next epoch,
    from 0; `skip`, how many of its batches to skip at the beginning.
    """

    def __init__(self, images, labels, batch_size, shuffle=True, device="cpu"):
        self.dataset = TensorDataset(images.to(device), labels.to(device))
        self.batch_size, self.shuffle = batch_size, shuffle
        self.seed, self.epoch, self.skip = torch.initial_seed(), 0, 0

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
            self.epoch += 1
        order, skip, self.skip = order.to(images.device), self.skip, 0
        batches = list(zip(order.split(self.batch_size), labels[order].split(self.batch_size), strict=True))
        for chosen, chosen_labels in batches[skip:]:  # labels are gathered once an epoch
            yield images[chosen], chosen_labels


def load_mnist(root="../data", train=True, download=True):
    """Return the images, float32 [N, 1, 28, 28] in [-1, 1], and labels, int64 [N], of MNIST; N is 60,000 or 10,000.

    Each file has a header, of 16 bytes for images and 8 for labels, and then one unsigned byte per value.
    """
    raw, kind = Path(root).expanduser() / "MNIST" / "raw", "train" if train else "t10k"
    pixels = np.frombuffer(read_idx(raw, f"{kind}-images-idx3-ubyte", download), np.uint8, offset=16)
    labels = np.frombuffer(read_idx(raw, f"{kind}-labels-idx1-ubyte", download), np.uint8, offset=8)
    images = torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1)
    return images.view(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64))


def load_digits(train=True):
    """Return images and labels of the bundled digits, like `load_mnist`; every sixth digit is in the test set.

    The 8x8 images with values from 0 to 16 are enlarged to 20x20 and padded to 28x28, the layout of MNIST's digits.
    """
    content = checked_content(DIGITS_FILE, DIGITS_MD5)
    if content is None:
        raise DataError(f"{DIGITS_FILE} is missing or damaged; restore it, for example with: git checkout -- assets")
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.float32)
    table = torch.from_numpy(table[(np.arange(len(table)) % 6 != 5) == train])
    images = F.interpolate((table[:, :64] / 8 - 1).view(-1, 1, 8, 8), size=(20, 20), mode="bilinear")
    return F.pad(images, (4, 4, 4, 4), value=-1.0), table[:, 64].long()


def read_idx(raw, name, download):
    """Return the content of MNIST's file `name`, from the folder `raw` or downloaded.

    Other copies have a dot in the name, or lie in a folder that an unpacking program has named after the file.
    """
    names, damaged = (name, name.replace("-idx", ".idx")), []
    places = [file + end for file in names for end in ("", ".gz")] + [f"{a}/{b}" for a in names for b in names]
    for path in filter(os.path.isfile, (raw / place for place in places)):  # no pipe, which could block forever
        if content := checked_content(path, MNIST_MD5[name]):
            break
        damaged.append(path)
    else:
        try:
            content = download_idx(raw, name, download)
        except MissingData as error:
            if damaged:
                raise DataError(f"{damaged[0]} is damaged and could not be downloaded again ({error}); delete it, or "
                                f"replace it with an intact {name} or {name}.gz") from None
            raise MissingData(f"MNIST is not in {raw} and could not be downloaded ({error}); put its four files there, "
                              f"{', '.join(MNIST_MD5)}, as they are or .gz, or check the network connection") from None
    for path in damaged:
        print(f"{path} is damaged; an intact {name} is used instead", file=sys.stderr)
    return content


def checked_content(path, md5):
    """Return the content of a file, decompressed if it ends in .gz; None if it is missing or its MD5 is wrong."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None
    return content if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5 else None


def download_idx(raw, name, download):
    """Download one of MNIST's files from torchvision's mirrors, store it in `raw`, and return its content."""
    for path in filter(os.path.isfile, (raw, *raw.parents)):
        raise DataError(f"{path} is a file; choose a folder for MNIST with --data_dir")
    if not download:
        raise MissingData("downloading is disabled")
    from torchvision.datasets import MNIST  # imported here because it takes a second and is rarely needed

    failures = []
    try:
        for mirror in MNIST.mirrors:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                failure = fetch(f"{mirror}{name}.gz", dict(MNIST.resources)[f"{name}.gz"], folder)
                if failure is None:
                    raw.mkdir(parents=True, exist_ok=True)
                    # Copied to the same disk first, so that the rename is atomic.
                    with tempfile.TemporaryDirectory(dir=raw, ignore_cleanup_errors=True) as near:
                        os.replace(shutil.copy(Path(folder) / name, near), raw / name)
                    return (raw / name).read_bytes()
            reason = getattr(failure, "reason", failure)  # the cause that urllib has wrapped
            failures.append(f"{mirror}: {getattr(reason, 'strerror', None) or reason}")
    except OSError as error:
        raise DataError(f"MNIST cannot be written to {raw}: {error.strerror}; choose another folder with --data_dir, "
                        f"or free disk space or check the permissions there") from None
    raise MissingData("; ".join(failures))


def fetch(url, md5, folder):
    """Download a file with torchvision and unpack it in a folder; return what failed, or None.

    A thread does it, which is abandoned after TIMEOUT seconds without data: a socket's own time limit holds for each of
    a host's addresses anew, and not for the name service.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    def run():
        try:
            download_and_extract_archive(url, folder, md5=md5)
        except Exception as error:  # of any kind: an answer may be anything
            failures.append(error)

    print(f"downloading {url}", file=sys.stderr)
    failures, before, size = [], -1, 0
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and before < size:
        thread.join(TIMEOUT)
        before, size = size, sum(file.stat().st_size for file in Path(folder).iterdir())
    return TimeoutError(f"no data for {TIMEOUT} s") if thread.is_alive() else next(iter(failures), None)
