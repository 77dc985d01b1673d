"""Mark a class:  python -m tests.mark SUBMISSIONS RESULTS

Prints a line for each folder in SUBMISSIONS, adds a row to RESULTS/marks.csv, and writes the output of its tests to
RESULTS/<folder>.txt. Tests a copy of the folder, and does not use a submission's own unittests.py.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.submission import IGNORED
from training.cli import OneLineParser, UserError, print_line, run_program

PROJECT = Path(__file__).resolve().parent.parent
FILES = {"unittests.py": "", "tests/submission.py": "", "tests/train_mistakes.py": "tests",
         "mnist.py": "handed_out", "utils.py": "handed_out"}
COLUMNS = ("folder", "verdict", "mistakes", "not checked", "remark")
KEPT = 2**18  # bytes of the beginning of a submission's output, and of its end


def mark(submission, output, limit=300):
    """Test a submission for at most `limit` seconds, write the output to a file, and return its row, by COLUMNS."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as desk:
        for name, folder in FILES.items():  # what is handed out is used where a submission lacks it
            Path(desk, folder).mkdir(exist_ok=True)
            shutil.copy(PROJECT / name, Path(desk, folder))
        output.write_bytes(run([Path(desk, "submission.py"), submission], limit))
        row = {"verdict": "failed", "remark": "ended early"}
        with contextlib.suppress(OSError, ValueError):  # there is no report, or half of one
            row = json.loads(Path(desk, "report.json").read_text(encoding="utf-8"))
    return {column: printable(row.get(column, "")) for column in COLUMNS} | {"folder": printable(submission.name)}


def run(arguments, limit):
    """Run Python in a group of processes of its own; return the output, without the middle if it is long."""
    first, last, note = bytearray(), bytearray(), ""

    def read(pipe):
        with pipe:
            for chunk in iter(lambda: pipe.read1(2**16), b""):
                room = KEPT - len(first)
                first.extend(chunk[:room])
                last.extend(chunk[room:])
                del last[:-KEPT]

    command = [sys.executable, *subprocess._args_from_interpreter_flags(), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}, start_new_session=True)
    reader = threading.Thread(target=read, args=[process.stdout], daemon=True)
    reader.start()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        note = f"\nstopped after {limit} s\n"
    finally:
        with contextlib.suppress(AttributeError, OSError):  # Windows has no groups of processes
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    reader.join(2)  # not for ever: a process that has left the group may hold the pipe
    middle = b"\n(here, a part of the output is left out)\n" if len(last) == KEPT else b""
    return b"".join([first, middle, last, note.encode()])


def printable(text):
    """Escape what would break a line or cannot be encoded."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def mark_all(students, results):
    """Mark students, and tell each row as soon as it is known."""
    with open(results / "marks.csv", "w", newline="", encoding="utf-8-sig") as file:  # by its mark Excel knows UTF-8
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for i, student in enumerate(students):
            name = student.name if len(os.fsencode(student.name)) < 250 else f"{student.name[:50]}~{i + 1}"
            row = mark(student, results / f"{name}.txt")
            formula = row["folder"].startswith(("=", "+", "-", "@"))  # a spreadsheet would compute it
            table.writerow(row | {"folder": "'" * formula + row["folder"]})
            file.flush()
            unchecked = f", not checked: {row['not checked']}" if row["not checked"] else ""
            print_line(f"{row['folder']:<8} {row['verdict']:<10}  mistakes: {row['mistakes'] or 'none':<6}  "
                       f"{row['remark']}{unchecked}")


def main(args):
    submissions, results = Path(args.submissions).resolve(), Path(args.results).resolve()
    if submissions in (results, *results.parents):
        raise UserError(f"{results} is in {submissions}, where nothing is written; name another folder for the results")
    try:
        students = sorted(path for path in submissions.iterdir() if path.is_dir() and not IGNORED.fullmatch(path.name))
        if not students:
            raise UserError(f"{submissions} has no folders; name the folder that has one for each student")
        results.mkdir(parents=True, exist_ok=True)
        mark_all(students, results)
    except OSError as error:
        raise UserError(f"{error.filename or results} cannot be used: {error.strerror}; name another folder") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was marked until now is in {results / 'marks.csv'}") from None


def cli(argv=None):
    parser = OneLineParser("python -m tests.mark", "Mark a class; docs/CHECK.md explains the result.")
    parser.add_argument("submissions", metavar="SUBMISSIONS", help="the folder that has one for each student")
    parser.add_argument("results", metavar="RESULTS", help="the folder for marks.csv and each one's output")
    return run_program("python -m tests.mark", main, parser.parse_args, argv)


if __name__ == "__main__":
    sys.exit(cli())
