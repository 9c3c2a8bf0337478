"""The held-out split: identities that leave training, to select checkpoints on them."""

import itertools

import pytest

from datasets.heldout import hold_out
from datasets.overlap import images_of, overlap
from datasets.records import Data, Gallery, Image, Split, TrainSample
from tests.helpers import read
from utils.errors import UserError

NAMES = ["AGDataAttr", "AGData", "AGSGData", "AGTBPR", "G2APS", "CUHK-PEDES", "ICFG-PEDES", "AERI-PEDES", "TAG-PEDES", "custom"]  # fmt: skip


def queries(data):
    return {(s.entry, s.caption) for s in data.train}


@pytest.mark.parametrize("name", NAMES)
def test_identities_move_from_training_to_heldout_and_the_rest_is_unchanged(
    name, mini_root, rendered
):
    root = mini_root if name.startswith(("AG", "G2")) else rendered(name)
    original, data = read(name, root), read(name, root, val_dataset="heldout", heldout=0.3)
    split, sources = data.splits["heldout"], data.splits["test"].sources
    people = {s.pid for s in data.train}
    assert people == set(range(data.num_identities))
    held_out = set(split.caption_pids)
    assert held_out == set(range(len(held_out))) == set(split.image_pids)
    assert len(people) + len(held_out) == original.num_identities
    assert len(held_out) == len(sources) * round(0.3 * original.num_identities / len(sources))
    # Every image and caption is in exactly one of the two splits, once.
    images = [image for _, image in images_of(data, "heldout")]
    assert len(images) == len(set(images)) and len(split.captions) == len(split.caption_sources)
    remaining = {image for _, image in images_of(data, "train")}
    assert remaining.isdisjoint(images)
    assert remaining | {*images} == {i for _, i in images_of(original, "train")}
    removed = queries(original) - queries(data)
    assert sorted(split.captions) == sorted(caption for _, caption in removed)
    assert not overlap(data, "heldout", "train") and not overlap(data, "heldout", "test")
    # Samples share an identity if, and only if, they did before.
    old = {s.entry: s.pid for s in original.train}
    pairs = {(old[s.entry], s.pid, s.source) for s in data.train}
    assert len({p[0] for p in pairs}) == len(pairs) == len({p[1] for p in pairs})
    assert {**data.splits, "heldout": None} == {**original.splits, "heldout": None}
    if original.ids:
        assert [original.ids["train"][old[s.entry]] for s in data.train] == [data.ids["train"][s.pid] for s in data.train]  # fmt: skip
        assert {*data.ids["train"], *data.ids["heldout"]} == {*original.ids["train"]}


def held_out_paths(data):
    return {image.path for _, image in images_of(data, "heldout")}


def test_all_data_sets_with_a_source_hold_out_the_same_and_another_seed_others(mini_root):
    def paths(name="AGDataAttr", **values):
        return held_out_paths(read(name, mini_root, val_dataset="heldout", **values))

    expected = paths()
    assert paths(seed=2) == paths("AGSGData") == expected == paths("AGTBPR") | paths("G2APS")
    assert len({frozenset(paths(heldout_seed=seed)) for seed in range(8)}) > 1
    assert paths(heldout=0.5) > expected  # a larger fraction contains the smaller


def data_of(people, test=(), source_of=lambda pid: 0):
    """A data set whose training identity i shows the person people[i], by AG-ReID's file names."""
    session = itertools.count()

    def image(person):
        return Image(f"/r/P{person:04d}T{next(session):05d}A0C0F1.jpg")

    train = [
        TrainSample(pid, f"caption {pid}", image(person), None, f"sample {pid}", source_of(pid))
        for pid, person in enumerate(people)
    ]
    gallery = Gallery()
    for pid, person in enumerate(test):
        gallery.add(image(person), pid, 0)
    split = Split(["s"], {"aerial": gallery}, [], [], [])
    return Data("synthetic", train, {"test": split}, views=("aerial",), root="/r")


def test_the_identities_of_one_person_are_held_out_together():
    people = [1, 1, 2, 2, 2, 3, 4, 4, 5, 1]
    for seed in range(20):
        data = hold_out(data_of(people), 0.3, seed)
        held_out = {p.split("/")[-1][:5] for p in held_out_paths(data)}
        remaining = {s.image.path.split("/")[-1][:5] for s in data.train}
        assert held_out and remaining and not held_out & remaining
        assert len(data.splits["heldout"].captions) >= 3


def test_people_who_are_in_test_are_held_out_last():
    people = list(range(20))
    for seed in range(10):
        paths = held_out_paths(hold_out(data_of(people, range(15)), 0.25, seed))
        assert {int(p.split("/")[-1][1:5]) for p in paths} == set(range(15, 20))
        paths = held_out_paths(hold_out(data_of(people, range(18)), 0.25, seed))
        assert len(paths) == 5 and sum(int(p.split("/")[-1][1:5]) >= 18 for p in paths) == 2


@pytest.mark.parametrize(
    ("people", "fraction"), [([1, 2], 0.01), ([1, 2], 0.99), ([1, 1, 1, 2], 0.99)]
)
def test_at_least_one_is_held_out_and_one_remains(people, fraction):
    data = hold_out(data_of(people), fraction, 0)
    assert data.train and data.splits["heldout"].captions


@pytest.mark.parametrize("people", [[1], [1, 1, 1]])
def test_a_source_of_one_person_is_refused_with_the_reason(people):
    message = rf"s has {len(people)} training identities of 1 people, but.*--val_dataset last"
    with pytest.raises(UserError, match=message):
        hold_out(data_of(people), 0.1, 0)
