"""Stop and kill runs at random moments, resume them to their end, and compare them:  python -m benchmarks.faults

All runs use the command line, on the bundled digits and the CPU. Each must end with the states, weights, curves and
pictures of an uninterrupted run, to the last bit; the exit status is 0 only if all do.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from tests.common import run_contents
from training.cli import duration
from training.device import device_name

PROJECT = Path(__file__).resolve().parent.parent
FLAGS = ["--dataset", "digits", "--no-cuda", "--epochs", "12", "--checkpoint_every", "1", "--drop_after", "6"]
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
LONGEST = 3  # seconds from the beginning of training to a signal


def finished_run(log_dir, strikes):
    """Train in `log_dir` to the end, with so many signals on the way; return the run's folder and a Counter of them."""
    counts = Counter()
    while True:
        resume = ["--resume", "latest"] if any(log_dir.glob("*/checkpoints/training_state*.pt")) else []
        process = subprocess.Popen([sys.executable, "train.py", "--log_dir", log_dir, *FLAGS, *resume], cwd=PROJECT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        run = next((line.split(maxsplit=1)[1].strip() for line in process.stdout if line.startswith("run:")), None)
        signum = random.choice(list(STATUS)) if run and counts.total() < strikes else None
        if signum:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0, LONGEST))
            process.send_signal(signum)
        _, errors = process.communicate()
        if process.returncode == 0:
            return Path(run), counts
        if not signum or process.returncode not in (STATUS[signum], -signum):  # at its very end
            sys.exit(f"train.py ended with status {process.returncode}: {errors}")
        counts[signum.name] += 1


def differing(run, reference):
    """Return the names of all that differs between a run and the reference's contents, and temporary files."""
    contents = run_contents(run)
    names = sorted(contents.keys() | reference.keys())
    return [name for name in names if contents.get(name) != reference.get(name)] + list(map(str, run.rglob("*.tmp")))


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.faults", description="Stop, kill and resume runs.")
    parser.add_argument("--runs", type=int, default=6, help="number of runs")
    parser.add_argument("--strikes", type=int, default=6, help="signals in each run")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    random.seed(args.seed)
    begin, counts, failed = time.monotonic(), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        reference = run_contents(finished_run(Path(folder, "reference"), 0)[0])
        for number in tqdm(range(args.runs), disable=None):
            run, signals = finished_run(Path(folder, str(number)), args.strikes)
            names = differing(run, reference)
            counts, failed = counts + signals, failed + bool(names)
            if names:
                print(f"{run} differs in {names[:5]}", file=sys.stderr)
    print(f"{args.runs} runs, {', '.join(f'{count} x {name}' for name, count in sorted(counts.items()))}: {failed} "
          f"differ from the uninterrupted run; {len(reference)} values compared in each, in "
          f"{duration(time.monotonic() - begin)}, torch {torch.__version__}, {device_name(torch.device('cpu'))}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
