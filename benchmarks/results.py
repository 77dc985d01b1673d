"""Train and measure every run of the assignment's questions, and show them:  python -m benchmarks.results

Each is trained by train.py and measured by python -m evaluation. A run that has begun is resumed, a finished one only
measured again. The figures go into docs/results/results.json, the pictures beside it, the weights of z8 into assets/;
report.py then writes the tables and plots of README.md and docs/.
"""

import functools
import hashlib
import io
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from benchmarks import pictures, report
from benchmarks.report import FIGURES, PROJECT
from benchmarks.tables import BASE, SEEDS, STAGES, figures_of, read_figures
from evaluation.model_files import load_images, load_run
from tests.common import read_events
from training.cli import OneLineParser, UserError, run_program
from training.files import WEIGHTS, load_checked, serialize, write_atomically
from training.run import load_state

RUNS = {  # name: flags of train.py
    "z8": [],
    "z8-seed1": ["--seed", "1"],
    "z8-seed2": ["--seed", "2"],
    "z8-base": ["--base"],
    "z8-lambda1": ["--lambda_", "1"],
    "z2": ["--z_dim", "2"],
    "z2-lambda1": ["--z_dim", "2", "--lambda_", "1"],
    "z2-lambda0.95": ["--z_dim", "2", "--lambda_", "0.95"],
    "z20": ["--z_dim", "20"],
    "z20-gaussian": ["--z_dim", "20", "--posterior", "gaussian"],
    "z20-universal": ["--z_dim", "20", "--posterior", "universal"],
}
CODE = ("mnist.py", "models.py", "train.py", "utils.py", "training", "evaluation")  # what runs depend on
CURVES = {"reconstruction loss": "generator/recon_loss", "discriminator accuracy": "discriminator/accuracy"}  # tags
PRETRAINED = PROJECT / "assets" / "autoencoder.pt"  # the weights of z8


def finished_run(name, args):
    """Train and evaluate a run, those of base and default after each epoch in STAGES; return its folder."""
    folder = args.runs.absolute() / name
    run, done = last_run(folder)
    for epochs in STAGES if name in (*SEEDS, BASE) else STAGES[-1:]:
        if done < epochs:
            check_code(folder, name)
            flags = ["--resume", run] if run else ["--log_dir", folder, "--dataset", "mnist", *RUNS[name]]
            call(["train.py"], args, *flags, "--epochs", epochs)
            run, done = last_run(folder)
        if done == epochs:
            call(["-m", "evaluation"], args, run)
            write_atomically(folder / f"epoch_{epochs}.json", json.dumps(figures(run)).encode())
    return run


def last_run(folder):
    """Return the newest run in a folder and how many epochs it has done; None and 0 without one."""
    states = sorted(folder.glob("*/checkpoints/training_state.pt"), key=lambda state: state.stat().st_mtime)
    return (states[-1].parents[1], load_state(states[-1].parents[1])["run"]["epoch"]) if states else (None, 0)


