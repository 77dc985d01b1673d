"""Tests of the groups for students, on correct and incorrect solutions of the assignment in tests/solutions/.

python -m tests.marking prints which tests fail for each.
"""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path
from unittest import mock

import unittests
from tests.solutions.mistakes import MISTAKES
from tests.solutions.styles import STYLES
from tests.train_mistakes import TrainMistakes
from unittests import HERE, Group

__unittest = True

GROUPS = (unittests.Networks, unittests.Losses, unittests.Mistakes, TrainMistakes)
PLAIN = (HERE / "tests" / "solutions" / "plain.py").read_text()


def planted(style="plain", old="", new=""):
    """Return the text of a solution, with the text `old`, which must occur once, replaced by `new`."""
    text = PLAIN
    for beginning, lines in STYLES[style].items():
        (line,) = re.finditer(rf"^( *){re.escape(beginning)}.*\n", text, re.MULTILINE)
        start, end, indent = *line.span(), line[1]
        if line[0].endswith(":\n"):  # the body: lines that are blank, or indented deeper
            start, indent = end, f"{indent}    "
            end += re.match(rf"(?:{indent}.*\n|\n)*", text[end:]).end()
            lines += "\n\n"
        text = text[:start] + textwrap.indent(lines, indent) + "\n" + text[end:]
    if old and text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {style}")
    return text.replace(old, new) if old else text


