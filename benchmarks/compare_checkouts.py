"""Check that two checkouts give bitwise identical results:  python benchmarks/compare_checkouts.py OLD NEW

For changes that should not affect results, such as moving code. For each setting, train.py of both checkouts trains for
6 epochs on the bundled digits, on the CPU with one thread, and both runs are evaluated. Then everything that they wrote
is compared, except times and paths: training states, weights, settings, TensorBoard events, pictures and metrics. Two
settings stop a run within an epoch and resume it, one of them with the other checkout's code.

Prints a table; the exit status is 1 if anything differs. It took 16 minutes on two cores of an AMD EPYC (Zen 5), shared
with other runs; --only selects settings. It imports no module of the project, because these may differ.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm

FLAGS = {"--dataset": "digits", "--epochs": "6", "--drop_after": "3", "--checkpoint_every": "2"}
SETTINGS = {
    "default": {},
    "base": {"--networks": "base", "--drop_after": "0", "--d_momentum": "0", "--averaging": "0"},
    "gaussian": {"--posterior": "gaussian"}, "universal": {"--posterior": "universal"},
    "averaging 0": {"--averaging": "0"}, "z2": {"--z_dim": "2"}, "lambda 1": {"--lambda_": "1"},
    "bf16": {"--precision": "bf16"},
    "stopped": {}, "old-to-new": {}}  # and resumed: each run by its own checkout, and OLD's run by NEW
VARYING = re.compile(r"checkpoints/training_state(\.previous)?\.pt/(seconds|saved|path|events(/.*)?|settings/log_dir)"
                     r"|hparams\.json/log_dir|evaluation/metrics\.json/(seconds|weights)")  # times and paths
KINDS = {"scalars": "value", "images": "encoded_image_string", "histograms": "histogram_value",
         "tensors": "tensor_proto"}  # TensorBoard's kinds of data, and the field of their values


class RunFailed(Exception):
    """A program of a checkout ended in an unexpected way; the message says how."""


class Checkout:
    """One of the two checkouts, and the runs that its programs have created in the folder `work`."""

    def __init__(self, name, path, work):
        self.name, self.path, self.work = name, path, work
        self.evaluation = ["-m", "evaluation"] if (path / "evaluation" / "__main__.py").is_file() else ["evaluate.py"]
        self.runs = {}

    def start(self, *command):
        """Start a program of the checkout, without access to another checkout's modules."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
        return subprocess.Popen([sys.executable, *command, "--no-cuda"], cwd=self.path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def begin(self, flags):
        """Start a new run; return the process, and the parent folder of the run's folder."""
        log_dir = Path(tempfile.mkdtemp(dir=self.work))
        words = [word for pair in {**FLAGS, **flags, "--log_dir": str(log_dir)}.items() for word in pair]
        return self.start("train.py", *words), log_dir

    def end(self, process, *statuses):
        """Wait for a program and return its exit status; raise RunFailed if that is not in `statuses`."""
        output = process.communicate()[0].strip()
        if process.returncode not in statuses:
            program, last = "train.py" if "train.py" in process.args else "evaluation", output.rpartition("\n")[2]
            raise RunFailed(f"{self.name}'s {program} ended with status {process.returncode}: {last}")
        return process.returncode

    def trained(self, flags):
        """Return the folder of an evaluated run with these flags, or None if the precision is rejected."""
        key = tuple(flags.items())
        if key not in self.runs:
            process, log_dir = self.begin(flags)
            refused = self.end(process, *((0, 2) if "--precision" in flags else (0,))) == 2
            self.runs[key] = None if refused else self.evaluated(*log_dir.iterdir())
        return self.runs[key]

    def stopped(self):
        """Return the folder of a default run that was stopped by SIGTERM in its third epoch."""
        process, log_dir = self.begin({})
        any(line.startswith("epoch 2/6") for line in process.stdout)  # reads up to that line
        while process.poll() is None and not any(log_dir.glob("*/checkpoints/training_state.previous.pt")):
            time.sleep(0.001)  # until the checkpoint after that epoch, where an earlier signal would stop it
        process.send_signal(signal.SIGTERM)
        self.end(process, 128 + signal.SIGTERM)
        run, = log_dir.iterdir()
        if not read(run / "checkpoints" / "training_state.pt")["steps"]:
            raise RunFailed(f"{self.name}'s run was stopped between two epochs instead of within one")
        return run

    def resumed(self, run):
        """Resume a stopped run to its end, evaluate it, and return its folder."""
        self.end(self.start("train.py", "--resume", str(run)), 0)
        return self.evaluated(run)

    def evaluated(self, run):
        self.end(self.start(*self.evaluation, str(run)), 0)
        return run


def pairs_of_runs(setting, old, new):
    """Return a setting's comparisons: of each the title, a run, and the run that it should equal."""
    before, after = both(lambda checkout: checkout.trained(SETTINGS[setting]), old, new)
    if setting == "stopped":
        resumed = both(lambda checkout: checkout.resumed(checkout.stopped()), old, new)
        return [(f"{stopped.name} stopped, {uninterrupted.name} not: ", run, whole)
                for stopped, run in zip((old, new), resumed, strict=True)
                for uninterrupted, whole in ((old, before), (new, after))]
    return [("", new.resumed(old.stopped()) if setting == "old-to-new" else after, before)]


def both(call, old, new):
    """Return the results of `call` for two checkouts, run in parallel."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, (old, new)))


def contents(run, ignored):
    """Return everything in a run by name, except times, paths, and metrics whose key is in `ignored`."""
    values = dict(tensorboard_contents(run))
    for file in run.rglob("*"):
        if file.is_file() and ".tfevents." not in file.name:
            values.update(leaves(file.relative_to(run).as_posix(), read(file)))
    return {name: value for name, value in values.items() if not VARYING.fullmatch(name)
            and not (name.startswith("evaluation/metrics.json/") and ignored & set(name.split("/")))}


def read(file):
    """Return the content of a file: values for PyTorch and JSON files, otherwise bytes."""
    if file.suffix == ".pt":
        return torch.load(file, map_location="cpu", weights_only=True)
    return json.loads(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()


def leaves(name, value):
    """Yield the name and content of each value in nested dicts and lists; contents are equal if all bits are."""
    if isinstance(value, (dict, list, tuple)) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{name}/{key}", part)
    elif torch.is_tensor(value):
        yield name, (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield name, repr(value)  # all digits of a float; nan equals nan


def tensorboard_contents(run):
    """Yield the name and content of everything with a tag in a run's event files, without times."""
    events = EventAccumulator(str(run), size_guidance=dict.fromkeys(KINDS, 0)).Reload()  # 0: no limit
    for kind, field in KINDS.items():
        for tag in events.Tags()[kind]:
            tagged = getattr(events, kind.capitalize())(tag)
            yield f"events/{kind}/{tag}", sorted((event.step, repr(getattr(event, field))) for event in tagged)
    for tag, metadata in events.summary_metadata.items():
        if metadata.plugin_data.plugin_name == "hparams":
            text = str(HParamsPluginData.FromString(metadata.plugin_data.content))
            yield f"events/hparams/{tag}", re.sub(r"\w*time\w*_secs: .*", "", text)  # of start, end and creation


def md5(run):
    """Return the checksum of a run's weights file."""
    return hashlib.md5((run / "checkpoints" / "model_checkpoint.pt").read_bytes()).hexdigest()


def compare(run, reference, ignored):
    """Return the number of files and values in two runs, and the names of those that differ or are missing in one."""
    if md5(run) != md5(reference):  # different files may have equal weights, which `contents` compares
        ignored = ignored | {"weights_md5"}
    values, expected = contents(run, ignored), contents(reference, ignored)
    names = sorted(values.keys() | expected.keys())
    return len(names), [name for name in names
                        if name not in values or name not in expected or values[name] != expected[name]]


def row(setting, old, new, ignored):
    """Return a setting's row of the table, and whether anything differs."""
    compared, differing, sums = 0, [], {}
    try:
        for title, run, reference in pairs_of_runs(setting, old, new):
            if run is reference is None:
                return [setting, "0", "not supported by this CPU", ""], False
            if None in (run, reference):
                raise RunFailed("only one checkout rejects the precision")
            count, names = compare(run, reference, ignored)
            compared += count
            differing += [title + name for name in names]
            sums |= dict.fromkeys((md5(reference), md5(run)))
    except RunFailed as error:
        differing.append(str(error))
    named = ", ".join(differing[:4] + ["..."] * (len(differing) > 4))
    return [setting, str(compared), f"{len(differing)}: {named}" if named else "0", " and ".join(sums)], bool(differing)


def print_table(rows):
    """Print a table with titles and separated columns."""
    rows = [["setting", "files and values compared", "differing", "md5 of the weights"], *rows]
    widths = [max(len(cells[column]) for cells in rows) for column in range(4)]
    for cells in rows:
        print(" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def main():
    parser = argparse.ArgumentParser(description="Check that two checkouts give bitwise identical results.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage
    parser.add_argument("old", metavar="OLD", type=Path, help="folder of a checkout")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the checkout to compare with it")
    parser.add_argument("--only", metavar="SETTING", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                        help=f"settings to compare: {', '.join(SETTINGS)}")
    parser.add_argument("--ignore", metavar="METRIC_KEY", nargs="+", default=[],
                        help="keys of metrics.json, at any depth, that may differ or be missing")
    args = parser.parse_args()
    for folder in (args.old, args.new):
        if not (folder / "train.py").is_file():
            parser.error(f"{folder} is not a checkout: it has no train.py")
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        old, new = Checkout("OLD", args.old, work), Checkout("NEW", args.new, work)
        for setting in tqdm(dict.fromkeys(args.only), desc="settings", disable=None):
            rows.append(row(setting, old, new, set(args.ignore)))
    print_table([cells for cells, _ in rows])
    print(f"in {time.monotonic() - begin:.0f} s, torch {torch.__version__}")
    return int(any(differs for _, differs in rows))


if __name__ == "__main__":
    sys.exit(main())
