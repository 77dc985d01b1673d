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
from evaluation.measures import evaluate
from evaluation.model_files import find_run, load_data, load_model, read_weights, settings_from_weights
from evaluation.pictures import draw_pictures
from evaluation.table import describe
from training.checkpoint import WEIGHTS
from training.cli import OneLineParser, number, print_line, run_program
from training.device import choose_device, device_name, keep_freed_memory, set_precision
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
    data = load_data(settings, args.data_dir)
    device = choose_device(args.no_cuda, mps=False)
    set_precision("fp32", device)
    keep_freed_memory()
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
    print_line(describe(metrics))
    write_atomically(folder / "evaluation" / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print_line(f"see: {folder / 'evaluation'}")
    return metrics


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
