"""Devices, precisions and threads: with mocks of torch.cuda, and on a GPU if there is one."""

import contextlib
import functools
import io
import os
import re
import sys
from argparse import Namespace
from unittest import mock

import torch

from tests.common import TrainGroup, same, snapshot
from training.run import load_state
from unittests import HERE, images_like_mnist

__unittest = True


class Hardware(TrainGroup):
    """What the user is told about the hardware, how it is set up, and the variables that are set before torch."""

    needs = (*TrainGroup.needs, "training.device", "training")

    def test_bf16_is_rejected_on_cpus_without_units_for_it(self):
        file = self.folder() / "cpuinfo"
        self.enterContext(mock.patch.object(self.device, "CPUINFO", file))
        for text, supported in (("flags\t\t: fpu avx2 avx512f avx512_bf16x\n", False), ("nothing\n", False),
                                ("flags\t\t: fpu amx_bf16\n", True), ("flags\t\t: fpu avx512_bf16\n", True)):
            file.write_text(text)
            if supported:
                self.device.check_bf16(torch.device("cpu"))
            else:
                self.assert_refused(self.run_digits("--log_dir", self.folder(), "--precision", "bf16"), 2,
                                    "AVX512-BF16; train with --precision fp32 here, or resume the run where")
        with mock.patch("torch.cuda.is_bf16_supported", side_effect=[True, False]):
            self.device.check_bf16(torch.device("cuda"))
            self.assertRaises(self.cli.FlagError, self.device.check_bf16, torch.device("cuda"))
        file.write_text("model name\t: Old\n")
        self.assertEqual(self.device.device_name(torch.device("cpu")), f"Old, {torch.get_num_threads()} threads")

    def test_a_gpu_without_kernels_is_explained(self):
        self.addCleanup(torch.use_deterministic_algorithms, False)
        with mock.patch.multiple("torch.cuda", is_available=lambda: True, get_device_capability=lambda *_: (6, 1),
                                 get_device_name=lambda *_: "NVIDIA Something"):
            self.assertEqual(self.device.setup_device(no_cuda=True, deterministic=True), torch.device("cpu"))
            self.assertTrue(torch.are_deterministic_algorithms_enabled())
            for error, kind, words in (
                    ("CUDA error: no kernel image is available", self.cli.UserError,
                     r"no kernels for NVIDIA Something \(compute capability 6.1\); install a ver"),
                    ("a bug", RuntimeError, "^a bug$")):
                with mock.patch("torch.ones", side_effect=RuntimeError(error)), self.assertRaisesRegex(kind, words):
                    self.device.setup_device()

    def test_a_torch_that_cannot_use_the_gpu_says_so(self):
        self.enterContext(mock.patch("shutil.which", return_value=False))
        for driver, built, no_cuda, warns in ((HERE / "none", False, False, False), (HERE, True, False, False),
                                              (HERE, False, True, False), (HERE, False, False, True)):
            with mock.patch.object(self.device, "NVIDIA_DRIVER", driver), \
                    mock.patch("torch.backends.cuda.is_built", return_value=built):
                self.assertEqual("without CUDA" in str(self.device.unused_gpu_warning(no_cuda)), warns)
        with mock.patch("training.run.unused_gpu_warning", return_value="no GPU"), \
                mock.patch("training.device.unused_gpu_warning", return_value="no GPU"):
            status, _, err = self.run_digits("--epochs", 1, "--log_dir", self.folder())
        self.assertEqual((status, err), (0, 2 * "WARNING: no GPU\n"))  # at the start and at the end

    def test_a_short_spin_and_no_more_threads_than_the_quota_allows_unless_the_user_has_set_them(self):
        file, spin = self.folder() / "cpu.max", {"GOMP_SPINCOUNT": str(self.training.SPIN_COUNT)}
        for environment, quota, changes, returned in (
                ({}, "50000 100000", {**spin, "OMP_NUM_THREADS": "1"}, 0.5),
                ({}, "390000 100000\n", {**spin, "OMP_NUM_THREADS": "3"}, 3.9),
                ({}, "400000 100000", spin, None), ({}, "max 100000", spin, None), ({}, None, spin, None),
                ({"OMP_NUM_THREADS": "8"}, "200000 100000", spin, None),
                ({"GOMP_SPINCOUNT": "7"}, "max 100000", {}, None)):
            file.write_text(quota) if quota else file.unlink()
            with mock.patch.dict(os.environ, environment, clear=True), mock.patch("sys.platform", "linux"), \
                    mock.patch("os.sched_getaffinity", lambda _: range(4), create=True), \
                    mock.patch.object(self.training, "CPU_MAX", file):
                self.assertEqual(self.training.limit_threads(), returned)
                self.assertEqual(dict(os.environ), {**environment, **changes})

    def test_every_program_sets_it_before_torch_is_imported(self):
        for name in ("train.py", "unittests.py", "evaluation/__main__.py", "benchmarks/__init__.py"):
            imports = re.findall(r"(?m)^ *(?:import|from) ((\w+)\S*)", (HERE / name).read_text(encoding="utf-8"))
            others = [module for module, package in imports if package not in sys.stdlib_module_names]
            self.assertEqual(others[0], "training", name)


