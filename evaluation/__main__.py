"""The program that evaluates a trained model:  python -m evaluation RUN

The test images are those of the data set that the run was trained on, and only <run>/evaluation/ is written. For a
model_checkpoint.pt outside a run, the architecture is inferred from the weights, the test images are MNIST's, and
evaluation/ is created next to the file.
"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import hashlib
import json
import sys
import time

import torch
from tqdm import tqdm

from evaluation.classifier import load_classifier
from evaluation.measures import CONFIDENCE, evaluate
from evaluation.model_files import find_run, load_images, load_model, read_weights, settings_from_weights
from evaluation.pictures import draw_pictures
from training.checkpoint import WEIGHTS
from training.cli import OneLineParser, number, print_line, run_program
from training.device import device_name, setup_device
from training.files import png_bytes, write_atomically


def main(args):
    """Evaluate as the flags specify; return the content of metrics.json.

    Raises UserError or mnist.DataError for errors that the user can fix.
    """
    started = time.monotonic()
    folder, path, settings = find_run(args.run)
    weights = read_weights(path)
    settings = settings or settings_from_weights(path, weights)
    model = load_model(path, weights, settings)
    load_classifier()  # first, because a missing file should be reported before a minute of computing
    data = load_images(settings, args.data_dir)
    device = setup_device(args.no_cuda, mps=False)
    model.to(device)
    with tqdm(total=6, bar_format="{desc}|{bar}|{elapsed}", disable=None, leave=False) as bar:
        def progress(stage):
            bar.set_description(stage)
            bar.update()

        metrics = evaluate(model, *data, args.seed, progress)
        progress("pictures")
        for name, picture in draw_pictures(model, *data, args.seed).items():
            write_atomically(folder / "evaluation" / name, png_bytes(picture))
    metrics = {"weights": str(path), "weights_md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(),
               **{name: settings[name] for name in ("trained_on", "z_dim", "posterior", "networks")}, **metrics,
               "seed": args.seed, "device": device.type, "device_name": device_name(device), "torch": torch.__version__,
               "seconds": round(time.monotonic() - started, 1)}
    print_line(format_table(metrics))
    write_atomically(folder / "evaluation" / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print_line(f"see: {folder / 'evaluation'}")
    return metrics


def format_table(metrics):
    """Format the metrics as a table."""
    match, likelihood, quality = metrics["prior_match"], metrics["log_likelihood"], metrics["digit_classifier"]
    code_sets = [match[name] for name in ("codes", "training_codes", "prior_draws")]
    windows = [likelihood, likelihood["training_reconstructions"], likelihood["training_images"]]
    image_sets = [quality[name] for name in ("samples", "training_reconstructions", "training_images", "test_images")]
    shares = [[f"{share:.1%}" for share in images["labels"].values()] for images in (image_sets[0], image_sets[3])]
    name = "MNIST" if metrics["trained_on"] == "mnist" else "the bundled digits"
    errors = metrics["reconstruction"]["mse_per_label"]
    return "\n".join([
        f"{metrics['weights']}: z_dim {metrics['z_dim']}, {metrics['posterior']} encoder, {metrics['networks']} "
        f"networks, {metrics['test_images']:,} test images of {name}, {metrics['seconds']:.0f} s on "
        f"{metrics['device']}",
        "",
        row("codes against the prior", "test codes", "training codes", "prior samples"),
        row("  mean per dimension", *(span(codes["mean"]) for codes in code_sets)),
        row("  standard deviation", *(span(codes["std"]) for codes in code_sets)),
        row("  squared Frechet distance", *(f"{codes['frechet']:.4f}" for codes in code_sets)),
        row("  Kolmogorov-Smirnov distance", *(f"{codes['ks']:.4f}" for codes in code_sets)),
        row("  classifier two-sample accuracy", *(f"{codes['two_sample_accuracy']:.3f}" for codes in code_sets)),
        "",
        row("", "", "reconstructed"),
        row("digit classifier's features", "samples", "training images", "training images", "test images"),
        row("  squared Frechet distance",
            *(f"{images['frechet_to_test_images']:.2f}" for images in image_sets[:3]), "0"),
        row(f"  confidence of at least {CONFIDENCE}", *(f"{images['sure']:.1%}" for images in image_sets)),
        "",
        label_row("label", "all", range(10)),
        label_row("  reconstruction error", f"{metrics['reconstruction']['mse']:.4f}",
                  (f"{errors[str(label)]:.4f}" if str(label) in errors else "-" for label in range(10))),
        label_row("  share of samples", "", shares[0]),
        label_row("  share of test images", "", shares[1]),
        "",
        row("Parzen log-likelihood of", "", "reconstructed"),
        row("the test images, windows around", "samples", "training images", "training images"),
        row("  nats", *(f"{window['mean']:.1f} +- {window['standard_error']:.1f}" for window in windows)),
        row("  sigma", *(f"{window['sigma']:.3f}" for window in windows)),
        row("  number of windows", *(f"{window['samples']:,}" for window in windows))])


def row(title, *cells):
    return f"{title:<32}" + "".join(f"{cell:>17}" for cell in cells)


def label_row(title, total, cells):
    return f"{title:<25}{total:>8}" + "".join(f"{cell:>8}" for cell in cells)


def span(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser("python -m evaluation", "Evaluate a trained model on test images.\n\nPrints a table, and "
                           "writes metrics.json and pictures to the run's evaluation/.")
    parser.add_argument("run", metavar="RUN", help=f"folder of a run of train.py, or a {WEIGHTS}")
    parser.add_argument("--data_dir", metavar="DIR", help="MNIST's folder; the files are downloaded if missing "
                                                          "(default: the run's, or ../data/)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="random seed")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    return parser


def cli(argv=None):
    """Run `main` from the command line and return the exit status; report user errors in one sentence."""
    return run_program("python -m evaluation", main, make_parser().parse_args, argv, "end other programs")


if __name__ == "__main__":
    sys.exit(cli())
