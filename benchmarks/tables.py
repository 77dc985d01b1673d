"""The tables of README.md and docs/, made from the figures that the other programs here measured.

`figures` is what `read_figures` returns: results.json of results.py, speed.json of speed.py, and ablation.json of
ablation.py. Runs, stages and columns that were not measured are left out.
"""

import json
import re
from statistics import mean, median

NOTHING = "Not measured yet."
SEEDS, BASE = ("z8", "z8-seed1", "z8-seed2"), "z8-base"  # the runs of the default and of the base networks
STAGES = (1, 2, 5, 10, 20, 50, 100)  # epochs after which those runs are measured
STEPS = 938  # in an epoch of MNIST
COLUMNS = {  # heading: key in results.json and ablation.json, format
    "reconstruction loss": ("recon_loss", ".4f"),
    "test MSE": ("test_mse", ".4f"),
    "held-out MSE": ("test_mse", ".4f"),
    "KS": ("ks", ".4f"),
    "KS of training codes": ("ks_training", ".4f"),
    "two-sample accuracy": ("two_sample", ".1%"),
    "Fréchet, samples": ("frechet_samples", ".1f"),
    "Fréchet, reconstructed training images": ("frechet_training_reconstructions", ".1f"),
    "Fréchet, reconstructed test images": ("frechet_reconstructions", ".1f"),
    "samples, confidence ≥ 0.95": ("sure", ".1%"),
    "Parzen, nats": ("parzen", ".1f"),
    "discriminator accuracy": ("accuracy", ".1%"),
}
MATCH = ("KS", "two-sample accuracy", "Fréchet, samples", "Fréchet, reconstructed training images",
         "Fréchet, reconstructed test images")
WAYS = {  # of speed.json; the plain loop has its number of workers in its name
    "fp32": "`python train.py`",
    "tf32": "`--precision tf32`",
    "bf16": "`--precision bf16`",
    "base": "`--base`",
    "eager": "`--no-graph`",
    "deterministic": "`--deterministic`",
}


# Figures -------------------------------------------------------------------------------------------------------------

def read_figures(folder):
    """Return the contents of the three files in a folder, by their names without .json; {} for a missing one."""
    files = {name: folder / f"{name}.json" for name in ("results", "speed", "ablation")}
    return {name: json.loads(file.read_text()) if file.is_file() else {} for name, file in files.items()}


def figures_of(metrics):
    """Return those of an evaluation's metrics that the tables show, by their keys in COLUMNS, and a few more."""
    quality, match, likelihood = metrics["digit_classifier"], metrics["prior_match"], metrics["log_likelihood"]
    codes, samples = match["codes"], quality["samples"]
    return {"test_mse": metrics["reconstruction"]["mse"],
            "ks": codes["ks"], "ks_training": match["training_codes"]["ks"],
            "two_sample": codes["two_sample_accuracy"], "std": [min(codes["std"]), max(codes["std"])],
            "frechet_samples": samples["frechet_to_test_images"],
            "frechet_training_reconstructions": quality["training_reconstructions"]["frechet_to_test_images"],
            "sure": samples["sure"], "labels": list(samples["labels"].values()),
            "parzen": likelihood["mean"], "parzen_error": likelihood["standard_error"],
            "parzen_reconstructions": likelihood["training_reconstructions"]["mean"]}


def after(results, names, epochs):
    """Return the figures after so many epochs of those of the named runs that were measured then, a list of dicts."""
    runs = [results[name] for name in names if name in results]
    return [stage for run in runs for stage in (*run.get("stages", ()), run) if stage["epochs"] == epochs]


def epoch_seconds(speed):
    """Return the seconds per epoch of each way in speed.json, one per round; of the plain loop, only the fastest."""
    rounds = speed.get("rounds", [{}])
    seconds = {way: [STEPS * timings[way]["step"] for timings in rounds] for way in rounds[0]}
    plain = sorted((way for way in seconds if way.startswith("plain")), key=lambda way: median(seconds[way]))
    return {way: values for way, values in seconds.items() if way not in plain[1:]}


def way_name(way):
    """Return what a way of speed.json is called in the docs."""
    workers = re.match(r"plain, (\d+) workers", way)
    return WAYS[way] if not workers else f"plain loop, {workers[1].replace('0', 'no', 1)} workers"


def timed_on(speed):
    """Return the device that speed.json is of."""
    device = next(iter(speed["rounds"][0].values()))["device"]  # such as cpu (AMD EPYC, 2 threads)
    return one_thread(re.fullmatch(r"\w+ \((.*)\)", device)[1])


