"""Queries: how features are combined, near-duplicates, and how much the first hit stands out."""

from datetime import datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from gallery.index import Exact, unit
from gallery.query import SAMPLE, Hit, combine, find_hits, groups_of, sureness
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
        "id": 1, "path": path, "frame_time": frame_time, "camera": None, "source": "s", "taken": None,
        "mtime_ns": 0, "identity": None,
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
        (picture(frame_time=1.0, identity="7"), picture(frame_time=2.0, identity="8"), False),
        (picture(frame_time=1.0, identity="7"), picture(frame_time=2.0), True),
        (picture("a/1.jpg"), picture("a/2.jpg", mtime_ns=2 * 10**9), True),
        (picture("a/1.jpg"), picture("a/2.jpg", mtime_ns=3 * 10**9), False),
        (picture("a/1.jpg"), picture("b/2.jpg"), False),
        (picture("a/1.jpg"), picture("a/1.jpg"), False),
        (picture("a/1.jpg"), picture("a/2.jpg", source="t"), False),
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


def test_a_filter_that_keeps_fewer_items_than_asked_gives_these():
    items, features = made_items(COUNT), made_features(COUNT)
    mask = np.arange(COUNT) % 40 == 7
    search = Exact(features).search
    found = find_hits(lambda q, k: search(q, k, mask), items, features, features[7].astype(np.float32), 10, 0.95)  # fmt: skip
    assert sorted(hit.row for hit in found) == [7, 47, 87]


def first_hit(features, query_D):
    scores = features.astype(np.float32) @ query_D
    return Hit(1, 0, int(scores.argmax()), float(scores.max()), {}, 1)


def test_a_person_who_is_there_stands_out_and_a_random_query_does_not():
    features = made_features(4000, 64)
    wanted = features[8].astype(np.float32)
    sure = sureness(features, wanted, first_hit(features, wanted))
    scores = features.astype(np.float32) @ wanted
    np.testing.assert_allclose(sure.z, (scores.max() - scores.mean()) / scores.std(), rtol=1e-5)
    assert sure.z > 6 and "the first hit stands out: " in str(sure)
    nobody = unit(np.random.default_rng(1).standard_normal(64)).astype(np.float32)
    unsure = sureness(features, nobody, first_hit(features, nobody))
    assert 3.3 < unsure.chance < 3.6  # of the best of 4000 normal numbers
    assert abs(unsure.z - unsure.chance) < 1 and "does not stand out" in str(unsure)


def test_what_chance_gives_is_that_of_the_searched_items():
    features = made_features(4000, 64)
    query_D = features[8].astype(np.float32)
    mask = np.arange(4000) < 100
    few = sureness(features, query_D, first_hit(features, query_D), mask)
    assert 2.2 < few.chance < 2.5
    alone = sureness(features, query_D, first_hit(features, query_D), np.arange(4000) == 8)
    assert alone.z == alone.chance == 0


def test_of_a_large_gallery_a_sample_is_enough():
    features = made_features(3 * SAMPLE, 16)
    query_D = features[8].astype(np.float32)
    scores = features.astype(np.float32) @ query_D
    sure = sureness(features, query_D, first_hit(features, query_D))
    assert abs(sure.z - (scores.max() - scores.mean()) / scores.std()) < 0.1


def test_generic_sentences_tell_whether_the_first_hit_fits_them_too():
    features = made_features(100, 16)
    query_D = features[0].astype(np.float32)
    generic_GD = np.stack([query_D, -query_D, -query_D, -query_D])  # the first fits it better
    sure = sureness(features, 0.9 * query_D, first_hit(features, 0.9 * query_D), None, generic_GD)
    assert sure.above == 0.75 and str(sure).endswith("better than 75% of generic sentences")


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
