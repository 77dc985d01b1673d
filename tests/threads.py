"""The number of threads, and how they wait."""

import ast
import importlib
import math
import os
import sys
from unittest import mock

from unittests import HERE, Group

__unittest = True


class Threads(Group):
    """A container's CPU quota, and the variables that are set before torch is imported."""

    def setUp(self):
        super().setUp()
        self.threads = importlib.import_module("training.threads")

    def quota(self, membership, files):
        """Return the quota for this /proc/self/cgroup and these files under /sys/fs/cgroup."""
        folder = self.folder()
        for name, content in {"cgroup/none": "", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        (folder / "membership").write_text(membership)
        with mock.patch.multiple(self.threads, CGROUP=folder / "cgroup", MEMBERSHIP=folder / "membership"):
            return self.threads.cpu_quota()

    def test_quota_is_the_smallest_of_the_group_and_its_parents(self):
        limits = {"cgroup/user/job/cpu.max": "100000 100000\n", "cgroup/user/cpu.max": "400000 100000\n"}
        version_1 = {"cgroup/cpu/docker/a/cpu.cfs_quota_us": "150000\n",
                     "cgroup/cpu/docker/a/cpu.cfs_period_us": "100000\n"}
        cases = (
            (math.inf, "0::/\n", {}),
            (math.inf, "0::/\n", {"cgroup/cpu.max": "max 100000\n"}),
            (2.5, "0::/\n", {"cgroup/cpu.max": "250000 100000\n"}),
            (1.0, "0::/user/job\n", limits),
            (4.0, "0::/user/job\n", {**limits, "cgroup/user/job/cpu.max": "max 100000\n"}),
            (1.5, "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n", version_1),
            (math.inf, "4:cpu:/docker/a\n", {**version_1, "cgroup/cpu/docker/a/cpu.cfs_quota_us": "-1\n"}),
            (1.0, "4:cpu:/elsewhere\n", {name.replace("docker/a/", ""): "50000\n" for name in version_1}),
            (math.inf, "0::/\n", {"cgroup/cpu.max": "nonsense"}),
            (math.inf, "", {}))
        for expected, membership, files in cases:
            self.assertEqual(self.quota(membership, files), expected, (membership, files))

    def test_system_without_control_groups_has_no_quota(self):
        missing = self.folder() / "none"
        with mock.patch.multiple(self.threads, CGROUP=missing, MEMBERSHIP=missing):
            self.assertEqual(self.threads.cpu_quota(), math.inf)

    def configured(self, environment, quota=math.inf, cpus=4):
        """Return the environment after `configure`, and what `configure` returns."""
        with mock.patch.dict(os.environ, environment, clear=True), \
                mock.patch.multiple(self.threads, cpu_quota=lambda: quota, usable_cpus=lambda: cpus):
            returned = self.threads.configure()
            return dict(os.environ), returned

    def test_settings_of_the_user_are_kept(self):
        with mock.patch("sys.platform", "linux"):
            self.assertEqual(self.configured({}), ({"GOMP_SPINCOUNT": "1000"}, None))
            for environment in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
                self.assertEqual(self.configured(environment), (environment, None))
        with mock.patch("sys.platform", "darwin"):
            self.assertEqual(self.configured({}), ({}, None))

    def test_no_more_threads_than_the_quota_allows(self):
        spin = {"GOMP_SPINCOUNT": "7"}
        for quota, threads in ((0.5, "1"), (1.0, "1"), (2.0, "2"), (2.5, "2"), (3.9, "3")):
            self.assertEqual(self.configured(spin, quota), ({**spin, "OMP_NUM_THREADS": threads}, quota))
        for quota in (4.0, 16.0, math.inf):
            self.assertEqual(self.configured(spin, quota), (spin, None))
        environment = {**spin, "OMP_NUM_THREADS": "8"}
        self.assertEqual(self.configured(environment, 2.0), (environment, None))

    def test_every_program_sets_it_before_torch_is_imported(self):
        programs = [HERE / "train.py", HERE / "unittests.py", HERE / "evaluation" / "__main__.py",
                    HERE / "evaluation" / "classifier.py", *(HERE / "benchmarks").glob("*.py")]
        for program in programs:
            if program.name in ("compare_checkouts.py", "report.py", "tables.py", "plots.py"):  # without torch
                continue
            nodes = [node for node in ast.walk(ast.parse(program.read_text()))
                     if isinstance(node, (ast.Import, ast.ImportFrom))]
            nodes.sort(key=lambda node: node.lineno)
            names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
            names = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
            self.assertEqual(names[0], "training.threads", program)
