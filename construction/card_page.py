"""The data card as a page: its blocks, as Markdown and as HTML.

The texts of blocks may hold untrusted names and captions. Only this file and its template escape
them. The HTML has no script and loads nothing from outside; pictures are in it as data URLs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from construction.records import Box
from datasets import thumbnails
from datasets.images import BrokenImage, read_image
from utils.pages import render
from utils.tables import in_markdown, markdown
from utils.text import visible

THUMBNAIL = (128, 256)  # largest width and height, in pixels
LONGEST_BAR = 40  # characters, in Markdown


class Words(NamedTuple):
    """A paragraph."""

    text: str


class Grid(NamedTuple):
    """A table.

    Attributes:
        head: the columns' names, each once.
        left: columns that hold words, from the first.
        sums: numbers of the rows, from 0, that stand out.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    left: int = 1
    sums: Sequence[int] = ()


class Bars(NamedTuple):
    """A histogram of one or two series.

    Attributes:
        series: their names.
        rows: (bin, the count of each series).
    """

    title: str
    series: tuple[str, ...]
    rows: Sequence[tuple[str, tuple[int, ...]]]

    @property
    def most(self) -> int:
        return max((count for _, counts in self.rows for count in counts), default=0) or 1


class Example(NamedTuple):
    """What fell out.

    Attributes:
        reason: examples of one reason follow each other.
        thumbnails: data URLs; empty if the file cannot be read any more.
    """

    reason: str
    name: str
    detail: str
    thumbnails: tuple[str, ...]


class Examples(NamedTuple):
    """Examples, in the HTML with pictures."""

    title: str
    examples: Sequence[Example]

    @property
    def by_reason(self) -> list[tuple[str, list[Example]]]:
        return [(reason, list(of)) for reason, of in groupby(self.examples, lambda e: e.reason)]


class Shown(NamedTuple):
    """A pair of the sheet.

    Attributes:
        pictures: (view, name, thumbnail as a data URL or empty).
        labels: such as "gender: male".
    """

    place: str
    pictures: tuple[tuple[str, str, str], ...]
    caption: str
    labels: Sequence[str]


class Sheet(NamedTuple):
    """Pairs, in the HTML alone."""

    pairs: Sequence[Shown]


class Code(NamedTuple):
    """Text in a code block."""

    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.rstrip("\n").split("\n")


Block = Words | Grid | Bars | Examples | Sheet | Code


class Section(NamedTuple):
    """A part of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def runs(self) -> list[tuple[str, list[Block]]]:
        """Blocks of one kind that follow each other, by the kind's name."""
        of_kind = groupby(self.blocks, lambda block: type(block).__name__)
        return [(kind, list(blocks)) for kind, blocks in of_kind]


class Page(NamedTuple):
    """The page.

    Attributes:
        totals: (count, of what), the first that a reader sees.
        warnings: what a user of the data must know.
    """

    title: str
    totals: Sequence[tuple[int, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]


def in_html(page: Page) -> str:
    """The page as one HTML file."""
    template = Path(__file__).parent / "templates/card.html.jinja"
    return render(template, page=page, thumbnail=THUMBNAIL)


def in_text(page: Page) -> str:
    """The page as Markdown, without pictures."""
    parts = [f"# {in_markdown(page.title)}"]
    if page.warnings:
        parts.append("\n".join(f"- **Warning:** {in_markdown(text)}" for text in page.warnings))
    parts.append(", ".join(f"{count} {what}" for count, what in page.totals) + ".")
    for section in page.sections:
        parts.append(f"## {in_markdown(section.title)}")
        parts += map(_block, section.blocks)
    return "\n\n".join(parts) + "\n"


def thumbnail(file: Path | str, box: Box | None = None) -> str:
    """A small JPEG of a picture, or of a box in it, as a data URL; empty if it cannot be read."""
    try:
        image = read_image(str(file))
        if box is not None:
            image = thumbnails.cropped(image, box)
    except (BrokenImage, ValueError):
        return ""
    return thumbnails.thumbnail(image, THUMBNAIL)[1]


def _block(block: Block) -> str:
    """A block as Markdown."""
    match block:
        case Words():
            return in_markdown(block.text)
        case Grid():
            return _titled(block.title, markdown(block.head, block.rows, block.left))
        case Bars():
            return _titled(block.title, _fenced("", _bars(block)))
        case Examples():
            rows = [(e.reason, e.name, e.detail) for e in block.examples]
            return _titled(block.title, markdown(("reason", "picture", "detail"), rows, left=3))
        case Sheet():
            return "card.html shows them."
        case Code():
            return _fenced(block.language, "\n".join(map(visible, block.lines)))


def _titled(title: str, text: str) -> str:
    return f"### {in_markdown(title)}\n\n{text}"


def _bars(block: Bars) -> str:
    bins = max((len(name) for name, _ in block.rows), default=0)
    wide = max(map(len, block.series))
    return "\n".join(
        f"{name if first else '':<{bins}}  {series:<{wide}}  "
        f"{'█' * -(-LONGEST_BAR * count // block.most)} {count}"
        for name, counts in block.rows
        for first, series, count in zip((True, False), block.series, counts, strict=False)
    )


def _fenced(language: str, text: str) -> str:
    """A code block, whose fence is longer than any in the text."""
    fence = max(("``", *re.findall("`+", text)), key=len) + "`"
    return f"{fence}{language}\n{text}\n{fence}"
