"""Which images and people two splits of a data set share, by its files and their names.

shared = overlap(data, "val", "test")
if shared: ...                    # val shows images or people of test
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from datasets.reading import same_content
from datasets.records import Data, Image

# A file name of AG-ReID: person, session and altitude (an identity is these three together), camera
# and frame. So one person may have several identities.
PERSON = re.compile(r"P(\d+)T\d+A\d+C\d+F\d+")
# ("person", their number), ("id", the data set's), or (split, identity).
Person: TypeAlias = tuple[str, int | str]


@dataclass(frozen=True)
class Overlap:
    """The images and people of a split that are in another split too, as texts for messages."""

    split: str
    other: str
    shared_images: list[str]
    shared_people: list[str]
    of_images: int  # in all of `split`
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
    """What `split` shares with `other`. Each is "train" or a name in `data.splits`.

    Two images are the same if they are one file, or files of the same bytes. Two people are the
    same if `people_of` says so, or if they share an image.
    """
    images, other_images = list(images_of(data, split)), list(images_of(data, other))
    contents = same_content([image.path for _, image in images + other_images])
    other_paths: dict[int, str] = {}  # by content
    for content, (_, image) in zip(contents[len(images) :], other_images, strict=True):
        other_paths.setdefault(content, image.path)
    person_of, other_people = people_of(data, split), set(people_of(data, other).values())
    shared_images: dict[str, str] = {}
    shared_people = {p: person_name(p) for p in person_of.values() if p in other_people}
    for content, (pid, image) in zip(contents, images, strict=False):
        if content in other_paths:
            other_path = other_paths[content]
            copy = f" = {other_path}" if other_path != image.path else ""
            shared_images[image.path] = image.path + copy
            shared_people.setdefault(person_of[pid], person_name(person_of[pid]))
    of_images, of_people = {image.path for _, image in images}, set(person_of.values())
    shared = list(shared_images.values()), list(shared_people.values())
    return Overlap(split, other, *shared, len(of_images), len(of_people))


def images_of(data: Data, split: str) -> Iterator[tuple[int, Image]]:
    """(pid, image) of every image of a split, "train" included, in all views."""
    if split == "train":
        for sample in data.train:
            for image in sample.images:
                yield sample.pid, image
        return
    for gallery in data.splits[split].galleries.values():
        yield from zip(gallery.pids, gallery.images, strict=True)


def people_of(data: Data, split: str) -> dict[int, Person]:
    """By identity of a split its person, comparable between splits where the data set allows it:
    by the person's number in AG-ReID's file names, or by an id that means the same in every split.
    Otherwise each identity of each split is a separate person."""
    ids = data.ids.get(split)
    people: dict[int, Person] = {}
    for pid, image in images_of(data, split):
        if pid not in people or people[pid][0] != "person":
            match = PERSON.match(os.path.basename(image.path))
            unnumbered = ("id", ids[pid]) if ids else (split, pid)
            people[pid] = ("person", int(match[1])) if match else unnumbered
    return people


def person_name(person: Person) -> str:
    """For messages: "person P0001", "id anna", "identity 3 of val"."""
    kind, number = person
    if kind == "person":
        return f"person P{number:04d}"
    return f"id {number}" if kind == "id" else f"identity {number} of {kind}"
