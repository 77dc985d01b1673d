"""Tests of the groups for students, on correct and incorrect solutions."""

import contextlib
import importlib
import io
import re
import signal
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path
from unittest import mock

import unittests
from tests.solutions.mistakes import MISTAKES
from tests.solutions.styles import FURTHER, STYLES
from tests.train_mistakes import TrainMistakes
from unittests import HERE, Group

__unittest = True

GROUPS = (unittests.Networks, unittests.Losses, unittests.Mistakes, TrainMistakes)
PLAIN = (HERE / "tests" / "solutions" / "plain.py").read_text()
AT_IMPORT = 'import os\nif __name__ == "train":\n    '
BATCH = "x = x.to(model.device)"
CRASHES = (  # tests, old text, new text, what is said
    ("test_16", BATCH, "x = x[0, 0]", r"train.py raises RuntimeError: .*\(line \d+ of models.py: "),
    ("test_14", BATCH, "raise SystemExit('enough')", r"raises SystemExit: enough \(line \d+ of train.py: raise "),
    ("test_04", "ae_loss.backward()\n", "ae_loss.backward(), ae_loss.backward()\n", "raises RuntimeError: Trying to"),
    ("test_02", "torch.manual_seed(args.seed)", "torch.manual_sed(1)", "raises AttributeError: module 'torch' has"),
    ("test_auto", "F.mse_loss(recon_x, x)", "F.mse_loss(recon_x, x) * 0 / 0", "nan from a division by 0 or infinity"),
    ("test_shapes", "x)\n\n    @property\n    def device(self):\n        return next", "x) * 3\n\n    @property\n"
     "    def device(self):\n        return next", r"the decoder leaves \[-1, 1\]"),
    ("test_sample", "return self.decoder(torch", "return 0.5 + self.decoder(torch", "changes the decoder's images"),
    ("test_13", "grid = ", "grid = 1 / 0 + ", "train.py raises ZeroDivisionError"),
    ("test_16", "import os\n", f"{AT_IMPORT}undefined\n", "train.py raises NameError"))
ABSENT = (
    ("test_16", "import os\n", f"{AT_IMPORT}import missing_package\n", "No module named 'missing_package'"),
    ("test_16", "import os\n", f"{AT_IMPORT}import urllib.request as u; u.urlopen('x')\n", "OSError"),
    ("test_16", "def train_aae", "def train", "no attribute 'train_aae'"),
    ("test_05", "return self.decoder(torch", "return ConvDecoder(self.z_dim)(torch", "does not call self.decoder"),
    ("test_16", BATCH, 'x = x.to("cuda")', "CUDA|NVIDIA"),
    ("test_02", "(args.seed)", "(args.my_seed)", "main reads the flag my_seed,"),
    ("test_13", "(args.seed)", "(vars(args)['my_seed'])", "main reads the flag my_seed,"),
    ("test_24", "torch.manual_seed(args.seed)", "(lambda my_seed, **_: 0)(**vars(args))", "the flag my_seed,"))


def planted(style="plain", old="", new=""):
    """Return the text of a solution, with the text `old`, which must occur once, replaced by `new`."""
    text = PLAIN
    for beginning, lines in {**STYLES, **FURTHER}[style].items():
        (line,) = re.finditer(rf"^( *){re.escape(beginning)}.*\n", text, re.MULTILINE)
        start, end, indent = *line.span(), line[1]
        if line[0].endswith(":\n"):  # the body: lines that are blank, or indented deeper
            start, indent, lines = end, f"{indent}    ", f"{lines}\n"
            end += re.match(rf"(?:{indent}.*\n|\n)*", text[end:]).end()
        text = text[:start] + textwrap.indent(lines, indent) + "\n" + text[end:]
    if old and text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {style}")
    return text.replace(old, new) if old else text


