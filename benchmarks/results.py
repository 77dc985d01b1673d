"""Train and measure every run of the assignment's questions, and show them:  python benchmarks/results.py

Each is trained by train.py and measured by python -m evaluation, in processes of their own. What is finished in --runs
is not repeated, what has begun is resumed; after a change of the networks, name another folder. The figures go into
docs/results/results.json, the pictures beside it; report.py then writes the tables and plots of README.md and docs/.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads there what it sets)

# isort: split

import pictures
import report
import torch
from tables import read_json

from evaluation.model_files import find_run, load_data, load_model, read_weights
from training.checkpoint import WEIGHTS, CheckpointError, load_checked, load_state, serialize
from training.cli import number
from training.files import write_atomically
from training.folder import has_state, latest_run
from training.options import HYPERPARAMETERS, parse_args

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
MEASURED = {name: (1, 2, 5, 10, 20, 50) for name in ("z8", "z8-seed1", "z8-seed2", "z8-base")}  # epochs before the last
CODE = ("mnist.py", "models.py", "train.py", "utils.py", "training", "evaluation")  # what runs depend on
CURVES = {"reconstruction loss": "generator/recon_loss",  # key in results.json: TensorBoard tag
          "discriminator accuracy": "discriminator/accuracy"}
POINTS = 100  # of a curve
PRETRAINED = PROJECT / "assets" / "autoencoder.pt"  # the weights of z8


# Runs ----------------------------------------------------------------------------------------------------------------

def finished_run(name, args):
    """Train and evaluate a run, or what is left of it; return its folder.

    On the way it is measured after the epochs in MEASURED: training to epoch 5 and resuming to 10 is training to 10.
    """
    folder = args.runs / name
    run, done = last_run(folder)
    for epochs in sorted({min(epoch, args.epochs) for epoch in (*MEASURED.get(name, ()), args.epochs)}):
        if done < epochs:
            check_commit(folder)
            flags = ["--resume", run] if run else ["--log_dir", folder, "--dataset", "mnist", *RUNS[name]]
            call([PROJECT / "train.py"], *flags, "--data_dir", args.data_dir, "--epochs", epochs,
                 *["--no-cuda"] * args.no_cuda)
            run, done = last_run(folder)
        if done == epochs and not measured(run):
            call(["-m", "evaluation"], run, "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda)
        if done == epochs:
            write_atomically(folder / f"epoch_{epochs}.json", json.dumps(figures(run)).encode())
    return run


def check_commit(folder):
    """Note the commit of the program in a run's folder; raise CheckpointError if another commit began the run."""
    file, commit = folder / "commit", git("log", "-1", "--format=%H", "--", *CODE)
    if git("status", "--porcelain", "--", *CODE):
        raise CheckpointError(f"{PROJECT} has changes that are not committed; commit them, so that results.json can "
                              f"name the code that made the runs")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, commit.encode())
    elif file.read_text() != commit:
        raise CheckpointError(f"the run in {folder} was begun by commit {file.read_text()}; check that out, or name "
                              f"another folder with --runs")


def git(*arguments):
    """Return what a git command prints about this checkout."""
    try:
        return subprocess.run(["git", "-C", PROJECT, *arguments], stdout=subprocess.PIPE, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"results.py: error: git cannot tell the commit of {PROJECT}; begin the runs in a clone")


def measured(run):
    """Return whether the figures in a run's evaluation/ are those of its weights."""
    metrics, weights = run / "evaluation" / "metrics.json", run / "checkpoints" / WEIGHTS
    return metrics.is_file() and (json.loads(metrics.read_text())["weights_md5"]
                                  == hashlib.md5(weights.read_bytes()).hexdigest())


def last_run(folder):
    """Return the newest run in a folder and how many epochs it has done; None and 0 without one.

    Raises CheckpointError if it was made with other flags than those in RUNS.
    """
    if not any(has_state(run) for run in folder.glob("*")):
        return None, 0
    run = latest_run(folder)
    state, wanted = load_state(run), {"trained_on": "mnist", **vars(parse_args(RUNS[folder.name]))}
    other = [name for name in HYPERPARAMETERS if name != "epochs" and state["settings"].get(name) != wanted[name]]
    if other:
        raise CheckpointError(f"{run} was made with another --{other[0]}; name another folder with --runs")
    return run, state["epoch"]


def call(program, *flags):
    """Run one of the project's commands, whose progress bar and errors are seen; end with its status if it fails."""
    command = [sys.executable, *map(str, [*program, *flags])]
    print("+", *command, file=sys.stderr)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    status = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode
    if status:
        sys.exit(status)