class Cuda(TrainGroup):
    """Training, evaluation and pictures on an NVIDIA GPU, compared with the CPU."""

    needs = (*TrainGroup.needs, "evaluation.measures", "evaluation.pictures")
    no_cuda = ()

    def setUp(self):  # asks here: at import, CUDA would start in every process
        super().setUp()
        if not torch.cuda.is_available() or torch.version.hip:
            self.skipTest("there is no NVIDIA GPU")
        self.addCleanup(torch.use_deterministic_algorithms, False)

    def steps(self, *flags, before=lambda *optimizers: None):
        """Return the losses of 40 steps with two batch sizes and the weights after them, and how many were recorded."""
        args, values = Namespace(**self.train.DEFAULTS), []
        model, *optimizers = self.parts("--deterministic", *flags)
        torch.manual_seed(0)
        before(*optimizers)
        images, new_graph = images_like_mnist(64).cuda(), torch.cuda.CUDAGraph
        with mock.patch("torch.cuda.CUDAGraph", side_effect=new_graph) as recorded:
            for number in range(40):
                self.train.set_learning_rate(optimizers[0], 90 + number // 20, args)  # drops after the first recordings
                x = images[:32] if number % 3 == 2 else images
                parts = self.train.train_step(model, *optimizers, 0.995, x)
                values.append(torch.stack([value.clone() for part in parts for value in part.values()]))
        return [values, model.state_dict()], recorded.call_count

    def test_every_precision_is_resumed_to_the_bit_with_deterministic_kernels(self):
        for precision in ("fp32", "bf16"):
            flags = "--deterministic", "--batch_size", "8", "--precision", precision, "--epochs"
            (run, weights), (stopped, _) = self.train_quietly(*flags, "2"), self.train_quietly(*flags, "1")
            _, resumed = self.train_quietly("--batch_size", "8", "--resume", str(stopped), "--epochs", "2")
            self.check(same(weights, resumed), f"a resumed {precision} run has other weights")
            self.assertEqual(load_state(run)["settings"]["device"], "cuda")
            self.assertTrue(all(tensor.isfinite().all() and tensor.device.type == "cpu" and tensor.dtype in
                                (torch.float32, torch.int64) for tensor in weights.values()))

    def test_evaluation_agrees_with_the_cpu_and_pictures_keep_the_random_state(self):
        self.enterContext(torch.backends.cudnn.flags(allow_tf32=False))
        model, (images, labels), results = self.models.AdversarialAE(), self.mnist.load_digits(train=False), []
        for device in ("cpu", "cuda"):
            with mock.patch.object(self.measures, "SAMPLES", 300):
                results.append(self.measures.evaluate(model.to(device).eval(), images, images, labels))
        for names in (("reconstruction", "mse"), ("prior_match", "codes", "ks"), ("log_likelihood", "mean"),
                      ("digit_classifier", "samples", "frechet_to_test_images")):
            values = [functools.reduce(dict.get, names, result) for result in results]
            self.check_close(values[1], values[0], f"{'/'.join(names)} on CUDA differs from that on the CPU", 1e-3)
        before = snapshot(model)
        self.pictures.draw_pictures(model, images, images, labels)
        model.sample = lambda count: torch.randn(count, 1, 28, 28, device="cuda")
        self.train.generate_and_save(model, 0, self.writer())
        self.assertTrue(same(snapshot(model), before))

    def test_steps_of_a_graph_are_the_eager_steps(self):
        (replayed, recorded), (eager, none) = self.steps(), self.steps("--no-graph")
        self.assertEqual((recorded, none), (4, 0), "of two batch sizes at two learning rates")
        torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-4)

    def test_training_goes_on_after_a_capture_that_fails(self):  # the last one, as it may spoil later captures
        def read(optimizer_ae, optimizer_disc):  # a number, which ends a capture
            weight = optimizer_disc.param_groups[0]["params"][0]
            optimizer_disc.register_step_pre_hook(lambda *_: self.assertLess(weight.grad.sum().item(), 1e9))

        eager, _ = self.steps("--posterior", "gaussian", "--no-graph")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            failed, recorded = self.steps("--posterior", "gaussian", before=read)
        self.assertRegex(err.getvalue(), r"\AWARNING: .*capturing a step failed \(CUDA error: .*--no-graph.*\n\Z")
        self.assertEqual((recorded, torch.cuda.current_stream()), (1, torch.cuda.default_stream()))
        torch.testing.assert_close(failed, eager, rtol=0, atol=0)
