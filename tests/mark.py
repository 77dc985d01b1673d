"""Mark a class:  python -m tests.mark SUBMISSIONS RESULTS

Prints one line for each folder in SUBMISSIONS and writes the full output of its tests to RESULTS/<folder>.txt. Writes
nothing into SUBMISSIONS, and does not use a submission's own unittests.py.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
FILES = {"unittests.py": "", "tests/train_mistakes.py": "tests", "mnist.py": "handed_out", "utils.py": "handed_out"}
GROUPS = ("Networks", "Losses", "Mistakes", "TrainMistakes")


def mark(submission, output, limit=300):
    """Test a submission for at most `limit` seconds, write the output to a file, and return the line of its result."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as desk, open(output, "wb") as file:
        for name, folder in FILES.items():  # what is handed out is used where a submission lacks it
            Path(desk, folder).mkdir(exist_ok=True)
            shutil.copy(PROJECT / name, Path(desk, folder))
        path = os.pathsep.join([str(submission), str(Path(desk, "handed_out"))])
        process = subprocess.Popen([sys.executable, "-B", "unittests.py", *GROUPS], cwd=desk, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {limit} s\n".encode())
        finally:
            with contextlib.suppress(AttributeError, ProcessLookupError):  # Windows has no groups of processes
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            status = process.wait()
    return summary(submission.name, status, output.read_text("utf-8", "replace"))


def summary(student, status, text):
    """Return the line of a result; a submission has passed only if every mistake was looked for."""
    unchecked = re.findall(r"^skipped: (.+)", text, re.MULTILINE)
    end = (re.findall(r"^(?:OK|FAILED).*", text, re.MULTILINE) or ["ended early"])[-1]
    result = "failed" if status or not end.startswith("OK") else "incomplete" if unchecked else "passed"
    mistakes = numbers(re.findall(r"^AssertionError: Mistake (\d+):", text, re.MULTILINE)) or "none"
    missed = numbers(re.findall(r"Mistake (\d+)", "\n".join(unchecked)))
    return f"{student:<8} {result:<10}  mistakes: {mistakes:<6}  {end}{f', not checked: {missed}' if unchecked else ''}"


def numbers(texts):
    return " ".join(map(str, sorted(set(map(int, texts)))))


def main(submissions, results):
    folders = sorted(path for path in Path(submissions).resolve().glob("[!.]*") if path.is_dir())
    if not folders:
        sys.exit(f"mark: error: {submissions} has no folders; name the folder that has one for each student")
    Path(results).mkdir(parents=True, exist_ok=True)
    for folder in folders:
        print(mark(folder, Path(results, f"{folder.name}.txt")), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.mark SUBMISSIONS RESULTS")
    main(*sys.argv[1:])
