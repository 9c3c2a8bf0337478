"""The readers of the sources, on rendered raw sources and on small tables."""

from __future__ import annotations

import datetime
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.io

from construction.recipe import Source
from construction.sources import READERS, read_ag_reid, read_g2aps, read_table
from datasets.mini import render_raw
from utils.errors import UserError

TABLE = Source(name="own", reader="table")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Both raw sources, of a few people, and the truth of each by picture name."""
    root = tmp_path_factory.mktemp("raw")
    truth = {}
    for name, layout in (("AG-ReID", "AG-ReID-raw"), ("G2APS", "G2APS-raw")):
        render_raw(root / name, layout, train_ids=6, test_ids=4, pairs=2, workers=1)
        rows = json.loads((root / name / "mini-raw.json").read_text())
        truth[name] = {_name(name, row): row for row in rows}
    return root, truth


def _name(source, row):
    if source == "AG-ReID":
        return row["file"]
    return f"img/{Path(row['file']).stem}_{row['box']:05d}.jpg"


def read(reader, root, name, **values):
    return list(READERS[reader](root, Source(name=name, reader=reader, **values)))


def test_ag_reid_gives_every_picture_with_person_session_view_and_split(raw):
    root, truth = raw
    pictures = read("ag_reid", root / "AG-ReID", "AG-ReID")
    assert {p.name for p in pictures} == set(truth["AG-ReID"])
    for p in pictures:
        row = truth["AG-ReID"][p.name]
        wanted = f"P{row['person']:04d}", str(row["identity"]), row["view"], row["split"]
        assert (p.person, p.identity, p.view, p.split) == wanted
        assert Path(p.file).name == Path(p.name).name and Path(p.file).exists()
        # The columns are 1 for no and 2 for yes.
        assert p.notes[f"gender{row['attributes']['gender']}"] == 2
        assert len(p.notes) == 88


def test_ag_reid_v2_has_folders_by_identity_and_other_cameras(tmp_path):
    names = ["train_all/1040410/P0001T04041A0C2F00121.jpg", "query/2040410/P0002T04041A0C0F1.jpg",
             "gallery/2040410/P0002T04041A0C3F2.jpeg", "gallery/Thumbs.jpg"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pictures = sorted(read("ag_reid", tmp_path, "AG-ReID"), key=lambda p: p.name, reverse=True)
    found = [(p.name, p.identity, p.view, p.split, p.time) for p in pictures]
    assert found == [
        (names[0], "1040410", "ground", "train", 121),
        (names[1], "2040410", "aerial", "test", 1),
        (names[2], "2040410", "ground", "test", 2),
    ]


def test_g2aps_gives_every_box_of_every_frame_with_its_person_and_split(raw):
    root, truth = raw
    pictures = read("g2aps", root / "G2APS", "G2APS-AG")
    assert {p.name for p in pictures} == set(truth["G2APS"])
    for p in pictures:
        row = truth["G2APS"][p.name]
        person = "" if row["person"] is None else f"{row['person']:04d}"
        assert (p.person, p.view) == (person, row["view"])
        assert p.split == (row["split"] if person else "")
        assert list(p.box) == row["bounds"]
        assert len(p.name.split("/")[1]) == 22  # a key of attrs.json
    assert any(not p.person for p in pictures)


def test_crops_of_g2aps_are_read_in_both_published_forms(tmp_path):
    for name in ("bounding_box_train/12/0012_c0v1_000840.jpg", "bounding_box_train/12/0012_c3v1_2.jpg",
                 "bounding_box_test_c3/7/0007_c3v2_000001.jpg", "bounding_box_gallery/5555_c0v1_000002.jpg"):  # fmt: skip
        (tmp_path / "secap" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "secap" / name).touch()
    pictures = read("g2aps", tmp_path / "secap", "G2APS-AG")
    found = Counter((p.person, p.view, p.split) for p in pictures)
    assert found == {
        ("0012", "aerial", "train"): 1, ("0012", "ground", "train"): 1,
        ("0007", "ground", "test"): 1, ("", "aerial", "test"): 1,
    }  # fmt: skip
    folder = tmp_path / "market" / "bounding_box_train"
    folder.mkdir(parents=True)
    (folder / "0844_c3s2_107328_01.jpg").touch()
    with pytest.raises(UserError, match="without the view; give the source G2APS-AG aerial_cam"):
        read("g2aps", tmp_path / "market", "G2APS-AG")
    (picture,) = read("g2aps", tmp_path / "market", "G2APS-AG", aerial_cameras=["c3"])
    assert (picture.person, picture.view, picture.camera) == ("0844", "aerial", "c32")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: (a / "Images.mat").write_bytes(b"MATLAB 5.0" * 99),
            "Images.mat: not readable as",
        ),
        (lambda a: (a / "Person.mat").unlink(), "Person.mat: No such file"),
        (lambda a: scipy.io.savemat(a / "Person.mat", {"P": 1}), "no variable Person, but P"),
        (lambda a: scipy.io.savemat(a / "Images.mat", {"Img": [1, 2]}), "Images.mat, row 0: "),
        (lambda a: _cut(a / "test/train_test/Train.mat"), "Train.mat: not readable as"),
    ],
)
def test_a_broken_annotation_of_g2aps_is_named(raw, tmp_path, change, message):
    shutil.copytree(raw[0] / "G2APS" / "annotation", tmp_path / "annotation")
    change(tmp_path / "annotation")
    with pytest.raises(UserError, match=message):
        list(read_g2aps(tmp_path, Source(name="G2APS-AG", reader="g2aps")))


def _cut(path):
    path.write_bytes(path.read_bytes()[:300])


def test_folders_without_pictures_of_the_source_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such folder"):
        read("ag_reid", tmp_path / "no", "AG-ReID")
    with pytest.raises(UserError, match=r"no picture with a name such as P0001T04041A0C0F121"):
        read("ag_reid", tmp_path, "AG-ReID")
    with pytest.raises(UserError, match=r"neither annotation/ of G2APS nor crops"):
        read("g2aps", tmp_path, "G2APS-AG")


ROWS = [
    {"path": "a/1.jpg", "identity": "anna", "view": "aerial", "time": "1.5", "sex": "f"},
    {"path": "/abs/../2.jpg", "identity": "bob", "view": "Ground", "time": "", "sex": ""},
]
BOXES = {"left": "1", "top": "2", "width": "30.4", "height": "80"}


def table(tmp_path, rows, name="t.csv"):
    path = tmp_path / name
    if name.endswith(("parquet", "pq")):
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_gives_pictures_with_times_and_annotations(tmp_path, name):
    anna, bob = read_table(table(tmp_path, ROWS, name), TABLE)
    assert (anna.file, anna.name) == (f"{tmp_path}/a/1.jpg", "a/1.jpg")
    assert (anna.person, anna.identity, anna.view, anna.time) == ("anna", "anna", "aerial", 1.5)
    assert anna.notes == {"sex": "f"} and bob.time is None and bob.view == "ground"
    assert (bob.file, bob.name) == ("/abs/../2.jpg", "00000002_2.jpg")


def test_zeros_dates_and_missing_numbers_of_a_parquet_file_are_kept(tmp_path):
    rows = [
        {"path": f"{i}.jpg", "identity": i, "camera": i, "person": None if i else 7.0,
         "day": datetime.date(2026, 1, 1 + i), "raw": b"x"}
        for i in range(2)
    ]  # fmt: skip
    source = Source(name="own", reader="table", aerial_cameras=[0])
    one, two = read_table(table(tmp_path, rows, "t.pq"), source)
    assert (one.identity, one.person, one.view, one.camera) == ("0", "7", "aerial", "0")
    assert (two.identity, two.person, two.view) == ("1", "1", "ground")
    assert one.notes["day"] == "2026-01-01"


def test_boxes_cameras_persons_and_splits_of_a_table(tmp_path):
    rows = [
        {"path": "f.png", "identity": "7/morning", "person": "7", "camera": c, "split": s, **BOXES}
        for c, s in (("d1", "train"), ("s1", "TEST"))
    ]
    rows[1]["left"] = "9"
    source = Source(name="own", reader="table", aerial_cameras=["d1"])
    one, two = read_table(table(tmp_path, rows), source)
    assert (one.view, two.view, one.split, two.split) == ("aerial", "ground", "train", "test")
    assert (one.box, one.person, one.identity) == ((1, 2, 30, 80), "7", "7/morning")
    assert [one.name, two.name] == ["f_1_2_30_80.jpg", "f_9_2_30_80.jpg"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"view": "sky"}, "t.csv, row 2: the view is 'sky'; it must be aerial or ground"),
        ({"path": ""}, "row 2: no path"),
        ({"time": "nan"}, "row 2: time is 'nan', not a number"),
        ({"time": "noon"}, "row 2: time is 'noon', not a number"),
        ({"split": "dev"}, "row 2: the split is 'dev'; it must be train, val, test"),
        ({**BOXES, "width": "0"}, "row 2: a box of 0x80 pixels"),
        ({**BOXES, "width": "x"}, "row 2: width is 'x', not a number"),
        ({**BOXES, "top": ""}, "row 2: a box needs left, top, width, height; one of them is empty"),
    ],
)
def test_a_wrong_value_of_a_table_is_named_with_its_row(tmp_path, change, message):
    rows = [{**dict.fromkeys(change, ""), **row} for row in ROWS]
    rows[1] |= change
    with pytest.raises(UserError, match=message):
        list(read_table(table(tmp_path, rows), TABLE))


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,identity,view\n1,2,aerial\n", r"no column path, but file, identity, view"),
        ("path, identity ,view\n", "t.csv: has no rows"),
        ("path,identity\n1,2\n", "no column view, but path, identity"),
        ("path,identity,camera\n1,2,c\n", "the recipe must give the source own aerial_cameras"),
        ("path,identity,view,left\n1,2,aerial,3\n", "a box needs the columns left, top, width"),
        ("path,identity,view\n1,2\n", r"t.csv, line 2: not as many values as columns \(3\)"),
        ('path,identity,view\n"1,2,aerial\n', "t.csv: not readable as CSV"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_table(tmp_path / "t.csv", TABLE))


def test_a_table_that_is_not_there_or_no_parquet_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.csv: No such file"):
        list(read_table(tmp_path / "no.csv", TABLE))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"t\.parquet: not readable as Parquet"):
        list(read_table(tmp_path / "t.parquet", TABLE))


def test_attributes_of_ag_reid_that_do_not_fit_are_refused(raw, tmp_path):
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "P0001T04041A0C0F1.jpg").touch()
    part = {"image_index": [1040410, 2040410], "gender": [1]}
    path = tmp_path / "qut_attribute_v4_88_attributes.mat"
    scipy.io.savemat(path, {"qut_attribute": {"train": part, "test": part}})
    with pytest.raises(UserError, match=r"train\.gender has 1 values for 2 identities"):
        list(read_ag_reid(tmp_path, Source(name="AG-ReID", reader="ag_reid")))
