"""The pictures of docs/results/ that are made from the folder of a run; results.py writes them."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads there what it sets)

# isort: split

import matplotlib.pyplot as plt
import plots
import torch
from matplotlib import font_manager
from PIL import Image, ImageColor, ImageDraw, ImageFont

from evaluation.model_files import find_run, load_data, load_model, read_weights
from evaluation.monitoring import reconstruct
from training.files import png_bytes
from training.random_state import evaluation_mode

STRIP = "z8"  # the run of strip.png
SHOWN = (20, 50, 100)  # epochs of a run's picture, beside a thumbnail of epoch 0
STRIP_EPOCHS, STRIP_SAMPLES = (0, 1, 5, 20, 100), 16
INTERPOLATIONS = (2, 5, 7)  # rows of interpolations.png: from this label to the next
CELL = 30  # pixels from one image to the next in the pictures of image_grid, which have a border of 2
COLUMN = 10 * CELL + 2  # pixels across the reconstructions
REACH, SIDE = 4, 20  # of the codes that are shown, in standard deviations of the prior; decoded codes a side
COLORS = ("#ffa90e", "#717581", "#bd1f01", "#3f90da", "#832db6", "#a96b59", "#94a4a2", "#b9ac70", "#e76300",
          "#92dadd")  # of the labels: ten that colour-blind readers can tell apart (Petroff, arXiv:2107.02270)


def draw_run(name, run, data_dir):
    """Return the pictures of a finished run, a dict of file names to the bytes of PNG files."""
    pictures = {f"{name}.png": png_bytes(draw_progress(run))}
    if name == STRIP:
        pictures["strip.png"] = png_bytes(draw_strip(run))
    folder, path, settings = find_run(run)
    if settings["z_dim"] == 2:
        model = load_model(path, read_weights(path), settings)
        _, images, labels = load_data(settings, data_dir)
        pictures[f"{name}-codes.png"] = plots.small_png(draw_codes(model, images, labels), palette())
    return pictures


# Progress ------------------------------------------------------------------------------------------------------------

def draw_progress(run):
    """Return the samples of a run over its reconstructions, side by side after the epochs SHOWN that it has."""
    columns = [(epoch, samples_after(run, epoch), picture(run, f"Reconstruction/reconstruction_{epoch}.png"))
               for epoch in SHOWN if (run / f"results/Reconstruction/reconstruction_{epoch}.png").is_file()]
    small, gap, top = COLUMN // 4, 10, 26
    width, height = small + len(columns) * (COLUMN + gap), top + COLUMN + gap + columns[0][2].height
    page = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(page), letters(17)
    draw.text((0, 2), "epoch 0", 0, font)
    page.paste(samples_after(run, 0).resize((small, small), Image.Resampling.LANCZOS), (0, top))
    for index, (epoch, samples, pairs) in enumerate(columns):
        x = small + gap + index * (COLUMN + gap)
        draw.text((x, 2), f"epoch {epoch}", 0, font)
        page.paste(samples.resize((COLUMN, COLUMN), Image.Resampling.LANCZOS), (x, top))
        page.paste(pairs, (x, top + COLUMN + gap))
    return page.quantize(24)


def samples_after(run, epoch):
    return picture(run, f"Prior_samples/samples_epoch_{epoch}.png")


def picture(run, name):
    return Image.open(run / "results" / name).convert("L")


def letters(size):
    """Return the font of the plots."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


# Strip ---------------------------------------------------------------------------------------------------------------

