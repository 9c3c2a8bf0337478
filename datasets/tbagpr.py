"""Reader of TBAGPR: aerial-ground pairs with captions from two sources, and one attribute file.

    TBAGPR/attrs.json                                  [{image key: [g, a, l, w, h, n, t]}, ...]
    TBAGPR/AG-ReID/agtext_{train,val,test}.json        + image folders
    TBAGPR/G2APS-AG/g2aps_{train,val,test}.json        + image folders

The sources are joined: the identities of the second source are numbered after those of the first.
Everything is checked while it is read; a UserError names the file and the entry.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets.reading import (
    EntryChecks,
    ImageFolder,
    checked_caption,
    checked_pid,
    exists,
    normalise_path,
)
from datasets.records import Data, Gallery, Image, Split, TrainSample
from utils.documents import read_json_file
from utils.errors import UserError

# Number of classes by attribute, in the order of the labels in attrs.json.
ATTRIBUTES = {
    "gender": 2, "age": 3, "light": 2, "weight": 3, "height": 3, "angle": 3, "altitude": 2,
}  # fmt: skip
VOTED = 5  # the first five are voted per identity; angle and altitude are kept per image


@dataclass(frozen=True)
class Source:
    """One of the sources that TBAGPR is made of."""

    folder: str
    json: str  # file name, with {} for the split
    keys: Callable[[str, str], tuple[str, ...]]  # (folder, file) -> image keys in attrs.json


def _ag_reid_keys(folder: str, file: str) -> tuple[str, ...]:
    """Both possible keys of a ".jpeg": the original code cuts off four characters, so the key of
    "x.jpeg" may end with "x" or "x."."""
    stem, suffix = os.path.splitext(file)
    stems = (stem, file[:-4]) if len(suffix) == 5 else (file[:-4],)
    return tuple(f"{os.path.basename(folder)}_{name}" for name in stems)


SOURCES = (
    Source("AG-ReID", "agtext_{}.json", _ag_reid_keys),
    Source("G2APS-AG", "g2aps_{}.json", lambda folder, file: (f"{folder}/{file}"[-22:],)),
)
VIEWS = ("aerial", "ground")
SPLIT_LISTS = ("image_pids", "img_paths", "pair_img_paths", "caption_pids", "captions")


def read_tbagpr(
    root: str | Path,
    name: str = "AGDataAttr",
    attributes: bool = True,
    sources: Sequence[Source] = SOURCES,
) -> Data:
    """Read all splits. With `attributes=False`, attrs.json is not read. Raises UserError."""
    root = Path(root)
    if not exists(root):
        raise UserError(f"--root_dir {root}: no such folder; it must hold {_expected(sources)}")
    missing = [s.folder for s in sources if not exists(root / s.folder)]
    if missing:
        folders = " and ".join(f"folder {name}" for name in missing)
        raise UserError(
            f"--root_dir {root}: {folders} {'are' if missing[1:] else 'is'} missing; expected "
            f"{_expected(sources)}"
        )
    checks = EntryChecks()
    labels = _read_attributes(root / "attrs.json", checks) if attributes else None
    reader = _Reader(root, labels, checks)
    train: list[TrainSample] = []
    splits = {
        split: Split([s.folder for s in sources], {view: Gallery() for view in VIEWS})
        for split in ("val", "test")
    }
    for index, source in enumerate(sources):
        offset = 1 + max((s.pid for s in train), default=-1)
        train += reader.train(source, index, offset)
        for split, joined in splits.items():
            offset = 1 + max(joined.image_pids + joined.caption_pids, default=-1)
            reader.split(source, split, index, offset, joined)
    if labels is not None:
        train = _vote_train(train)
        for joined in splits.values():
            _vote_split(joined)
    classes = dict(ATTRIBUTES) if attributes else {}
    return Data(name, train, splits, classes, VIEWS, root=str(root), warnings=checks.warnings())


def one_view(data: Data, views: str) -> Data:
    """Split pairs into samples of one image: aerial ("a"), ground ("g"), or both ("ag").

    Each image of a pair gets the pair's caption. The gallery holds the images of `views`.
    """
    numbers = [number for number, view in enumerate(VIEWS) if view[0] in views]
    train = [replace(s, image=s.images[n], pair=None) for n in numbers for s in data.train]
    selected = [VIEWS[n] for n in numbers]
    view_name = " + ".join(selected)
    splits = {}
    for name, split in data.splits.items():
        galleries = [split.galleries[view] for view in selected]
        joined = Gallery(
            [image for g in galleries for image in g.images],
            [pid for g in galleries for pid in g.pids],
            [source for g in galleries for source in g.sources],
        )
        splits[name] = replace(split, galleries={view_name: joined})
    return replace(data, train=train, splits=splits, views=(view_name,))


def vote(labels: Sequence[tuple[int, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
    """By identity, the most frequent label of each voted attribute. In a tie, the label that comes
    first in `labels` wins.

    Args:
        labels: (pid, labels of one image).
    """
    counters: dict[int, list[Counter[int]]] = {}
    for pid, values in labels:
        per_attribute = counters.setdefault(pid, [Counter() for _ in range(VOTED)])
        for counter, value in zip(per_attribute, values, strict=False):
            counter[value] += 1
    # In a tie, Counter.most_common keeps the order in which the labels were first counted.
    return {p: tuple(c.most_common(1)[0][0] for c in counter) for p, counter in counters.items()}


class _Reader:
    """Reads and checks the JSON files of one source and split at a time.

    Args:
        labels: by image key, from attrs.json; None without attributes.
    """

    def __init__(
        self, root: Path, labels: dict[str, tuple[int, ...]] | None, checks: EntryChecks
    ) -> None:
        self.root, self.labels, self.checks = root, labels, checks
        self.images = ImageFolder(root)

    def train(self, source: Source, index: int, offset: int) -> list[TrainSample]:
        """The samples of the source with this index. `offset` is added to its identities."""
        where = f"{source.folder}/{source.json.format('train')}"
        rows = read_json_file(self.root / where)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{where}: expected a list of samples")
        samples = []
        for i, row in enumerate(rows):
            entry = f"{where}, sample {i}"
            if not isinstance(row, list) or len(row) != 5:
                raise UserError(
                    f"{entry}: expected [pid, image_id, [folder, file], [folder, file], caption]"
                )
            pid, _, image, pair, caption = row
            sample = TrainSample(
                offset + checked_pid(pid, entry),
                checked_caption(caption, entry, self.checks),
                self._image(source, image, entry),
                self._image(source, pair, entry),
                entry,
                index,
            )
            self.checks.add_sample(sample, pid)
            samples.append(sample)
        pids = sorted({s.pid - offset for s in samples})
        gap = next((i for i, pid in enumerate(pids) if i != pid), None)
        if gap is not None:
            raise UserError(
                f"{where}: identities must be 0-based and contiguous; {gap} is missing "
                f"below {pids[-1]}"
            )
        return samples

    def split(self, source: Source, split: str, index: int, offset: int, joined: Split) -> None:
        """Add the source's images and captions of a split to `joined`, as `train` does."""
        where = f"{source.folder}/{source.json.format(split)}"
        lists = read_json_file(self.root / where)
        if not isinstance(lists, dict):
            raise UserError(f"{where}: expected an object of lists: {', '.join(SPLIT_LISTS)}")
        for key in SPLIT_LISTS:
            if not isinstance(lists.get(key), list):
                raise UserError(f"{where}: the list '{key}' is missing")
        for keys in (SPLIT_LISTS[:3], SPLIT_LISTS[3:]):
            lengths = [len(lists[key]) for key in keys]
            if len(set(lengths)) != 1:
                raise UserError(f"{where}: lists of different lengths: {dict(zip(keys, lengths))}")  # noqa: B905
            if not lengths[0]:
                raise UserError(f"{where}: '{keys[0]}' is empty")
        pairs = zip(lists["image_pids"], lists["img_paths"], lists["pair_img_paths"], strict=True)
        for i, (pid, image, pair) in enumerate(pairs):
            entry = f"{where}, image {i}"
            new_pid = offset + checked_pid(pid, entry)
            images = [self._image(source, path, entry) for path in (image, pair)]
            self.checks.add_images(split, pid, images, entry)
            for view, one in zip(VIEWS, images, strict=True):
                joined.galleries[view].add(one, new_pid, index)
        captions = zip(lists["caption_pids"], lists["captions"], strict=True)
        for i, (pid, caption) in enumerate(captions):
            entry = f"{where}, caption {i}"
            new_pid = offset + checked_pid(pid, entry)
            joined.add_caption(checked_caption(caption, entry, self.checks), new_pid, index)
            self.checks.add_caption(split, (new_pid, caption), entry)

    def _image(self, source: Source, path: Any, entry: str) -> Image:
        if not (
            isinstance(path, list) and len(path) == 2 and all(isinstance(p, str) for p in path)
        ):
            raise UserError(f"{entry}: expected an image as [folder, file], got {path!r}")
        folder, file = path
        if os.path.isabs(folder) or os.path.isabs(file):
            raise UserError(f"{entry}: image path {folder}/{file} leaves the data set's folder")
        full = self.images.find(f"{source.folder}/{folder}/{file}", entry)
        if self.labels is None:
            return Image(full)
        keys = source.keys(folder, file)
        for key in (*keys, *source.keys(normalise_path(folder), normalise_path(file))):
            if key in self.labels:
                return Image(full, self.labels[key])
        raise UserError(f"attrs.json: no attributes for image '{keys[0]}' ({entry})")


