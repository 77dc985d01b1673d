"""Tests of the marking of a class, and of the program that a student starts."""

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from tests import mark, submission
from tests.common import FolderGroup
from tests.marking import planted
from tests.solutions.mistakes import MISTAKES
from unittests import HERE

__unittest = True

OWN = """import os
import random
import torch
import of_the_cluster
import tests.own
from statistics import *
random.random(), own
open("own.txt", "r+").write("changed")
torch.cuda.is_available = lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""
"""
ANNA = "anna 12:00" if os.name == "posix" else "anna"
SUBMISSIONS = {  # in each, its models.py and train.py, and what is printed of it
    ANNA: (planted("module_device", "import os\n", OWN), "passed +mistakes: none +OK"),
    "ben": (planted(*MISTAKES[0][1:]), "failed +mistakes: 1 +FAILED .*"),
    "carla": ('import os\nprint("OK\\n" * 10**6, flush=True)\nos._exit(0)', "failed +mistakes: none +ended early"),
    "dora": (planted("plain", "import os\n", "import os, sys\nsys.stderr = None\n"),
             "incomplete +mistakes: none +OK .*, not checked: 2 3 4 11 [0-9 ]+ 27 29"),
    "emil/deeper": (planted(), "failed +mistakes: none +no readable models.py .*, but deeper.models.py")}
FILES = {"unittests.py": "1 / 0", "fractions.py": "1 / 0", "random.py": "", "statistics.py": "own = 1",
         "tests/own.py": "", "own.txt": "", "large.pt": ""}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run_python(*arguments, folder=HERE, **variables):
    """Run Python with nothing on the PATH; return the exit status and all output."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True, capture_output=True, timeout=200,
                          env={**os.environ, "PATH": "", **variables})
    return done.returncode, done.stdout + done.stderr


class Marks(FolderGroup):
    """Programs that a teacher or a student starts."""

    def test_a_class_is_marked(self):
        submissions, results, cluster = self.folder(), self.folder(), self.folder()
        for name, (text, _) in SUBMISSIONS.items():
            write(submissions / name, {"models.py": text, "train.py": text, **FILES})
        (submissions / "dora" / "train.py").unlink()
        os.truncate(submissions / ANNA / "large.pt", submission.FILE_SIZE + 1)
        write(cluster, {"of_the_cluster.py": "", "models.py": "", "train.py": planted(), "utils.py": "1 / 0"})
        before, path = sorted(submissions.rglob("*")), [str(cluster), os.environ.get("PYTHONPATH", "")]
        status, output = run_python("-m", "tests.mark", submissions, results, FORCE_COLOR="1",
                                    PYTHONPATH=os.pathsep.join(path))
        self.assertEqual((status, sorted(submissions.rglob("*"))), (0, before), output)
        self.assertEqual((submissions / ANNA / "own.txt").read_text(), "")
        for (name, (_, words)), line in zip(SUBMISSIONS.items(), output.splitlines(), strict=True):
            self.assertRegex(line, f"^{name.partition('/')[0]} +{words}$")
        self.assertIn("not copied: large.pt", (results / f"{ANNA}.txt").read_text())
        self.assertIn("Mistake 1:", (results / "ben.txt").read_text())
        self.assertLess((results / "carla.txt").stat().st_size, 10**6)

    def test_any_name_and_any_end(self):
        submissions, results, (reader, writer) = self.folder(), self.folder(), os.pipe()
        os.close(reader)
        names = ["=1", *[os.fsdecode(b"R\xe9"), "a\nb"] * (sys.platform == "linux"), "x" * 255, "\u0141"]
        write(submissions, {f"{name}/file": "" for name in (*names, "__MACOSX", ".git")})
        with open(writer, "w", encoding="cp1252") as closed:
            for stream, ends, status in ((io.TextIOWrapper(io.BytesIO(), "cp1252"), [b""] * len(names), 0),
                                         (closed, [b"", KeyboardInterrupt], 130)):
                with mock.patch("sys.stdout", stream), contextlib.redirect_stderr(io.StringIO()), \
                        mock.patch.object(mark, "run", side_effect=ends):
                    self.assertEqual(mark.cli([str(submissions), str(results)]), status)
                rows = [f"{name},failed,,,ended early" for name in ("'=1", *map(mark.printable, names[1:]))]
                self.assertEqual((results / "marks.csv").read_text("utf-8-sig").splitlines()[1:],
                                 rows if status == 0 else rows[:1])
        self.assertEqual(len([*results.glob("*.txt")]), len(names))

    def test_folders_that_do_not_serve(self):
        folder = self.folder()
        write(folder, {"class/anna/models.py": "", "file": ""})
        for submissions, results in (("none", "new"), ("file", "new"), ("class/anna", "new"), ("class", "file"),
                                     ("class", "file/below"), ("class", "class"), ("class", "class/results")):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                self.assertEqual(mark.cli([str(folder / submissions), str(folder / results)]), 1)
            self.assertRegex(stderr.getvalue(), r"\Apython -m tests.mark: error: [^\n]+\n\Z")

    def test_a_submission_that_does_not_end_is_stopped(self):
        eve = self.folder() / "eve"
        write(eve, {"models.py": "while True: pass"})
        self.assertEqual(mark.mark(eve, eve / "output", limit=1)["remark"], "ended early")
        self.assertIn("stopped after 1 s", (eve / "output").read_text())

    def test_a_thread_does_not_keep_a_student_waiting(self):
        folder = self.folder()
        try:  # then the folder of the link counts
            (folder / "unittests.py").symlink_to(HERE / "unittests.py")
        except OSError as error:
            self.skipTest(f"symbolic links: {error}")
        thread = "threading.Thread(target=threading.Event().wait).start()"
        write(folder, {"models.py": f"import sys, threading\n{thread}\nsys.exit()"})
        status, output = run_python("unittests.py", "Losses", folder=folder)
        self.check(status == 1 and "importing models exits Python" in output, output)
