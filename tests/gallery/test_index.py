"""Nearest features: exact ones are those of sorting all products; an index misses few."""

import json

import numpy as np
import pyarrow as pa
import pytest

from gallery import index as index_module
from gallery.index import (
    MANIFEST,
    Approximate,
    Exact,
    best,
    build,
    keys_of,
    open_index,
    recall_of,
    unit,
)
from tests.gallery.made import made_features
from utils.errors import UserError

COUNT, WIDTH = 3000, 32


@pytest.fixture(scope="module")
def features():
    return made_features(COUNT, WIDTH)


@pytest.fixture(scope="module")
def items():
    return items_of(range(COUNT))


def items_of(ids):
    digests = [f"{(n * 2654435761) % 2**64:016x}" for n in ids]
    return pa.table({"id": pa.array(list(ids), pa.int64()), "digest": digests})


def queries(count=5):
    return unit(np.random.default_rng(7).standard_normal((count, WIDTH))).astype(np.float32)


def sorted_products(features, k, mask=None):
    """Scores and rows of the k best, by sorting every product."""
    scores = queries() @ features.astype(np.float32).T
    if mask is not None:
        scores[:, ~mask] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, rows, 1)
    return scores, np.where(np.isneginf(scores), -1, rows)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(index_module, "BLOCK", 700)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("share", [None, 1.0, 0.6, 0.1, 0.002, 0.0])
@pytest.mark.parametrize("k", [1, 50])
def test_exact_hits_are_those_of_sorting_all_products(features, small_blocks, keep, share, k):
    mask = None if share is None else np.random.default_rng(0).random(COUNT) < share
    if mask is not None:
        mask[700:1400] = False  # a block without any
    scores, rows = Exact(features, keep).search(queries(), k, mask)
    true_scores, true_rows = sorted_products(features, k, mask)
    np.testing.assert_array_equal(rows, true_rows)
    np.testing.assert_allclose(scores, true_scores, atol=1e-6)
    assert scores.shape == rows.shape == (5, k) and scores.dtype == np.float32


