"""Mark a class:  python -m tests.mark SUBMISSIONS RESULTS

Prints one line for each folder in SUBMISSIONS and writes the full output of its tests to RESULTS/<folder>.txt. Writes
nothing into SUBMISSIONS, and does not use a submission's own unittests.py.
"""

import argparse
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
LIMIT = 300  # seconds for a submission
GROUPS = ("Networks", "Losses", "Mistakes", "TrainMistakes")


def mark(submission, output):
    """Test a submission in a new folder, write the output to a file, and return the line of its result."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as desk, open(output, "wb") as file:
        for name in ("unittests.py", "tests/train_mistakes.py", "handed_out/mnist.py", "handed_out/utils.py"):
            (Path(desk) / name).parent.mkdir(exist_ok=True)
            shutil.copy(PROJECT / name.removeprefix("handed_out/"), Path(desk) / name)
        path = os.pathsep.join([str(submission), str(Path(desk) / "handed_out"), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen([sys.executable, "-B", "unittests.py", *GROUPS], cwd=desk, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {LIMIT} s\n".encode())
        finally:
            stop(process)
    return summary(submission.name, process.returncode, output.read_text("utf-8", "replace"))


def stop(process):
    """End a process and, except on Windows, those that it has started."""
    process.kill()
    with contextlib.suppress(AttributeError, ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(student, status, text):
    """Return the line of a result; a submission has passed only if every mistake was looked for."""
    found = re.findall(r"^AssertionError: Mistake (\d+):", text, re.MULTILINE)
    unchecked = re.findall(r"^skipped: (.+)", text, re.MULTILINE)
    ends = re.findall(r"^(?:OK|FAILED).*", text, re.MULTILINE) or ["ended early"]
    result = "failed" if status or not ends[-1].startswith("OK") else "incomplete" if unchecked else "passed"
    missed = {int(number) for line in unchecked for number in re.findall(r"Mistake (\d+)", line)}
    return (f"{student:<8} {result:<10}  mistakes: {listed(map(int, found)):<6}  "
            f"{f'not checked: {listed(missed)}  ' if unchecked else ''}{ends[-1]}")


def listed(numbers):
    return " ".join(map(str, sorted(set(numbers)))) or "none"


def main():
    parser = argparse.ArgumentParser("python -m tests.mark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", type=Path, help="folder that holds a folder for each student")
    parser.add_argument("results", type=Path, help="folder for the outputs")
    args = parser.parse_args()
    folders = sorted(path for path in args.submissions.resolve().glob("[!.]*") if path.is_dir())
    if not folders:
        sys.exit(f"mark: error: {args.submissions} holds no folders; name the folder that holds one for each student")
    args.results.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        print(mark(folder, args.results / f"{folder.name}.txt"), flush=True)


if __name__ == "__main__":
    main()
