"""What training needs beyond the recipe in train.py. This file sets what has to be set before torch is imported.

A waiting thread of libgomp, torch's thread pool on Linux, spins on its core before it sleeps. When other programs use
the CPU too, it may take the core from the very thread that it waits for; a short spin avoids this (docs/SPEED.md).
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" or "max PERIOD": a container's limit (Linux, cgroups v2)
SPIN_COUNT = 2000  # iterations of a waiting loop; libgomp's default is 300,000 (see GOMP_SPINCOUNT in its manual)
presses = []  # of Ctrl-C


def interrupt(signum, _):
    """Handle Ctrl-C, and note it: C code of torch and numpy may drop the error while it imports modules."""
    presses.append(signum)
    raise KeyboardInterrupt


def report_exception(*error):
    """Replace sys.excepthook: Ctrl-C while a program still imports torch needs no traceback."""
    if presses or error[0] is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(*error)


def usable_cpus():
    """Return the number of CPUs in this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads():
    """Unless the user has, set a short spin and limit the threads to the CPU quota; return the quota if it binds."""
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    try:
        quota, period = map(int, CPU_MAX.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no file, or no limit
        return None
    if quota >= usable_cpus() * period or "OMP_NUM_THREADS" in os.environ:
        return None
    os.environ["OMP_NUM_THREADS"] = str(max(1, quota // period))
    return quota / period


if hasattr(sys.modules["__main__"], "__file__") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    sys.excepthook = report_exception  # not in a notebook or at a prompt
    with contextlib.suppress(ValueError):  # a thread may not set it
        signal.signal(signal.SIGINT, interrupt)
# TensorBoard's switch for doing without TensorFlow: it is slow to import, and an empty folder of its name is an error.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
QUOTA = limit_threads()
