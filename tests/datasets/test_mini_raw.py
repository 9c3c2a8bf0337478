"""The rendered raw sources: their published layouts, and that planted faults are what TRUTH says."""

import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFile
from scipy.io import loadmat

from datasets.mini import render_raw
from datasets.mini.__main__ import main
from datasets.mini.faults import FAULTS
from datasets.mini.raw import COLUMNS, FOLDERS
from utils.errors import UserError

LAYOUTS = ("AG-ReID-raw", "G2APS-raw")
SIZES = {"train_ids": 7, "test_ids": 3, "pairs": 2}
TINY = {"train_ids": 1, "test_ids": 1, "pairs": 1}
NAME = re.compile(r"P(\d{4})T(\d{4}[01])A([0-2])C([03])F(\d+)\.jpg")


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("raw")
    for layout in LAYOUTS:
        assert render_raw(folder / layout, layout, seed=1, workers=1, **SIZES)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def root(request, roots) -> Path:
    return roots[request.param]


def truth(root: Path) -> list[dict]:
    return json.loads((root / "mini-raw.json").read_text())


def place(row: dict) -> tuple:
    return row["file"], row.get("box")


def picture(root: Path, row: dict) -> Image.Image:
    """The picture of a row of TRUTH; what is missing in a truncated file is grey."""
    ImageFile.LOAD_TRUNCATED_IMAGES, before = True, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        image = Image.open(root / row["file"]).convert("RGB")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    if "box" in row:
        x, y, w, h = row["bounds"]
        image = image.crop((x, y, x + w, y + h))
    return image


def sharpness(image: Image.Image) -> float:
    grey = cv2.resize(np.asarray(image.convert("L")), (128, 384), interpolation=cv2.INTER_LINEAR)
    return cv2.Laplacian(grey, cv2.CV_64F).var()


