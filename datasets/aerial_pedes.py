"""Readers of AERI-PEDES and TAG-PEDES: people from above and from the ground, with captions.

    AERI-PEDES/train_caption.json   [{"pid": 1, "split": "train", "caption": "...",
                                      "aerial_img": "...", "ground_img": "..."}, ...]
    AERI-PEDES/test_caption.json    [{"pid": 1, "split": "test", "captions": ["...", ...],
                                      "file_paths": [aerial], "ground_file_paths": [...]}, ...]
    TAG-PEDES/train_reid.json       [{"id": 0, "file_path": "...", "captions": ["...", "..."]}, ...]
    TAG-PEDES/test_reid.json        the same

Paths are relative to the folder of these files, and may begin with the name of the data set.
TAG-PEDES may also have its files in TAG-PEDES/anno_dir/ and its images in TAG-PEDES/images/.
Whether a number is the same person in both files is not published, so each has its own identities.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets.compact import TrainSamples
from datasets.identities import People, checked_id
from datasets.reading import (
    EntryChecks,
    ImageFolder,
    checked_caption,
    checked_captions,
    exists,
    normalise_path,
)
from datasets.records import Data, Gallery, Image, Split, TrainSample
from utils.documents import read_json_file
from utils.errors import UserError

AERI, TAG = "AERI-PEDES", "TAG-PEDES"
FILES = {  # by name, of train and test
    AERI: {"train": "train_caption.json", "test": "test_caption.json"},
    TAG: {"train": "train_reid.json", "test": "test_reid.json"},
}
AERI_TRAIN = ("pid", "split", "aerial_img", "ground_img", "caption")
AERI_TEST = ("pid", "split", "captions", "file_paths", "ground_file_paths")
ANNOTATIONS = "anno_dir"  # of TAG-PEDES, if its images are in images/
TAG_KEYS = ("id", "file_path", "captions")
VIEWS = ("aerial", "ground")
MIXED = " + ".join(VIEWS)
WORDS = {
    "aerial": {"aerial", "drone", "drones", "uav", "uavs"},
    "ground": {"ground", "street", "cctv", "surveillance", "wearable"},
}
# File names of the two sources of TBAGPR (datasets/mini/raw.py describes them).
NAMES = {
    "aerial": re.compile(r"P\d+T\d+A\dC0F\d+|D\d_\d+_\d{6}(_\d+)?", re.IGNORECASE),
    "ground": re.compile(r"P\d+T\d+A\dC[23]F\d+|S\d_\d+_\d{6}(_\d+)?", re.IGNORECASE),
}


def read_aeri_pedes(root: str | Path) -> Data:
    """Read AERI-PEDES. `root` is its folder, or the folder above. Raises UserError.

    As its authors do, a row of test without captions or without aerial images is left out.
    """
    folder = _find_files(root, AERI)
    reader = _Reader(AERI, folder, folder)
    for entry, row in reader.rows("train", AERI_TRAIN):
        if row["split"] != "train":
            reader.leave_out("rows of train with another split", entry)
            continue
        aerial, ground = (reader.image(row[k], k, entry) for k in ("aerial_img", "ground_img"))
        caption = checked_caption(row["caption"], entry, reader.checks)
        reader.add_sample(row["pid"], caption, aerial, ground, entry)
    test = Split([AERI], {view: Gallery() for view in VIEWS})
    for entry, row in reader.rows("test", AERI_TEST):
        captions = checked_captions(row["captions"], entry, reader.checks, some=False)
        for key in AERI_TEST[3:]:
            if not isinstance(row[key], list):
                raise UserError(f"{entry}: {key} must be a list of paths, got {row[key]!r:.60}")
        if row["split"] != "test":
            reader.leave_out("rows of test with another split", entry)
        elif not captions or not row["file_paths"]:
            reader.leave_out("rows of test without captions or without aerial images", entry)
        else:
            pid = reader.number("test", row["pid"], entry)
            for view, key in zip(VIEWS, AERI_TEST[3:], strict=True):
                for path in row[key]:
                    image = reader.image(path, key, entry)
                    reader.checks.add_images("test", row["pid"], [image], entry)
                    test.galleries[view].add(image, pid, 0)
            reader.add_captions(test, captions, pid, row["pid"], entry)
    return reader.data(test, VIEWS)


def read_tag_pedes(root: str | Path) -> Data:
    """Read TAG-PEDES. `root` is its folder, or the folder above. Raises UserError.

    Its gallery has the images of both views. `Data.image_views` has the views of a file's images if
    all of their paths tell them (`view_of`).
    """
    folder = _find_files(root, TAG)
    images = folder.parent / "images" if folder.name == ANNOTATIONS else folder
    reader = _Reader(TAG, folder, images)
    test = Split([TAG], {MIXED: Gallery()})
    views: dict[str, dict[str, str]] = {"train": {}, "test": {}}  # by split and path
    for split, of_split in views.items():
        for entry, row in reader.rows(split, TAG_KEYS):
            captions = checked_captions(row["captions"], entry, reader.checks, split == "train")
            image = reader.image(row["file_path"], "file_path", entry)
            of_split[image.path] = view_of(row["file_path"], row.get("cam_id"))
            if split == "train":
                for caption in captions:
                    reader.add_sample(row["id"], caption, image, None, entry)
                continue
            pid = reader.number(split, row["id"], entry)
            reader.checks.add_images(split, row["id"], [image], entry)
            test.galleries[MIXED].add(image, pid, 0)
            reader.add_captions(test, captions, pid, image.path, entry)
    data = reader.data(test, (MIXED,))
    for split, of_split in views.items():
        unknown = [path for path, view in of_split.items() if not view]
        if not unknown:
            data.image_views = {**data.image_views, **of_split}
        elif len(unknown) < len(of_split):  # a part of a view's images would be an easier gallery
            data.warnings.append(
                f"views: {len(unknown)} of {len(of_split)} images of {split} do not tell theirs: "
                f"no galleries by view ({unknown[0]})"
            )
    return data


def view_of(path: str, camera: object = None) -> str:
    """The view of an image: "aerial", "ground", or "" if its path does not tell.

    The last part of the path that names a view decides: the file name, else its folder, else the
    folder above, ... A part names a view by a word of WORDS that stands between other characters
    than letters, or by being a file name of NAMES; a part that names both leaves it unknown. After
    the path, a camera that is text is asked for such a word. A camera's number tells nothing.
    """
    parts = [*([camera] if isinstance(camera, str) else []), *normalise_path(path).split("/")]
    for part in reversed(parts):
        words = {*re.findall("[a-z]+", part.lower())}
        stem = part.rpartition(".")[0]
        told = [view for view in VIEWS if words & WORDS[view] or NAMES[view].fullmatch(stem)]
        if told:
            return told[0] if len(told) == 1 else ""
    return ""


class _Reader:
    """Reads and checks the rows of a data set's two files.

    Args:
        annotations: the folder of the files.
        images: the folder that image paths are relative to.
    """

    def __init__(self, name: str, annotations: Path, images: Path) -> None:
        self.name, self.annotations = name, annotations
        self.images, self.checks = ImageFolder(images), EntryChecks()
        self.people = {"train": People(), "test": People()}
        self.train = TrainSamples(root=str(images))
        self.left_out: dict[str, list[str]] = {}  # by kind, the entries

    def rows(self, split: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(entry, row) of a file. Raises UserError for a row without one of the keys."""
        path = self.annotations / FILES[self.name][split]
        rows = read_json_file(path)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{path}: expected a list of rows with {', '.join(keys)}")
        for i, row in enumerate(rows):
            entry = f"{path.name}, entry {i}"
            if not isinstance(row, dict) or not set(keys) <= set(row):
                missing = sorted(set(keys) - set(row)) if isinstance(row, dict) else sorted(keys)
                raise UserError(f"{entry}: {', '.join(missing)} missing")
            yield entry, row

    def leave_out(self, kind: str, entry: str) -> None:
        """Count a row that is left out."""
        self.left_out.setdefault(kind, []).append(entry)

    def number(self, split: str, given: Any, entry: str) -> int:
        """The number of an identity as the file has it."""
        key = "pid" if self.name == AERI else "id"
        return self.people[split].number(checked_id(given, entry, self.checks, key))

    def image(self, path: Any, key: str, entry: str) -> Image:
        """The image of a path, with or without the name of the data set at its start."""
        if not isinstance(path, str):
            raise UserError(f"{entry}: {key} must be a path, got {path!r:.60}")
        if path[: len(self.name) + 1] in (f"{self.name}/", f"{self.name}\\"):
            path = path[len(self.name) + 1 :]
        return Image(self.images.find(path, entry))

    def add_sample(
        self, given: Any, caption: str, image: Image, pair: Image | None, entry: str
    ) -> None:
        """Add a training sample. `given` is its identity as the file has it."""
        sample = TrainSample(self.number("train", given, entry), caption, image, pair, entry)
        self.train.append(sample)
        self.checks.add_sample(sample, given)

    def add_captions(
        self, test: Split, captions: list[str], pid: int, about: object, entry: str
    ) -> None:
        """Add the queries of a row. `about` is what else the row says of them."""
        for caption in captions:
            test.add_caption(caption, pid, 0)
            self.checks.add_caption("test", (about, caption), entry)

    def data(self, test: Split, views: tuple[str, ...]) -> Data:
        """The data set, with training identities in the order of their ids."""
        for split, found in (("train", len(self.train)), ("test", len(test.captions))):
            if not found:
                path = self.annotations / FILES[self.name][split]
                raise UserError(f"{path}: no row of {split} has an image and a caption")
        self.train.renumber(self.people["train"].sorted_numbers())
        told = [f"left out: {len(x)} {kind} ({x[0]})" for kind, x in self.left_out.items()]
        return Data(
            self.name, self.train, {"test": test}, views=views, root=str(self.images.root),
            warnings=[*told, *self.checks.warnings()], folders=self.images.folders,
        )  # fmt: skip


def _find_files(root: str | Path, name: str) -> Path:
    """The folder of the data set's two files. Raises UserError."""
    root = Path(root)
    folder = root / name if exists(root / name) else root
    files = FILES[name].values()
    for place in (folder / ANNOTATIONS, folder) if name == TAG else (folder,):
        if all(exists(place / file) for file in files):
            return place
    expected = " and ".join(f"{name}/{file}" for file in files)
    other = f" (or both in {name}/{ANNOTATIONS}/, images in {name}/images/)" if name == TAG else ""
    raise UserError(f"--root_dir {root}: expected {expected} there{other}")
