"""How many threads torch uses on the CPU, and how they wait. Import this before torch, which reads both settings once.

A waiting thread of libgomp, torch's thread pool on Linux, spins on its core before it sleeps. When other programs use
the CPU too, it may take the core from the very thread that it waits for. A short spin avoids this and costs nothing
otherwise; docs/SPEED.md has the measurements.
"""

import math
import os
import sys
from pathlib import Path

SPIN_COUNT = 1000  # iterations of a waiting loop; libgomp's default is 300,000 (see GOMP_SPINCOUNT in its manual)
CGROUP, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota():
    """Return the CPU limit of this process's control groups (Linux cgroups v2 and v1), in CPUs; inf without a limit."""
    quotas = [math.inf]
    for controllers, group in memberships():
        base = CGROUP if not controllers else CGROUP / ("cpu" if (CGROUP / "cpu").exists() else controllers)
        for folder in (base / group, *(base / group).parents):  # the limits of the group and of its parents
            quotas.append(quota_of(folder))
            if folder == base:
                break
    return min(quotas)


def memberships():
    """Return (controllers, path) of the groups that may limit the CPU; groups of version 2 have no controllers."""
    try:
        lines = [line.split(":", 2)[1:] for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    return [(controllers, path.lstrip("/")) for controllers, path in lines
            if not controllers or "cpu" in controllers.split(",")]


def quota_of(folder):
    """Return the limit in a control group's folder, in CPUs; inf without one."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def usable_cpus():
    """Return the number of CPUs in this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def configure():
    """Unless the user has, set a short spin and limit the threads to the CPU quota; return the quota if it binds."""
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    quota = cpu_quota()
    if quota >= usable_cpus() or "OMP_NUM_THREADS" in os.environ:
        return None
    os.environ["OMP_NUM_THREADS"] = str(max(1, math.floor(quota)))
    return quota


QUOTA = configure()
