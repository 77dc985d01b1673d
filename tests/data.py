"""The data sets and their loader."""

import gzip
import hashlib
import http.server
import io
import os
import socket
import threading
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from tests.common import FolderGroup
from tests.train_run import write_mnist
from unittests import HERE, images_like_mnist

__unittest = True


class Data(FolderGroup):
    """The loader, MNIST's files (small, made up), their download (from localhost), and the bundled digits."""

    needs = ("mnist", "training.data")
    IMAGES = "train-images-idx3-ubyte"

    def setUp(self):
        super().setUp()
        self.root, self.files, self.md5, self.timeout = self.folder(), {}, self.mnist.MNIST_MD5, self.mnist.TIMEOUT
        raw = write_mnist(self.folder(), train=images_like_mnist(130), t10k=images_like_mnist(20))
        for path in raw.iterdir():
            self.files[path.name] = path.read_bytes()
            self.files[f"{path.name}.gz"] = gzip.compress(self.files[path.name], mtime=0)
        md5 = {file: hashlib.md5(content, usedforsecurity=False).hexdigest() for file, content in self.files.items()}
        packed = [(file, md5.pop(file)) for file in self.files if file.endswith(".gz")]
        self.err = self.enterContext(mock.patch("sys.stderr", new_callable=io.StringIO))  # with progress bars
        self.enterContext(mock.patch.multiple(self.mnist, MNIST_MD5=md5, TIMEOUT=1))
        self.enterContext(mock.patch.multiple("torchvision.datasets.MNIST", resources=packed, mirrors=[]))
        self.enterContext(mock.patch.dict(os.environ, {"no_proxy": "*"}))
        self.enterContext(torch.device("meta"))  # what an earlier cell of a notebook has set must not matter
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)

    def put(self, place):
        """Write the files to a new folder; `place` is a name's format, with the two ways of writing it as arguments."""
        gz = ".gz" * place.endswith(".gz")
        self.root = self.folder({f"MNIST/raw/{place.format(name, name.replace('-idx', '.idx'))}": self.files[name + gz]
                                 for name in self.md5})

    def mirror(self, change=bytes):
        """Serve the files, each changed by a function, on localhost; return the address."""
        folder = self.folder({name: change(content) for name, content in self.files.items()})
        server = self.enterContext(http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args:
                                   http.server.SimpleHTTPRequestHandler(*args, directory=folder)))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/"

    def test_agrees_with_torchvision_in_each_layout_and_with_the_interface(self):
        from torchvision.datasets import MNIST  # here, as it takes a second that other groups do not need

        self.put("{}")
        expected = MNIST(self.root)
        for place in ("{}.gz", "{1}", "{1}.gz", "{0}/{0}", "{0}/{1}", "{1}/{0}", "{1}/{1}", "{}"):
            self.put(place)
            with mock.patch.dict(os.environ, HOME=str(self.root), USERPROFILE=str(self.root)):
                images, labels = self.mnist.load_mnist("~")
            torch.testing.assert_close(images, expected.data.float()[:, None] / 127.5 - 1, atol=1e-6, rtol=0)
            torch.testing.assert_close(labels, expected.targets)
        self.assertEqual(self.mnist.mnist.__defaults__[:4], ("../data", 64, 4, True))
        loader = self.mnist.mnist(root=self.root, batch_size=64, num_workers=0, download=False)
        self.assertEqual([len(x) for x, _ in loader], [64, 64, 2])
        labels = torch.cat([y for _, y in self.mnist.mnist(self.root, train=False, batch_size=7)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)], "the test set has lost its order")

    def test_seed_and_epoch_determine_the_order(self):
        numbers, orders = torch.from_numpy(np.arange(130)), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            loader, stream = self.mnist.BatchLoader(numbers, numbers, 64), torch.get_rng_state()
            for _ in range(2):
                state, batches = loader.state_dict(), list(loader)
                images, labels = (torch.cat(parts).tolist() for parts in zip(*batches, strict=True))
                orders.append(images)
                self.assertEqual((sorted(images), labels), (list(range(130)), images))
                self.assertEqual(len({y.untyped_storage().data_ptr() for _, y in batches}), 1, "gathered per batch")
            self.check(torch.equal(stream, torch.get_rng_state()), "shuffling uses torch's global generator")
        self.assertEqual((orders[:2], len(loader), loader.epoch), (orders[2:4], 3, 2))
        self.assertEqual(len({*map(tuple, orders)}), 4, "two epochs or two seeds have the same order")
        torch.manual_seed(3)
        resumed = self.mnist.BatchLoader(numbers, numbers, 130)
        resumed.load_state_dict(state)
        self.assertEqual((next(iter(resumed))[0].tolist(), resumed.epoch), (orders[5], 2))

    def test_damaged_files_are_not_used(self):
        self.put("{}.gz")
        path, whole = self.root / "MNIST" / "raw" / f"{self.IMAGES}.gz", self.files[f"{self.IMAGES}.gz"]
        for damaged in (whole[:-1], whole[:10] + b"?" + whole[11:], b"", gzip.compress(b"not MNIST at all")):
            path.write_bytes(damaged)
            with mock.patch("torchvision.datasets.MNIST.mirrors", [self.mirror()]), \
                    self.assertRaisesRegex(self.mnist.DataError, f"{path.name} is damaged") as caught:
                self.mnist.load_mnist(self.root)
            self.assertEqual(path.read_bytes(), damaged, "a file of the user's is replaced")
            self.assertIs(type(caught.exception), self.mnist.DataError)  # not MissingData, which --dataset auto hides
        path.with_name(self.IMAGES.replace("-idx", ".idx")).write_bytes(self.files[self.IMAGES])
        self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)

    def test_download_that_fails_says_why_and_leaves_nothing(self):
        self.assertLessEqual(2 * self.timeout, 100, "two mirrors that do not answer")
        silent, good = self.enterContext(socket.create_server(("127.0.0.1", 0))), self.mirror()
        for mirror, patched, error, words in (
                (f"http://127.0.0.1:{silent.getsockname()[1]}/", "os.abort", None, "timed out.*put its four files"),
                (self.mirror(lambda _: b"<html>log in</html>"), "os.abort", None, "corrupted"),
                ("http://nonsense:port/", "os.abort", None, "'port'"),  # urllib raises an error that is no OSError
                (good, "os.mkdir", PermissionError(13, "Permission denied"), "Permission denied"),
                (good, "os.replace", OSError(28, "No space left on device"), "^the disk of .* is full"),
                (good, "os.replace", KeyboardInterrupt("Ctrl-C"), "^Ctrl-C")):
            with mock.patch("torchvision.datasets.MNIST.mirrors", [mirror]), mock.patch(patched, side_effect=error), \
                    self.assertRaisesRegex((self.mnist.DataError, KeyboardInterrupt), words) as caught:
                self.mnist.load_mnist(self.root)
            self.assertEqual(type(caught.exception) is self.mnist.DataError, "is full" in words)  # --dataset auto ends
            self.assertEqual([*self.root.glob("MNIST/raw/*")], [], words)
            self.assertIn(f"downloading MNIST from {mirror}, waiting at most 1 s for data", self.err.getvalue())
            self.assertIsNone(socket.getdefaulttimeout())

    def test_two_programs_download_at_once_from_the_first_mirror_that_works(self):
        self.addCleanup(socket.setdefaulttimeout, None)  # two threads may restore each other's
        root = self.folder({"MNIST/raw/notes": b"of the user"})
        mirrors = [self.mirror(lambda content: content[:-9]), "http://nonsense:port/", self.mirror()]
        with mock.patch("torchvision.datasets.MNIST.mirrors", mirrors), ThreadPool(2) as pool:
            self.assertEqual([len(images) for images, _ in pool.map(self.mnist.load_mnist, [root] * 2)], [130] * 2)
        self.assertEqual({path.name for path in root.glob("MNIST/raw/*")}, {*self.mnist.MNIST_MD5, "notes"})

    def test_settings_of_a_resumed_run_decide(self):
        args = mock.Mock(dataset="auto", data_dir=self.root, batch_size=64)
        self.assertIn("MNIST is not in", self.data.load_data(args, "cpu", None).warning)
        loader, *others, shown, _, _ = self.data.load_data(args, "cpu", {"trained_on": "digits", "fallback": "then"})
        images, labels = loader.dataset.tensors
        self.assertEqual(others, ["digits", "then"])
        self.assertTrue(shown.equal(torch.cat([images[labels == label][:1] for label in range(10)])))
        with self.assertRaises(self.mnist.MissingData):
            self.data.load_data(args, "cpu", {"trained_on": "mnist", "fallback": None})

    def test_digits(self):
        table = torch.from_numpy(np.loadtxt(self.mnist.DIGITS_FILE, delimiter=",", dtype=np.float32))
        sixth = torch.from_numpy(np.arange(len(table)) % 6 == 5)
        for train, rows in ((True, table[~sixth]), (False, table[sixth])):
            images, labels = self.mnist.load_digits(train)
            torch.testing.assert_close(labels, rows[:, 64].long())
            centre, pixels = images[:, :, 4:24, 4:24], rows[:, :64].view(-1, 1, 8, 8) / 8 - 1
            self.check(F.pad(centre, (4, 4, 4, 4), value=-1).equal(images), "the border is not empty")
            coarse, expected = F.adaptive_avg_pool2d(centre, 4), F.adaptive_avg_pool2d(pixels, 4)
            torch.testing.assert_close(coarse, expected, atol=0.3, rtol=0)
        with mock.patch.object(self.mnist, "DIGITS_FILE", self.root), self.assertRaisesRegex(RuntimeError, "restore"):
            self.mnist.load_digits()

    def test_real_mnist(self):
        root = HERE.parent / "data"
        try:
            with mock.patch.object(self.mnist, "MNIST_MD5", self.md5):
                loader, test = (self.mnist.mnist(root, download=False, train=train) for train in (True, False))
        except self.mnist.MissingData:
            self.skipTest(f"MNIST is not in {root}")
        images, labels = loader.dataset.tensors
        self.assertEqual((len(loader), len(test), labels[:5].tolist()), (938, 157, [5, 0, 4, 1, 9]))
        self.assertAlmostEqual(float(images.double().mean()), 2 * 0.1307 - 1, places=3)  # the known mean of MNIST
