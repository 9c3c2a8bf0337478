"""What two splits of a data set share, measured on its files and its names.

found = overlap(data, "val", "test")
if found: ...                    # val shows images or people of test
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from datasets.files import same_content
from datasets.records import Data, Image

# AG-ReID's names: person, session and altitude (these three are its identity), camera, frame. So
# one person may have several identities.
PERSON = re.compile(r"P(\d+)T\d+A\d+C\d+F\d+")
# ("person", their number), ("id", the data set's), or (split, identity).
Person: TypeAlias = tuple[str, int | str]


@dataclass(frozen=True)
class Overlap:
    """Which of a split's images and people are in another split too, in words."""

    split: str
    other: str
    shared_images: list[str]
    shared_people: list[str]
    of_images: int
    of_people: int

    @property
    def images(self) -> int:
        return len(self.shared_images)

    @property
    def people(self) -> int:
        return len(self.shared_people)

    def __bool__(self) -> bool:
        return bool(self.shared_images or self.shared_people)

    def __str__(self) -> str:
        return (
            f"{self.split} shares {self.images} of its {self.of_images} images and {self.people} "
            f"of its {self.of_people} people with {self.other}"
        )


def overlap(data: Data, split: str, other: str = "test") -> Overlap:
    """What `split` shares with `other`; "train" is one too.

    Images are the same if they are one file, or files of the same bytes. People are the same by
    `persons`, and where they share an image.
    """
    mine, theirs = list(shown(data, split)), list(shown(data, other))
    numbers = same_content([image.path for _, image in mine + theirs])
    there: dict[int, str] = {}
    for number, (_, image) in zip(numbers[len(mine) :], theirs, strict=True):
        there.setdefault(number, image.path)
    who, known = persons(data, split), set(persons(data, other).values())
    images: dict[str, str] = {}
    people = {person: name_of(person) for person in who.values() if person in known}
    for number, (pid, image) in zip(numbers, mine, strict=False):
        if number in there:
            same = f" = {there[number]}" if there[number] != image.path else ""
            images[image.path] = image.path + same
            people.setdefault(who[pid], name_of(who[pid]))
    of_images, of_people = {image.path for _, image in mine}, set(who.values())
    lists = list(images.values()), list(people.values())
    return Overlap(split, other, *lists, len(of_images), len(of_people))


def shown(data: Data, split: str) -> Iterator[tuple[int, Image]]:
    """(pid, image) of every image of a split, "train" included, of all views."""
    if split == "train":
        for sample in data.train:
            for image in sample.images:
                yield sample.pid, image
        return
    for gallery in data.splits[split].galleries.values():
        yield from zip(gallery.pids, gallery.images, strict=True)


def persons(data: Data, split: str) -> dict[int, Person]:
    """Who every identity of a split is, comparable between splits as far as the data set tells: by
    the person's number in AG-ReID's file names, or by ids that mean the same in every split.
    Otherwise an identity equals only itself."""
    ids = data.ids.get(split)
    found: dict[int, Person] = {}
    for pid, image in shown(data, split):
        if pid not in found or found[pid][0] != "person":
            match = PERSON.match(os.path.basename(image.path))
            own = ("id", ids[pid]) if ids else (split, pid)
            found[pid] = ("person", int(match[1])) if match else own
    return found


def name_of(person: Person) -> str:
    """For messages: "person P0001", "id anna", "identity 3 of val"."""
    kind, number = person
    if kind == "person":
        return f"person P{number:04d}"
    return f"id {number}" if kind == "id" else f"identity {number} of {kind}"
