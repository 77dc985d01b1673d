"""Groups of tests in parallel, in one process per CPU, which the standard library starts afresh on every system."""

import multiprocessing
import os
import signal
import sys
import time
import unittest
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from types import SimpleNamespace
from unittest import mock

import torch

import unittests
from training.threads import usable_cpus
from unittests import Group

__unittest = True

GPU_GROUPS = ("Cuda",)  # the only ones that see a GPU, one after the other
LONG = ("WholeRun", "Resume", "Evaluation", "Marks", "Checkpoint", "Solutions", "GraphReplay")  # start first


class Runner(unittest.TextTestRunner):
    """Runs groups in parallel, each process with one thread, which is faster than threads that compete for cores."""

    def run(self, suite):
        groups = {}
        for test in tests_in(suite):
            groups.setdefault(type(test).__name__, []).append(name_of(test))
        if len(groups) < 2:
            return super().run(suite)
        start = time.monotonic()
        results = [report(*result) for result in run_in_processes(groups, usable_cpus())]
        failed, skipped = ([test for result in results for test in result[kind]] for kind in (1, 2))
        ran, seconds = sum(result[0] for result in results), time.monotonic() - start
        self.stream.writeln(f"\nRan {ran} tests in {seconds:.1f} s\n\n"
                            f"{'FAILED' if failed else 'OK'} ({len(failed)} failed, {len(skipped)} skipped)")
        return SimpleNamespace(skipped=skipped, wasSuccessful=lambda: not failed)


def tests_in(suite):
    """Yield the tests of nested suites."""
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from tests_in(part)
        else:
            yield part


def name_of(test):
    """Return the name by which another process finds a test, or fails to, as the loader has here."""
    return "unittests." + ".".join(test.id().split(".")[-2:]).removeprefix("_FailedTest.")


def run_in_processes(groups, count):
    """Run groups of tests, {name: names of its tests}, in `count` processes; yield the results as they come."""
    names = sorted(groups, key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    on_gpu = [name for name in names if name in GPU_GROUPS and torch.cuda.is_available()]
    idle = SimpleQueue()
    for name in on_gpu:
        idle.put(new_process())
        yield run_group(name, groups[name], idle)
        idle.get().shutdown()
    threads = ThreadPoolExecutor(count)
    try:
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            for _ in range(count):
                idle.put(new_process())
            for done in as_completed([threads.submit(run_group, name, groups[name], idle)
                                      for name in names if name not in on_gpu]):
                yield done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def new_process():
    """Return a pool of one process, which starts with its first task and does not inherit the state of this one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare)


def prepare():
    torch.set_num_threads(1)
    unittests.load_groups()


def run_group(name, tests, idle):
    """Run a group in an idle process; return its name, the results of `run_tests` and the time in seconds."""
    process, start = idle.get(), time.monotonic()
    try:
        results = process.submit(run_tests, tests).result()
    except BrokenProcessPool:
        process, results = new_process(), (0, [(name, "its process has died (was it killed, or out of memory?)")], [])
    finally:
        idle.put(process)
    return name, *results, time.monotonic() - start


def run_tests(names):
    """Return the number of tests with these names, those that fail with their output, and those skipped with why."""
    with open(os.devnull, "w") as nowhere:
        result = unittest.TextTestRunner(nowhere).run(unittest.defaultTestLoader.loadTestsFromNames(names))
    failed = [(str(test), text) for test, text in [*result.errors, *result.failures]]
    failed += [(str(test), "unexpected success") for test in result.unexpectedSuccesses]
    return result.testsRun, failed, [(str(test), words) for test, words in result.skipped]


def report(name, ran, failed, skipped, seconds):
    """Print a group's results; return the number of its tests, the failed ones and the skipped ones."""
    print(f"{name}: {ran} tests, {len(failed)} failed, {len(skipped)} skipped, {seconds:.1f} s", file=sys.stderr)
    for test, text in failed:
        print(f"\nFAIL: {test}\n{text}", file=sys.stderr)
    return ran, failed, skipped


class Cases(unittest.TestCase):
    """What the tests below run in other processes; not part of the suite."""

    def test_passes(self):
        self.assertFalse(torch.cuda._is_in_bad_fork(), "a forked process cannot use CUDA")
        self.assertEqual((torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]), (1, ""))

    def test_dies(self):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    def test_fails(self):
        self.fail("a message")


class Processes(Group):
    """The runner of all tests."""

    def test_a_group_whose_process_dies_has_failed_and_the_others_run(self):
        groups = {name: [f"tests.parallel.Cases.test_{name}"] for name in ("passes", "dies", "fails")}
        results = {name: result for name, *result in run_in_processes(groups, 1)}
        self.assertEqual(results["passes"][:3], [1, [], []])
        self.assertIn("its process has died", results["dies"][1][0][1])
        self.assertIn("AssertionError: a message", results["fails"][1][0][1])

    def test_only_groups_of_the_gpu_see_it_one_after_the_other(self):
        def run_group(name, tests, idle):
            start = time.monotonic()
            time.sleep(0.05)
            return name, os.environ.get("CUDA_VISIBLE_DEVICES"), start, time.monotonic()

        on_gpu = (*GPU_GROUPS, "Another")
        with mock.patch.dict(os.environ), mock.patch("torch.cuda.is_available", return_value=True), \
                mock.patch.multiple("tests.parallel", GPU_GROUPS=on_gpu, run_group=run_group):
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            first, second, *others = run_in_processes(dict.fromkeys(("One", *on_gpu, "Two"), ()), 2)
        self.assertEqual({first[0]: first[1], second[0]: second[1]}, dict.fromkeys(on_gpu))
        self.assertEqual({name: visible for name, visible, *_ in others}, {"One": "", "Two": ""})
        self.assertLessEqual(first[3], second[2])
        self.assertLessEqual({*GPU_GROUPS, *LONG}, vars(unittests).keys(), "a group has another name now")
