"""The data sets and their loader."""

import contextlib
import gc
import gzip
import hashlib
import http.server
import inspect
import io
import os
import socket
import socketserver
import threading
import time
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from unittests import HERE, Group

__unittest = True


class RawAnswer(socketserver.BaseRequestHandler):
    """Sends its server's `answer` to every request."""

    def handle(self):
        self.request.recv(1000)
        self.request.sendall(self.server.answer)


class Data(Group):
    """The loader, MNIST's files (small, made up), their download (from localhost), and the bundled digits."""

    needs = ("mnist",)

    def setUp(self):
        super().setUp()
        self.root = self.folder()
        self.raw = self.root / "MNIST" / "raw"
        self.raw.mkdir(parents=True)
        self.files = {}
        for names, count in zip(self.mnist.MNIST_FILES.values(), (130, 20), strict=True):
            pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
            pixels[0, 0, :2] = 0, 255
            labels = np.arange(count, dtype=np.uint8) % 10
            for name, array in zip(names, (pixels, labels), strict=True):
                header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
                self.files[name] = header + array.tobytes()
        for patch in (mock.patch.object(self.mnist, "MNIST_MD5", {name: hashlib.md5(content).hexdigest()
                                                                  for name, content in self.files.items()}),
                      mock.patch("torchvision.datasets.MNIST.mirrors", []),
                      mock.patch.dict(os.environ, {"no_proxy": "*"})):
            patch.start()
            self.addCleanup(patch.stop)

    def put(self, ending="", names=None):
        for name in names or self.files:
            content = self.files[name]
            (self.raw / (name + ending)).write_bytes(gzip.compress(content) if ending == ".gz" else content)

    def serve(self, answer):
        """Serve the files like a mirror; `answer` maps a file's compressed content to the bytes that are sent."""
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = answer(gzip.compress(test.files[self.path.strip("/").removesuffix(".gz")]))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/"

    def mirrors(self, *mirrors):
        patch = mock.patch("torchvision.datasets.MNIST.mirrors", list(mirrors))
        patch.start()
        self.addCleanup(patch.stop)

    def test_signature(self):
        defaults = {p.name: p.default for p in inspect.signature(self.mnist.mnist).parameters.values()}
        self.assertEqual(list(defaults.items())[:4],
                         [("root", "../data"), ("batch_size", 64), ("num_workers", 4), ("download", True)])

    def test_agrees_with_torchvision(self):
        from torchvision import datasets, transforms

        self.put()
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        for train, count in ((True, 130), (False, 20)):
            reference = datasets.MNIST(self.root, train=train, transform=transform)
            images, labels = self.mnist.load_mnist(self.root, train)
            self.assertEqual((images.dtype, images.shape), (torch.float32, (count, 1, 28, 28)))
            self.assertEqual((labels.dtype, images.min(), images.max()), (torch.int64, -1, 1))
            torch.testing.assert_close(images, torch.stack([x for x, _ in reference]), atol=1e-6, rtol=0)
            self.assertEqual(labels.tolist(), [y for _, y in reference])

    def test_loader(self):
        self.put()
        loader = self.mnist.mnist(self.root, 64, 0, False)
        epochs = [list(loader) for _ in range(2)]
        self.assertEqual(len(loader), 3)
        for batches in epochs:
            self.assertEqual([len(x) for x, _ in batches], [64, 64, 2])
            torch.testing.assert_close(torch.cat([x for x, _ in batches]).sum((1, 2, 3)).sort().values,
                                       loader.dataset.tensors[0].sum((1, 2, 3)).sort().values)

        def pairs(images, labels):
            return {(tuple(x[0, 0].tolist()), int(y)) for x, y in zip(images, labels, strict=True)}

        expected = pairs(*loader.dataset.tensors)
        self.assertTrue(all(pairs(*batch) <= expected for batch in epochs[0]),
                        "images and labels no longer match")
        self.assertFalse(torch.equal(epochs[0][0][0], epochs[1][0][0]), "both epochs have the same order")
        self.assertEqual(len({y.untyped_storage().data_ptr() for _, y in epochs[0]}), 1,
                         "labels are gathered for each batch, which costs a GPU kernel per step")

    def test_order_follows_the_seed(self):
        self.put()
        orders = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            loader, stream = self.mnist.mnist(self.root, 130), torch.get_rng_state()
            orders.append([next(iter(loader))[0] for _ in range(2)])
            self.assertTrue(torch.equal(stream, torch.get_rng_state()), "shuffling uses torch's global generator")
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(orders[0], orders[1], strict=True)))
        self.assertFalse(torch.equal(orders[0][0], orders[2][0]))

    def test_test_set_keeps_its_order(self):
        self.put()
        labels = torch.cat([y for _, y in self.mnist.mnist(self.root, train=False, batch_size=7)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)])

    def test_compressed_files(self):
        self.put()
        expected = self.mnist.load_mnist(self.root)[0]
        for file in self.raw.iterdir():
            file.unlink()
        self.put(".gz")
        self.assertTrue(torch.equal(self.mnist.load_mnist(self.root)[0], expected))

    def test_damaged_file_is_named_and_not_used(self):
        name = self.mnist.MNIST_FILES[True][0]
        for ending in ("", ".gz"):
            for damage in (lambda content: content[:-1], lambda content: content[:40] + b"?" + content[41:],
                           lambda content: b"", lambda content: b"not MNIST at all"):
                self.put(ending)
                path = self.raw / (name + ending)
                path.write_bytes(damage(path.read_bytes()))
                with self.assertRaisesRegex(self.mnist.DamagedData, f"{path} is damaged"):
                    self.mnist.load_mnist(self.root)
                path.unlink()

    def test_damaged_file_next_to_an_intact_compressed_one(self):
        self.put(".gz")
        (self.raw / self.mnist.MNIST_FILES[True][0]).write_bytes(b"half")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)
        self.assertIn("is damaged", err.getvalue())

    def test_missing_files_are_downloaded(self):
        self.mirrors("http://127.0.0.1:9/", self.serve(lambda content: content))
        self.assertEqual(len(self.mnist.load_mnist(self.root / "new")[0]), 130)
        names = {file.name for file in (self.root / "new/MNIST/raw").iterdir()}
        self.assertEqual(names, set(self.mnist.MNIST_FILES[True]))
        self.mirrors()
        self.assertEqual(len(self.mnist.load_mnist(self.root / "new", download=False)[0]), 130)

    def test_damaged_files_are_downloaded_again(self):
        self.put()
        (self.raw / self.mnist.MNIST_FILES[True][0]).write_bytes(b"half")
        self.mirrors(self.serve(lambda content: content))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(len(self.mnist.load_mnist(self.root)[0]), 130)

    def test_damaged_downloads_are_not_kept(self):
        self.mirrors(self.serve(lambda content: content[:-9]), self.serve(lambda content: gzip.compress(b"other")),
                     self.serve(lambda content: b"<html>log in</html>"))
        with self.assertRaisesRegex(self.mnist.MissingData, "something other"):
            self.mnist.load_mnist(self.root)
        self.assertEqual(list(self.raw.iterdir()), [])

    def test_answers_that_are_not_http(self):
        self.enterContext(warnings.catch_warnings(action="ignore", category=ResourceWarning))
        self.addCleanup(gc.collect)  # within the filter above: urllib leaves the socket of a broken redirect open
        for answer in (b"nonsense\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: xyz\r\n\r\n",
                       b"HTTP/1.0 302 Found\r\nLocation: http://[\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf"):
            with socketserver.TCPServer(("127.0.0.1", 0), RawAnswer) as server:
                server.answer = answer
                threading.Thread(target=server.handle_request, daemon=True).start()
                self.mirrors(f"http://127.0.0.1:{server.server_address[1]}/")
                with self.assertRaises(self.mnist.MissingData):
                    self.mnist.load_mnist(self.root)

    def test_silent_network_times_out(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts the connection and never answers
            self.mirrors(f"http://127.0.0.1:{silent.getsockname()[1]}/")
            with mock.patch.object(self.mnist, "TIMEOUT", 1), \
                    self.assertRaisesRegex(self.mnist.MissingData, "no answer|timed out"):
                self.mnist.load_mnist(self.root)

    def test_silent_name_service_times_out(self):
        self.mirrors("http://nowhere.invalid/")
        ended = threading.Event()
        self.addCleanup(ended.set)
        with mock.patch("socket.getaddrinfo", side_effect=lambda *args: ended.wait()), \
                mock.patch.object(self.mnist, "TIMEOUT", 1), \
                self.assertRaisesRegex(self.mnist.MissingData, "no answer"):
            self.mnist.load_mnist(self.root)

    def test_slow_network_times_out(self):
        def trickle(content):
            time.sleep(0.4)
            return content

        self.mirrors(self.serve(trickle))
        with mock.patch.object(self.mnist, "TRANSFER_LIMIT", 0.2), \
                self.assertRaisesRegex(self.mnist.MissingData, "not complete"):
            self.mnist.load_mnist(self.root)

    def test_timeout_is_below_20_seconds(self):
        self.assertLess(self.mnist.TIMEOUT, 20)

    def test_missing_files_without_download(self):
        with self.assertRaisesRegex(self.mnist.MissingData, "downloading is disabled"):
            self.mnist.mnist(self.root, download=False)

    def test_folder_that_is_a_file(self):
        (self.root / "file").write_text("")
        with self.assertRaisesRegex(self.mnist.DataError, "--data_dir"):
            self.mnist.mnist(self.root / "file")

    def test_digits(self):
        (x, y), (held_out, _) = self.mnist.load_digits(), self.mnist.load_digits(train=False)
        self.assertEqual((x.dtype, x.shape, y.dtype), (torch.float32, (1498, 1, 28, 28), torch.int64))
        self.assertEqual(held_out.shape, (299, 1, 28, 28))
        self.assertEqual((x.min(), x.max()), (-1, 1))
        self.assertEqual(sorted(set(y.tolist())), list(range(10)))
        border = x.clone()
        border[:, :, 4:24, 4:24] = -1
        self.assertTrue((border == -1).all(), "the border of 4 pixels is not empty")
        centre = x[0, 0, 4:24, 4:24].view(1, 1, 20, 20)
        with gzip.open(self.mnist.DIGITS_FILE, "rt") as file:
            first = np.array(file.readline().split(","), float)[:64].reshape(8, 8) / 8 - 1
        blocks = nn.functional.adaptive_avg_pool2d(centre, 4)[0, 0].numpy()
        np.testing.assert_allclose(blocks, first.reshape(4, 2, 4, 2).mean((1, 3)), atol=0.2)

    def test_damaged_digits(self):
        damaged = self.root / "digits.csv.gz"
        damaged.write_bytes(self.mnist.DIGITS_FILE.read_bytes()[:-100])
        with mock.patch.object(self.mnist, "DIGITS_FILE", damaged), self.assertRaises(self.mnist.DamagedData):
            self.mnist.load_digits()


class RealMnist(Group):
    """The real files, if they are in ../data."""

    needs = ("mnist",)

    def test_real_mnist(self):
        root = HERE.parent / "data"
        try:
            loader = self.mnist.mnist(root, download=False)
            test = self.mnist.mnist(root, download=False, train=False)
        except self.mnist.MissingData:
            self.skipTest(f"MNIST is not in {root}")
        self.assertEqual((len(loader), len(test)), (938, 157))
        images, labels = loader.dataset.tensors
        self.assertEqual((images.shape, images.min(), images.max()), ((60000, 1, 28, 28), -1, 1))
        self.assertEqual(labels[:5].tolist(), [5, 0, 4, 1, 9])
        self.assertAlmostEqual(float(images.double().mean()), 2 * 0.1307 - 1, places=3)  # the known mean of MNIST
        self.assertEqual([len(x) for x, _ in loader][-2:], [64, 32])
