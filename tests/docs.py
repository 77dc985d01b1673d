"""README.md and docs/: what they name exists, and their tables are those of the measured figures."""

import hashlib
import importlib
import json
import re
import unittest

from unittests import HERE, Group

__unittest = True

FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r'\]\(([^()\s]+)\)|(?:src|href)="([^"]+)"')
PATH = re.compile(r"(?:assets|benchmarks|docs|tests|training)/[\w./-]*|[\w./-]+\.(?:py|md)")
COMMAND = re.compile(r"python (train\.py|-m evaluation|-m benchmarks\.\w+)\b([^&|;#]*)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


@unittest.skipUnless((HERE / "docs").is_dir() and (HERE / "benchmarks").is_dir(),
                     "the documentation: docs/ or benchmarks/ is missing")
class Docs(Group):
    """Links, commands, paths and generated tables."""

    def setUp(self):
        super().setUp()
        self.pages = {file: file.read_text(encoding="utf-8")
                      for file in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}
        sources = {"train.py": HERE / "train.py", "-m evaluation": HERE / "evaluation" / "__main__.py",
                   **{f"-m benchmarks.{file.stem}": file for file in (HERE / "benchmarks").glob("*.py")}}
        self.flags = {program: {"--help", *re.findall(r'"(--[\w-]+)"', source.read_text(encoding="utf-8"))}
                      for program, source in sources.items()}

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
        unknown, known = [], {**self.flags, "": set().union(*self.flags.values())}  # "": a flag that stands alone
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
        pages = importlib.import_module("benchmarks.report").updated_pages()
        stale = [page.name for page, text in pages.items() if text != self.pages[page]]
        self.check(not stale, f"stale tables (run python -m benchmarks.report): {', '.join(stale)}")
        result = json.loads((HERE / "docs" / "results" / "results.json").read_text())["z8"]
        weights = (HERE / "assets" / "autoencoder.pt").read_bytes()
        self.assertEqual(hashlib.md5(weights, usedforsecurity=False).hexdigest(), result["pretrained_md5"])


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them of headings that differ."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
