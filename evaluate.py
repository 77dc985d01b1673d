"""Measure how good a trained model is:  python evaluate.py RUN  (its folder, or a model_checkpoint.pt).

It measures on the 10,000 test images of MNIST, or on the 299 held out of the bundled digits where the run was trained on
those, prints a table, and writes <run>/evaluation/metrics.json and the pictures beside it; nothing else in the run changes.
Of a model_checkpoint.pt without a run around it, the kind of model follows from the weights, MNIST is taken, and evaluation/
is made beside the file. On two cores of an AMD EPYC (Zen 5) with torch 2.15.0, it takes 31 s with MNIST.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from checkpoint import WEIGHTS, CheckpointError, read_packed
from classifier import ClassifierError, features_and_probabilities, load_classifier
from device import choose_device, device_name, keep_freed_memory, set_precision
from metrics import choose_sigma, frechet, frechet_to_prior, ks_distance, mmd, parzen_log_likelihood, squared_distances
from mnist import DataError, load_digits, load_mnist
from models import ENCODERS, NETWORKS
from train import OneLineParser, build_model, explain, make_picture, number, png_bytes, reconstruct, say, undisturbed
from utils import write_atomically

BATCH = 250            # samples drawn at once
SAMPLES = 10_000       # drawn for the log-likelihood and for the classifier
SIGMA_IMAGES = 1_000   # the last ones of the training set, to choose the Parzen window's sigma on
SEEN_IMAGES = 10_000   # of the other training images, to compare with: what a model does with images it was trained on
DEFAULTS = {"posterior": "deterministic", "networks": "base", "trained_on": "mnist", "data_dir": "../data/"}  # of older runs
SURE = 0.95            # the classifier is sure of an image from this probability on
STAGES = ("reconstructions", "prior match", "samples", "log-likelihood", "digit classifier", "pictures")
COLORS = ("#1f5fbf", "#f28e1c", "#2f9e44", "#d62f2f", "#8250c4", "#8a5a3c", "#e873b8", "#7a7a7a", "#b5b31a", "#17b0c4")


class EvaluationError(RuntimeError):
    """A model that cannot be evaluated; the message says why and what to do."""


# Numbers -------------------------------------------------------------------------------------------------------------

def evaluate(model, train_images, test_images, test_labels, seed=0, progress=lambda stage: None):
    """Return all that is measured of a model, as a dict of dicts of numbers that json can write.

    Args:
        model: see models.AdversarialAE. Its modes and random streams are put back after.
        train_images, test_images: [N, 1, 28, 28] in [-1, 1].
        test_labels: [N], of the digits 0 to 9.
        seed: of every random draw.
        progress: called with the name of each stage as it begins.
    Raises EvaluationError where the model gives NaN, or samples that no Parzen window fits.
    """
    with undisturbed(model):
        torch.manual_seed(seed)
        progress("reconstructions")
        test_images = test_images.to(model.device)
        seen, held_out = (part.to(model.device) for part in split_training_images(train_images))
        reconstructions, codes = reconstruct(model, test_images)
        seen_reconstructions, seen_codes = reconstruct(model, seen)
        if not (codes.isfinite().all() and reconstructions.isfinite().all()):
            raise EvaluationError("the model's codes or reconstructions are NaN or infinite: its training has diverged; name "
                                  "another run")
        reconstruction = reconstruction_errors(reconstructions, test_images, test_labels)
        progress("prior match")
        match = prior_match({"codes": codes, "training_codes": seen_codes}, seed)
        progress("samples")
        samples = draw_samples(model, SAMPLES, seed)
        progress("log-likelihood")
        likelihood = {**log_likelihood(samples, held_out, test_images),
                      "training_reconstructions": log_likelihood(seen_reconstructions, held_out, test_images),
                      "training_images": log_likelihood(seen, held_out, test_images)}
        progress("digit classifier")
        quality = classifier_quality({"samples": samples, "reconstructions": reconstructions,
                                      "training_images": seen, "test_images": test_images})
    return {"test_images": len(test_images), "reconstruction": reconstruction, "prior_match": match,
            "log_likelihood": likelihood, "digit_classifier": quality}


def split_training_images(images):
    """Return SEEN_IMAGES of the training images, in even steps from the first one, or fewer, and the SIGMA_IMAGES last ones.

    In MNIST those are every fifth of 50,000: neither 10,000 in a row nor every second one are like the rest (docs/ABLATION.md).
    """
    last = min(SIGMA_IMAGES, len(images) // 2)
    rest = images[:-last]
    return rest[::max(1, len(rest) // SEEN_IMAGES)][:SEEN_IMAGES], images[-last:]


def draw_samples(model, count, seed):
    """Return `count` samples of a model, the same ones for the same seed."""
    torch.manual_seed(seed)  # for a model that draws from torch's stream; ours has its own
    if hasattr(model, "sample_stream"):
        model.sample_stream.manual_seed(seed)
    return torch.cat([model.sample(min(BATCH, count - done)) for done in range(0, count, BATCH)])


def reconstruction_errors(reconstructions, images, labels):
    """Return the mean squared error over images and pixels in [-1, 1], of all images and of those of each label."""
    errors = (reconstructions - images).square().flatten(1).mean(1).double().cpu()
    return {"mse": errors.mean().item(),
            "mse_per_label": {str(label): errors[labels.cpu() == label].mean().item() for label in labels.unique().tolist()}}


def prior_match(sets, seed):
    """Return how far sets of codes [N, z_dim] are from the prior, and how far draws of it, as many as the first, seem to be."""
    codes = next(iter(sets.values()))
    generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not the seed of the directions in ks_distance
    prior, perfect = torch.randn(2, *codes.shape, generator=generator).to(codes.device)
    return {name: {"mean": own.double().mean(0).tolist(), "std": own.double().std(0).tolist(),
                   "frechet": frechet_to_prior(own), "ks": ks_distance(own), "mmd": mmd(own, prior)}
            for name, own in {**sets, "prior_draws": perfect}.items()}


def log_likelihood(samples, held_out, images):
    """Return the Parzen log-likelihood in nats of images, with the sigma that is best for `held_out`; all in [-1, 1]."""
    samples, held_out, images = ((part + 1) / 2 for part in (samples, held_out, images))
    try:
        sigma = choose_sigma(samples, held_out)
    except ValueError as error:
        raise EvaluationError(f"no log-likelihood can be had of such samples ({error}): the model is not trained, or has "
                              f"diverged; name another run") from None
    values = parzen_log_likelihood(samples, images, sigma)
    return {"mean": values.mean().item(), "standard_error": values.std().item() / len(values)**0.5, "sigma": sigma,
            "samples": len(samples), "sigma_images": len(held_out)}


def classifier_quality(sets):
    """Return how sets of images, a dict with one named test_images, look to the digit classifier.

    That is the squared Frechet distance of each one's features to those of the test images, the share of each label among
    them, and the share that the classifier is sure of.
    """
    classifier = load_classifier(sets["test_images"].device)
    results = {name: features_and_probabilities(classifier, images) for name, images in sets.items()}
    test_features, _ = results["test_images"]
    quality = {"sure_from_probability": SURE}
    for name, (features, probabilities) in results.items():
        shares = probabilities.argmax(1).bincount(minlength=10).double() / len(probabilities)
        quality[name] = {"images": len(features), "frechet_to_test_images": frechet(features, test_features),
                         "sure": (probabilities.amax(1) >= SURE).double().mean().item(),
                         "labels": {str(label): share for label, share in enumerate(shares.tolist())}}
    del quality["test_images"]["frechet_to_test_images"]  # of a set to itself
    return quality


# Pictures ------------------------------------------------------------------------------------------------------------

def draw_pictures(model, train_images, test_images, test_labels, seed=0):
    """Return the pictures of a model, a dict of file names to PIL images."""
    with undisturbed(model):
        torch.manual_seed(seed)
        samples = draw_samples(model, 64, seed)
        pictures = {"samples.png": grid(samples, 8),
                    "nearest.png": grid(torch.cat([samples[:8], nearest(samples[:8], train_images)]), 8),
                    "reconstructions.png": draw_reconstructions(model, test_images, test_labels),
                    "interpolations.png": draw_interpolations(model, test_images, test_labels)}
        if model.z_dim == 2:
            pictures["manifold.png"] = draw_manifold(model)
            pictures["codes.png"] = draw_codes(reconstruct(model, test_images.to(model.device))[1].cpu(), test_labels.cpu())
    return pictures


def grid(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture, each at twice its size."""
    picture = to_pil_image(make_picture(images, columns))
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def nearest(samples, train_images):
    """Return for each sample the training image with the smallest squared distance."""
    flat = samples.flatten(1)
    distances = torch.cat([squared_distances(flat, part.flatten(1).to(flat)) for part in train_images.split(40 * BATCH)], 1)
    return train_images[distances.argmin(1).to(train_images.device)].to(samples)


