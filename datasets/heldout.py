"""The held-out split: some training identities leave training, to select checkpoints on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from datasets.overlap import Person, people_of
from datasets.records import Data, Gallery, Split, TrainSample
from utils.errors import UserError

HELDOUT = "heldout"


def hold_out(data: Data, fraction: float, seed: int) -> Data:
    """The data set with a new split "heldout": `fraction` of the training identities of each
    source, which are removed from training.

    All identities of one person (AG-ReID has several) are held out together, people who are also in
    test only after all others. Each source keeps at least one identity and loses at least one. The
    random order depends only on the source, its identities and `seed`. The identities that remain
    get new contiguous numbers. Raises UserError if a source shows only one person.
    """
    person_of, in_test = people_of(data, "train"), set(people_of(data, "test").values())
    sources = data.splits["test"].sources
    chosen: set[int] = set()
    for index, name in enumerate(sources):
        pids = sorted({sample.pid for sample in data.train if sample.source == index})
        chosen |= _choose(pids, person_of, in_test, fraction, [seed, *name.encode()], name)
    train = [sample for sample in data.train if sample.pid not in chosen]
    held_out = [sample for sample in data.train if sample.pid in chosen]
    new_pid, ids = _new_pids(train), dict(data.ids)
    if old_ids := data.ids.get("train"):
        ids["train"] = [old_ids[pid] for pid in new_pid]
        ids[HELDOUT] = [old_ids[pid] for pid in _new_pids(held_out)]
    return replace(
        data,
        train=[replace(sample, pid=new_pid[sample.pid]) for sample in train],
        splits={**data.splits, HELDOUT: _split(held_out, data.views, sources)},
        ids=ids,
    )


def _choose(
    pids: list[int],
    person_of: dict[int, Person],
    in_test: set[Person],
    fraction: float,
    seed: list[int],
    source: str,
) -> set[int]:
    """The identities of one source that are held out."""
    pids_of: dict[Person, list[int]] = {}
    for pid in pids:
        pids_of.setdefault(person_of[pid], []).append(pid)
    people = list(pids_of)
    # RandomState, because NumPy promises that its numbers stay the same in later versions.
    order = [people[i] for i in np.random.RandomState(seed).permutation(len(people))]
    order.sort(key=lambda person: person in in_test)  # stable: both parts stay in random order
    wanted = max(1, round(fraction * len(pids)))
    chosen: set[int] = set()
    for person in order:
        if len(chosen) < wanted and len(chosen) + len(pids_of[person]) < len(pids):
            chosen.update(pids_of[person])
    if not chosen:
        raise UserError(
            f"--val_dataset heldout: {source} has {len(pids)} training identities of "
            f"{len(people)} people, but needs 2 people. Select on another split, or on none "
            "(--val_dataset last)"
        )
    return chosen


def _new_pids(samples: list[TrainSample]) -> dict[int, int]:
    """By old identity its new one: 0, 1, ... in the same order."""
    return {pid: number for number, pid in enumerate(sorted({s.pid for s in samples}))}


def _split(samples: list[TrainSample], views: tuple[str, ...], sources: list[str]) -> Split:
    """Samples as queries and galleries, each caption of an entry and each image of a view once."""
    split = Split(list(sources), {view: Gallery() for view in views})
    new_pid = _new_pids(samples)
    seen: set[tuple[object, ...]] = set()
    for sample in samples:
        pid = new_pid[sample.pid]
        # An entry gives several samples if it has several captions, or if both of its images are
        # samples (AGSGData).
        if (sample.entry, sample.caption) not in seen:
            split.add_caption(sample.caption, pid, sample.source)
        seen.add((sample.entry, sample.caption))
        for view, image in zip(views, sample.images, strict=False):
            if (view, pid, image.path) not in seen:
                split.galleries[view].add(image, pid, sample.source)
            seen.add((view, pid, image.path))
    return split
