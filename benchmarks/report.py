"""Write the tables and plots of README.md and docs/ from the figures in docs/results/:  python benchmarks/report.py

A table stands between two lines, <!-- NAME: written by benchmarks/report.py --> and <!-- end of NAME -->; TABLES in
tables.py has the names. --check writes nothing and exits with 1 where a table is not what the figures say.
"""

import argparse
import re
import sys
from pathlib import Path

from tables import TABLES, read_figures

PROJECT = Path(__file__).resolve().parent.parent
FIGURES = PROJECT / "docs" / "results"
START = "<!-- {}: written by benchmarks/report.py -->"
END = "<!-- end of {} -->"


class MarkError(Exception):
    """A mark without its end or with an unknown name; the message says where, and what to do."""


def documents():
    """Return the texts that may hold tables, by their files; raise MarkError where a mark is wrong."""
    texts = {file: file.read_text() for file in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))}
    for file, text in texts.items():
        for name in marks(text):
            if name not in TABLES:
                raise MarkError(f"{file} has a mark for {name}, which is no table; there are {', '.join(TABLES)}")
            if not between(name).search(text):
                raise MarkError(f"{file} lacks the line {END.format(name)} after {START.format(name)}; put it back")
    return texts


def marks(text):
    """Return the names of the tables in a text."""
    return re.findall("^" + START.format(r"(\S+)") + "$", text, re.MULTILINE)


def between(name):
    """Return the pattern of a table with its two marks; the table is its first group."""
    start, end = (re.escape(mark.format(name)) for mark in (START, END))
    return re.compile(rf"(?<=^{start}\n)((?:(?!<!--).)*?)(?=^{end}$)", re.MULTILINE | re.DOTALL)


def stale(figures):
    """Return a list of (file, name of the table, file's text with the table as it should be) for each that is not."""
    found = []
    for file, text in documents().items():
        for name in marks(text):
            table = f"{TABLES[name](figures)}\n"
            if between(name).search(text)[0] != table:
                text = between(name).sub(lambda _, table=table: table, text)
                found.append((file, name, text))
    return found


def write():
    """Write all tables and plots."""
    import plots

    figures = read_figures(FIGURES)
    for file, _, text in stale(figures):
        file.write_text(text)
    plots.write_plots(figures, FIGURES)


def main():
    parser = argparse.ArgumentParser(description="Write the tables and plots of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    args = parser.parse_args()
    try:
        if not args.check:
            return write()
        found = stale(read_figures(FIGURES))
    except MarkError as error:
        sys.exit(f"report.py: error: {error}")
    for file, name, _ in found:
        print(f"{file.relative_to(PROJECT)}: the table {name} is stale; run python benchmarks/report.py")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
