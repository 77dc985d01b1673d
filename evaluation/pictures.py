"""Pictures of a trained model: samples, reconstructions, interpolations, and a two-dimensional latent space."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import to_pil_image

from evaluation.measures import draw_samples
from evaluation.metrics import squared_distances
from evaluation.monitoring import reconstruct
from training.model import evaluation_mode
from utils import image_grid

COLORS = ("#1f5fbf", "#f28e1c", "#2f9e44", "#d62f2f", "#8250c4", "#8a5a3c", "#e873b8", "#7a7a7a", "#b5b31a", "#17b0c4")


def draw_pictures(model, train_images, test_images, test_labels, seed=0):
    """Return the pictures of a model as a dict of file names to PIL images."""
    with evaluation_mode(model):
        torch.manual_seed(seed)
        samples = draw_samples(model, 64, seed)
        shown = test_images[first_of_each_label(test_labels)].to(model.device)
        reconstructed = torch.cat([images for row in shown for images in (row, model(row)[0])])
        pictures = {"samples.png": grid(samples, 8),
                    "nearest.png": grid(torch.cat([samples[:8], nearest(samples[:8], train_images)]), 8),
                    "reconstructions.png": grid(reconstructed, shown.shape[1]),
                    "interpolations.png": draw_interpolations(model, shown[0])}
        if model.z_dim == 2:
            pictures["manifold.png"] = draw_manifold(model)
            _, codes = reconstruct(model, test_images.to(model.device))
            pictures["codes.png"] = draw_codes(codes.cpu(), test_labels.cpu())
    return pictures


def grid(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture, enlarged by a factor of two."""
    return ImageOps.scale(to_pil_image(image_grid(images, columns)), 2, Image.Resampling.NEAREST)


def nearest(samples, train_images):
    """Return for each sample the training image with the smallest squared distance."""
    distances = torch.cat(list(squared_distances(samples, train_images)))
    return train_images[distances.argmin(0).to(train_images.device)].to(samples)


def first_of_each_label(labels, count=4):
    """Return the indices [count, L] of the first images of each of L labels; if there are too few, repeat the last."""
    indices = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    return torch.stack([found[torch.arange(count).clamp(max=len(found) - 1)] for found in indices], 1)


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
    """Return a picture of codes at the prior's quantiles (i + 1/2) / side, decoded; the axes are those of codes.png."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    codes = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)  # row by row, from the top
    return grid(model.decoder(codes.to(model.device)), side)


def draw_codes(codes, labels):
    """Return a picture of codes [N, 2], coloured by label [N]; drawn twice as large, for smooth edges."""
    reach, pixels = max(4.0, 1.05 * codes.abs().max().item()), 1600

    def to_pixels(value):
        return (value / reach + 1) / 2 * pixels

    picture = Image.new("RGB", (pixels + 220, pixels), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(36)
    points = to_pixels(codes.double() * torch.tensor([1, -1])).tolist()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))  # so that no label hides the others
    for index in order.tolist():
        draw.circle(points[index], 4.4, COLORS[labels[index]])
    middle, step = to_pixels(0), max(1, round(reach / 5))
    for line in ((0, middle, pixels, middle), (middle, 0, middle, pixels), (pixels, 0, pixels, pixels)):
        draw.line(line, "#c8c8c8", 2)
    for radius in (1, 2, 3):  # standard deviations of the prior
        draw.circle((middle, middle), to_pixels(radius) - middle, outline="#404040", width=2)
    for value in range(step, int(0.95 * reach) + 1, step):  # a number at the very edge would be cut off
        for signed in (-value, value):
            draw.text((to_pixels(signed), pixels - 8), str(signed), "black", font, anchor="md")
            draw.text((8, to_pixels(-signed)), str(signed), "black", font, anchor="lm")
    for label in labels.unique().tolist():
        x, y = pixels + 60, 80 + 68 * label
        draw.circle((x, y), 18, COLORS[label])
        draw.text((x + 40, y), str(label), "black", font, anchor="lm")
    return ImageOps.scale(picture, 1 / 2, Image.Resampling.LANCZOS)