def one_thread(device_name):
    return re.sub(r"\b1 threads", "1 thread", device_name)


def by_variant(ablation):
    """Return the runs in ablation.json as {(epochs, precision): {variant: [figures of each seed]}}.

    Variants that lack seeds which others have are left out.
    """
    groups = {}
    for key, run in ablation.items():
        name, epochs, _, precision = key.split("; ")
        groups.setdefault((epochs, precision), {}).setdefault(name, []).append(run)
    return {key: {name: runs for name, runs in variants.items() if len(runs) == max(map(len, variants.values()))}
            for key, variants in groups.items()}


# Markdown ------------------------------------------------------------------------------------------------------------

def markdown(heads, rows):
    """Return a table in Markdown without its empty columns, or a sentence if it has no rows."""
    if not rows:
        return NOTHING
    kept = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    lines = ["| " + " | ".join(row[index] for index in kept) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + len(kept) * "---|", *lines[1:]]).replace("|  |", "| |")


def cells(stages, columns):
    """Return the columns of a row: the mean over several stages and its range, or one stage's figure."""
    return [spread([stage.get(key) for stage in stages], form) for key, form in map(COLUMNS.get, columns)]


def spread(values, form):
    """Return the mean of some values with their range, as text; nothing if one of them is None."""
    if None in values:
        return ""
    average = f"{mean(values):{form}}"
    return average if len(values) == 1 else f"{average} ({min(values):{form}} to {max(values):{form}})"


def parzen(run):
    return f"{run['parzen']:.1f} ± {run['parzen_error']:.1f}"


# Runs ----------------------------------------------------------------------------------------------------------------

def base_and_default(results, stages, columns):
    """Return a table of the base and the default after some epochs."""
    rows = []
    for epochs in stages:
        for name, runs_of_it in (("base", [BASE]), ("default", SEEDS)):
            found = after(results, runs_of_it, epochs)
            rows += [[str(epochs), name, *cells(found, columns)]] if found else []
    return markdown(["epochs", "", *columns], rows)


def summary(figures):
    """Base and default after 20 and 100 epochs."""
    return base_and_default(figures["results"], (20, 100), ("reconstruction loss", "test MSE", *MATCH))


def stages(figures):
    """Base and default after all epochs measured."""
    return base_and_default(figures["results"], STAGES, ("test MSE", *MATCH, "Parzen, nats"))


def runs(figures):
    """All runs at their last epochs, and the spread of the default's seeds."""
    results = figures["results"]
    columns = ("reconstruction loss", "test MSE", "KS of training codes", *MATCH, "samples, confidence ≥ 0.95")
    rows = [[name, f"`{run['flags'] or 'none'}`", str(run["epochs"]), *cells([run], columns), parzen(run)]
            for name, run in results.items()]
    text = markdown(["run", "flags", "epochs", *columns, "Parzen, nats"], rows)
    text += ("\n\nKS is not comparable between numbers of dimensions: random projections of many dimensions look "
             "normal anyway.")
    default = after(results, SEEDS, STAGES[-1])
    if len(default) == len(SEEDS):
        named = ("test MSE", "KS", "Fréchet, samples", "Fréchet, reconstructed test images", "Parzen, nats")
        text += ("\n\nThe default with three seeds, mean and range: test MSE {}, KS {}, Fréchet distance of samples {} "
                 "and of reconstructed test images {}, Parzen {}.").format(*cells(default, named))
    return text


def provenance(figures):
    """The commits, versions and devices that made the runs, in a sentence."""
    makers = {}
    for name, run in figures["results"].items():
        maker = (f"commit `{run['commit'][:7]}` with torch {run['torch'].partition('+')[0]} on "
                 f"{one_thread(run['device_name'])}")
        makers.setdefault(maker, []).append(name)
    runs = [maker + f" ({', '.join(names)})" * (len(makers) > 1) for maker, names in makers.items()]
    return f"The runs were made by {'; '.join(runs)}."


# Questions -----------------------------------------------------------------------------------------------------------

def lambda_one(figures):
    """Question 2.4: λ = 1 against the default."""
    found = after(figures["results"], ("z8-lambda1", "z8"), STAGES[-1])
    return question(["λ"], [([f"{run['lambda_']:g}"], run) for run in found], std=True)


