"""Precisions, CUDA graphs, and what only a GPU can show."""

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
    """Precisions and CUDA graphs, as far as they can be tried without the hardware."""

    needs = (*TrainGroup.needs, "training.device", "training.cuda_graph")

    def processor(self, text):
        """Let the processor say this of itself."""
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

    def test_what_the_hardware_cannot_do_well_is_refused(self):
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
        self.check(same(resumed, weights), "a resumed bf16 run has other weights than one in one go")

    @unittest.skipUnless(hasattr(torch.backends.cudnn, "conv"), "torch before 2.9 has other flags: see group Gpu")
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

    def test_every_batch_is_trained_once_whether_run_or_replayed(self):
        capturing, trained = [], []

        class Graph:
            """Records what is run while it captures, and runs it again on what its input holds by then."""

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
        def capture(graph):
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
                    self.assertRaisesRegex(self.commandline.UserError, r"\(copy\)"):
                refused = self.cuda_graph.CapturedStep(lambda x: x)
                for _ in range(4):
                    refused(batches[0])
        self.assertEqual(trained, [batch.tolist() for batch in batches])
        self.assertEqual(sums, [float(batch.sum()) for batch in batches])


@unittest.skipUnless(torch.cuda.is_available(), "there is no CUDA here")
class Cuda(TrainGroup):
    """What only a GPU can show."""

    needs = (*TrainGroup.needs, "training.device", "training.cuda_graph")

    def setUp(self):
        super().setUp()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when a test first multiplies matrices
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

    def test_pictures_leave_the_streams_alone(self):
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
        self.check_close(losses[1], losses[0], "the autoencoder's loss on CUDA is not that on the CPU", 1e-3)

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
            self.check_close(values[1], values[0], f"{'/'.join(names)} on CUDA is not that on the CPU", 1e-3)

    def trained_for_200_steps(self, capturable):
        """Return weights and values after 200 steps, captured or not; batches of two sizes, the same random numbers."""
        torch.manual_seed(0)
        model, images = self.models.AdversarialAE().cuda(), images_like_mnist(64).cuda()
        model.capturable = capturable
        args = self.train.parse_args([])
        optimizers = self.train.build_optimizers(model, args)
        step = self.train.build_step(model, *optimizers, args)
        self.assertEqual(isinstance(step, self.train.CapturedStep), capturable)
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
