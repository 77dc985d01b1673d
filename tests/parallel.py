"""Runs the groups of each file in a process of its own, as many at a time as there are CPUs."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import unittests
from training import usable_cpus
from unittests import HERE, Group

__unittest = True

GPU_GROUPS = ("Cuda",)  # the only ones that see a GPU
STUDENTS = ("__main__", "unittests", "tests.model_layers", "tests.train_step", "tests.train_main")  # run together
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
    start, environment = time.monotonic(), dict(os.environ)
    if not {*names} & {*GPU_GROUPS}:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        done = subprocess.run([sys.executable, str(HERE / "unittests.py"), "--report", str(report), *names],
                              env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        try:
            result = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            output = done.stdout.decode(errors="replace")[-3000:]
            words = f"its process has ended with status {done.returncode}:\n{output}"
            result = {"ran": 0, "failures": [[" ".join(names), words]], "skipped": []}
    return names, result, time.monotonic() - start


class Processes(Group):
    """The runner of all tests."""

    def test_a_group_whose_process_dies_has_failed(self):
        _, result, _ = run(["NoSuchGroup"])
        self.assertEqual((result["ran"], len(result["failures"])), (1, 1))
        self.check("NoSuchGroup" in str(result["failures"]), result)

    def test_names(self):
        self.assertLessEqual({*GPU_GROUPS}, vars(unittests).keys(), "a group has another name now")
        self.assertLessEqual({*LONG}, sys.modules.keys(), "a file has another name now")
