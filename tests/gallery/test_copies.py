"""A copy in Milvus becomes equal to its gallery, whatever was killed before, and nobody stays there."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pymilvus import MilvusClient

from gallery import milvus as milvus_module
from gallery import where
from gallery.copies import STORES, Copy, CopyIndex, delete_copy, stores
from gallery.index import Exact
from gallery.manifest import new_manifest
from gallery.milvus import Milvus, field_of, split_store, store_option
from gallery.parts import FILES, write_part
from gallery.records import schema_with
from gallery.store import Gallery, Store, writing
from tests.gallery.made import ATTRIBUTES, made_features, made_items
from utils.errors import UserError

WIDTH, COUNT, ROWS, BATCH = 16, 40, 10, 4
CLASSES = {"gender": ("female", "male"), "hair colour": ("black", "red")}


def encoder(digit="0", width=WIDTH):
    return {"sha256": digit * 64, "embed_dim": width}


def parts_of(folder, items, features, rows=ROWS):
    files = pa.Table.from_pylist([], schema=FILES)
    return [
        write_part(folder, items.slice(start, rows), features[start : start + rows], files)
        for start in range(0, len(items), rows)
    ]


@pytest.fixture
def store(tmp_path):
    """A gallery of four parts, locked."""
    with writing(tmp_path / "gallery") as folder:
        made = Store(folder, new_manifest(encoder(), CLASSES, "/pictures"))
        made.commit(parts_of(folder, made_items(COUNT), made_features(COUNT)))
        yield made


@pytest.fixture
def address(tmp_path):
    return store_option(f"milvus:{tmp_path / 'milvus.db'}#campus")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(milvus_module, "BATCH", BATCH)


@pytest.fixture
def sent(monkeypatch):
    """The numbers of items that were sent, by request."""
    requests, upsert = [], MilvusClient.upsert

    def counted(client, collection, data, *rest, **options):
        requests.append(len(data))
        return upsert(client, collection, data, *rest, **options)

    monkeypatch.setattr(MilvusClient, "upsert", counted)
    return requests


class Killed(BaseException):
    pass


def killed_after(monkeypatch, name, calls):
    """A method of MilvusClient that works some times, and then is the last thing of its process."""
    method, left = getattr(MilvusClient, name), [calls]

    def counted(*words, **options):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return method(*words, **options)

    monkeypatch.setattr(MilvusClient, name, counted)


def rows_there(address):
    """By id, all fields of the items in Milvus."""
    uri, name = split_store(address)
    rows = Milvus(uri, name).client.query(name, "c_id >= 0", output_fields=["*"])
    return {row["c_id"]: row for row in rows}


def assert_equal(store, address):
    """The copy has the gallery's items with all columns and features, and no others."""
    gallery, there = Gallery.open(store.folder), rows_there(address)
    assert sorted(there) == sorted(gallery.items["id"].to_pylist())
    for item, feature in zip(gallery.items.to_pylist(), gallery.features, strict=True):
        row = there[item["id"]]
        np.testing.assert_array_equal(row["feature"], feature.astype(np.float32))
        for name in set(item) - {"taken"}:
            assert row[field_of(name)] == item[name]
        assert (row["c_taken"] is None) == (item["taken"] is None)
    assert not Copy(store.folder, address).is_behind(store.parts)


def update(store, address):
    return Copy(store.folder, address, new=True).update(store)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 8, 11])
def test_a_put_that_was_killed_is_completed_by_the_next(store, address, monkeypatch, calls):
    with monkeypatch.context() as patch:
        killed_after(patch, "upsert", calls)
        with pytest.raises(Killed):
            update(store, address)
    assert stores(store.folder) == [address]  # known before anybody is there
    assert update(store, address) == COUNT - calls // 3 * ROWS  # three requests for a part
    assert_equal(store, address)


def test_an_equal_copy_is_sent_nothing_and_a_changed_one_the_changed_parts(store, address, sent):
    assert update(store, address) == COUNT and sum(sent) == COUNT
    sent.clear()
    assert update(store, address) == 0 and not sent
    items = store.read(store.parts[1], "items")
    views = pa.array(["elsewhere"] * ROWS)
    changed = items.set_column(items.schema.get_field_index("view"), "view", views)
    new = store.rewritten(store.parts[1], np.ones(ROWS, bool), changed)  # the features stay
    store.commit([store.parts[0], new, *store.parts[2:]])
    assert Copy(store.folder, address).is_behind(store.parts)
    assert update(store, address) == ROWS == sum(sent)
    assert_equal(store, address)


