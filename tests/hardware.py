"""Precisions, CUDA graphs, and tests that need a GPU."""

import contextlib
import functools
import importlib
import io
import json
import os
import unittest
from unittest import mock

import torch

from tests.common import TrainGroup
from unittests import images_like_mnist, same

__unittest = True


class Hardware(TrainGroup):
    """Precisions and CUDA graphs, as far as they can be tested without the hardware."""

    needs = (*TrainGroup.needs, "training.device", "training.cuda_graph")

    def processor(self, text):
        """Replace /proc/cpuinfo by this text."""
        file = self.folder() / "cpuinfo"
        file.write_text(text)
        patch = mock.patch.object(self.device, "CPUINFO", file)
        patch.start()
        self.addCleanup(patch.stop)

    def assert_refused(self, precision, words):
        log_dir = self.folder()
        status, _, err = self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 1, "--precision", precision,
                                      "--log_dir", log_dir)
        self.assertEqual((status, err.count("\n"), list(log_dir.iterdir())), (2, 1, []))
        self.assertIn(words, err)

    def test_unsupported_precisions_are_rejected(self):
        self.assert_refused("tf32", "needs an NVIDIA GPU")
        self.processor("model name\t: Old\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n")
        self.assertEqual(self.device.device_name(torch.device("cpu")), f"Old, {torch.get_num_threads()} threads")
        self.assert_refused("bf16", "AVX512-BF16")
        self.processor("nothing\n")
        self.assert_refused("bf16", "AVX512-BF16")

    def test_bf16_run_is_repeated_and_resumed_to_the_bit(self):
        self.processor("flags\t\t: fpu amx_bf16\n")
        flags = ("--epochs", "2", "--precision", "bf16")
        with mock.patch.object(self.train, "train_step", wraps=self.train.train_step) as step:
            run, weights = self.train_quietly(*flags)
        self.assertEqual({call.kwargs["precision"] for call in step.call_args_list}, {"bf16"})
        self.assertEqual(json.loads((run / "hparams.json").read_text())["precision"], "bf16")
        stopped, _ = self.train_quietly("--epochs", "1", *flags[2:])
        with mock.patch.object(self.device, "cpu_multiplies_bf16", return_value=False), self.few_digits:
            status, _, err = self.run_cli("--resume", stopped, "--epochs", 2)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn(f"{stopped} was trained with --precision bf16", err)
        with self.few_digits:
            self.assertEqual(self.run_cli("--resume", stopped, "--epochs", 2)[0], 0)
        resumed = torch.load(stopped / "checkpoints" / "model_checkpoint.pt", weights_only=True)
        self.check(same(resumed, weights), "a resumed bf16 run has other weights than an uninterrupted one")

    @unittest.skipUnless(hasattr(torch.backends.cudnn, "conv"), "torch before 2.9 has other flags (see group Gpu)")
    def test_tf32_is_set_for_tf32_alone(self):
        cuda, before = torch.device("cuda"), torch.backends.cudnn.conv.fp32_precision
        self.addCleanup(setattr, torch.backends.cudnn.conv, "fp32_precision", before)
        matmul = torch.backends.cuda.matmul
        self.addCleanup(setattr, matmul, "fp32_precision", matmul.fp32_precision)
        with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
            for precision, expected in (("tf32", "tf32"), ("bf16", "ieee"), ("fp32", "ieee")):
                self.device.set_precision(precision, cuda)
                self.assertEqual(torch.backends.cudnn.conv.fp32_precision, expected)
                self.assertEqual(torch.backends.cuda.matmul.fp32_precision, expected)
        with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
            for precision in ("tf32", "bf16"):
                self.assertRaises(self.device.PrecisionError, self.device.set_precision, precision, cuda)

    def test_every_batch_is_trained_once_eagerly_or_replayed(self):
        capturing, trained = [], []

        class Graph:
            """Records the step during the capture, and repeats it on the current content of its input."""

            def replay(self):
                self.recorded()

        def step(x):
            def run():
                trained.append(x.tolist())
                return values.fill_(x.sum())

            values = torch.zeros(())
            if not capturing:
                return run()
            capturing[-1].recorded = run
            return values

        @contextlib.contextmanager
        def capture(graph, stream):
            capturing.append(graph)
            yield
            capturing.remove(graph)

        batches = [torch.arange(start, start + count).float()
                   for start in range(0, 600, 100) for count in (4, 4, 3)]
        with mock.patch.multiple("torch.cuda", CUDAGraph=Graph, graph=capture, Stream=mock.Mock(),
                                 stream=mock.MagicMock(), current_stream=mock.Mock()):
            captured = self.cuda_graph.CapturedStep(step)
            sums = [float(captured(batch)) for batch in batches]
            with mock.patch("torch.cuda.graph", side_effect=RuntimeError("copy")), \
                    self.assertRaisesRegex(self.cli.UserError, r"\(copy\)"):
                refused = self.cuda_graph.CapturedStep(lambda x: x)
                for _ in range(4):
                    refused(batches[0])
        self.assertEqual(trained, [batch.tolist() for batch in batches])
        self.assertEqual(sums, [float(batch.sum()) for batch in batches])

    def captured(self, step):
        """Call a step until it is captured; return the mock of torch.cuda. A failed capture raises again at its end."""

        class Graph:
            def __init__(self, graph, **_):
                pass

            def __enter__(self):
                pass

            def __exit__(self, kind, *_):
                if kind:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        cuda = mock.MagicMock()
        cuda.graph.side_effect = Graph
        with mock.patch.multiple("torch.cuda", **{name: getattr(cuda, name) for name in
                                                  ("CUDAGraph", "graph", "Stream", "stream", "current_stream")}):
            call = self.cuda_graph.CapturedStep(step)
            for _ in range(self.cuda_graph.WARM_UP + 1):
                call(torch.zeros(2))
        return cuda

    def test_capture_is_on_the_stream_of_the_warm_up(self):
        cuda = self.captured(lambda x: x)
        stream = cuda.Stream.return_value
        self.assertEqual(cuda.stream.call_args_list, [mock.call(stream)] * self.cuda_graph.WARM_UP)
        self.assertEqual(cuda.graph.call_args_list, [mock.call(cuda.CUDAGraph.return_value, stream=stream)])

    def test_full_memory_in_a_capture_is_not_the_fault_of_the_loss(self):
        full = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 10.91 GiB"
        for error, raised in ((torch.OutOfMemoryError(full), torch.OutOfMemoryError),
                              (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), RuntimeError),
                              (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError),
                              (RuntimeError("CUDA error: operation not permitted\nCUDA"), self.cli.UserError)):
            calls = iter([None] * self.cuda_graph.WARM_UP + [error])
            with self.subTest(str(error)), self.assertRaises(raised) as caught:
                self.captured(lambda x, calls=calls: self.raised(next(calls)))
            if raised is self.cli.UserError:
                self.assertIn("as a CUDA graph (CUDA error: operation not permitted): a loss", str(caught.exception))
            else:
                self.assertIs(caught.exception, error)

    def raised(self, error):
        if error:
            raise error

    def test_no_graph_on_other_devices(self):
        model, args = self.models.AdversarialAE(), self.train.parse_args([])
        for device, hip, capturable, expected in (("cuda", None, True, True), ("cuda", "6.4.43482", True, False),
                                                  ("cuda", None, False, False), ("mps", None, True, False),
                                                  ("cpu", None, True, False)):
            model.capturable = capturable
            with mock.patch.object(type(model), "device", torch.device(device)), mock.patch("torch.version.hip", hip), \
                    mock.patch("torch.cuda.Stream"):
                step = self.train.build_step(model, None, None, args)
            self.assertEqual(isinstance(step, self.train.CapturedStep), expected, (device, hip, capturable))

    def test_counters_of_the_average_are_copied_in_one_call(self):
        for networks, calls in (("residual", 1), ("base", 0)):
            model = self.models.AdversarialAE(networks=networks)
            average = self.train.EMA(model, 0.5)
            model(images_like_mnist(2))
            with mock.patch("torch._foreach_copy_", wraps=torch._foreach_copy_) as copy:
                average.update()
            self.assertEqual(copy.call_count, calls)
            for name, counter in average.model.named_buffers():
                self.assertTrue(not name.endswith("tracked") or counter == 1, name)


