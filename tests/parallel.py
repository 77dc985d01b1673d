"""All groups of tests at once, in as many processes as there are CPUs: what python unittests.py does without names."""

import multiprocessing
import os
import sys
import time
import unittest

import torch


def cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def can_fork():
    """Return whether processes can be forked that share what is imported here; on macOS that is not safe."""
    return sys.platform == "linux"


def run_groups(groups):
    """Run all tests of some groups, print what fails as unittest does, and return the exit status.

    Each process has one thread, for two that wait for each other are slower, and takes the next group when it is done with
    one. The groups with most tests come first, so that none is left alone at the end.
    """
    start = time.monotonic()
    groups = sorted(groups, key=lambda group: -unittest.defaultTestLoader.loadTestsFromTestCase(group).countTestCases())
    with multiprocessing.get_context("fork").Pool(cpus()) as pool:
        results = [report(*result) for result in pool.imap_unordered(run_group, groups)]
    ran, failed, skipped = (sum(column) for column in zip(*results, strict=True))
    print(f"\nRan {ran} tests in {time.monotonic() - start:.1f}s\n\n{'FAILED' if failed else 'OK'} "
          f"({failed} failed, {skipped} skipped)", file=sys.stderr)
    return 1 if failed else 0


def run_group(group):
    """Run a group in this process; return its name, the number of tests, what failed and what was skipped, and seconds."""
    torch.set_num_threads(1)
    start, result = time.monotonic(), unittest.TextTestResult(unittest.runner._WritelnDecorator(sys.stderr), True, 0)
    unittest.defaultTestLoader.loadTestsFromTestCase(group).run(result)
    failed = [(str(test), text) for test, text in result.errors + result.failures]
    failed += [(str(test), "it succeeds, which was not expected") for test in result.unexpectedSuccesses]
    skipped = [words for _, words in result.skipped]
    return group.__name__, result.testsRun, failed, skipped, time.monotonic() - start


def report(name, ran, failed, skipped, seconds):
    """Print what became of a group; return the numbers of tests that ran, failed and were skipped."""
    print(f"{name}: {ran} tests, {seconds:.1f} s", file=sys.stderr)
    for test, text in failed:
        print(f"\nFAIL: {test}\n{text}", file=sys.stderr)
    for words in dict.fromkeys(skipped):
        print(f"    skipped: {words}", file=sys.stderr)
    return ran, len(failed), len(skipped)
