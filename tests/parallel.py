"""Runs the groups of each file in a process of its own, as many at a time as there are CPUs."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import unittests
from tests.common import FolderGroup
from training import usable_cpus
from unittests import HERE

__unittest = True

GPU_GROUPS = ("Cuda",)  # the only ones that see a GPU
STUDENTS = ("__main__", "unittests", "tests.model_layers", "tests.train_step", "tests.train_main")  # run together
PRINTED, KEPT = 2**27, 2**18  # bytes of an output, and of its either end
LONG = ("tests.student_tests", "tests.run", "tests.resume", "tests.graph_replay")  # begin first


def main():
    """Run all groups; print the result of each process when it ends, and return the exit status."""
    start, ran, failed, jobs = time.monotonic(), 0, 0, {}
    for name, group in vars(unittests).items():
        if unittests.is_group(group) and any(test.startswith("test") for test in vars(group)):
            file = "students" if group.__module__ in STUDENTS else group.__module__
            jobs.setdefault(name if name in GPU_GROUPS else file, []).append(name)
    order = sorted(jobs, key=lambda job: LONG.index(job) if job in LONG else len(LONG))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for done in as_completed([pool.submit(run, jobs[job]) for job in order]):
            names, result, seconds = done.result()
            print(f"{' '.join(names)}: {result['ran']} tests, {len(result['failures'])} failed, {seconds:.1f} s")
            for test, text in result["failures"]:
                print(f"\nFAIL: {test}\n{text}")
            for words in result["skipped"]:
                print(f"    skipped: {words}")
            ran, failed = ran + result["ran"], failed + len(result["failures"])
            sys.stdout.flush()
    print(f"\nRan {ran} tests in {time.monotonic() - start:.1f} s\n\n{ran - failed} passed, {failed} failed")
    return int(failed > 0 or ran == 0)


def run(names):
    """Run groups in a process; return their names, the result, and the seconds."""
    start, environment = time.monotonic(), {} if {*names} & {*GPU_GROUPS} else {"CUDA_VISIBLE_DEVICES": ""}
    result, output = run_tests(HERE, names, environment)
    if result is None:
        result = {"ran": 0, "failures": [[" ".join(names), output.decode(errors="replace")[-3000:]]], "skipped": []}
    return names, result, time.monotonic() - start


def run_tests(folder, names, environment, limit=math.inf, **options):
    """Run a folder's unittests.py; return what it reports, and its output, without the middle if it is long."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as desk, tempfile.TemporaryFile() as file:
        report, end, result = Path(desk, "report.json"), time.monotonic() + limit, None
        with subprocess.Popen([sys.executable, "unittests.py", "--report", str(report), *names], cwd=folder,
                              env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                              **options) as process:
            try:
                while process.poll() is None and time.monotonic() < end and os.fstat(file.fileno()).st_size < PRINTED:
                    time.sleep(0.05)
            finally:
                note = "stopped: it runs or prints without end" * (process.poll() is None)
                with contextlib.suppress(AttributeError, OSError):  # it has no group of processes
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        try:
            result = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is no report, or half of one
            note = note or f"its process has ended with status {process.returncode}"
        file.seek(0)
        text = file.read(2 * PRINTED) + f"\n{note}\n".encode() * bool(note)
    return result, text if len(text) < 2 * KEPT else text[:KEPT] + b"\n(a part is left out here)\n" + text[-KEPT:]


class Processes(FolderGroup):
    """The runner of all tests."""

    def test_a_group_whose_process_dies_has_failed(self):
        _, result, _ = run(["NoSuchGroup"])
        self.assertEqual((result["ran"], len(result["failures"])), (1, 1))
        self.check("NoSuchGroup" in str(result["failures"]), result)

    def test_what_does_not_end_is_stopped(self):
        for code, limit in (("while True: pass", 1), ("while True: print('x' * 10**4)", 20)):
            start, folder = time.monotonic(), self.folder({"unittests.py": code})
            with mock.patch.dict(globals(), PRINTED=2**20):
                _, output = run_tests(folder, (), {}, limit)
            self.assertRegex(output, rb"\nstopped: .*\n\Z")
            self.assertLess(time.monotonic() - start, 15)

    def test_names(self):
        self.assertLessEqual({*GPU_GROUPS}, vars(unittests).keys(), "a group has another name now")
        self.assertLessEqual({*LONG}, sys.modules.keys(), "a file has another name now")
