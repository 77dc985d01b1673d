"""The pictures of docs/results/ that are made from a finished run's folder; results.py writes them."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from plots import small_png

from evaluation.model_files import find_run, load_model, read_weights
from mnist import load_mnist
from runs.files import image_grid, png_bytes

PITCH = 30     # pixels from one image of a grid of train.py to the next: 28, and 2 between them
SHOWN = (0, 20, 50, 100)   # epochs of a run's own picture
STRIP = (0, 1, 5, 20, 100)
REACH = 4      # of the plane that is shown of two dimensions, in standard deviations of the prior
DIGITS = ("#4477AA", "#EE7733", "#228833", "#CCBB44", "#AA3377", "#999999", "#66CCEE", "#882255", "#000000", "#EE6677")


def draw_run(name, run, data_dir):
    """Return the pictures of a finished run as the content of PNG files, by their names."""
    pictures = {f"{name}.png": png_bytes(progress(run))}
    if name == "z8":
        pictures["strip.png"] = png_bytes(strip(run))
    if find_run(run)[2]["z_dim"] == 2:
        pictures[f"{name}-codes.png"] = codes_and_plane(run, data_dir)
    return pictures


def read_grid(run, epoch, kind="samples"):
    """Return a grid of a run's results/ as a grey picture; None where the run has no such epoch."""
    file = run / "results" / {"samples": f"Prior_samples/samples_epoch_{epoch}.png",
                              "reconstructions": f"Reconstruction/reconstruction_{epoch}.png"}[kind]
    return Image.open(file).convert("L") if file.is_file() else None


def progress(run):
    """Return a run's samples above its reconstructions, a column for each of the epochs SHOWN; of epoch 0 a corner."""
    columns = {epoch: [read_grid(run, epoch, kind) for kind in ("samples", "reconstructions")] for epoch in SHOWN}
    columns = {epoch: grids for epoch, grids in columns.items() if all(grids)}
    columns[0] = [grid.crop((0, 0, 4 * PITCH + 2, min(grid.height, 4 * PITCH + 2))) for grid in columns[0]]
    width = sum(max(grid.width for grid in grids) for grids in columns.values()) + 12 * (len(columns) - 1)
    top = 26 + max(samples.height for samples, _ in columns.values())
    picture, left = Image.new("L", (width, top + 70), 255), 0
    for epoch, (samples, pairs) in columns.items():
        ImageDraw.Draw(picture).text((left, 2), f"epoch {epoch}", 0, ImageFont.load_default(17))
        picture.paste(samples, (left, 26))
        picture.paste(pairs, (left, top + 8))
        left += max(samples.width, pairs.width) + 12
    return picture.quantize(16)


def strip(run):
    """Return the first 16 samples in a row for each of the epochs STRIP, and under them three interpolations."""
    rows = [(f"epoch {epoch}" if epoch else "before training", two_rows_as_one(read_grid(run, epoch)))
            for epoch in STRIP]
    between = Image.open(run / "evaluation" / "interpolations.png").convert("L").reduce(2)
    rows += [("interpolations" * (index == 1), between.crop((0, index * PITCH, between.width, (index + 1) * PITCH)))
             for index in range(3)]
    left, pitch, font = 170, round(1.5 * PITCH), ImageFont.load_default(20)
    picture = Image.new("L", (left + 16 * pitch, len(rows) * (pitch + 2) + 12), 255)
    for index, (name, row) in enumerate(rows):
        y = index * (pitch + 2) + 12 * (index >= len(STRIP))
        ImageDraw.Draw(picture).text((left - 10, y + pitch // 2), name, 0, font, anchor="rm")
        picture.paste(row.resize((row.width * pitch // PITCH, pitch), Image.Resampling.LANCZOS), (left, y))
    return picture.quantize(32)


def two_rows_as_one(grid):
    """Return the first two rows of a grid, 8 images each, as one row of 16."""
    row = Image.new("L", (16 * PITCH, PITCH))
    for index in range(2):
        row.paste(grid.crop((0, index * PITCH, 8 * PITCH, (index + 1) * PITCH)), (8 * index * PITCH, 0))
    return row


# Two dimensions ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def codes_and_plane(run, data_dir):
    """Return the codes of the test images beside what is decoded from the same part of the plane, as a PNG file."""
    _, path, settings = find_run(run)
    model = load_model(path, read_weights(path), settings).eval()
    images, labels = load_mnist(data_dir, train=False)
    codes = torch.cat([model.encoder(batch) for batch in images.split(1000)])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 5.3))
    scatter(left, codes, labels)
    if codes.abs().quantile(0.9) > REACH:
        inset = left.inset_axes((0.63, 0.63, 0.36, 0.36))
        reach = codes.abs().quantile(0.995).item()
        inset.scatter(*codes.T, s=0.3, c=[DIGITS[label] for label in labels], linewidths=0, rasterized=True)
        inset.set(xlim=(-reach, reach), ylim=(-reach, reach), title="all codes", facecolor="white")
        inset.tick_params(labelsize=9)
        inset.grid(False)
    show_plane(right, model)
    content = small_png(figure, 128)
    plt.close(figure)
    return content


def scatter(panel, codes, labels):
    """Draw codes coloured by label, the label at their median, and the prior's circles of 1, 2, 3 deviations."""
    panel.scatter(*codes.T, s=3, c=[DIGITS[label] for label in labels], linewidths=0)
    for radius in (1, 2, 3):
        panel.add_patch(plt.Circle((0, 0), radius, fill=False, color="black", linewidth=0.8))
    for digit in range(10):
        x, y = codes[labels == digit].median(0).values.tolist()
        if max(abs(x), abs(y)) < REACH:
            panel.text(x, y, str(digit), fontsize=14, fontweight="bold", ha="center", va="center",
                       bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    panel.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xlabel="first code", ylabel="second code",
              title="codes of the test images")
    panel.grid(False)


def show_plane(panel, model, side=24):
    """Draw what the model decodes at the points of a grid over the plane."""
    places = torch.from_numpy(np.linspace(-REACH, REACH, side, endpoint=False)).float() + REACH / side
    y, x = torch.meshgrid(places.flip(0), places, indexing="ij")
    grid = image_grid(model.decoder(torch.stack([x.flatten(), y.flatten()], 1)), side)
    panel.imshow(grid[0], cmap="gray", extent=(-REACH, REACH, -REACH, REACH), aspect="equal")
    panel.set(xlabel="first code", title="what the decoder makes of each place")
    panel.grid(False)