def default_run(figures):
    """Question 2.5: the default after all epochs measured."""
    found = [stage for epochs in STAGES for stage in after(figures["results"], ["z8"], epochs)]
    return question([], [([], stage) for stage in found], ("reconstruction loss",))


def two_dimensions(figures):
    """Question 2.6: all runs of 2 dimensions, λ descending."""
    found = sorted((run for run in figures["results"].values() if run["z_dim"] == 2), key=lambda run: -run["lambda_"])
    return question(["λ"], [([f"{run['lambda_']:g}"], run) for run in found], std=True)


def gradients(figures):
    """Questions 2.6 and 2.7: the gradients of both losses at a code, and their ratio with the weights λ and 1 − λ."""
    rows = []
    for run in after(figures["results"], ("z2", "z2-lambda0.95", "z8", "z20"), STAGES[-1]):
        recon, gen = run["gradients"]["recon_loss"], run["gradients"]["gen_loss"]
        ratio = run["lambda_"] * recon / ((1 - run["lambda_"]) * gen)
        rows.append([str(run["z_dim"]), f"{run['lambda_']:g}", f"{recon:.3f}", f"{gen:.3f}", f"{ratio:.0f}"])
    return markdown(["dimensions", "λ", "reconstruction loss", "adversarial loss", "ratio, weighted by λ and 1 − λ"],
                    rows)


def twenty_dimensions(figures):
    """Question 2.7: the runs of 20 dimensions with each encoder, and that of 8."""
    found = after(figures["results"], ("z8", "z20", "z20-gaussian", "z20-universal"), STAGES[-1])
    return question(["dimensions", "encoder", "noise in a code"],
                    [([str(run["z_dim"]), run["posterior"], f"{run['noise']:.1g}"], run) for run in found])


def question(heads, rows, more=(), std=False):
    """Return a question's table from rows of (first cells, figures)."""
    columns = (*more, "test MSE", *MATCH, "samples, confidence ≥ 0.95")
    lines = [[*first, str(run["epochs"]), *cells([run], columns), *[std_range(run)] * std, parzen(run)]
             for first, run in rows]
    return markdown([*heads, "epochs", *columns, *["standard deviation of codes"] * std, "Parzen, nats"], lines)


def std_range(run):
    return " to ".join(f"{value:.3g}" for value in run["std"])


# Speed and ablation --------------------------------------------------------------------------------------------------

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
        rows.append([way_name(way), f"{1000 * median(values) / STEPS:.2f}",
                     f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})",
                     f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if way != plain else "1",
                     f"{memory:.0f}" + f" + {gpu:.0f} on the GPU" * (gpu > 0)])
    table = markdown(["", "ms per step", "seconds per epoch", "times as fast as the plain loop", "memory, MB"], rows)
    return (f"{table}\n\nOn {timed_on(measured)} with torch {rounds[0][plain]['torch'].partition('+')[0]}: median of "
            f"{len(rounds)} rounds of {measured['steps_timed']} steps (minimum to maximum); an epoch has {STEPS} "
            f"steps. Memory is what comes on top of torch itself.")


def ablation(figures):
    """Each variant, mean and range over its seeds; bold where the range does not overlap with the default's."""
    columns = ("held-out MSE", *MATCH, "Parzen, nats", "discriminator accuracy")
    tables = []
    for (epochs, precision), variants in by_variant(figures["ablation"]).items():
        rows = []
        for name, found in variants.items():
            diverged = any("failed" in run for run in found)
            texts = ["diverged"] * len(columns) if diverged else cells(found, columns)
            apart = [not diverged and differs(found, variants.get("final", found), column) for column in columns]
            rows.append([name, *(f"**{text}**" if bold else text for text, bold in zip(texts, apart, strict=True))])
        tables.append(markdown([f"{epochs}, {precision}", *columns], rows))
    return "\n\n".join(tables) or NOTHING


def differs(found, default, column):
    """Return whether the range of a column over a variant's seeds does not overlap with that of the default's."""
    ours, theirs = ([run.get(COLUMNS[column][0]) for run in runs] for runs in (found, default))
    return None not in (*ours, *theirs) and (min(ours) > max(theirs) or max(ours) < min(theirs))


TABLES = {"summary": summary, "stages": stages, "runs": runs, "provenance": provenance, "question-2.4": lambda_one,
          "question-2.5": default_run, "question-2.6": two_dimensions, "question-2.7": twenty_dimensions,
          "gradients": gradients, "speed": speed, "ablation": ablation}
