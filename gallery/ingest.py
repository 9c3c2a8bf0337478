"""Ingest: folders, lists, boxes, videos and data sets to files with the people in them.

Nothing is decoded here: this only says what there is to read (gallery/frames.py reads it).
"""

from __future__ import annotations

import csv
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets.records import Image
from gallery.pictures import Box
from utils.attributes import check_labels, read_attributes
from utils.config import resolve
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import expand

PICTURES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip
VIDEOS = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".mts",
)  # fmt: skip
VIEWS = ("aerial", "ground")
BOX = ("left", "top", "width", "height")
LARGEST = 10**6  # pixels, of a box's side and place


class Missing(UserError):
    """What is to be indexed is not there.

    Attributes:
        path: absolute.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class Person(NamedTuple):
    """One person in a picture; in a video or with a detector, what all of its people share."""

    box: Box | None = None  # None: the whole picture
    view: str | None = None
    camera: str | None = None
    source: str | None = None
    identity: str | None = None
    labels: tuple[tuple[str, str], ...] = ()  # (attribute, class)


class File(NamedTuple):
    """A picture or a video with the people in it."""

    file: str  # absolute path, or a member of a tar (datasets/shards.py)
    people: tuple[Person, ...]
    is_video: bool = False


@dataclass
class Found:
    """What the sources of a run have.

    Attributes:
        files: by path.
        roots: folders and files in which was looked; what is gone from them leaves the gallery.
        boxed: folders of pictures whose people a file of boxes lists; pictures that it no longer
            has leave the gallery.
        broken: (path, reason) of what cannot be read.
        attributes: classes by attribute, of a data set's labels.
    """

    files: dict[str, File] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    boxed: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, file: File) -> None:
        """Add a file, or the people of one that is there already; the first at a place stays."""
        known = self.files.get(file.file, File(file.file, (), file.is_video))
        people = {person.box: person for person in known.people}
        for person in file.people:
            people.setdefault(person.box, person)
        self.files[file.file] = known._replace(people=tuple(people.values()))

    def base(self) -> str:
        """The folder that holds all roots."""
        folders = [root if os.path.isdir(root) else os.path.dirname(root) for root in self.roots]
        return os.path.commonpath(folders) if folders else os.getcwd()


def add_pictures(found: Found, given: Sequence[str], view: str | None) -> None:
    """Add folders of pictures (with all folders in them), single pictures, and `@FILE`: a list of
    such paths, one a line, from the list's folder. Raises UserError, also for a path that is
    missing, and for a folder without pictures: its disk may be away, and nobody shall be dropped
    for that."""
    for file, source in _listed(found, given, PICTURES, "--images"):
        found.add(File(file, (Person(view=view, source=source),)))


def add_videos(found: Found, given: Sequence[str], view: str | None) -> None:
    """The same for videos. Raises UserError."""
    for file, source in _listed(found, given, VIDEOS, "--videos"):
        found.add(File(file, (Person(view=view, source=source),), is_video=True))


def add_boxes(
    found: Found, boxes: Path, folders: Sequence[str], view: str | None, min_score: float
) -> None:
    """Add the people of a file of boxes: CSV (`path, left, top, width, height`, and if wanted
    `view, camera, identity`), or COCO's JSON, of which the category person is read.

    Args:
        folders: where the pictures are; without one, the folder of the file.
        min_score: of a box in COCO's JSON that has a score.

    Raises UserError that names the row.
    """
    bases = [_absolute(folder) for folder in folders] or [str(boxes.absolute().parent)]
    for base in bases:
        if not os.path.isdir(base):
            raise UserError(f"--images {base}: with --boxes, a folder of the pictures in that file")
    found.roots += bases
    found.boxed += bases
    first, exists = "", False
    read = _coco if boxes.suffix.lower() == ".json" else _csv
    for path, person in read(boxes, min_score):
        places = [os.path.normpath(os.path.join(base, path)) for base in bases]
        there = [p for p in places if os.path.lexists(p)]
        place, exists = (there or places)[0], exists or bool(there)
        first = first or place
        base = bases[places.index(place)]
        person = person._replace(view=person.view or view, source=os.path.basename(base))
        found.add(File(place, (person,)))
    if not first:
        scored = f" with a score of at least {min_score:g}" if read is _coco else ""
        raise UserError(f"--boxes {boxes}: nobody is in it{scored}")
    if not exists:
        raise UserError(
            f"--boxes {boxes}: none of its pictures is there: {first} is looked for, for example; "
            "give the folder of the pictures with --images"
        )


def add_dataset(
    found: Found, name: str, root: str, split: str, attributes_file: str, view: str | None
) -> None:
    """Add the pictures of a data set with identity, view, source and labels.

    Args:
        split: "train", "val", "test" or "all".

    Raises UserError, also if the data set has no such split.
    """
    from datasets.registry import read_dataset  # not above: it needs torch

    options = {"dataset_name": name, "root_dir": root, "attributes_file": attributes_file}
    data = read_dataset(resolve(options))
    classes = []
    if data.attribute_classes:
        attributes = read_attributes(attributes_file)
        check_labels(attributes, data.attribute_classes, data.name, attributes_file)
        classes = [(a.name, a.classes) for a in attributes]
        found.attributes |= dict(classes)
    found.roots.append(_absolute(data.root))
    names = ["train", *data.splits]
    if split not in ("all", *names):
        raise UserError(f"--split {split}: {data.name} has {', '.join(names)}")

    def add(of: str, image: Image, pid: int, source: str, seen: str) -> None:
        ids = data.ids.get(of)
        # Without ids of its own, a data set counts the people of each split from 0.
        identity = str(ids[pid]) if ids else f"{of}-{pid}"
        pairs = zip(classes, image.attributes, strict=True)
        labels = tuple((name, names[label]) for (name, names), label in pairs)
        seen = data.image_views.get(image.path, seen)
        one_view = view or (seen if seen in VIEWS else None)
        person = Person(None, one_view, None, source, identity, labels)
        found.add(File(_absolute(image.path), (person,)))

    sources = next(iter(data.splits.values())).sources
    for sample in data.train if split in ("all", "train") else ():
        for seen, image in zip(data.views, sample.images, strict=True):
            add("train", image, sample.pid, sources[sample.source], seen)
    for of, content in data.splits.items():
        for seen, gallery in content.galleries.items() if split in ("all", of) else ():
            rows = zip(gallery.images, gallery.pids, gallery.sources, strict=True)
            for image, pid, source in rows:
                add(of, image, pid, content.sources[source], seen)


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(expand(os.fspath(path)))


def _listed(
    found: Found, given: Iterable[str], suffixes: tuple[str, ...], option: str
) -> Iterator[tuple[str, str]]:
    """(file, source) of everything that an option names. Raises UserError."""
    for text in given:
        path = _absolute(text.removeprefix("@"))
        if text.startswith("@"):
            yield from _listed(found, _lines(path, option), suffixes, f"{option} @{path}:")
            continue
        named = f"{option} {path}"
        found.roots.append(path)
        if _is_folder(path, named):
            files = _walk(found, path, suffixes, named)
            if (first := next(files, None)) is None:
                raise Missing(f"{named}: no {' '.join(suffixes)} is in this folder", path)
            yield from ((file, os.path.basename(path)) for file in chain([first], files))
        elif not path.lower().endswith(suffixes):
            other = "--videos" if suffixes is PICTURES else "--images"
            others = VIDEOS if suffixes is PICTURES else PICTURES
            mend = f"give it with {other}" if path.lower().endswith(others) else "@FILE is a list"
            raise UserError(f"{named}: none of {' '.join(suffixes)}; {mend}")
        else:
            yield path, os.path.basename(os.path.dirname(path))


def _is_folder(path: str, named: str) -> bool:
    """Whether a path is a folder. Raises UserError if it is missing, or cannot be told."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    if set("*?") & set(path):
        reason = f"{reason}; leave out the quotes around * and ?, for the shell"
    raise Missing(f"{named}: {reason}", path)


