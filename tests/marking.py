"""Tests of the marking of a class."""

import contextlib
import errno
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

from tests import mark
from tests.common import FolderGroup
from unittests import HERE

__unittest = True

PLAIN = (HERE / "tests" / "solutions" / "plain.py").read_text()
WRONG = PLAIN.replace("self.discriminator(z_fake), 1", "self.discriminator(z_fake), 0")
FILES = {"anna/models.py": PLAIN, "anna/train.py": PLAIN, "anna/unittests.py": "1 / 0", "anna/tests/own.py": "1 / 0",
         "anna/large.pt": "", "ben/models.py": WRONG, "dora/deeper/models.py": PLAIN, "emil.zip": "",
         "finn/work.zip": "",
         "carla/models.py": 'import os\nprint("OK\\n" * 10**6, flush=True)\nos._exit(0)'}
PRINTED = r"""not unpacked: emil.zip
anna +passed +mistakes: none
ben +failed +mistakes: 1 +1 of \d+ tests failed; there is no train.py; not checked: .*main, .*
carla +failed +mistakes: none +ended early
dora +failed +mistakes: none +no readable models.py, but deeper.models.py
finn +failed +mistakes: none +no readable models.py, but work.zip
"""


class Marks(FolderGroup):
    def write(self, files):
        folder = self.folder()
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    def mark(self, submissions, results, status, ends=()):
        """Mark submissions whose tests print, or raise, what `ends` has; return errors and rows."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(mark, "run", side_effect=ends):
            self.assertEqual(mark.cli([str(submissions), str(results)]), status)
        table = results / "marks.csv"
        return err.getvalue(), table.read_text("utf-8-sig").splitlines()[1:] if table.is_file() else []

    def test_a_class(self):
        submissions, results = self.write(FILES), self.folder()
        os.truncate(submissions / "anna" / "large.pt", mark.FILE + 1)
        if os.name == "posix":
            os.mkfifo(submissions / "anna" / "pipe")
            (submissions / "anna" / "loop").symlink_to(submissions)
        before = sorted(submissions.rglob("*"))
        done = subprocess.run([sys.executable, "-m", "tests.mark", submissions, results], cwd=HERE, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE), "FORCE_COLOR": "1"})
        self.assertRegex(done.stdout, rf"\A{PRINTED}\Z", done.stderr)
        self.assertEqual((done.returncode, sorted(submissions.rglob("*"))), (0, before))
        self.assertIn("not copied: 'large.pt'", (results / "anna.txt").read_text())
        self.assertIn("Mistake 1:", (results / "ben.txt").read_text())
        self.assertLess((results / "carla.txt").stat().st_size, 10**6)

    def test_any_name_and_a_second_call(self):
        names, results = ["=1", *["R\udce9", "a\nb"] * (sys.platform == "linux"), "x" * 250, "\u0141"], self.folder()
        self.mark(self.write({f"{name}/models.py": "" for name in (*names, ".git")}), results, 0, [b""] * len(names))
        late = self.write({"=1/models.ipynb": "", "Zoe/models.py": ""})
        _, (first, *others) = self.mark(late, results, 130, [KeyboardInterrupt])
        self.assertEqual(first, '\'=1,failed,,,"no readable models.py, but models.ipynb"')
        names = [name if name.isprintable() else ascii(name)[1:-1] for name in sorted(names)[1:]]
        self.assertEqual(others, [f"{name},failed,,,ended early" for name in names])
        self.assertEqual(len([*results.glob("*.txt")]), len(names) + 1)

    def test_refusals(self):
        folder = self.write({"class/anna/models.py": "", "file": "", "other/marks.csv": "folder,verdict\n"})
        for submissions, results in (("none", "new"), ("file", "new"), ("class/anna", "new"), ("class", "file"),
                                     ("class", "file/below"), ("class", "class/results"), ("class", "other")):
            err, _ = self.mark(folder / submissions, folder / results, 1)
            self.assertRegex(err, r"\Apython -m tests.mark: error: [^\n]+\n\Z")

    def test_a_full_temporary_folder_gives_no_verdict(self):
        submissions, words = self.write({"anna/models.py": ""}), "No space left on device"
        for copy in (mark.shutil.copyfile, OSError(errno.ENOSPC, words)):
            with mock.patch("shutil.copyfile", side_effect=copy):
                err, rows = self.mark(submissions, self.folder(), 1, [words.encode()])
            self.assertRegex(err, rf"\A.*anna.*{re.escape(tempfile.gettempdir())}.*TMPDIR.*\n\Z")
            self.assertEqual(rows, [])

    def test_what_does_not_end_is_stopped(self):
        for code, limit in (("while True: pass", 1), ("while True: print('x' * 10**4)", 20)):
            start = time.monotonic()
            with mock.patch.object(mark, "PRINTED", 2**20):
                self.assertIn(b"stopped", mark.run(["-c", code], self.folder(), limit)[-60:])
            self.assertLess(time.monotonic() - start, 15)