def draw_reconstructions(model, images, labels, rows=4):
    """Return a picture with a column for each label: `rows` times an image over its reconstruction."""
    chosen = torch.stack([first_of(labels, label, rows) for label in labels.unique()], 1)
    lines = []
    for row in chosen:
        shown = images[row].to(model.device)
        lines += [shown, model(shown)[0]]
    return grid(torch.cat(lines), chosen.shape[1])


def first_of(labels, label, count):
    """Return the indices [count] of the first images with a label; with fewer ones, the last is repeated."""
    found = (labels == label).nonzero()[:count, 0]
    return torch.cat([found, found[-1:].expand(count - len(found))])


def draw_interpolations(model, images, labels, steps=10):
    """Return a picture with a row for each label: an image of it, `steps` decoded codes on the way to the next label's, that.
    """
    starts = torch.cat([first_of(labels, label, 1) for label in labels.unique()])
    images = images[starts].to(model.device)
    codes = model(images)[1]
    rows = []
    for row, after in zip(range(len(starts)), torch.arange(len(starts)).roll(-1).tolist()):
        path = interpolate(codes[row], codes[after], torch.linspace(0, 1, steps, device=codes.device))
        rows += [images[row:row + 1], model.decoder(path), images[after:after + 1]]
    return grid(torch.cat(rows), steps + 2)


