"""What depends on the hardware: the device, and how precisely it multiplies."""

import os
import platform
import re
from pathlib import Path

import torch

from training.commandline import FlagError, UserError

CPUINFO = Path("/proc/cpuinfo")  # on Linux


class PrecisionError(FlagError):
    """A precision that a device cannot compute in, or only slowly."""


def setup_device(args):
    """Return the device that the flags ask for, ready to compute in args.precision; raise UserError where it cannot."""
    torch.use_deterministic_algorithms(False)  # as an earlier run in this process may have set it
    device = choose_device(args.no_cuda, args.deterministic)
    try:
        set_precision(args.precision, device)
    except PrecisionError:
        if not args.resume:
            raise
        raise UserError(f"{args.resume} was trained with --precision {args.precision}, which this device cannot do "
                        f"well; resume it where it began") from None
    keep_freed_memory()
    return device


def choose_device(no_cuda=False, deterministic=False, mps=True):
    """Return the device to compute on: CUDA unless `no_cuda`, else MPS if `mps` (it lacks float64), else the CPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it finds mistakes, but costs a kernel a tensor
    if torch.cuda.is_available() and not no_cuda:
        return torch.device("cuda")
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


def device_name(device):
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def cpuinfo(name):
    """Return what Linux says of the first processor under this name; empty where it says nothing, or is not Linux."""
    try:
        match = re.search(rf"^{name}\s*: (.+)", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else ""


def set_precision(precision, device):
    """Compute float32 products on CUDA as `precision` ("fp32", "tf32" or "bf16") says, with TF32 for "tf32" alone.

    For "bf16" the caller opens torch.autocast. It sets torch's flags for the whole process, after which torch's older
    ones (allow_tf32) can no longer be read. Raises PrecisionError where the device has no units for the precision.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not ampere:
        raise PrecisionError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more; "
                             "leave the flag out")
    if precision == "bf16" and not (ampere or device.type == "cpu" and cpu_multiplies_bf16()):
        raise PrecisionError("--precision bf16 would be slow here: it needs an NVIDIA GPU of compute capability 8.0 or "
                             "more, or on Linux a processor with AMX or AVX512-BF16; leave the flag out")
    if device.type == "cuda":
        products = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = products


def cpu_multiplies_bf16():
    """Return whether the processor says that it has instructions for products of bfloat16 matrices."""
    return bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo("flags").split()))


def keep_freed_memory():
    """Let glibc hand the memory of one step to the next, which took a third off the time of a step on the CPU.

    Freeing a block of just below 32 MB makes it keep up to twice as much (mallopt(3), M_MMAP_THRESHOLD); else it gives
    pages back to the kernel after every step. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
