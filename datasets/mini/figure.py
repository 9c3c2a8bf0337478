"""A figure for the documentation: test people with their two pictures and a caption."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from datasets.images import read_image
from utils.documents import read_json_file

from .build import JSON_NAME
from .view import SOURCES

_WIDTH, _MARGIN, _TITLE, _GAP, _LINE = 1200, 38, 34, 10, 22  # pixels


def draw_figure(root: Path, out: Path, which: tuple[int, ...] = (18, 10, 71, 90)) -> None:
    """Write a PNG with some test people of the data set in `root`. `which`: their positions in the
    list of test people."""
    entries = _entries(root)
    entries = [entries[i % len(entries)] for i in which]
    title, text = ImageFont.load_default(size=19), ImageFont.load_default(size=16)
    column = (_WIDTH - _MARGIN * (len(which) + 1)) // len(which)
    wrapped = [_wrap(entry[3], text, column) for entry in entries]
    pictures = [[read_image(str(path)) for path in entry[1:3]] for entry in entries]
    widest = max(sum(image.width / image.height for image in pair) for pair in pictures)
    tall = int((column - _GAP) / widest)
    below = _MARGIN + _TITLE + tall + 14
    height = below + _LINE * max(len(lines) for lines in wrapped) + _MARGIN
    page = Image.new("RGB", (_WIDTH, height), (250, 250, 248))
    draw = ImageDraw.Draw(page)
    for i, (source, *_) in enumerate(entries):
        x = left = _MARGIN + i * (column + _MARGIN)
        draw.text((left, _MARGIN), source, font=title, fill=(40, 60, 90))
        for image in pictures[i]:
            width = round(tall * image.width / image.height)
            large = image.resize((width, tall), Image.Resampling.BICUBIC)
            page.paste(large, (x, _MARGIN + _TITLE))
            x += width + _GAP
        for row, line in enumerate(wrapped[i]):
            draw.text((left, below + _LINE * row), line, font=text, fill=(50, 50, 54))
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, optimize=True)


def _entries(root: Path) -> list[tuple[str, Path, Path, str]]:
    """(source, aerial image, ground image, caption) of each test person, source by source."""
    entries = []
    for name in SOURCES:
        split = read_json_file(root / name / JSON_NAME[name].format("test"))
        for i, (pid, aerial, ground) in enumerate(
            zip(split["image_pids"], split["img_paths"], split["pair_img_paths"], strict=True)
        ):
            if split["image_pids"].index(pid) == i:
                text = split["captions"][split["caption_pids"].index(pid)]
                images = (root.joinpath(name, *path) for path in (aerial, ground))
                entries.append((name, *images, text))
    return entries


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