def _lines(path: str, option: str) -> Iterator[str]:
    """The paths in a list, from its folder. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if text := line.strip():
                    yield os.path.join(os.path.dirname(path), expand(text))
    except UnicodeDecodeError:
        raise UserError(
            f"{option} @{path}: not a text in UTF-8; after @ comes a list of paths, one a line"
        ) from None
    except OSError as error:
        raise UserError(
            f"{option} @{path}: not readable as a list of paths: {error.strerror}"
        ) from None


def _walk(found: Found, root: str, suffixes: tuple[str, ...], named: str) -> Iterator[str]:
    """Files with these suffixes in a folder and those below it, in order; hidden ones are left out,
    since macOS writes such files beside pictures. Links to folders come last, and no folder comes
    twice. Raises UserError if the folder cannot be listed."""

    def fail(error: OSError) -> None:
        if error.filename == root:
            raise UserError(f"{named}: {error.strerror}")
        found.broken.append((str(error.filename), error.strerror or str(error)))

    # Those that hold the folder are left out too: a link up to one would be a loop.
    visited = {str(parent) for parent in Path(os.path.realpath(root)).parents}
    tops = [root]
    for top in tops:  # grows
        for folder, folders, files in os.walk(top, onerror=fail):
            if (real := os.path.realpath(folder)) in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            for name in sorted(files):
                if name.lower().endswith(suffixes) and not name.startswith("."):
                    yield os.path.join(folder, name)


def _csv(path: Path, _: float) -> Iterator[tuple[str, Person]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            if missing := [name for name in ("path", *BOX) if name not in columns]:
                commas = "; its separator must be a comma" if len(columns) == 1 else ""
                raise UserError(f"--boxes {path}: the column {missing[0]} is missing{commas}")
            for row in reader:
                where = f"--boxes {path}, line {reader.line_num}"
                if None in row or None in row.values() or not row["path"]:
                    raise UserError(f"{where}: not as many values as columns, or no path")
                view = _text(row.get("view"))
                if view not in (None, *VIEWS):
                    raise UserError(f"{where}: the view is {view!r}; aerial or ground")
                box = _box([row[name] for name in BOX], where)
                others = (_text(row.get(name)) for name in ("camera", "identity"))
                camera, identity = others
                yield row["path"], Person(box, view, camera, None, identity)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"--boxes {path}: not readable as CSV: {error}") from None
    except OSError as error:
        raise UserError(f"--boxes {path}: {error.strerror}") from None


def _coco(path: Path, min_score: float) -> Iterator[tuple[str, Person]]:
    try:
        content = read_json_file(path)
    except UserError as error:
        raise UserError(f"--boxes {error}") from None
    names = ("images", "categories", "annotations")
    parts = [_of_type(content, dict, path, "an object").get(name) for name in names]
    if missing := [n for n, part in zip(names, parts, strict=True) if not isinstance(part, list)]:
        raise UserError(
            f"--boxes {path}: not COCO's form, which has lists of {', '.join(names)}; missing: "
            f"{', '.join(missing)}"
        )
    images, categories, annotations = parts
    try:
        files = {image["id"]: image["file_name"] for image in images}
        people = {c["id"] for c in categories if str(c["name"]).lower() == "person"}
    except (KeyError, TypeError) as error:
        raise UserError(f"--boxes {path}: an image or category lacks {error}") from None
    if not people:
        raise UserError(f"--boxes {path}: has no category person")
    for number, annotation in enumerate(annotations, 1):
        where = f"--boxes {path}, annotation {number}"
        try:
            score = annotation.get("score")
            if annotation["category_id"] not in people:
                continue
            image, values = annotation["image_id"], annotation["bbox"]
            if image not in files:
                raise UserError(f"{where}: its image_id {image!r} is not among the images")
            file = files[image]
            if score is not None and float(score) < min_score:
                continue
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: image_id, category_id and bbox are needed: {error!r}"
            ) from None
        if not isinstance(file, str) or not isinstance(values, list) or len(values) != 4:
            raise UserError(f"{where}: a file_name and a bbox of four numbers are needed")
        yield file, Person(_box(values, where))


def _of_type(value: Any, kind: type, path: Path, name: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"--boxes {path}: expected {name}")
    return value


def _box(values: Sequence[Any], where: str) -> Box:
    """A box in whole pixels. Raises UserError."""
    try:
        left, top, width, height = numbers = [float(value) for value in values]
        valid = all(map(math.isfinite, numbers)) and max(map(abs, numbers)) <= LARGEST
    except (TypeError, ValueError):
        valid = False
    if valid:
        # Both edges are rounded, not the width: neighbouring boxes stay neighbours.
        x, y = round(left), round(top)
        box = (x, y, round(left + width) - x, round(top + height) - y)
        if box[2] > 0 and box[3] > 0:
            return box
    shown = ", ".join(map(str, values))
    raise UserError(f"{where}: the box {shown} needs four numbers, and a positive width and height")


def _text(value: str | None) -> str | None:
    return (value or "").strip() or None
