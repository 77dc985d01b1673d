"""Tests of the marking of a class."""

import os
import subprocess
import sys
import tempfile
from unittest import mock

from tests import mark
from tests.common import FolderGroup
from unittests import HERE

__unittest = True

PLAIN = (HERE / "tests" / "solutions" / "plain.py").read_text()
FILES = {"anna/models.py": PLAIN, "anna/train.py": PLAIN, "anna/unittests.py": "1 / 0", "anna/tests/own.py": "1 / 0",
         "anna/large.pt": "", "ben/models.py": PLAIN.replace("discriminator(z_fake), 1", "discriminator(z_fake), 0"),
         "dora/deeper/models.py": PLAIN, "emil.zip": "",
         "carla/models.py": 'import os\nprint("OK\\n" * 10**6, flush=True)\nos._exit(0)'}
PRINTED = r"""not unpacked: emil.zip
anna +passed +mistakes: none
ben +failed +mistakes: 1 +1 of \d+ tests failed; there is no train.py; not checked: .*main, .*
carla +failed +mistakes: none +ended early
dora +failed +mistakes: none +no readable models.py, but deeper.models.py
"""


class Marks(FolderGroup):
    def mark(self, submissions, results, output=b"", error=None):
        """Mark submissions whose tests print `output` or end with an error; return status, output and error."""
        with mock.patch.object(mark, "run_tests", side_effect=error, return_value=(None, output)):
            return self.run_cli(submissions, results, cli=mark.cli)

    def test_a_class(self):
        submissions, results = self.folder(FILES), self.folder()
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
        self.mark(self.folder({f"{name}/models.py": "" for name in (*names, ".git")}), results)
        late = self.folder({"=1/work.zip": "", "Zoe/models.py": ""})
        self.assertEqual(self.mark(late, results, error=KeyboardInterrupt)[0], 130)
        _, first, *others = (results / "marks.csv").read_text("utf-8-sig").splitlines()
        self.assertEqual(first, '\'=1,failed,,,"no readable models.py, but work.zip"')
        names = [name if name.isprintable() else ascii(name)[1:-1] for name in sorted(names)[1:]]
        self.assertEqual(others, [f"{name},failed,,,ended early" for name in names])
        self.assertEqual(len([*results.glob("*.txt")]), len(names) + 1)

    def test_refusals(self):
        folder = self.folder({"class/anna/models.py": "", "file": "", "other/marks.csv": "folder,verdict\n"})
        for submissions, results in (("none", "new"), ("file", "new"), ("class/anna", "new"), ("class", "file"),
                                     ("class", "file/below"), ("class", "class/results"), ("class", "other")):
            self.assert_refused(self.mark(folder / submissions, folder / results), 1, "python -m tests.mark: error: ")

    def test_a_full_temporary_folder_gives_no_verdict(self):
        submissions, results, words = self.folder({"anna/models.py": ""}), self.folder(), "No space left on device"
        for copy in (mark.shutil.copyfile, OSError(28, words)):
            with mock.patch("shutil.copyfile", side_effect=copy):
                result = self.mark(submissions, results, words.encode())
            self.assert_refused(result, 1, "anna", tempfile.gettempdir(), "TMPDIR")
            self.assertNotIn("anna", (results / "marks.csv").read_text())
