"""GPUs that cannot be used, with mocks of torch.cuda: what the user is told, and when."""

import contextlib
import warnings
from unittest import mock

import torch

from tests.common import TrainGroup

__unittest = True

TORCH_2_15 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
TORCH_2_7 = ["sm_50", "sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
TOO_OLD = ("CUDA initialization: The NVIDIA driver on your system is too old (found version {}). Please update your "
           "GPU driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download "
           "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
           "version of the CUDA driver. (Triggered internally at CUDAFunctions.cpp:119.)")


class Gpu(TrainGroup):
    """Old and new GPUs, drivers, and torch without CUDA."""

    needs = (*TrainGroup.needs, "training.device")

    def test_which_kernels_run_on_which_gpu(self):
        for capability, architectures, expected in (
                ((6, 1), TORCH_2_15, False), ((7, 0), TORCH_2_15, False), ((7, 5), TORCH_2_15, True),
                ((8, 0), TORCH_2_15, True), ((8, 9), TORCH_2_15, True), ((9, 0), TORCH_2_15, True),
                ((10, 3), TORCH_2_15, True), ((11, 0), TORCH_2_15, False), ((12, 1), TORCH_2_15, True),
                ((13, 0), TORCH_2_15, False), ((6, 1), TORCH_2_7, True), ((3, 5), TORCH_2_7, False),
                ((12, 0), TORCH_2_7, False), ((12, 0), [*TORCH_2_7, "compute_90"], True),
                ((3, 5), ["compute_50"], False),
                ((6, 0), ["sm_61"], False), ((6, 2), ["sm_61"], True), ((7, 0), ["sm_61"], False),
                ((9, 0), ["sm_90a"], True), ((9, 1), ["sm_90a"], False), ((10, 0), ["sm_90a"], False),
                ((10, 3), ["compute_100a"], False), ((10, 3), ["sm_100f"], True), ((12, 0), ["sm_100f"], False),
                ((12, 0), ["compute_100f"], False), ((9, 0), [], None), ((9, 0), ["gfx90a"], None)):
            self.assertIs(self.device.has_kernels(capability, architectures), expected, (capability, architectures))

    def on_gpu(self, capability=(9, 0), architectures=TORCH_2_15, **stand_ins):
        """Make torch see a GPU of this capability."""
        return mock.patch.multiple("torch.cuda", **{
            "is_available": lambda: True, "get_device_capability": lambda *_: capability,
            "get_arch_list": lambda: architectures, "get_device_name": lambda *_: "NVIDIA Something", **stand_ins})

    def refused(self, *flags):
        """Return the sentence with which a run is rejected before a folder is created."""
        log_dir = self.folder()
        status, out, err = self.run_cli("--dataset", "digits", "--epochs", 1, "--log_dir", log_dir, *flags)
        self.assertEqual((status, out, err.count("\n"), list(log_dir.iterdir())), (1, "", 1, []), err)
        return err

    def test_a_gpu_without_kernels_is_reported_with_a_remedy(self):
        pip = 'pip install "torch==2.7.1" "torchvision==0.22.1"'
        for capability, words in (
                ((6, 1), f"is too old for torch {torch.__version__}, which needs 7.5 or higher; install the last "
                         f"version that supports it: {pip}, or train on the CPU with --no-cuda"),
                ((3, 5), f"is too old for torch {torch.__version__}, which needs 7.5 or higher; train on the CPU "
                         f"with --no-cuda"),
                ((13, 0), f"is too new for torch {torch.__version__}, which has no kernels for it; upgrade: pip "
                          f"install --upgrade torch torchvision, or train on the CPU with --no-cuda")):
            with self.on_gpu(capability):
                name = f"NVIDIA Something (compute capability {capability[0]}.{capability[1]})"
                self.assertEqual(self.refused(), f"train.py: error: {name} {words}\n")

    def test_errors_of_the_first_convolution_are_explained(self):
        no_kernel = RuntimeError("CUDA error: no kernel image is available for execution on the device")
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        busy = RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        for error, words in ((no_kernel, "has no kernels for it"), (full, "the GPU is full"),
                             (busy, "another program has exclusive use")):
            with self.on_gpu(), mock.patch("torch.ones", side_effect=error) as ones:
                self.assertIn(words, self.refused())
            self.assertTrue(ones.called)
        with self.on_gpu(), mock.patch("torch.ones", side_effect=RuntimeError("a bug")):
            self.assertRaises(RuntimeError, self.device.choose_device)

    def test_warnings_of_torch_are_hidden(self):
        def capability(*_):
            warnings.warn("Found GPU0 which is of cuda capability 6.1.", stacklevel=1)
            return 9, 0

        with self.on_gpu(get_device_capability=capability), warnings.catch_warnings(record=True) as caught, \
                mock.patch("torch.ones", return_value=torch.zeros(1, 1, 3, 3)):
            warnings.simplefilter("always")
            self.assertEqual(self.device.choose_device(), torch.device("cuda"))
        self.assertEqual(caught, [])

    def test_no_cuda_never_touches_the_gpu(self):
        touched = mock.Mock(side_effect=AssertionError("the GPU was touched"))
        names = ("get_device_capability", "get_arch_list", "get_device_name", "init", "_lazy_init")
        with mock.patch.multiple("torch.cuda", **dict.fromkeys(names, touched)), \
                mock.patch.object(self.device, "has_nvidia_driver", touched):
            self.train_quietly("--epochs", "1")
            with mock.patch("torch.cuda.is_available", touched):  # torch's optimizers call it
                self.device.setup_device(self.train.parse_args(["--no-cuda"]))
        self.assertFalse(touched.called)

    def warned(self, words, *patches):
        """Check that a run warns about its GPU at the start and at the end, and trains on the CPU."""
        with contextlib.ExitStack() as stack, self.few_digits:
            for patch in patches:
                stack.enter_context(patch)
            status, out, err = self.run_cli("--dataset", "digits", "--epochs", 1, "--log_dir", self.folder())
        self.assertEqual((status, err.count("WARNING: "), err.count(words)), (0, 2, 2), err)
        self.assertIn("device: cpu", out)

    def test_a_driver_that_is_too_old(self):
        for version, words in ((11040, "its driver supports CUDA 11.4"), (12080, "its driver supports CUDA 12.8")):
            def is_available(version=version):
                warnings.warn(TOO_OLD.format(version), stacklevel=1)
                return False

            self.warned(words, mock.patch("torch.cuda.is_available", is_available),
                        mock.patch("torch.backends.cuda.is_built", return_value=True))
        self.assertIn("torch==2.7.1", self.device.driver_message(TOO_OLD.format(12080), "13.2"))
        self.assertNotIn("torch==2.7.1", self.device.driver_message(TOO_OLD.format(11040), "13.2"))
        message = self.device.driver_message(
            "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. "
            "changing env variable. Setting the available devices to be zero. (Triggered internally)", "13.2")
        self.assertRegex(message, r"CUDA unknown error .* changing env variable\Z")
        self.assertIsNone(self.device.driver_message("", "13.2"))

    def test_torch_without_cuda_on_a_machine_with_an_nvidia_gpu(self):
        no_cuda = (mock.patch("torch.cuda.is_available", return_value=False),
                   mock.patch("torch.backends.cuda.is_built", return_value=False))
        driver = mock.patch.object(self.device, "has_nvidia_driver", lambda: True)
        self.warned("is built without CUDA", *no_cuda, driver)
        for has_driver in (True, False):
            driver = mock.patch.object(self.device, "has_nvidia_driver", return_value=has_driver)
            with no_cuda[0], no_cuda[1], driver:
                self.assertEqual(self.device.unused_gpu_warning(False) is not None, has_driver)
                self.assertIsNone(self.device.unused_gpu_warning(True))

    def test_tf32_before_torch_2_9(self):
        class Matmul:  # before 2.9, without fp32_precision
            allow_tf32 = None

        cudnn = mock.Mock(spec=["allow_tf32"])
        with mock.patch("torch.backends.cuda.matmul", Matmul), mock.patch("torch.backends.cudnn", cudnn), \
                mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)):
            for precision in ("tf32", "bf16", "fp32"):
                self.device.set_precision(precision, torch.device("cuda"))
                self.assertEqual((Matmul.allow_tf32, cudnn.allow_tf32), (precision == "tf32",) * 2)