def test_exact_features_may_be_mapped_from_a_file(features, small_blocks, tmp_path):
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    for ours, theirs in zip(
        Exact(mapped).search(queries(), 9), Exact(features).search(queries(), 9), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_of_equal_scores_the_lower_row_is_first(small_blocks):
    features = np.repeat(made_features(4, WIDTH), 500, axis=0)
    _, rows = Exact(features).search(features[[0, 1500]].astype(np.float32), 500)
    assert rows.tolist() == [list(range(500)), list(range(1500, 2000))]
    scores = np.array([[0.5, 0.7, 0.5, 0.7, 0.1]])
    assert best(scores, np.array([[9, 8, 3, 2, 1]]), 3)[1].tolist() == [[2, 8, 3]]


def test_a_gallery_of_nobody_has_no_hits():
    scores, rows = Exact(np.zeros((0, WIDTH), np.float16)).search(queries(2), 3)
    assert rows.tolist() == [[-1] * 3] * 2 and np.isneginf(scores).all()


def test_queries_that_are_not_numbers_are_refused(features):
    with pytest.raises(UserError, match="the query's features are not finite"):
        Exact(features).search(np.full((1, WIDTH), np.nan), 3)
    with pytest.raises(ValueError, match="expected"):
        Exact(features).search(np.ones((1, WIDTH + 1)), 3)
    with pytest.raises(ValueError, match="expected float16"):
        Exact(features.astype(np.float32))


@pytest.fixture(scope="module")
def folder(items, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build(items, features, folder, memory=2**20)
    return folder


@pytest.fixture
def no_exact(monkeypatch):
    """Filters that keep few items go through the index too."""
    monkeypatch.setattr(index_module, "LEAST", 0)


def test_an_index_has_the_recall_that_its_manifest_says(items, features, folder, no_exact):
    index = open_index(items, features, folder)
    assert isinstance(index, Approximate)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["recall@50"] >= 0.95 and manifest["rows"] == COUNT
    scores, rows = index.search(queries(), 50)
    true_scores, true_rows = sorted_products(features, 50)
    assert recall_of(rows, true_rows) > 0.8
    found = rows == true_rows
    np.testing.assert_allclose(scores[found], true_scores[found], atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_recall_counts_the_true_hits_in_any_order():
    assert recall_of(
        np.array([[3, 2, 9], [1, 2, 3]]), np.array([[2, 3, 4], [1, 2, 3]])
    ) == pytest.approx(5 / 6)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.01])
def test_an_index_keeps_to_a_filter(items, features, folder, no_exact, share):
    mask = np.random.default_rng(1).random(COUNT) < share
    _, rows = open_index(items, features, folder).search(queries(), 20, mask)
    assert mask[rows[rows >= 0]].all()
    assert recall_of(rows, sorted_products(features, 20, mask)[1]) > 0.8


def test_a_filter_that_keeps_few_items_is_exact(items, features, folder):
    mask = np.random.default_rng(1).random(COUNT) < 0.1
    _, rows = open_index(items, features, folder).search(queries(), 20, mask)
    np.testing.assert_array_equal(rows, sorted_products(features, 20, mask)[1])


@pytest.mark.parametrize("filtered", [False, True])
def test_an_index_follows_items_that_come_go_and_change(features, folder, no_exact, filtered):
    """Without being built again: new and changed items are compared, gone ones are not found."""
    query_D = queries(1)[0]
    ids = [*range(100, COUNT), *range(9000, 9010)]
    new = np.concatenate([features[100:], made_features(10, WIDTH, seed=3)])
    new[[5, 2905]] = query_D.astype(np.float16)  # 105 has changed, 9005 is new
    items = items_of(ids)
    digests = items["digest"].to_pylist()
    digests[5] = "f" * 16
    items = items.set_column(1, "digest", [digests])
    mask = np.arange(len(ids)) % 5 == 0 if filtered else None
    index = open_index(items, new, folder)
    scores, rows = index.search(query_D[None], 30, mask)
    assert rows[0, :2].tolist() == [5, 2905] and scores[0, 1] > 0.999
    exact_scores, exact_rows = Exact(new).search(query_D[None], 30, mask)
    assert recall_of(rows, exact_rows) > 0.8
    assert len(set(rows[0])) == 30


@pytest.mark.parametrize(
    ("memory", "code"),
    [(2**20, "PQ16x4fs"), (50 * 1024, "PQ8x4fs"), (40 * 1024, "PQ4x4fs")],
)
def test_vectors_get_as_many_bytes_as_the_memory_allows(items, features, tmp_path, memory, code):
    manifest = build(items, features, tmp_path, memory)
    assert manifest["factory"].endswith(f",{code}")
    _, rows = open_index(items, features, tmp_path).search(queries(), 20)
    assert (rows >= 0).all()


def test_too_little_memory_and_too_few_people_are_refused(items, features, tmp_path):
    with pytest.raises(
        UserError, match="--memory: an index of 3,000 people takes at least 1MiB; 0MiB are"
    ):
        build(items, features, tmp_path, 1000)
    with pytest.raises(UserError, match="10 people need no index; from 1,000 on"):
        build(items_of(range(10)), features[:10], tmp_path, 2**20)
    assert list(tmp_path.iterdir()) == []


def test_building_again_replaces_the_index(items, features, tmp_path):
    first = build(items, features, tmp_path, 2**20)
    second = build(items, features, tmp_path, 2**20, seed=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert first["build"] != second["build"]
    assert names == sorted([f"{second['build']}.faiss", f"{second['build']}.npy", MANIFEST])


def test_a_folder_without_an_index_is_searched_exactly(items, features, tmp_path):
    assert isinstance(open_index(items, features, tmp_path / "none"), Exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: (f / f"{m['build']}.faiss").unlink(), "it cannot be read"),
        (lambda f, m: (f / f"{m['build']}.faiss").write_bytes(b"none"), "it cannot be read"),
        (lambda f, m: (f / f"{m['build']}.npy").unlink(), "it cannot be read: .*No such file"),
        (lambda f, m: np.save(f / f"{m['build']}.npy", np.arange(5)), "3000 vectors, but 5 keys"),
        (lambda f, m: (f / MANIFEST).write_text(json.dumps({**m, "nprobe": "9"})), "not the manifest"),
        (lambda f, m: (f / MANIFEST).write_text("{"), "not the manifest of an index"),
        (lambda f, m: (f / MANIFEST).write_text("[]"), "not the manifest of an index"),
        (lambda f, m: (f / MANIFEST).write_text(json.dumps({**m, "build": "../x"})), "not the manifest"),
        (lambda f, m: (f / MANIFEST).write_text(json.dumps({**m, "width": 7})), "another encoder"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_one_line(items, features, tmp_path, change, message):
    change(tmp_path, build(items, features, tmp_path, 2**20))
    with pytest.raises(UserError, match=f"{message}.*; delete it, or build the index again"):
        open_index(items, features, tmp_path)


def test_keys_tell_apart_ids_and_contents():
    items = pa.table({"id": [1, 2, 2], "digest": ["0" * 16, "f" * 16, None]})
    keys = keys_of(items)
    assert len(set(keys.tolist())) == 3 and keys[0] == 1 and keys[2] == 2
