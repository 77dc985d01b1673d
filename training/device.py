"""What depends on the hardware or is global in torch: the device, its name, random generators, default types."""

import contextlib
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from training.cli import FlagError, UserError, warn

CPUINFO, NVIDIA_DRIVER = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")  # on Linux


class RandomState:
    """The state of torch's global random generators: the CPU's, and that of the device if it has its own."""

    def __init__(self, device):
        self._generators = {"cpu": torch}
        if device.type == "cuda":
            self._generators["cuda"] = torch.cuda

    def state_dict(self):
        return {name: generator.get_rng_state() for name, generator in self._generators.items()}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned, but no generator of another kind of device."""
        for name in state.keys() & self._generators.keys():
            self._generators[name].set_rng_state(state[name])


@contextlib.contextmanager
def default_torch_state():
    """Give a program torch's default type and device, gradients, and a random state of its own; then restore them."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.inference_mode(False))  # which also records gradients
        if (device := torch.get_default_device()).type != "cpu":  # as a default device slows down every call
            stack.callback(torch.set_default_device, device)
            torch.set_default_device("cpu")
        yield


def setup_device(no_cuda=False, precision="fp32", deterministic=False):
    """Return the device to compute on: CUDA if available, unless `no_cuda`, else the CPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialised
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a kernel per tensor
    torch.use_deterministic_algorithms(deterministic)
    if warning := unused_gpu_warning(no_cuda):
        warn(warning)
    device = torch.device("cpu")
    if not no_cuda and torch.cuda.is_available():  # torch warns of a driver that it cannot use
        check_gpu()
        device = torch.device("cuda")
    if precision == "bf16":
        check_bf16(device)
    # glibc then reuses one step's memory for the next, which reduced the time of a step on the CPU by a third.
    torch.empty(31 << 20, dtype=torch.uint8)  # freeing just under 32 MB raises M_MMAP_THRESHOLD, see mallopt(3)
    return device


def unused_gpu_warning(no_cuda):
    """Return a sentence on a torch without CUDA next to an NVIDIA GPU, else None; also if the GPU is not wanted."""
    if no_cuda or torch.backends.cuda.is_built() or not (NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi")):
        return None
    return (f"this machine has an NVIDIA GPU, but torch {torch.__version__} is built without CUDA and uses the CPU; "
            f"install a build with CUDA (https://pytorch.org/get-started shows the command), or pass --no-cuda to "
            f"hide this warning")


def check_gpu():
    """Run a convolution on the GPU; raise UserError if torch has no kernels for it. Other errors pass through."""
    try:
        image = torch.ones(1, 1, 3, 3, device="cuda")
        torch.nn.functional.conv2d(image, image).item()
    except RuntimeError as error:
        if not re.search("no kernel image|ARCH_MISMATCH", str(error)):  # of CUDA, of cuDNN
            raise
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise UserError(f"torch {torch.__version__} has no kernels for {name} (compute capability {major}.{minor}); "
                        f"install a version that has them (for 5.0 to 9.0: pip install torch==2.7.1 "
                        f"torchvision==0.22.1; above: the latest), or train on the CPU with --no-cuda") from None


def device_name(device):
    """Return the name of the hardware; for a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def cpuinfo(name):
    """Return an entry of the first processor in /proc/cpuinfo; empty if it is missing, or the system is not Linux."""
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    match = re.search(rf"^{name}\s*: (.+)", text, re.MULTILINE)
    return match[1] if match else ""


def check_bf16(device):
    """Raise FlagError for a device without units for bf16: on such a CPU, an epoch takes ten times as long."""
    units = {"amx_bf16", "avx512_bf16"} & set(cpuinfo("flags").split())
    if not (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else units):
        raise FlagError("--precision bf16 needs a GPU with units for it, such as an A100, or Linux on a CPU with AMX "
                        "or AVX512-BF16; train with --precision fp32 here, or resume the run where it was started")
