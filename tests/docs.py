"""README.md and docs/: what they name exists, and their tables are those of the measured figures."""

import hashlib
import importlib
import json
import re
import sys
import unittest
from pathlib import Path
from unittest import mock

from unittests import HERE, Group

__unittest = True

PROGRAMS = {"train.py": "training.options", "-m evaluation": "evaluation.__main__",
            "-m evaluation.classifier": "evaluation.classifier"}  # whose make_parser() knows the flags
FOLDERS = ("assets", "benchmarks", "docs", "tests", "training")  # evaluation/ is also a run's
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python (train\.py|-m evaluation(?:\.\w+)?|benchmarks/\w+\.py)([^&|;#]*)")
SPAN = re.compile(r"`([^`]+)`")


@unittest.skipUnless((HERE / "docs").is_dir() and (HERE / "benchmarks").is_dir(),
                     "the documentation: docs/ or benchmarks/ is missing")
class Docs(Group):
    """Links, commands, paths and generated tables."""

    def setUp(self):
        super().setUp()
        self.pages = {file: file.read_text() for file in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}

    def test_links_and_pictures_exist(self):
        broken = []
        for page, text in self.pages.items():
            for target in re.findall(r'\]\(([^()\s]+)\)|(?:src|href)="([^"]+)"', without_code(text)):
                path, _, anchor = "".join(target).partition("#")
                file = page.parent / path if path else page
                if "://" not in path and not (file.exists() and (not anchor or anchor in anchors(file.read_text()))):
                    broken.append(f"{page.name}: {''.join(target)}")
        self.check(not broken, f"broken links: {', '.join(broken)}")

    def test_flags_exist(self):
        known, unknown = {}, []
        for page, text in self.pages.items():
            for program, flags in commands(text):
                if program not in known:
                    known[program] = flags_of(program)
                unknown += [f"{page.name}: {program} {flag}" for flag in flags if flag not in known[program]]
        self.check({"train.py", "-m evaluation"} <= known.keys(), "the documentation shows no commands any more")
        self.check(not unknown, f"unknown flags: {', '.join(unknown)}")

    def test_paths_exist(self):
        files = {path.name for folder in (HERE, *(HERE / name for name in (*FOLDERS, "evaluation")))
                 for path in folder.glob("*")}
        missing = [f"{page.name}: {path}" for page, text in self.pages.items() for path in paths(text)
                   if not ((HERE / path).exists() or path in files)]
        self.check(not missing, f"missing files: {', '.join(missing)}")

    def test_tables_are_those_of_the_figures(self):
        with mock.patch.object(sys, "path", [str(HERE / "benchmarks"), *sys.path]):
            report = importlib.import_module("report")
        tables = [f"{file.name}: {name}" for file, name, _ in report.stale(report.read_figures(report.FIGURES))]
        self.check(not tables, f"stale tables (run python benchmarks/report.py): {', '.join(tables)}")

    def test_every_flag_is_in_the_table_of_flags(self):
        table = (HERE / "docs" / "RUNS.md").read_text().partition("## All flags")[2]
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
        listed = {flag for row in rows for flag in flags_in(row)}
        self.assertEqual(listed, {flag for flag in flags_of("train.py") if flag.startswith("--")} - {"--help"})

    def test_pretrained_weights_are_those_of_the_figures(self):
        result = json.loads((HERE / "docs" / "results" / "results.json").read_text())["z8"]
        weights = (HERE / "assets" / "autoencoder.pt").read_bytes()
        self.assertEqual(hashlib.md5(weights).hexdigest(), result["pretrained_md5"])

    def test_lengths(self):
        for page, most in {"README.md": 150, "docs/DEVELOPING.md": 60}.items():
            self.assertLessEqual(len((HERE / page).read_text().splitlines()), most, page)


def without_code(text):
    return SPAN.sub("", FENCED.sub("", text))


def code(text):
    """Return the code of a page: the lines of its blocks, and its spans, each as one line."""
    lines = [line for block in FENCED.finditer(text) for line in block[0].splitlines()[1:-1]]
    return lines + [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)]
    earlier = [headings[:index].count(heading) for index, heading in enumerate(headings)]
    return [f"{heading}-{count}" if count else heading for heading, count in zip(headings, earlier, strict=True)]


def commands(text):
    """Give the program and the flags of every command in a page; for a span of flags alone, "" as the program."""
    for line in code(text):
        if line.startswith("--"):
            yield "", flags_in(line)
        for program, rest in COMMAND.findall(line):
            yield program, flags_in(rest)


def flags_in(text):
    return re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)


def flags_of(program):
    """Return the flags of a program; a script in benchmarks/ is only searched for them. "" stands for any program."""
    scripts = [HERE / program] if program.startswith("benchmarks/") else []
    modules = [PROGRAMS[program]] if program in PROGRAMS else []
    if not program:
        scripts, modules = sorted((HERE / "benchmarks").glob("*.py")), PROGRAMS.values()
    flags = {"--help", *(flag for script in scripts for flag in re.findall(r'"(--[\w-]+)"', script.read_text()))}
    for module in modules:
        flags |= {flag for action in importlib.import_module(module).make_parser()._actions
                  for flag in action.option_strings}
    return flags


def paths(text):
    """Give what a page has in backticks that looks like a file or folder of the repository."""
    for span in SPAN.findall(FENCED.sub("", text)):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) and (span.partition("/")[0] in FOLDERS and "/" in span
                                                            or Path(span).suffix in (".py", ".md")):
            yield span