def interpolate(start, end, fractions):
    """Return codes [N, z_dim] at fractions [N] of the way from one code [z_dim] to another along the sphere.

    The direction turns at constant speed (Shoemake 1985, "Animating rotation with quaternion curves") and the
    norm changes at constant speed. Draws of N(0, I) have norms near sqrt(z_dim); a straight line between two of them passes
    through norms that are rare.
    """
    fractions = fractions[:, None]
    norms = start.norm(), end.norm()
    directions = F.normalize(start, dim=0), F.normalize(end, dim=0)
    angle = (directions[0] @ directions[1]).clamp(-1, 1).acos()
    if angle.sin() < 1e-3:  # the same direction, or opposite ones, between which there is no one way
        return torch.lerp(start, end, fractions)
    direction = (((1 - fractions) * angle).sin() * directions[0] + (fractions * angle).sin() * directions[1]) / angle.sin()
    return torch.lerp(*norms, fractions) * direction


def draw_manifold(model, side=20):
    """Return the decoded codes of a model of 2 dimensions, at the prior's quantiles (i + 1/2) / side in each.

    The first dimension grows to the right and the second upwards, as in codes.png.
    """
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    second, first = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    codes = torch.stack([first, second], -1).view(-1, 2)
    return grid(model.decoder(codes.to(model.device)), side)


def draw_codes(codes, labels, size=800, scale=2):
    """Return a picture of codes [N, 2] coloured by their labels [N], with the prior's standard deviations as circles.

    It is drawn `scale` times as large, then reduced, for smooth edges.
    """
    reach = max(4.0, 1.05 * codes.abs().max().item())
    pixels = size * scale
    to_pixels = lambda value: (value / reach + 1) / 2 * pixels
    picture = Image.new("RGB", (pixels + 110 * scale, pixels), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18 * scale)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))  # so that no label hides the others
    for index in order.tolist():
        x, y = to_pixels(codes[index, 0].item()), to_pixels(-codes[index, 1].item())
        draw_circle(draw, x, y, 2.2 * scale, fill=COLORS[labels[index]])
    draw_axes(draw, font, reach, to_pixels, pixels, scale)
    for label in labels.unique().tolist():
        x, y = pixels + 30 * scale, (40 + 34 * label) * scale
        draw_circle(draw, x, y, 9 * scale, fill=COLORS[label])
        draw.text((x + 20 * scale, y), str(label), "black", font, anchor="lm")
    return picture.resize((picture.width // scale, picture.height // scale), Image.Resampling.LANCZOS)


def draw_circle(draw, x, y, radius, **style):
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), **style)


