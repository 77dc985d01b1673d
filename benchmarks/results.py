"""Train and measure every run of the assignment's questions, and show them:  python benchmarks/results.py

Each is trained by train.py and measured by python -m evaluation, in processes of their own. What is finished in --runs
is not repeated, what has begun is resumed; after a change of the networks, name another folder. The figures go into
docs/results/results.json, the pictures beside it, and the table of all runs into README.md, between two marks.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads there what it sets)

# isort: split

import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.pictures import COLORS
from runs.checkpoint import WEIGHTS, CheckpointError, load_state
from runs.files import png_bytes, write_atomically
from runs.folder import has_state, latest_run
from training.commandline import number
from training.options import BASE, HYPERPARAMETERS, parse_args

RUNS = {  # name: flags of train.py
    "z8": [],
    "z8-seed1": ["--seed", "1"],
    "z8-seed2": ["--seed", "2"],
    "z8-base": BASE,
    "z8-lambda1": ["--lambda_", "1"],
    "z2": ["--z_dim", "2"],
    "z2-lambda1": ["--z_dim", "2", "--lambda_", "1"],
    "z20": ["--z_dim", "20"],
    "z20-gaussian": ["--z_dim", "20", "--posterior", "gaussian"],
    "z20-universal": ["--z_dim", "20", "--posterior", "universal"],
}
MEASURED = {name: (1, 2, 5, 10, 20, 50) for name in ("z8", "z8-seed1", "z8-seed2", "z8-base")}  # epochs before the last
CODE = ("mnist.py", "models.py", "train.py", "utils.py", "training", "runs", "evaluation")  # what runs depend on
SHOWN = (0, 20, 50, 100)  # epochs of which pictures are shown
CURVES = {  # key in results.json, which names the picture too: title, TensorBoard tag
    "reconstruction loss": ("reconstruction loss", "generator/recon_loss"),
    "discriminator right": ("discriminator accuracy", "discriminator/accuracy"),
}
POINTS = 100  # of a curve
README = PROJECT / "README.md"
START, END = "<!-- results: written by benchmarks/results.py -->", "<!-- end of results -->"


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
    return {"epochs": state["epoch"], "seconds": state["seconds"],
            **{name: state["means"][name] for name in ("recon_loss", "gen_loss", "disc_loss", "accuracy")},
            "test_mse": metrics["reconstruction"]["mse"],
            "ks": codes["ks"], "ks_training": match["training_codes"]["ks"],
            "std": [min(codes["std"]), max(codes["std"])],
            "frechet_samples": quality["samples"]["frechet_to_test_images"],
            "frechet_reconstructions": quality["reconstructions"]["frechet_to_test_images"],
            "sure": quality["samples"]["sure"], "labels": list(quality["samples"]["labels"].values()),
            "parzen": likelihood["mean"], "parzen_error": likelihood["standard_error"],
            "parzen_reconstructions": likelihood["training_reconstructions"]["mean"]}


def collect(run):
    """Return what a run has come to, with its commit, settings, curves and the figures after the epochs in MEASURED."""
    settings = ("z_dim", "lambda_", "posterior", "networks", "seed", "precision", "device", "device_name", "torch")
    result = figures(run)
    stages = [json.loads((run.parent / f"epoch_{epochs}.json").read_text())
              for epochs in MEASURED.get(run.parent.name, ()) if (run.parent / f"epoch_{epochs}.json").is_file()]
    return {"commit": (run.parent / "commit").read_text(),
            **{name: load_state(run)["settings"][name] for name in settings}, **result,
            "curves": {key: curve(run, tag) for key, (_, tag) in CURVES.items()},
            **({"stages": stages} if stages else {})}


def curve(run, tag):
    """Return at most POINTS means of a TensorBoard curve, each over as many points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = torch.tensor([event.value for event in
                           EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars(tag)])
    return [round(part.mean().item(), 5) for part in values.tensor_split(min(POINTS, len(values)))]


# Pictures ------------------------------------------------------------------------------------------------------------

def draw_progress(run):
    """Return the samples of a run over its reconstructions, side by side for those of the epochs SHOWN that it has."""
    columns = []
    for epoch in SHOWN:
        files = [run / "results" / name for name in (f"Prior_samples/samples_epoch_{epoch}.png",
                                                     f"Reconstruction/reconstruction_{epoch}.png")]
        if all(file.is_file() for file in files):
            columns.append((epoch, *(Image.open(file).convert("L") for file in files)))
    width = max(max(samples.width, pairs.width) for _, samples, pairs in columns) + 8
    height = 24 + columns[0][1].height + 8 + columns[0][2].height
    picture, font = Image.new("L", (width * len(columns) - 8, height), 255), ImageFont.load_default(16)
    for index, (epoch, samples, pairs) in enumerate(columns):
        ImageDraw.Draw(picture).text((index * width, 2), f"epoch {epoch}", 0, font)
        picture.paste(samples, (index * width, 24))
        picture.paste(pairs, (index * width, 32 + samples.height))
    return picture.quantize(16)


def draw_codes(run):
    """Return the evaluation's picture of the codes of a run of 2 dimensions, at half its size."""
    picture = Image.open(run / "evaluation" / "codes.png")
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS).quantize(128)


