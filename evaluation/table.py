"""The metrics as a table."""

from evaluation.measures import CONFIDENCE


def describe(metrics):
    """Format the metrics as a table."""
    match, likelihood, quality = metrics["prior_match"], metrics["log_likelihood"], metrics["digit_classifier"]
    code_sets = [match[name] for name in ("codes", "training_codes", "prior_draws")]
    windows = [likelihood, likelihood["training_reconstructions"], likelihood["training_images"]]
    image_sets = [quality[name] for name in ("samples", "training_reconstructions", "training_images", "test_images")]
    shares = [[f"{share:.1%}" for share in images["labels"].values()] for images in (image_sets[0], image_sets[3])]
    name = "MNIST" if metrics["trained_on"] == "mnist" else "the bundled digits"
    errors = metrics["reconstruction"]["mse_per_label"]
    return "\n".join([
        f"{metrics['weights']}: z_dim {metrics['z_dim']}, {metrics['posterior']} encoder, {metrics['networks']} "
        f"networks, {metrics['test_images']:,} test images of {name}, {metrics['seconds']:.0f} s on "
        f"{metrics['device']}",
        "",
        row("codes against the prior", "test codes", "training codes", "prior samples"),
        row("  mean per dimension", *(span(codes["mean"]) for codes in code_sets)),
        row("  standard deviation", *(span(codes["std"]) for codes in code_sets)),
        row("  squared Frechet distance", *(f"{codes['frechet']:.4f}" for codes in code_sets)),
        row("  Kolmogorov-Smirnov distance", *(f"{codes['ks']:.4f}" for codes in code_sets)),
        row("  classifier two-sample accuracy", *(f"{codes['two_sample_accuracy']:.3f}" for codes in code_sets)),
        "",
        row("", "", "reconstructed"),
        row("digit classifier's features", "samples", "training images", "training images", "test images"),
        row("  squared Frechet distance",
            *(f"{images['frechet_to_test_images']:.2f}" for images in image_sets[:3]), "0"),
        row(f"  confidence of at least {CONFIDENCE}", *(f"{images['sure']:.1%}" for images in image_sets)),
        "",
        label_row("label", "all", range(10)),
        label_row("  reconstruction error", f"{metrics['reconstruction']['mse']:.4f}",
                  (f"{errors[str(label)]:.4f}" if str(label) in errors else "-" for label in range(10))),
        label_row("  share of samples", "", shares[0]),
        label_row("  share of test images", "", shares[1]),
        "",
        row("Parzen log-likelihood of", "", "reconstructed"),
        row("the test images, windows around", "samples", "training images", "training images"),
        row("  nats", *(f"{window['mean']:.1f} +- {window['standard_error']:.1f}" for window in windows)),
        row("  sigma", *(f"{window['sigma']:.3f}" for window in windows)),
        row("  number of windows", *(f"{window['samples']:,}" for window in windows))])


def row(title, *cells):
    return f"{title:<32}" + "".join(f"{cell:>17}" for cell in cells)


def label_row(title, total, cells):
    return f"{title:<25}{total:>8}" + "".join(f"{cell:>8}" for cell in cells)


def span(values):
    return f"{min(values):.2f} to {max(values):.2f}"
