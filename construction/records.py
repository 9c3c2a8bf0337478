"""Records that pass from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

View = Literal["aerial", "ground"]
VIEWS: tuple[View, View] = ("aerial", "ground")
SPLITS = ("train", "val", "test")
Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


@dataclass(frozen=True)
class Picture:
    """A picture of one person, or a box in a frame, as the reader of a source finds it.

    Attributes:
        source: its name in the recipe.
        name: path of the picture in the data set, below the source's folder; its only name.
        file: where it is read.
        view: "aerial" or "ground".
        person: who it is; the same name in all sessions and splits.
        identity: the person in one session (other clothes are another identity), or the person.
        time: seconds, or any number that grows with time, within one camera.
        split: the source's own: "train", "val", "test" or "".
        notes: its annotations, by the names of the source's columns.
    """

    source: str
    name: str
    file: str
    view: View
    person: str
    identity: str
    box: Box | None = None
    camera: str = ""
    time: float | None = None
    split: str = ""
    notes: Mapping[str, str | int | float] = field(default_factory=dict)


class Measure(NamedTuple):
    """What is measured on a picture.

    Attributes:
        file: the picture alone: the source's file, or the crop that was cut from its frame.
        sha256: of this file's bytes, in hexadecimal digits.
        width, height: in pixels.
        sharpness: variance of the Laplacian of the grey picture at 128x384 pixels.
        brightness: mean grey level, 0 to 255.
        clipped: share of the pixels that are nearly black or nearly white.
        phash: perceptual hash of 64 bits, in hexadecimal digits.
        problem: why the picture cannot be used; empty if it can. All else is then empty.
    """

    file: str = ""
    sha256: str = ""
    width: int = 0
    height: int = 0
    sharpness: float = 0.0
    brightness: float = 0.0
    clipped: float = 0.0
    phash: str = ""
    problem: str = ""


class Candidate(NamedTuple):
    """A picture that is still in, with its measures.

    Attributes:
        number: its row in the table.
    """

    number: int
    picture: Picture
    measure: Measure


class Label(NamedTuple):
    """A picture's class of one attribute.

    Attributes:
        value: the name of the class (`--attributes_file`).
        confidence: 0 to 1.
        origin: "annotation", "view", "brightness", "model", "clip" or "default".
    """

    value: str
    confidence: float
    origin: str


class Pair(NamedTuple):
    """An aerial and a ground picture of an identity, in one split.

    Attributes:
        number: its row in the table.
        labels: by view and attribute.
        pid: the identity's number in its source and split: 0, 1, ...
    """

    number: int
    split: str
    aerial: Candidate
    ground: Candidate
    labels: Mapping[View, Mapping[str, Label]]
    pid: int = 0

    def candidate(self, view: View) -> Candidate:
        return self.aerial if view == "aerial" else self.ground


class Caption(NamedTuple):
    """A caption of a pair.

    Attributes:
        text: empty if no caption was good enough; the pair is then dropped.
        origin: the model's name, or "grammar".
        score: CLIP's cosine with the picture; None if it was not asked for.
        problem: why no caption was good enough.
        tries: how many answers were read.
    """

    text: str
    origin: str
    score: float | None = None
    problem: str = ""
    tries: int = 1
