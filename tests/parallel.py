"""Groups of tests in parallel, one process per CPU, on Linux."""

import multiprocessing
import os
import sys
import time
import unittest
from types import SimpleNamespace

import torch

GROUPS = {}  # name -> tests, for the forked processes


class Runner(unittest.TextTestRunner):
    """Runs groups in parallel, each process with one thread, which is faster than threads that compete for cores."""

    def run(self, suite):
        GROUPS.clear()
        for test in tests_in(suite):
            GROUPS.setdefault(type(test).__name__, unittest.TestSuite()).addTest(test)
        if len(GROUPS) < 2 or sys.platform != "linux":  # elsewhere a process with threads cannot be forked safely
            return super().run(suite)
        start = time.monotonic()
        with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
            names = sorted(GROUPS, key=lambda name: -GROUPS[name].countTestCases())  # the long ones first
            results = [report(*result) for result in pool.imap_unordered(run_group, names)]
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


def run_group(name):
    """Run a group; return its name, the number of tests, the failed and the skipped ones, and the time in seconds."""
    torch.set_num_threads(1)
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere:
        result = unittest.TextTestRunner(nowhere).run(GROUPS[name])
    failed = [(str(test), text) for test, text in [*result.errors, *result.failures]]
    failed += [(str(test), "unexpected success") for test in result.unexpectedSuccesses]
    skipped = [(str(test), words) for test, words in result.skipped]
    return name, result.testsRun, failed, skipped, time.monotonic() - start


def report(name, ran, failed, skipped, seconds):
    """Print a group's results; return the number of its tests, the failed ones and the skipped ones."""
    print(f"{name}: {ran} tests, {len(failed)} failed, {len(skipped)} skipped, {seconds:.1f} s", file=sys.stderr)
    for test, text in failed:
        print(f"\nFAIL: {test}\n{text}", file=sys.stderr)
    return ran, failed, skipped
