"""The tables of README.md and docs/, made from the figures that the other scripts here measured.

`figures` is what read_figures returns: results.json of results.py, speed.json of speed.py --json, and ablation.json of
ablation.py --results, each {} where there is none. A run or stage that is missing leaves its row out.
"""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, median

NOTHING = "Not measured yet."

SEEDS, BASE = ("z8", "z8-seed1", "z8-seed2"), "z8-base"  # the runs of the default and of the base networks
STAGES = (1, 2, 5, 10, 20, 50, 100)  # epochs after which those runs are measured
STEPS = {"mnist": 938, "digits": 24}  # in an epoch
QUALITY = {  # heading: key in results.json, format
    "reconstruction loss": ("recon_loss", ".4f"),
    "test MSE": ("test_mse", ".4f"),
    "KS": ("ks", ".4f"),
    "KS of training codes": ("ks_training", ".4f"),
    "Fréchet, samples": ("frechet_samples", ".1f"),
    "Fréchet, reconstructions": ("frechet_reconstructions", ".1f"),
    "samples, confidence ≥ 0.95": ("sure", ".1%"),
    "Parzen, nats": ("parzen", ".1f"),
}
ABLATION = {  # the same for ablation.json
    "held-out MSE": ("mse", ".4f"),
    "KS": ("ks", ".4f"),
    "Fréchet, samples": ("samples", ".1f"),
    "Fréchet, reconstructions": ("reconstructions", ".1f"),
    "Parzen, nats": ("parzen", ".1f"),
    "discriminator accuracy": ("accuracy", ".1%"),
}
WAYS = {  # of speed.json; the plain loop has its number of workers in its name
    "fp32": "`python train.py`",
    "tf32": "`--precision tf32`",
    "bf16": "`--precision bf16`",
    "base": "`--base`",
    "eager": "default, no CUDA graph",
    "deterministic": "`--deterministic`",
}


# Figures -------------------------------------------------------------------------------------------------------------

def read_figures(folder):
    """Return what the three files in a folder hold, by their names without .json; {} for one that is not there."""
    return {name: read_json(folder / f"{name}.json") for name in ("results", "speed", "ablation")}


def read_json(file):
    """Return what a file holds, {} where there is none; end the script where it is damaged."""
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {file} is damaged ({error}); restore it, or delete it and measure "
                 f"again")


def after(run, epochs):
    """Return the figures of a run after so many epochs, None if it was not measured then."""
    return next((stage for stage in (*run.get("stages", ()), run) if stage["epochs"] == epochs), None)


def epochs_measured(run):
    """Return the epochs after which a run was measured, in ascending order."""
    return sorted({stage["epochs"] for stage in (*run.get("stages", ()), run)})


def default_after(results, epochs):
    """Return the figures of the default runs after so many epochs, one dict per seed."""
    stages = [after(results[name], epochs) for name in SEEDS if name in results]
    return [stage for stage in stages if stage]


def epoch_seconds(speed):
    """Return the seconds per epoch of each way in speed.json, one per round, for the plain loop its fastest alone."""
    rounds = speed.get("rounds", [])
    ways = list(rounds[0]) if rounds else []
    seconds = {way: [STEPS[speed["dataset"]] * timings[way]["step"] for timings in rounds] for way in ways}
    plain = [way for way in ways if way.startswith("plain")]
    for way in sorted(plain, key=lambda way: median(seconds[way]))[1:]:
        del seconds[way]
    return seconds


def way_name(way):
    """Return what a way of speed.json is called in the docs."""
    workers = re.match(r"plain, (\d+) workers", way)
    return WAYS.get(way, way) if not workers else f"plain loop, {workers[1].replace('0', 'no', 1)} workers"


def timed_on(speed):
    """Return the device that speed.json is of."""
    device = next(iter(speed["rounds"][0].values()))["device"]  # such as cpu (AMD EPYC, 2 threads)
    return one_thread(re.fullmatch(r"\w+ \((.*)\)", device)[1])


def one_thread(device_name):
    return re.sub(r"\b1 threads", "1 thread", device_name)


def by_variant(ablation):
    """Return the runs in ablation.json as {(epochs, precision): {variant: [figures of each seed]}}."""
    groups = {}
    for key, run in ablation.items():
        name, epochs, _, precision = key.split("; ")
        groups.setdefault((epochs, precision), {}).setdefault(name, []).append(run)
    return groups


# Markdown ------------------------------------------------------------------------------------------------------------

def markdown(heads, rows):
    """Return a table in Markdown, or a sentence if it has no rows."""
    if not rows:
        return NOTHING
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + len(heads) * "---|", *lines[1:]])


def cells(stages, columns, columns_of=QUALITY):
    """Return the columns of a row: the mean over several stages and its range, or a single one's figure."""
    keys = [columns_of[column] for column in columns]
    return [spread([stage[key] for stage in stages], form) for key, form in keys]