@unittest.skipUnless(torch.cuda.is_available(), "CUDA is not available")
class Cuda(TrainGroup):
    """Tests that need a GPU."""

    needs = (*TrainGroup.needs, "training.device", "training.cuda_graph")

    def setUp(self):
        super().setUp()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
        self.device.set_precision("fp32", torch.device("cuda"))

    def train_on_cuda(self, *flags):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run = self.train.main(self.train.parse_args(["--dataset", "digits", "--epochs", "2", "--log_dir",
                                                         str(self.folder()), *flags]))
        self.assertIn("device: cuda", out.getvalue())
        return torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)

    def test_checkpoint_is_on_the_cpu(self):
        state = self.train_on_cuda()
        self.assertEqual({tensor.device.type for tensor in state.values()}, {"cpu"})
        self.models.AdversarialAE().load_state_dict(state)

    def test_same_bits_with_deterministic_kernels(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        self.assertTrue(same(*(self.train_on_cuda("--deterministic") for _ in range(2))))

    def test_pictures_do_not_change_random_states(self):
        model, writer = self.models.AdversarialAE().cuda(), self.writer()
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        self.train.generate_and_save(model, 0, writer)
        model.sample = lambda count: model.decoder(torch.randn(count, model.z_dim, device="cuda"))
        self.train.generate_and_save(model, 1, writer)
        for state, after in zip(before, (torch.get_rng_state(), torch.cuda.get_rng_state()), strict=True):
            self.assertTrue(torch.equal(state, after))

    def test_losses_agree_with_the_cpu(self):
        model, x = self.models.AdversarialAE(), images_like_mnist(16)
        losses = []
        for device in ("cpu", "cuda"):
            model, x = model.to(device), x.to(device)
            recon_x, z = model(x)
            losses.append(model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].item())
        self.check_close(losses[1], losses[0], "the autoencoder's loss on CUDA differs from that on the CPU", 1e-3)

    def test_evaluation_agrees_with_the_cpu(self):
        measures, pictures = (importlib.import_module(f"evaluation.{name}") for name in ("measures", "pictures"))
        model, (images, labels) = self.models.AdversarialAE(), self.mnist.load_digits(train=False)
        results = []
        with mock.patch.object(measures, "SAMPLES", 300):
            for device in ("cpu", "cuda"):
                results.append(measures.evaluate(model.to(device), images, images, labels))
                pictures.draw_pictures(model, images, images, labels)
        for names in (("reconstruction", "mse"), ("prior_match", "codes", "ks"),
                      ("log_likelihood", "mean"), ("digit_classifier", "samples", "frechet_to_test_images")):
            values = [functools.reduce(dict.get, names, result) for result in results]
            self.check_close(values[1], values[0], f"{'/'.join(names)} on CUDA differs from that on the CPU", 1e-3)

    def trained_for_200_steps(self, capturable):
        """Return weights and values after 200 steps, captured or not, with two batch sizes and a fixed seed."""
        torch.manual_seed(0)
        model, images = self.models.AdversarialAE().cuda(), images_like_mnist(64).cuda()
        model.capturable = capturable
        args = self.train.parse_args([])
        optimizers = self.train.build_optimizers(model, args)
        step = self.train.build_step(model, *optimizers, args)
        self.assertEqual(isinstance(step, self.train.CapturedStep), capturable and not torch.version.hip)
        values = []
        for number in range(200):
            self.train.set_learning_rate(optimizers[0], 90 + number // 100, args)  # drops when the graphs are captured
            parts = step(images[:32] if number % 4 == 3 else images)
            values.append(torch.stack([value.clone() for part in parts for value in part.values()]))
        return model.state_dict(), torch.stack(values).cpu()

    def test_captured_step_is_the_eager_step(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        self.device.choose_device(deterministic=True)
        self.device.set_precision("fp32", torch.device("cuda"))
        weights, values = self.trained_for_200_steps(capturable=True)
        eager_weights, eager_values = self.trained_for_200_steps(capturable=False)
        torch.testing.assert_close(values, eager_values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, eager_weights, rtol=1e-3, atol=1e-4)

    def test_every_precision_trains(self):
        for precision in ("fp32", "tf32", "bf16"):
            state = self.train_on_cuda("--precision", precision)
            self.assertTrue(all(tensor.isfinite().all() and tensor.dtype in (torch.float32, torch.int64)
                                for tensor in state.values()))

    def test_resumed_to_the_bit(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        weights = self.train_on_cuda("--deterministic")
        log_dir = self.folder()
        self.run_cli("--dataset", "digits", "--epochs", 1, "--deterministic", "--log_dir", log_dir)
        self.assertEqual(self.run_cli("--resume", "latest", "--epochs", 2, "--log_dir", log_dir)[0], 0)
        [file] = log_dir.glob("*/checkpoints/model_checkpoint.pt")
        self.assertTrue(same(torch.load(file, weights_only=True), weights))
