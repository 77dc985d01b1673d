"""The plots of docs/results/ that are made from measured figures; report.py writes them.

Their colours can be told apart by colour-blind readers (Okabe and Ito, jfly.uni-koeln.de/color) and differ in marker
or line style too; their letters can be read at half the picture's size.
"""

import io
import sys
from statistics import mean, median

try:
    import matplotlib
except ImportError:
    sys.exit("plots.py: error: matplotlib is missing: pip install -r benchmarks/requirements.txt")
matplotlib.use("agg")
# isort: split
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image
from tables import BASE, SEEDS, STAGES, after, by_variant, default_after, epoch_seconds, timed_on, way_name

ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8c8c8c")
plt.rcParams.update({
    "font.size": 13, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "lines.linewidth": 2, "lines.markersize": 6,
    "legend.frameon": False, "legend.handlelength": 2.6, "figure.constrained_layout.use": True, "figure.dpi": 130})
SPREAD = 30  # by which the samples' distance differs between two runs of one setting (docs/ABLATION.md)
CURVES = {  # run: label, colour, line style
    "z8": ("8 dimensions, default", BLUE, "-"),
    "z8-base": ("8 dimensions, base", VERMILLION, "--"),
    "z8-lambda1": ("8 dimensions, λ = 1", ORANGE, "-."),
    "z20": ("20 dimensions, default", GREEN, "-"),
    "z20-gaussian": ("20 dimensions, Gaussian encoder", PURPLE, "--"),
    "z20-universal": ("20 dimensions, universal encoder", SKY, ":"),
}


def write_plots(figures, folder):
    """Write every plot whose figures are there into a folder."""
    for name, draw in {"quality": quality, "loss": loss, "speed": speed, "ablation": ablation}.items():
        figure = draw(figures)
        if figure:
            (folder / f"{name}.png").write_bytes(small_png(figure))
            plt.close(figure)


def small_png(figure, palette=None):
    """Return a figure as a PNG with a palette, a third as large; the colours are chosen unless `palette` has them."""
    content = io.BytesIO()
    figure.savefig(content)
    picture = Image.open(content).convert("RGB")
    content = io.BytesIO()
    picture.quantize(128, palette=palette, dither=Image.Dither.NONE).save(content, "png", optimize=True)
    return content.getvalue()


