"""The plots of docs/results/ that are made from measured figures; report.py writes them.

They need matplotlib (requirements.txt). Colour-blind readers can tell their colours apart (Okabe and Ito,
jfly.uni-koeln.de/color); their letters can be read at half the picture's size.
"""

from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from benchmarks.tables import BASE, SEEDS, STAGES, after, by_variant

plt.switch_backend("agg")  # opens no windows
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
plt.rcParams.update({
    "font.size": 13, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "lines.linewidth": 2, "lines.markersize": 6,
    "legend.frameon": False, "legend.handlelength": 2.6, "figure.constrained_layout.use": True, "figure.dpi": 110})
CURVES = {  # label: runs, colour, line style
    "8 dimensions, default": (SEEDS, BLUE, "-"),
    "8 dimensions, base": ([BASE], VERMILLION, "--"),
    "8 dimensions, λ = 1": (["z8-lambda1"], ORANGE, "-."),
    "20 dimensions, default": (["z20"], GREEN, "-"),
    "20 dimensions, Gaussian encoder": (["z20-gaussian"], PURPLE, "--"),
    "20 dimensions, universal encoder": (["z20-universal"], SKY, ":"),
}


def write_plots(figures, folder):
    """Write every plot into a folder."""
    for draw in (quality, loss, ablation):
        save(draw(figures), folder / f"{draw.__name__}.png")


def save(figure, file):
    """Write a figure to a PNG with a palette, a fifth as large as one without."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)
    plt.close(figure)


def quality(figures):
    """Distance of samples and reconstructions over epochs, base against default."""
    figure, panel = plt.subplots(figsize=(9.2, 4.6))
    for name, runs, color, marker in (("base", [BASE], VERMILLION, "s"), ("default", SEEDS, BLUE, "o")):
        stages = {epochs: after(figures, runs, epochs) for epochs in STAGES}
        for what, key, style, face in (
                ("samples", "frechet_samples", "-", color),
                ("reconstructed training images", "frechet_training_reconstructions", "-.", color),
                ("reconstructed test images", "frechet_reconstructions", "--", "white")):
            points = [[stage.get(key) for stage in found] for found in stages.values()]
            if all(points) and None not in sum(points, []):  # measured in all stages
                draw_curve(panel, stages, points, style, color=color, marker=marker, markerfacecolor=face,
                           label=f"{name}, {what}")
    panel.set(xscale="log", yscale="log", xlabel="epochs", ylabel="squared Fréchet distance")
    for axis in (panel.xaxis, panel.yaxis):
        use_round_log_ticks(axis)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def loss(figures):
    """Reconstruction loss and discriminator accuracy over the epochs, of the runs of 8 and 20 dimensions."""
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.6))
    for panel, key in zip(panels, ("reconstruction loss", "discriminator accuracy"), strict=True):
        for label, (names, color, style) in CURVES.items():
            runs = [figures["results"][name] for name in names if name in figures["results"]]
            if runs:
                points = list(zip(*(run["curves"][key] for run in runs), strict=True))
                x = [runs[0]["epochs"] * (index + 0.5) / len(points) for index in range(len(points))]
                draw_curve(panel, x, points, style, color=color, label=label)
        panel.set(xlabel="epochs", ylabel=key, xlim=(0, None))
    panels[0].set(yscale="log", ylabel="reconstruction loss\n(mean squared error per pixel)", ylim=(0.01, 0.2))
    use_round_log_ticks(panels[0].yaxis)
    panels[1].set_ylim(0.5, 1.01)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_curve(panel, x, points, style, color, **options):
    """Draw the mean of each point's values, and their range as a band."""
    panel.plot(list(x), [mean(values) for values in points], style, color=color, **options)
    panel.fill_between(list(x), [min(values) for values in points], [max(values) for values in points], color=color,
                       alpha=0.25, linewidth=0)


def use_round_log_ticks(axis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ablation(figures):
    """The samples' distance of each variant, sorted, with the range of the default's seeds as a band."""
    variants = by_variant(figures["ablation"])
    distances = {name: [run["frechet_samples"] for run in runs] for name, runs in variants.items()}
    distances = dict(sorted(distances.items(), key=lambda item: mean(item[1])))
    colors = [{"final": BLUE, "base": VERMILLION}.get(name, SKY) for name in distances]
    figure, panel = plt.subplots(figsize=(9.2, 1.3 + 0.45 * len(distances)))
    for name, values, color in zip(distances, distances.values(), colors, strict=True):
        middle = mean(values)
        panel.barh(name, middle, 0.7, color=color, capsize=4, xerr=[[middle - min(values)], [max(values) - middle]])
        panel.annotate(f"{middle:.3g}", (max(values), name), (8, 0), textcoords="offset points", va="center")
    panel.axvspan(min(distances["final"]), max(distances["final"]), color="black", alpha=0.16, linewidth=0)
    panel.invert_yaxis()  # the first bar is the topmost
    panel.grid(False, axis="y")
    panel.margins(x=0.08, y=0.02)
    figure.supxlabel("squared Fréchet distance of samples, mean and range", fontsize="medium")
    return figure