def draw_curves(results, key, size=(480, 300)):
    """Return one of the CURVES of all runs, over the epochs."""
    curves = {name: result["curves"][key] for name, result in results.items()}
    epochs = max(result["epochs"] for result in results.values())
    low = 0.0
    high = max(sorted(values)[-max(1, len(values) // 20)] for values in curves.values())  # but for the first ones
    picture, font = Image.new("RGB", (size[0] + 150, size[1]), "white"), ImageFont.load_default(13)
    draw, (left, top, right, bottom) = ImageDraw.Draw(picture), (50, 26, size[0] - 10, size[1] - 24)
    draw.text((left, 4), f"{CURVES[key][0]}, over the epochs", "black", font)
    for part in range(5):
        draw.text((left + part * (right - left) / 4, bottom + 6), f"{part * epochs / 4:g}", "black", font, anchor="mt")
        y, value = bottom - part * (bottom - top) / 4, low + part * (high - low) / 4
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 6, y), f"{value:.3f}", "black", font, anchor="rm")
    for index, (name, values) in enumerate(curves.items()):
        width = (right - left) * results[name]["epochs"] / epochs / len(values)
        points = [(left + width * (place + 0.5), bottom - (bottom - top) * (min(value, high) - low) / (high - low))
                  for place, value in enumerate(values)]
        color, y = COLORS[index % len(COLORS)], top + 10 + 20 * index
        draw.line(points, color, 2)
        draw.line((size[0], y, size[0] + 16, y), color, 3)
        draw.text((size[0] + 22, y), name, "black", font, anchor="lm")
    return picture.quantize(64)


# README --------------------------------------------------------------------------------------------------------------

def table(results):
    """Return the figures of all runs as a table in Markdown."""
    lines = ["| run | flags | epochs | reconstruction loss | test MSE | KS | of training codes | Fréchet, samples | "
             "reconstructions | samples, confidence ≥ 0.95 | Parzen, nats |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, run in results.items():
        lines.append(f"| {name} | `{' '.join(RUNS[name]) or 'none'}` | {run['epochs']} | {run['recon_loss']:.4f} | "
                     f"{run['test_mse']:.4f} | {run['ks']:.4f} | {run['ks_training']:.4f} | "
                     f"{run['frechet_samples']:.1f} | {run['frechet_reconstructions']:.1f} | {run['sure']:.1%} | "
                     f"{run['parzen']:.1f} ± {run['parzen_error']:.1f} |")
    seeds = [results[name] for name in ("z8", "z8-seed1", "z8-seed2") if name in results]
    if len({run["epochs"] for run in seeds}) == 1 and len(seeds) == 3:
        lines.append(f"\nThe default run with three seeds, mean and range: test MSE {spread(seeds, 'test_mse', 4)}, KS "
                     f"{spread(seeds, 'ks', 4)}, Fréchet of samples {spread(seeds, 'frechet_samples', 1)} and "
                     f"reconstructions {spread(seeds, 'frechet_reconstructions', 1)}, Parzen "
                     f"{spread(seeds, 'parzen', 1)}.")
    return "\n".join(lines)


def spread(results, figure, digits):
    """Return the mean of a figure, with the range, as text."""
    values = [run[figure] for run in results]
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def read_results(file):
    """Return what results.json holds, nothing where there is none; end the script where it is damaged."""
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        sys.exit(f"results.py: error: {file} is damaged ({error}); delete it, and the runs are collected anew")


def around_table():
    """Return what README.md has before its mark START and after its mark END; end the script where one is missing."""
    before, _, rest = README.read_text().partition(START)
    _, _, after = rest.partition(END)
    if not after:
        sys.exit(f"results.py: error: {README} lacks the line {START} or {END}; put them back")
    return before, after


def main():
    parser = argparse.ArgumentParser(description="Train, measure and show every run of the assignment's questions.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN",
                        help=f"runs: {', '.join(RUNS)}")
    parser.add_argument("--epochs", type=number(int, 1), default=100)
    parser.add_argument("--runs", type=Path, default=PROJECT / "AAE_logs" / "results", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=PROJECT / "docs" / "results",
                        help="folder of the figures and pictures")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="folder where MNIST is")
    parser.add_argument("--readme-only", action="store_true",
                        help="make README's table and the curves from results.json alone")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    args = parser.parse_args()
    before, after = around_table()  # before hours of training
    args.docs.mkdir(parents=True, exist_ok=True)
    file = args.docs / "results.json"
    results = read_results(file)
    if args.readme_only and not results:
        sys.exit(f"results.py: error: {file} has no results yet; leave --readme-only out")
    signal.signal(signal.SIGINT, lambda *_: None)  # train.py saves its state, and its status ends this script
    for name in () if args.readme_only else args.only:
        try:
            run = finished_run(name, args)
        except CheckpointError as error:
            sys.exit(f"results.py: error: {error}")
        results[name] = collect(run)
        write_atomically(args.docs / f"{name}.png", png_bytes(draw_progress(run)))
        if results[name]["z_dim"] == 2:
            write_atomically(args.docs / f"{name}-codes.png", png_bytes(draw_codes(run)))
        results = {known: results[known] for known in RUNS if known in results}  # in the order of RUNS
        write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    for key in CURVES:
        write_atomically(args.docs / f"{key.replace(' ', '_')}.png", png_bytes(draw_curves(results, key)))
    write_atomically(README, f"{before}{START}\n{table(results)}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
