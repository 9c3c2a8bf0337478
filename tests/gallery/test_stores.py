"""A gallery's own features, and Milvus, give the same answers."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from gallery import where
from gallery.index import Exact, unit
from gallery.milvus import Milvus
from tests.gallery.made import NASTY, made_features, made_items
from utils.errors import UserError

COUNT = 120


class Local:
    """Items and features in memory, as a gallery has them, with the interface of `Milvus`."""

    def __init__(self) -> None:
        self.items, self.features = made_items(0), made_features(0)

    def put(self, items: pa.Table, features: np.ndarray) -> None:
        self.drop(items["id"].to_pylist())
        self.items = pa.concat_tables([self.items, items]).combine_chunks()
        self.features = np.concatenate([self.features, features])

    def drop(self, ids) -> None:
        keep = pc.invert(pc.is_in(self.items["id"], value_set=pa.array(ids, pa.int64())))
        self.items = self.items.filter(keep)
        self.features = self.features[keep.to_numpy()]

    def search(self, queries_QD, k, part=None):
        mask = None if part is None else where.to_mask(part, self.items)
        scores, rows = Exact(self.features).search(queries_QD, k, mask)
        ids = self.items["id"].to_numpy()
        return scores, np.where(rows < 0, -1, ids[rows])

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", params=["local", "milvus"])
def filled(request, tmp_path_factory):
    """A store with COUNT items, which tests do not change."""
    store = make(request.param, tmp_path_factory.mktemp("store"))
    store.put(made_items(COUNT), made_features(COUNT))
    yield store
    store.close()


@pytest.fixture(params=["local", "milvus"])
def store(request, tmp_path):
    store = make(request.param, tmp_path)
    yield store
    store.close()


def make(kind, folder):
    if kind == "local":
        return Local()
    store = Milvus(str(folder / "milvus.db"))
    store.create(made_items(0).schema, 16)
    return store


def queries(count=3):
    return unit(np.random.default_rng(5).standard_normal((count, 16))).astype(np.float32)


def expected(mask, k):
    """Scores and ids by sorting all products."""
    scores_QN = queries() @ made_features(COUNT).astype(np.float32).T
    ids = made_items(COUNT)["id"].to_numpy()
    order = np.argsort(-np.where(mask, scores_QN, -np.inf), axis=1, kind="stable")[:, :k]
    kept = np.arange(k) < mask.sum()
    return (
        np.where(kept, np.take_along_axis(scores_QN, order, 1), -np.inf),
        np.where(kept, ids[order], -1),
    )


@pytest.mark.parametrize("k", [1, 10, COUNT + 5])
def test_the_hits_are_those_of_sorting_all_products(filled, k):
    scores, ids = filled.search(queries(), k)
    true_scores, true_ids = expected(np.ones(COUNT, bool), min(k, COUNT))
    np.testing.assert_array_equal(ids[:, :COUNT], true_ids)
    np.testing.assert_allclose(scores[:, :COUNT], true_scores, atol=1e-6)
    assert (ids[:, COUNT:] == -1).all() and np.isneginf(scores[:, COUNT:]).all()


FILTERS = [
    "view = 'aerial'", "view != 'aerial'", "not view = 'aerial'", "not (view != 'aerial')",
    "view is null", "view is not null", "not (view is null or left is null)",
    "view in ('aerial', 'x')", "view not in ('aerial', 'x')", "not view not in ('aerial')",
    "left in (5, -1)", "left not in (5, -1)", "left >= -5", "left > 5", "not left > 5",
    "frame_time >= 12.5", "not frame_time >= 12.5", "frame_time < 1e-2", "frame_time != 0.5",
    "gender_score = 0.9", "gender_score >= 0.9", "not gender_score in (0.1, 0.9)",
    "taken = '2023-11-14 22:13:20'", "taken > '2023-11-14 22:13:20'", "not taken > '2024-01-01'",
    "\"hair colour\" = 'red' and \"hair colour_score\" < 0.5",
    "path like 'a/%'", "path like '%1_.jpg'", "path not like 'a%'", "camera like '%\"%'",
    "camera like '__''%'", "camera like '%人'", "camera like '%\n%'", "path like ''",
    "view < 'b'", "camera > 'a'", "id > 0", "id = 9223372036854775807",
    "view = 'aerial' and (left > 3 or not gender = 'male') and not (source = 'G2APS' or top is null)",
    "not (view = 'aerial' and (left > 3 or gender = 'male'))",
    *(f"camera = '{text.replace(chr(39), 2 * chr(39))}'" for text in NASTY),
    *(f"not camera in ('{text.replace(chr(39), 2 * chr(39))}', 'x')" for text in NASTY),
]  # fmt: skip


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_keeps_the_same_items(filled, text):
    items = made_items(COUNT)
    part = where.parse(text, items.schema)
    mask = where.to_mask(part, items)
    _, ids = filled.search(queries(), COUNT, part)
    np.testing.assert_array_equal(ids, expected(mask, COUNT)[1])


def test_the_filters_above_keep_some_items_and_not_all():
    items = made_items(COUNT)
    kept = [where.to_mask(where.parse(text, items.schema), items).sum() for text in FILTERS]
    few = [text for text, count in zip(FILTERS, kept, strict=True) if not 0 < count < COUNT]
    assert few == ["path like ''", "id > 0", "id = 9223372036854775807"]


def test_putting_an_id_again_replaces_it_and_dropping_forgets_it(store):
    items, features = made_items(8), made_features(8)
    store.put(items, features)
    changed = items.slice(2, 1).set_column(
        items.schema.get_field_index("view"), "view", [["elsewhere"]]
    )
    turned = np.roll(features[2:3], 1, axis=1)
    store.put(changed, turned)
    ids = items["id"].to_pylist()
    part = where.parse("view = 'elsewhere'", items.schema)
    scores, found = store.search(turned.astype(np.float32), 3, part)
    assert found[0].tolist() == [ids[2], -1, -1] and abs(scores[0, 0] - 1) < 2e-3
    store.drop([ids[2], ids[5], 77])
    _, found = store.search(turned.astype(np.float32), 8)
    assert sorted(found[0]) == sorted([-1, -1, *(i for n, i in enumerate(ids) if n not in (2, 5))])


def test_milvus_keeps_a_gallery_when_it_is_opened_again(tmp_path):
    first = make("milvus", tmp_path)
    first.put(made_items(COUNT), made_features(COUNT))
    before = first.search(queries(), 5)
    first.close()
    again = Milvus(str(tmp_path / "milvus.db"))
    for old, new in zip(before, again.search(queries(), 5), strict=True):
        np.testing.assert_array_equal(old, new)
    again.close()


def test_what_milvus_cannot_do_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"gone/milvus.db: Milvus: Open local milvus failed"):
        Milvus(str(tmp_path / "gone/milvus.db"))
    store = Milvus(str(tmp_path / "milvus.db"))
    with pytest.raises(UserError, match="Milvus: collection 'gallery' does not exist"):
        store.search(queries(), 5)
    store.create(made_items(0).schema, 16)
    store.put(made_items(4), made_features(4))
    with pytest.raises(UserError, match="20000 hits: Milvus finds at most 16384 at once"):
        store.search(queries(), 20_000)
    with pytest.raises(UserError, match="dim"):
        store.search(np.ones((1, 7), np.float32), 2)
    store.close()
