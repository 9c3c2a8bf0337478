"""Tables for the terminal and for papers. Cells may hold untrusted text; only this file escapes it
for each format."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence

from prettytable import PrettyTable, TableStyle

from utils.text import visible

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}", "*": "{*}",  # at the start of a row they would be arguments of the \\ before it
})  # fmt: skip
DASHES = re.compile("-(?=-)")  # LaTeX joins two hyphens to a dash
MARKDOWN = re.compile(r"([\\`*\[\]<>|&~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
GREY = r"\textcolor{{gray}}{{{}}}"  # needs LaTeX's package xcolor
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")  # a spreadsheet does not read it as a formula


class Grey(str):
    """A cell that stands back: italic in Markdown, grey in LaTeX."""


def console(head: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table with a frame; the first `left` columns are aligned left."""
    return _table(head, rows, visible, left).get_string()


def markdown(head: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left."""
    table = _table(head, rows, in_markdown, left, "*{}*")
    table.set_style(TableStyle.MARKDOWN)
    return table.get_string()


def latex(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A LaTeX tabular; its first column is aligned left."""
    return _table(head, rows, in_latex, grey=GREY).get_latex_string().replace("\r\n", "\n")


def as_csv(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values; lines end with a line feed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*map(in_csv, row)] for row in (head, *rows))
    return text.getvalue()


def in_markdown(text: object) -> str:
    """Escape special characters of Markdown and HTML with a backslash."""
    return MARKDOWN.sub(r"\\\1", visible(text))


def in_latex(text: object) -> str:
    """Escape special characters of LaTeX, so that they print as themselves."""
    return DASHES.sub("-{}", visible(text).translate(LATEX))


def in_csv(text: object) -> str:
    """Put an apostrophe before text that a spreadsheet would read as a formula."""
    shown = visible(text)
    formula = shown.lstrip().startswith(("=", "+", "-", "@")) and not NUMBER.fullmatch(shown)
    return f"'{shown}" if formula else shown


def mean_and_deviation(values: list[float]) -> str:
    """A cell: the mean; with two or more values, also the standard deviation; empty for none."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    escape: Callable[[object], str],
    left: int = 1,
    grey: str = "{}",
) -> PrettyTable:
    def shown(cell: object) -> str:
        return grey.format(escape(cell)) if isinstance(cell, Grey) and cell else escape(cell)

    table = PrettyTable([escape(name) for name in head], align="r")
    table.add_rows([[shown(cell) for cell in row] for row in rows])
    for name in table.field_names[:left]:
        table.align[name] = "l"
    return table
