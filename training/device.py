"""What depends on the hardware: the device, and how precisely it multiplies."""

import os
import platform
import re
import shutil
import warnings
from pathlib import Path

import torch

from training.commandline import FlagError, UserError, warn

CPUINFO, NVIDIA_DRIVER = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")  # on Linux
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
LAST_FOR_OLD = 'pip install "torch==2.7.1" "torchvision==0.22.1"'  # with kernels for 5.0 to 9.0, and CUDA 12.6
WITHOUT_CUDA = ("this machine has an NVIDIA GPU, but torch {torch} is built without CUDA and runs on the CPU; install "
                "the build with CUDA: https://pytorch.org/get-started shows the command; --no-cuda silences this")


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
    """Return the device to compute on: CUDA unless `no_cuda`, else MPS if `mps` (it lacks float64), else the CPU.

    Where there is an NVIDIA GPU that cannot be used, warn; raise UserError where torch sees it but cannot use it.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it finds mistakes, but costs a kernel a tensor
    warning = unused_gpu_warning(no_cuda)
    if warning:
        warn(warning)
    elif not no_cuda and torch.cuda.is_available():
        check_gpu()
        return torch.device("cuda")
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


# GPUs that cannot be used --------------------------------------------------------------------------------------------

def unused_gpu_warning(no_cuda):
    """Return why this machine's GPU is not used, as a sentence; None where it is used, not wanted, or not there."""
    if no_cuda:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not torch.backends.cuda.is_built():
        return WITHOUT_CUDA.format(torch=torch.__version__) if has_nvidia_driver() else None
    return driver_message(" ".join(str(warning.message) for warning in caught), torch.version.cuda)


def driver_message(text, needed):
    """Return what to do about a warning of torch.cuda.is_available, None for none; torch is for CUDA `needed`."""
    if not text:
        return None
    version = re.search(r"driver on your system is too old \(found version (\d+)\)", text)
    if not version:
        return f"the GPU is not used, and this runs on the CPU: {re.split(r'[.] +(?=[A-Z])', text)[0].strip(' .')}"
    major, minor = int(version[1]) // 1000, int(version[1]) % 1000 // 10
    older = f", or install a torch for it: {LAST_FOR_OLD}" if major == 12 else ""
    return (f"the GPU is not used, and this runs on the CPU: its driver is for CUDA {major}.{minor}, and torch "
            f"{torch.__version__} needs CUDA {needed}; update the NVIDIA driver{older}; --no-cuda silences this")


def has_nvidia_driver():
    """Return whether an NVIDIA driver is installed, as the system tells without torch."""
    return NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") is not None


def check_gpu():
    """Compute one convolution on the GPU, which takes a kernel, cuDNN and memory; raise UserError without a kernel.

    What a GPU that is full or busy raises is explained by training.commandline.report_error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own two, of some lines each, about what is said here in one
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        if torch.version.hip is None and has_kernels(capability, architectures) is False:
            raise UserError(kernels_message(torch.cuda.get_device_name(), capability, architectures, torch.__version__))
        try:
            image = torch.ones(1, 1, 3, 3, device="cuda")
            torch.nn.functional.conv2d(image, image).item()
        except RuntimeError as error:
            if "no kernel image" not in str(error):
                raise
            raise UserError(kernels_message(torch.cuda.get_device_name(), capability, architectures,
                                            torch.__version__)) from None


def has_kernels(capability, architectures):
    """Return whether a GPU of a compute capability, such as (8, 6), can run what is built for these; None: no verdict.

    "sm_XY" is machine code for the capabilities X.Z with Z of at least Y, "compute_XY" PTX for all from X.Y on; with
    the suffix "a" it is for X.Y alone, with "f" for X.Z like machine code (CUDA C++ Programming Guide, "Compute
    capabilities").
    """
    known = parsed(architectures)
    if not known:
        return None
    fits = []
    for kind, built_for, suffix in known:
        if suffix == "a":
            fits.append(capability == built_for)
        elif kind == "compute" and not suffix:
            fits.append(capability >= built_for)
        else:
            fits.append(capability[0] == built_for[0] and capability >= built_for)
    return any(fits)


def parsed(architectures):
    """Return (kind, compute capability, suffix) of each name such as "sm_90a" that is one of NVIDIA's."""
    matches = [match for match in map(ARCHITECTURE.fullmatch, architectures) if match]
    return [(match[1], (int(match[2]), int(match[3])), match[4]) for match in matches]


def kernels_message(name, capability, architectures, version):
    """Return what to do about a GPU, too old or too new, that the installed torch has no kernels for."""
    lowest = min((built_for for _, built_for, _ in parsed(architectures)), default=(0, 0))
    old = capability < lowest
    advice = "train on the CPU with --no-cuda"
    gpu = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if not old:
        return (f"{gpu} is too new for torch {version}, which has no kernels for it; upgrade: pip install --upgrade "
                f"torch torchvision, or {advice}")
    if capability >= (5, 0):
        advice = f"install the last torch for it: {LAST_FOR_OLD}, or {advice}"
    return f"{gpu} is too old for torch {version}, which has kernels from {lowest[0]}.{lowest[1]} on; {advice}"


# What a device is and can --------------------------------------------------------------------------------------------

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
    if device.type != "cuda":
        return
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        products = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = products
    else:  # before torch 2.9; the two ways must not be mixed
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def cpu_multiplies_bf16():
    """Return whether the processor says that it has instructions for products of bfloat16 matrices."""
    return bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo("flags").split()))


def keep_freed_memory():
    """Let glibc hand the memory of one step to the next, which took a third off the time of a step on the CPU.

    Freeing a block of just below 32 MB makes it keep up to twice as much (mallopt(3), M_MMAP_THRESHOLD); else it gives
    pages back to the kernel after every step. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
