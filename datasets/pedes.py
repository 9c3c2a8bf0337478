"""Reader of data sets that are a single list of images with captions: the ground-only benchmarks,
and `custom`.

    CUHK-PEDES/reid_raw.json          + CUHK-PEDES/imgs/
    ICFG-PEDES/ICFG-PEDES.json        + ICFG-PEDES/imgs/
    RSTPReid/data_captions.json       + RSTPReid/imgs/
    [{"split": "train", "id": 1, "captions": ["...", ...], "file_path" or "img_path": "..."}, ...]

`custom` is the user's own data (docs/custom.md): `dataset.json` in `--root_dir`, or `dataset.jsonl`
with one entry per line for millions of entries. Image paths are relative to that folder.

    [{"split": "train", "id": "anna", "image": "a/1.jpg", "captions": ["..."],
      "pair_image": "g/1.jpg", "attributes": {...}, "pair_attributes": {...}}, ...]

The last three keys are optional, but if one entry has a key, all must have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets.compact import TrainSamples
from datasets.identities import People, checked_id
from datasets.reading import EntryChecks, ImageFolder, checked_captions, exists, read_checked
from datasets.records import Data, Gallery, Image, Split, TrainSample
from datasets.stored import key_of, load_or_read
from utils.attributes import Attribute
from utils.documents import load_json, read_json_file
from utils.errors import UserError, suggest
from utils.files import open_file

PEDES = {  # by name: the JSON file, and the key of the image path in its entries
    "CUHK-PEDES": ("reid_raw.json", "file_path"),
    "ICFG-PEDES": ("ICFG-PEDES.json", "file_path"),
    "RSTPReid": ("data_captions.json", "img_path"),
}
CUSTOM = "dataset.json"
CUSTOM_FILES = (CUSTOM, "dataset.jsonl")
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


def read_custom(root: str | Path, attributes: Sequence[Attribute], cache: str | Path = "") -> Data:
    """Read the user's own data set. Raises UserError.

    Args:
        attributes: the attributes that the entries label, with their classes (`--attributes_file`).
        cache: a folder that keeps the content of `dataset.jsonl` for later starts, if any.
    """
    root = Path(root)
    path = next((root / name for name in CUSTOM_FILES if exists(root / name)), None)
    if path is None:
        names = " or ".join(CUSTOM_FILES)
        raise UserError(f"--root_dir {root}: expected {names} there (docs/custom.md)")

    def read(checks: EntryChecks) -> Data:
        reader = _Reader(path, root, "image", CUSTOM_KEYS, attributes, checks)
        pairs = "pair_image" in reader.optional
        return reader.read("custom", ("image", "pair image") if pairs else ("image",))

    if path.suffix != ".jsonl":
        return read(EntryChecks())
    if not cache:
        return read_checked(read)
    key = key_of(path, repr(attributes))
    return load_or_read(Path(cache) / f"dataset-{key}", partial(read_checked, read))


class _Reader:
    """Reads and checks the entries of one file, one after the other.

    Args:
        images: the folder that image paths are relative to.
        image_key: the entries' key of the image path.
        keys: the keys that an entry may have; without any, unknown keys are ignored.
        checks: across entries.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        image_key: str,
        keys: Sequence[str] = (),
        attributes: Sequence[Attribute] = (),
        checks: EntryChecks | None = None,
    ) -> None:
        self.path, self.image_key, self.keys = path, image_key, keys
        self.images, self.checks = ImageFolder(images), checks or EntryChecks()
        self.attributes = attributes
        self.rows = _Lines(path) if path.suffix == ".jsonl" else read_json_file(path)
        if not isinstance(self.rows, (list, _Lines)):
            raise UserError(f"{path}: expected a list of images with captions")
        first: Any = next(iter(self.rows), None)
        if first is None:
            raise UserError(f"{path}: expected a list of images with captions")
        # The optional keys that the first entry has, and so all must have.
        given = first if keys and isinstance(first, dict) else {}
        self.optional = {key for key in ("pair_image", "attributes") if key in given}
        if len(self.optional) == 2:
            self.optional.add("pair_attributes")

    def read(self, name: str, views: tuple[str, ...]) -> Data:
        """Read all splits. The identities of each become 0, 1, ... in the order of their ids."""
        train = TrainSamples(root=str(self.images.root))
        people = {split: People() for split in SPLITS}
        splits = {s: Split([name], {view: Gallery() for view in views}) for s in SPLITS[1:]}
        for i, row in enumerate(self.rows):
            entry = self._entry(i)
            split = self._check(row, entry)
            given = row.get("id")
            pid = people[split].number(given)
            images = [self._image(row, pair, entry) for pair in (False, True)[: len(views)]]
            if split == "train":
                for caption in row["captions"]:
                    sample = TrainSample(pid, caption, images[0], _second(images), entry)
                    train.append(sample)
                    self.checks.add_sample(sample, entry if given is None else given)
                continue
            self.checks.add_images(split, given, images, entry)
            for view, image in zip(views, images, strict=True):
                splits[split].galleries[view].add(image, pid, 0)
            for caption in row["captions"]:
                splits[split].add_caption(caption, pid, 0)
                self.checks.add_caption(split, (*(i.path for i in images), caption), entry)
        for split in ("train", "test"):
            if not len(people[split]):
                raise UserError(f"{self.path}: no entry has the split '{split}'")
        splits = {name: split for name, split in splits.items() if len(people[name])}
        for split, content in splits.items():
            if not content.captions:
                raise UserError(f"{self.path}: no {split} entry has a caption")
            new = people[split].sorted_numbers()
            content.caption_pids = [new[pid] for pid in content.caption_pids]
            for gallery in content.galleries.values():
                gallery.pids = [new[pid] for pid in gallery.pids]
        train.renumber(people["train"].sorted_numbers())
        ids = {split: known for split, of_split in people.items() if (known := of_split.sorted())}
        attributes = self.attributes if "attributes" in self.optional else ()
        classes = {a.name: len(a.classes) for a in attributes}
        root, warnings = str(self.images.root), self.checks.warnings()
        folders = self.images.folders
        return Data(name, train, splits, classes, views, ids, root, warnings, folders)

    def _entry(self, i: int) -> str:
        if isinstance(self.rows, _Lines):
            return f"{self.path.name}, line {i + 1}"
        return f"{self.path.name}, entry {i}"

    def _check(self, row: Any, entry: str) -> str:
        """Check the keys and the plain values of an entry. Returns its split."""
        wanted = {"split", "id", self.image_key, "captions", *self.optional}
        if self.keys and isinstance(row, dict) and row.get("split") == "train" and "id" not in row:
            wanted.remove("id")
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
        if "id" in wanted:
            checked_id(row["id"], entry, self.checks)
        some = row["split"] == "train"  # an image of val or test may be in the gallery alone
        checked_captions(row["captions"], entry, self.checks, some)
        return row["split"]

    def _image(self, row: dict[str, Any], pair: bool, entry: str) -> Image:
        prefix = "pair_" if pair else ""
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


class _Lines(Iterable[Any]):
    """The entries of a file with one JSON document per line. Raises UserError naming the line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        try:
            with open_file(self.path) as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield load_json(line)
                    except (ValueError, RecursionError) as error:
                        where = f"{self.path}, line {number}"
                        raise UserError(f"{where}: malformed JSON: {error}") from None
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from None


def _second(images: Sequence[Image]) -> Image | None:
    return images[1] if len(images) > 1 else None