def mark(text, tests="test"):
    """Run GROUPS on a text as models.py and train.py; return {name: message} of failed and of skipped tests."""
    loader = unittest.TestLoader()
    loader.testMethodPrefix = tests
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(group) for group in GROUPS)
    own = {name: sys.modules.pop(name) for name in ("models", "train") if name in sys.modules}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        for name in ("models", "train"):
            Path(folder, f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
    for name in ("models", "train"):
        sys.modules.pop(name, None)
    sys.modules.update(own)
    return [{test.id().rpartition(".")[2]: message for test, message in results}
            for results in ([*result.failures, *result.errors], result.skipped)]


class Solutions(Group):
    """Correct solutions pass whatever their style; what crashes fails, and what is absent is skipped."""

    needs = ("mnist", "utils")

    def test_right_solutions_pass(self):
        for style in (*STYLES, *FURTHER):
            self.assertEqual(mark(planted(style)), [{}, {}], style)

    def test_exchanged_terms_are_said_to_be_no_other_mistake(self):
        for one, other in (("gen_loss", "recon_loss"), ("loss_real", "loss_fake")):
            entries = f'"{one}": %s, "{other}": %s'
            failures = str(mark(planted("plain", entries % (one, other), entries % (other, one)))[0])
            self.check("are exchanged" in failures and "Mistake" not in failures, failures)

    def test_what_crashes_fails_and_what_is_absent_is_skipped(self):
        for kind, cases in enumerate((CRASHES, ABSENT)):
            for tests, old, new, words in cases:
                results = mark(planted("plain", old, new), tests)
                self.assertRegex("".join(results[kind].values()), words)
                self.check(not results[1 - kind] and "Mistake 4:" not in str(results), f"{new}: {results}")


class PlantedMistakes(Group):
    """The message of each mistake has its number."""

    needs = ("mnist", "utils")

    def test_mistakes_are_named(self):
        for number, style, old, new in MISTAKES:
            failures, _ = mark(planted(style, old, new), f"test_{number:02}")
            named = [message for message in failures.values() if f"Mistake {number}:" in message]
            self.check(named, f"Mistake {number} in {style} is not named: {failures}")
            self.check(not any("Traceback" in message for message in named), f"{style}: {named}")

    def test_a_swap_of_all_labels_is_not_said_to_help_the_discriminator(self):
        swapped = re.sub(r"(cross_entropy\(.+?, )([01])\)", lambda call: f"{call[1]}{1 - int(call[2])})", planted())
        for text, words in ((swapped, "since all labels are swapped"),
                            (planted(*MISTAKES[0][1:]), "which helps the discriminator")):
            self.assertIn(words, "".join(mark(text, "test_01")[0].values()))

    def test_every_mistake_is_in_two_styles_and_every_style_has_one(self):
        for number in range(1, 30):
            self.assertGreaterEqual(len({style for n, style, *_ in MISTAKES if n == number}), 2)
        self.assertEqual({style for _, style, *_ in MISTAKES}, set(STYLES))


@unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
class TimeLimit(Group):
    """Code that does not end is stopped, and later tests fail at once."""

    def setUp(self):
        self.addCleanup(setattr, unittests.Overrun, "first", None)

    def test_an_infinite_loop_is_stopped_even_if_it_catches_exceptions(self):
        with self.assertRaisesRegex(unittests.Overrun, "one: a hint"), unittests.limit("one: a hint", 0.2):
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)
        with self.assertRaisesRegex(AssertionError, "not run, because one$"), unittests.limit("two", 0.2):
            self.fail()
        self.assertIn("not run, because one", "".join(mark(planted(), "test_14")[0].values()))

    def test_an_import_that_does_not_end_is_named(self):
        text = planted("plain", "import os\n", f"{AT_IMPORT}while True: pass\n")
        with mock.patch.object(unittests, "IMPORT_LIMIT", 0.2):
            failures, _ = mark(text, "test_16")
        self.assertIn("importing train did not end within 0.2 s: does it train", "".join(failures.values()))
