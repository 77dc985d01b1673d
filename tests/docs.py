"""README.md and docs/: what they name exists, and their tables are those of the measured figures."""

import hashlib
import importlib
import json
import re
import unittest
from pathlib import Path

from unittests import HERE, Group

__unittest = True

PROGRAMS = {"train.py": "train", "-m evaluation": "evaluation.__main__"}  # whose make_parser() knows the flags
FOLDERS = ("assets", "benchmarks", "docs", "tests", "training")  # evaluation/ is also a run's
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python (train\.py|-m evaluation|-m benchmarks\.\w+)\b([^&|;#]*)")
SPAN = re.compile(r"`([^`]+)`")


@unittest.skipUnless((HERE / "docs").is_dir() and (HERE / "benchmarks").is_dir(),
                     "the documentation: docs/ or benchmarks/ is missing")
class Docs(Group):
    """Links, commands, paths and generated tables."""

    def setUp(self):
        super().setUp()
        self.pages = {file: file.read_text(encoding="utf-8")
                      for file in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}

    def test_links_and_pictures_exist(self):
        broken = []
        for page, text in self.pages.items():
            for target in re.findall(r'\]\(([^()\s]+)\)|(?:src|href)="([^"]+)"', without_code(text)):
                path, _, anchor = "".join(target).partition("#")
                file = page.parent / path if path else page
                if "://" not in path and not (file.exists() and (not anchor or anchor in anchors(file))):
                    broken.append(f"{page.name}: {''.join(target)}")
        self.check(not broken, f"broken links: {', '.join(broken)}")

    def test_commands_and_flags_exist(self):
        found = [(page.name, program, flags_in(rest)) for page, text in self.pages.items() for line in code(text)
                 for program, rest in [("", line)] * line.startswith("--") + COMMAND.findall(line)]
        known = {program: flags_of(program) for _, program, _ in found}
        self.check({"train.py", "-m evaluation", "-m benchmarks.results"} <= known.keys(), "the commands are not found")
        unknown = [f"{page}: {program} {flag}" for page, program, flags in found for flag in flags
                   if flag not in known[program]]
        self.check(not unknown, f"unknown flags: {', '.join(unknown)}")

    def test_paths_exist(self):
        files = {path.name for folder in (HERE, *(HERE / name for name in (*FOLDERS, "evaluation")))
                 for path in folder.glob("*")}
        spans = [(page.name, span) for page, text in self.pages.items() for span in SPAN.findall(FENCED.sub("", text))]
        missing = [f"{page}: {span}" for page, span in spans if is_path(span) and not ((HERE / span).exists()
                                                                                      or span in files)]
        self.check(not missing, f"missing files: {', '.join(missing)}")

    def test_tables_are_those_of_the_figures(self):
        pages = importlib.import_module("benchmarks.report").updated_pages()
        stale = [page.name for page, text in pages.items() if text != self.pages[page]]
        self.check(not stale, f"stale tables (run python -m benchmarks.report): {', '.join(stale)}")

    def test_every_flag_is_in_the_table_of_flags(self):
        table = self.pages[HERE / "docs" / "RUNS.md"].partition("## All flags")[2]
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
        listed = {flag for row in rows for flag in flags_in(row)}
        self.assertEqual(listed, {flag for flag in flags_of("train.py") if flag.startswith("--")} - {"--help"})

    def test_pretrained_weights_are_those_of_the_figures(self):
        result = json.loads((HERE / "docs" / "results" / "results.json").read_text())["z8"]
        weights = (HERE / "assets" / "autoencoder.pt").read_bytes()
        self.assertEqual(hashlib.md5(weights, usedforsecurity=False).hexdigest(), result["pretrained_md5"])

    def test_lengths(self):
        for page, most in {"README.md": 150, "docs/DEVELOPING.md": 60}.items():
            self.assertLessEqual(len(self.pages[HERE / page].splitlines()), most, page)


def without_code(text):
    return SPAN.sub("", FENCED.sub("", text))


def code(text):
    """Return the code of a page: the lines of its blocks, and its spans, each as one line."""
    lines = [line for block in FENCED.finditer(text) for line in block[0].splitlines()[1:-1]]
    return lines + [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them of headings that differ."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def flags_in(text):
    return re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)


def flags_of(program):
    """Return the flags of a program; benchmarks/ is only searched for them. "" stands for any program."""
    modules = [PROGRAMS[program]] if program in PROGRAMS else [] if program else PROGRAMS.values()
    scripts = [] if program in PROGRAMS else (HERE / "benchmarks").glob(f"{program.rpartition('.')[2] or '*'}.py")
    texts = [script.read_text(encoding="utf-8") for script in scripts]
    parsers = [importlib.import_module(module).make_parser() for module in modules]
    return {"--help", *(flag for text in texts for flag in re.findall(r'"(--[\w-]+)"', text)),
            *(flag for parser in parsers for action in parser._actions for flag in action.option_strings)}


def is_path(span):
    """Return whether what stands in backticks looks like a file or folder of the repository."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) and (span.partition("/")[0] in FOLDERS and "/" in span
                                                            or Path(span).suffix in (".py", ".md"))