def figures(run):
    """Return how far a run has come and what its evaluation measured, as a dict that json can write."""
    state = load_state(run)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    quality, match, likelihood = metrics["digit_classifier"], metrics["prior_match"], metrics["log_likelihood"]
    codes = match["codes"]
    return {"epochs": state["epoch"], "seconds": state["seconds"], "weights_md5": metrics["weights_md5"],
            **{name: state["means"][name] for name in ("recon_loss", "gen_loss", "disc_loss", "accuracy")},
            "test_mse": metrics["reconstruction"]["mse"],
            "ks": codes["ks"], "ks_training": match["training_codes"]["ks"],
            "std": [min(codes["std"]), max(codes["std"])],
            "frechet_samples": quality["samples"]["frechet_to_test_images"],
            "frechet_reconstructions": quality["reconstructions"]["frechet_to_test_images"],
            "sure": quality["samples"]["sure"], "labels": list(quality["samples"]["labels"].values()),
            "parzen": likelihood["mean"], "parzen_error": likelihood["standard_error"],
            "parzen_reconstructions": likelihood["training_reconstructions"]["mean"]}


def collect(run, data_dir):
    """Return what a run has come to, with its commit, settings, curves and the figures after the epochs in MEASURED."""
    names = ("z_dim", "lambda_", "posterior", "networks", "seed", "precision", "device", "device_name", "torch")
    settings = load_state(run)["settings"]
    files = [run.parent / f"epoch_{epochs}.json" for epochs in MEASURED.get(run.parent.name, ())]
    stages = [json.loads(file.read_text()) for file in files if file.is_file()]
    return {"flags": " ".join(RUNS[run.parent.name]), "commit": (run.parent / "commit").read_text(),
            **{name: settings[name] for name in names}, **figures(run), **measure_codes(run, data_dir),
            "curves": {key: curve(run, tag) for key, tag in CURVES.items()}, **({"stages": stages} if stages else {})}


def measure_codes(run, data_dir, count=2000):
    """Return two figures on the codes of test images, of which the evaluation knows nothing.

    noise: the standard deviation of a code of the same image, as root mean square over images and dimensions.
    gradients: the mean norm of the gradients of an image's recon_loss and gen_loss with respect to its code.
    """
    _, path, settings = find_run(run)
    model = load_model(path, read_weights(path), settings).eval()
    images = load_data(settings, data_dir)[1][:count]
    torch.manual_seed(0)  # for encoders with noise
    codes, again = (model.encoder(images).detach() for _ in range(2))
    codes.requires_grad_()
    _, losses = model.get_loss_autoencoder(images, model.decoder(codes), codes)
    norms = {name: torch.autograd.grad(count * losses[name], codes, retain_graph=True)[0].norm(dim=1).mean().item()
             for name in ("recon_loss", "gen_loss")}
    return {"noise": ((codes - again).square().mean() / 2).sqrt().item(), "gradients": norms}


def curve(run, tag):
    """Return at most POINTS means of a TensorBoard curve, each over as many points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = torch.tensor([event.value for event in
                           EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars(tag)])
    return [round(part.mean().item(), 5) for part in values.tensor_split(min(POINTS, len(values)))]


def keep(name, run, args):
    """Write the pictures of a finished run, and its figures into results.json."""
    file = args.docs / "results.json"
    args.docs.mkdir(parents=True, exist_ok=True)
    for picture, content in pictures.draw_run(name, run, args.data_dir).items():
        write_atomically(args.docs / picture, content)
    results = {**read_json(file), name: collect(run, args.data_dir)}
    if name == "z8" and args.docs.resolve() == report.FIGURES:
        write_atomically(PRETRAINED, pretrained(run))
        results[name]["pretrained_md5"] = hashlib.md5(PRETRAINED.read_bytes()).hexdigest()
    results = {known: results[known] for known in RUNS if known in results}  # in the order of RUNS
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())


def pretrained(run):
    """Return the weights of a run's encoder and decoder in half precision, the bytes of a file of 0.8 MB."""
    weights = load_checked(run / "checkpoints" / WEIGHTS)
    return serialize({name: tensor.half() if tensor.is_floating_point() else tensor
                      for name, tensor in weights.items() if not name.startswith("discriminator.")})


def main():
    parser = argparse.ArgumentParser(description="Train, measure and show every run of the assignment's questions.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN",
                        help=f"runs: {', '.join(RUNS)}")
    parser.add_argument("--epochs", type=number(int, 1), default=100)
    parser.add_argument("--runs", type=Path, default=PROJECT / "AAE_logs" / "results", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=report.FIGURES,
                        help="folder of the figures and pictures; if another, "
                             "the tables of the docs, the plots and assets/ stay as they are")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="folder where MNIST is")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    args = parser.parse_args()
    try:
        report.documents()  # before hours of training
        signal.signal(signal.SIGINT, lambda *_: None)  # train.py saves its state, and its status ends this script
        for name in args.only:
            keep(name, finished_run(name, args), args)
        if args.docs.resolve() == report.FIGURES:
            report.write()
    except (CheckpointError, report.MarkError) as error:
        sys.exit(f"results.py: error: {error}")


if __name__ == "__main__":
    main()
