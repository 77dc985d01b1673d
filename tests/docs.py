"""README.md and docs/: what they name exists, and their tables and pictures are those of the measured figures."""

import hashlib
import importlib
import json
import re
import unittest
from importlib.util import find_spec
from statistics import mean
from unittest import mock

import numpy as np
import torch

from evaluation.pictures import grid
from tests.common import TrainGroup
from tests.train_run import read_png
from unittests import HERE, listen

__unittest = True

FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r'\]\(([^()\s]+)\)|(?:src|href)="([^"]+)"')
PATH = re.compile(r"(?:assets|benchmarks|docs|tests|training)/[\w./-]*|[\w./-]+\.(?:py|md)")
COMMAND = re.compile(r"python (train\.py|-m evaluation|-m benchmarks\.\w+)\b([^&|;#]*)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
WITH_MATPLOTLIB = unittest.skipUnless(find_spec("matplotlib"), "the docs' pictures: matplotlib is not installed")


@unittest.skipUnless((HERE / "docs").is_dir() and (HERE / "benchmarks").is_dir(), "docs/ or benchmarks/ is missing")
class Docs(TrainGroup):
    """Links, commands, paths, generated tables; pictures of a tiny run and of the measured figures, by their values."""

    needs = (*TrainGroup.needs, "benchmarks.report", "benchmarks.tables")

    def setUp(self):
        super().setUp()
        self.pages = {file: file.read_text(encoding="utf-8")
                      for file in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}

    def test_links_and_paths_exist(self):
        missing, names = [], {file.name for file in HERE.glob("*/*")}
        for page, text in self.pages.items():
            prose = FENCED.sub("", text)
            for target in map("".join, LINK.findall(SPAN.sub("", prose))):
                path, _, anchor = target.partition("#")
                file = page.parent / path if path else page
                if "://" not in path and not (file.exists() and (not anchor or anchor in anchors(file))):
                    missing.append(f"{page.name}: {target}")
            missing += [f"{page.name}: {span}" for span in SPAN.findall(prose)
                        if PATH.fullmatch(span) and span not in names and not (HERE / span).exists()]
        self.check(not missing, f"missing: {', '.join(missing)}")

    def test_commands_and_flags_exist(self):
        sources = {"train.py": HERE / "train.py", "-m evaluation": HERE / "evaluation" / "__main__.py",
                   **{f"-m benchmarks.{file.stem}": file for file in (HERE / "benchmarks").glob("*.py")}}
        known = {program: {"--help", *re.findall(r'"(--[\w-]+)"', source.read_text(encoding="utf-8"))}
                 for program, source in sources.items()}
        known[""] = set().union(*known.values())  # of a flag that stands alone
        unknown = []
        for page, text in self.pages.items():
            spans = [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]
            for line in [*spans, *(line for block in FENCED.finditer(text) for line in block[0].splitlines())]:
                for program, rest in [("", line)] * line.startswith("--") + COMMAND.findall(line):
                    unknown += [f"{page.name}: {program} {flag}" for flag in FLAG.findall(rest)
                                if flag not in known.get(program, ())]
        self.check(not unknown, f"unknown flags: {', '.join(unknown)}")
        rows = re.findall(r"^\| `--[^|]+", self.pages[HERE / "docs" / "RUNS.md"], re.MULTILINE)
        self.assertEqual(set(FLAG.findall(" ".join(rows))), known["train.py"] - {"--help"})

    def test_tables_and_pretrained_weights_are_those_of_the_figures(self):
        pages = self.report.updated_pages()
        stale = [page.name for page, text in pages.items() if text != self.pages[page]]
        self.check(not stale, f"stale tables (run python -m benchmarks.report): {', '.join(stale)}")
        result = json.loads((HERE / "docs" / "results" / "results.json").read_text())["z8"]
        file, table = HERE / "assets" / "autoencoder.pt", (HERE / "assets" / "README.md").read_text(encoding="utf-8")
        stated = dict(re.findall(r"^\| `([^`]+)`.* `(\w+)` \|$", table, re.MULTILINE))
        for name in ("autoencoder.pt", "digit_classifier.pt", "digits.csv.gz"):
            digest = hashlib.md5((file.parent / name).read_bytes(), usedforsecurity=False).hexdigest()
            self.assertEqual(stated[name], digest, name)
        self.assertEqual(stated[file.name], result["pretrained_md5"])
        missing, unexpected = self.models.AdversarialAE(8).load_state_dict(torch.load(file, weights_only=True), False)
        self.assertEqual(({key.partition(".")[0] for key in missing}, unexpected), ({"discriminator"}, []))

    @WITH_MATPLOTLIB
    def test_progress_and_strip_show_the_pictures_of_a_run(self):
        pictures = importlib.import_module("benchmarks.pictures")
        run, _ = self.train_quietly("--epochs", "1")
        paths = torch.rand(120, 1, 28, 28).mul(2).sub(1)  # a stand-in for interpolations
        (run / "evaluation").mkdir()
        grid(paths, 12).save(run / "evaluation" / "interpolations.png")
        with mock.patch.multiple(pictures, SHOWN=(0, 1, 0, 1), STRIP_EPOCHS=(0, 1), LABELS=(3,)):
            figures = pictures.draw_progress(run), pictures.draw_strip(run)
        _, above, _, _, _, below, _, _, strip, shown_paths = (
            panel.images[0].get_array() for figure in figures for panel in figure.axes)
        samples, reconstructions = (read_png(run / "results" / name) for name in (
            "Prior_samples/samples_epoch_1.png", "Reconstruction/reconstruction_1.png"))
        np.testing.assert_array_equal(above, samples)
        np.testing.assert_array_equal(below, reconstructions)
        np.testing.assert_array_equal(strip[31:59, 271:299], samples[32:60, 32:60])  # the tenth digit
        np.testing.assert_allclose(shown_paths[1:29, 31:59], (paths[37, 0] + 1) * 127.5, atol=1)

    @WITH_MATPLOTLIB
    def test_codes_have_their_labels_colours_and_a_name_at_each_median(self):
        pictures, to_hex = (importlib.import_module("benchmarks.pictures"),
                            importlib.import_module("matplotlib.colors").to_hex)
        images, labels = self.few
        model, colors = self.models.AdversarialAE(2).eval().requires_grad_(False), np.array(pictures.COLORS)
        last = [layer for layer in model.encoder.modules() if isinstance(layer, torch.nn.Linear)][-1]
        for far in (False, True):
            last.weight.mul_(1e4 if far else 1)
            codes, decoded = model.encoder(images), listen(model.decoder)
            panel, plane = pictures.draw_codes(model, images, labels).axes[:2]
            cloud, names = panel.collections[0], panel.child_axes[0].texts if far else panel.texts
            np.testing.assert_allclose(cloud.get_offsets(), codes, rtol=1e-5)
            np.testing.assert_array_equal([*map(to_hex, cloud.get_facecolors())], colors[labels])
            medians = {str(label): np.quantile(codes[labels == label], 0.5, 0, method="lower") for label in range(10)}
            np.testing.assert_equal({name.get_text(): np.float32(name.get_position()) for name in names}, medians)
            np.testing.assert_allclose(decoded[-1][0][[0, 1, 20]], [[-3.8, 3.8], [-3.4, 3.8], [-3.8, 3.4]], rtol=1e-5)
            self.assertEqual(plane.images[0].get_array().shape, (602, 602))
            self.assertEqual(plane.images[0].get_extent(), [-4, 4, -4, 4])

    @WITH_MATPLOTLIB
    def test_plots_show_the_figures(self):
        figures, plots = self.tables.read_figures(self.report.FIGURES), importlib.import_module("benchmarks.plots")
        with mock.patch.object(plots, "save") as save:
            plots.write_plots(figures, self.folder())
        drawn = {file.stem: figure.axes[0] for figure, file in (call.args for call in save.call_args_list)}
        lines = {line.get_label(): line.get_ydata() for name in ("quality", "loss") for line in drawn[name].lines}
        base, plain = figures["results"]["z8-base"], figures["results"]["z8-lambda1"]
        variants = self.tables.by_variant(figures["ablation"])
        distances = [mean(run["frechet_samples"] for run in runs) for runs in variants.values()]
        for shown, expected in (
                (lines["base, samples"], [stage["frechet_samples"] for stage in (*base["stages"], base)]),
                (lines["8 dimensions, λ = 1"], plain["curves"]["reconstruction loss"]),
                ([bar.get_width() for bar in drawn["ablation"].patches[:len(distances)]], sorted(distances))):
            np.testing.assert_allclose(shown, expected)
        for name in ("z8-base", "z20"):  # which may not be measured yet
            figures["results"].pop(name)
        self.assertEqual([len(draw(figures).axes[0].lines) for draw in (plots.quality, plots.loss)], [2, 4])
        figure, file = save.call_args.args
        plots.save(figure, file)
        self.assertGreater(read_png(file).std(), 10)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them of headings that differ."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