def draw_strip(run, side=51, left=104):
    """Return samples of the same codes, a row for each of STRIP_EPOCHS, over interpolations between test images."""
    width, font = left + STRIP_SAMPLES * side, letters(17)
    paths = Image.open(run / "evaluation" / "interpolations.png").convert("L")
    paths = paths.resize((paths.width // 2, paths.height // 2), Image.Resampling.NEAREST)  # they are twice as large
    steps = paths.width // CELL
    large, middle = STRIP_SAMPLES * side // steps, len(STRIP_EPOCHS) * side + 14
    page = Image.new("L", (width, middle + len(INTERPOLATIONS) * large), 255)
    draw = ImageDraw.Draw(page)
    for row, epoch in enumerate(STRIP_EPOCHS):
        draw.text((0, (row + 0.5) * side), f"epoch {epoch}", 0, font, anchor="lm")
        paste_tiles(page, samples_after(run, epoch), range(STRIP_SAMPLES), side, (left, row * side))
    draw.text((0, middle + len(INTERPOLATIONS) * large / 2), "from one\ntest image\nto another", 0, font, anchor="lm")
    for row, label in enumerate(INTERPOLATIONS):
        paste_tiles(page, paths, range(label * steps, (label + 1) * steps), large, (left, middle + row * large))
    return page.quantize(24)


def paste_tiles(page, grid, indices, side, corner):
    """Paste images of a picture of image_grid next to each other, each `side` pixels across with its border."""
    columns = grid.width // CELL
    for place, index in enumerate(indices):
        x, y = CELL * (index % columns) + 1, CELL * (index // columns) + 1
        tile = grid.crop((x, y, x + CELL, y + CELL)).resize((side, side), Image.Resampling.LANCZOS)
        page.paste(tile, (corner[0] + place * side, corner[1]))


# Codes of 2 dimensions -----------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_codes(model, images, labels):
    """Return a figure of the codes of images by label, beside the decoded codes of the same square."""
    with evaluation_mode(model):
        _, codes = reconstruct(model, images)
        manifold = decoded_square(model)
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 5.1), dpi=100, sharey=True, layout="none")
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.12, top=0.92, wspace=0.08)
    panels[0].set(title="codes of test images, by label", ylabel="second code dimension")
    scatter(panels[0], codes, labels, REACH)
    panels[1].set_title("decoded codes; circles: 1, 2, 3 σ of the prior")
    panels[1].imshow(manifold, cmap="gray", extent=(-REACH, REACH, -REACH, REACH), interpolation="antialiased")
    for panel, color in zip(panels, ("black", plots.ORANGE), strict=True):
        for radius in (1, 2, 3):
            panel.add_patch(plt.Circle((0, 0), radius, fill=False, color=color, linewidth=1.2))
        panel.grid(False)
        panel.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal",
                  xlabel="first code dimension", xticks=range(-REACH, REACH + 1, 2), yticks=range(-REACH, REACH + 1, 2))
    if (codes.abs().amax(1) > REACH).double().mean() > 0.5:
        draw_all(panels[0], codes, labels)
    return figure


def decoded_square(model):
    """Return the images of SIDE x SIDE codes, each at the middle of its part of the square, as one [H, W] in [0, 1]."""
    steps = REACH * ((torch.arange(SIDE) + 0.5) / SIDE * 2 - 1)
    second, first = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    images = model.decoder(torch.stack([first, second], -1).view(-1, 2).to(model.device)).cpu()
    return ((images.view(SIDE, SIDE, 28, 28).permute(0, 2, 1, 3).reshape(SIDE * 28, SIDE * 28) + 1) / 2).numpy()


def scatter(panel, codes, labels, reach, size=3.5):
    """Draw codes [N, 2] in the colours of their labels, and each label as a number near the median of its codes."""
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))  # so that no label hides the others
    panel.scatter(*codes[order].T.numpy(), s=size, c=[COLORS[label] for label in labels[order].tolist()], linewidths=0)
    digits = labels.unique().tolist()
    places = moved_apart(torch.stack([codes[labels == digit].median(0).values for digit in digits]), 0.14 * reach)
    for digit, place in zip(digits, places.tolist(), strict=True):
        if max(map(abs, place)) < reach:
            panel.text(*place, str(digit), ha="center", va="center", fontweight="bold", fontsize=11,
                       bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": COLORS[digit],
                             "linewidth": 2})


def moved_apart(points, distance):
    """Return points [N, 2], moved apart until hardly any two are closer to each other than `distance`."""
    for _ in range(100):
        gaps = points[:, None] - points
        lengths = gaps.norm(dim=2, keepdim=True).clamp(min=1e-6)
        points = points + (gaps / lengths * (distance - lengths).clamp(min=0) / 2).sum(1)
    return points


def draw_all(panel, codes, labels):
    """Draw all codes at their own scale into the upper right corner of a panel, most of which lie outside it."""
    reach = float(f"{1.05 * codes.abs().max().item():.2g}")
    inset = panel.inset_axes((0.44, 0.44, 0.56, 0.56))
    scatter(inset, codes, labels, reach, 1.5)
    inset.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    inset.text(0.5, 0.97, f"all codes, ±{reach:,.0f}", transform=inset.transAxes, ha="center", va="top")
    inset.spines[:].set_visible(True)


def palette():
    """Return an image with the colours of `draw_codes`: greys, the labels' colours, and the circles', with tints."""
    tints = [tuple(round(255 + share * (part - 255)) for part in ImageColor.getrgb(color))
             for color in COLORS for share in (0.25, 0.5, 0.75, 1)]
    shades = [tuple(round(share * part) for part in ImageColor.getrgb(plots.ORANGE)) for share in (0.33, 0.67, 1)]
    greys = [(level, level, level) for level in range(0, 256, 17)]
    image = Image.new("P", (1, 1))
    image.putpalette([part for color in (*greys, *tints, *shades) for part in color])
    return image