def draw_axes(draw, font, reach, to_pixels, pixels, scale):
    """Draw the axes, their numbers, and circles at 1, 2 and 3 standard deviations of the prior."""
    middle, step = to_pixels(0), max(1, round(reach / 5))
    draw.line((0, middle, pixels, middle), "#c8c8c8", scale)
    draw.line((middle, 0, middle, pixels), "#c8c8c8", scale)
    for radius in (1, 2, 3):
        draw_circle(draw, middle, middle, to_pixels(radius) - middle, outline="#404040", width=scale)
    for value in range(step, int(0.95 * reach) + 1, step):  # a number at the very edge would be cut off
        for signed in (-value, value):
            draw.text((to_pixels(signed), pixels - 4 * scale), str(signed), "black", font, anchor="md")
            draw.text((4 * scale, to_pixels(-signed)), str(signed), "black", font, anchor="lm")
    draw.line((pixels, 0, pixels, pixels), "#c8c8c8", scale)


# A run and its data --------------------------------------------------------------------------------------------------

def find_run(path):
    """Return the folder for evaluation/, the file of the weights, and the run's settings (None where there is no run)."""
    path = Path(path)
    if path.is_dir():
        weights = path / "checkpoints" / WEIGHTS
        if not (path / "hparams.json").is_file():
            raise EvaluationError(f"{path} is no run's folder, for it has no hparams.json; name a folder that train.py made, "
                                  f"or a {WEIGHTS}")
        if not weights.is_file():
            raise EvaluationError(f"{path} has no checkpoints/{WEIGHTS} yet; train.py writes it at a run's beginning, so "
                                  f"name another run")
        return path, weights, read_settings(path / "hparams.json")
    if not path.is_file():
        raise EvaluationError(f"{path} is not there; name a run's folder, or a {WEIGHTS}")
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (run / "hparams.json").is_file():
        return run, path, read_settings(run / "hparams.json")
    return path.absolute().parent, path, None


def read_settings(path):
    """Return the settings in a run's hparams.json that matter here; raise EvaluationError where they make no sense."""
    try:
        settings = json.loads(path.read_bytes())
        settings = {**DEFAULTS, **settings}
        whole = (type(settings["z_dim"]) is int and settings["z_dim"] > 0 and settings["posterior"] in ENCODERS
                 and settings["networks"] in NETWORKS and settings["trained_on"] in ("mnist", "digits")
                 and isinstance(settings["data_dir"], str))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise EvaluationError(f"{path} is damaged, or not from train.py; copy the run's checkpoints/{WEIGHTS} to another "
                              f"folder and name the copy, whose settings follow from the weights")
    return settings