def mark(text, tests="test"):
    """Run GROUPS on a text as models.py and train.py; return {name: message} of failed and of skipped tests."""
    loader = unittest.TestLoader()
    loader.testMethodPrefix = tests
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(group) for group in GROUPS)
    own = {name: sys.modules.pop(name, None) for name in ("models", "train")}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        for name in own:
            Path(folder, f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
    for name, module in own.items():
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module
    return [{".".join(test.id().split(".")[-2:]): message for test, message in results}
            for results in ([*result.failures, *result.errors], result.skipped)]


class Solutions(Group):
    """Correct solutions pass whatever their style, and the message of each mistake has its number."""

    needs = ("mnist", "utils")

    def test_right_solutions_pass(self):
        for style in STYLES:
            failures, skipped = mark(planted(style))
            self.check(not failures and not skipped, f"{style}: {failures or skipped}")

    def test_mistakes_are_named(self):
        for number, style, old, new in MISTAKES:
            failures, _ = mark(planted(style, old, new), f"test_{number:02}")
            named = [message for message in failures.values() if f"Mistake {number}:" in message]
            self.check(named, f"Mistake {number} in {style} is not named: {failures}")
            self.check(not any("Traceback" in message for message in named), f"{style}: {named}")

    def test_a_consistent_swap_of_labels_is_not_called_help_for_the_discriminator(self):
        swapped = planted().replace("cross_entropy(real, 1), cross_entropy(fake, 0)",
                                    "cross_entropy(real, 0), cross_entropy(fake, 1)")
        swapped = swapped.replace("cross_entropy(self.discriminator(z_fake), 1)",
                                  "cross_entropy(self.discriminator(z_fake), 0)")
        for text, words in ((swapped, "since all labels are swapped"),
                            (planted(*MISTAKES[0][1:]), "which helps the discriminator")):
            self.assertIn(words, "".join(mark(text, "test_01")[0].values()))

    def test_code_that_crashes_fails_and_what_is_absent_is_skipped(self):
        x, at_import = "x = x.to(model.device)", 'import os\nif __name__ == "train":\n    '
        for tests, old, new, fails, words in (
                ("test_16", x, "x = x[0, 0]", True, r"train.py raises RuntimeError: .*\(line \d+ of models.py: "),
                ("test_14", x, "exit('enough')", True, r"raises SystemExit: enough \(line \d+ of train.py: exit\("),
                ("test_04", "ae_loss.backward()\n", "ae_loss.backward()\n        ae_loss.backward()\n", True,
                 "train.py raises RuntimeError: Trying to backward"),
                ("test_02", "torch.manual_seed(args.seed)", "torch.manual_sed(1)", True, "raises AttributeError: "),
                ("test_13", "grid = ", "grid = 1 / 0 + ", True, "train.py raises ZeroDivisionError"),
                ("test_16", "import os\n", f"{at_import}undefined\n", True, "train.py raises NameError"),
                ("test_16", "import os\n", f"{at_import}import missing_package\n", False, "missing_package"),
                ("test_16", "import os\n", f"{at_import}import urllib.request as u; u.urlopen('x')\n", False, "OSError"),
                ("test_16", "def train_aae", "def train", False, "train_aae"),
                ("test_16", x, 'x = x.to("cuda")', False, "CUDA|NVIDIA"),
                ("test_02", "(args.seed)", "(args.my_seed)", False, "my_seed")):
            found, empty = mark(planted("plain", old, new), tests)[::1 if fails else -1]
            self.assertRegex("".join(found.values()), words)
            self.check(not empty and "Mistake 4:" not in str(found), f"{new}: {found} {empty}")

    def test_every_mistake_is_in_two_styles_and_every_style_has_one(self):
        for number in range(1, 17):
            self.assertGreaterEqual(len({style for n, style, *_ in MISTAKES if n == number}), 2)
        self.assertEqual({style for _, style, *_ in MISTAKES}, set(STYLES))


class Marks(Group):
    """Programs that a teacher or a student starts."""

    def run_python(self, *arguments, folder=HERE):
        """Run Python without a PATH; return its exit status, and its output with the errors."""
        done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True, env={**os.environ, "PATH": ""},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    def test_a_class_is_marked(self):
        seen = 'import os\n\nimport torch\ntorch.cuda.is_available = lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""\n'
        with_gpu = planted("module_device").replace("import os\n", seen, 1)
        results, class_ = self.folder() / "results", self.folder()
        for student, text in {"anna": with_gpu, "ben": planted("plain", *next(m for m in MISTAKES if m[0] == 9)[2:]),
                              "carla": "import sys\nsys.exit()", "dora": planted()}.items():
            (class_ / student).mkdir()
            for name in ("models.py", "train.py")[:1 if student == "dora" else 2]:
                (class_ / student / name).write_text(text)
        (class_ / "anna" / "unittests.py").write_text("print('OK')")
        status, lines = self.run_python("-m", "tests.mark", class_, results)
        lines = lines.splitlines()
        self.assertEqual((status, len(lines)), (0, 4), lines)
        self.assertRegex(lines[0], "^anna +passed +mistakes: none +OK")
        self.assertRegex(lines[1], "^ben +failed +mistakes: 9 +FAILED")
        self.assertIn("Mistake 9:", (results / "ben.txt").read_text())
        self.assertRegex(lines[2], "^carla +failed +mistakes: none +FAILED")  # and not a status of 0 without any test
        self.assertIn("importing models exits Python", (results / "carla.txt").read_text())
        self.assertRegex(lines[3], "^dora +incomplete +mistakes: none +not checked: 2 3 4 13 14 15 16 +OK")
        self.assertEqual(sorted(path.name for path in (class_ / "ben").iterdir()), ["models.py", "train.py"])

    def test_a_folder_without_students_is_rejected(self):
        status, output = self.run_python("-m", "tests.mark", HERE / "tests" / "solutions", self.folder())
        self.assertEqual((status, output.count("\n")), (1, 1), output)

    def test_behind_a_symbolic_link_the_folder_of_the_link_counts(self):
        folder = self.folder()
        try:
            (folder / "unittests.py").symlink_to(HERE / "unittests.py")
        except OSError as error:
            self.skipTest(f"symbolic links: {error}")
        (folder / "models.py").write_text("import sys\nsys.exit()")
        status, output = self.run_python("unittests.py", "Losses", folder=folder)
        self.assertEqual(status, 1)
        self.assertIn("importing models exits Python", output)


class TimeLimit(Group):
    """Code that does not end is stopped, and later tests fail at once."""

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
    def test_an_infinite_loop_is_stopped_even_if_it_catches_exceptions(self):
        def loop():
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)

        self.addCleanup(setattr, unittests.Overrun, "first", None)
        with self.assertRaisesRegex(unittests.Overrun, "one: a hint"), unittests.limit("one: a hint", 0.2):
            loop()
        with self.assertRaisesRegex(AssertionError, "not run, because one$"), unittests.limit("two", 0.2):
            self.fail()
        failures, _ = mark(planted(), "test_14")
        self.check("not run, because one" in "".join(failures.values()),
                   f"Mistakes continues after an Overrun: {failures}")

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
    def test_an_import_that_does_not_end_is_named(self):
        self.addCleanup(setattr, unittests.Overrun, "first", None)
        text = planted("plain", "import os\n", 'import os\nwhile __name__ == "train":\n    pass\n')
        with mock.patch.object(unittests, "IMPORT_LIMIT", 0.2):
            failures, _ = mark(text, "test_16")
        self.assertIn("importing train did not end within 0.2 s: does it train", "".join(failures.values()))


def print_table():
    """Print which tests fail for each style, and for each mistake planted in one."""
    print("| style | fails |\n|---|---|")
    for style in STYLES:
        print(f"| {style} | {', '.join(mark(planted(style))[0]) or 'nothing'} |")
    print("\n| mistake | planted in | named by | fails too |\n|---|---|---|---|")
    for number, style, old, new in MISTAKES:
        failures, _ = mark(planted(style, old, new))
        named = [test for test, message in failures.items() if f"Mistake {number}:" in message]
        others = [test for test in failures if test not in named]
        print(f"| {number} | {style} | {', '.join(named) or 'NONE'} | {', '.join(others)} |")


if __name__ == "__main__":
    print_table()
