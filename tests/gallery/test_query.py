"""Queries: how features are combined, near-duplicates, and how much the first hit stands out."""

from datetime import datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from gallery.index import Exact, unit
from gallery.query import (
    FEWEST,
    LOOKED,
    NEAR,
    SAMPLE,
    Hit,
    combine,
    find_hits,
    groups_of,
    sureness,
)
from gallery.rerank import RERANKED
from processor.inference import load_run
from tests.gallery.made import made_features, made_items
from tests.reliability.runs import train_small_run
from utils.errors import UserError


def vectors(*rows):
    return np.array(rows, np.float32)


def test_a_query_is_the_normalised_weighted_sum_of_unit_features():
    features = vectors([3, 0, 0], [0, 0.1, 0], [0, 0, 7])
    np.testing.assert_allclose(
        combine(features, [1, 0.5, -0.5]), np.array([1, 0.5, -0.5]) / np.sqrt(1.5), rtol=1e-6
    )
    np.testing.assert_allclose(combine(features[1:2], [0.2]), [0, 1, 0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], "cancel each other"),
        ([-1.0, -0.5], "a query wants something"),
        ([1.0, float("nan")], "they must be numbers"),
        ([], "they must be numbers"),
    ],
)
def test_a_query_without_a_direction_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        combine(vectors([1, 0], [1, 0])[: len(weights)], weights)


COUNT = 120


def hits(top, **options):
    items, features = made_items(COUNT), made_features(COUNT)
    query_D = unit(np.random.default_rng(2).standard_normal(16)).astype(np.float32)
    return find_hits(Exact(features).search, items, features, query_D, top, **options)


def test_raw_hits_are_the_ranking_with_the_items_columns():
    found = hits(15)
    assert [hit.rank for hit in found] == [*range(1, 16)] and {hit.count for hit in found} == {1}
    scores = [hit.score for hit in found]
    assert scores == sorted(scores, reverse=True)
    rows = made_items(COUNT).to_pylist()
    assert all(hit.item == rows[hit.row] and hit.id == hit.item["id"] for hit in found)
    assert len(hits(COUNT + 5)) == COUNT


def test_reranking_changes_the_order_of_the_first_hits_alone(monkeypatch):
    monkeypatch.setattr("gallery.query.RERANKED", 10)
    shapes = []

    def reverse(query_D, features_KD):
        shapes.append(features_KD.shape)
        return np.arange(len(features_KD))[::-1]

    raw, again = hits(15), hits(15, rerank=reverse)
    assert [h.row for h in again] == [h.row for h in raw[:10][::-1] + raw[10:]]
    assert [h.score for h in again[:10]] == [h.score for h in raw[:10][::-1]]
    assert shapes == [(10, 16)] and RERANKED == 200


def picture(path="v.mp4", frame_time=None, **others):
    columns = {
        "id": 1, "path": path, "frame_time": frame_time, "view": None, "camera": None, "source": "s",
        "taken": None, "mtime_ns": 0, "digest": path, "identity": None,
    }  # fmt: skip
    return columns | others


SAME = vectors([1, 0], [1, 0])


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        (picture(frame_time=1.0), picture(frame_time=2.5), True),
        (picture(frame_time=1.0), picture(frame_time=3.5), False),
        (picture(frame_time=1.0), picture(frame_time=1.0), False),  # two people of one frame
        (picture(frame_time=1.0), picture("w.mp4", frame_time=2.0), False),
        (picture(frame_time=1.0), picture(frame_time=2.0, camera="2"), False),
        (picture(frame_time=1.0, view="aerial"), picture(frame_time=2.0, view="ground"), False),
        (picture("a/1.jpg", view="aerial"), picture("a/2.jpg", view="ground"), False),
        (picture(frame_time=1.0, identity="7"), picture(frame_time=2.0, identity="8"), False),
        (picture(frame_time=1.0, identity="7"), picture(frame_time=2.0), True),
        (picture("a/1.jpg"), picture("a/2.jpg"), False),  # files written in one moment tell nothing
        (picture("a/1.jpg", digest="same"), picture("b/2.jpg", digest="same"), True),
        (picture("a/1.jpg"), picture("a/1.jpg"), False),
        (picture("a/1.jpg", digest="s"), picture("b/2.jpg", digest="s", source="t"), False),
        (picture("a/1.jpg", taken=datetime(2025, 1, 1)),
         picture("a/2.jpg", taken=datetime(2025, 1, 1, 0, 0, 1), mtime_ns=9 * 10**9), True),
        (picture("a/1.jpg", taken=datetime(2025, 1, 1)), picture("a/2.jpg"), False),
    ],
)  # fmt: skip
def test_near_duplicates_are_of_one_scene_and_time_but_not_of_one_picture(first, second, one):
    assert groups_of([first, second], SAME, 0.95) == ([[0, 1]] if one else [[0], [1]])


