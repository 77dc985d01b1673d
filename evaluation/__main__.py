"""Measure how good a trained model is:  python -m evaluation RUN  (its folder, or a model_checkpoint.pt).

It measures on the 10,000 test images of MNIST, or on the 299 held out of the bundled digits where the run was trained
on those, prints a table, and writes <run>/evaluation/metrics.json and the pictures beside it; nothing else in the run
changes. Of a model_checkpoint.pt without a run around it, the kind of model follows from the weights, MNIST is taken,
and evaluation/ is made beside the file.
"""

import training.threads  # noqa: F401 (before torch, which reads there what it sets)

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
from runs.checkpoint import WEIGHTS
from runs.files import png_bytes, write_atomically
from training.commandline import OneLineParser, number, print_line, run_program
from training.device import choose_device, device_name, keep_freed_memory, set_precision

STAGES = ("reconstructions", "prior match", "samples", "log-likelihood", "digit classifier", "pictures")


def main(args):
    """Evaluate as the flags say; return what metrics.json has.

    Raises UserError, mnist.DataError or OSError for what the user can mend.
    """
    started = time.monotonic()
    folder, path, settings = find_run(args.run)
    weights, checksum = read_weights(path), hashlib.md5(path.read_bytes()).hexdigest()
    settings = settings or settings_from_weights(path, weights)
    model = load_model(path, weights, settings)
    load_classifier()  # before all else: whether it is there should be known before a minute has passed
    data = load_data(settings, args.data_dir)
    device = choose_device(args.no_cuda, mps=False)
    set_precision("fp32", device)
    keep_freed_memory()
    model.to(device)
    with tqdm(total=len(STAGES), bar_format="{desc}|{bar}|{elapsed}", disable=None, leave=False) as bar:
        def progress(stage):
            bar.update(STAGES.index(stage) - bar.n)
            bar.set_description(stage)

        metrics = evaluate(model, *data, args.seed, progress)
        progress("pictures")
        for name, picture in draw_pictures(model, *data, args.seed).items():
            write_atomically(folder / "evaluation" / name, png_bytes(picture))
    metrics = {"weights": str(path), "weights_md5": checksum,
               "trained_on": settings["trained_on"], "z_dim": settings["z_dim"], "posterior": settings["posterior"],
               "networks": settings["networks"], **metrics,
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
    """Run `main` from the command line and return the exit status; what the user can mend is said in one sentence."""
    return run_program("python -m evaluation", main, make_parser().parse_args, argv,
                       "try --no-cuda, or end other programs")


if __name__ == "__main__":
    sys.exit(cli())
