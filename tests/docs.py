"""README.md and docs/: links, flags and figures that stay right when something else changes."""

import hashlib
import json
import re
import sys
import unittest
from unittest import mock

from evaluation.__main__ import make_parser as make_evaluation_parser
from training.options import make_parser
from unittests import HERE, Group

FILES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
FOLDERS = r"(?:training|runs|evaluation|tests|benchmarks|docs|pretrained|digits)"


def headings(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
            for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines() if line.startswith("#")}


@unittest.skipUnless((HERE / "docs").is_dir() and (HERE / "benchmarks").is_dir(), "there are no docs/ here")
class Docs(Group):
    """What README.md and docs/ name exists, and their figures are those in docs/results/."""

    def test_links(self):
        for file in FILES:
            for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
                if not target.startswith("http"):
                    path, _, anchor = target.partition("#")
                    page = (file.parent / path).resolve() if path else file
                    self.check(page.exists(), f"{file.name} links {target}, which is not there")
                    self.check(not anchor or anchor in headings(page.read_text()),
                               f"{file.name} links {target}, but there is no such heading")

    def test_named_files(self):
        for file in FILES:
            for path in re.findall(rf"`({FOLDERS}/[\w/.]*)`", file.read_text()):
                self.check((HERE / path).exists(), f"{file.name} names {path}, which is not there")

    def test_flags(self):
        parsers = {"train.py": make_parser().format_help(), "-m evaluation": make_evaluation_parser().format_help()}
        for file in FILES:
            for program, flags in re.findall(r"python (train\.py|-m evaluation|benchmarks/\w+\.py)( [^`#\n]*)",
                                             file.read_text()):
                known = parsers.get(program) or (HERE / program).read_text()
                for flag in re.findall(r"--[\w-]+", flags):
                    self.check(flag in known, f"{file.name} gives {program} the flag {flag}, which it does not have")

    def test_table_of_flags(self):
        known = set(re.findall(r"--[\w-]+", make_parser().format_help())) - {"--help"}
        table = (HERE / "docs" / "RUNS.md").read_text().partition("## All flags")[2]
        listed = {flag for line in table.splitlines() if line.startswith("| `--")
                  for flag in re.findall(r"--[\w-]+", line.split("|")[1])}
        self.assertEqual(listed, known, "docs/RUNS.md and train.py --help have different flags")

    def test_figures(self):
        with mock.patch.object(sys, "path", [str(HERE / "benchmarks"), *sys.path]):
            import report
        for file, name, _ in report.stale(report.read_figures(report.FIGURES)):
            self.check(False, f"the table {name} in {file.name} is not what docs/results/ says: python "
                              f"benchmarks/report.py writes it")

    def test_pretrained_weights(self):
        result = json.loads((HERE / "docs" / "results" / "results.json").read_text())["z8"]
        weights = (HERE / "pretrained" / "model_checkpoint.pt").read_bytes()
        self.assertEqual(hashlib.md5(weights).hexdigest(), result["weights_md5"], "these are not the run z8's weights")

    def test_lengths(self):
        self.assertLessEqual(len((HERE / "README.md").read_text().splitlines()), 150)
        self.assertLessEqual(len((HERE / "docs" / "DEVELOPING.md").read_text().splitlines()), 60)
