"""Reader of data sets that are a single list of images with captions: the ground-only benchmarks,
and `custom`.

    CUHK-PEDES/reid_raw.json          + CUHK-PEDES/imgs/
    ICFG-PEDES/ICFG-PEDES.json        + ICFG-PEDES/imgs/
    RSTPReid/data_captions.json       + RSTPReid/imgs/
    [{"split": "train", "id": 1, "captions": ["...", ...], "file_path" or "img_path": "..."}, ...]

`custom` is the user's own data (docs/custom.md): `dataset.json` in `--root_dir`, with image paths
relative to that folder.

    [{"split": "train", "id": "anna", "image": "a/1.jpg", "captions": ["..."],
      "pair_image": "g/1.jpg", "attributes": {...}, "pair_attributes": {...}}, ...]

The last three keys are optional, but if one entry has a key, all must have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.reading import (
    EntryChecks,
    ImageFolder,
    checked_caption,
    exists,
    normalise_path,
)
from datasets.records import Data, Gallery, Image, Split, TrainSample
from utils.attributes import Attribute
from utils.documents import read_json_file
from utils.errors import UserError, suggest
from utils.tokenizer import has_lone_surrogate

PEDES = {  # by name: the JSON file, and the key of the image path in its entries
    "CUHK-PEDES": ("reid_raw.json", "file_path"),
    "ICFG-PEDES": ("ICFG-PEDES.json", "file_path"),
    "RSTPReid": ("data_captions.json", "img_path"),
}
CUSTOM = "dataset.json"
SPLITS = ("train", "val", "test")
CUSTOM_KEYS = (
    "split", "id", "image", "captions", "pair_image", "attributes", "pair_attributes",
)  # fmt: skip


def read_pedes(root: str | Path, name: str) -> Data:
    """Read a ground-only benchmark. `root` is its folder, or the folder above. Raises UserError."""
    file, image_key = PEDES[name]
    root = Path(root)
    folder = root / name if exists(root / name) else root
    if not exists(folder / file):
        raise UserError(f"--root_dir {root}: expected {name}/{file} and {name}/imgs/ there")
    return _Reader(folder / file, folder / "imgs", image_key).read(name, ("ground",))


def read_custom(root: str | Path, attributes: Sequence[Attribute]) -> Data:
    """Read the user's own data set. Raises UserError.

    Args:
        attributes: the attributes that the entries label, with their classes (`--attributes_file`).
    """
    root = Path(root)
    if not exists(root / CUSTOM):
        raise UserError(f"--root_dir {root}: expected {CUSTOM} there (docs/custom.md)")
    reader = _Reader(root / CUSTOM, root, "image", CUSTOM_KEYS, attributes)
    pairs = "pair_image" in reader.optional
    return reader.read("custom", ("image", "pair image") if pairs else ("image",))


class _Reader:
    """Reads and checks the entries of one JSON file.

    Args:
        images: the folder that image paths are relative to.
        image_key: the entries' key of the image path.
        keys: the keys that an entry may have; without any, unknown keys are ignored.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        image_key: str,
        keys: Sequence[str] = (),
        attributes: Sequence[Attribute] = (),
    ) -> None:
        self.path, self.image_key, self.keys = path, image_key, keys
        self.images, self.checks = ImageFolder(images), EntryChecks()
        self.attributes = attributes
        self.rows = read_json_file(path)
        if not isinstance(self.rows, list) or not self.rows:
            raise UserError(f"{path}: expected a list of images with captions")
        # The optional keys that the first entry has, and so all must have.
        first = self.rows[0] if keys and isinstance(self.rows[0], dict) else {}
        self.optional = {key for key in ("pair_image", "attributes") if key in first}
        if len(self.optional) == 2:
            self.optional.add("pair_attributes")

    def read(self, name: str, views: tuple[str, ...]) -> Data:
        """Read all splits. The identities of each become 0, 1, ... in the order of their ids."""
        checked: dict[str, list[int]] = {split: [] for split in SPLITS}
        for i, row in enumerate(self.rows):
            checked[self._check(row, i)].append(i)
        train = self._train(checked["train"])
        splits = {s: self._split(name, views, checked[s]) for s in SPLITS[1:] if checked[s]}
        if not train:
            raise UserError(f"{self.path}: no entry has the split 'train'")
        if "test" not in splits:
            raise UserError(f"{self.path}: no entry has the split 'test'")
        ids = {s: list(self._pids(indices)) for s, indices in checked.items() if indices}
        attributes = self.attributes if "attributes" in self.optional else ()
        classes = {a.name: len(a.classes) for a in attributes}
        root, warnings = str(self.images.root), self.checks.warnings()
        return Data(name, train, splits, classes, views, ids, root, warnings)

    def _entry(self, i: int) -> str:
        return f"{self.path.name}, entry {i}"

    def _check(self, row: Any, i: int) -> str:
        """Check the keys and the plain values of an entry. Returns its split."""
        entry = self._entry(i)
        wanted = {"split", "id", self.image_key, "captions", *self.optional}
        if not isinstance(row, dict) or not wanted <= set(row):
            missing = sorted(wanted - set(row)) if isinstance(row, dict) else sorted(wanted)
            reason = " (needed in all entries or in none)" if set(missing) & self.optional else ""
            raise UserError(f"{entry}: {', '.join(missing)} missing{reason}")
        for key in set(row) - wanted if self.keys else ():
            if key in self.keys:
                raise UserError(f"{entry}: '{key}': needed in all entries or in none")
            raise UserError(f"{entry}: '{key}': unknown.{suggest(key, self.keys)}")
        if row["split"] not in SPLITS:
            raise UserError(f"{entry}: split is {row['split']!r}; it must be {', '.join(SPLITS)}")
        if type(row["id"]) not in (int, str):
            raise UserError(f"{entry}: id must be an integer or text, got {row['id']!r}")
        if has_lone_surrogate(str(row["id"])):
            raise UserError(
                f"{entry}: id is {row['id']!r}, with half a character (a lone surrogate) in it"
            )
        # Otherwise 7 and "7", or "anna" and "anna ", would be two people.
        self.checks.require_same(
            ("the id", normalise_path(str(row["id"])).strip()), row["id"], entry
        )
        captions = row["captions"]
        if not isinstance(captions, list) or (not captions and row["split"] == "train"):
            raise UserError(f"{entry}: captions must be a list of texts, got {captions!r:.60}")
        for k, caption in enumerate(captions):
            checked_caption(caption, f"{entry}, caption {k}", self.checks)
        return row["split"]

    def _pids(self, indices: Sequence[int]) -> dict[int | str, int]:
        """By id its pid: 0, 1, ... in the order of the ids, integers before texts."""
        ids = {self.rows[i]["id"] for i in indices}
        return {pid: n for n, pid in enumerate(sorted(ids, key=lambda p: (isinstance(p, str), p)))}

    def _image(self, i: int, pair: bool = False) -> Image:
        prefix, row, entry = "pair_" if pair else "", self.rows[i], self._entry(i)
        path = row[prefix + self.image_key]
        if not isinstance(path, str):
            raise UserError(f"{entry}: {prefix}{self.image_key} must be a path, got {path!r}")
        full = self.images.find(path, entry)
        if "attributes" not in self.optional:
            return Image(full)
        labels = self._labels(row[f"{prefix}attributes"], f"{entry}, {prefix}attributes")
        self.checks.require_same(("the label of", full), labels, entry)
        return Image(full, labels)

    def _labels(self, values: Any, entry: str) -> tuple[int, ...]:
        names = [a.name for a in self.attributes]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise UserError(
                f"{entry}: expected an object with {', '.join(names)} (those of --attributes_file)"
            )
        labels = []
        for attribute in self.attributes:
            value = str(values[attribute.name])
            if value not in attribute.classes:
                raise UserError(
                    f"{entry}: {attribute.name} is '{value}'; "
                    f"it must be one of {', '.join(attribute.classes)}"
                )
            labels.append(attribute.classes.index(value))
        return tuple(labels)

    def _train(self, indices: Sequence[int]) -> list[TrainSample]:
        pids = self._pids(indices)
        pairs = "pair_image" in self.optional
        samples = []
        for i in indices:
            row, image = self.rows[i], self._image(i)
            pair = self._image(i, pair=True) if pairs else None
            pid, entry = pids[row["id"]], self._entry(i)
            for caption in row["captions"]:
                samples.append(TrainSample(pid, caption, image, pair, entry))
                self.checks.add_sample(samples[-1], row["id"])
        return samples

    def _split(self, name: str, views: Sequence[str], indices: Sequence[int]) -> Split:
        pids, split = self._pids(indices), Split([name], {view: Gallery() for view in views})
        for i in indices:
            row, entry = self.rows[i], self._entry(i)
            pid = pids[row["id"]]
            images = [self._image(i, pair) for pair in (False, True)[: len(views)]]
            self.checks.add_images(row["split"], row["id"], images, entry)
            for view, image in zip(views, images, strict=True):
                split.galleries[view].add(image, pid, 0)
            for caption in row["captions"]:
                split.add_caption(caption, pid, 0)
                key = (*(image.path for image in images), caption)
                self.checks.add_caption(row["split"], key, entry)
        if not split.captions:
            raise UserError(f"{self.path}: no {self.rows[indices[0]]['split']} entry has a caption")
        return split
