"""Tests of the marking of a class."""

import contextlib
import errno
import io
import os
import subprocess
import sys
from unittest import mock

from tests import mark
from tests.common import FolderGroup
from unittests import HERE

__unittest = True

PLAIN = (HERE / "tests" / "solutions" / "plain.py").read_text()
WRONG = PLAIN.replace("self.discriminator(z_fake), 1", "self.discriminator(z_fake), 0")
ENDS = 'import os\nprint("OK\\n" * 10**6, flush=True)\nos._exit(0)'
FILES = {"anna/models.py": PLAIN, "anna/train.py": PLAIN, "anna/unittests.py": "1 / 0", "anna/tests/own.py": "1 / 0",
         "ben/models.py": WRONG, "carla/models.py": ENDS, "dora/deeper/models.py": PLAIN, "emil.zip": ""}
PRINTED = r"""not unpacked: emil.zip
anna +passed +mistakes: none
ben +failed +mistakes: 1 +1 of \d+ tests failed; there is no train.py; not checked: main, .*
carla +failed +mistakes: none +ended early
dora +failed +mistakes: none +no readable models.py, but deeper.models.py
"""


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class Marks(FolderGroup):
    def mark(self, submissions, results, ends=()):
        """Mark submissions whose tests print, or raise, what `ends` has; return status, errors and rows."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(mark, "run", side_effect=ends):
            status = mark.cli([str(submissions), str(results)])
        table = results / "marks.csv"
        return status, err.getvalue(), table.read_text("utf-8-sig").splitlines()[1:] if table.exists() else []

    def test_a_class(self):
        submissions, results = self.folder(), self.folder()
        write(submissions, FILES)
        before = sorted(submissions.rglob("*"))
        done = subprocess.run([sys.executable, "-m", "tests.mark", submissions, results], cwd=HERE, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE), "FORCE_COLOR": "1"})
        self.assertRegex(done.stdout, rf"\A{PRINTED}\Z", done.stderr)
        self.assertEqual((done.returncode, sorted(submissions.rglob("*"))), (0, before))
        self.assertIn("Mistake 1:", (results / "ben.txt").read_text())
        self.assertLess((results / "carla.txt").stat().st_size, 10**6)

    def test_any_name_and_a_second_call(self):
        submissions, late, results = self.folder(), self.folder(), self.folder()
        names = ["=1", *["R\udce9", "a\nb"] * (sys.platform == "linux"), "x" * 250, "\u0141"]
        write(submissions, {f"{name}/models.py": "" for name in (*names, ".git")})
        write(late, {"=1/models.ipynb": "", "Zoe/models.py": ""})
        self.assertEqual(self.mark(submissions, results, [b""] * len(names))[0], 0)
        names = ["'=1", *(name if name.isprintable() else ascii(name)[1:-1] for name in sorted(names)[1:])]
        status, _, (first, *others) = self.mark(late, results, [KeyboardInterrupt])
        self.assertEqual((status, first), (130, '\'=1,failed,,,"no readable models.py, but models.ipynb"'))
        self.assertEqual(others, [f"{name},failed,,,ended early" for name in names[1:]])
        self.assertEqual(len([*results.glob("*.txt")]), len(names))

    def test_refusals(self):
        folder = self.folder()
        write(folder, {"class/anna/models.py": "", "file": "", "other/marks.csv": "folder,verdict\n"})
        for submissions, results in (("none", "new"), ("file", "new"), ("class/anna", "new"), ("class", "file"),
                                     ("class", "file/below"), ("class", "class/results"), ("class", "other")):
            status, err, _ = self.mark(folder / submissions, folder / results)
            self.assertEqual(status, 1)
            self.assertRegex(err, r"\Apython -m tests.mark: error: [^\n]+\n\Z")
        self.assertEqual((folder / "other" / "marks.csv").read_text(), "folder,verdict\n")

    def test_a_full_temporary_folder_gives_no_verdict(self):
        submissions, results, words = self.folder(), self.folder(), "No space left on device"
        write(submissions, {"anna/models.py": ""})
        for copy in (mark.shutil.copyfile, OSError(errno.ENOSPC, words)):
            with mock.patch("shutil.copyfile", side_effect=copy):
                status, err, rows = self.mark(submissions, results, [words.encode()])
            self.assertEqual((status, rows), (1, []))
            self.assertRegex(err, rf"\A[^\n]*anna[^\n]*{mark.tempfile.gettempdir()}[^\n]*TMPDIR[^\n]*\n\Z")

    def test_what_does_not_end_is_stopped(self):
        folder = self.folder() / "copy"
        folder.mkdir()
        for code in ("while True: pass", "while True: print('x' * 10**4)"):
            with mock.patch.object(mark, "PRINTED", 2**20):
                self.assertIn(b"stopped", mark.run(["-c", code], folder, 1)[-60:])

    def test_special_and_large_files_are_not_copied(self):
        source, target = self.folder(), self.folder()
        write(source, dict.fromkeys(("models.py", "parts/net.py", "tests/own.py", "parts/big.bin"), "x" * 5000))
        (source / "loop").symlink_to(source)
        os.mkfifo(source / "pipe")
        with mock.patch.object(mark, "ALL", 12000):
            self.assertEqual(len([*mark.copy_submission(source, target)]), 1)
        self.assertEqual(len([*target.rglob("*")]), 3)
