"""What depends on the hardware: the device and the arithmetic precision."""

import os
import platform
import re
import shutil
import warnings
from pathlib import Path

import torch

from training.cli import FlagError, UserError, warn

CPUINFO, NVIDIA_DRIVER = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")  # on Linux
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
LAST_FOR_OLD = 'pip install "torch==2.7.1" "torchvision==0.22.1"'  # has kernels for 5.0 to 9.0, and CUDA 12.6
WITHOUT_CUDA = ("this machine has an NVIDIA GPU, but torch {torch} is built without CUDA and uses the CPU; install a "
                "build with CUDA (https://pytorch.org/get-started shows the command), or pass --no-cuda to hide this "
                "warning")


class PrecisionError(FlagError):
    """A precision that the device does not support, or only slowly."""


def setup_device(args):
    """Return the device that the flags specify, set to args.precision; raise UserError if it does not support that."""
    torch.use_deterministic_algorithms(False)  # an earlier run in this process may have set it
    device = choose_device(args.no_cuda, args.deterministic)
    try:
        set_precision(args.precision, device)
    except PrecisionError:
        if not args.resume:
            raise
        raise UserError(f"{args.resume} was trained with --precision {args.precision}, which this device does not "
                        f"support, or only slowly; resume it on the kind of device that it was started on") from None
    keep_freed_memory()
    return device


def choose_device(no_cuda=False, deterministic=False, mps=True):
    """Return the device to compute on: CUDA unless `no_cuda`, else MPS if `mps` (it lacks float64), else the CPU.

    Warn if torch does not find the machine's NVIDIA GPU; raise UserError if it does but has no kernels for it.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialised
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a kernel per tensor
    warning = unused_gpu_warning(no_cuda)
    if warning:
        warn(warning)
    elif not no_cuda and torch.cuda.is_available():
        check_gpu()
        return torch.device("cuda")
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


# GPUs that cannot be used --------------------------------------------------------------------------------------------

def unused_gpu_warning(no_cuda):
    """Return a sentence on why this machine's GPU is not used; None if it is used, not wanted, or absent."""
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
    """Return what to do about warnings of torch.cuda.is_available, None without any; torch needs CUDA `needed`."""
    if not text:
        return None
    version = re.search(r"driver on your system is too old \(found version (\d+)\)", text)
    if not version:
        first_sentence = re.split(r"[.] +(?=[A-Z])", text)[0].strip(" .")
        return f"the GPU is not used, and the program runs on the CPU: {first_sentence}"
    major, minor = int(version[1]) // 1000, int(version[1]) % 1000 // 10
    older = f", or install a version of torch for it: {LAST_FOR_OLD}" if major == 12 else ""
    return (f"the GPU is not used, and the program runs on the CPU: its driver supports CUDA {major}.{minor}, but "
            f"torch {torch.__version__} needs CUDA {needed}; update the NVIDIA driver{older}, or pass --no-cuda to "
            f"hide this warning")


def has_nvidia_driver():
    """Return whether an NVIDIA driver is installed, without asking torch."""
    return NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") is not None


def check_gpu():
    """Run one convolution on the GPU, which needs a kernel, cuDNN and memory; raise UserError if torch has no kernel.

    Errors of a full or busy GPU pass through; training.cli.report_error explains them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's two warnings of several lines, which say the same
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
    """Return whether a GPU of a compute capability, such as (8, 6), can run code for these; None if that is unknown.

    "sm_XY" is machine code for capabilities X.Z with Z >= Y; "compute_XY" is PTX for X.Y and everything later. The
    suffix "a" limits both to X.Y alone, and "f" to X.Z with Z >= Y (CUDA C++ Programming Guide, "Compute
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
    """Return (kind, compute capability, suffix) of each NVIDIA architecture, such as "sm_90a"; ignore other names."""
    matches = [match for match in map(ARCHITECTURE.fullmatch, architectures) if match]
    return [(match[1], (int(match[2]), int(match[3])), match[4]) for match in matches]


def kernels_message(name, capability, architectures, version):
    """Return what to do about a GPU, too old or too new, for which the installed torch has no kernels."""
    lowest = min((built_for for _, built_for, _ in parsed(architectures)), default=(0, 0))
    old = capability < lowest
    advice = "train on the CPU with --no-cuda"
    gpu = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if not old:
        return (f"{gpu} is too new for torch {version}, which has no kernels for it; upgrade: pip install --upgrade "
                f"torch torchvision, or {advice}")
    if capability >= (5, 0):
        advice = f"install the last version that supports it: {LAST_FOR_OLD}, or {advice}"
    return f"{gpu} is too old for torch {version}, which needs {lowest[0]}.{lowest[1]} or higher; {advice}"


# Properties of a device ----------------------------------------------------------------------------------------------

def device_name(device):
    """Return the name of the hardware; for a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def cpuinfo(name):
    """Return an entry of the first processor in /proc/cpuinfo; empty if it is missing, or the system is not Linux."""
    try:
        match = re.search(rf"^{name}\s*: (.+)", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else ""


def set_precision(precision, device):
    """Set the precision of the whole process, "fp32", "tf32" or "bf16": on CUDA, only "tf32" multiplies in TF32.

    For "bf16" the caller opens torch.autocast. Afterwards, torch's older flags (allow_tf32) can no longer be read.
    Raises PrecisionError if the device has no units for the precision.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not ampere:
        raise PrecisionError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or higher; "
                             "omit the flag")
    if precision == "bf16" and not (ampere or device.type == "cpu" and cpu_multiplies_bf16()):
        raise PrecisionError("--precision bf16 would be slow here: it needs an NVIDIA GPU of compute capability 8.0 or "
                             "higher, or Linux on a CPU with AMX or AVX512-BF16; omit the flag")
    if device.type != "cuda":
        return
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        products = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = products
    else:  # torch before 2.9; the two interfaces must not be mixed
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def cpu_multiplies_bf16():
    """Return whether the CPU reports instructions for bfloat16 matrix products."""
    return bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo("flags").split()))


def keep_freed_memory():
    """Make glibc reuse one step's memory for the next, which reduced the time of a step on the CPU by a third.

    Freeing a block of just under 32 MB makes glibc keep up to twice as much (mallopt(3), M_MMAP_THRESHOLD); otherwise
    it returns pages to the kernel after every step. With other C libraries this has no effect.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
