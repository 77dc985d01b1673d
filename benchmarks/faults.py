"""Kill runs at random moments, resume them to their end, and compare them:  python -m benchmarks.faults

All runs use the command line, on the bundled digits and the CPU. Each must end with the states, weights, curves and
pictures of an uninterrupted run, to the last bit; the exit status is 0 only if all do.
"""

import contextlib
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from benchmarks.report import PROJECT
from tests.common import run_contents

FLAGS = ["--dataset", "digits", "--no-cuda", "--epochs", "12", "--drop_after", "6"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RUNS, STRIKES, LONGEST = 10, 10, 3  # runs, signals in each, seconds from the beginning of training to a signal


def finished_run(log_dir, strikes):
    """Train in `log_dir` to the end, with so many signals on the way; return the run's folder and a Counter of them."""
    counts = Counter()
    while True:
        resume = ["--resume", "latest"] if any(log_dir.glob("*/checkpoints/training_state.pt")) else []
        process = subprocess.Popen([sys.executable, "train.py", "--log_dir", log_dir, *FLAGS, *resume], cwd=PROJECT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        run = next((line.split(maxsplit=1)[1].strip() for line in process.stdout if line.startswith("run:")), None)
        signum = random.choice(SIGNALS) if run and counts.total() < strikes else None
        if signum:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0, LONGEST))
            process.send_signal(signum)
        _, errors = process.communicate()
        if process.returncode == 0:
            return Path(run), counts
        if not signum or process.returncode not in (-signum, 128 + signal.SIGINT):
            sys.exit(f"train.py ended with status {process.returncode}: {errors}")
        counts[signum.name] += 1


def main():
    random.seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, as would those here
    counts, failed = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        reference = run_contents(finished_run(Path(folder, "reference"), 0)[0])
        for number in tqdm(range(RUNS), disable=None):
            run, signals = finished_run(Path(folder, str(number)), STRIKES)
            contents = run_contents(run)
            names = [name for name in contents.keys() | reference.keys() if contents.get(name) != reference.get(name)]
            counts, failed = counts + signals, failed + bool(names)
            if names:
                print(f"{run} differs in {names[:5]}", file=sys.stderr)
    signals = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    print(f"{RUNS} runs, {signals}: {failed} differ from the uninterrupted run in one of {len(reference)} values")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
