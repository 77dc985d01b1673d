"""What depends on the hardware: the device, how precisely it multiplies, CUDA graphs. Needs no other file of the project."""

import os
import platform
import re
from collections import Counter
from pathlib import Path

import torch

WARM_UP = 3  # steps of a size before it is captured: libraries choose kernels and allocate in the first ones
CPUINFO = Path("/proc/cpuinfo")  # on Linux


class CaptureError(RuntimeError):
    """A training step that no CUDA graph can hold; the message says what to do."""


class PrecisionError(RuntimeError):
    """A precision that a device cannot compute in, or only slowly; the message says what to do."""


def choose_device(no_cuda=False, deterministic=False, mps=True):
    """Return the device to compute on: CUDA unless `no_cuda`, else Apple's MPS, which lacks float64, if `mps`, else the CPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it finds mistakes, at the price of a kernel a tensor
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
        found = re.search(rf"^{name}\s*: (.+)", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


def set_precision(precision, device):
    """Compute float32 products on CUDA as `precision` ("fp32", "tf32" or "bf16") says, with TF32 for "tf32" alone.

    For "bf16" the caller opens torch.autocast. It sets torch's flags for the whole process, after which torch's older ones
    (allow_tf32) can no longer be read. Raises PrecisionError where the device has no units for the precision.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not ampere:
        raise PrecisionError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more; leave the flag out")
    if precision == "bf16" and not (ampere or device.type == "cpu" and cpu_multiplies_bf16()):
        raise PrecisionError("--precision bf16 would be slow here: it needs an NVIDIA GPU of compute capability 8.0 or more, "
                             "or on Linux a processor with AMX or AVX512-BF16; leave the flag out")
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


class CapturedStep:
    """A training step on CUDA, captured as a CUDA graph for each batch size, and replayed: one launch for all its kernels.

    `step` takes a batch on the device and returns tensors in lists or dicts. It may neither copy between host and device
    nor depend on a value. The first WARM_UP calls for a size run it as it is, and are training steps like all others;
    capturing runs nothing. What a call returns is overwritten by the next. Random draws are new at each replay.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for the rules.
    """

    def __init__(self, step):
        self.step = step
        self._warm = Counter()  # shape -> calls so far
        self._graphs = {}       # shape -> the graph, the batch that it reads, the values that it writes
        self._stream = torch.cuda.Stream()

    def __call__(self, x):
        if x.shape not in self._graphs:
            if self._warm[x.shape] < WARM_UP:
                self._warm[x.shape] += 1
                return self._on_side_stream(x)
            self._graphs[x.shape] = self._capture(x)
        graph, batch, values = self._graphs[x.shape]
        batch.copy_(x)
        graph.replay()
        return values

    def _on_side_stream(self, x):
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            values = self.step(x)
        torch.cuda.current_stream().wait_stream(self._stream)
        return values

    def _capture(self, x):
        graph, batch = torch.cuda.CUDAGraph(), x.clone()
        try:
            with torch.cuda.graph(graph):
                values = self.step(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = str(error.__context__ or error).partition("\n")[0]  # what ends a failed capture raises an error of its own
            raise CaptureError(f"the training step cannot be captured as a CUDA graph ({cause}): a loss copies between host and "
                               f"device, or depends on a value; set `capturable = False` in the model's class") from error
        return graph, batch, values
