"""The tables of README.md and docs/, made from the figures that the other programs here measured.

`figures` is what `read_figures` returns. Runs, stages and columns that were not measured are left out.
"""

import json
from statistics import mean, median, quantiles

SEEDS, BASE = ("z8", "z8-seed1", "z8-seed2"), "z8-base"  # the runs of the default and of the base networks
STAGES = (1, 2, 5, 10, 20, 50, 100)  # epochs after which those runs are measured
STEPS = 938  # in an epoch of MNIST
COLUMNS = {  # heading: key in results.json and ablation.json, format
    "run": ("run", ""),
    "flags": ("flags", ""),
    "dimensions": ("z_dim", ""),
    "λ": ("lambda_", "g"),
    "encoder": ("posterior", ""),
    "noise in a code": ("noise", ".1g"),
    "epochs": ("epochs", ""),
    "reconstruction loss": ("recon_loss", ".4f"),
    "test MSE": ("test_mse", ".4f"),
    "held-out MSE": ("test_mse", ".4f"),
    "KS": ("ks", ".4f"),
    "KS of training codes": ("ks_training", ".4f"),
    "Fréchet, samples": ("frechet_samples", ".1f"),
    "Fréchet, reconstructed training images": ("frechet_training_reconstructions", ".1f"),
    "Fréchet, reconstructed test images": ("frechet_reconstructions", ".1f"),
    "samples, confidence ≥ 0.95": ("sure", ".1%"),
    "standard deviation of codes": ("std", ".3g"),
    "Parzen, nats": ("parzen", ".1f"),
    "discriminator accuracy": ("accuracy", ".1%"),
}
MATCH = ("KS", "Fréchet, samples", "Fréchet, reconstructed training images", "Fréchet, reconstructed test images")
ALL = ("epochs", "test MSE", *MATCH, "samples, confidence ≥ 0.95", "Parzen, nats")


def read_figures(folder):
    """Return the contents of the three files in a folder, by their names without .json."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("results", "speed", "ablation")}


def figures_of(metrics):
    """Return those of an evaluation's metrics that the tables show, by their keys in COLUMNS, and a few more."""
    quality, match, likelihood = metrics["digit_classifier"], metrics["prior_match"], metrics["log_likelihood"]
    codes, samples = match["codes"], quality["samples"]
    return {"test_mse": metrics["reconstruction"]["mse"],
            "ks": codes["ks"], "ks_training": match["training_codes"]["ks"],
            "std": [min(codes["std"]), max(codes["std"])],
            "frechet_samples": samples["frechet_to_test_images"],
            "frechet_training_reconstructions": quality["training_reconstructions"]["frechet_to_test_images"],
            "sure": samples["sure"], "labels": list(samples["labels"].values()),
            "parzen": likelihood["mean"], "parzen_error": likelihood["standard_error"],
            "parzen_reconstructions": likelihood["training_reconstructions"]["mean"]}


def after(figures, names, epochs=STAGES[-1]):
    """Return the figures after so many epochs of those of the named runs that were measured then, a list of dicts."""
    runs = [figures["results"][name] for name in names if name in figures["results"]]
    return [stage for run in runs for stage in (*run.get("stages", ()), run) if stage["epochs"] == epochs]


def epoch_seconds(speed):
    """Return the seconds per epoch of each way in speed.json, one per round; of the plain loop, only the fastest."""
    seconds = {way: [STEPS * steps[way] for steps in speed["rounds"]] for way in speed["rounds"][0]}
    plain = sorted((way for way in seconds if way.startswith("plain")), key=lambda way: median(seconds[way]))
    return {way: values for way, values in seconds.items() if way not in plain[1:]}


def by_variant(ablation):
    """Return the runs in ablation.json as {variant: [figures of each seed]}."""
    variants = {}
    for key, run in ablation.items():
        variants.setdefault(key.partition("; ")[0], []).append(run)
    return variants


def markdown(heads, rows):
    """Return a table in Markdown without its empty columns."""
    kept = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    lines = ["| " + " | ".join(row[index] for index in kept) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + len(kept) * "---|", *lines[1:]]).replace("|  |", "| |")


def table(columns, stages):
    """Return a table with a row for each dict of figures."""
    return markdown(columns, [cells(columns, [stage]) for stage in stages])


def cells(columns, stages):
    """Return the cells of a row: of one dict of figures, or the means and ranges of several."""
    texts = []
    for key, form in map(COLUMNS.get, columns):
        values = [stage.get(key) for stage in stages]
        if None in values:
            texts.append("")
        elif len(values) > 1:
            texts.append(f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})")
        elif key == "std":
            texts.append(" to ".join(f"{value:{form}}" for value in values[0]))
        else:
            error = f" ± {stages[0]['parzen_error']:{form}}" if key == "parzen" else ""
            texts.append(f"{values[0]:{form}}{error}")
    return texts


