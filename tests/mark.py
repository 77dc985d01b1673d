"""Mark a class:  python -m tests.mark SUBMISSIONS RESULTS

Tests a copy of each folder in SUBMISSIONS, without its own unittests.py and tests/. docs/CHECK.md explains what it
prints and writes to RESULTS.
"""

import csv
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.parallel import KEPT, run_tests
from training.cli import OneLineParser, UserError, print_line, run_program
from training.files import write_atomically
from unittests import HERE

COLUMNS = ["folder", "verdict", "mistakes", "not checked", "remark"]
IGNORED = re.compile(r"\..*|__MACOSX|__pycache__|@eaDir|lost\+found|site-packages|tests|unittests(\.py)?")
FILE, ALL = 50 * 2**20, 2**30  # bytes of a file and of a submission
FULL = r"No space left on device|Disk quota exceeded|unexpected pos \d+ vs"  # the last is what torch.save says


def copy_submission(source, target):
    """Copy a folder without large and special files, and not what links to folders lead to; yield what is left."""
    room = ALL
    for file in source.rglob("*"):
        name = file.relative_to(source)
        if os.path.isfile(file) and not any(map(IGNORED.fullmatch, name.parts)):
            size = max(os.path.getsize(file), 4096)  # bounds the number of small files, too
            if size <= min(FILE, room) and os.access(file, os.R_OK):
                room -= size
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
            else:
                yield f"not copied: {str(name)!r}\n"


def mark(submission, limit=300):
    """Test a submission for at most `limit` seconds; return its row, without its name, and the output."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as desk:
        folder = Path(desk, "submission")
        text = "".join(copy_submission(submission, folder)).encode()[:KEPT]
        if not any((folder / name).is_file() for name in ("models.py", "models/__init__.py")):
            similar = [path.relative_to(folder) for name in ("[mM]odels*", "[mM]odel.py", "*.ipynb", "*.zip")
                       for path in sorted(folder.rglob(name))]
            return ["failed", "", "", f"no readable models.py, but {[*similar, 'nothing similar'][0]}"], text
        shutil.copytree(HERE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "solutions"))
        for name in ("unittests.py", "mnist.py", "utils.py"):
            if not [*folder.glob(name), *folder.glob(f"{name[:-3]}/*.py")]:  # handed out, and missing here
                shutil.copyfile(HERE / name, folder / name)
        path = os.environ.get("PYTHONPATH", "").replace(str(HERE), "")  # whose train.py is not the submission's
        environment = {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:backslashreplace", "PYTHON_COLORS": "0",
                       "CUDA_VISIBLE_DEVICES": "", "TMPDIR": desk}
        result, output = run_tests(folder, (), environment, limit, start_new_session=True)
        Path(desk, "space").write_bytes(bytes(2**20))  # fails if the submission has filled the disk
    text += output
    if full := re.search(FULL, f"{text} {result}"):
        raise OSError(0, full[0])
    return judge(**result) if result else ["failed", "", "", "ended early"], text


def judge(ran, failures, skipped):
    """Return the verdict on a report, the numbers of mistakes, what was not checked, and a remark."""
    mistakes = re.findall(r"^AssertionError: Mistake (\d+):", "".join(text for _, text in failures), re.MULTILINE)
    skipped = [words.partition(": ") for words in skipped]
    reasons = [f"{len(failures)} of {ran} tests failed"] * bool(failures) + [why for _, _, why in skipped if why]
    return ["failed" if failures or not ran else "incomplete" if skipped else "passed",
            " ".join(sorted({*mistakes}, key=int)),
            ", ".join(dict.fromkeys(what for what, _, _ in skipped)), "; ".join(dict.fromkeys(reasons))]


def put_rows(table, rows):
    """Put rows into a marks.csv, in place of those of the same folders; make the file if it is missing."""
    text = table.read_text("utf-8-sig", "surrogateescape") if table.exists() else ",".join(COLUMNS)
    rows = [*filter(None, csv.reader(io.StringIO(text))), *rows]
    if rows[:1] != [COLUMNS]:
        raise UserError(f"{table} has other columns than {', '.join(COLUMNS)}; move it, or name another folder")
    content = io.StringIO()
    csv.writer(content).writerows({row[0]: row for row in rows}.values())
    write_atomically(table, content.getvalue().encode("utf-8-sig", "surrogateescape"))  # by its mark Excel knows UTF-8


def main(args):
    submissions, results = Path(args.submissions).resolve(), Path(args.results).resolve()
    if submissions in (results, *results.parents):
        raise UserError(f"{results} is in {submissions}, where nothing is written; name another folder for the results")
    paths = [path for path in sorted(submissions.glob("*")) if not IGNORED.fullmatch(path.name)]
    if others := [repr(path.name)[1:-1] for path in paths if not path.is_dir()]:
        print_line(f"not unpacked: {', '.join(others)}")
    if not any(path.is_dir() for path in paths):
        raise UserError(f"{submissions} has no folders; name the folder that has one for each student")
    put_rows(results / "marks.csv", [])  # fails now, or not at all
    for student in filter(Path.is_dir, paths):
        try:
            row, text = mark(student)
        except OSError as error:
            raise UserError(f"{student.name!r} is not marked: {error.strerror}: {tempfile.tempdir}; free space there, "
                            "or set TMPDIR to another folder") from None
        write_atomically(results / f"{os.fsdecode(os.fsencode(student.name)[:240])}.txt", text)
        texts = [text if text.isprintable() else repr(text)[1:-1] for text in (student.name, *row)]
        put_rows(results / "marks.csv", [["'" * text.startswith(("=", "+", "-", "@", "'")) + text for text in texts]])
        name, verdict, mistakes, unchecked, remark = texts
        remark += f"; not checked: {unchecked}" * bool(unchecked)
        print_line(f"{name:<8} {verdict:<10}  mistakes: {mistakes or 'none':<6}  {remark}".rstrip())


def cli(argv=None):
    parser = OneLineParser("python -m tests.mark", "Mark a class; docs/CHECK.md explains the result.")
    parser.add_argument("submissions", metavar="SUBMISSIONS", help="the folder that has one for each student")
    parser.add_argument("results", metavar="RESULTS", help="the folder for marks.csv and each one's output")
    return run_program("python -m tests.mark", main, parser.parse_args, argv)


if __name__ == "__main__":
    sys.exit(cli())