def _vote_train(train: list[TrainSample]) -> list[TrainSample]:
    # All aerial images are first, so that they win ties.
    voted = vote([(s.pid, s.images[n].attributes) for n in range(len(VIEWS)) for s in train])

    def with_vote(sample: TrainSample) -> TrainSample:
        labels = voted[sample.pid]
        image, pair = (Image(i.path, labels + i.attributes[VOTED:]) for i in sample.images)
        return replace(sample, image=image, pair=pair)

    return [with_vote(sample) for sample in train]


def _vote_split(split: Split) -> None:
    galleries = split.galleries.values()
    labels = [image.attributes for gallery in galleries for image in gallery.images]
    voted = vote(list(zip(split.image_pids, labels, strict=True)))
    for gallery in galleries:
        gallery.images = [
            Image(image.path, voted[pid] + image.attributes[VOTED:])
            for pid, image in zip(gallery.pids, gallery.images, strict=True)
        ]


def _read_attributes(path: Path, checks: EntryChecks) -> dict[str, tuple[int, ...]]:
    """Labels by image key, and also by `normalise_path` of the key."""
    rows = read_json_file(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of {{image key: labels}}")
    labels = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or len(row) != 1:
            raise UserError(
                f"{path}, entry {i}: expected one {{image key: labels}}, got {row!r:.80}"
            )
        ((key, values),) = row.items()
        if not isinstance(values, list) or len(values) != len(ATTRIBUTES):
            raise UserError(
                f"{path}, entry {i} ('{key}'): expected {len(ATTRIBUTES)} labels "
                f"({', '.join(ATTRIBUTES)}), got {values!r:.80}"
            )
        for value, (attribute, classes) in zip(values, ATTRIBUTES.items(), strict=True):
            if type(value) is not int or not 0 <= value < classes:
                raise UserError(
                    f"{path}, entry {i} ('{key}'): {attribute} is {value!r}; "
                    f"it must be 0 to {classes - 1}"
                )
        labels[key] = tuple(values)
        checks.require_same(("the label of image", key), labels[key], f"{path}, entry {i}")
        checks.count_repetition(f"labels in {path.name}", key, f"{path.name}, entry {i}")
    return {normalise_path(key): value for key, value in labels.items()} | labels


def _expected(sources: Sequence[Source]) -> str:
    return ", ".join(f"{s.folder}/{s.json.format('train')}" for s in sources)