def test_near_duplicates_look_alike():
    angle = 0.3
    pair = vectors([1, 0], [np.cos(angle), np.sin(angle)])
    items = [picture(frame_time=1.0), picture(frame_time=2.0)]
    assert groups_of(items, pair, np.cos(angle) - 1e-4) == [[0, 1]]
    assert groups_of(items, pair, np.cos(angle) + 1e-4) == [[0], [1]]


def test_a_person_who_stays_in_the_scene_is_one_hit_however_long():
    items = [picture(frame_time=float(t)) for t in (5, 4, 6, 3, 7, 20, 8)]
    assert groups_of(items, np.repeat(SAME[:1], 7, 0), 0.9) == [[0, 1, 2, 3, 4, 6], [5]]


def test_collapsed_hits_stand_for_the_others_and_the_list_is_still_full():
    """Of 40 pictures, ten in a row are of one person each; the five first hits are five persons."""
    features = np.repeat(made_features(16, 16)[::4], 10, axis=0)
    rows = [picture(frame_time=float(n), id=n) for n in range(40)]
    items, query_D = pa.Table.from_pylist(rows), features[0].astype(np.float32)
    search = Exact(features).search
    found = find_hits(search, items, features, query_D, 3, 0.99)
    assert [hit.count for hit in found] == [10, 10, 10]
    assert found[0].row == 0 and len({hit.row // 10 for hit in found}) == 3
    assert [h.count for h in find_hits(search, items, features, query_D, 3, None)] == [1, 1, 1]


@pytest.mark.parametrize("next_hits", [4, 16, 256])
def test_what_a_hit_stands_for_does_not_depend_on_how_many_hits_are_asked_for(
    monkeypatch, next_hits
):
    monkeypatch.setattr("gallery.query.NEXT", next_hits)
    features = made_features(COUNT)
    rows = [picture(frame_time=n / 10, id=n) for n in range(COUNT)]
    items = pa.Table.from_pylist(rows)
    query_D = unit(np.random.default_rng(3).standard_normal(16)).astype(np.float32)
    found = [
        find_hits(Exact(features).search, items, features, query_D, top, 0.6)
        for top in (1, 2, 5, 20, COUNT)
    ]
    counts = [hit.count for hit in found[-1]]
    assert max(counts) > 1
    for some in found:
        assert [hit.count for hit in some] == counts[: len(some)]


def test_a_filter_that_keeps_fewer_items_than_asked_gives_these():
    items, features = made_items(COUNT), made_features(COUNT)
    mask = np.arange(COUNT) % 40 == 7
    search = Exact(features).search
    found = find_hits(lambda q, k: search(q, k, mask), items, features, features[7].astype(np.float32), 10, 0.95)  # fmt: skip
    assert sorted(hit.row for hit in found) == [7, 47, 87]


def hits_of(*scores_and_identities):
    return [
        Hit(n, n, n, score, {"identity": identity}, 1)
        for n, (score, identity) in enumerate(scores_and_identities)
    ]


def with_median(median, count=9):
    """Items, and a query with which half of them have lower scores than `median`."""
    return np.array([[median - 0.3], [median], [1.0]], np.float32).repeat(count, axis=0), vectors(1)


FAR = [Hit(-n, -n, n, 0.0, {"identity": f"far {n}"}, 1) for n in range(1, FEWEST)]


@pytest.mark.parametrize(
    ("hits", "text"),
    [
        (hits_of((0.9, "a"), (0.7, "b")), "stands out: no other comes near it"),
        (hits_of((0.9, "a"), (0.89, "a"), (0.7, "b")), "stands out: no other comes near it"),
        (hits_of((0.9, "a"), (0.89, "a"), (0.81, "b"), (0.79, "c")), "is one of 2 people who fit about as well"),
        (hits_of((0.9, None), (0.89, None), (0.81, None), (0.79, None)), "is one of 3 hits that fit about as well"),
        (hits_of((0.9, "a"), (0.89, "a"), (0.81, None), (0.79, "c")), "is one of 3 hits that fit about as well"),
        (hits_of(*[(0.9, f"{n}") for n in range(LOOKED)]), f"is one of at least {LOOKED} people who fit about as well"),
        (hits_of(*[(0.9, f"{n}") for n in range(LOOKED - 1)]), f"is one of {LOOKED - 1} people who fit about as well"),
        (hits_of((0.3, "a"), (0.9, "b"), (0.2, "c")), "is one of 2 people who fit about as well"),  # re-ranked
    ],
)  # fmt: skip
def test_what_is_a_fifth_of_the_way_to_the_median_below_the_first_fits_about_as_well(hits, text):
    features, query_D = with_median(0.4)
    hits = [*hits, *FAR[: LOOKED - len(hits)]]
    assert str(sureness(features, query_D, hits)) == f"the first hit {text}"


@pytest.mark.parametrize(
    ("hits", "few"),
    [
        (hits_of((0.9, "a")), True),
        (hits_of(*[(0.9, "a")] * 40), True),  # one person
        (hits_of(*[(0.9 - 0.01 * n, None) for n in range(FEWEST - 1)]), True),
        (hits_of(*[(0.9 - 0.01 * n, None) for n in range(FEWEST)]), False),
        (hits_of(*[(0.9 - 0.01 * n, f"{n}") for n in range(FEWEST)]), False),
        (hits_of(*[(0.9, "a")] * LOOKED), False),  # others were not looked at
    ],
)
def test_of_few_people_nothing_is_said_of_how_sure_the_first_hit_is(hits, few):
    text = str(sureness(*with_median(0.4), hits))
    assert (text == "too few people were searched to say how sure the first hit is") == few


def test_the_median_is_that_of_what_was_searched():
    features, query_D = with_median(0.4)
    hits = hits_of((0.9, "a"), (0.85, "b"))
    assert sureness(features, query_D, hits).near == 2
    assert sureness(features, query_D, hits, features[:, 0] == 1).near == 1
    assert sureness(features, query_D, hits[:1], np.arange(len(features)) == 0).near == 1


def test_of_a_large_gallery_a_sample_is_enough():
    features, query_D = made_features(3 * SAMPLE, 16), unit(np.ones(16)).astype(np.float32)
    median = np.median(features.astype(np.float32) @ query_D)
    least = 0.9 - NEAR * (0.9 - median)
    hits = hits_of((0.9, "a"), (least + 0.01, "b"), (least - 0.01, "c"))
    assert sureness(features, query_D, hits).near == 2


@pytest.fixture(scope="module")
def trained(mini_root, tmp_path_factory):
    return load_run(train_small_run(mini_root, tmp_path_factory.mktemp("logs")), device="cpu")


@pytest.mark.parametrize("name", ["aerial", "ground", "aerial + ground"])
def test_the_raw_ranking_has_the_metrics_of_the_evaluation(trained, name):
    evaluator = trained.evaluator("test")
    expected = evaluator.galleries(evaluator.encode(trained.model))[name].summary().metrics
    split = evaluator.split
    images = [image for view in name.split(" + ") for image in split.galleries[view].images]
    pids = [pid for view in name.split(" + ") for pid in split.galleries[view].pids]
    features = trained.encode_image([image.path for image in images]).half().numpy()
    items = made_items(len(images)).set_column(
        made_items(0).schema.get_field_index("identity"), "identity", [list(map(str, pids))]
    )
    find = partial(find_hits, Exact(features).search, items, features)
    firsts = []
    for caption, pid in zip(split.captions, split.caption_pids, strict=True):
        query_D = combine(trained.encode_text(caption).numpy(), [1.0])
        found = find(query_D, len(images))
        assert len(found) == len(images)
        firsts.append(next(hit.rank for hit in found if hit.item["identity"] == str(pid)))
    for k in (1, 5, 10):
        assert 100 * np.mean(np.array(firsts) <= k) == expected[f"R@{k}"]
