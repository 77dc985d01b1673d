"""Tests of the students' tests, on right solutions in many styles and with planted mistakes.

The groups run a few of each, and .ci/run all. With other random numbers:  python -m tests.student_tests --seeds 50
All planted mistakes:  python -m tests.student_tests --mistakes
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path
from unittest import mock

import torch

import unittests
from tests import model_layers, train_epoch, train_gradients, train_main, train_step
from tests.solutions.mistakes import MISTAKES
from tests.solutions.styles import FURTHER, STYLES
from unittests import HERE, Group, StudentGroup

__unittest = True

GROUPS = {"models": (unittests.Networks, unittests.Model, unittests.AutoencoderLoss, unittests.DiscriminatorLoss,
                     unittests.Sampling, model_layers.Layers, model_layers.Placement),
          "train_aae": (train_step.TrainStep,), "main": (train_main.TrainMain, train_main.SavedPictures),
          "other files": (train_main.DataAndLogger,)}
SOLUTIONS = HERE / "tests" / "solutions"
AT_IMPORT = 'import os\nif __name__ == "train":\n    '
BATCH = "x = x.to(model.device)"
TRAINING = ("train_aae", "main")
CRASHES = (  # parts of the tests, old text, new text, what is said
    (TRAINING, BATCH, "x = x[0, 0]", r"train.py raises RuntimeError: .*\(line \d+ of models.py: "),
    (TRAINING, BATCH, "raise SystemExit('enough')", r"raises SystemExit: enough \(line \d+ of train.py: raise "),
    (TRAINING, "ae_loss.backward()\n", "ae_loss.backward(), ae_loss.backward()\n", "raises RuntimeError: Trying to"),
    (TRAINING, "torch.manual_seed(args.seed)", "torch.manual_sed(1)", "raises AttributeError: module 'torch' has"),
    (TRAINING, "grid = ", "grid = 1 / 0 + ", "train.py raises ZeroDivisionError"),
    (TRAINING, "import os\n", f"{AT_IMPORT}undefined\n", "train.py raises NameError"),
    (tuple(GROUPS), "F.mse_loss(recon_x, x)", "F.mse_loss(recon_x, x) * 0 / 0", "it is nan"),
    (("models",), "x)\n\n    @property\n    def device(self):\n        return next", "x) * 3\n\n    @property\n"
     "    def device(self):\n        return next", r"the decoder's pixels reach"),
    (tuple(GROUPS), "return self.decoder(torch", "return 0.5 + self.decoder(torch", "changes the decoder's images"),
    (("models",), "return ae_loss, {", "return {", r"get_loss_autoencoder must return \(loss, dict\)"),
    (tuple(GROUPS), "return self.decoder(z), z", "return z, self.decoder(z)",
     r"forward\(x\) must return \(recon_x, z\)"))
ABSENT = (
    (TRAINING, "import os\n", f"{AT_IMPORT}import missing_package\n", "No module named 'missing_package'"),
    (TRAINING, "import os\n", f"{AT_IMPORT}import urllib.request as u; u.urlopen('x')\n", "OSError"),
    (TRAINING[:1], "def train_aae", "def train", "no attribute 'train_aae'"),
    (("models",), "return self.decoder(torch", "return ConvDecoder(self.z_dim)(torch", "does not call self.decoder"),
    (TRAINING[:1], BATCH, 'x = x.to("cuda")', "CUDA|NVIDIA"),
    (TRAINING, "(args.seed)", "(args.my_seed)", "main reads the flag my_seed,"),
    (TRAINING, "(args.seed)", "(vars(args)['my_seed'])", "main reads the flag my_seed,"),
    (TRAINING, "torch.manual_seed(args.seed)", "(lambda my_seed, **_: 0)(**vars(args))", "the flag my_seed,"))


def solution(style="plain", old="", new=""):
    """Return the texts of a solution by file, with the text `old`, which must occur once, replaced by `new`."""
    files = {"models": (SOLUTIONS / "plain.py").read_text()}
    if style == "template":
        own = {name: (SOLUTIONS / f"{name}.py").read_text() for name in ("template", "mnist", "utils")}
        own["train"], own["models"] = own.pop("template"), files["models"].partition("\n\ndef save(")[0]
        files = own
    else:
        files["models"] = files["train"] = restyled(files["models"], {**STYLES, **FURTHER}[style])
    places = [name for name, text in files.items() if text.count(old) == 1] if old else []
    if old and len({files[name] for name in places}) != 1:
        raise ValueError(f"{old!r} is in {places} of {style}")
    return {name: text.replace(old, new) if name in places else text for name, text in files.items()}


def restyled(text, style):
    """Return plain.py with the changes of a style; see styles.py."""
    for beginning, lines in style.items():
        (line,) = re.finditer(rf"^( *){re.escape(beginning)}.*\n", text, re.MULTILINE)
        start, end, indent = *line.span(), line[1]
        if line[0].endswith(":\n"):  # the body: lines that are blank, or indented deeper
            start, indent, lines = end, f"{indent}    ", f"{lines}\n"
            end += re.match(rf"(?:{indent}.*\n|\n)*", text[end:]).end()
        text = text[:start] + textwrap.indent(lines, indent) + "\n" + text[end:]
    return text


def judge(files, parts=tuple(GROUPS)):
    """Run students' groups on files, {name: text}; return the messages of what fails, and of what is not checked."""
    StudentGroup.told.clear(), StudentGroup.faulty.clear()
    train_gradients.observe.cache_clear(), train_main.watch.cache_clear()
    suite = unittest.TestSuite(group(name) for part in parts for group in GROUPS[part] for name in vars(group)
                               if name.startswith("test"))
    own = {name: sys.modules.pop(name) for name in files if name in sys.modules}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        for name, text in files.items():
            Path(folder, f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
        for name in files:
            sys.modules.pop(name, None)
    sys.modules.update(own)
    return ([text for _, text in (*result.failures, *result.errors)],
            [words for _, words in result.skipped if words != StudentGroup.TOLD])


def part_of(number):
    """Return the parts of the tests that name a mistake."""
    if number in {2, 11, 13, 21, 24, 25, 26, 27, 33}:
        return ("main",)
    if number in {37, 38}:
        return ("other files",)
    if number in {3, 16, 22, 23, 29, 31, 39}:
        return ("train_aae",)
    if number in {14, 18, 30}:
        return ("train_aae", "main")
    return ("models", "train_aae") if number in {4, 9, 15, 17, 19} else ("models",)


class Solutions(Group):
    """Correct solutions pass whatever their style; what crashes fails, and what is absent is skipped."""

    needs = ("mnist", "utils")

    def test_right_solutions_pass(self):
        for style in ("template", "batchnorm", "noise"):
            self.assertEqual(judge(solution(style)), ([], []), style)

    def test_what_crashes_fails_and_what_is_absent_is_skipped(self):
        for kind, cases in enumerate((CRASHES, ABSENT)):
            for parts, old, new, words in cases:
                results = judge(solution("plain", old, new), parts)
                self.assertRegex("".join(results[kind]), words)
                self.check(len(results[0]) == 1 - kind, f"{new}: {results}")


class PlantedMistakes(Group):
    """The message of each mistake has its number, and no other message comes with it."""

    needs = ("mnist", "utils")

    def test_mistakes_are_named(self):
        for number, style, old, new in list({mistake[0]: mistake for mistake in MISTAKES}.values())[::3]:
            failures, _ = judge(solution(style, old, new), part_of(number))
            self.check(len(failures) == 1 and f"Mistake {number}:" in failures[0],
                       f"Mistake {number} in {style} is not what is told: {failures}")
            self.check("Traceback" not in failures[0], f"{style}: {failures}")

    def test_a_swap_of_all_labels_is_not_said_to_help_the_discriminator(self):
        text = solution()["models"]
        swapped = re.sub(r"(cross_entropy\(.+?, )([01])\)", lambda call: f"{call[1]}{1 - int(call[2])})", text)
        for files, words in (({"models": swapped}, "since all labels are swapped"),
                             (solution(*MISTAKES[0][1:]), "which helps the discriminator")):
            self.assertIn(words, "".join(judge(files, ("models",))[0]))

    def test_every_mistake_is_planted_twice_and_in_every_style_one(self):
        for number in range(1, 41):
            self.assertGreaterEqual(len([mistake for mistake in MISTAKES if mistake[0] == number]), 2, number)
        self.assertEqual({style for _, style, *_ in MISTAKES}, {"template", *STYLES})


@unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
class TimeLimit(Group):
    """Code that does not end is stopped, and later tests fail at once."""

    def setUp(self):
        self.addCleanup(setattr, train_epoch.Overrun, "first", None)

    def test_an_infinite_loop_is_stopped_even_if_it_catches_exceptions(self):
        with self.assertRaisesRegex(train_epoch.Overrun, "one: a hint"), train_epoch.limit("one: a hint", 0.2):
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)
        with self.assertRaisesRegex(AssertionError, "not run, because one$"), train_epoch.limit("two", 0.2):
            self.fail()
        self.assertIn("not run, because one", "".join(judge(solution(), ("train_aae",))[0]))

    def test_an_import_that_does_not_end_is_named(self):
        files = solution("plain", "import os\n", f"{AT_IMPORT}while True: pass\n")
        with mock.patch.object(train_epoch, "LIMIT", 0.2):
            failures, _ = judge(files, ("train_aae",))
        self.assertIn("importing train did not end within 0.2 s: does it train", "".join(failures))


