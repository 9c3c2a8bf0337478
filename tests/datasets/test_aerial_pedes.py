import json
import shutil

import pytest
import torch

from datasets.aerial_pedes import MIXED, view_of
from model.build import build_model
from processor.evaluator import Evaluator
from tests.helpers import SCRATCH, options, read
from utils.errors import UserError

AERI_TRAIN, AERI_TEST = "train_caption.json", "test_caption.json"
TAG_TRAIN, TAG_TEST = "train_reid.json", "test_reid.json"


def edited(source, folder, file, change):
    """A folder with one changed file, and links to the images."""
    for path in source.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    rows = json.loads((source / file).read_text())
    changed = change(rows)
    (folder / file).write_text(json.dumps(rows if changed is None else changed))
    return folder


def assign(index, key, value):
    return lambda rows: rows[index].update({key: value})


def drop(index, key):
    def change(rows):
        del rows[index][key]

    return change


def relative(images, root):
    return [image.path.removeprefix(f"{root}/") for image in images]


def test_aeri_pedes_is_read_completely(rendered):
    root = rendered("AERI-PEDES")
    rows = json.loads((root / AERI_TRAIN).read_text())
    data = read("AERI-PEDES", root)
    assert data.warnings == [] and data.has_pairs and data.views == ("aerial", "ground")
    assert set(data.splits) == {"test"} and data.num_identities == 8 and not data.ids
    assert min(row["pid"] for row in rows) == 1
    samples = [(s.pid + 1, s.caption, *(f"AERI-PEDES/{p}" for p in relative(s.images, root))) for s in data.train]  # fmt: skip
    keys = ("pid", "caption", "aerial_img", "ground_img")
    assert samples == [tuple(row[key] for key in keys) for row in rows] and len(rows) == 16
    test, rows = data.splits["test"], json.loads((root / AERI_TEST).read_text())
    pids = {row["pid"]: number for number, row in enumerate(rows)}
    for view, key in (("aerial", "file_paths"), ("ground", "ground_file_paths")):
        gallery = test.galleries[view]
        assert relative(gallery.images, root) == [path for row in rows for path in row[key]]
        assert gallery.pids == [pids[row["pid"]] for row in rows for _ in row[key]]
    assert test.captions == [caption for row in rows for caption in row["captions"]]
    assert test.caption_pids == [pids[row["pid"]] for row in rows for _ in row["captions"]]
    assert (len(test.captions), len(test.galleries["aerial"].images)) == (18, 12)


@pytest.mark.parametrize("prefix", ["", "AERI-PEDES/", "AERI-PEDES\\"])
def test_paths_may_begin_with_the_name_of_the_data_set(prefix, rendered, tmp_path):
    root = rendered("AERI-PEDES")

    def change(rows):
        for row in rows:
            for key in ("aerial_img", "ground_img"):
                row[key] = prefix + row[key].removeprefix("AERI-PEDES/")

    samples = read("AERI-PEDES", edited(root, tmp_path, AERI_TRAIN, change)).train
    expected = read("AERI-PEDES", root).train
    assert [relative(s.images, tmp_path) for s in samples] == [relative(s.images, root) for s in expected]  # fmt: skip


def test_rows_without_captions_or_aerial_images_are_left_out_and_counted(rendered, tmp_path):
    def change(rows):
        rows[0]["captions"] = []
        rows[2]["file_paths"] = []
        rows[3]["ground_file_paths"] = []
        rows[4]["split"] = "val"

    data = read("AERI-PEDES", edited(rendered("AERI-PEDES"), tmp_path, AERI_TEST, change))
    assert data.warnings == [
        f"left out: 2 rows of test without captions or without aerial images ({AERI_TEST}, entry 0)",
        f"left out: 1 rows of test with another split ({AERI_TEST}, entry 4)",
    ]
    test = data.splits["test"]
    assert set(test.caption_pids) == set(test.galleries["aerial"].pids) == {0, 1, 2}
    assert test.galleries["ground"].pids == [0, 0, 2, 2]


