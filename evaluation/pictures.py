"""Pictures of a trained model: samples, reconstructions, interpolations, and two-dimensional codes, decoded."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_pil_image

from evaluation.measures import draw_samples
from evaluation.metrics import squared_distances
from training.model import evaluation_mode
from utils import image_grid


def draw_pictures(model, train_images, test_images, test_labels, seed=0):
    """Return the pictures of a model as a dict of file names to PIL images."""
    with evaluation_mode(model):
        samples = draw_samples(model, 64, seed)
        torch.manual_seed(seed)
        found = [(test_labels == label).nonzero()[:4, 0] for label in test_labels.unique()]
        first = torch.stack([indices[:min(map(len, found))] for indices in found], 1)  # four of each label, [4, 10]
        shown = test_images[first].to(model.device)
        reconstructed = torch.cat([images for row in shown for images in (row, model(row)[0])])
        pictures = {"samples.png": grid(samples, 8),
                    "nearest.png": grid(torch.cat([samples[:8], nearest(samples[:8], train_images)]), 8),
                    "reconstructions.png": grid(reconstructed, shown.shape[1]),
                    "interpolations.png": draw_interpolations(model, shown[0])}
        if model.z_dim == 2:
            pictures["manifold.png"] = draw_manifold(model)
    return pictures


def grid(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture, enlarged by a factor of two."""
    return ImageOps.scale(to_pil_image(image_grid(images, columns)), 2, Image.Resampling.NEAREST)


def nearest(samples, train_images):
    """Return for each sample the training image with the smallest squared distance."""
    distances = torch.cat(list(squared_distances(samples, train_images)))
    return train_images[distances.argmin(0).to(train_images.device)].to(samples)


def draw_interpolations(model, images, steps=10):
    """Return a picture with a row for each of images [L, 1, 28, 28]: it, `steps` decoded codes, the next image."""
    _, codes = model(images)
    fractions, rows = torch.linspace(0, 1, steps, device=codes.device), []
    for start, end, code, target in zip(images, images.roll(-1, 0), codes, codes.roll(-1, 0), strict=True):
        rows += [start[None], model.decoder(interpolate(code, target, fractions)), end[None]]
    return grid(torch.cat(rows), steps + 2)


def interpolate(start, end, fractions):
    """Return codes [N, z_dim] at fractions [N] of the way from one code [z_dim] to another: spherical interpolation."""
    # Direction (Shoemake 1985, "Animating rotation with quaternion curves") and norm change at constant speed: a
    # straight line between two samples of N(0, I), whose norms are near sqrt(z_dim), passes through rare norms.
    fractions, directions = fractions[:, None], (F.normalize(start, dim=0), F.normalize(end, dim=0))
    angle = (directions[0] @ directions[1]).clamp(-1, 1).acos()
    if angle.sin() < 1e-3:  # equal or opposite directions, for which the path is not unique
        return torch.lerp(start, end, fractions)
    shares = ((1 - fractions) * angle).sin(), (fractions * angle).sin()
    direction = (shares[0] * directions[0] + shares[1] * directions[1]) / angle.sin()
    return torch.lerp(start.norm(), end.norm(), fractions) * direction


def draw_manifold(model, side=20):
    """Return a picture of codes at the prior's quantiles (i + 1/2) / side, decoded; z_dim is 2."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    codes = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)  # row by row, from the top
    return grid(model.decoder(codes.to(model.device)), side)