def base_and_default(figures, stages, columns):
    """Return a table of the base and the default after some epochs."""
    found = [(epochs, name, after(figures, runs, epochs)) for epochs in stages
             for name, runs in (("base", [BASE]), ("default", SEEDS))]
    return markdown(["epochs", "", *columns], [[str(epochs), name, *cells(columns, runs)]
                                               for epochs, name, runs in found if runs])


def all_runs(figures):
    """Return a table of all runs at their last epochs."""
    runs = [{"run": name, **run, "flags": f"`{run['flags'] or 'none'}`"} for name, run in figures["results"].items()]
    columns = ("run", "flags", "epochs", "reconstruction loss", "test MSE", "KS of training codes", *ALL[2:])
    return table(columns, runs)


def gradients(figures):
    """Return a table of the gradients of both losses at a code, and their ratio with the weights λ and 1 − λ."""
    rows = []
    for run in after(figures, ("z2", "z2-lambda0.95", "z8", "z20")):
        recon, gen = run["gradients"]["recon_loss"], run["gradients"]["gen_loss"]
        ratio = run["lambda_"] * recon / ((1 - run["lambda_"]) * gen)
        rows.append([str(run["z_dim"]), f"{run['lambda_']:g}", f"{recon:.3f}", f"{gen:.3f}", f"{ratio:.0f}"])
    return markdown(["dimensions", "λ", "reconstruction loss", "adversarial loss", "ratio, weighted by λ and 1 − λ"],
                    rows)


def speed(figures):
    """Return a table of the time of each way, and how much faster than the plain loop it is."""
    measured, seconds, rows = figures["speed"], epoch_seconds(figures["speed"]), []
    plain = next(way for way in seconds if way.startswith("plain"))
    for way, values in seconds.items():
        ratios = [slow / fast for slow, fast in zip(seconds[plain], values, strict=True)]
        memory, gpu = (measured[kind][way] for kind in ("memory", "gpu_memory"))
        rows.append([way, f"{1000 * median(values) / STEPS:.2f}", with_quartiles(values),
                     with_quartiles(ratios) if way != plain else "1",
                     f"{memory:.0f}" + f" + {gpu:.0f} on the GPU" * (gpu > 0)])
    heads = ["", "ms per step", "seconds per epoch", "times as fast as the plain loop", "memory, MB"]
    return (f"{markdown(heads, rows)}\n\nOn {measured['device']} with torch {measured['torch'].partition('+')[0]}: "
            f"median of {len(measured['rounds'])} rounds of {measured['steps_timed']} steps (quartiles), of times and "
            f"of ratios within a round; an epoch has {STEPS} steps. Memory is what comes on top of torch itself.")


def with_quartiles(values):
    """Return the median of two or more values and, in parentheses, their quartiles."""
    first, middle, third = quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({first:.2f} to {third:.2f})"


def ablation(figures):
    """Return a table of all variants; bold where the range of the seeds does not overlap with the default's."""
    columns = ("held-out MSE", *MATCH, "Parzen, nats", "discriminator accuracy")
    variants, rows = by_variant(figures["ablation"]), []
    for name, runs in variants.items():
        apart = [differ(runs, variants["final"], COLUMNS[column][0]) for column in columns]
        rows.append([name, *(f"**{text}**" if bold else text
                             for text, bold in zip(cells(columns, runs), apart, strict=True))])
    _, epochs, _, precision = next(iter(figures["ablation"])).split("; ")
    return markdown([f"{epochs}, {precision}", *columns], rows)


def differ(runs, others, key):
    """Return whether the ranges of a figure in two groups of several runs do not overlap."""
    ours, theirs = ([run.get(key, 0) for run in group] for group in (runs, others))
    return len(ours) > 1 and (min(ours) > max(theirs) or max(ours) < min(theirs))


TABLES = {
    "summary": lambda figures: base_and_default(figures, (20, 100), ("reconstruction loss", "test MSE", *MATCH[1:])),
    "stages": lambda figures: base_and_default(figures, STAGES, ("test MSE", *MATCH, "Parzen, nats")),
    "runs": all_runs,
    "question-2.4": lambda figures: table(("λ", *ALL, "standard deviation of codes"),
                                          after(figures, ("z8-lambda1", "z8"))),
    "question-2.5": lambda figures: table(("epochs", "reconstruction loss", *ALL[1:]),
                                          [run for epochs in STAGES for run in after(figures, ["z8"], epochs)]),
    "question-2.6": lambda figures: table(("λ", *ALL, "standard deviation of codes"),
                                          after(figures, ("z2-lambda1", "z2", "z2-lambda0.95"))),
    "question-2.7": lambda figures: table(("dimensions", "encoder", "noise in a code", *ALL),
                                          after(figures, ("z8", "z20", "z20-gaussian", "z20-universal"))),
    "gradients": gradients,
    "speed": speed,
    "ablation": ablation,
}