def test_tag_pedes_is_read_completely_with_one_gallery_of_both_views(rendered):
    root = rendered("TAG-PEDES")
    rows = json.loads((root / TAG_TRAIN).read_text())
    data = read("TAG-PEDES", root)
    assert data.warnings == [] and not data.has_pairs and data.views == (MIXED,)
    assert set(data.splits) == {"test"} and data.num_identities == 8 and not data.ids
    samples = [(s.pid, s.caption, *relative(s.images, root)) for s in data.train]
    assert samples == [(r["id"], c, r["file_path"]) for r in rows for c in r["captions"]]
    assert len(rows) == 32 and len(samples) == 64
    test, rows = data.splits["test"], json.loads((root / TAG_TEST).read_text())
    assert relative(test.galleries[MIXED].images, root) == [row["file_path"] for row in rows]
    assert test.galleries[MIXED].pids == [row["id"] - rows[0]["id"] for row in rows]
    assert test.captions == [caption for row in rows for caption in row["captions"]]
    assert {path.removeprefix(f"{root}/").split("/")[0] == view for path, view in data.image_views.items()} == {True}  # fmt: skip


def test_tag_pedes_may_have_its_files_in_a_folder_of_their_own(rendered, tmp_path):
    root, other = rendered("TAG-PEDES"), tmp_path / "TAG-PEDES"
    shutil.copytree(root, other / "images")
    (other / "anno_dir").mkdir()
    for file in (TAG_TRAIN, TAG_TEST):
        (other / "images" / file).rename(other / "anno_dir" / file)
    expected = read("TAG-PEDES", root)
    for given in (other, tmp_path):
        data = read("TAG-PEDES", given)
        assert [(s.pid, s.caption, relative(s.images, other / "images")) for s in data.train] == [
            (s.pid, s.caption, relative(s.images, root)) for s in expected.train
        ]
        assert data.splits["test"].captions == expected.splits["test"].captions


def test_root_dir_may_be_the_folder_above_and_a_missing_file_is_named(rendered, tmp_path):
    (tmp_path / "AERI-PEDES").symlink_to(rendered("AERI-PEDES"))
    assert len(read("AERI-PEDES", tmp_path).train) == 16
    message = "expected TAG-PEDES/train_reid.json and TAG-PEDES/test_reid.json there .or both in TAG-PEDES/anno_dir/"  # fmt: skip
    with pytest.raises(UserError, match=message):
        read("TAG-PEDES", tmp_path)
    with pytest.raises(UserError, match="--val_dataset val: AERI-PEDES has only test; --val_data"):
        read("AERI-PEDES", tmp_path, val_dataset="val")


WRONG = [
    ("AERI-PEDES", AERI_TRAIN, lambda rows: [], "expected a list of rows with pid, split"),
    ("AERI-PEDES", AERI_TRAIN, lambda rows: [3], f"{AERI_TRAIN}, entry 0: aerial_img, caption"),
    ("AERI-PEDES", AERI_TRAIN, drop(2, "pid"), f"{AERI_TRAIN}, entry 2: pid missing"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "pid", 1.5), "entry 2: pid must be an integer or text"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "pid", "1"), "entry 2: the pid 1 is '1', but 1 in train"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "caption", ["a man"]), "entry 2: the caption is"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "caption", " "), "entry 2: the caption ' ' has no words"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "aerial_img", 3), "2: aerial_img must be a path, got 3"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "ground_img", "AERI-PEDES/no.jpg"), "image no.jpg is mis"),
    ("AERI-PEDES", AERI_TRAIN, assign(2, "aerial_img", "AERI-PEDES/../x.jpg"), "leaves the data"),
    ("AERI-PEDES", AERI_TRAIN, lambda rows: [{**r, "split": "x"} for r in rows], "no row of train"),
    ("AERI-PEDES", AERI_TRAIN, lambda rows: rows[2].update(aerial_img=rows[0]["aerial_img"]), "the identity of .* in train is"),
    ("AERI-PEDES", AERI_TEST, drop(1, "ground_file_paths"), "entry 1: ground_file_paths missing"),
    ("AERI-PEDES", AERI_TEST, assign(1, "captions", "a man"), "captions must be a list of texts"),
    ("AERI-PEDES", AERI_TEST, assign(1, "captions", ["a", ""]), "entry 1, caption 1: the caption is"),
    ("AERI-PEDES", AERI_TEST, assign(1, "file_paths", "x"), "file_paths must be a list of paths"),
    ("AERI-PEDES", AERI_TEST, assign(1, "file_paths", [3]), "file_paths must be a path, got 3"),
    ("AERI-PEDES", AERI_TEST, assign(1, "ground_file_paths", ["/etc/x"]), "leaves the data set's"),
    ("AERI-PEDES", AERI_TEST, lambda rows: [{**r, "captions": []} for r in rows], "no row of test"),
    ("TAG-PEDES", TAG_TRAIN, lambda rows: {"rows": rows}, "expected a list of rows with id, file_"),
    ("TAG-PEDES", TAG_TRAIN, drop(2, "id"), f"{TAG_TRAIN}, entry 2: id missing"),
    ("TAG-PEDES", TAG_TRAIN, assign(2, "id", None), "entry 2: id must be an integer or text"),
    ("TAG-PEDES", TAG_TRAIN, assign(2, "captions", []), "entry 2: captions must be a list of text"),
    ("TAG-PEDES", TAG_TRAIN, assign(2, "file_path", ["x"]), "entry 2: file_path must be a path"),
    ("TAG-PEDES", TAG_TRAIN, assign(2, "file_path", "no.jpg"), "entry 2: image no.jpg is missing"),
    ("TAG-PEDES", TAG_TEST, assign(2, "file_path", "../x.jpg"), "entry 2: image path ../x.jpg leav"),
    ("TAG-PEDES", TAG_TEST, lambda rows: rows[2].update(file_path=rows[-1]["file_path"]), "the identity of .* in test is"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "change", "message"), WRONG)
