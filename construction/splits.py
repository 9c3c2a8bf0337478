"""Splits by person: nobody is in two of train, val and test, whatever clothes they wear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from construction.recipe import Splits
from utils.errors import UserError


def split_people(people: Sequence[str], recipe: Splits, seed: int, source: str) -> dict[str, str]:
    """By person of a source, "train", "val" or "test", at random. At least one person is in each
    of the splits that the recipe gives a share. Raises UserError if there are too few."""
    test = _count(len(people), recipe.test)
    val = _count(len(people), recipe.val)
    if val + test >= len(people):
        raise UserError(
            f"the source {source} has {len(people)} persons left, but val and test need "
            f"{val + test}, and train at least one"
        )
    order = _shuffled(people, seed, source)
    return {
        person: "test" if i < test else "val" if i < test + val else "train"
        for i, person in enumerate(order)
    }


def held_out(
    train: Sequence[str], test: Sequence[str], recipe: Splits, seed: int, source: str
) -> set[str]:
    """The persons of a source's own train split that become val: a share of them, and nobody who is
    also in test. Raises UserError if that leaves nobody for train."""
    wanted, in_test = _count(len(train), recipe.val), set(test)
    order = [p for p in _shuffled(train, seed, source) if p not in in_test]
    if wanted >= len(train) or len(order) < wanted:
        raise UserError(
            f"the source {source} has {len(train)} persons in train, {len(order)} of them not in "
            f"test; val needs {wanted}, and train at least one"
        )
    return set(order[:wanted])


def _count(count: int, share: float) -> int:
    return max(1, round(share * count)) if share else 0


def _shuffled(people: Sequence[str], seed: int, source: str) -> list[str]:
    people = sorted(set(people))
    # RandomState, because NumPy promises that its numbers stay the same in later versions.
    rng = np.random.RandomState([seed, *source.encode()])
    return [people[i] for i in rng.permutation(len(people))]
