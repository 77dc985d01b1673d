"""The data sets and their loader."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import os
import socket
import threading
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from unittests import HERE, Group

__unittest = True

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


class Data(Group):
    """The loader, MNIST's files (small, made up), their download (from localhost), and the bundled digits."""

    needs = ("mnist",)

    def setUp(self):
        super().setUp()
        self.new_root()
        self.files = {}  # each as it is and .gz
        for kind, count in (("train", 130), ("t10k", 20)):
            images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
                header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
                self.files[name] = header + array.tobytes()
                self.files[f"{name}.gz"] = gzip.compress(self.files[name], mtime=0)
        md5 = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in self.files.items()}
        packed = {name: md5.pop(name) for name in self.files if name.endswith(".gz")}
        self.err = self.enterContext(contextlib.redirect_stderr(io.StringIO()))  # with torchvision's progress bars
        self.enterContext(mock.patch.object(self.mnist, "MNIST_MD5", md5))
        self.enterContext(mock.patch("torchvision.datasets.MNIST.resources", list(packed.items())))
        self.enterContext(mock.patch.dict(os.environ, {"no_proxy": "*"}))
        self.set_mirrors()

    def new_root(self):
        self.root = self.folder()
        self.raw = self.root / "MNIST" / "raw"
        self.raw.mkdir(parents=True)

    def put(self, place="{}"):
        """Write the files; `place` is a name's format, with the two ways of writing it as its arguments."""
        for name in self.mnist.MNIST_MD5:
            path = self.raw / place.format(name, name.replace("-idx", ".idx"))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.files[name + (".gz" if place.endswith(".gz") else "")])

    def mirror(self, change=bytes):
        """Serve the files, each changed by a function, on localhost; return the address."""
        folder = self.folder()
        for name, content in self.files.items():
            (folder / name).write_bytes(change(content))
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/"

    def set_mirrors(self, *mirrors):
        self.enterContext(mock.patch("torchvision.datasets.MNIST.mirrors", mirrors))

    def test_agrees_with_torchvision(self):
        from torchvision import datasets, transforms

        self.put()
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        for train in (True, False):
            images, labels = zip(*datasets.MNIST(self.root, train=train, transform=transform), strict=True)
            found, found_labels = self.mnist.load_mnist(self.root, train)
            torch.testing.assert_close(found, torch.stack(images), atol=1e-6, rtol=0)
            torch.testing.assert_close(found_labels, torch.tensor(labels))

    def test_interface_of_the_assignment(self):
        self.assertIn("(root='../data', batch_size=64, num_workers=4, download=True, ",
                      str(inspect.signature(self.mnist.mnist)))
        self.put()
        self.assertEqual([len(x) for x, _ in self.mnist.mnist(self.root, 64, 0, False)], [64, 64, 2])
        labels = torch.cat([y for _, y in self.mnist.mnist(self.root, train=False, batch_size=7)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)], "the test set has lost its order")

    def test_each_epoch_has_everything_in_an_order_of_the_seed(self):
        numbers, orders = torch.arange(130), []
        for seed, device in ((1, "cpu"), (1, "meta"), (2, "cpu")):
            torch.manual_seed(seed)
            with torch.device(device):  # like torch.set_default_device, which must not matter
                loader, stream = self.mnist.BatchLoader(numbers, numbers % 10, 64), torch.get_rng_state()
                for batches in (list(loader), list(loader)):
                    images, labels = map(torch.cat, zip(*batches, strict=True))
                    self.assertEqual(sorted(images.tolist()), list(range(130)))
                    self.assertEqual(labels.tolist(), (images % 10).tolist())
                    self.assertEqual(len({y.untyped_storage().data_ptr() for _, y in batches}), 1,
                                     "labels are gathered for each batch, which costs a GPU kernel per step")
                    orders.append(images.tolist())
            self.assertTrue(torch.equal(stream, torch.get_rng_state()), "shuffling uses torch's global generator")
        self.assertEqual((len(loader), orders[:2]), (3, orders[2:4]))
        self.check(orders[0] not in (orders[1], orders[4]), "two epochs or two seeds have the same order")

    def test_files_under_other_names(self):
        for place in ("{}.gz", "{1}", "{1}.gz", "{0}/{0}", "{0}/{1}", "{1}/{0}", "{1}/{1}"):
            self.new_root()
            self.put(place)
            self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130, place)
        with mock.patch.dict(os.environ, {"HOME": str(self.root.parent), "USERPROFILE": str(self.root.parent)}):
            self.assertEqual(len(self.mnist.load_mnist(f"~/{self.root.name}")[0]), 130, "~ is not the home folder")

    def test_damaged_file_is_named_and_not_used(self):
        for ending in ("", ".gz"):
            self.new_root()
            self.put("{}" + ending)
            path, whole = self.raw / (IMAGES + ending), self.files[IMAGES + ending]
            for damaged in (whole[:-1], whole[:10] + b"?" + whole[11:], b"", b"not MNIST at all"):
                path.write_bytes(damaged)
                with self.assertRaisesRegex(self.mnist.DataError, f"{path.name} is damaged") as caught:
                    self.mnist.load_mnist(self.root)
                self.assertNotIsInstance(caught.exception, self.mnist.MissingData)
        self.put("{}.gz")
        (self.raw / IMAGES).write_bytes(b"half")
        self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)
        self.assertIn(f"{self.raw / IMAGES} is damaged", self.err.getvalue())

    def test_downloads_are_from_the_first_mirror_that_works(self):
        silent = self.enterContext(socket.create_server(("127.0.0.1", 0)))  # connects, and sends nothing
        fail = (f"http://127.0.0.1:{silent.getsockname()[1]}/", self.mirror(lambda content: content[:-9]),
                self.mirror(lambda content: b"<html>log in</html>"),
                "http://nonsense:port/")  # for which urllib raises an error that is no OSError
        self.enterContext(mock.patch.object(self.mnist, "TIMEOUT", 1))
        self.set_mirrors(*fail)
        reasons = "(?s)no data.*corrupted.*corrupted.*'port.*" + ".*".join(self.mnist.MNIST_MD5)
        with self.assertRaisesRegex(self.mnist.MissingData, reasons):
            self.mnist.load_mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [])
        (self.raw / IMAGES).write_bytes(b"half")
        self.set_mirrors(*fail[1:], self.mirror())
        self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)
        self.assertEqual({file.name for file in self.raw.iterdir()}, {IMAGES, LABELS})
        self.assertEqual(len(self.mnist.load_mnist(self.root, download=False)[0]), 130)

    def test_silent_name_service_times_out(self):
        self.assertLess(2 * self.mnist.TIMEOUT, 20)
        self.set_mirrors("http://nowhere.invalid/")
        ended = threading.Event()
        self.addCleanup(ended.set)
        with mock.patch.object(self.mnist, "TIMEOUT", 0.5), \
                mock.patch("socket.getaddrinfo", side_effect=lambda *args: ended.wait()), \
                self.assertRaisesRegex(self.mnist.MissingData, "no data"):
            self.mnist.load_mnist(self.root)

    def test_folders_that_cannot_be_used(self):
        with self.assertRaisesRegex(self.mnist.MissingData, "downloading is disabled"):
            self.mnist.mnist(self.root, download=False)
        (self.root / "file").write_text("")
        for root in (self.root / "file", self.root / "file" / "below"):
            with self.assertRaisesRegex(self.mnist.DataError, "file is a file; .* --data_dir"):
                self.mnist.mnist(root)
        denied = mock.patch("pathlib.Path.mkdir", side_effect=PermissionError(13, "Permission denied"))
        full = mock.patch("os.replace", side_effect=OSError(28, "No space left on device"))
        with denied, self.assertRaisesRegex(self.mnist.MissingData, "put its four files there"):
            self.mnist.mnist(self.root / "new")  # with --dataset auto, a run continues
        self.set_mirrors(self.mirror())
        for failure, words in ((denied, "Permission denied.* --data_dir"), (full, "No space left.* free disk space")):
            with failure, self.assertRaisesRegex(self.mnist.DataError, f"cannot be written to .*{words}"):
                self.mnist.mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [], "half of a file was kept")

    def test_digits(self):
        table = torch.from_numpy(np.loadtxt(self.mnist.DIGITS_FILE, delimiter=",", dtype=np.float32))
        sixth = torch.arange(len(table)) % 6 == 5
        for train, rows in ((True, table[~sixth]), (False, table[sixth])):
            with torch.device("meta"):
                images, labels = self.mnist.load_digits(train)
            self.assertEqual((images.dtype, images.shape), (torch.float32, (1498 if train else 299, 1, 28, 28)))
            torch.testing.assert_close(labels, rows[:, 64].long())
            centre = images[:, :, 4:24, 4:24]
            self.check(nn.functional.pad(centre, (4, 4, 4, 4), value=-1).equal(images), "the border is not empty")
            pool, pixels = nn.functional.adaptive_avg_pool2d, rows[:, :64].view(-1, 1, 8, 8) / 8 - 1
            torch.testing.assert_close(pool(centre, 4), pool(pixels, 4), atol=0.3, rtol=0)
        with mock.patch.object(self.mnist, "DIGITS_FILE", self.root / "none"), \
                self.assertRaisesRegex(self.mnist.DataError, "none is missing or damaged; restore it"):
            self.mnist.load_digits()


class RealMnist(Group):
    """The real files, if they are in ../data."""

    needs = ("mnist",)

    def test_real_mnist(self):
        root = HERE.parent / "data"
        try:
            loader, test = (self.mnist.mnist(root, download=False, train=train) for train in (True, False))
        except self.mnist.MissingData:
            self.skipTest(f"MNIST is not in {root}")
        images, labels = loader.dataset.tensors
        self.assertEqual((len(loader), len(test), labels[:5].tolist()), (938, 157, [5, 0, 4, 1, 9]))
        self.assertAlmostEqual(float(images.double().mean()), 2 * 0.1307 - 1, places=3)  # the known mean of MNIST
