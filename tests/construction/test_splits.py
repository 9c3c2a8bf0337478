"""Splits by person."""

from __future__ import annotations

from collections import Counter

import pytest

from construction.recipe import Splits
from construction.splits import held_out, split_people
from utils.errors import UserError

PEOPLE = [f"P{i:04d}" for i in range(100)]


def test_every_person_is_in_one_split_and_the_shares_hold():
    splits = split_people(PEOPLE, Splits(val=0.1, test=0.3), 0, "s")
    assert set(splits) == set(PEOPLE)
    assert Counter(splits.values()) == {"train": 60, "test": 30, "val": 10}


def test_splits_depend_on_seed_and_source_alone():
    recipe = Splits()
    one = split_people(PEOPLE, recipe, 0, "s")
    assert split_people(PEOPLE[::-1], recipe, 0, "s") == one
    assert split_people(PEOPLE, recipe, 1, "s") != one
    assert split_people(PEOPLE, recipe, 0, "t") != one


def test_a_share_gives_at_least_one_person_and_no_share_gives_none():
    assert Counter(split_people(PEOPLE[:5], Splits(val=0.01, test=0.01), 0, "s").values()) == {
        "train": 3, "val": 1, "test": 1,
    }  # fmt: skip
    assert set(split_people(PEOPLE, Splits(val=0, test=0.5), 0, "s").values()) == {"train", "test"}


def test_too_few_persons_are_refused_with_the_source_and_the_counts():
    with pytest.raises(UserError, match="AG-ReID has 2 persons left, but val and test need 2"):
        split_people(PEOPLE[:2], Splits(), 0, "AG-ReID")


def test_nobody_who_is_in_test_is_held_out_as_val():
    train, test = PEOPLE[:60], PEOPLE[40:]
    val = held_out(train, test, Splits(by="source", val=0.5), 0, "s")
    assert len(val) == 30 and val <= set(PEOPLE[:40])
    with pytest.raises(UserError, match="60 persons in train, 5 of them not in test; val needs 6"):
        held_out(train, PEOPLE[5:], Splits(by="source", val=0.1), 0, "s")