def round_log_ticks(axis):
    """Put ticks at 1, 2 and 5 times the powers of ten, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# Quality -------------------------------------------------------------------------------------------------------------

def quality(figures):
    """Distance of samples and reconstructions over epochs and minutes, base against default."""
    results, groups = figures["results"], {}
    for epochs in STAGES:
        base = [after(results[BASE], epochs)] if BASE in results else []
        for name, stages in (("base", base), ("default", default_after(results, epochs))):
            if any(stages):
                groups.setdefault(name, []).append((epochs, stages))
    if not groups or max(map(len, groups.values())) < 3:  # two points make no curve
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.3), sharey=True)
    minutes, where = epoch_minutes(figures)
    for name, points in groups.items():
        draw_quality(panels[0], name, points, 1)
        draw_quality(panels[1], name, points, minutes[name])
    for panel, label in zip(panels, ("epochs", f"minutes of training{where}"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=label)
        round_log_ticks(panel.xaxis)
    round_log_ticks(panels[0].yaxis)
    panels[0].set_ylabel("squared Fréchet distance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_quality(panel, name, points, scale):
    """Draw the mean of the seeds with their range, samples solid and reconstructions dashed."""
    color, marker = {"base": (VERMILLION, "s"), "default": (BLUE, "o")}[name]
    x = [scale * epochs for epochs, _ in points]
    for kind, style in (("samples", "-"), ("reconstructions", "--")):
        values = [[stage[f"frechet_{kind}"] for stage in stages] for _, stages in points]
        panel.plot(x, [mean(seeds) for seeds in values], style, color=color, marker=marker, label=f"{name}, {kind}",
                   markerfacecolor=color if kind == "samples" else "white")
        panel.fill_between(x, [min(seeds) for seeds in values], [max(seeds) for seeds in values], color=color,
                           alpha=0.2, linewidth=0)


def epoch_minutes(figures):
    """Return the minutes per epoch of base and default, and what the axis is to say of their machine."""
    seconds, results = epoch_seconds(figures["speed"]), figures["results"]
    if seconds:
        return ({"base": median(seconds["base"]) / 60, "default": median(seconds["fp32"]) / 60},
                f"\n({timed_on(figures['speed'])})")
    own = {"base": [BASE], "default": SEEDS}
    return {name: mean(results[run]["seconds"] / results[run]["epochs"] / 60 for run in names if run in results)
            for name, names in own.items() if any(run in results for run in names)}, ""


# Curves --------------------------------------------------------------------------------------------------------------

def loss(figures):
    """Reconstruction loss and discriminator accuracy over the epochs, of the runs of 8 and 20 dimensions."""
    results = figures["results"]
    if not any(name in results for name in CURVES):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.6))
    for panel, key in zip(panels, ("reconstruction loss", "discriminator accuracy"), strict=True):
        for name, (label, color, style) in CURVES.items():
            runs = [results[run] for run in (SEEDS if name == "z8" else [name]) if run in results]
            if runs:
                draw_curve(panel, runs, key, style, color, f"{label} ({len(runs)} seeds)" if runs[1:] else label)
        panel.set(xlabel="epochs", ylabel=key, xlim=(0, None))
    panels[0].set(yscale="log", ylabel="reconstruction loss\n(mean squared error per pixel)", ylim=(0.01, 0.2))
    round_log_ticks(panels[0].yaxis)
    panels[1].set_ylim(0.5, 1.01)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_curve(panel, runs, key, style, color, label):
    """Draw a curve of results.json, of several seeds the mean and the range."""
    curves = [run["curves"][key] for run in runs]
    width = runs[0]["epochs"] / len(curves[0])
    x = [width * (index + 0.5) for index in range(len(curves[0]))]
    points = list(zip(*curves, strict=True))
    panel.plot(x, [mean(point) for point in points], style, color=color, label=label)
    if len(runs) > 1:
        panel.fill_between(x, [min(point) for point in points], [max(point) for point in points], color=color,
                           alpha=0.3, linewidth=0)


# Bars ----------------------------------------------------------------------------------------------------------------

def speed(figures):
    """Seconds per epoch of each way, median of the rounds, with the range."""
    seconds = epoch_seconds(figures["speed"])
    if not seconds:
        return None
    figure, panel = plt.subplots(figsize=(9.2, 1.3 + 0.5 * len(seconds)))
    names = [way_name(way).replace("`", "") for way in seconds]
    medians = [median(values) for values in seconds.values()]
    ranges = [[middle - min(values), max(values) - middle]
              for middle, values in zip(medians, seconds.values(), strict=True)]
    panel.barh(names, medians, 0.7, xerr=list(zip(*ranges, strict=True)), capsize=4,
               color=[GREY if way.startswith("plain") else BLUE for way in seconds])
    for index, values in enumerate(seconds.values()):
        panel.annotate(f"{medians[index]:.3g}", (max(values), index), (8, 0), textcoords="offset points", va="center")
    bars_from_top(panel)
    figure.supxlabel(f"seconds per epoch, median and range ({timed_on(figures['speed'])})", fontsize="medium")
    return figure


def bars_from_top(panel):
    """Let the first bar be the topmost, and leave only the scale's grid."""
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08, y=0.02)


def ablation(figures):
    """The samples' distance of each variant, sorted, with the spread of one setting around the default."""
    if not figures["ablation"]:
        return None
    (epochs, precision), variants = next(iter(by_variant(figures["ablation"]).items()))
    distances = {name: mean(run["samples"] for run in runs) for name, runs in variants.items()
                 if not any("failed" in run for run in runs)}
    names = sorted(distances, key=distances.get)
    figure, panel = plt.subplots(figsize=(9.2, 1.2 + 0.36 * len(names)))
    colors = [BLUE if name == "final" else VERMILLION if name.startswith("base") else SKY for name in names]
    panel.barh(names, [distances[name] for name in names], 0.7, color=colors)
    for index, name in enumerate(names):
        panel.annotate(f"{distances[name]:.0f}", (distances[name], index), (5, 0), textcoords="offset points",
                       va="center")
    if "final" in distances:
        low, high = distances["final"] - SPREAD / 2, distances["final"] + SPREAD / 2
        panel.axvspan(low, high, color="black", alpha=0.16, linewidth=0, label="spread of\none setting")
        panel.legend(loc="upper right", bbox_to_anchor=(1, 0.92), handlelength=1.2)
    bars_from_top(panel)
    figure.supxlabel(f"squared Fréchet distance of samples after {epochs} ({precision})", fontsize="medium")
    return figure
