"""Tests that need an NVIDIA GPU."""

import contextlib
import functools
import io
from unittest import mock

import torch

from tests.common import TrainGroup, same
from unittests import images_like_mnist

__unittest = True


class Cuda(TrainGroup):
    """Training, evaluation and pictures on the GPU, compared with the CPU."""

    needs = (*TrainGroup.needs, "training.device", "evaluation.measures", "evaluation.pictures")

    def setUp(self):  # asks here: at import, CUDA would start in every process
        super().setUp()
        if not torch.cuda.is_available() or torch.version.hip:
            self.skipTest("there is no NVIDIA GPU")
        self.addCleanup(torch.use_deterministic_algorithms, False)

    def train_quietly(self, *flags):
        """Run `main` on the GPU; return the run's folder and saved weights."""
        args = self.train.parse_args(["--dataset", "digits", "--log_dir", str(self.folder()), *flags])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run = self.train.main(args)
        self.assertIn("device: cuda", out.getvalue())
        return run, torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)

    def steps(self, *flags, before=lambda *optimizers: None):
        """Return the losses of 40 steps with two batch sizes, the weights after them, and how many were recorded."""
        args, values = self.train.parse_args(flags), []
        _, model, _, _, _, *optimizers, lambda_ = self.parts("--deterministic", *flags)
        torch.manual_seed(0)
        before(*optimizers)
        images, new_graph = images_like_mnist(64).cuda(), torch.cuda.CUDAGraph
        with mock.patch("torch.cuda.CUDAGraph", side_effect=new_graph) as recorded:
            for number in range(40):
                self.train.set_learning_rate(optimizers[0], 90 + number // 20, args)  # drops after the first recordings
                x = images[:32] if number % 3 == 2 else images
                parts = self.train.train_step(model, *optimizers, lambda_, x)
                values.append(torch.stack([value.clone() for part in parts for value in part.values()]))
        return torch.stack(values).cpu(), model.state_dict(), recorded.call_count

    def test_every_precision_trains_and_the_checkpoint_is_on_the_cpu(self):
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        for precision in ("fp32", "tf32", "bf16") if ampere else ("fp32",):
            _, weights = self.train_quietly("--epochs", "2", "--precision", precision)
            self.models.AdversarialAE().load_state_dict(weights)
            self.assertTrue(all(tensor.isfinite().all() and tensor.device.type == "cpu" and tensor.dtype in
                                (torch.float32, torch.int64) for tensor in weights.values()))

    def test_runs_are_repeated_and_resumed_to_the_bit_with_deterministic_kernels(self):
        (_, weights), (_, repeated) = (self.train_quietly("--epochs", "2", "--deterministic") for _ in range(2))
        self.check(same(weights, repeated), "a second run has other weights")
        stopped, _ = self.train_quietly("--epochs", "1", "--deterministic")
        _, resumed = self.train_quietly("--resume", str(stopped), "--epochs", "2")
        self.check(same(weights, resumed), "a resumed run has other weights")

    def test_losses_and_evaluation_agree_with_the_cpu_and_pictures_keep_the_random_state(self):
        self.device.set_precision("fp32", torch.device("cuda"))
        model, (images, labels), results = self.models.AdversarialAE(), self.mnist.load_digits(train=False), []
        for device in ("cpu", "cuda"):
            x = images[:16].to(device)
            loss, _ = model.to(device).eval().get_loss_autoencoder(x, *model(x), 0.5)
            with mock.patch.object(self.measures, "SAMPLES", 300):
                results.append({"loss": loss.item(), **self.measures.evaluate(model, images, images, labels)})
            self.pictures.draw_pictures(model, images, images, labels)
        for names in (("loss",), ("reconstruction", "mse"), ("prior_match", "codes", "ks"), ("log_likelihood", "mean"),
                      ("digit_classifier", "samples", "frechet_to_test_images")):
            values = [functools.reduce(dict.get, names, result) for result in results]
            self.check_close(values[1], values[0], f"{'/'.join(names)} on CUDA differs from that on the CPU", 1e-3)
        model.sample, state = lambda count: torch.randn(count, 1, 28, 28, device="cuda"), torch.cuda.get_rng_state()
        self.train.generate_and_save(model, 0, self.writer())
        self.assertTrue(torch.equal(state, torch.cuda.get_rng_state()))

    def test_steps_of_a_graph_are_the_eager_steps(self):
        values, weights, recorded = self.steps()
        eager_values, eager_weights, none = self.steps("--no-graph")
        self.assertEqual((recorded, none), (4, 0), "of two batch sizes at two learning rates")
        torch.testing.assert_close(values, eager_values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, eager_weights, rtol=1e-3, atol=1e-4)

    def test_training_goes_on_after_a_capture_that_fails(self):  # the last one, as it may spoil later captures
        def read(optimizer_ae, optimizer_disc):  # a number, which ends a capture
            weight = optimizer_disc.param_groups[0]["params"][0]
            optimizer_disc.register_step_pre_hook(lambda *_: self.assertLess(weight.grad.sum().item(), 1e9))

        eager, weights, _ = self.steps("--posterior", "gaussian", "--no-graph")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            values, same_weights, recorded = self.steps("--posterior", "gaussian", before=read)
        self.assertRegex(err.getvalue(), r"\AWARNING: .*capturing a step failed \(CUDA error: .*--no-graph.*\n\Z")
        self.assertEqual((recorded, torch.cuda.current_stream()), (1, torch.cuda.default_stream()))
        self.assertTrue(torch.equal(values, eager) and same(weights, same_weights))
