"""Run train.py with hundreds of generated bad inputs:  python benchmarks/bad_input.py

Each must be rejected with one sentence or give a correct run. Prints a table; the exit status is 0 if all passed.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import numpy as np
import torch
from tqdm import tqdm

import mnist
import train
from tests.common import run_contents
from training import data
from training.checkpoint import serialize
from training.cli import duration
from training.device import device_name


class BadInputs:
    """Cases of bad input, run in this process: each must be rejected with one sentence or give a correct run."""

    VALUES = ["", " ", "nan", "-inf", "inf", "1e400", "-1", "-0.5", "0", "1", "0.5", "1.5", "abc", "0x10", "1e2", "1,5",
              "--", "-", "None", "True", "٣", "9" * 50, "-" + "9" * 50, "2147483648", "[]", "1 2", "../..", "%s", "\n"]

    def __init__(self, folder):
        self.folder = folder
        self.counts = {}
        few = [tensor[:100] for tensor in mnist.load_digits()]

        def few_digits(batch_size, device):
            return mnist.BatchLoader(*few, batch_size)

        self.patches = [mock.patch.object(data, "digits", few_digits),
                        mock.patch("torchvision.datasets.MNIST.mirrors", [])]

    def case(self, kind, argv, run=None):
        """Run a command line. If it is rejected, it must leave every byte in the folder `run`, if given, unchanged."""
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
        for word in argv:  # a path may contain a line break, the sentence must not
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
            return train.main(train.parse_args(["--dataset", "digits", "--no-cuda", "--epochs", epochs,
                                                "--checkpoint_every", "1", "--log_dir", str(log_dir)]))

    def flags(self):
        """Every flag that takes a number or a choice, with each of VALUES and without a value."""
        names = ("z_dim", "batch_size", "lambda_", "ae_lr", "drop_after", "d_lr", "d_momentum", "averaging", "seed",
                 "num_workers", "checkpoint_every", "epochs", "dataset")
        always = ["--dataset", "digits", "--no-cuda", "--epochs", "1", "--log_dir", self.folder / "flags"]
        for name in tqdm(names, desc="flags", disable=None):
            for value in [*self.VALUES, None]:
                self.case("values of flags", [*always, f"--{name}", *([] if value is None else [value])])

    def wrong_paths(self):
        """Return paths of every invalid kind."""
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
        """Every invalid path for each flag that takes a path, and instead of each file of a run and of MNIST."""
        others = {"--log_dir": ["--dataset", "digits"], "--resume": ["--log_dir", self.folder / "paths"],
                  "--data_dir": ["--dataset", "mnist", "--log_dir", self.folder / "paths"]}
        for flag, words in others.items():
            for path in self.wrong_paths():
                self.case("wrong paths", ["--no-cuda", "--epochs", "1", flag, path, *words])
        self.paths_in_runs()
        self.paths_in_data()

    def paths_in_runs(self):
        longer = {name: value for name, value in run_contents(self.small_run("3")).items() if name.startswith("state")}
        for name in ("hparams.json", "checkpoints", "results", "results/Prior_samples", "checkpoints/training_state.pt",
                     "checkpoints/model_checkpoint.pt", "results/Prior_samples/samples_epoch_3.png"):
            for path in self.wrong_paths()[:6]:
                run = self.small_run()
                self.replace(run / name, path)
                status = self.case("wrong kinds of file in a run", ["--resume", run, "--epochs", "3"])
                if status == 0 and not longer.items() <= run_contents(run).items():
                    self.counts["wrong kinds of file in a run"]["damaged"] += 1

    def paths_in_data(self):
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
        """Return truncated content, content with a bit or a block of bytes changed, or with bytes appended."""
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
        """Damaged files of MNIST (small, made up) and of the bundled digits."""
        files = {name: random.randbytes(16 + 20 * 784 if "images" in name else 8 + 20)
                 for name in mnist.MNIST_FILES[True]}
        sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        with mock.patch.object(mnist, "MNIST_MD5", sums):
            for number in tqdm(range(60), desc="data", disable=None):
                raw = Path(tempfile.mkdtemp(dir=self.folder)) / "MNIST" / "raw"
                raw.mkdir(parents=True)
                packed = number % 2
                for name, content in files.items():
                    (raw / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
                victim = random.choice(sorted(raw.iterdir()))
                victim.write_bytes(self.damaged(victim.read_bytes()))
                status = self.case("damaged MNIST files", [
                    "--data_dir", raw.parent.parent, "--epochs", "1", "--no-cuda", "--dataset",
                    random.choice(["auto", "mnist"]), "--log_dir", self.folder / "data"])
                if status == 0 and not packed:
                    self.counts["damaged MNIST files"]["damaged"] += 1  # trained on damaged data
        for _ in range(20):
            file = Path(tempfile.mkdtemp(dir=self.folder)) / "digits.csv.gz"
            file.write_bytes(self.damaged(mnist.DIGITS_FILE.read_bytes()))
            with mock.patch.object(mnist, "DIGITS_FILE", file), mock.patch.object(data, "digits", mnist.digits):
                self.case("damaged digits", ["--dataset", "digits", "--epochs", "1", "--no-cuda", "--log_dir",
                                             self.folder / "data"])

    def checkpoints(self):
        """Damaged or replaced training states; a run that still resumes must end like an undamaged one."""
        whole = self.small_run()
        reference = run_contents(whole)
        content = (whole / "checkpoints" / "training_state.pt").read_bytes()
        others = [b"text", gzip.compress(content), serialize([1, 2]), serialize({"format": "another"}),
                  serialize(torch.ones(3)), (whole / "checkpoints" / "model_checkpoint.pt").read_bytes(),
                  np.ones(3).tobytes()]
        for number in tqdm(range(80), desc="checkpoints", disable=None):
            run = Path(tempfile.mkdtemp(dir=self.folder)) / whole.name
            shutil.copytree(whole, run)
            damaged = others[number] if number < len(others) else self.damaged(content)
            (run / "checkpoints" / "training_state.pt").write_bytes(damaged)
            status = self.case("damaged checkpoints", ["--resume", run], run)
            if status == 0 and run_contents(run) != reference:
                self.counts["damaged checkpoints"]["damaged"] += 1
                print(f"{run}: resumed wrongly", file=sys.stderr)


def fingerprint(folder):
    """Return the kind and content of every file below a folder."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None
            for file in Path(folder).rglob("*")}


def main():
    parser = argparse.ArgumentParser(description="Run train.py with generated bad inputs.")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    random.seed(parser.parse_args().seed)
    print(f"torch {torch.__version__}, {device_name(torch.device('cpu'))}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = BadInputs(Path(folder)).all()
    print(f"\n{'bad input':<34}" + "".join(f"{name:>12}" for name in next(iter(counts.values()))))
    for kind, numbers in counts.items():
        print(f"{kind:<34}" + "".join(f"{number:>12}" for number in numbers.values()))
    print(f"in {duration(time.monotonic() - begin)}")
    return 1 if any(numbers["tracebacks"] + numbers["damaged"] for numbers in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
