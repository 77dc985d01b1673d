"""Groups of tests in parallel, in one process per CPU, which the standard library starts afresh on every system."""

import multiprocessing
import os
import signal
import time
import unittest
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from unittest import mock

import torch

import unittests
from training.threads import usable_cpus
from unittests import Group

__unittest = True

GPU_GROUPS = ("Cuda",)  # the only ones that see a GPU, one after the other
LONG = "Solutions", "PlantedMistakes", "Marks", "Evaluation", "Resume", "GraphReplay", "Shell", "WholeRun"  # first


class Runner(unittest.TextTestRunner):
    """Runs groups in parallel, each process with one thread, which is faster than threads that compete for cores."""

    def run(self, suite):
        groups, start = {}, time.monotonic()
        for test in tests_in(suite):
            groups.setdefault(type(test).__name__, []).append(name_of(test))
        if len(groups) < 2:
            return super().run(suite)
        ran, failed, skipped = 0, [], []
        for name, number, failures, skips, seconds in run_in_processes(groups, usable_cpus()):
            self.stream.writeln(f"{name}: {number} tests, {len(failures)} failed, {len(skips)} skipped, "
                                f"{seconds:.1f} s")
            for test, text in failures:
                self.stream.writeln(f"\nFAIL: {test}\n{text}")
            ran, failed, skipped = ran + number, failed + failures, skipped + skips
        self.stream.writeln(f"\nRan {ran} tests in {time.monotonic() - start:.1f} s\n\n"
                            f"{'FAILED' if failed else 'OK'} ({len(failed)} failed, {len(skipped)} skipped)")
        return SimpleNamespace(skipped=skipped, wasSuccessful=lambda: not failed)


def tests_in(suite):
    """Return the tests of nested suites."""
    return [test for part in suite for test in tests_in(part)] if isinstance(suite, unittest.TestSuite) else [suite]


def name_of(test):
    """Return the name by which another process finds a test, or fails to, as the loader has here."""
    return "unittests." + ".".join(test.id().split(".")[-2:]).removeprefix("_FailedTest.")


def run_in_processes(groups, count):
    """Run groups of tests, {name: names of its tests}, in `count` processes; yield the results as they come."""
    names = sorted(groups, key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    on_gpu = [name for name in names if name in GPU_GROUPS and torch.cuda.is_available()]
    for name in on_gpu:
        yield from run_in_pool({name: groups[name]}, 1)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        yield from run_in_pool({name: groups[name] for name in names if name not in on_gpu}, count)


def run_in_pool(groups, count):
    """Yield the name of each group and its results, in new processes, which do not inherit the state of this one."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=prepare)
    try:
        names = {pool.submit(run_group, tests): name for name, tests in groups.items()}
        for done in as_completed(names):
            try:
                yield names[done], *done.result()
            except BrokenProcessPool:
                words = "its process has died, or another one before it ran (was it killed, or out of memory?)"
                yield names[done], 0, [(names[done], words)], [], 0
    finally:
        pool.shutdown(cancel_futures=True)


def prepare():
    torch.set_num_threads(1)
    unittests.load_groups()


def run_group(names):
    """Return the number of tests, the failed ones with their output, the skipped ones with why, and the seconds."""
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere:
        result = unittest.TextTestRunner(nowhere).run(unittest.defaultTestLoader.loadTestsFromNames(names))
    unexpected = [(test, "unexpected success") for test in result.unexpectedSuccesses]
    failed, skipped = ([(str(test), text) for test, text in part]
                       for part in (result.errors + result.failures + unexpected, result.skipped))
    return result.testsRun, failed, skipped, time.monotonic() - start


class Cases(unittest.TestCase):
    """What a test below runs in other processes; not part of the suite."""

    def test_passes(self):
        self.assertFalse(torch.cuda._is_in_bad_fork(), "a forked process cannot use CUDA")
        self.assertEqual((torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]), (1, ""))

    def test_fails(self):
        self.fail("a message")

    def test_dies(self):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


class Processes(Group):
    """The runner of all tests."""

    def test_a_group_whose_process_dies_has_failed(self):
        groups = {name: [f"tests.parallel.Cases.test_{name}"] for name in ("passes", "fails", "dies")}
        results = {name: result for name, *result in run_in_processes(groups, 1)}
        self.assertEqual(results["passes"][:3], [1, [], []])
        self.assertIn("AssertionError: a message", results["fails"][1][0][1])
        self.assertIn("its process has died", results["dies"][1][0][1])
        self.assertLessEqual({*GPU_GROUPS, *LONG}, vars(unittests).keys(), "a group has another name now")