def check_code(folder, name):
    """Note the commit and the flags in a run's folder; raise UserError if others have begun it."""
    git = functools.partial(subprocess.run, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    if git(["git", "status", "--porcelain", "--", *CODE]).stdout:
        raise UserError(f"{PROJECT} has changes; commit them, so that results.json can name the runs' code")
    commit = git(["git", "log", "-1", "--format=%H", "--", *CODE]).stdout.strip()
    file, begun = folder / "code.json", {"commit": commit, "flags": " ".join(RUNS[name])}
    if not folder.exists():
        folder.mkdir(parents=True)
        write_atomically(file, json.dumps(begun).encode())
    elif json.loads(file.read_text()) != begun:
        raise UserError(f"the run in {folder} was begun by {file.read_text()}; check that commit out, or name "
                        f"another folder with --runs")


def call(program, args, *flags):
    """Run one of the project's programs, whose progress bar and errors are seen; end with its status if it fails."""
    command = [sys.executable, *program, *map(str, flags), "--data_dir", args.data_dir]
    status = subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(status)


def figures(run):
    """Return how far a run has come and what its evaluation measured, as a dict that json can write."""
    state, metrics = load_state(run)["run"], json.loads((run / "evaluation" / "metrics.json").read_text())
    return {"epochs": state["epoch"], "seconds": state["seconds"], "weights_md5": metrics["weights_md5"],
            **{name: state["means"][name] for name in ("recon_loss", "gen_loss", "disc_loss", "accuracy")},
            **figures_of(metrics)}


def collect(run, data_dir):
    """Return what a run has come to, with its commit, settings, curves and the figures after the epochs in STAGES."""
    names = ("z_dim", "lambda_", "posterior", "networks", "seed", "precision", "device", "device_name", "torch")
    settings, last = load_state(run)["settings"], figures(run)
    files = [run.parent / f"epoch_{epochs}.json" for epochs in STAGES[:-1]]
    return {**json.loads((run.parent / "code.json").read_text()), **{name: settings[name] for name in names}, **last,
            **measure_codes(run, data_dir), "curves": {key: curve(run, tag) for key, tag in CURVES.items()},
            "stages": [json.loads(file.read_text()) for file in files if file.is_file()]}


def measure_codes(run, data_dir, count=2000):
    """Return the noise in test codes (standard deviation, root mean square), and mean norms of gradients at a code."""
    model, settings, *_ = load_run(run)
    model.eval()
    images = load_images(settings, data_dir)[1][:count]
    torch.manual_seed(0)  # for encoders with noise
    codes, again = (model.encoder(images).detach() for _ in range(2))
    codes.requires_grad_()
    _, losses = model.get_loss_autoencoder(images, model.decoder(codes), codes)
    norms = {name: torch.autograd.grad(count * losses[name], codes, retain_graph=True)[0].norm(dim=1).mean().item()
             for name in ("recon_loss", "gen_loss")}
    return {"noise": ((codes - again).square().mean() / 2).sqrt().item(), "gradients": norms}


def curve(run, tag):
    """Return at most 100 means of a TensorBoard curve, each over as many points."""
    values = torch.tensor([event.value for event in read_events(run).Scalars(tag)])
    return [round(part.mean().item(), 5) for part in values.tensor_split(min(100, len(values)))]


def keep(name, run, args):
    """Write the pictures of a finished run, and its figures into results.json; for z8 the weights, too."""
    if name not in (BASE, *SEEDS[1:]):  # which no question shows
        pictures.draw_run(name, run, args.data_dir, FIGURES)
    results = {**read_figures(FIGURES)["results"], name: collect(run, args.data_dir)}
    if name == "z8":
        weights = load_checked(run / "checkpoints" / WEIGHTS).items()
        weights = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights
                   if not key.startswith("discriminator.")}
        write_atomically(PRETRAINED, deflated(serialize(weights)))
        results[name]["pretrained_md5"] = hashlib.md5(PRETRAINED.read_bytes(), usedforsecurity=False).hexdigest()
    results = {known: results[known] for known in RUNS if known in results}  # in the order of RUNS
    write_atomically(FIGURES / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def deflated(content):
    """Return what torch.save wrote, a ZIP file, compressed, as torch.load reads it, too."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as plain, zipfile.ZipFile(packed, "w") as archive:
        for entry in plain.infolist():
            archive.writestr(entry, plain.read(entry), zipfile.ZIP_DEFLATED, compresslevel=9)
    return packed.getvalue()


def main(args):
    """Finish and show the runs, and write the tables and plots."""
    signal.signal(signal.SIGINT, lambda *_: None)  # train.py says what is saved, and its status ends this program
    for name in args.only:
        keep(name, finished_run(name, args), args)
    report.main()


def parse_args(argv=None):
    parser = OneLineParser("python -m benchmarks.results", "Train, measure and show the runs of all questions.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--runs", type=Path, default=PROJECT / "AAE_logs" / "results", help="folder of the runs")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="folder where MNIST is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m benchmarks.results", main, parse_args, None))
