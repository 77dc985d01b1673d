"""Tests of the groups for students, on correct and incorrect solutions of the assignment in tests/solutions/.

Each file there combines a models.py and a train.py. python -m tests.marking prints which tests fail for each.
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
    """Return a solution as a module, with the text `old`, which must occur once, replaced by `new`."""
    text = SOLUTIONS[solution].read_text()
    if old and text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {solution}")
    module = types.ModuleType(solution, text.splitlines()[0].strip('"'))
    exec(compile(text.replace(old, new) if old else text, str(SOLUTIONS[solution]), "exec"), vars(module))
    return module


def mark(module, tests="test"):
    """Run GROUPS on a module as models.py and train.py; return {name: message} of failed and of skipped tests."""
    loader = unittest.TestLoader()
    loader.testMethodPrefix = tests
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(group) for group in GROUPS)
    with mock.patch.dict(sys.modules, models=module, train=module):
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
    return [{".".join(test.id().split(".")[-2:]): message for test, message in results}
            for results in ([*result.failures, *result.errors], result.skipped)]


class Solutions(Group):
    """Correct solutions pass whatever their style, and the message of each mistake has its number."""

    needs = ("mnist", "utils")

    def test_right_solutions_pass(self):
        for solution in SOLUTIONS:
            failures, skipped = mark(planted(solution))
            self.check(not failures and set(skipped) <= SKIPS, f"{solution}: {failures or skipped}")

    def test_mistakes_are_named(self):
        for number, solution, old, new in MISTAKES:
            failures, _ = mark(planted(solution, old, new), f"test_{number:02}")
            named = [message for message in failures.values() if f"Mistake {number}:" in message]
            self.check(named, f"Mistake {number} in {solution} is not named: {failures}")
            self.check(not any("Traceback" in message for message in named), f"{solution}: {named}")

    @unittest.skipUnless(shutil.which("bash") and shutil.which("timeout"), "this system has no bash or no timeout")
    def test_a_class_is_marked(self):
        folder = self.folder()
        plain, (_, _, old, new) = SOLUTIONS["plain"].read_text(), next(m for m in MISTAKES if m[:2] == (9, "plain"))
        for student, text in {"anna": plain, "ben": plain.replace(old, new), "carla": "import sys\nsys.exit()"}.items():
            (folder / "class" / student).mkdir(parents=True)
            for name in ("models.py", "train.py"):
                (folder / "class" / student / name).write_text(text)
        marked = subprocess.run(["bash", HERE / "tests" / "mark_class", folder / "class", folder / "results"],
                                stdout=subprocess.PIPE, text=True).stdout.splitlines()
        self.assertRegex(marked[0], "^anna +passed +mistakes: none +OK")
        self.assertRegex(marked[1], r"^ben +failed +mistakes: 9 +FAILED")
        self.assertIn("Mistake 9:", (folder / "results" / "ben.txt").read_text())
        self.assertRegex(marked[2], "^carla +failed +mistakes: none +FAILED")  # and not a status of 0 without any test
        self.assertIn("importing models exits Python", (folder / "results" / "carla.txt").read_text())
        self.assertEqual(sorted(path.name for path in (folder / "class" / "ben").iterdir()), ["models.py", "train.py"])

    def test_every_mistake_is_in_two_solutions_and_every_solution_has_one(self):
        for number in range(1, 16):
            self.assertGreaterEqual(len({solution for n, solution, *_ in MISTAKES if n == number}), 2)
        self.assertEqual({solution for _, solution, *_ in MISTAKES}, set(SOLUTIONS))


class TimeLimit(Group):
    """Code that does not end is stopped, and later tests fail at once."""

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
    def test_an_infinite_loop_is_stopped_even_if_it_catches_exceptions(self):
        def loop():
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)

        self.addCleanup(setattr, unittests.Overrun, "first", None)
        with mock.patch.object(unittests, "LIMIT", 0.2):
            unittests.limit("one", self.addCleanup)
            self.assertRaisesRegex(unittests.Overrun, "one did not end", loop)
            with self.assertRaisesRegex(AssertionError, "not run, because one did not end"):
                unittests.limit("two", self.addCleanup)
        failures, _ = mark(planted("plain"), "test_14")
        self.check("not run, because one" in "".join(failures.values()),
                   f"Mistakes continues after an Overrun: {failures}")


def print_table():
    """Print which tests fail for each solution, and for each mistake planted in one."""
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