def mat(path: Path, name: str) -> np.ndarray:
    assert b"Created" not in path.read_bytes()[:116]
    return loadmat(path)[name]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_depend_on_the_seed_and_not_on_workers_or_the_time(layout, tmp_path):
    for name, seed, workers in (("one", 0, 1), ("two", 0, 2), ("other", 1, 1)):
        render_raw(tmp_path / name, layout, seed=seed, workers=workers, **TINY)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and one["mini-raw.json"] != other["mini-raw.json"]
    assert not render_raw(tmp_path / "one", layout, **TINY)
    with pytest.raises(FileExistsError, match="is not a complete set of these parameters"):
        render_raw(tmp_path / "one", layout, seed=1, **TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other", "two"]


def test_truth_lists_every_picture_once(root):
    rows = truth(root)
    assert len({place(row) for row in rows}) == len(rows)
    assert {row["file"] for row in rows} == {str(f.relative_to(root)) for f in root.rglob("*.jpg")}
    for row in rows:
        assert row["split"] in ("train", "test") and len(row["captions"]) == 2
        assert row["attributes"]["altitude"] == {"aerial": "above", "ground": "level"}[row["view"]]
        assert picture(root, row).size[1] > 20


def test_every_fault_is_planted_and_good_pictures_are_as_many_as_they_should_be(root):
    good, all_faults = defaultdict(Counter), Counter()
    for row in truth(root):
        if row["identity"] is not None:
            all_faults[row["fault"]] += 1
            good[row["identity"]][row["view"]] += row["fault"] is None
    assert set(all_faults) == {None, *FAULTS} and sum(all_faults.values()) == 64
    counts = Counter((c["aerial"], c["ground"]) for c in good.values())
    assert counts == {(2, 2): 7, (4, 2): 1, (2, 4): 1, (4, 0): 1}


def test_only_truncated_files_cannot_be_read_to_their_end(root):
    faults = defaultdict(set)
    for row in truth(root):
        faults[row["file"]].add(row["fault"] == "truncated")
    assert all(len(kinds) == 1 for kinds in faults.values())
    for file, (truncated,) in faults.items():
        whole = (root / file).read_bytes().endswith(b"\xff\xd9")
        assert whole == (not truncated)
        if truncated:
            with pytest.raises(OSError, match="truncated"), Image.open(root / file) as image:
                image.load()


def test_faults_are_measurable_and_good_pictures_are_far_from_them(root):
    by_fault = defaultdict(list)
    for row in truth(root):
        image = picture(root, row)
        values = sharpness(image), np.asarray(image.convert("L")).mean(), image.height
        by_fault[row["fault"]].append(values)
    sharp, light, height = (
        {fault: [v[i] for v in values] for fault, values in by_fault.items()} for i in range(3)
    )
    assert max(sharp["blurry"]) < 3 and min(sharp[None]) > 4
    assert max(light["dark"]) < 25 < 35 < min(light[None])
    assert min(light["bright"]) > 225 > 210 > max(light[None])
    assert max(height["small"]) <= 32 < 90 < min(height[None])


def test_duplicates_look_like_what_they_repeat_and_good_pictures_like_no_other(root):
    rows = {place(row): row for row in truth(root) if row["identity"] is not None}
    hashes = {key: imagehash.phash(picture(root, row)) for key, row in rows.items()}
    for key, row in rows.items():
        assert (row["fault"] == "duplicate") == (row["of"] is not None)
        if row["of"]:
            original = rows[place(row["of"])]
            assert original["fault"] is None and original["view"] == row["view"]
            assert original["identity"] == row["identity"] and original["split"] == row["split"]
            assert hashes[key] - hashes[place(row["of"])] <= 4
            assert frame_number(row["file"]) - frame_number(original["file"]) == 1
    good = [key for key, row in rows.items() if row["fault"] is None]
    for a, b in itertools.combinations(good, 2):
        if rows[a]["identity"] == rows[b]["identity"] and rows[a]["view"] == rows[b]["view"]:
            assert hashes[a] - hashes[b] >= 8


def frame_number(file: str) -> int:
    return int(re.search(r"(\d+)\.jpg$", file)[1])


def test_ag_reid_has_its_published_names_and_folders(roots):
    root = roots["AG-ReID-raw"]
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(FOLDERS)
    people = defaultdict(set)
    for row in truth(root):
        folder, name = row["file"].split("/")
        person, session, altitude, camera, _ = NAME.fullmatch(name).groups()
        assert int(person) == row["person"] and int(person + session + altitude) == row["identity"]
        assert row["view"] == {"0": "aerial", "3": "ground"}[camera]
        assert folder == "bounding_box_train" or folder.endswith(f"_c{camera}")
        assert (folder == "bounding_box_train") == (row["split"] == "train")
        people[row["split"]].add((row["person"], row["identity"]))
    train, test = ({p for p, _ in people[split]} for split in ("train", "test"))
    assert train & test == {1} and len(people["train"]) == 7 > len(train)
    assert {row["fault"] for row in truth(root) if "query" in row["file"]} <= {None, "duplicate"}


def test_ag_reid_attributes_are_those_of_truth(roots):
    root = roots["AG-ReID-raw"]
    table = mat(root / "qut_attribute_v4_88_attributes.mat", "qut_attribute")
    known = {row["identity"]: row["attributes"] for row in truth(root)}
    classes = {"male": "gendermale", "female": "genderfemale", "adult": "agemiddle",
               "young": "ageyoung", "old": "ageold", "slim": "weightthin"}  # fmt: skip
    found = []
    for split in ("train", "test"):
        part = table[0, 0][split][0, 0]
        columns = {name: part[name][0] for name in part.dtype.names}
        identities = columns.pop("image_index").tolist()
        assert len(columns) == 88 and {len(c) for c in columns.values()} == {len(identities)}
        for i, identity in enumerate(identities):
            for group in COLUMNS:
                yes = [c for c, values in columns.items() if c.startswith(group) and values[i] == 2]
                assert len(yes) == 1
            for name, column in classes.items():
                assert (name in known[identity].values()) == (columns[column][i] == 2)
        assert {v for values in columns.values() for v in values.tolist()} == {1, 2}
        found += identities
    assert sorted(found) == sorted(known)


def test_g2aps_frames_show_several_people_and_nobody_twice(roots):
    frames = defaultdict(list)
    for row in truth(roots["G2APS-raw"]):
        frames[row["file"]].append(row)
    for file, rows in frames.items():
        letter = re.fullmatch(r"Image/SSM/([SD])[1-9]_\d\d_\d{6}\.jpg", file)[1]
        assert {row["view"] for row in rows} == {{"D": "aerial", "S": "ground"}[letter]}
        named = [row["identity"] for row in rows if row["identity"] is not None]
        assert 2 <= len(rows) <= 5 and len(set(named)) == len(named) >= 1
        assert len({row["split"] for row in rows}) == 1
    assert any(row["identity"] is None for rows in frames.values() for row in rows)


def test_g2aps_annotations_read_as_public_readers_do_name_the_people_of_truth(roots):
    root = roots["G2APS-raw"]
    annotation, protocol = root / "annotation", root / "annotation/test/train_test"
    boxes = {
        str(name[0]): [box[0].tolist() for box in rows[0]["idlocate"]]
        for name, count, rows in mat(annotation / "Images.mat", "Img").squeeze()
        if count[0, 0] == rows.shape[1]
    }
    rows, known, split = truth(root), {}, {}
    for row in rows:
        frame = Path(row["file"]).name
        assert boxes[frame][row["box"]] == row["bounds"]
        split[frame] = row["split"]
        if row["identity"] is not None:
            known[frame, tuple(row["bounds"])] = row["identity"]
    assert sum(map(len, boxes.values())) == len(rows) and set(boxes) == set(split)

    def named(scenes) -> list[tuple]:
        return [(str(name[0]), tuple(box[0].tolist())) for name, box, _ in scenes.squeeze()]

    people = mat(annotation / "Person.mat", "Person").squeeze()
    found = {key: i + 1 for i, item in enumerate(people) for key in named(item[2])}
    assert found == known and [str(p[0][0]) for p in people] == [f"p{i + 1}" for i in range(10)]
    pool = [str(name[0]) for name in mat(annotation / "pool.mat", "pool").squeeze()]
    assert set(pool) == {frame for frame, s in split.items() if s == "test"}
    train = mat(protocol / "Train.mat", "Train").squeeze()
    assert [named(item[0, 0][2]) for item in train] == [named(p[2]) for p in people[:7]]
    tests = mat(protocol / "TestG50.mat", "TestG50").squeeze()
    for number, item in zip((8, 9, 10), tests, strict=True):
        query = item["Query"]
        key = str(query["imname"][0, 0][0]), tuple(query["idlocate"][0, 0][0].tolist())
        assert known[key] == number and str(query["idname"][0, 0][0]) == f"p{number}"
        gallery = item["Gallery"].squeeze()
        sizes = [box.size for _, box, _ in gallery]
        assert sizes == sorted(sizes, reverse=True) and set(sizes) == {0, 4}
        hits = {(str(n[0]), tuple(b[0].tolist())) for n, b, _ in gallery if b.size}
        assert hits == {k for k, pid in known.items() if pid == number and k != key}
        assert {str(name[0]) for name, _, _ in gallery} <= set(pool)


@pytest.mark.parametrize("option", [("--val_ids", "60"), ("--val", "like_real")])
def test_options_of_val_are_refused(option, tmp_path, monkeypatch):
    argv = ["mini", "--layout", "G2APS-raw", "--out", str(tmp_path / "set"), *option]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match="G2APS-raw has no val split; leave --val and --val_ids"):
        main()


def test_the_command_reports_what_it_wrote(tmp_path, monkeypatch, capsys):
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    argv = ["mini", "--layout", LAYOUTS[0], "--out", str(tmp_path / "set"), *sizes, "--workers=1"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    count = len(list((tmp_path / "set").rglob("*.jpg")))
    assert f"set, {count} images of 2 identities, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_scipy_one_error_says_what_to_install(layout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install -r requirements-construction.txt"):
        render_raw(tmp_path / "set", layout, **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layout": "TBAGPR"}, "is none of AG-ReID-raw, G2APS-raw"), ({"pairs": 0}, "at least 1")],
)
def test_a_raw_source_that_cannot_be_rendered_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        render_raw(tmp_path / "set", **{"layout": LAYOUTS[0], **TINY, **options})
