"""Kill and stop runs and fill their disk, resume them, compare with an uninterrupted run:  python benchmarks/faults.py

All runs use the command line, on the bundled digits and the CPU; some have the user's files in their folders. Prints a
table; the exit status is 0 only if nothing was lost.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import torch
from tqdm import tqdm

import train
from tests.common import foreign_files_lost, put_foreign_files, remove_foreign_files, run_contents
from training.cli import duration
from training.device import device_name
from training.folder import has_state

TRAIN = [sys.executable, str(PROJECT / "train.py")]
EPOCHS = 12
FLAGS = ["--dataset", "digits", "--no-cuda", "--epochs", str(EPOCHS), "--checkpoint_every", "1", "--drop_after", "6"]


# Faults --------------------------------------------------------------------------------------------------------------

class Tally:
    """Counts of one kind of fault."""

    def __init__(self, name):
        self.name, self.tried, self.survived, self.runs, self.identical = name, 0, 0, 0, 0

    def row(self):
        return (f"{self.name:<44}{self.tried:>7}{self.survived:>10}{self.runs:>7}{self.identical:>11}"
                f"{self.tried - self.survived + self.runs - self.identical:>6}")


def start(log_dir, run=None, program=TRAIN, **options):
    """Start a new run, or resume one; return the process once it trains, and the run's folder."""
    command = [*program, "--resume", str(run)] if run else [*program, *FLAGS, "--log_dir", str(log_dir)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               **options)
    for line in process.stdout:
        if line.startswith("run:"):
            return process, Path(line.split(maxsplit=1)[1].strip())
    raise SystemExit(f"{shlex.join(command)} did not start: {process.stderr.read()}")


def until_done(log_dir, strike, tally, reference, enough):
    """Inject faults into each run until it is done, and start new runs until there were enough faults; compare all.

    `strike(process, run)` injects a fault and returns "done" if the run was done before it, else "well" or "badly": how
    the run handled it. The run has survived if it handled the fault well and could be resumed.
    """
    with tqdm(total=enough, desc=tally.name, disable=None) as bar:
        while tally.tried < enough:
            run, taken = None, None
            while taken != "done":
                process, run = start(log_dir, run)
                tally.survived += taken == "well"
                taken = strike(process, run)
                process.communicate()
                tally.tried += taken != "done"
                bar.update(taken != "done")
                if not has_state(run):  # there was no checkpoint yet, so nothing could be lost
                    run = None
            compare(run, reference, tally)


def compare(run, reference, tally):
    """Count a finished run, and whether it is identical to the reference, without temporary files."""
    tally.runs += 1
    contents = run_contents(run)
    differing = sorted(name for name in contents.keys() | reference.keys() if contents.get(name) != reference.get(name))
    differing += [str(file) for file in run.rglob("*.tmp")]
    tally.identical += not differing
    if differing:
        print(f"{tally.name}: {run} differs in {differing[:5]}", file=sys.stderr)


