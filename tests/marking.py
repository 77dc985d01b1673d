"""The groups for students, tried on complete solutions of the assignment, right and wrong ones: tests/solutions/.

Each file there is somebody's models.py and train.py in one. python -m tests.marking prints what the groups say of each.
"""

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest
from unittest import mock

import unittests
from tests.solutions.mistakes import MISTAKES
from tests.train_mistakes import TrainMistakes
from unittests import HERE, Group

__unittest = True

GROUPS = (unittests.Networks, unittests.Losses, unittests.Mistakes, TrainMistakes)
SKIPS = {"Mistakes.test_11_sampling_uses_the_evaluation_mode"}  # where sample() leaves that to its caller
SOLUTIONS = {file.stem: file for file in sorted((HERE / "tests" / "solutions").glob("*.py")) if file.stem != "mistakes"}


def planted(solution, old="", new=""):
    """Return a solution as a module, with one text, which must occur once, replaced by another."""
    text = SOLUTIONS[solution].read_text()
    if old and text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {solution}")
    module = types.ModuleType(solution, text.splitlines()[0].strip('"'))
    exec(compile(text.replace(old, new) if old else text, str(SOLUTIONS[solution]), "exec"), vars(module))
    return module


def mark(module, tests="test"):
    """Return {name: message} of the tests of GROUPS that fail for models.py and train.py in one, and of the skipped."""
    loader = unittest.TestLoader()
    loader.testMethodPrefix = tests
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(group) for group in GROUPS)
    with mock.patch.dict(sys.modules, models=module, train=module):
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
    return [{".".join(test.id().split(".")[-2:]): message for test, message in results}
            for results in ([*result.failures, *result.errors], result.skipped)]


class Solutions(Group):
    """Right solutions pass whatever their style, and each mistake is called by its number."""

    needs = ("mnist", "utils")

    def test_right_solutions_pass(self):
        for solution in SOLUTIONS:
            failures, skipped = mark(planted(solution))
            self.check(not failures and set(skipped) <= SKIPS, f"{solution}: {failures or skipped}")

    def test_mistakes_are_named(self):
        for number, solution, old, new in MISTAKES:
            failures, _ = mark(planted(solution, old, new), f"test_{number:02}")
            self.check(any(f"Mistake {number}:" in message for message in failures.values()),
                       f"Mistake {number} in {solution} is not named: {failures}")

    @unittest.skipUnless(shutil.which("bash") and shutil.which("timeout"), "this system has no bash or no timeout")
    def test_a_class_is_marked(self):
        folder = self.folder()
        plain, (_, _, old, new) = SOLUTIONS["plain"].read_text(), next(m for m in MISTAKES if m[:2] == (9, "plain"))
        for student, text in {"anna": plain, "ben": plain.replace(old, new)}.items():
            (folder / "class" / student).mkdir(parents=True)
            for name in ("models.py", "train.py"):
                (folder / "class" / student / name).write_text(text)
        marked = subprocess.run(["bash", HERE / "tests" / "mark_class", folder / "class", folder / "results"],
                                stdout=subprocess.PIPE, text=True).stdout.splitlines()
        self.assertRegex(marked[0], "^anna +passed +mistakes: none +OK")
        self.assertRegex(marked[1], r"^ben +failed +mistakes: 9 +FAILED")
        self.assertIn("Mistake 9:", (folder / "results" / "ben.txt").read_text())
        self.assertEqual(sorted(path.name for path in (folder / "class" / "ben").iterdir()), ["models.py", "train.py"])

    def test_every_mistake_is_in_two_solutions_and_every_solution_has_one(self):
        for number in range(1, 16):
            self.assertGreaterEqual(len({solution for n, solution, *_ in MISTAKES if n == number}), 2)
        self.assertEqual({solution for _, solution, *_ in MISTAKES}, set(SOLUTIONS))


class TimeLimit(Group):
    """What does not end is ended, and what comes after it fails at once."""

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
    def test_a_loop_without_an_end_is_ended_even_if_it_catches_exceptions(self):
        def loop():
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)

        self.addCleanup(setattr, unittests.Overrun, "first", None)
        with mock.patch.object(unittests, "LIMIT", 0.2):
            unittests.limit("one", self.addCleanup)
            self.assertRaisesRegex(unittests.Overrun, "one did not end", loop)
            with self.assertRaisesRegex(AssertionError, "not run, for one did not end"):
                unittests.limit("two", self.addCleanup)
        failures, _ = mark(planted("plain"), "test_14")
        self.check("not run, for one" in "".join(failures.values()), f"Mistakes continues after an Overrun: {failures}")


def print_table():
    """Print what the groups say of every solution, and of every mistake planted in one."""
    print("| solution | style | fails |\n|---|---|---|")
    for solution in SOLUTIONS:
        module = planted(solution)
        print(f"| {solution} | {module.__doc__} | {', '.join(mark(module)[0]) or 'nothing'} |")
    print("\n| mistake | planted in | named by | fails too |\n|---|---|---|---|")
    for number, solution, old, new in MISTAKES:
        failures, _ = mark(planted(solution, old, new))
        named = [test for test, message in failures.items() if f"Mistake {number}:" in message]
        others = [test for test in failures if test not in named]
        print(f"| {number} | {solution} | {', '.join(named) or 'NONE'} | {', '.join(others)} |")


if __name__ == "__main__":
    print_table()
