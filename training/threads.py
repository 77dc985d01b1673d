"""How many threads torch computes with on the CPU, and how they wait. Import this before torch, which reads both once.

A thread of libgomp, torch's pool on Linux, that waits for the others spins on its core before it sleeps; beside other
work it so takes the core from the thread that it waits for. A short spin costs nothing alone; the figures
are in docs/SPEED.md.
"""

import math
import os
import sys
from pathlib import Path

SPIN_COUNT = 1000  # turns of the loop in which a thread waits; libgomp has 300,000 (GOMP_SPINCOUNT in its manual)
CGROUP, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota():
    """Return how many CPUs the control groups of this process may use (Linux cgroups 2 and 1); inf without a limit."""
    quotas = [math.inf]
    for controllers, group in memberships():
        base = CGROUP if not controllers else CGROUP / ("cpu" if (CGROUP / "cpu").exists() else controllers)
        for folder in (base / group, *(base / group).parents):  # the group's own limit, and those around it
            quotas.append(quota_of(folder))
            if folder == base:
                break
    return min(quotas)


def memberships():
    """Return (controllers, path) of the groups that may limit the CPU; those of version 2 have no controllers."""
    try:
        lines = [line.split(":", 2)[1:] for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    return [(controllers, path.lstrip("/")) for controllers, path in lines
            if not controllers or "cpu" in controllers.split(",")]


def quota_of(folder):
    """Return the limit that a control group's folder states, in CPUs."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def usable_cpus():
    """Return on how many CPUs this process may run by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def configure():
    """Set what the user has not: a short spin, and no more threads than the quota allows; return it if it binds."""
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    quota = cpu_quota()
    if quota >= usable_cpus() or "OMP_NUM_THREADS" in os.environ:
        return None
    os.environ["OMP_NUM_THREADS"] = str(max(1, math.floor(quota)))
    return quota


QUOTA = configure()
