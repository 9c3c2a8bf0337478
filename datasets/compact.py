"""Millions of samples in a few arrays, instead of several Python objects each.

A sample of a caption, two paths and an entry takes about 1.5 KB as Python objects; here it takes
the bytes of its texts and 40 more. Loader processes share the arrays. Python objects have reference
counts, which copy their memory into every process.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np

from datasets.records import Image, TrainSample

Columns: TypeAlias = dict[str, np.ndarray]
T = TypeVar("T")


class Rows(Sequence[T]):
    """A sequence that makes an item when it is asked for it."""

    @abstractmethod
    def at(self, index: int) -> T:
        """The item at an index from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.at(index % len(self))

    def __iter__(self) -> Iterator[T]:
        return map(self.at, range(len(self)))


class Texts(Rows[str]):
    """Texts in two arrays: their UTF-8 bytes, and where each of them ends."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.bytes: Any = bytearray()
        self.ends: Any = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        # File names that are not UTF-8 have surrogates.
        self.bytes += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.bytes))

    def columns(self, name: str) -> Columns:
        return {
            f"{name}.bytes": np.frombuffer(self.bytes, np.uint8),
            f"{name}.ends": np.asarray(self.ends),
        }

    @classmethod
    def of(cls, columns: Columns, name: str) -> Texts:
        texts = cls()
        texts.bytes, texts.ends = columns[f"{name}.bytes"], columns[f"{name}.ends"]
        return texts

    def __len__(self) -> int:
        return len(self.ends) - 1

    def at(self, index: int) -> str:
        text = bytes(self.bytes[self.ends[index] : self.ends[index + 1]])
        return text.decode("utf-8", "surrogatepass")


class Entries(Rows[str]):
    """Names of entries such as "dataset.json, entry 17", ten bytes each: the number, and which of
    few beginnings stands before it."""

    def __init__(self) -> None:
        self._beginnings: dict[str, int] = {}
        self._which: Any = array("i")
        self._numbers: Any = array("q")

    def append(self, entry: str) -> None:
        beginning = entry.rstrip("0123456789")
        number = entry[len(beginning) :]
        if not number or len(number) > 18 or str(int(number)) != number:
            beginning, number = entry, "-1"
        self._which.append(self._beginnings.setdefault(beginning, len(self._beginnings)))
        self._numbers.append(int(number))

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, index: int) -> str:
        beginning = next(itertools.islice(self._beginnings, int(self._which[index]), None))
        number = self._numbers[index]
        return beginning if number < 0 else f"{beginning}{number}"

    def columns(self) -> Columns:
        beginnings = Texts(self._beginnings).columns("beginnings")
        return {
            "which": np.asarray(self._which),
            "numbers": np.asarray(self._numbers),
            **beginnings,
        }

    @classmethod
    def of(cls, columns: Columns) -> Entries:
        entries = cls()
        entries._which, entries._numbers = columns["which"], columns["numbers"]
        beginnings = Texts.of(columns, "beginnings")
        entries._beginnings = {text: i for i, text in enumerate(beginnings)}
        return entries


class TrainSamples(Rows[TrainSample]):
    """Training samples as columns; `samples[i]` makes a `TrainSample`.

    All samples have as many images and labels as the first one.

    Args:
        root: a folder; of the paths in it only the rest is kept.

    Attributes:
        captions, entries: texts by sample.
        stored: the folder where datasets/stored.py keeps them for later starts, if any.
        known: their fingerprint and counts, if known from an earlier start.
    """

    def __init__(self, samples: Iterable[TrainSample] = (), root: str = "") -> None:
        self.root = f"{root}/" if root else ""
        self.stored: Path | None = None
        self.known: tuple[int, int, int, str] | None = None
        self._pids: Any = array("i")
        self._sources: Any = array("h")
        self.captions, self.entries = Texts(), Entries()
        # Of the images of all samples; a sample shares those of the one before it.
        self._paths = Texts()
        self._images: Any = array("i")  # positions in `_paths`, of each sample's images
        self._labels: Any = array("B")  # by image
        self.views = self.attributes = 0  # numbers of them
        self._last: tuple[Image, ...] = ()
        for sample in samples:
            self.append(sample)

    def append(self, sample: TrainSample) -> None:
        """Raises ValueError for another number of images or labels than before."""
        images = sample.images
        if not self.views:
            self.views, self.attributes = len(images), len(images[0].attributes)
        if len(images) != self.views or any(len(i.attributes) != self.attributes for i in images):
            raise ValueError(f"{sample.entry}: not as many images and labels as the first sample")
        if images != self._last:  # captions of one entry have the same images
            for image in images:
                inside = image.path.startswith(self.root)
                self._paths.append(image.path[len(self.root) :] if inside else "\0" + image.path)
                self._labels.extend(image.attributes)
            self._last = images
        last = len(self._paths)
        self._images.extend(range(last - self.views, last))
        self._pids.append(sample.pid)
        self._sources.append(sample.source)
        self.captions.append(sample.caption)
        self.entries.append(sample.entry)

    @property
    def pids(self) -> np.ndarray:
        """Identities, [N] int32."""
        return np.asarray(self._pids)

    def columns(self) -> Columns:
        """All of it as arrays, for a file."""
        return {
            "pids": np.asarray(self._pids), "sources": np.asarray(self._sources),
            "images": np.asarray(self._images), "labels": np.asarray(self._labels),
            "sizes": np.array([self.views, self.attributes]),
            **self.captions.columns("captions"), **self._paths.columns("paths"),
            **self.entries.columns(),
        }  # fmt: skip

    @classmethod
    def of(cls, columns: Columns, root: str) -> TrainSamples:
        """The samples of `columns`, whose arrays it uses without a copy."""
        samples = cls(root=root)
        samples._pids, samples._sources = columns["pids"], columns["sources"]
        samples._images, samples._labels = columns["images"], columns["labels"]
        samples.views, samples.attributes = columns["sizes"].tolist()
        samples.captions = Texts.of(columns, "captions")
        samples._paths, samples.entries = Texts.of(columns, "paths"), Entries.of(columns)
        return samples

    def with_captions(self, captions: Iterable[str]) -> TrainSamples:
        """The same samples with other captions, which are not those that are stored or known."""
        samples = copy.copy(self)
        samples.captions, samples.stored, samples.known = Texts(captions), None, None
        return samples

    def renumber(self, new: Sequence[int]) -> None:
        """Replace each identity `pid` by `new[pid]`."""
        self._pids = array("i", np.asarray(new, np.int32)[self.pids].tobytes())

    def __len__(self) -> int:
        return len(self._pids)

    def at(self, index: int) -> TrainSample:
        images = [self._image(self._images[index * self.views + v]) for v in range(self.views)]
        return TrainSample(
            int(self._pids[index]),
            self.captions[index],
            images[0],
            images[1] if self.views > 1 else None,
            self.entries[index],
            int(self._sources[index]),
        )

    def _image(self, i: int) -> Image:
        width = self.attributes
        path = self._paths[i]
        path = path[1:] if path.startswith("\0") else self.root + path
        return Image(path, tuple(self._labels[i * width : (i + 1) * width].tolist()))


class ImagePaths(Rows[str]):
    """The paths of the images of all samples: those of the first view, then those of the second.

    Args:
        entries: give the samples' entries instead, for messages.
    """

    def __init__(self, samples: Sequence[TrainSample], views: int, entries: bool = False) -> None:
        self.samples, self.views, self.entries = samples, views, entries

    def __len__(self) -> int:
        return self.views * len(self.samples)

    def at(self, index: int) -> str:
        view, i = divmod(index, len(self.samples))
        sample = self.samples[i]
        return sample.entry if self.entries else sample.images[view].path
