"""Plain records that every reader returns. Paths are absolute, labels are class indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from utils.errors import UserError


class Image(NamedTuple):
    """An image, a file or a member of a tar (datasets/shards.py), and its attribute labels if the
    data set has attributes."""

    path: str
    attributes: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainSample:
    """A caption of an identity, with its image (aerial, or the only view) and its pair (ground)."""

    pid: int  # 0-based and contiguous over the training set
    caption: str
    image: Image
    pair: Image | None
    entry: str  # its place in the files, for messages: "AG-ReID/agtext_train.json, sample 17"
    source: int = 0  # index into the splits' `sources`

    @property
    def images(self) -> tuple[Image, ...]:
        """The only one, or both."""
        return (self.image,) if self.pair is None else (self.image, self.pair)


@dataclass
class Gallery:
    """Images of one view with their identities and sources, as parallel lists."""

    images: list[Image] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # indices into the split's `sources`

    def add(self, image: Image, pid: int, source: int) -> None:
        self.images.append(image)
        self.pids.append(pid)
        self.sources.append(source)


@dataclass
class Split:
    """Captions (queries) and images (galleries) of a val, test or held-out split.

    `caption_pids[i]` and `caption_sources[i]` belong to `captions[i]`. Each view has its own
    gallery, of any length. Sources are indices into `sources`.
    """

    sources: list[str]
    galleries: dict[str, Gallery]  # by view, in the order of `Data.views`
    captions: list[str] = field(default_factory=list)
    caption_pids: list[int] = field(default_factory=list)
    caption_sources: list[int] = field(default_factory=list)

    def add_caption(self, caption: str, pid: int, source: int) -> None:
        self.captions.append(caption)
        self.caption_pids.append(pid)
        self.caption_sources.append(source)

    @property
    def image_pids(self) -> list[int]:
        """Identities of the images of all views."""
        return [pid for gallery in self.galleries.values() for pid in gallery.pids]


@dataclass
class Data:
    """A data set read from disk and checked."""

    name: str
    train: Sequence[TrainSample]
    splits: dict[str, Split]  # "val", "test", and "heldout" if `hold_out` made it
    attribute_classes: dict[str, int] = field(default_factory=dict)  # in the order of the labels
    views: tuple[str, ...] = ("aerial", "ground")  # of `image` and, if there are two, of `pair`

    # By split, the data set's own ids of pids 0, 1, ... if an id is the same person in all splits.
    ids: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    root: str = ""  # the data set's folder, with which the images' paths begin
    warnings: list[str] = field(default_factory=list)  # such as repetitions: one line for each kind
    folders: list[str] = field(
        default_factory=list
    )  # and tars in which the reader looked for images
    # By path, the view of an image ("aerial", "ground") in a gallery of both. Known for all images
    # of a split, or for none.
    image_views: Mapping[str, str] = field(default_factory=dict)
    # [N] bool: the training samples to which --noise_rate gave a caption of another identity.
    noisy: np.ndarray | None = None

    @property
    def attribute_names(self) -> tuple[str, ...]:
        return tuple(self.attribute_classes)

    @property
    def has_pairs(self) -> bool:
        """Whether every sample has two images, aerial and ground."""
        return len(self.views) > 1

    @property
    def num_identities(self) -> int:
        return 1 + int(self.train_pids.max())

    @property
    def train_pids(self) -> np.ndarray:
        """The identity of each training sample, [N]."""
        columns = getattr(self.train, "pids", None)
        return np.array([s.pid for s in self.train]) if columns is None else columns

    def check(self) -> None:
        """Raise UserError if a reader has not kept the rules of these records."""
        classes = tuple(self.attribute_classes.values())

        def refuse(wrong: bool, what: str) -> None:
            if wrong:
                raise UserError(f"the reader of {self.name} returned {what}")

        def valid(image: Image) -> bool:
            labels = image.attributes
            return len(labels) == len(classes) and all(
                map(lambda v, n: 0 <= v < n, labels, classes)
            )

        refuse(not len(self.train), "no training samples")
        pids = np.unique(self.train_pids)
        refuse(pids[-1] != len(pids) - 1, "training identities other than 0, 1, 2, ...")
        for s in self.train if isinstance(self.train, list) else ():  # columns are like the first
            refuse(len(s.images) != len(self.views), f"not one image per view for {s.entry}")
            refuse(not all(map(valid, s.images)), f"labels that fit no classes for {s.entry}")
        refuse("test" not in self.splits, "no test split")
        for name, split in self.splits.items():
            galleries = split.galleries
            refuse(tuple(galleries) != self.views, f"galleries of {name} other than its views")
            images = (image for gallery in galleries.values() for image in gallery.images)
            refuse(not all(map(valid, images)), f"labels that fit no classes in {name}")
            found = set(galleries[self.views[0]].pids) & set(split.caption_pids)
            refuse(not found, f"no image of {self.views[0]} in {name} for any caption")