def kill_at_random(process, run):
    """Kill at a random moment in the first 1.5 seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(random.uniform(0, 1.5))
    return kill(process)


def kill_while_saving(process, run):
    """Kill while one of the first three checkpoints is being written."""
    temporary = run / "checkpoints" / "training_state.pt.tmp"
    for _ in range(random.randint(1, 3)):
        while temporary.exists() and process.poll() is None:
            pass
        while not temporary.exists() and process.poll() is None:
            pass
    moment = time.monotonic() + random.uniform(0, 0.01)
    while time.monotonic() < moment:
        pass
    return kill(process)


def kill(process):
    if process.poll() is None:
        process.kill()
        process.wait()
        return "well"
    return "done" if process.returncode == 0 else "badly"


def wait_for_its_death(process, run):
    """Wait for a process that kills itself (see `die_at`)."""
    process.communicate()
    return {0: "done", -signal.SIGKILL: "well"}.get(process.returncode, "badly")


def stop(signum):
    """Return a strike that sends a signal within the first three seconds."""
    def strike(process, run):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0, 3))
        if process.poll() is not None:
            return "done" if process.returncode == 0 else "badly"
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        if process.returncode == 0 or "done: " in out:  # the signal came after the last step, or while Python exited
            return "done"
        if process.returncode == 128 + signum and f"resume it with: python train.py --resume {run}\n" in err:
            return "well"
        print(f"status {process.returncode}: {err}", file=sys.stderr)
        return "badly"

    return strike


def die_at(count, argv):
    """Run the command line, and kill this process (SIGKILL) before the count-th call that changes the disk."""
    calls = iter(range(1, 10**9))

    def dying(function):
        def call(*args):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in ("replace", "fsync", "truncate"):
        setattr(os, name, dying(getattr(os, name)))
    sys.exit(train.cli(argv))


def starve(log_dir, reference, tally, tries):
    """Make every write beyond a random size fail (RLIMIT_FSIZE), as on a full disk, and resume without the limit."""
    import resource

    for _ in tqdm(range(tries), desc=tally.name, disable=None):
        size = int(10 ** random.uniform(4.3, 6.5))
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        process, run = start(log_dir, preexec_fn=limit)
        _, err = process.communicate(timeout=120)
        count_full(process, err, tally)
        finish(log_dir, run, reference, tally)


def fill(log_dir, reference, tally, tries):
    """Train on a file system of a few MB until it is full, enlarge it, and resume. Needs permission to mount."""
    for _ in tqdm(range(tries), desc=tally.name, disable=None):
        place = Path(tempfile.mkdtemp(dir=log_dir))
        size = f"size={random.randint(200, 10000)}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
        try:
            process, run = start(place)
            _, err = process.communicate(timeout=120)
            count_full(process, err, tally)
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            finish(place, run, reference, tally)
        finally:
            subprocess.run(["umount", str(place)], check=True)


def count_full(process, err, tally):
    """Count a run on a full disk, which must end with one sentence that names a file."""
    tally.tried += 1
    sentence = re.fullmatch(r"train\.py: error: \S+ cannot be written: [^\n]+\n", err)
    tally.survived += process.returncode == 1 and bool(sentence)
    if not sentence:
        print(err, file=sys.stderr)


def finish(log_dir, run, reference, tally):
    """Resume a run, or restart it if it had no checkpoint yet, and compare it."""
    process, run = start(log_dir, run if has_state(run) else None)
    process.communicate()
    compare(run, reference, tally)


def step_by_step(log_dir, reference, tally, counts):
    """For each count, kill a run before the count-th call that changes the disk, and resume it."""
    for count in tqdm(counts, desc=tally.name, disable=None):
        process, run = start(log_dir, program=[sys.executable, __file__, "--die_at", str(count)])
        tally.tried += 1
        tally.survived += wait_for_its_death(process, run) == "well"
        finish(log_dir, run, reference, tally)


def stop_beside_foreign_files(log_dir, reference, tally, tries):
    """Put a user's files into a run's folder, stop or kill the run, and resume it to its end: none may be lost."""
    for number in tqdm(range(tries), desc=tally.name, disable=None):
        process, run = start(log_dir)
        put_foreign_files(run)
        time.sleep(random.uniform(1, 3))
        process.send_signal((signal.SIGTERM, signal.SIGKILL)[number % 2])
        process.communicate()
        for _ in range(2):  # the second time, nothing is left to do
            process, run = start(log_dir, run if has_state(run) else None)
            process.communicate()
        tally.tried += 1
        lost = foreign_files_lost(run)
        tally.survived += not lost
        if lost:
            print(f"{tally.name}: {run} has lost {lost}", file=sys.stderr)
        remove_foreign_files(run)
        compare(run, reference, tally)


def faults(folder):
    """Return a Tally for each kind of fault."""
    process, run = start(folder / "reference")
    process.communicate()
    reference = run_contents(run)
    tallies = []
    for name, strike, enough in (("SIGKILL at a random moment", kill_at_random, 16),
                                 ("SIGKILL while a checkpoint is written", kill_while_saving, 14),
                                 ("SIGTERM", stop(signal.SIGTERM), 4), ("SIGINT", stop(signal.SIGINT), 3),
                                 ("SIGUSR1", stop(signal.SIGUSR1), 3)):
        tallies.append(Tally(name))
        until_done(folder / name.replace(" ", "_"), strike, tallies[-1], reference, enough)
    tallies.append(Tally("SIGKILL before the n-th fsync, rename, cut"))
    step_by_step(folder / "steps", reference, tallies[-1], range(12, 34, 2))  # the first checkpoints and pictures
    tallies.append(Tally("user's files in the folder"))
    stop_beside_foreign_files(folder / "foreign", reference, tallies[-1], 6)
    tallies.append(Tally("every write fails beyond n bytes"))
    starve(folder / "starved", reference, tallies[-1], 4)
    if os.geteuid() == 0 and shutil.which("mount"):
        tallies.append(Tally("full file system"))
        fill(folder, reference, tallies[-1], 4)
    return tallies


# The table -----------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Kill and stop runs, fill their disk, and resume them.")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--die_at", type=int, help=argparse.SUPPRESS)  # used by this script for its subprocesses
    args, argv = parser.parse_known_args()
    if args.die_at:
        die_at(args.die_at, argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs and their children may ignore it
    random.seed(args.seed)
    print(f"torch {torch.__version__}, {device_name(torch.device('cpu'))}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = faults(Path(folder))
    print(f"\n{'fault':<44}{'tried':>7}{'survived':>10}{'runs':>7}{'identical':>11}{'lost':>6}")
    print("\n".join(tally.row() for tally in rows))
    print(f"in {duration(time.monotonic() - begin)}")
    return 1 if any(tally.tried - tally.survived + tally.runs - tally.identical for tally in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
