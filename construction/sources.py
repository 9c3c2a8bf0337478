"""Sources: the pictures of AG-ReID, of G2APS, or of a table of one's own.

    AG-ReID v1   bounding_box_train/, bounding_box_test_all_c0/, query_all_c3/, ...: <name>.jpg,
                 qut_attribute_v4_88_attributes.mat
    AG-ReID v2   train_all/, query/, gallery/: <identity>/<name>.jpg
    G2APS        Image/SSM/<frame>.jpg, annotation/{Images,Person}.mat,
                 annotation/test/train_test/{Train,TestG50}.mat
    its crops    bounding_box_train/, bounding_box_test_c0/, ...: [<person>/]<name>.jpg, named
                 0001_c0v1_000840.jpg (c0 drone, c3 ground), or 0844_c3s2_107328_01.jpg as in
                 Market-1501 (the recipe's `aerial_cameras` tells which cameras are a drone's)
    a table      CSV or Parquet with a row for each picture, or for each box in a picture

A reader lists pictures and opens none of them: what is missing or broken is found when pictures
are measured, and does not stop the others.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from construction.recipe import Source
from construction.records import SPLITS, VIEWS, Box, Picture
from utils.errors import UserError
from utils.files import open_file

AG_REID = re.compile(r"P(\d{4})T(\d{5})A(\d)C(\d)F(\d+)\.jpe?g", re.IGNORECASE)
AG_REID_ATTRIBUTES = "qut_attribute_v4_88_attributes.mat"
G2APS_FRAME = re.compile(r"([SD])(\d)_(\d+)_(\d{6})\.jpe?g", re.IGNORECASE)
# SeCap's crops of G2APS, and crops named as in Market-1501.
G2APS_CROP = re.compile(r"(-?\d+)_c(\d)v(\d)_(\d+).*\.jpe?g", re.IGNORECASE)
MARKET_CROP = re.compile(r"(-?\d+)_c(\d)s(\d)_(\d+).*\.jpe?g", re.IGNORECASE)
NOBODY = {"-1", "0", "5555"}  # identities of boxes without one, in crops of G2APS
NEEDED = ("path", "identity")
KNOWN = (
    *NEEDED, "person", "view", "camera", "left", "top", "width", "height", "time", "split",
)  # fmt: skip
BOX = ("left", "top", "width", "height")

Reader = Callable[[Path, Source], Iterator[Picture]]


def read_ag_reid(root: Path, source: Source) -> Iterator[Picture]:
    """AG-ReID, v1 or v2. An identity is a person in one session and altitude. Raises UserError."""
    notes = _ag_reid_attributes(root / AG_REID_ATTRIBUTES)
    found = 0
    for folder, file in _jpegs(root):
        match = AG_REID.fullmatch(file)
        if not match:
            continue
        person, session, altitude, camera, frame = match.groups()
        identity = int(person + session + altitude)
        top = folder.split("/")[0]
        found += 1
        yield Picture(
            source.name,
            f"{folder}/{file}",
            str(root / folder / file),
            "aerial" if camera == "0" else "ground",
            f"P{person}",
            str(identity),
            camera=f"C{camera}",
            time=float(frame),
            split="train" if "train" in top else "test",
            notes=notes.get(identity, {}),
        )
    if not found:
        raise UserError(
            f"{root}: no picture with a name such as P0001T04041A0C0F121.jpg in the folders of "
            "AG-ReID (bounding_box_train, ... or train_all, ...)"
        )


def read_g2aps(root: Path, source: Source) -> Iterator[Picture]:
    """G2APS as published (frames and annotations), or one of its two forms of crops. Raises
    UserError."""
    if (root / "annotation").is_dir():
        return _g2aps_frames(root, source)
    return _g2aps_crops(root, source)


def read_table(path: Path, source: Source) -> Iterator[Picture]:
    """One's own pictures, from a CSV or Parquet file with the columns

    - `path` (relative to the file's folder) and `identity`
    - `view` (aerial or ground), or `camera` with the recipe's `aerial_cameras`
    - optionally `person`, if one person has several identities; `left`, `top`, `width`, `height` of
      a box in pixels; `time`; `split`
    - any other column is an annotation.

    Raises UserError that names the row.
    """
    number = 0
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if number == 1:
            _check_columns(path, list(row), source)
        given, identity = _plain(row["path"]), _plain(row["identity"])
        if not given:
            raise UserError(f"{where}: no path")
        camera, view = _plain(row.get("camera")), _plain(row.get("view")).lower()
        if not view and camera:
            view = "aerial" if camera in source.aerial_cameras else "ground"
        if view not in VIEWS:
            raise UserError(f"{where}: the view is {view!r}; it must be {' or '.join(VIEWS)}")
        split = _plain(row.get("split")).lower()
        if split not in ("", *SPLITS):
            raise UserError(f"{where}: the split is {split!r}; it must be {', '.join(SPLITS)}")
        box = _box(row, where)
        file = os.path.join(path.parent, given)
        yield Picture(
            source.name,
            _name(given, box, number),
            file,
            view,
            _plain(row.get("person")) or identity,
            identity,
            box,
            camera,
            _number(row.get("time"), f"{where}: time"),
            split,
            {key: _note(v) for key, v in row.items() if key not in KNOWN and v is not None},
        )
    if not number:
        raise UserError(f"{path}: has no rows")


READERS: dict[str, Reader] = {"ag_reid": read_ag_reid, "g2aps": read_g2aps, "table": read_table}


def _jpegs(root: Path) -> Iterator[tuple[str, str]]:
    """(folder relative to the root, file) of all JPEGs in folders below it, in order."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=fail):
        folders.sort()
        relative = os.path.relpath(folder, root)
        for file in sorted(files):
            if relative != "." and file.lower().endswith((".jpg", ".jpeg")):
                yield relative, file


def _ag_reid_attributes(path: Path) -> dict[int, dict[str, str | int | float]]:
    """By identity, the value of each column; nothing without the file (v2 has none)."""
    if not path.exists():
        return {}
    content = _read_mat(path, "qut_attribute", simplify=True)
    notes: dict[int, dict[str, str | int | float]] = {}
    try:
        for part in ("train", "test"):
            columns = dict(content[part])
            identities = [int(value) for value in _flat(columns.pop("image_index"))]
            for name, values in columns.items():
                values = _flat(values)
                if len(values) != len(identities):
                    raise ValueError(
                        f"{part}.{name} has {len(values)} values for {len(identities)} identities"
                    )
                for identity, value in zip(identities, values, strict=True):
                    plain = value.item() if hasattr(value, "item") else value
                    notes.setdefault(identity, {})[name] = plain
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: expected the attributes of AG-ReID: {error!r}") from None
    return notes


def _g2aps_frames(root: Path, source: Source) -> Iterator[Picture]:
    folder, annotation = root / "Image" / "SSM", root / "annotation"
    images, people = (annotation / f"{name}.mat" for name in ("Images", "Person"))
    person_of: dict[tuple[str, Box], int] = {}
    for number, item in enumerate(_flat(_read_mat(people, "Person")), 1):
        for name, box in _scenes(item, 2, f"{people}, person {number}"):
            person_of[name, box] = number
    split_of = _g2aps_splits(annotation / "test" / "train_test", person_of)
    for number, item in enumerate(_flat(_read_mat(images, "Img"))):
        where = f"{images}, row {number}"
        try:
            given, _, given_boxes = item
        except (TypeError, ValueError):
            raise UserError(f"{where}: expected name, _ and boxes, got {item!r:.80}") from None
        name = _text(given, where)
        match = G2APS_FRAME.fullmatch(name)
        if not match:
            raise UserError(
                f"{where}: the frame's name is {name!r}, not one such as D1_20_000840.jpg"
            )
        letter, scene, height, frame = match.groups()
        stem = os.path.splitext(name)[0]
        for index, box in enumerate(_boxes(given_boxes, where)):
            person = person_of.get((name, box))
            yield Picture(
                source.name,
                f"img/{stem}_{index:05d}.jpg",
                str(folder / name),
                "aerial" if letter.upper() == "D" else "ground",
                f"{person:04d}" if person else "",
                f"{person:04d}" if person else "",
                box,
                f"{letter.upper()}{scene}",
                float(frame),
                split_of.get(person or 0, ""),
                {"height": int(height)},
            )


def _g2aps_splits(folder: Path, person_of: dict[tuple[str, Box], int]) -> dict[int, str]:
    """By person, the split that G2APS has for person search: those in Train.mat are train, the
    others are test."""
    path = folder / "Train.mat"
    train: set[int] = set()
    for number, item in enumerate(_flat(_read_mat(path, "Train"))):
        where = f"{path}, person {number}"
        try:
            inner = item[0, 0] if getattr(item, "ndim", 0) == 2 else item
        except (IndexError, TypeError) as error:
            raise UserError(f"{where}: {error}") from None
        for scene in _scenes(inner, 2, where):
            if scene in person_of:
                train.add(person_of[scene])
    return {person: "train" if person in train else "test" for person in person_of.values()}


def _g2aps_crops(root: Path, source: Source) -> Iterator[Picture]:
    found = 0
    for folder, file in _jpegs(root):
        secap = G2APS_CROP.fullmatch(file)
        match = secap or MARKET_CROP.fullmatch(file)
        if not match:
            continue
        if not secap and not source.aerial_cameras:
            raise UserError(
                f"{root}: {folder}/{file} is named as in Market-1501, without the view; give the "
                f"source {source.name} aerial_cameras in the recipe, such as [c1, c2]"
            )
        person, camera, scene, frame = match.groups()
        aerial = camera == "0" if secap else f"c{camera}" in source.aerial_cameras
        someone = "" if person in NOBODY else f"{int(person):04d}"
        top = folder.split("/")[0]
        found += 1
        yield Picture(
            source.name,
            f"{folder}/{file}",
            str(root / folder / file),
            "aerial" if aerial else "ground",
            someone,
            someone,
            camera=f"c{camera}{scene}",
            time=float(frame),
            split="train" if "train" in top else "test",
        )
    if not found:
        raise UserError(
            f"{root}: neither annotation/ of G2APS nor crops with names such as "
            "0001_c0v1_000840.jpg or 0844_c3s2_107328_01.jpg"
        )


def _read_mat(path: Path, variable: str, simplify: bool = False) -> Any:
    """A variable of a MATLAB file. Raises UserError."""
    from scipy.io import loadmat, whosmat  # half a second

    try:
        with open_file(path) as file:
            content = loadmat(file, variable_names=[variable], simplify_cells=simplify)
            if variable not in content:
                file.seek(0)
                names = ", ".join(name for name, *_ in whosmat(file)) or "nothing"
                raise UserError(f"{path}: has no variable {variable}, but {names}")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # SciPy raises many kinds on a corrupted file
        reason = getattr(error, "strerror", None) or f"not readable as a MATLAB file: {error}"
        raise UserError(f"{path}: {reason}") from None
    return content[variable]


def _flat(values: Any) -> list[Any]:
    """The items of a MATLAB array, whatever its shape; a single value is one item."""
    return list(np.atleast_1d(values).reshape(-1))


def _text(value: Any, where: str) -> str:
    """A MATLAB string, which is an array of one string."""
    values = _flat(value)
    if len(values) != 1 or not isinstance(values[0], str):
        raise UserError(f"{where}: expected a name, got {value!r:.80}")
    return str(values[0])


def _scenes(item: Any, index: int, where: str) -> Iterator[tuple[str, Box]]:
    """(frame, box) of each picture of a person."""
    try:
        rows = _flat(item[index])
    except (IndexError, TypeError) as error:
        raise UserError(f"{where}: expected rows of frame and box: {error}") from None
    for row in rows:
        yield _text(row[0], where), _as_box(row[1], where)


def _boxes(values: Any, where: str) -> list[Box]:
    """The boxes of a frame: rows whose first item is an array of four numbers."""
    try:
        return [_as_box(row[0], where) for row in _flat(values)]
    except (IndexError, TypeError) as error:
        raise UserError(f"{where}: expected rows with a box: {error}") from None


def _as_box(values: Any, where: str) -> Box:
    numbers = _flat(values)
    if len(numbers) != 4:
        raise UserError(f"{where}: expected a box of four numbers, got {values!r:.80}")
    try:
        left, top, width, height = (int(value) for value in numbers)
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected a box of four numbers, got {values!r:.80}") from None
    return left, top, width, height


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or Parquet file. Raises UserError."""
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            import pyarrow
            from pyarrow import parquet

            try:
                for batch in parquet.ParquetFile(path).iter_batches():
                    yield from batch.to_pylist()
            except pyarrow.ArrowException as error:
                raise UserError(f"{path}: not readable as Parquet: {error}") from None
            return
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: not as many values as columns "
                        f"({len(reader.fieldnames or ())})"
                    )
                yield {key: value or None for key, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_columns(path: Path, columns: list[str], source: Source) -> None:
    missing = [name for name in NEEDED if name not in columns]
    if not missing and "view" not in columns and "camera" not in columns:
        missing = ["view"]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}, but {', '.join(columns)}")
    if "view" not in columns and not source.aerial_cameras:
        raise UserError(
            f"{path}: no column view, so the recipe must give the source {source.name} "
            "aerial_cameras: the values of the column camera that are aerial"
        )
    boxes = [name for name in BOX if name in columns]
    if boxes and len(boxes) < len(BOX):
        raise UserError(
            f"{path}: a box needs the columns {', '.join(BOX)}; there is only {boxes[0]}"
        )


def _box(row: dict[str, Any], where: str) -> Box | None:
    values = [row.get(name) for name in BOX]
    if all(value is None for value in values):
        return None
    numbers = [_number(v, f"{where}: {name}") for v, name in zip(values, BOX, strict=True)]
    if any(number is None for number in numbers):
        raise UserError(f"{where}: a box needs {', '.join(BOX)}; one of them is empty")
    left, top, width, height = (round(number or 0) for number in numbers)
    if width < 1 or height < 1:
        raise UserError(f"{where}: a box of {width}x{height} pixels")
    return left, top, width, height


def _number(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where} is {value!r}, not a number")
    return number


def _plain(value: Any) -> str:
    """A value of a table as text. Whole numbers have no point: a column of integers in which one is
    missing may hold them as 7.0."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _note(value: Any) -> str | int | float:
    return value if isinstance(value, (str, int, float)) else str(value)


def _name(given: str, box: Box | None, row: int) -> str:
    """A picture's path in the data set: that in the table; or, if it leads out of the table's
    folder, the file's name with the number of the row."""
    parts = [part for part in given.replace("\\", "/").split("/") if part not in ("", ".")]
    name = "/".join(parts)
    if os.path.isabs(given) or ".." in parts:
        name = f"{row:08}_{parts[-1]}"
    if box is not None:
        stem = os.path.splitext(name)[0]
        name = f"{stem}_{'_'.join(map(str, box))}.jpg"
    return name
