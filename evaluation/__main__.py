"""The program that evaluates a trained model on test images of its data set:  python -m evaluation RUN"""

import training  # noqa: F401 isort: skip (before torch, which reads the variables that it sets)

import json
import sys
import time
from pathlib import Path

import torch

from evaluation.classifier import load_classifier
from evaluation.measures import CONFIDENCE, evaluate
from evaluation.model_files import load_images, load_run
from evaluation.pictures import draw_pictures
from training.cli import OneLineParser, number, print_line, run_program
from training.device import default_torch_state, device_name, setup_device
from training.files import WEIGHTS, serialize, write_atomically

INFERRED = ("weights", "weights_md5", "trained_on", "z_dim", "posterior", "networks")  # settings kept in metrics.json


@default_torch_state()
def main(args):
    """Evaluate as the flags specify; raise UserError or mnist.DataError for errors that the user can fix."""
    started = time.monotonic()
    model, settings, folder = load_run(args.run)
    load_classifier()  # first, because a missing file should be reported before a minute of computing
    data = load_images(settings, args.data_dir)
    device = setup_device(args.no_cuda)
    print_line("{weights}: z_dim {z_dim}, {posterior} encoder, {networks} networks, ".format(**settings) +
               f"{len(data[1]):,} test images of {settings['trained_on']}, on {device}\n")
    figures = {**{name: settings[name] for name in INFERRED}, **evaluate(model.to(device), *data, args.seed),
               "seed": args.seed, "device": device.type, "device_name": device_name(device), "torch": torch.__version__,
               "seconds": round(time.monotonic() - started, 1)}
    print_line(format_table(figures))  # first, as the folder may not be writable
    folder = Path(args.output or folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_pictures(model, *data, args.seed).items():
        write_atomically(folder / name, serialize(picture))
    write_atomically(folder / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
    print_line(f"see: {folder}")


def format_table(figures):
    """Return the figures as a table."""
    match, likelihood, quality = figures["prior_match"], figures["log_likelihood"], figures["digit_classifier"]
    codes = [match[name] for name in ("codes", "training_codes", "prior_draws")]
    images = [quality[name] for name in ("samples", "training_reconstructions", "training_images", "test_images")]
    windows = [likelihood, likelihood["training_reconstructions"], likelihood["training_images"]]
    errors = figures["reconstruction"]["mse"], *figures["reconstruction"]["mse_per_label"].values()
    return "\n".join([
        row("codes against the prior", "test codes", "training codes", "prior samples"),
        row("  mean per dimension", *(f"{min(part['mean']):.2f} to {max(part['mean']):.2f}" for part in codes)),
        row("  standard deviation", *(f"{min(part['std']):.2f} to {max(part['std']):.2f}" for part in codes)),
        row("  Kolmogorov-Smirnov distance", *(f"{part['ks']:.4f}" for part in codes)),
        "",
        row("", "", "reconstructed"),
        row("digit classifier's features", "samples", "training images", "training images", "test images"),
        row("  squared Frechet distance", *(f"{part['frechet_to_test_images']:.2f}" for part in images[:3]), 0),
        row(f"  confidence of at least {CONFIDENCE}", *(f"{part['sure']:.1%}" for part in images)),
        "",
        row("label", "all", *range(10), width=8),
        row("  reconstruction error", *(f"{error:.4f}" for error in errors), width=8),
        row("  share of samples", "", *(f"{share:.1%}" for share in images[0]["labels"].values()), width=8),
        row("  share of test images", "", *(f"{share:.1%}" for share in images[3]["labels"].values()), width=8),
        "",
        row("Parzen log-likelihood of", "", "reconstructed"),
        row("the test images, windows around", "samples", "training images", "training images"),
        row("  nats", *(f"{part['mean']:.1f} +- {part['standard_error']:.1f}" for part in windows)),
        row("  sigma", *(f"{part['sigma']:.3f}" for part in windows)),
        row("  number of windows", *(f"{part['samples']:,}" for part in windows))])


def row(title, *texts, width=17):
    return f"{title:{32 if width == 17 else 25}}" + "".join(f"{text:>{width}}" for text in texts)


def parse_args(argv=None):
    parser = OneLineParser("python -m evaluation", "Measure a trained model; write a table, metrics.json and pictures.")
    parser.add_argument("run", metavar="RUN", help=f"folder of a run of train.py, or a {WEIGHTS}")
    parser.add_argument("--output", metavar="DIR", help="folder for the files (default: evaluation/ in the run; "
                                                        "NAME_evaluation/ next to NAME.pt)")
    parser.add_argument("--data_dir", metavar="DIR", help="MNIST's folder; the files are downloaded if missing "
                                                          "(default: the run's, or ../data/)")
    parser.add_argument("--seed", **number(int, 0, 2**63 - 1), default=0, help="random seed")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m evaluation", main, parse_args, None))