def test_a_wrong_row_is_refused_with_its_number(name, file, change, message, rendered, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(name, edited(rendered(name), tmp_path, file, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "file"), [("AERI-PEDES", AERI_TEST), ("TAG-PEDES", TAG_TEST)])
def test_rows_that_occur_twice_are_read_with_a_warning(name, file, rendered, tmp_path):
    data = read(name, edited(rendered(name), tmp_path, file, lambda rows: rows.append(rows[0])))
    kinds = [line.split(" of test")[0].split()[-1] for line in data.warnings]
    assert kinds == (["images", "captions"]) and all("entry" in line for line in data.warnings)


@pytest.mark.parametrize(
    ("path", "camera", "view"),
    [
        ("aerial/0001.jpg", None, "aerial"),
        ("drone\\0001.jpg", None, "aerial"),
        ("train/0001_UAV_3.jpg", None, "aerial"),
        ("train/cctv2/0001.jpg", 0, "ground"),
        ("aerial-ground/street/0001.jpg", None, "ground"),  # the last part that tells decides
        ("drone/aerial_ground_0001.jpg", None, ""),  # and this one tells both
        ("AG-ReID.v2/train_all/P0001T04041A0C0F121.jpg", None, "aerial"),
        ("AG-ReID.v2/train_all/P0001T04041A0C3F0121.jpg", None, "ground"),
        ("AG-ReID.v2/train_all/P0001T04041A0C1F121.jpg", None, ""),  # no such camera
        ("G2APS/D1_20_000840.jpg", None, "aerial"),
        ("G2APS/S1_20_000840_00000.jpg", None, "ground"),
        ("background/undergrounds/0001_c1.jpg", 1, ""),  # a number tells nothing
        ("images/0001.jpg", "drone_2", "aerial"),
        ("street/0001.jpg", "drone_2", "ground"),
        ("0001.jpg", ["drone"], ""),
    ],
)
def test_only_a_path_that_says_so_tells_a_view(path, camera, view):
    assert view_of(path, camera) == view


def test_galleries_by_view_follow_the_published_one_if_all_views_are_known(rendered, tmp_path):
    args = options(**SCRATCH, test_batch_size=7)
    model = build_model(args, [], num_classes=0)

    def galleries(root, split="test", **more):
        evaluator = Evaluator(read("TAG-PEDES", root, **more), split, args, torch.device("cpu"))
        features = evaluator.encode(model)
        ranked = evaluator.galleries(features)
        assert evaluator.evaluate(model) == ranked[MIXED].summary()
        return {name: ranked.summary() for name, ranked in ranked.items()}

    root = rendered("TAG-PEDES")
    found = galleries(root)
    assert {name: r.gallery for name, r in found.items()} == {MIXED: 24, "aerial": 12, "ground": 12}
    assert {r.queries for r in found.values()} == {48}
    heldout = galleries(root, "heldout", val_dataset="heldout", heldout=0.25)
    assert {name: r.gallery for name, r in heldout.items()} == {MIXED: 8, "aerial": 4, "ground": 4}

    def hide(rows):  # the view of one image
        path = rows[0]["file_path"]
        shutil.copy(root / path, tmp_path / "0001.jpg")
        rows[0]["file_path"] = "0001.jpg"

    data = read("TAG-PEDES", edited(root, tmp_path, TAG_TEST, hide))
    assert data.warnings == [
        "views: 1 of 24 images of test do not tell theirs: no galleries by view "
        f"({tmp_path / '0001.jpg'})"
    ]
    partly = galleries(tmp_path)
    assert list(partly) == [MIXED] and partly[MIXED] == found[MIXED]