def right_solutions():
    """Yield the name and the files of this project's networks, and of the right solutions in tests/solutions/."""
    models = (HERE / "models.py").read_text()
    yield "ours", {"models": models}
    yield "ours, base networks", {"models": models.replace('networks="residual"', 'networks="base"')}
    for style in ("template", *STYLES, *FURTHER):
        yield style, solution(style)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="solutions whose name contains this")
    parser.add_argument("--mistakes", action="store_true", help="planted mistakes instead of right solutions")
    args, wrong, count = parser.parse_args(), 0, 0
    if args.mistakes:
        cases = [(f"mistake {number} in {style}", solution(style, old, new), part_of(number), f"Mistake {number}:")
                 for number, style, old, new in MISTAKES]
    else:
        cases = [(name, files, tuple(GROUPS), None) for name, files in right_solutions()]
    for seed in range(args.first, args.first + args.seeds):
        Group.seed = seed
        for name, files, parts, words in cases:
            if seed > args.first and not args.mistakes:
                parts = ("models", "train_aae")  # a run of main has seeds of its own
            if args.only in name:
                failures, skipped = judge(files, parts)
                right = len(failures) == 1 and words in failures[0] if words else not failures and not skipped
                count, wrong = count + 1, wrong + (not right)
                if not right:
                    print(f"{name}, seed {seed}: {failures} {skipped}", flush=True)
        if args.seeds > 1:
            print(f"seeds {args.first} to {seed}: {count - wrong} passed, {wrong} failed", flush=True)
    print(f"{count - wrong} passed, {wrong} failed")
    return int(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.exit(main())
