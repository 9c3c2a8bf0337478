"""A split to choose on that test never sees: some identities of training leave it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from datasets.overlap import Person, persons
from datasets.records import Data, Gallery, Split, TrainSample
from utils.errors import UserError

HELDOUT = "heldout"


def hold_out(data: Data, share: float, seed: int) -> Data:
    """The data set with `share` of every source's training identities in the split "heldout".

    All identities of one person (AG-ReID has several) leave together, persons that stand in test
    last. At least one identity of each source leaves and one stays; the draw depends on the source,
    its identities and `seed` alone. Those that stay are renumbered. Raises UserError if a source
    has too few.
    """
    who, in_test = persons(data, "train"), set(persons(data, "test").values())
    sources = data.splits["test"].sources
    out: set[int] = set()
    for index, name in enumerate(sources):
        pids = sorted({sample.pid for sample in data.train if sample.source == index})
        out |= _draw(pids, who, in_test, share, [seed, *name.encode()], name)
    train, held = ([s for s in data.train if (s.pid in out) == leaves] for leaves in (False, True))
    number, ids = _numbers(train), dict(data.ids)
    if own := data.ids.get("train"):
        ids |= {"train": [own[p] for p in number], HELDOUT: [own[p] for p in _numbers(held)]}
    return replace(
        data,
        train=[replace(sample, pid=number[sample.pid]) for sample in train],
        splits={**data.splits, HELDOUT: _split(held, data.views, sources)},
        ids=ids,
    )


def _draw(
    pids: list[int],
    who: dict[int, Person],
    in_test: set[Person],
    share: float,
    seed: list[int],
    source: str,
) -> set[int]:
    """The identities of one source that leave training."""
    groups: dict[Person, list[int]] = {}
    for pid in pids:
        groups.setdefault(who[pid], []).append(pid)
    people = list(groups)
    # RandomState, because NumPy promises that its numbers stay the same in later versions.
    order = [people[i] for i in np.random.RandomState(seed).permutation(len(people))]
    order.sort(key=lambda person: person in in_test)  # stable: a draw within both parts
    wanted = max(1, round(share * len(pids)))
    out: set[int] = set()
    for person in order:
        if len(out) < wanted and len(out) + len(groups[person]) < len(pids):
            out.update(groups[person])
    if not out:
        raise UserError(
            f"--val_dataset heldout: {source} has {len(pids)} training identities of "
            f"{len(people)} people; of two people at least one can leave. Choose on another split, "
            "or on none (--val_dataset last)"
        )
    return out


def _numbers(samples: list[TrainSample]) -> dict[int, int]:
    """New contiguous numbers of the identities, in the old order."""
    return {pid: number for number, pid in enumerate(sorted({s.pid for s in samples}))}


def _split(samples: list[TrainSample], views: tuple[str, ...], sources: list[str]) -> Split:
    """Samples as queries and gallery: every caption of an entry, every image of a view once."""
    split = Split(list(sources), {view: Gallery() for view in views})
    number = _numbers(samples)
    seen: set[tuple[object, ...]] = set()
    for sample in samples:
        pid = number[sample.pid]
        # Two samples of an entry may share a caption or an image: views or captions of their own.
        if (sample.entry, sample.caption) not in seen:
            split.add_caption(sample.caption, pid, sample.source)
        seen.add((sample.entry, sample.caption))
        for view, image in zip(views, sample.images, strict=False):
            if (view, pid, image.path) not in seen:
                split.galleries[view].add(image, pid, sample.source)
            seen.add((view, pid, image.path))
    return split
