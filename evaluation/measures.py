"""The measures of a trained model: reconstructions, match of the prior, samples, log-likelihood."""

import torch

from evaluation import metrics
from evaluation.classifier import BATCH, features_and_probabilities, load_classifier
from evaluation.monitoring import ks_distance, reconstruct
from training.cli import UserError
from training.random_state import evaluation_mode

SAMPLES = 10_000       # drawn for the log-likelihood and the classifier
SIGMA_IMAGES = 1_000   # the last training images, on which the Parzen window's sigma is chosen
SEEN_IMAGES = 10_000   # of the other training images, as a comparison: images that the model has seen
CONFIDENCE = 0.95      # of the classifier; the share of images that reach it is reported


def evaluate(model, train_images, test_images, test_labels, seed=0, progress=lambda stage: None):
    """Return all measures of a model, as nested dicts of numbers that json can write.

    `model` is a models.AdversarialAE, whose modes and random states are restored; images are [N, 1, 28, 28] in [-1, 1],
    labels [N] from 0 to 9. `progress` is called with the name of each stage when it begins. Raises UserError if the
    model returns NaN or infinity.
    """
    with evaluation_mode(model):
        torch.manual_seed(seed)
        progress("reconstructions")
        test_images = test_images.to(model.device)
        seen, held_out = (part.to(model.device) for part in split_training_images(train_images))
        reconstructions, codes = reconstruct(model, test_images)
        seen_reconstructions, seen_codes = reconstruct(model, seen)
        progress("samples")
        samples = draw_samples(model, SAMPLES, seed)
        if not all(outputs.isfinite().all() for outputs in (codes, reconstructions, samples)):
            raise UserError("the model's codes, reconstructions or samples are NaN or infinite: its training has "
                            "diverged; evaluate another run")
        reconstruction = reconstruction_errors(reconstructions, test_images, test_labels)
        progress("prior match")
        match = prior_match({"codes": codes, "training_codes": seen_codes}, seed)
        sets = {"samples": samples, "training_reconstructions": seen_reconstructions, "training_images": seen}
        progress("log-likelihood")
        likelihood = {name: log_likelihood(images, held_out, test_images) for name, images in sets.items()}
        progress("digit classifier")
        quality = classifier_quality({**sets, "test_images": test_images})
    return {"test_images": len(test_images), "reconstruction": reconstruction, "prior_match": match,
            "log_likelihood": {**likelihood.pop("samples"), **likelihood}, "digit_classifier": quality}


def split_training_images(images):
    """Return at most SEEN_IMAGES evenly spaced training images, and the last SIGMA_IMAGES (at most half).

    Of MNIST, the former are every fifth of 50,000: 10,000 in a row do not represent the rest, see docs/EXPERIMENTS.md.
    """
    last = min(SIGMA_IMAGES, len(images) // 2)
    rest = images[:-last]
    return rest[::max(1, len(rest) // SEEN_IMAGES)][:SEEN_IMAGES], images[-last:]


def draw_samples(model, count, seed):
    """Return `count` samples of a model; equal seeds give equal samples."""
    model.sample_stream.manual_seed(seed)
    return torch.cat([model.sample(min(BATCH, count - done)) for done in range(0, count, BATCH)])


def reconstruction_errors(reconstructions, images, labels):
    """Return the mean squared error over images and pixels (in [-1, 1]), for all images and for each label."""
    errors = (reconstructions - images).square().flatten(1).mean(1).double().cpu()
    per_label = {str(label): errors[labels.cpu() == label].mean().item() for label in labels.unique().tolist()}
    return {"mse": errors.mean().item(), "mse_per_label": per_label}


def prior_match(sets, seed):
    """Return how far each named set of codes [N, z_dim] is from the prior, and so are N prior samples, prior_draws."""
    first = next(iter(sets.values()))
    generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not the seed of the directions in ks_distance
    _, perfect = torch.randn(2, *first.shape, generator=generator).to(first.device)
    return {name: {"mean": codes.double().mean(0).tolist(), "std": codes.double().std(0).tolist(),
                   "frechet": metrics.frechet_to_prior(codes), "ks": ks_distance(codes),
                   "two_sample_accuracy": metrics.two_sample_accuracy(codes, seed)}
            for name, codes in {**sets, "prior_draws": perfect}.items()}


def log_likelihood(samples, held_out, images):
    """Return the Parzen log-likelihood of images in nats, with the best sigma for `held_out`; all are in [-1, 1]."""
    samples, held_out, images = ((part + 1) / 2 for part in (samples, held_out, images))
    sigma = metrics.choose_sigma(samples, held_out)
    values = metrics.parzen_log_likelihood(samples, images, sigma)
    return {"mean": values.mean().item(), "standard_error": values.std().item() / len(values)**0.5, "sigma": sigma,
            "samples": len(samples), "sigma_images": len(held_out)}


def classifier_quality(sets):
    """Return the digit classifier's measures of named sets of images [N, 1, 28, 28], one of them named test_images.

    They are the squared Frechet distance of the features to those of the test images, the share of images with a
    confidence of at least CONFIDENCE, and the share of each predicted label.
    """
    classifier = load_classifier(sets["test_images"].device)
    results = {name: features_and_probabilities(classifier, images) for name, images in sets.items()}
    test_features, _ = results["test_images"]
    quality = {"sure_from_probability": CONFIDENCE}
    for name, (features, probabilities) in results.items():
        shares = probabilities.argmax(1).bincount(minlength=10).double() / len(probabilities)
        quality[name] = {"images": len(features), "frechet_to_test_images": metrics.frechet(features, test_features),
                         "sure": (probabilities.amax(1) >= CONFIDENCE).double().mean().item(),
                         "labels": {str(label): share for label, share in enumerate(shares.tolist())}}
    del quality["test_images"]["frechet_to_test_images"]  # a set's distance to itself
    return quality
