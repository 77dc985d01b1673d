"""The training data: MNIST or the bundled digits, decoded once into tensors, and the loader that shuffles them.

MNIST (LeCun, Cortes and Burges) is read from its four idx files in `<root>/MNIST/raw/`, where torchvision keeps them.
Each file's MD5 is checked; missing or damaged files are downloaded from torchvision's mirrors.

The bundled digits are the 1,797 images of "Optical Recognition of Handwritten Digits" (see assets/README.md). They
replace MNIST on machines without a network.
"""

import gzip
import hashlib
import http.client
import io
import os
import queue
import sys
import threading
import time
import urllib.request
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

MNIST_FILES = {True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
               False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.csv.gz"
DIGITS_MD5 = "a0339c30a8a5312a1b6f9e5c719dcce5"

TIMEOUT = 12  # seconds to wait for data, divided among the mirrors
TRANSFER_LIMIT = 300  # seconds for the whole download of one file, at most 10 MB


class DataError(RuntimeError):
    """The data cannot be loaded; the message says why and what to do."""


class MissingData(DataError):
    """The files are missing and could not be downloaded."""


class DamagedData(DataError):
    """A file exists, but its content is wrong."""


def mnist(root="../data", batch_size=64, num_workers=4, download=True, train=True, device="cpu"):
    """Return a loader of MNIST: batches (x, y), x float32 [B, 1, 28, 28] in [-1, 1], y int64 [B].

    The training set is reshuffled each epoch; the test set (`train=False`) keeps its order. The last, partial batch is
    included. `num_workers` is part of the interface but has no effect: the images are in memory, on `device`.
    Raises MissingData, DamagedData, or DataError if `root` is not usable.
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
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = torch.initial_seed()
        self.epoch = 0
        self.skip = 0

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self):
        images, labels = self.dataset.tensors
        order = self._next_order().to(images.device)
        batches = list(zip(order.split(self.batch_size), labels[order].split(self.batch_size), strict=True))[self.skip:]
        self.skip = 0
        for chosen, chosen_labels in batches:  # labels are gathered once an epoch: training does not read them
            yield images[chosen], chosen_labels

    def _next_order(self):
        """Return the next epoch's indices: the same on every device, and without torch's global generator."""
        if not self.shuffle:
            return torch.arange(len(self.dataset))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch += 1
        return torch.randperm(len(self.dataset), generator=generator)


def load_mnist(root="../data", train=True, download=True):
    """Return the images, float32 [N, 1, 28, 28] in [-1, 1], and labels, int64 [N], of MNIST; N is 60,000 or 10,000.

    File format (http://yann.lecun.com/exdb/mnist/): a header of 16 bytes for images and 8 bytes for labels, then one
    unsigned byte per value.
    """
    images, labels = (read_idx(root, name, download) for name in MNIST_FILES[train])
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return (torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1),
            torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)))


def load_digits(train=True):
    """Return images and labels of the bundled digits, like `load_mnist`; every sixth digit is in the test set.

    The 8x8 images with values from 0 to 16 are enlarged to 20x20 and padded to 28x28, the layout of MNIST's digits.
    """
    content = checked_content(DIGITS_FILE, DIGITS_MD5)
    if content is None:
        raise DamagedData(f"{DIGITS_FILE} is missing or damaged; restore it, for example with: git checkout -- assets")
    table = torch.from_numpy(np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.float32))
    chosen = (torch.arange(len(table)) % 6 != 5) == train
    images = (table[chosen, :64] / 8 - 1).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return F.pad(images, (4, 4, 4, 4), value=-1.0), table[chosen, 64].long()


def read_idx(root, name, download):
    """Return the content of one idx file: `name` or `name.gz` in `<root>/MNIST/raw/`, or downloaded."""
    raw = Path(root) / "MNIST" / "raw"
    places = [path for path in (raw / name, raw / f"{name}.gz") if os.path.lexists(path)]
    damaged = []
    for path in places:
        content = checked_content(path, MNIST_MD5[name])
        if content is not None:
            for other in damaged:
                print(f"{other} is damaged; reading {path} instead", file=sys.stderr)
            return content
        damaged.append(path)
    try:
        if not download:
            raise MissingData("downloading is disabled")
        content = download_idx(raw, name)
        for path in damaged:
            print(f"{path} is damaged; {name} was downloaded again", file=sys.stderr)
        return content
    except MissingData as error:
        if damaged:
            raise DamagedData(f"{damaged[0]} is damaged and could not be downloaded again ({error}); delete it, or "
                              f"replace it with an intact {name} or {name}.gz") from None
        raise MissingData(f"MNIST is not in {raw} and could not be downloaded ({error}); put its four files there, as "
                          f"idx or .gz, or check the network connection") from None


def checked_content(path, md5):
    """Return the content of a file, decompressed if it ends in .gz; None if it is missing or its MD5 is wrong."""
    if not Path(path).is_file():  # excludes folders, and pipes, which could block forever
        return None
    try:
        content = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None
    return content if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5 else None


def download_idx(raw, name):
    """Download one idx file into the folder `raw`, where torchvision also looks, and return its content."""
    temporary = raw / f"{name}.{os.getpid()}.tmp"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # before the download: fails at once if the folder is not writable
        content = fetch_idx(name)
        temporary.write_bytes(content)
        os.replace(temporary, raw / name)
    except OSError as error:
        raise DataError(f"MNIST cannot be written to {raw}: {error.strerror}; choose another folder with --data_dir, "
                        f"or free disk space or check the permissions there") from None
    finally:
        with suppress(OSError):  # exists only if something failed
            temporary.unlink()
    return content


def fetch_idx(name):
    """Return the content of one idx file from the first of torchvision's mirrors that sends it intact."""
    from torchvision.datasets import MNIST  # imported here because it takes a second and is rarely needed

    failures = []
    for mirror in MNIST.mirrors:
        try:
            content = gzip.decompress(fetch(f"{mirror}{name}.gz", TIMEOUT / len(MNIST.mirrors)))
        except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # the cause that urllib has wrapped
            failures.append(f"{mirror}: {getattr(reason, 'strerror', None) or reason}")
        else:
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == MNIST_MD5[name]:
                return content
            failures.append(f"{mirror}: sent something other than MNIST")
    raise MissingData("; ".join(failures))


def fetch(url, timeout):
    """Return the bytes at `url`; raise OSError if it fails or no data arrive for `timeout` seconds.

    It runs in a separate thread, which can be abandoned: a host name lookup has no time limit.
    """
    received, abandoned = queue.SimpleQueue(), threading.Event()

    def receive():
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                received.put(int(response.headers.get("Content-Length") or 0))
                while not abandoned.is_set() and (chunk := response.read1(1 << 16)):
                    received.put(chunk)
            received.put(b"")
        except Exception as error:  # of any kind: the waiting thread raises it
            received.put(error)

    threading.Thread(target=receive, daemon=True).start()
    try:
        return collect(received, timeout, f"downloading {url.rsplit('/', 1)[-1]}")
    finally:
        abandoned.set()


def collect(received, timeout, title):
    """Join the chunks in the queue; before them is the size in bytes (0: unknown), after them b"" or an exception."""
    content, deadline = bytearray(), time.monotonic() + TRANSFER_LIMIT
    with tqdm(desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        while time.monotonic() < deadline:
            try:
                item = received.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no answer within {timeout:g} s") from None
            if isinstance(item, Exception):
                raise item
            if isinstance(item, int):
                bar.total = item or None
            elif item:
                content += item
                bar.update(len(item))
            else:
                return bytes(content)
    raise TimeoutError(f"not complete after {TRANSFER_LIMIT} s")
