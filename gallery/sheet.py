"""Hits as one picture (PNG) or one page (HTML), to keep or to send.

    sheet(hits, Path("hits.png"), root, query="a man in a red coat")
    sheet(hits, Path("hits.html"), root, heat=partial(heat_maps, run.model, text_D=text_D))

The page loads nothing from outside. A picture that has vanished has a placeholder.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps

from datasets.thumbnails import cropped, thumbnail
from gallery.pictures import Box, box_of, whole_picture
from gallery.records import clock
from utils.errors import UserError
from utils.files import write_atomically
from utils.pages import render
from utils.text import visible

SIZES = {"picture": (150, 300), "heat": (150, 300), "whole": (270, 300)}  # pixels, width and height
LARGER = 2  # times as many pixels in a page, for sharp screens
PAGE, MARGIN, GAP, LINE = 1440, 28, 8, 20  # pixels of a PNG
PAPER, INK, SOFT, LINES = (250, 250, 248), (24, 24, 28), (110, 110, 116), (226, 226, 222)
FRAME = ((255, 255, 255), (214, 0, 40))  # around the person: visible on any ground

Heat = Callable[[Sequence[PILImage.Image]], Sequence[np.ndarray]]


class Hit(Protocol):
    """What a sheet shows of a hit.

    Attributes:
        rank: from 1.
        score: similarity.
        count: pictures for which the hit stands, itself among them.
        item: columns of `gallery.records.SCHEMA`; all but `path` may be missing or None.
    """

    @property
    def rank(self) -> int: ...
    @property
    def score(self) -> float: ...
    @property
    def count(self) -> int: ...
    @property
    def item(self) -> Mapping[str, Any]: ...


class Shown(NamedTuple):
    """A hit with its pictures.

    Attributes:
        facts: what is known of it, in words.
        pictures: by their names in SIZES; empty if the hit's picture cannot be read.
        problem: why not.
    """

    hit: Hit
    facts: list[str]
    pictures: dict[str, PILImage.Image]
    problem: str = ""

    @property
    def name(self) -> str:
        """The file and its folder: names of files alone repeat."""
        return "/".join(PurePath(self.hit.item["path"]).parts[-2:])

    @property
    def pieces(self) -> list[str]:
        """The name in pieces, between which a line may break."""
        return re.split(r"(?<=[/_-])|(?=\.)", self.name)


def sheet(
    hits: Sequence[Hit],
    path: Path,
    root: str | Path,
    *,
    query: str = "",
    heat: Heat | None = None,
    whole: bool = False,
) -> list[str]:
    """Write hits into a file that ends in .png or .html. Returns why pictures are missing.

    Args:
        root: the folder to which the items' paths are relative.
        query: what was asked, for the title.
        heat: heat maps [h, w] of pictures, such as `gallery.heatmap.heat_maps` of the query.
        whole: also show the whole picture of a person in a box, with a frame around it.

    Raises UserError for another ending, and if the file cannot be written.
    """
    drawn = {".png": _png, ".html": _html}.get(path.suffix.lower())
    if drawn is None:
        raise UserError(f"--sheet {path}: give a name that ends in .png or .html")
    shown = [_shown(hit, root, heat, whole) for hit in hits]
    content = drawn(shown, query)
    write_atomically(path, lambda file: file.write(content))
    return [one.problem for one in shown if one.problem]


def _shown(hit: Hit, root: str | Path, heat: Heat | None, whole: bool) -> Shown:
    item, box, facts = hit.item, box_of(hit.item), _facts(hit)
    try:
        image = whole_picture(item, root)
        person = image if box is None else cropped(image, box)
    except UserError as error:
        return Shown(hit, facts, {}, f"{error}")
    except ValueError as error:
        return Shown(hit, facts, {}, f"{item['path']}: {error}")
    pictures = {"picture": person}
    if heat is not None:
        from gallery.heatmap import overlay  # not above: it needs torch

        (map_HW,) = heat([person])
        pictures["heat"] = overlay(person, map_HW)
    if whole and box is not None:
        pictures["whole"] = _framed(image, box)
    # Originals may have many megapixels each.
    scaled = {kind: _at_most(p, SIZES[kind], LARGER) for kind, p in pictures.items()}
    return Shown(hit, facts, scaled)


def _facts(hit: Hit) -> list[str]:
    """What is known of a hit beside its file, in words."""
    item = hit.item
    known = [item.get(name) for name in ("view", "source", "camera")]
    facts = [f"{value}" for value in known if value is not None]
    if item.get("identity") is not None:
        facts.append(f"identity {item['identity']}")
    if item.get("taken") is not None:
        facts.append(f"{item['taken']}")
    if item.get("frame_time") is not None:
        facts.append(f"at {clock(item['frame_time'])}")
    if hit.count > 1:
        facts.append(f"stands for {hit.count} pictures")
    return facts


def _framed(image: PILImage.Image, box: Box) -> PILImage.Image:
    """The picture, at the size in which it is shown, with a frame around the box."""
    small = _at_most(image, SIZES["whole"], LARGER)
    scale, draw = small.width / image.width, ImageDraw.Draw(small)
    left, top, right, bottom = (
        round(scale * v) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3])
    )
    for width, colour in zip((7, 3), FRAME, strict=True):
        outer = 2 + width // 2
        draw.rectangle(
            (left - outer, top - outer, right + outer, bottom + outer), outline=colour, width=width
        )
    return small


def _at_most(image: PILImage.Image, size: tuple[int, int], times: int) -> PILImage.Image:
    small = image.copy()
    small.thumbnail((size[0] * times, size[1] * times))
    return small


def _title(shown: Sequence[Shown]) -> str:
    return f"{len(shown)} {'hit' if len(shown) == 1 else 'hits'}"


# A page


def _html(shown: Sequence[Shown], query: str) -> bytes:
    cards = []
    for one in shown:
        pictures = {
            name: thumbnail(image, (image.width, image.height))[1]
            for name, image in one.pictures.items()
        }
        cards.append((one, pictures))
    template = Path(__file__).parent / "templates/sheet.html.jinja"
    page = render(template, title=_title(shown), query=query, cards=cards, sizes=SIZES)
    return page.encode()


# A picture


def _png(shown: Sequence[Shown], query: str) -> bytes:
    kinds = list(dict.fromkeys(kind for one in shown for kind in one.pictures)) or ["picture"]
    wide = sum(SIZES[kind][0] for kind in kinds) + GAP * (len(kinds) - 1)
    columns = max(1, min(len(shown), (PAGE - MARGIN) // (wide + MARGIN)))
    width = max(2 * MARGIN + 420, MARGIN + columns * (wide + MARGIN))
    title, text, small = map(_font, (21, 16, 13))
    heading = _wrapped(query, title, width - 2 * MARGIN, 4) + [_title(shown)]
    tall = SIZES["picture"][1] + 5 * LINE + MARGIN
    top = MARGIN + 28 * len(heading) + GAP
    rows = -(-len(shown) // columns)
    page = PILImage.new("RGB", (width, top + rows * tall + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for n, line in enumerate(heading):
        last = n == len(heading) - 1
        draw.text((MARGIN, MARGIN + 28 * n), line, SOFT if last else INK, text if last else title)
    for n, one in enumerate(shown):
        x, y = MARGIN + n % columns * (wide + MARGIN), top + n // columns * tall
        left = x
        for kind in kinds:
            size = SIZES[kind]
            if kind in one.pictures or kind == "picture":
                draw.rectangle((left, y, left + size[0] - 1, y + size[1] - 1), fill=LINES)
            if kind in one.pictures:
                fitted = ImageOps.contain(one.pictures[kind], size)
                at = (left + (size[0] - fitted.width) // 2, y + (size[1] - fitted.height) // 2)
                page.paste(fitted, at)
            elif kind == "picture":
                middle = (left + size[0] // 2, y + size[1] // 2)
                draw.text(middle, "no picture", SOFT, small, anchor="mm")
            left += size[0] + GAP
        under = y + SIZES["picture"][1] + 6
        draw.text((x, under), f"{one.hit.rank}", INK, text)
        draw.text((x + wide, under), f"{one.hit.score:.3f}", INK, text, anchor="ra")
        lines = [*_wrapped(", ".join(one.facts), small, wide, 3), _ending(one.name, small, wide)]
        for row, line in enumerate(lines, 1):
            draw.text((x, under + 4 + row * (LINE - 2)), line, SOFT, small)
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int) -> Font:
    """DejaVu Sans if the system has it: Pillow's own font has the letters of English alone."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except (OSError, ImportError):
        return ImageFont.load_default(size)


def _drawable(text: str, font: Font) -> str:
    """Text as `visible` shows it; characters that the font lacks are escaped too."""
    text = visible(text)
    box = bytes(font.getmask("\uffff"))  # is no character: what a font draws for those it lacks
    lacks = {c for c in set(text) if not c.isascii() and bytes(font.getmask(c)) == box}
    return "".join(c.encode("unicode_escape").decode() if c in lacks else c for c in text)


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """Text in at most `most` lines of at most `width` pixels; what is left over ends in "..."."""
    lines: list[str] = []
    words = _drawable(text, font).split()
    while words and len(lines) < most:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width:
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " ..."
    return [_start(line, font, width) for line in lines]


def _start(text: str, font: Font, width: int) -> str:
    """As much of the start of a line as fits."""
    while font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def _ending(text: str, font: Font, width: int) -> str:
    """As much of the end of a name as fits."""
    text = _drawable(text, font)
    while font.getlength(text) > width:
        text = "..." + text.removeprefix("...")[1:]
    return text
