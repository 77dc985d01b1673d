"""Kill, stop and starve runs, go on with them, and compare with an uninterrupted one:  python benchmarks/faults.py

The runs are the command line's own, on the bundled digits and the CPU. Then come some hundreds of generated bad inputs.
Both print a table; the exit status is 0 only if nothing was lost. It takes some ten minutes on two cores.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
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
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import mnist  # noqa: E402
import train  # noqa: E402
from checkpoint import has_state, packed  # noqa: E402
from tests.common import run_contents  # noqa: E402

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
    """Start a new run, or go on with one; return the process once it trains, and the run's folder."""
    command = [*program, "--resume", str(run)] if run else [*program, *FLAGS, "--log_dir", str(log_dir)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if line.startswith("run:"):
            return process, Path(line.split(maxsplit=1)[1].strip())
    raise SystemExit(f"{shlex.join(command)} did not start: {process.stderr.read()}")


def until_done(log_dir, strike, tally, reference, enough):
    """Strike runs until each is done, and begin new ones until there were enough strikes; compare each with the reference.

    `strike(process, run)` waits for its moment and returns "done" if the run was done before, else "well" or "badly": how it
    took the strike. It has survived if it took it well and could then be gone on with.
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
                if not has_state(run):  # struck before there was anything to lose
                    run = None
            compare(run, reference, tally)


def compare(run, reference, tally):
    """Count a finished run, and whether all that it left is that of the reference, with no temporary file beside it."""
    tally.runs += 1
    contents = run_contents(run)
    differing = sorted(name for name in contents.keys() | reference.keys() if contents.get(name) != reference.get(name))
    differing += [str(file) for file in run.rglob("*.tmp")]
    tally.identical += not differing
    if differing:
        print(f"{tally.name}: {run} differs in {differing[:5]}", file=sys.stderr)


def kill_at_random(process, run):
    """Kill at a random moment of the first second and a half."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(random.uniform(0, 1.5))
    return kill(process)


def kill_while_saving(process, run):
    """Kill while one of the first checkpoints is being written."""
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
    """Wait for a process that kills itself, see `die_at`."""
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
        if process.returncode == 0 or "done: " in out:  # it came after the last step, or as Python exited
            return "done"
        if process.returncode == 128 + signum and f"go on with: python train.py --resume {run}\n" in err:
            return "well"
        print(f"status {process.returncode}: {err}", file=sys.stderr)
        return "badly"

    return strike


def die_at(count, argv):
    """Run the command line and die by SIGKILL before the count-th call that changes the disk from within a checkpoint."""
    import utils

    calls = iter(range(1, 10**9))

    def dying(function):
        def call(*args):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in ("replace", "fsync", "truncate"):
        setattr(utils.os, name, dying(getattr(os, name)))
    sys.exit(train.cli(argv))


def starve(log_dir, reference, tally, tries):
    """Let every write beyond a random size fail (RLIMIT_FSIZE), as on a full disk, and go on without the limit."""
    import resource

    for _ in tqdm(range(tries), desc=tally.name, disable=None):
        size = int(10 ** random.uniform(4.3, 6.5))
        process, run = start(log_dir, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        _, err = process.communicate(timeout=120)
        count_full(process, err, tally)
        finish(log_dir, run, reference, tally)


def fill(log_dir, reference, tally, tries):
    """Train on a file system of a few MB until it is full, enlarge it, and go on. Needs the right to mount one."""
    for _ in tqdm(range(tries), desc=tally.name, disable=None):
        place = Path(tempfile.mkdtemp(dir=log_dir))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={random.randint(200, 10000)}k", "tmpfs", str(place)], check=True)
        try:
            process, run = start(place)
            _, err = process.communicate(timeout=120)
            count_full(process, err, tally)
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            finish(place, run, reference, tally)
        finally:
            subprocess.run(["umount", str(place)], check=True)


def count_full(process, err, tally):
    """Count a run on a full disk: it must end with one sentence that names a file."""
    tally.tried += 1
    sentence = re.fullmatch(r"train\.py: error: \S+ cannot be written: [^\n]+\n", err)
    tally.survived += process.returncode == 1 and bool(sentence)
    if not sentence:
        print(err, file=sys.stderr)


def finish(log_dir, run, reference, tally):
    """Go on with a run, or begin it again where it had no checkpoint yet, and compare."""
    process, run = start(log_dir, run if has_state(run) else None)
    process.communicate()
    compare(run, reference, tally)


def step_by_step(log_dir, reference, tally, counts):
    """Kill a run before a certain call that changes the disk, for every count, and go on."""
    for count in tqdm(counts, desc=tally.name, disable=None):
        process, run = start(log_dir, program=[sys.executable, __file__, "--die_at", str(count)])
        tally.tried += 1
        tally.survived += wait_for_its_death(process, run) == "well"
        finish(log_dir, run, reference, tally)


def faults(folder):
    """Return a row for each kind of fault."""
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
    tallies.append(Tally("every write fails beyond n bytes"))
    starve(folder / "starved", reference, tallies[-1], 4)
    if os.geteuid() == 0 and shutil.which("mount"):
        tallies.append(Tally("full file system"))
        fill(folder, reference, tallies[-1], 4)
    return tallies


# Bad input -----------------------------------------------------------------------------------------------------------

class BadInputs:
    """Generated cases of bad input, run in this process: each must end in one sentence, or in a correct run."""

    VALUES = ["", " ", "nan", "-inf", "inf", "1e400", "-1", "-0.5", "0", "1", "0.5", "1.5", "abc", "0x10", "1e2", "1,5", "--",
              "-", "None", "True", "٣", "9" * 50, "-" + "9" * 50, "2147483648", "[]", "1 2", "../..", "%s", "\n"]

    def __init__(self, folder):
        self.folder = folder
        self.counts = {}
        few = [tensor[:100] for tensor in mnist.load_digits()]
        self.patches = [mock.patch.object(train, "digits", lambda batch_size, device: mnist.BatchLoader(*few, batch_size)),
                        mock.patch("torchvision.datasets.MNIST.mirrors", [])]

    def case(self, kind, argv, run=None):
        """Run one command line. A refused one must leave the folder `run`, if given, as it was, byte for byte."""
        before = fingerprint(run) if run else None
        counts = self.counts.setdefault(kind, {"cases": 0, "refused": 0, "ran": 0, "tracebacks": 0, "damaged": 0})
        counts["cases"] += 1
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = train.cli([str(word) for word in argv])
            except SystemExit as stopped:
                status = stopped.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        text = err.getvalue()
        for word in argv:  # a path may hold a line break, the sentence may not
            text = text.replace(str(word), "path") if "line\n" in str(word) else text
        sentence = re.fullmatch(r"\S+: error: [^\n]+\n", text)
        if status == 0:
            counts["ran"] += 1
        elif status in (1, 2) and sentence:
            counts["refused"] += 1
            if before and fingerprint(run) != before:
                counts["damaged"] += 1
                print(f"damaged by {argv}: {err.getvalue()}", file=sys.stderr)
        else:
            counts["tracebacks"] += 1
            print(f"{argv}: {status} {err.getvalue()[-500:]}", file=sys.stderr)
        return status

    def all(self):
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch)
            for cases in (self.flags, self.paths, self.data, self.checkpoints):
                cases()
        return self.counts

    def small_run(self, epochs="2"):
        """Train for a few epochs, and return the run's folder."""
        log_dir = Path(tempfile.mkdtemp(dir=self.folder))
        with contextlib.redirect_stdout(io.StringIO()):
            return train.main(train.parse_args(["--dataset", "digits", "--no-cuda", "--epochs", epochs, "--checkpoint_every", "1",
                                                "--log_dir", str(log_dir)]))

    def flags(self):
        """Every flag that takes a number or a choice with every value, and with none."""
        names = ("z_dim", "batch_size", "lambda_", "ae_lr", "drop_after", "d_lr", "d_momentum", "averaging", "seed", "num_workers",
                 "checkpoint_every", "epochs", "dataset")
        always = ["--dataset", "digits", "--no-cuda", "--epochs", "1", "--log_dir", self.folder / "flags"]
        for name in tqdm(names, desc="flags", disable=None):
            for value in [*self.VALUES, None]:
                self.case("values of flags", [*always, f"--{name}", *([] if value is None else [value])])

    def wrong_paths(self):
        """Return paths of everything that is not what a path should be."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        (place / "file").write_bytes(b"something")
        (place / "empty_file").write_bytes(b"")
        (place / "empty_folder").mkdir()
        (place / "loop").symlink_to("loop")
        (place / "dangling").symlink_to("nowhere")
        os.mkfifo(place / "pipe")
        return [*sorted(place.iterdir()), place / "file" / "below", place / "none" / "below", Path("/dev/null"),
                Path("/dev/zero"), place / ("x" * 300), place / "new line\n"]

    def paths(self):
        """Every wrong path wherever a path is taken, and in the place of every file of a run and of MNIST."""
        for flag in ("--log_dir", "--data_dir", "--resume"):
            for path in self.wrong_paths():
                argv = ["--no-cuda", "--epochs", "1", flag, path]
                argv += ["--dataset", "mnist"] if flag == "--data_dir" else ["--dataset", "digits"] if flag == "--log_dir" else []
                self.case("wrong paths", argv + ([] if flag == "--log_dir" else ["--log_dir", self.folder / "paths"]))
        longer = {name: value for name, value in run_contents(self.small_run("3")).items() if name.startswith("state")}
        for name in ("hparams.json", "checkpoints", "results", "results/Prior_samples", "checkpoints/training_state.pt",
                     "checkpoints/model_checkpoint.pt", "results/Prior_samples/samples_epoch_3.png"):
            for path in self.wrong_paths()[:6]:
                run = self.small_run()
                self.replace(run / name, path)
                status = self.case("wrong kinds of file in a run", ["--resume", run, "--epochs", "3"])
                if status == 0 and not longer.items() <= run_contents(run).items():
                    self.counts["wrong kinds of file in a run"]["damaged"] += 1
        for name in mnist.MNIST_FILES[True]:
            for path in self.wrong_paths()[:6]:
                root = Path(tempfile.mkdtemp(dir=self.folder))
                (root / "MNIST" / "raw").mkdir(parents=True)
                self.replace(root / "MNIST" / "raw" / name, path)
                self.case("wrong kinds of file as data", ["--data_dir", root, "--dataset", "mnist", "--log_dir",
                                                          self.folder / "data"])

    def replace(self, path, other):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.rename(other, path)

    def damaged(self, content):
        """Return a content cut off, with a bit or a block of bytes changed, or with something behind it."""
        content, place = bytearray(content), random.randrange(len(content))
        kind = random.randrange(4)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            content[place] ^= 1 << random.randrange(8)
        elif kind == 2:
            content[place:place + 512] = random.randbytes(len(content[place:place + 512]))
        else:
            content += random.randbytes(random.randint(1, 100))
        return bytes(content)

    def data(self):
        """Damaged files of MNIST (small ones, made up) and of the bundled digits."""
        files = {name: random.randbytes(16 + 20 * 784 if "images" in name else 8 + 20) for name in mnist.MNIST_FILES[True]}
        sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        with mock.patch.object(mnist, "MNIST_MD5", sums):
            for number in tqdm(range(60), desc="data", disable=None):
                raw = Path(tempfile.mkdtemp(dir=self.folder)) / "MNIST" / "raw"
                raw.mkdir(parents=True)
                packed_files = number % 2
                for name, content in files.items():
                    (raw / f"{name}{'.gz' * packed_files}").write_bytes(gzip.compress(content) if packed_files else content)
                victim = random.choice(sorted(raw.iterdir()))
                victim.write_bytes(self.damaged(victim.read_bytes()))
                status = self.case("damaged MNIST files", [
                    "--data_dir", raw.parent.parent, "--epochs", "1", "--no-cuda", "--dataset", random.choice(["auto", "mnist"]),
                    "--log_dir", self.folder / "data"])
                if status == 0 and not packed_files:
                    self.counts["damaged MNIST files"]["damaged"] += 1  # trained on damaged data
        for _ in range(20):
            file = Path(tempfile.mkdtemp(dir=self.folder)) / "digits.csv.gz"
            file.write_bytes(self.damaged(mnist.DIGITS_FILE.read_bytes()))
            with mock.patch.object(mnist, "DIGITS_FILE", file), mock.patch.object(train, "digits", mnist.digits):
                self.case("damaged digits", ["--dataset", "digits", "--epochs", "1", "--no-cuda", "--log_dir",
                                             self.folder / "data"])

    def checkpoints(self):
        """Damaged training states, and other things in their place; what still runs must run as if nothing had been."""
        whole = self.small_run()
        reference = run_contents(whole)
        content = (whole / "checkpoints" / "training_state.pt").read_bytes()
        others = [b"text", gzip.compress(content), packed([1, 2]), packed({"format": "another"}), packed(torch.ones(3)),
                  (whole / "checkpoints" / "model_checkpoint.pt").read_bytes(), np.ones(3).tobytes()]
        for number in tqdm(range(80), desc="checkpoints", disable=None):
            run = Path(tempfile.mkdtemp(dir=self.folder)) / whole.name
            shutil.copytree(whole, run)
            damaged = others[number] if number < len(others) else self.damaged(content)
            (run / "checkpoints" / "training_state.pt").write_bytes(damaged)
            status = self.case("damaged checkpoints", ["--resume", run], run)
            if status == 0 and run_contents(run) != reference:
                self.counts["damaged checkpoints"]["damaged"] += 1
                print(f"{run}: went on wrongly", file=sys.stderr)


def fingerprint(folder):
    """Return the kind and content of every file below a folder."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None
            for file in Path(folder).rglob("*")}


