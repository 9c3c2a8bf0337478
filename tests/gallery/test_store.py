"""A gallery's folder: whole at every moment, readable anywhere, and damage is named."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gallery import store as store_module
from gallery.manifest import new_manifest, read_manifest
from gallery.parts import FILES, Damaged, damaged_parts, part_file, write_part
from gallery.paths import below
from gallery.records import column_of, schema_with
from gallery.store import Gallery, Store, writing
from tests.helpers import ROOT
from utils.errors import UserError

WIDTH = 8
ENCODER = {"sha256": "0" * 64, "embed_dim": WIDTH}
ATTRIBUTES = {"gender": ("male", "female"), "height": ("tall", "short")}


def table_of(numbers):
    rows = [
        {"id": n, "path": f"{n}.jpg", "identity": str(n % 3), "person_height": "tall"}
        for n in numbers
    ]
    return pa.Table.from_pylist(rows, schema=schema_with(list(ATTRIBUTES)))


def features_for(numbers):
    return np.array([[n + d / 10 for d in range(WIDTH)] for n in numbers]).reshape(-1, WIDTH)


def files_for(numbers):
    rows = [{"path": f"{n}.jpg", "size": n} for n in numbers]
    return pa.Table.from_pylist(rows, schema=FILES)


def part_of(folder, numbers):
    numbers = list(numbers)
    return write_part(folder, table_of(numbers), features_for(numbers), files_for(numbers))


@pytest.fixture
def store(tmp_path):
    with writing(tmp_path / "gallery") as folder:
        made = Store(folder, new_manifest(ENCODER, ATTRIBUTES, "/pictures"))
        made.commit([part_of(folder, range(5)), part_of(folder, range(5, 8))])
        yield made


def ids(folder):
    return sorted(Gallery.open(folder).items["id"].to_pylist())


def test_what_is_written_is_read_and_rows_belong_together(store):
    gallery = Gallery.open(store.folder)
    assert gallery.items.schema == schema_with(list(ATTRIBUTES))
    assert gallery.items["id"].to_pylist() == list(range(8))
    expected = features_for(range(8)).astype(np.float16)
    assert gallery.features.dtype == np.float16 and np.array_equal(gallery.features, expected)
    assert gallery.manifest["root"] == "/pictures" and gallery.items["path"][3].as_py() == "3.jpg"
    assert gallery.manifest["encoder"] == ENCODER and gallery.manifest["libraries"]["torch"]
    assert Gallery.open(store.folder, features=False).features.shape == (8, 0)


def test_an_attribute_with_the_name_of_a_column_has_one_of_its_own():
    assert column_of("height") == "person_height" and column_of("gender") == "gender"
    names = schema_with(list(ATTRIBUTES)).names
    assert len(names) == len(set(names)) and "person_height_score" in names


def test_a_moved_gallery_is_read_elsewhere_by_arrow_alone(store, tmp_path):
    moved = shutil.copytree(store.folder, tmp_path / "elsewhere" / "x")
    shutil.rmtree(store.folder)
    assert ids(moved) == list(range(8))
    manifest = json.loads((moved / "manifest.json").read_text())
    tables = [pq.read_table(moved / "parts" / f"{p['name']}.features.parquet") for p in manifest["parts"]]  # fmt: skip
    assert [len(table) for table in tables] == [5, 3]
    assert tables[0].schema.field("feature").type.list_size == WIDTH
    assert tables[0]["feature"][4].as_py() == pytest.approx(features_for([4])[0], abs=0.01)


def test_an_empty_gallery_and_attributes_that_came_later(store):
    store.commit([])
    assert Gallery.open(store.folder).features.shape == (0, WIDTH)
    old = write_part(
        store.folder, table_of([1]).drop_columns(["gender", "gender_score"]), features_for([1]),
        files_for([1]),
    )  # fmt: skip
    store.commit([old, part_of(store.folder, [2])])
    assert Gallery.open(store.folder).items["gender"].to_pylist() == [None, None]


def test_rows_that_leave_a_part_are_gone_from_the_disk(store):
    first, second = store.parts
    new = store.rewritten(first, np.array([True, False, True, True, False]))
    store.commit([new, second])
    assert ids(store.folder) == [0, 2, 3, 5, 6, 7]
    names = {path.name.split(".")[0] for path in (store.folder / "parts").iterdir()}
    assert names == {new["name"], second["name"]}
    gone = store.rewritten(second, np.zeros(3, bool), files=files_for([]))
    assert gone is None


def test_small_parts_are_joined_and_no_part_has_more_than_its_rows(store, monkeypatch):
    monkeypatch.setattr(store_module, "ROWS", 6)
    whole = part_of(store.folder, range(20, 26))
    tiny = [part_of(store.folder, [n]) for n in (30, 31)]
    store.commit([whole, *tiny, part_of(store.folder, [])])
    store.commit(store.compacted())
    assert [part["rows"] for part in store.parts] == [6, 2]
    assert store.parts[0] == whole and ids(store.folder) == [*range(20, 26), 30, 31]
    gallery = Gallery.open(store.folder)
    assert np.array_equal(gallery.features[-1], features_for([31]).astype(np.float16)[0])
    files = [path for part in store.parts for path in store.read(part, "files")["path"].to_pylist()]
    assert sorted(files) == [f"{n}.jpg" for n in (*range(20, 26), 30, 31)]


@pytest.mark.parametrize("kind", ["items", "features", "files"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "replace"])
def test_a_damaged_part_is_named_with_the_mend(kind, damage, store):
    part, other = store.parts
    path = part_file(store.folder, part["name"], kind)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "replace":
        content = part_file(store.folder, other["name"], kind).read_bytes()
    path.write_bytes(content)
    if damage == "remove":
        path.unlink()
    ((found, message),) = damaged_parts(store.folder, store.parts)
    assert found == part and str(path) in message and "--repair" in message
    if kind != "files":
        with pytest.raises(Damaged, match=path.name):
            Gallery.open(store.folder)


def test_what_a_killed_writer_leaves_changes_nothing_and_is_removed(store):
    orphan = part_of(store.folder, range(90, 95))
    half = store.folder / "parts" / f".{orphan['name']}.features.parquet.abc_1"
    half.write_bytes(b"half")
    (store.folder / "parts" / "notes.txt").write_text("not ours")
    (store.folder / ".manifest.json.abc").write_bytes(b"half")
    assert ids(store.folder) == list(range(8))
    store.clean()
    assert not part_file(store.folder, orphan["name"], "items").exists()
    assert len(list((store.folder / "parts").iterdir())) == 6 + 1 and not half.exists()
    assert not list(store.folder.glob(".manifest*")) and ids(store.folder) == list(range(8))


def test_a_gallery_under_another_name_replaces_the_old_one_when_it_is_published(store):
    next_one = Store(store.folder, new_manifest(ENCODER, {}, "/"), "manifest.next.json")
    next_one.commit([part_of(store.folder, [77])])
    next_one.clean()
    assert ids(store.folder) == list(range(8))  # readers have the old one until then
    next_one.publish()
    assert ids(store.folder) == [77] and len(list((store.folder / "parts").iterdir())) == 3


def test_readers_see_one_moment_while_a_gallery_is_rewritten(store):
    """Every version has numbers of one block of ten alone."""
    stop, problems, read = threading.Event(), [], []

    def reader():
        while not stop.is_set():
            try:
                gallery = Gallery.open(store.folder)
            except Exception as error:
                problems.append(error)
                return
            numbers = gallery.items["id"].to_numpy()
            read.append(len({int(n) // 10 for n in numbers}) == 1)
            read.append(bool((gallery.features[:, 0] == numbers).all()))

    store.commit([part_of(store.folder, range(10))])
    thread = threading.Thread(target=reader)
    thread.start()
    for block in range(40):
        numbers = range(10 * block, 10 * block + 10)
        store.commit([part_of(store.folder, numbers[:6]), part_of(store.folder, numbers[6:])])
    stop.set()
    thread.join()
    assert not problems and read and all(read)


def test_a_second_process_cannot_write(store):
    code = (
        "import sys; from pathlib import Path; from utils.files import lock\n"
        "lock(Path(sys.argv[1]))"  # as `writing` does, without the seconds of its imports
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "another process is using this folder" in result.stderr
    assert ids(store.folder) == list(range(8))  # reading needs no lock


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version 99, and this code reads version 1"),
        ({"parts": [{"name": "../../x", "rows": 1, "sha256": {}}]}, "not the manifest of a gallery"),
        ({"parts": [{"name": "0" * 16, "rows": 10**9, "sha256": dict.fromkeys(("items", "features", "files"), "0" * 64)}]}, "not the manifest"),
        ({"encoder": {}}, "not the manifest of a gallery: 'sha256'"),
        ({"attributes": {"a": [1]}}, "its attributes"),
        ({"parts": 3}, "not the manifest .*; if .* is a gallery, delete the whole folder and index"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused(changes, message, store):
    path = store.folder / "manifest.json"
    path.write_text(json.dumps({**store.manifest, **changes}))
    with pytest.raises(UserError, match=message):
        read_manifest(store.folder)


def test_a_folder_without_a_gallery_is_told(tmp_path):
    with pytest.raises(UserError, match="no gallery .* make one with search.py index"):
        Gallery.open(tmp_path)


def test_paths_below_roots():
    paths = pa.chunked_array([["a/1.jpg", "a", "ab/2.jpg", "/x/y.jpg", "/x"]])
    assert below(paths, ["a"]).tolist() == [True, True, False, False, False]
    assert below(paths, [""]).tolist() == [True, True, True, False, False]
    assert below(paths, ["/x", "ab/2.jpg"]).tolist() == [False, False, True, True, True]
