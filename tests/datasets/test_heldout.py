"""Identities that leave training to choose on."""

import itertools

import pytest

from datasets.heldout import hold_out
from datasets.overlap import overlap, shown
from datasets.records import Data, Gallery, Image, Split, TrainSample
from tests.helpers import read
from utils.errors import UserError

NAMES = ["AGDataAttr", "AGData", "AGSGData", "AGTBPR", "G2APS", "CUHK-PEDES", "ICFG-PEDES", "custom"]  # fmt: skip


def queries(data):
    return {(s.entry, s.caption) for s in data.train}


@pytest.mark.parametrize("name", NAMES)
def test_what_leaves_training_is_heldout_and_the_rest_is_as_it_was(name, mini_root, rendered):
    root = mini_root if name.startswith(("AG", "G2")) else rendered(name)
    whole, data = read(name, root), read(name, root, val_dataset="heldout", heldout=0.3)
    split, sources = data.splits["heldout"], data.splits["test"].sources
    people = {s.pid for s in data.train}
    assert people == set(range(data.num_identities))
    out = set(split.caption_pids)
    assert out == set(range(len(out))) == set(split.image_pids)
    assert len(people) + len(out) == whole.num_identities
    assert len(out) == len(sources) * round(0.3 * whole.num_identities / len(sources))
    # Every image and caption is in one of both, once.
    images = [image for _, image in shown(data, "heldout")]
    assert len(images) == len(set(images)) and len(split.captions) == len(split.caption_sources)
    stay = {image for _, image in shown(data, "train")}
    assert stay.isdisjoint(images) and stay | {*images} == {i for _, i in shown(whole, "train")}
    gone = queries(whole) - queries(data)
    assert sorted(split.captions) == sorted(caption for _, caption in gone)
    assert not overlap(data, "heldout", "train") and not overlap(data, "heldout", "test")
    # The same people as one: what shared an identity still does.
    old = {s.entry: s.pid for s in whole.train}
    pairs = {(old[s.entry], s.pid, s.source) for s in data.train}
    assert len({p[0] for p in pairs}) == len(pairs) == len({p[1] for p in pairs})
    assert {**data.splits, "heldout": None} == {**whole.splits, "heldout": None}
    if whole.ids:
        assert [whole.ids["train"][old[s.entry]] for s in data.train] == [data.ids["train"][s.pid] for s in data.train]  # fmt: skip
        assert {*data.ids["train"], *data.ids["heldout"]} == {*whole.ids["train"]}


def held(data):
    return {image.path for _, image in shown(data, "heldout")}


def test_all_runs_of_a_source_share_the_draw_and_another_seed_has_another(mini_root):
    def drawn(name="AGDataAttr", **more):
        return held(read(name, mini_root, val_dataset="heldout", **more))

    whole = drawn()
    assert drawn(seed=2) == drawn("AGSGData") == whole == drawn("AGTBPR") | drawn("G2APS")
    assert len({frozenset(drawn(heldout_seed=seed)) for seed in range(8)}) > 1
    assert drawn(heldout=0.5) > whole  # a larger share adds to the smaller


def made(people, test=(), source_of=lambda pid: 0):
    """A data set whose training identity i shows the person people[i], by AG-ReID's names."""
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
    return Data("made", train, {"test": split}, views=("aerial",), root="/r")


def test_the_identities_of_one_person_leave_together():
    people = [1, 1, 2, 2, 2, 3, 4, 4, 5, 1]
    for seed in range(20):
        data = hold_out(made(people), 0.3, seed)
        out = {p.split("/")[-1][:5] for p in held(data)}
        stay = {s.image.path.split("/")[-1][:5] for s in data.train}
        assert out and stay and not out & stay
        assert len(data.splits["heldout"].captions) >= 3


def test_people_whom_test_shows_leave_last():
    people = list(range(20))
    for seed in range(10):
        out = {
            int(p.split("/")[-1][1:5]) for p in held(hold_out(made(people, range(15)), 0.25, seed))
        }
        assert out == set(range(15, 20))
        out = held(hold_out(made(people, range(18)), 0.25, seed))
        assert len(out) == 5 and sum(int(p.split("/")[-1][1:5]) >= 18 for p in out) == 2


@pytest.mark.parametrize(
    ("people", "share"), [([1, 2], 0.01), ([1, 2], 0.99), ([1, 1, 1, 2], 0.99)]
)
def test_one_leaves_and_one_stays(people, share):
    data = hold_out(made(people), share, 0)
    assert data.train and data.splits["heldout"].captions


@pytest.mark.parametrize("people", [[1], [1, 1, 1]])
def test_a_source_of_one_person_is_refused_with_the_reason(people):
    message = rf"s has {len(people)} training identities of 1 people; .*--val_dataset last"
    with pytest.raises(UserError, match=message):
        hold_out(made(people), 0.1, 0)