# Both tables ---------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Kill, stop and starve runs, and feed them bad input.")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, sizes and damages")
    parser.add_argument("--only", choices=("faults", "input"), help="one of the two tables")
    parser.add_argument("--die_at", type=int, help=argparse.SUPPRESS)  # for the processes that this script starts
    args, argv = parser.parse_known_args()
    if args.die_at:
        die_at(args.die_at, argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have it ignored, and its children too
    random.seed(args.seed)
    print(f"torch {torch.__version__}, {train.device_name(torch.device('cpu'))}")
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "input":
            begin = time.monotonic()
            rows = faults(Path(folder))
            print(f"\n{'fault':<44}{'tried':>7}{'survived':>10}{'runs':>7}{'identical':>11}{'lost':>6}")
            print("\n".join(tally.row() for tally in rows))
            print(f"in {train.duration(time.monotonic() - begin)}")
            lost += sum(tally.tried - tally.survived + tally.runs - tally.identical for tally in rows)
        if args.only != "faults":
            begin = time.monotonic()
            counts = BadInputs(Path(folder)).all()
            print(f"\n{'bad input':<34}" + "".join(f"{name:>12}" for name in next(iter(counts.values()))))
            for kind, numbers in counts.items():
                print(f"{kind:<34}" + "".join(f"{number:>12}" for number in numbers.values()))
            print(f"in {train.duration(time.monotonic() - begin)}")
            lost += sum(numbers["tracebacks"] + numbers["damaged"] for numbers in counts.values())
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
