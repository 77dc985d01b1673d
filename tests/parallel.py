"""Groups of tests in parallel, in one process per CPU; and tests of this."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from types import SimpleNamespace
from unittest import mock

import torch

import unittests
from unittests import HERE, Group

__unittest = True

WORKER = f"import sys; sys.path[0] = {str(HERE)!r}; import unittests, tests.parallel; tests.parallel.work()"
GPU_GROUPS = ("Cuda",)  # the only ones that see a GPU, one after the other
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LONG = ("WholeRun", "Resume", "Solutions", "Checkpoint", "GraphReplay")  # start first


class Runner(unittest.TextTestRunner):
    """Runs groups in parallel, each process with one thread, which is faster than threads that compete for cores."""

    def run(self, suite):
        groups = {}
        for test in tests_in(suite):
            groups.setdefault(type(test).__name__, []).append(name_of(test))
        if len(groups) < 2:
            return super().run(suite)
        start = time.monotonic()
        results = [report(*result) for result in run_in_processes(groups, CPUS)]
        failed, skipped = ([test for result in results for test in result[kind]] for kind in (1, 2))
        ran, seconds = sum(result[0] for result in results), time.monotonic() - start
        self.stream.writeln(f"\nRan {ran} tests in {seconds:.1f} s\n\n"
                            f"{'FAILED' if failed else 'OK'} ({len(failed)} failed, {len(skipped)} skipped)")
        return SimpleNamespace(skipped=skipped, wasSuccessful=lambda: not failed)


def name_of(test):
    """Return the name under which a worker finds a test, or fails to, as the loader here did."""
    return "unittests." + ".".join(test.id().split(".")[-2:]).removeprefix("_FailedTest.")


def tests_in(suite):
    """Yield the tests of nested suites."""
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from tests_in(part)
        else:
            yield part


class Worker:
    """A process that runs groups one after the other. If it dies, the group has failed, and the next gets a new one."""

    def __init__(self, sees_gpu=False):
        self.process = None
        self.environment = dict(os.environ) if sees_gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def run(self, name, tests):
        """Run a group's tests; return its name, how many ran, the failed and the skipped ones, and the seconds."""
        start = time.monotonic()
        if not self.process:
            self.process = subprocess.Popen([sys.executable, "-c", WORKER], env=self.environment, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with contextlib.suppress(OSError):  # the process has died
            print(json.dumps(tests), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        seconds = time.monotonic() - start
        if line.endswith("\n"):
            return name, *json.loads(line), seconds
        failed = [(name, f"its process ended with status {self.stop()}, before the tests did")]
        return name, 0, failed, [], seconds

    def stop(self):
        """End the process and return its status."""
        process, self.process = self.process, None
        if process:
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes
                pass
            return process.returncode


def run_in_processes(groups, count):
    """Run groups of tests, {name: names of its tests}, in `count` processes; yield the results as they come."""
    names = sorted(groups, key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    on_gpu = [name for name in names if name in GPU_GROUPS and torch.cuda.is_available()]
    workers, idle = [Worker(name in on_gpu) for name in (*on_gpu, *range(count))], SimpleQueue()

    def run(name):
        worker = idle.get()
        try:
            return worker.run(name, groups[name])
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)
    try:
        for name, worker in zip(on_gpu, workers, strict=False):
            yield worker.run(name, groups[name])
        for worker in workers[len(on_gpu):]:
            idle.put(worker)
        for result in as_completed([pool.submit(run, name) for name in names if name not in on_gpu]):
            yield result.result()
    finally:  # also after Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()


def work():
    """Run groups as a worker: read the names of a group's tests from standard input, and write its results."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    torch.set_num_threads(1)
    commands, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what tests print does not get between the results
    unittests.load_groups()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the parent reports it, or has ended
        for line in commands:
            print(json.dumps(run_tests(json.loads(line))), file=results, flush=True)


def run_tests(names):
    """Run tests; return their number, the failed ones with their messages, and the skipped ones with the reasons."""
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    with open(os.devnull, "w") as nowhere:
        result = unittest.TextTestRunner(nowhere).run(suite)
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
    """What the tests below let a worker run; not part of the suite."""

    def test_passes(self):
        self.assertFalse(torch.cuda._is_in_bad_fork(), "a forked process cannot use CUDA")
        self.assertEqual((torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]), (1, ""))
        print("noise")

    def test_dies(self):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    def test_fails(self):
        self.fail("a message")


class Processes(Group):
    """The runner of all tests."""

    def test_a_process_that_dies_has_failed_and_the_others_run(self):
        groups = {name: [f"tests.parallel.Cases.test_{name}"] for name in ("passes", "dies", "fails")}
        results = {name: result for name, *result in run_in_processes(groups, 1)}
        self.assertEqual(results["passes"][:3], [1, [], []])
        self.assertRegex(results["dies"][1][0][1], "its process ended with status -?[0-9]+, before the tests did")
        self.assertIn("AssertionError: a message", results["fails"][1][0][1])

    def test_only_groups_of_the_gpu_see_it_one_after_the_other(self):
        def run(worker, name, tests):
            now = time.monotonic()
            time.sleep(0.05)
            return name, worker.environment.get("CUDA_VISIBLE_DEVICES") != "", now, time.monotonic()

        on_gpu = (*GPU_GROUPS, "Another")
        with mock.patch.dict(os.environ), mock.patch("torch.cuda.is_available", return_value=True), \
                mock.patch("tests.parallel.GPU_GROUPS", on_gpu), mock.patch.object(Worker, "run", run):
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            results = list(run_in_processes(dict.fromkeys(("One", *on_gpu, "Two"), ()), 2))
        self.assertEqual({name: visible for name, visible, *_ in results},
                         {"One": False, "Two": False, **dict.fromkeys(on_gpu, True)})
        (*_, end), (*_, start, _) = (result for result in results if result[1])
        self.assertLessEqual(end, start)
        self.assertLessEqual({*GPU_GROUPS, *LONG}, vars(unittests).keys(), "a group has another name now")
