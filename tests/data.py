"""The data sets and their loader."""

import gzip
import hashlib
import http.server
import inspect
import io
import os
import socket
import threading
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from unittests import HERE, Group

__unittest = True

IMAGES = "train-images-idx3-ubyte"


class Data(Group):
    """The loader, MNIST's files (small, made up), their download (from localhost), and the bundled digits."""

    needs = ("mnist", "training.data")

    def setUp(self):
        super().setUp()
        self.enterContext(torch.device("meta"))  # what an earlier cell of a notebook has set must not matter
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        self.files, md5 = {}, {}  # as they are and .gz
        for name in self.mnist.MNIST_MD5:
            count = 130 if "train" in name else 20
            pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
            array = pixels if "images" in name else np.arange(count, dtype=np.uint8) % 10
            self.files[name] = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes() + array.tobytes()
            self.files[f"{name}.gz"] = gzip.compress(self.files[name], mtime=0)
            for file in (name, f"{name}.gz"):
                md5[file] = hashlib.md5(self.files[file], usedforsecurity=False).hexdigest()
        packed = [(name, md5.pop(name)) for name in self.files if name.endswith(".gz")]
        self.err = self.enterContext(mock.patch("sys.stderr", new_callable=io.StringIO))  # with progress bars
        self.enterContext(mock.patch.multiple(self.mnist, MNIST_MD5=md5, TIMEOUT=1))
        self.enterContext(mock.patch.dict(os.environ, {"no_proxy": "*"}))
        self.enterContext(mock.patch("torchvision.datasets.MNIST.resources", packed))
        self.set_mirrors()
        self.put("")

    def put(self, place):
        """Write the files to a new folder; `place` is a name's format, with the two ways of writing it as arguments."""
        self.root = self.folder()
        self.raw = self.root / "MNIST" / "raw"
        self.raw.mkdir(parents=True)
        for name in self.mnist.MNIST_MD5 if place else ():
            path = self.raw / place.format(name, name.replace("-idx", ".idx"))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.files[name + ".gz" * place.endswith(".gz")])

    def mirror(self, change=bytes):
        """Serve the files, each changed by a function, on localhost; return the address."""
        folder = self.folder()
        for name, content in self.files.items():
            (folder / name).write_bytes(change(content))
        server = self.enterContext(http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args:
                                   http.server.SimpleHTTPRequestHandler(*args, directory=folder)))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/"

    def set_mirrors(self, *mirrors):
        self.enterContext(mock.patch("torchvision.datasets.MNIST.mirrors", mirrors))

    def test_agrees_with_torchvision_in_each_layout(self):
        from torchvision.datasets import MNIST

        for place in ("{}", "{}.gz", "{1}", "{1}.gz", "{0}/{0}", "{0}/{1}", "{1}/{0}", "{1}/{1}"):
            self.put(place)
            with mock.patch.dict(os.environ, HOME=str(self.root), USERPROFILE=str(self.root)):
                images, labels = self.mnist.load_mnist("~")
            expected = MNIST(self.root) if place == "{}" else expected
            torch.testing.assert_close(images, expected.data.float()[:, None] / 127.5 - 1, atol=1e-6, rtol=0)
            torch.testing.assert_close(labels, expected.targets)

    def test_interface_of_the_assignment(self):
        signature = str(inspect.signature(self.mnist.mnist))
        self.assertIn("(root='../data', batch_size=64, num_workers=4, download=True, ", signature)
        self.put("{}")
        self.assertEqual([len(x) for x, _ in self.mnist.mnist(self.root, 64, 0, False)], [64, 64, 2])
        labels = torch.cat([y for _, y in self.mnist.mnist(self.root, train=False, batch_size=7)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)], "the test set has lost its order")

    def test_seed_and_epoch_determine_the_order(self):
        numbers, orders = torch.from_numpy(np.arange(130)), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            loader, stream = self.mnist.BatchLoader(numbers, numbers % 10, 64), torch.get_rng_state()
            for _ in range(2):
                state, batches = loader.state_dict(), list(loader)
                images, labels = map(torch.cat, zip(*batches, strict=True))
                orders.append(images.tolist())
                self.assertEqual((sorted(orders[-1]), labels.tolist()), (numbers.tolist(), (images % 10).tolist()))
                self.assertEqual(len({y.untyped_storage().data_ptr() for _, y in batches}), 1,
                                 "labels are gathered for each batch, which costs a GPU kernel per step")
            self.check(torch.equal(stream, torch.get_rng_state()), "shuffling uses torch's global generator")
        self.assertEqual((orders[:2], len(loader), loader.epoch), (orders[2:4], 3, 2))
        self.check(orders[0] not in (orders[1], orders[4]), "two epochs or two seeds have the same order")
        torch.manual_seed(3)
        resumed = self.mnist.BatchLoader(numbers, numbers, 130)
        resumed.load_state_dict(state)
        self.assertEqual((next(iter(resumed))[0].tolist(), resumed.epoch), (orders[5], 2))

    def test_damaged_files_are_not_used(self):
        for ending in ("", ".gz"):
            self.put("{}" + ending)
            path, whole = self.raw / (IMAGES + ending), self.files[IMAGES + ending]
            for damaged in (whole[:-1], whole[:10] + b"?" + whole[11:], b"", b"not MNIST at all"):
                path.write_bytes(damaged)
                with self.assertRaisesRegex(self.mnist.DataError, f"{path.name} is damaged") as caught:
                    self.mnist.load_mnist(self.root)
                self.assertNotIsInstance(caught.exception, self.mnist.MissingData)  # --dataset auto does not hide it
        (self.raw / IMAGES).write_bytes(self.files[IMAGES])
        self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)

    def test_two_programs_download_at_once_from_the_first_mirror_that_works(self):
        silent = self.enterContext(socket.create_server(("127.0.0.1", 0)))  # connects, and sends nothing
        fail = (f"http://127.0.0.1:{silent.getsockname()[1]}/", self.mirror(lambda content: content[:-9]),
                self.mirror(lambda content: b"<html>log in</html>"),
                "http://nonsense:port/")  # for which urllib raises an error that is no OSError
        self.set_mirrors(*fail)
        with self.assertRaisesRegex(self.mnist.MissingData, "no data.*corrupted.*corrupted.*'port.*put its four files"):
            self.mnist.load_mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [])
        (self.raw / IMAGES).write_bytes(b"half")
        (self.raw / "notes").write_bytes(b"of the user")
        both, replace = threading.Barrier(2, timeout=9), os.replace

        def copyfile(self, source, outputfile):  # slower than the time limit, but not silent
            while piece := source.read(33_000):
                outputfile.write(piece)
                threading.Event().wait(0.7)

        def move(source, target):
            if target.name == IMAGES:
                both.wait()
            replace(source, target)

        self.set_mirrors(*fail[1:], self.mirror())
        with mock.patch("http.server.SimpleHTTPRequestHandler.copyfile", copyfile), \
                mock.patch("os.replace", move), ThreadPool(2) as pool:
            self.assertEqual([len(images) for images, _ in pool.map(self.mnist.load_mnist, [self.root] * 2)], [130] * 2)
        self.assertEqual({path.name for path in self.raw.iterdir()}, {*self.mnist.MNIST_MD5, "notes"})
        self.assertEqual(len(self.mnist.load_mnist(self.root, train=False, download=False)[0]), 20)

    def test_silence_ends_and_so_does_ctrl_c(self):
        ended = threading.Event()
        self.addCleanup(ended.set)
        self.set_mirrors("http://nowhere.invalid/")
        with mock.patch("socket.getaddrinfo", side_effect=lambda *args: ended.wait()):
            with self.assertRaisesRegex(self.mnist.MissingData, "nowhere.invalid/: no data for 1 s"):
                self.mnist.load_mnist(self.root)
            with mock.patch("multiprocessing.pool.ApplyResult.wait", side_effect=KeyboardInterrupt), \
                    self.assertRaises(KeyboardInterrupt):
                self.mnist.load_mnist(self.root)
        self.assertIn("downloading MNIST from http://nowhere.invalid/, waiting at most 1 s", self.err.getvalue())
        self.assertEqual(list(self.raw.iterdir()), [])

    def test_folders_that_cannot_be_used(self):
        with self.assertRaisesRegex(self.mnist.MissingData, "downloading is disabled"):
            self.mnist.mnist(self.root, download=False)
        (self.root / "file").write_text("")
        for root in (self.root / "file", self.root / "file" / "below"):
            with self.assertRaisesRegex(self.mnist.DataError, "file is a file; .* --data_dir"):
                self.mnist.mnist(root)
        self.set_mirrors(self.mirror())
        for name, error in (("pathlib.Path.mkdir", PermissionError(13, "Permission denied")),
                            ("os.replace", OSError(28, "No space left on device"))):
            with mock.patch(name, side_effect=error), self.assertRaisesRegex(self.mnist.MissingData, error.strerror):
                self.mnist.mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [], "half of a file was kept")

    def test_settings_of_a_resumed_run_decide(self):
        args, digits = mock.Mock(dataset="auto", data_dir=self.root, batch_size=64), {"trained_on": "digits"}
        self.assertIn("MNIST is not in", self.data.load_data(args, "cpu", None).warning)
        self.assertEqual(self.data.load_data(args, "cpu", {**digits, "fallback": "then"})[1:3], ("digits", "then"))
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
            torch.testing.assert_close(F.adaptive_avg_pool2d(centre, 4), F.adaptive_avg_pool2d(pixels, 4),
                                       atol=0.3, rtol=0)
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