def spread(values, form):
    """Return the mean of some values with their range, as text."""
    average = f"{mean(values):{form}}"
    return average if len(values) == 1 else f"{average} ({min(values):{form}} to {max(values):{form}})"


def parzen(run):
    return f"{run['parzen']:.1f} ± {run['parzen_error']:.1f}"


def default_name(stages):
    return "default" if len(stages) == len(SEEDS) else f"default ({len(stages)} of {len(SEEDS)} seeds)"


# Tables --------------------------------------------------------------------------------------------------------------

def base_and_default(results, stages, columns):
    """Return a table of the base and the default after some epochs."""
    rows = []
    for epochs in stages:
        base, default = after(results.get(BASE, {"epochs": 0}), epochs), default_after(results, epochs)
        rows += [[str(epochs), "base", *cells([base], columns)]] if base else []
        rows += [[str(epochs), default_name(default), *cells(default, columns)]] if default else []
    return markdown(["epochs", "", *columns], rows)


def summary(figures):
    """Base and default after 20 and 100 epochs."""
    return base_and_default(figures["results"], (20, 100), ("reconstruction loss", "test MSE", "KS", "Fréchet, samples",
                                                            "Fréchet, reconstructions"))


def stages(figures):
    """Base and default after all epochs measured, and how soon the default is as good as the base in the end."""
    table = base_and_default(figures["results"], STAGES, ("test MSE", "KS", "Fréchet, samples",
                                                          "Fréchet, reconstructions", "Parzen, nats"))
    return f"{table}\n\n{overtaking(figures)}".rstrip()


def overtaking(figures):
    """Return a sentence on how soon the default's samples are as near to test images as the base's after 100 epochs."""
    base, epochs = after(figures["results"].get(BASE, {"epochs": 0}), STAGES[-1]), None
    if base:
        epochs = epochs_to_reach(figures["results"], base["frechet_samples"])
    if epochs is None:
        return ""
    seconds = {way: median(values) for way, values in epoch_seconds(figures["speed"]).items()}
    share = epochs * seconds["fp32"] / (STAGES[-1] * seconds["base"]) if seconds else None
    return (f"After about {epochs:.0f} epochs (interpolated) the default's samples are as close to digits as the "
            f"base's after {STAGES[-1]}" + (f", in {share:.0%} of the time." if share else "."))


def epochs_to_reach(results, distance):
    """Return after how many epochs the default's mean distance of samples falls to `distance`, None if it does not.

    The logarithm of the distance is taken as linear in that of the epochs between two stages.
    """
    points = [(epochs, mean(stage["frechet_samples"] for stage in default_after(results, epochs)))
              for epochs in STAGES if default_after(results, epochs)]
    for (start, high), (end, low) in zip(points, points[1:], strict=False):
        if high >= distance >= low and high > low:
            share = math.log(high / distance) / math.log(high / low)
            return start * (end / start) ** share
    return None


def runs(figures):
    """All runs at their last epochs, and the spread of the default's seeds."""
    columns = [column for column in QUALITY if column != "Parzen, nats"]
    results = figures["results"]
    rows = [[name, f"`{run['flags'] or 'none'}`", str(run["epochs"]), *cells([run], columns), parzen(run)]
            for name, run in results.items()]
    default = [results[name] for name in SEEDS if name in results]
    text = markdown(["run", "flags", "epochs", *columns, "Parzen, nats"], rows)
    if len(default) == len(SEEDS) and len({run["epochs"] for run in default}) == 1:
        values = cells(default, ("test MSE", "KS", "Fréchet, samples", "Fréchet, reconstructions", "Parzen, nats"))
        text += ("\n\nThe default with three seeds, mean and range: test MSE {}, KS {}, Fréchet distance of samples {} "
                 "and of reconstructions {}, Parzen {}.").format(*values)
    return text


def provenance(figures):
    """The commits, versions and devices that made the runs, in a sentence."""
    results = figures["results"]
    if not results:
        return NOTHING
    commits = {name: f"commit `{run['commit'][:7]}`" if "commit" in run else "a commit that was not recorded"
               for name, run in results.items()}
    versions = {name: f"torch {run['torch'].partition('+')[0]}" for name, run in results.items()}
    devices = {name: one_thread(run["device_name"]) for name, run in results.items()}
    return f"The runs were made by {shared(commits)} with {shared(versions)} on {shared(devices)}."


def shared(values):
    """Return the one value that all runs have, or each value with the names of its runs."""
    groups = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return " and ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def lambda_one(figures):
    """Question 2.4: λ = 1 against the default after as many epochs."""
    results = figures["results"]
    epochs = results.get("z8-lambda1", {"epochs": 0})["epochs"]
    found = {name: after(results[name], epochs) for name in ("z8-lambda1", "z8") if name in results}
    return question(["λ"], [([f"{results[name]['lambda_']:g}"], run) for name, run in found.items() if run], std=True)


