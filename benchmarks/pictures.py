"""The pictures of docs/results/ that are made from the folder of a run, by matplotlib; results.py writes them."""

import numpy as np
import torch
from PIL import Image

from benchmarks.plots import ORANGE, plt, save
from evaluation.model_files import load_images, load_run
from training.model import evaluation_mode
from training.monitoring import reconstruct
from utils import image_grid

SAMPLES = "results/Prior_samples/samples_epoch_{}.png"
SHOWN = (0, 20, 50, 100)  # epochs of a run's picture
STRIP, STRIP_EPOCHS, STRIP_SAMPLES = "z8", (0, 1, 5, 20, 100), 16  # run, epochs and samples of strip.png
STEPS, LABELS = 12, (2, 5, 7)  # images in a row of interpolations.png, and the first labels of the rows shown
CELL = 30  # pixels from one image to the next in a run's pictures, which have a border of 2
REACH, SIDE = 4, 20  # of the codes that are shown, in standard deviations of the prior; decoded codes a side
COLORS = ("#ffa90e", "#717581", "#bd1f01", "#3f90da", "#832db6", "#a96b59", "#94a4a2", "#b9ac70", "#e76300",
          "#92dadd")  # of the labels: ten that colour-blind readers can tell apart (Petroff, arXiv:2107.02270)


def draw_run(name, run, data_dir, folder):
    """Write the pictures of a finished run into a folder."""
    save(draw_progress(run), folder / f"{name}.png")
    if name == STRIP:
        save(draw_strip(run), folder / "strip.png")
    model, settings, *_ = load_run(run)
    if model.z_dim == 2:
        save(draw_codes(model, *load_images(settings, data_dir)[1:]), folder / f"{name}-codes.png")


def pixels(file):
    return np.asarray(Image.open(file).convert("L"))


def tiles(picture, indices):
    """Return those of the images in a picture of image_grid side by side, [CELL, CELL * N]."""
    columns = picture.shape[1] // CELL
    corners = [(CELL * (index // columns) + 1, CELL * (index % columns) + 1) for index in indices]
    return np.concatenate([picture[y:y + CELL, x:x + CELL] for y, x in corners], 1)


def show(panel, picture):
    panel.imshow(picture, cmap="gray", vmin=0, vmax=255)
    panel.set(xticks=[], yticks=[], anchor="N")
    panel.spines[:].set_visible(False)
    panel.grid(False)


def draw_progress(run):
    """Return a figure of the samples of a run over its reconstructions, side by side after the epochs SHOWN."""
    figure, panels = plt.subplots(2, 4, figsize=(10, 4.2), height_ratios=(242, 62), width_ratios=(1, 4, 4, 4))
    for epoch, (above, below) in zip(SHOWN, panels.T, strict=True):
        above.set_title(f"epoch {epoch}")
        show(above, pixels(run / SAMPLES.format(epoch)))
        show(below, pixels(run / f"results/Reconstruction/reconstruction_{epoch}.png"))
    return figure


def draw_strip(run):
    """Return a figure of samples of the same codes, a row an epoch, over interpolations between test images."""
    figure, panels = plt.subplots(2, figsize=(9.2, 4.6), height_ratios=(5 / 16, 3 / 12), layout="compressed")
    samples = [pixels(run / SAMPLES.format(epoch)) for epoch in STRIP_EPOCHS]
    show(panels[0], np.concatenate([tiles(picture, range(STRIP_SAMPLES)) for picture in samples]))
    panels[0].set_yticks([CELL * (row + 0.5) for row in range(len(STRIP_EPOCHS))],
                         [f"epoch {epoch}" for epoch in STRIP_EPOCHS])
    paths = pixels(run / "evaluation" / "interpolations.png")[::2, ::2]  # they are twice as large
    show(panels[1], np.concatenate([tiles(paths, range(STEPS * label, STEPS * (label + 1))) for label in LABELS]))
    panels[1].set_yticks([CELL * 1.5], ["from one\ntest image\nto another"])
    return figure


@torch.no_grad()
def draw_codes(model, images, labels):
    """Return a figure of the codes of images by label, beside the decoded codes of the same square."""
    steps = REACH * ((torch.arange(SIDE) + 0.5) / SIDE * 2 - 1)
    shown = torch.cartesian_prod(steps.flip(0), steps).flip(1)  # row by row, from the top
    with evaluation_mode(model):
        _, codes = reconstruct(model, images)
        manifold = image_grid(model.decoder(shown), SIDE)[0]
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 5.1), sharey=True, layout="compressed")
    panels[0].set(title="codes of test images, by label", ylabel="second code dimension")
    panels[1].set_title("decoded codes; circles: 1, 2, 3 σ of the prior")
    panels[1].imshow(manifold, cmap="gray", extent=(-REACH, REACH, -REACH, REACH))
    for panel, color in zip(panels, ("black", ORANGE), strict=True):
        for radius in (1, 2, 3):
            panel.add_patch(plt.Circle((0, 0), radius, fill=False, color=color, linewidth=1.2))
        panel.grid(False)
        panel.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xlabel="first code dimension")
    scatter(panels[0], codes, labels, 3.5)
    if (codes.abs().amax(1) <= REACH).double().mean() > 0.5:
        name_clouds(panels[0], codes, labels)
    else:  # all codes at their own scale
        inset = panels[0].inset_axes((0.44, 0.44, 0.56, 0.56), xticks=[], yticks=[])
        scatter(inset, codes, labels, 1.5)
        name_clouds(inset, codes, labels)
        inset.set_title(f"all codes, ±{codes.abs().max():,.0f}", y=0.88)
        inset.spines[:].set_visible(True)
    return figure


def scatter(panel, codes, labels, size):
    """Draw codes [N, 2] in the colours of their labels."""
    panel.scatter(*codes.T.numpy(), s=size, c=[COLORS[label] for label in labels.tolist()], linewidths=0)


def name_clouds(panel, codes, labels):
    """Write each label at the median of its codes [N, 2], as colours alone do not tell ten labels apart."""
    for label in labels.unique().tolist():
        panel.text(*codes[labels == label].median(0).values.tolist(), str(label), size=11, weight="bold",
                   ha="center", va="center", bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white",
                                                   "edgecolor": COLORS[label], "linewidth": 2})
