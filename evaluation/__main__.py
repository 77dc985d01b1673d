"""The program that evaluates a trained model on test images of its data set:  python -m evaluation RUN"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation.classifier import load_classifier
from evaluation.measures import CONFIDENCE, evaluate
from evaluation.model_files import load_images, load_run
from evaluation.pictures import draw_pictures
from training.cli import OneLineParser, UserError, number, print_line, run_program
from training.device import default_torch_state, device_name, setup_device
from training.files import WEIGHTS, png_bytes, write_atomically


@default_torch_state()
def main(args):
    """Evaluate as the flags specify; raise UserError or mnist.DataError for errors that the user can fix."""
    started = time.monotonic()
    model, settings, weights, folder = load_run(args.run)
    checksum = hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()
    load_classifier()  # first, because a missing file should be reported before a minute of computing
    data = load_images(settings, args.data_dir)
    device = setup_device(args.no_cuda, mps=False)
    model.to(device)
    with tqdm(total=5, bar_format="{desc}|{bar}|{elapsed}", disable=None, leave=False) as bar:
        def progress(stage):
            bar.set_description(stage)
            bar.update()

        measures = evaluate(model, *data, args.seed, progress)
    figures = {"weights": str(weights), "weights_md5": checksum,
               **{name: settings[name] for name in ("trained_on", "z_dim", "posterior", "networks")}, **measures,
               "seed": args.seed, "device": device.type, "device_name": device_name(device), "torch": torch.__version__,
               "seconds": round(time.monotonic() - started, 1)}
    print_line(format_table(figures))  # first, as the folder may not be writable
    pictures = draw_pictures(model, *data, args.seed)
    folder = Path(args.output or folder / "evaluation")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_atomically(folder / name, png_bytes(picture))
        write_atomically(folder / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}; choose another folder with "
                        f"--output") from None
    print_line(f"see: {folder}")


def format_table(figures):
    """Return the figures as a table."""
    match, likelihood, quality = figures["prior_match"], figures["log_likelihood"], figures["digit_classifier"]
    code_sets = [match[name] for name in ("codes", "training_codes", "prior_draws")]
    windows = [likelihood, likelihood["training_reconstructions"], likelihood["training_images"]]
    image_sets = [quality[name] for name in ("samples", "training_reconstructions", "training_images", "test_images")]
    errors = {label: f"{error:.4f}" for label, error in figures["reconstruction"]["mse_per_label"].items()}
    data = "MNIST" if figures["trained_on"] == "mnist" else "the bundled digits"
    return "\n".join([
        "{weights}: z_dim {z_dim}, {posterior} encoder, {networks} networks, {test_images:,} test images of {data}, "
        "{seconds:.0f} s on {device}".format(data=data, **figures),
        "",
        row("codes against the prior", "test codes", "training codes", "prior samples"),
        *(row(title, *(f"{min(codes[key]):.2f} to {max(codes[key]):.2f}" for codes in code_sets))
          for title, key in (("  mean per dimension", "mean"), ("  standard deviation", "std"))),
        row("  squared Frechet distance", *(f"{codes['frechet']:.4f}" for codes in code_sets)),
        row("  Kolmogorov-Smirnov distance", *(f"{codes['ks']:.4f}" for codes in code_sets)),
        row("  classifier two-sample accuracy", *(f"{codes['two_sample_accuracy']:.3f}" for codes in code_sets)),
        "",
        row("", "", "reconstructed"),
        row("digit classifier's features", "samples", "training images", "training images", "test images"),
        row("  squared Frechet distance", *(f"{images['frechet_to_test_images']:.2f}" for images in image_sets[:3]), 0),
        row(f"  confidence of at least {CONFIDENCE}", *(f"{images['sure']:.1%}" for images in image_sets)),
        "",
        row("label", "all", *range(10), width=8),
        row("  reconstruction error", f"{figures['reconstruction']['mse']:.4f}",
            *(errors.get(str(label), "-") for label in range(10)), width=8),
        *(row(title, "", *(f"{share:.1%}" for share in images["labels"].values()), width=8)
          for title, images in (("  share of samples", image_sets[0]), ("  share of test images", image_sets[3]))),
        "",
        row("Parzen log-likelihood of", "", "reconstructed"),
        row("the test images, windows around", "samples", "training images", "training images"),
        row("  nats", *(f"{window['mean']:.1f} +- {window['standard_error']:.1f}" for window in windows)),
        row("  sigma", *(f"{window['sigma']:.3f}" for window in windows)),
        row("  number of windows", *(f"{window['samples']:,}" for window in windows))])


def row(title, *cells, width=17):
    return title.ljust(32 if width == 17 else 25) + "".join(f"{cell:>{width}}" for cell in cells)


def parse_args(argv=None):
    parser = OneLineParser("python -m evaluation", "Evaluate a trained model on test images.\n\n"
                           "Prints a table, and writes metrics.json and pictures.")
    parser.add_argument("run", metavar="RUN", help=f"folder of a run of train.py, or a {WEIGHTS}")
    parser.add_argument("--output", metavar="DIR", help="folder for the files (default: the run's evaluation/)")
    parser.add_argument("--data_dir", metavar="DIR", help="MNIST's folder; the files are downloaded if missing "
                                                          "(default: the run's, or ../data/)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="random seed")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA, even if it is available")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m evaluation", main, parse_args, None))