def default_run(figures):
    """Question 2.5: the default after all epochs measured."""
    run = figures["results"].get("z8")
    rows = [([], after(run, epochs)) for epochs in epochs_measured(run)] if run else []
    return question([], rows, ("reconstruction loss",))


def two_dimensions(figures):
    """Question 2.6: all runs of 2 dimensions, λ descending."""
    found = [run for run in figures["results"].values() if run["z_dim"] == 2]
    found.sort(key=lambda run: -run["lambda_"])
    return question(["λ"], [([f"{run['lambda_']:g}"], run) for run in found], std=True)


def gradients(figures):
    """Questions 2.6 and 2.7: the gradients of both losses at a code, and their ratio with the weights λ and 1 − λ."""
    rows = []
    for run in (figures["results"].get(name) for name in ("z2", "z2-lambda0.95", "z8", "z20")):
        if run:
            recon, gen = run["gradients"]["recon_loss"], run["gradients"]["gen_loss"]
            ratio = run["lambda_"] * recon / ((1 - run["lambda_"]) * gen)
            rows.append([str(run["z_dim"]), f"{run['lambda_']:g}", f"{recon:.3f}", f"{gen:.3f}", f"{ratio:.0f}"])
    return markdown(["dimensions", "λ", "reconstruction loss", "adversarial loss", "ratio, weighted by λ and 1 − λ"],
                    rows)


def twenty_dimensions(figures):
    """Question 2.7: the runs of 20 dimensions with each encoder, and that of 8."""
    results = figures["results"]
    found = [results[name] for name in ("z8", "z20", "z20-gaussian", "z20-universal") if name in results]
    return question(["dimensions", "encoder", "noise in a code"],
                    [([str(run["z_dim"]), run["posterior"], f"{run['noise']:.1g}"], run) for run in found])


def question(heads, rows, more=(), std=False):
    """Return a question's table from rows of (first cells, figures)."""
    columns = (*more, "test MSE", "KS", "Fréchet, samples", "Fréchet, reconstructions", "samples, confidence ≥ 0.95")
    lines = [[*first, str(run["epochs"]), *cells([run], columns), *[std_range(run)] * std, parzen(run)]
             for first, run in rows]
    return markdown([*heads, "epochs", *columns, *["standard deviation of codes"] * std, "Parzen, nats"], lines)


def std_range(run):
    return " to ".join(f"{value:.3g}" for value in run["std"])


def speed(figures):
    """Milliseconds per step and seconds per epoch of each way, and how much faster than the plain loop it is."""
    measured, seconds = figures["speed"], epoch_seconds(figures["speed"])
    if not seconds:
        return NOTHING
    rounds = measured["rounds"]
    plain = next(way for way in seconds if way.startswith("plain"))
    rows = []
    for way, values in seconds.items():
        ratios = [slow / fast for slow, fast in zip(seconds[plain], values, strict=True)]
        memory, gpu = (max(timings[way][kind] for timings in rounds) for kind in ("memory", "gpu_memory"))
        rows.append([way_name(way), f"{1000 * median(values) / STEPS[measured['dataset']]:.2f}",
                     f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})",
                     f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if way != plain else "1",
                     f"{memory:.0f}" + f" + {gpu:.0f} on the GPU" * (gpu > 0)])
    table = markdown(["", "ms per step", "seconds per epoch", "times as fast as the plain loop", "memory, MB"], rows)
    return (f"{table}\n\nOn {timed_on(measured)} with torch {rounds[0][plain]['torch'].partition('+')[0]}: median of "
            f"{len(rounds)} rounds of {measured['steps_timed']} steps (minimum to maximum); an epoch has "
            f"{STEPS[measured['dataset']]} steps. Memory is what comes on top of torch itself.")


def ablation(figures):
    """What each change to the base networks and their training brings, mean over the seeds."""
    tables = []
    for (epochs, precision), variants in by_variant(figures["ablation"]).items():
        rows = []
        for name, found in variants.items():
            diverged = any("failed" in run for run in found)
            values = ["diverged"] * len(ABLATION) if diverged else [
                f"{mean(run[key] for run in found):{form}}" for key, form in ABLATION.values()]
            rows.append([name, *values, str(len(found))])
        tables.append(markdown([f"{epochs}, {precision}", *ABLATION, "seeds"], rows))
    return "\n\n".join(tables) or NOTHING


TABLES = {"summary": summary, "stages": stages, "runs": runs, "provenance": provenance, "question-2.4": lambda_one,
          "question-2.5": default_run, "question-2.6": two_dimensions, "question-2.7": twenty_dimensions,
          "gradients": gradients, "speed": speed, "ablation": ablation}
