"""Reader of data sets that are one list of images with captions: the ground-only benchmarks, and
a data set of one's own.

    CUHK-PEDES/reid_raw.json          + CUHK-PEDES/imgs/
    ICFG-PEDES/ICFG-PEDES.json        + ICFG-PEDES/imgs/
    RSTPReid/data_captions.json       + RSTPReid/imgs/
    [{"split": "train", "id": 1, "captions": ["...", ...], "file_path" or "img_path": "..."}, ...]

`custom` (docs/custom.md) is `dataset.json` in `--root_dir`, images relative to that folder:

    [{"split": "train", "id": "anna", "image": "a/1.jpg", "captions": ["..."],
      "pair_image": "g/1.jpg", "attributes": {...}, "pair_attributes": {...}}, ...]

The last three are optional; what one entry has, all must have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.files import ImageFolder, Said, checked_caption, composed, exists, read_json
from datasets.records import Data, Gallery, Image, Split, TrainSample
from utils.attributes import Attribute
from utils.errors import UserError, suggest
from utils.text import has_lone_surrogate

PEDES = {  # name: its file and the entries' key of the image
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
    """Read a ground-only benchmark from its folder, or from the folder that holds it."""
    file, image_key = PEDES[name]
    root = Path(root)
    folder = root / name if exists(root / name) else root
    if not exists(folder / file):
        raise UserError(f"--root_dir {root}: expected {name}/{file} and {name}/imgs/ there")
    return _Reader(folder / file, folder / "imgs", image_key).read(name, ("ground",))


def read_custom(root: str | Path, attributes: Sequence[Attribute]) -> Data:
    """Read a data set of one's own.

    Args:
        attributes: names and classes that the entries' labels may use (`--attributes_file`).
    """
    root = Path(root)
    if not exists(root / CUSTOM):
        raise UserError(f"--root_dir {root}: expected {CUSTOM} there (docs/custom.md)")
    reader = _Reader(root / CUSTOM, root, "image", CUSTOM_KEYS, attributes)
    pairs = isinstance(reader.rows[0], dict) and "pair_image" in reader.rows[0]
    return reader.read("custom", ("image", "pair image") if pairs else ("image",))


class _Reader:
    """Reads and checks the entries of one JSON file.

    Args:
        image_key: of the image's path relative to `images`.
        keys: all that an entry may have; None lets others pass unread.
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
        self.images, self.said = ImageFolder(images), Said()
        self.attributes = attributes
        self.rows = read_json(path)
        if not isinstance(self.rows, list) or not self.rows:
            raise UserError(f"{path}: expected a list of images with captions")

    def read(self, name: str, views: tuple[str, ...]) -> Data:
        """All splits. Identities of each become 0, 1, ... in the order of their ids."""
        first = self.rows[0] if self.keys and isinstance(self.rows[0], dict) else {}
        self.optional = {key for key in ("pair_image", "attributes") if key in first}
        if len(self.optional) == 2:
            self.optional.add("pair_attributes")
        checked: dict[str, list[int]] = {split: [] for split in SPLITS}
        for i, row in enumerate(self.rows):
            checked[self._check(row, i)].append(i)
        train = self._train(checked["train"])
        splits = {s: self._split(name, views, checked[s]) for s in SPLITS[1:] if checked[s]}
        if not train:
            raise UserError(f"{self.path}: no entry has the split 'train'")
        if "test" not in splits:
            raise UserError(f"{self.path}: no entry has the split 'test'")
        classes = {a.name: len(a.classes) for a in self.attributes}
        ids = {s: list(self._numbers(found)) for s, found in checked.items() if found}
        labelled = "attributes" in self.optional
        classes = classes if labelled else {}
        root, warnings = str(self.images.root), self.said.warnings()
        return Data(name, train, splits, classes, views, ids, root, warnings)

    def _entry(self, i: int) -> str:
        return f"{self.path.name}, entry {i}"

    def _check(self, row: Any, i: int) -> str:
        """The split of an entry whose keys and plain values are as they must be."""
        entry = self._entry(i)
        wanted = {"split", "id", self.image_key, "captions", *self.optional}
        if not isinstance(row, dict) or not wanted <= set(row):
            missing = sorted(wanted - set(row)) if isinstance(row, dict) else sorted(wanted)
            reason = " (what one entry has, all must have)" if set(missing) & self.optional else ""
            raise UserError(f"{entry}: {', '.join(missing)} missing{reason}")
        for key in set(row) - wanted if self.keys else ():
            if key in self.keys:
                raise UserError(f"{entry}: '{key}': what one entry has, all must have")
            raise UserError(f"{entry}: '{key}': unknown.{suggest(key, self.keys)}")
        if row["split"] not in SPLITS:
            raise UserError(f"{entry}: split is {row['split']!r}; it must be {', '.join(SPLITS)}")
        if type(row["id"]) not in (int, str):
            raise UserError(f"{entry}: id must be a whole number or text, got {row['id']!r}")
        if has_lone_surrogate(str(row["id"])):
            raise UserError(f"{entry}: id is {row['id']!r}, with half a character in it")
        # 7 and "7", or "anna" and "anna ", would be two people.
        self.said.agree(("the id", composed(str(row["id"])).strip()), row["id"], entry)
        captions = row["captions"]
        if not isinstance(captions, list) or (not captions and row["split"] == "train"):
            raise UserError(f"{entry}: captions must be a list of texts, got {captions!r:.60}")
        for k, caption in enumerate(captions):
            checked_caption(caption, f"{entry}, caption {k}", self.said)
        return row["split"]

    def _numbers(self, indices: Sequence[int]) -> dict[int | str, int]:
        """A number for every identity; whole numbers stand before texts."""
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
        self.said.agree(("the label of", full), labels, entry)
        return Image(full, labels)

    def _labels(self, values: Any, entry: str) -> tuple[int, ...]:
        names = [a.name for a in self.attributes]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise UserError(f"{entry}: expected an object with {', '.join(names)}")
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
        numbers = self._numbers(indices)
        pairs = "pair_image" in self.optional
        samples = []
        for i in indices:
            row, image = self.rows[i], self._image(i)
            pair = self._image(i, pair=True) if pairs else None
            pid, entry = numbers[row["id"]], self._entry(i)
            for caption in row["captions"]:
                samples.append(TrainSample(pid, caption, image, pair, entry))
                self.said.sample(samples[-1], row["id"])
        return samples

    def _split(self, name: str, views: Sequence[str], indices: Sequence[int]) -> Split:
        numbers, split = self._numbers(indices), Split([name], {view: Gallery() for view in views})
        for i in indices:
            row = self.rows[i]
            pid = numbers[row["id"]]
            images = [self._image(i, pair) for pair in (False, True)[: len(views)]]
            self.said.images(row["split"], row["id"], images, self._entry(i))
            for view, image in zip(views, images, strict=True):
                split.galleries[view].add(image, pid, 0)
            for caption in row["captions"]:
                split.add_caption(caption, pid, 0)
                key = (*(image.path for image in images), caption)
                self.said.once(
                    f"captions of {row['split']}, which count again", key, self._entry(i)
                )
        if not split.captions:
            raise UserError(f"{self.path}: no {self.rows[indices[0]]['split']} entry has a caption")
        return split
