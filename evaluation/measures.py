"""The measures of a trained model: reconstructions, match of the prior, samples, log-likelihood."""

import torch

from evaluation import metrics
from evaluation.classifier import BATCH, features_and_probabilities, load_classifier
from training.cli import UserError
from training.model import evaluation_mode
from training.monitoring import ks_distance, reconstruct

SAMPLES = 10_000       # drawn for the log-likelihood and the classifier
SIGMA_IMAGES = 1_000   # the last training images, on which the Parzen window's sigma is chosen
SEEN_IMAGES = 10_000   # of the other training images, as a comparison: images that the model has seen
CONFIDENCE = 0.95      # of the classifier; the share of images that reach it is reported


def evaluate(model, train_images, test_images, test_labels, seed=0):
    """Return all measures of a models.AdversarialAE, as nested dicts of numbers that json can write.

    Its modes and random states are restored. Images are [N, 1, 28, 28] in [-1, 1], labels [N] from 0 to 9. Raises
    UserError if the model returns NaN or infinity.
    """
    with evaluation_mode(model):
        torch.manual_seed(seed)
        test_images = test_images.to(model.device)
        seen, held_out = (part.to(model.device) for part in split_training_images(train_images))
        reconstructions, codes = reconstruct(model, test_images)
        seen_reconstructions, seen_codes = reconstruct(model, seen)
        samples = draw_samples(model, SAMPLES, seed)
        if not all(outputs.isfinite().all() for outputs in (codes, reconstructions, samples)):
            raise UserError("the model's outputs are NaN or infinite: its training has diverged; evaluate another run")
        sets = {"samples": samples, "training_reconstructions": seen_reconstructions, "training_images": seen}
        likelihood = {name: log_likelihood(images, held_out, test_images) for name, images in sets.items()}
        return {"test_images": len(test_images),
                "reconstruction": reconstruction_errors(reconstructions, test_images, test_labels),
                "prior_match": prior_match(codes, seen_codes, seed),
                "log_likelihood": {**likelihood.pop("samples"), **likelihood},
                "digit_classifier": classifier_quality({**sets, "test_images": test_images})}


def split_training_images(images):
    """Return at most SEEN_IMAGES evenly spaced training images, and the last SIGMA_IMAGES (at most half)."""
    last = min(SIGMA_IMAGES, len(images) // 2)
    rest = images[:-last]  # of MNIST, 10,000 in a row do not represent 50,000, see docs/EXPERIMENTS.md
    return rest[::max(1, len(rest) // SEEN_IMAGES)][:SEEN_IMAGES], images[-last:]


def draw_samples(model, count, seed):
    """Return `count` samples of a model; equal seeds give equal ones. Call it within `evaluation_mode`."""
    torch.manual_seed(seed)
    return torch.cat([model.sample(min(BATCH, count - done)) for done in range(0, count, BATCH)])


def reconstruction_errors(reconstructions, images, labels):
    """Return the mean squared error over images and pixels (in [-1, 1]), for all images and for each label."""
    errors = (reconstructions - images).square().flatten(1).mean(1).double().cpu()
    per_label = {str(label): errors[labels.cpu() == label].mean().item() for label in labels.unique().tolist()}
    return {"mse": errors.mean().item(), "mse_per_label": per_label}


def prior_match(codes, seen_codes, seed):
    """Return how far codes of test and training images are from the prior [N, z_dim], and so are N prior samples."""
    generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not the seed of the directions in ks_distance
    _, perfect = torch.randn(2, *codes.shape, generator=generator).to(codes.device)
    sets = {"codes": codes, "training_codes": seen_codes, "prior_draws": perfect}
    return {name: {"mean": codes.double().mean(0).tolist(), "std": codes.double().std(0).tolist(),
                   "ks": ks_distance(codes)}
            for name, codes in sets.items()}


def log_likelihood(samples, held_out, images):
    """Return the Parzen log-likelihood of images in nats, with the best sigma for `held_out`; all are in [-1, 1]."""
    samples, held_out, images = ((part + 1) / 2 for part in (samples, held_out, images))
    sigma = metrics.choose_sigma(samples, held_out)
    values = metrics.parzen_log_likelihood(metrics.squared_distances(samples, images), images[0].numel(), sigma)
    return {"mean": values.mean().item(), "standard_error": values.std().item() / len(values)**0.5, "sigma": sigma,
            "samples": len(samples), "sigma_images": len(held_out)}


def classifier_quality(sets):
    """Return the digit classifier's measures of named sets of images [N, 1, 28, 28], one of them test_images."""
    classifier = load_classifier(sets["test_images"].device)
    results = {name: features_and_probabilities(classifier, images) for name, images in sets.items()}
    quality = {"sure_from_probability": CONFIDENCE}
    for name, (features, probabilities) in results.items():
        shares = probabilities.argmax(1).bincount(minlength=10).double() / len(probabilities)  # of predicted labels
        distance = metrics.frechet(features, results["test_images"][0])
        quality[name] = {"images": len(features), "frechet_to_test_images": distance,
                         "sure": (probabilities.amax(1) >= CONFIDENCE).double().mean().item(),
                         "labels": {str(label): share for label, share in enumerate(shares.tolist())}}
    del quality["test_images"]["frechet_to_test_images"]  # a set's distance to itself
    return quality