def test_who_is_gone_leaves_before_others_are_put(store, address, monkeypatch):
    update(store, address)
    keep = np.arange(ROWS) > 2
    gone = store.read(store.parts[0], "items")["id"].to_pylist()[:3]
    store.commit([store.rewritten(store.parts[0], keep), *store.parts[2:]])
    with monkeypatch.context() as patch:
        killed_after(patch, "upsert", 0)
        with pytest.raises(Killed):
            update(store, address)
    there = rows_there(address)
    assert not set(gone) & set(there) and len(there) == COUNT - ROWS - 3
    update(store, address)
    assert_equal(store, address)


def test_joined_parts_and_an_emptied_gallery(store, address):
    update(store, address)
    store.commit(store.compacted())
    assert len(store.parts) == 1 and update(store, address) == COUNT
    assert_equal(store, address)
    store.commit([])
    assert update(store, address) == 0
    assert_equal(store, address)


@pytest.mark.parametrize("killed_in", [None, "create_collection", "upsert"])
@pytest.mark.parametrize("change", ["encoder", "attributes"])
def test_another_encoder_or_a_new_attribute_makes_the_copy_anew(
    store, address, monkeypatch, change, killed_in
):
    update(store, address)
    if change == "encoder":
        parts = parts_of(store.folder, made_items(COUNT), made_features(COUNT, 2 * WIDTH))
        store.commit(parts, encoder=encoder("1", 2 * WIDTH))
    else:
        store.commit(store.parts, attributes={**store.manifest["attributes"], "hat": ["yes", "no"]})
    if killed_in:
        with monkeypatch.context() as patch:
            killed_after(patch, killed_in, 0)
            with pytest.raises(Killed):
                update(store, address)
    assert update(store, address) == COUNT
    assert_equal(store, address)


def test_what_was_lost_in_milvus_is_put_again(store, address):
    update(store, address)
    uri, name = split_store(address)
    Milvus(uri, name).drop(store.read(store.parts[2], "items")["id"].to_pylist()[:1])
    assert update(store, address) == ROWS
    assert_equal(store, address)
    Milvus(uri, name).remove()
    assert update(store, address) == COUNT
    assert_equal(store, address)


def test_a_collection_of_another_gallery_is_refused_and_stays_as_it_is(store, address, tmp_path):
    update(store, address)
    with writing(tmp_path / "other") as folder:
        other = Store(folder, new_manifest(encoder(), CLASSES, "/"))
        other.commit(parts_of(folder, made_items(4, seed=1), made_features(4)))
        with pytest.raises(UserError, match="the collection there is not of .*other; give another"):
            update(other, address)
        assert stores(folder) == []
        second = address.replace("campus", "other")
        update(other, second)
        assert_equal(other, second)
    uri, _ = split_store(address)
    Milvus(uri, "foreign").create(schema_with(ATTRIBUTES), WIDTH)
    with pytest.raises(UserError, match="the collection there is not of"):
        update(store, f"milvus:{uri}#foreign")
    assert_equal(store, address)


def test_a_search_of_the_copy_gives_the_hits_of_the_gallery(store, address):
    update(store, address)
    gallery = Gallery.open(store.folder)
    queries_QD = made_features(3, seed=9).astype(np.float32)
    for text in ("", "view = 'aerial' and not gender = 'male'"):
        part = where.parse(text, gallery.items.schema) if text else None
        mask = None if part is None else where.to_mask(part, gallery.items)
        here = Exact(gallery.features).search(queries_QD, COUNT, mask)
        there = CopyIndex(gallery, address).search(queries_QD, COUNT, part)
        np.testing.assert_array_equal(here[1], there[1])
        np.testing.assert_allclose(here[0], there[0], atol=1e-6)