def read_weights(path):
    """Return the state_dict in a file, on the CPU; raise EvaluationError if it is none, or has NaN in it."""
    weights = read_packed(path)
    if not isinstance(weights, dict) or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        raise EvaluationError(f"{path} holds something else than a model's weights; name a {WEIGHTS}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise EvaluationError(f"{path} has weights that are NaN or infinite: its training has diverged; name another run")
    return weights


def settings_from_weights(path, weights):
    """Return the settings of a model without a run: its kind by the shapes of its weights, and MNIST."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    for posterior, networks in itertools.product(ENCODERS, NETWORKS):
        with contextlib.suppress(KeyError, IndexError):
            settings = {**DEFAULTS, "z_dim": shapes["discriminator.net.0.weight"][1], "posterior": posterior,
                        "networks": networks}
            with torch.device("meta"):  # shapes without memory
                model = build_model(settings["z_dim"], posterior, networks)
            if shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}:
                return settings
    raise EvaluationError(f"{path} has the weights of another model than models.AdversarialAE; name a {WEIGHTS} of train.py")


def load_model(path, weights, settings):
    """Return the model that a run's settings and weights make; raise EvaluationError where the two do not fit."""
    model = build_model(settings["z_dim"], settings["posterior"], settings["networks"])
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise EvaluationError(f"{path} does not fit a models.AdversarialAE with z_dim {settings['z_dim']}, "
                              f"{settings['posterior']} encoder and {settings['networks']} networks: hparams.json is another "
                              f"run's, or models.py has changed since; name another run") from None
    return model


def load_data(settings, data_dir=None):
    """Return the training images, test images and test labels of what a run was trained on."""
    if settings["trained_on"] == "digits":
        return load_digits(train=True)[0], *load_digits(train=False)
    root = data_dir or settings["data_dir"]
    return load_mnist(root, train=True)[0], *load_mnist(root, train=False)


# The command line ----------------------------------------------------------------------------------------------------

def main(args):
    """Evaluate as the flags say; return what metrics.json has.

    Raises EvaluationError, CheckpointError, ClassifierError, DataError or OSError for what the user can mend.
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
    say(describe(metrics))
    write_atomically(folder / "evaluation" / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    say(f"see: {folder / 'evaluation'}")
    return metrics


def describe(metrics):
    """Return what was measured as a table for people."""
    match, likelihood, quality = metrics["prior_match"], metrics["log_likelihood"], metrics["digit_classifier"]
    codes = [match[name] for name in ("codes", "training_codes", "prior_draws")]
    windows = [likelihood, likelihood["training_reconstructions"], likelihood["training_images"]]
    sets = [quality[name] for name in ("samples", "reconstructions", "training_images", "test_images")]
    name = "MNIST" if metrics["trained_on"] == "mnist" else "the bundled digits"
    row = lambda title, *cells: f"{title:<32}" + "".join(f"{cell:>17}" for cell in cells)
    span = lambda values: f"{min(values):.2f} to {max(values):.2f}"
    errors = metrics["reconstruction"]["mse_per_label"]
    return "\n".join([
        f"{metrics['weights']}: z_dim {metrics['z_dim']}, {metrics['posterior']} encoder, {metrics['networks']} networks, "
        f"{metrics['test_images']:,} test images of {name}, {metrics['seconds']:.0f} s on {metrics['device']}",
        "",
        row("codes against the prior", "test codes", "training codes", "prior draws"),
        row("  mean per dimension", *(span(own["mean"]) for own in codes)),
        row("  standard deviation", *(span(own["std"]) for own in codes)),
        row("  squared Frechet distance", *(f"{own['frechet']:.4f}" for own in codes)),
        row("  Kolmogorov-Smirnov distance", *(f"{own['ks']:.4f}" for own in codes)),
        row("  squared MMD", *(f"{own['mmd']:.6f}" for own in codes)),
        "",
        row("digit classifier's features", "samples", "reconstructions", "training images", "test images"),
        row("  squared Frechet distance", *(f"{own['frechet_to_test_images']:.2f}" for own in sets[:3]), "0"),
        row(f"  sure (probability >= {SURE})", *(f"{own['sure']:.1%}" for own in sets)),
        "",
        f"{'label':<25}{'all':>8}" + "".join(f"{label:>8}" for label in range(10)),
        f"{'  reconstruction error':<25}{metrics['reconstruction']['mse']:>8.4f}" +
        "".join(f"{errors[str(label)]:>8.4f}" if str(label) in errors else f"{'-':>8}" for label in range(10)),
        f"{'  share of samples':<33}" + "".join(f"{sets[0]['labels'][str(label)]:>8.1%}" for label in range(10)),
        f"{'  share of test images':<33}" + "".join(f"{sets[3]['labels'][str(label)]:>8.1%}" for label in range(10)),
        "",
        row("Parzen log-likelihood of", "", "reconstructed", ""),
        row("the test images, windows around", "samples", "training images", "training images"),
        row("  nats", *(f"{own['mean']:.1f} +- {own['standard_error']:.1f}" for own in windows)),
        row("  sigma", *(f"{own['sigma']:.3f}" for own in windows)),
        row("  number of windows", *(f"{own['samples']:,}" for own in windows))])


def make_parser():
    """Return the parser of the command line."""
    parser = OneLineParser(description="Measure how good a trained model is.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help=f"folder of a run of train.py, or a {WEIGHTS}")
    parser.add_argument("--data_dir", help="folder where MNIST is, or is downloaded to (default: the run's, or ../data/)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of every random draw (default: 0)")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA where there is one")
    return parser


def cli(argv=None):
    """Run `main` from the command line and return the exit status; what the user can mend is said in one sentence."""
    try:
        main(make_parser().parse_args(argv))
        return 0
    except KeyboardInterrupt:
        say("\ninterrupted", sys.stderr)
        return 130
    except Exception as error:
        explain("evaluate.py", error, (CheckpointError, ClassifierError, DataError, EvaluationError),
                "try --no-cuda, or end other programs")
        return 1


if __name__ == "__main__":
    sys.exit(cli())
