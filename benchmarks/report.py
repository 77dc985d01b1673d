"""Write the tables and plots of README.md and docs/ from the figures in docs/results/:  python -m benchmarks.report

A table stands between two lines, <!-- NAME: written by benchmarks/report.py --> and <!-- end of NAME -->; TABLES in
tables.py has the names.
"""

import re
from pathlib import Path

from benchmarks.tables import TABLES, read_figures

PROJECT = Path(__file__).resolve().parent.parent
FIGURES = PROJECT / "docs" / "results"
START = ": written by benchmarks/report.py -->"
TABLE = re.compile(rf"(?<=^<!-- )(\S+)({START}\n)((?:(?!<!--).)*?)(?=^<!-- end of \1 -->$)", re.MULTILINE | re.DOTALL)


def updated_pages():
    """Return the texts of README.md and docs/ with the tables as the figures say, by their files."""
    figures, pages = read_figures(FIGURES), {}
    for file in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8")
        if text.count(START) != len(TABLE.findall(text)):
            raise ValueError(f"{file}: a table lacks the line <!-- end of NAME -->")
        pages[file] = TABLE.sub(lambda table: f"{table[1]}{table[2]}{TABLES[table[1]](figures)}\n", text)
    return pages


def main():
    """Write all tables and plots."""
    from benchmarks import plots

    for file, text in updated_pages().items():
        file.write_text(text, encoding="utf-8")
    plots.write_plots(read_figures(FIGURES), FIGURES)


if __name__ == "__main__":
    main()