def test_a_copy_that_is_behind_is_told_and_shows_nobody_who_is_gone(store, address, capsys):
    update(store, address)
    CopyIndex(Gallery.open(store.folder), address)
    assert "is behind" not in capsys.readouterr().err
    new = parts_of(store.folder, made_items(6, seed=5), made_features(6), rows=6)
    store.commit([*store.parts[1:], *new])
    gallery = Gallery.open(store.folder)
    index = CopyIndex(gallery, address)
    assert f"{address}: is behind the gallery" in capsys.readouterr().err
    scores, rows = index.search(made_features(1).astype(np.float32), COUNT)
    assert set(rows[0]) == {-1, *range(COUNT - ROWS)}
    assert (np.isneginf(scores) == (rows < 0)).all() and (rows < 0).sum() == ROWS
    store.commit(store.parts, encoder=encoder("1"))
    with pytest.raises(UserError, match="made with another encoder; search.py index"):
        CopyIndex(Gallery.open(store.folder), address)


def test_a_copy_that_is_not_there_is_not_made_by_a_question(store, address, tmp_path):
    with pytest.raises(UserError, match="has no copy of .*; search.py index .*#campus makes one$"):
        Copy(store.folder, address)
    assert not (tmp_path / "milvus.db").exists()
    Copy(store.folder, address, new=True)  # killed before it made the collection
    with pytest.raises(
        UserError, match="#campus makes one, search.py delete --copy .* forgets it$"
    ):
        Copy(store.folder, address)


def test_a_whole_copy_is_deleted_and_forgotten(store, address, monkeypatch):
    update(store, address)
    with pytest.raises(UserError, match="--copy milvus:x.db: not among the copies of .*#campus"):
        delete_copy(store.folder, "milvus:x.db")
    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "has_collection", _fails)
        with pytest.raises(UserError, match="not today; if it does not exist any longer, take it"):
            delete_copy(store.folder, address)
    assert stores(store.folder) == [address]
    assert delete_copy(store.folder, address) and stores(store.folder) == []
    assert Milvus(*split_store(address)).about() is None
    gone = "milvus:/nowhere/milvus.db#gallery"
    (store.folder / STORES).write_text(json.dumps({"gallery": "0" * 32, "stores": [gone]}))
    assert not delete_copy(store.folder, gone) and stores(store.folder) == []


def _fails(*words, **options):
    from pymilvus.exceptions import MilvusException

    raise MilvusException(message="not today")


def test_the_password_comes_from_the_environment_and_is_written_nowhere(
    store, address, monkeypatch
):
    tokens, start = [], MilvusClient.__init__

    def noted(client, *words, token="", **options):
        tokens.append(token)
        start(client, *words, **options)

    monkeypatch.setattr(MilvusClient, "__init__", noted)
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    update(store, address)
    assert tokens == ["root:secret"]
    written = [path.read_bytes() for path in store.folder.rglob("*") if path.is_file()]
    assert not any(b"secret" in content for content in written)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"gallery": "x", "stores": []}', '{"gallery": "0", "stores": [1]}', "{"],
)
def test_a_wrong_list_of_copies_is_one_line(store, content):
    (store.folder / STORES).write_text(content)
    with pytest.raises(UserError, match="stores.json: "):
        stores(store.folder)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("milvus:http://host:19530", "milvus:http://host:19530#gallery"),
        ("milvus:http://host:19530/#campus", "milvus:http://host:19530#campus"),
        ("milvus:https://host/team#a_1", "milvus:https://host/team#a_1"),
        ("milvus:/data/x.db", "milvus:/data/x.db#gallery"),
        ("milvus:/data/#1/../x.db#campus", "milvus:/data/x.db#campus"),
    ],
)
def test_an_address_is_a_server_or_a_file_and_a_name(text, address):
    assert store_option(text) == address and store_option(address) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chroma:x", r"--store chroma:x: not of the form milvus:URI\[#NAME\]"),
        ("milvus:", "not of the form"),
        ("milvus:x", "neither a server, such as milvus:http://localhost:19530, nor a file"),
        ("milvus:x.db#a b", "a b is not a NAME: letters, digits and _"),
        (
            "milvus:http://me:secret@host:1",
            "^--store milvus:http://...: an address has no password",
        ),
        (
            "milvus:https://host?key=secret",
            "^--store milvus:https://...: an address has no password",
        ),
    ],
)
def test_a_wrong_address_is_one_line_without_the_password(text, message):
    with pytest.raises(UserError, match=message) as error:
        store_option(text)
    assert "secret" not in str(error.value)
