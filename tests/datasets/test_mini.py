"""The rendered data set: files, keys, labels, captions, and the effect of labels on pixels."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.mini import render, render_people
from datasets.mini.build import sample_pair, sample_people
from datasets.mini.captions import COLOUR_WORDS, LOWER_WORDS, UPPER_WORDS, caption
from datasets.mini.people import COLOURS, sample_person
from datasets.mini.view import FRONT, View, paint, sample_view

SIZES = {"train_ids": 4, "val_ids": 2, "test_ids": 2, "pairs": 2}
NAMES = {"AG-ReID": "agtext", "G2APS-AG": "g2aps"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "set"
    assert render(folder, seed=0, workers=1, **SIZES)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def load(root: Path, source: str, split: str):
    return json.loads((root / source / f"{NAMES[source]}_{split}.json").read_text())


def images(root: Path) -> dict[tuple[str, str], list[tuple[list[str], bool]]]:
    """(path, aerial) of every image named in the JSON files, by source and split."""
    paths = {}
    for source in NAMES:
        train = load(root, source, "train")
        paths[source, "train"] = [(r[2 + i], i == 0) for r in train for i in (0, 1)]
        for split in ("val", "test"):
            data = load(root, source, split)
            paths[source, split] = [(p, True) for p in data["img_paths"]]
            paths[source, split] += [(p, False) for p in data["pair_img_paths"]]
    return paths


def key(source: str, path: list[str]) -> str:
    return f"{path[0]}_{path[1][:-4]}" if source == "AG-ReID" else "/".join(path)[-22:]


def attributes(root: Path) -> dict[str, list[int]]:
    pairs = [next(iter(entry.items())) for entry in json.loads((root / "attrs.json").read_text())]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_files_depend_on_the_seed_and_not_on_workers(root, tmp_path):
    render(tmp_path / "two", seed=0, workers=2, **SIZES)
    assert files(tmp_path / "two") == files(root)
    render(tmp_path / "other", seed=1, workers=1, **SIZES)
    other = files(tmp_path / "other")
    assert other.keys() == files(root).keys()
    assert not any(other[f] == data for f, data in files(root).items() if f.endswith(".jpg"))


def test_layout_of_the_json_files(root):
    for source in NAMES:
        train = load(root, source, "train")
        assert len(train) == 2 * 2
        assert [r[1] for r in train] == list(range(len(train)))
        assert {r[0] for r in train} == set(range(2))
        assert all(len(r) == 5 and isinstance(r[4], str) for r in train)
        for split in ("val", "test"):
            data = load(root, source, split)
            names = ("image_pids", "img_paths", "pair_img_paths", "caption_pids", "captions")
            assert tuple(data) == names
            assert len(data["image_pids"]) == len(data["img_paths"]) == len(data["pair_img_paths"])
            assert len(data["caption_pids"]) == len(data["captions"]) != len(data["image_pids"])
            assert set(data["caption_pids"]) == set(data["image_pids"])


def test_every_image_exists_and_has_its_attributes_once(root):
    keys, attrs = [], attributes(root)
    for (source, _), entries in images(root).items():
        for path, aerial in entries:
            assert len(path) == 2 and path[1].endswith(".jpg")
            assert source == "AG-ReID" or len(path[1]) == 22
            with Image.open(root.joinpath(source, *path)) as image:
                image.load()
                assert image.format == "JPEG" and image.mode == "RGB"
            keys.append(key(source, path))
            assert attrs[keys[-1]][6] == int(aerial)
    assert Counter(keys) == Counter(attrs.keys())
    assert len(list(root.rglob("*.jpg"))) == len(keys)


def test_labels_are_in_range_and_four_are_equal_in_both_views(root):
    labels = np.array(list(attributes(root).values()))
    assert labels.min() >= 0 and (labels.max(axis=0) < (2, 3, 2, 3, 3, 3, 2)).all()
    attrs = attributes(root)
    for record in load(root, "AG-ReID", "train"):
        aerial, ground = (attrs[key("AG-ReID", path)] for path in record[2:4])
        assert [aerial[i] for i in (0, 1, 3, 4)] == [ground[i] for i in (0, 1, 3, 4)]


def test_identities_are_disjoint_and_look_different(root):
    for source in NAMES:
        train = {r[0] for r in load(root, source, "train")}
        val, test = (set(load(root, source, s)["image_pids"]) for s in ("val", "test"))
        assert not (train & val or train & test or val & test)
    for split, count in enumerate((480, 61, 120)):
        people = sample_people(0, split, count)
        assert len({person.look for _, _, person in people}) == count
        assert sum(source == 0 for source, _, _ in people) == (count + 1) // 2


def test_splits_can_be_as_in_the_real_data(like_real):
    """G2APS-AG's val is its test; AG-ReID's val shows test's people in other images, and one of
    them is in training, too."""
    texts = [(like_real / f"G2APS-AG/g2aps_{s}.json").read_text() for s in ("val", "test")]
    assert texts[0] == texts[1]
    val, test = (load(like_real, "AG-ReID", s) for s in ("val", "test"))
    assert set(val["image_pids"]) == set(test["image_pids"])
    names = {s: {file for _, file in x["img_paths"]} for s, x in (("val", val), ("test", test))}
    names["train"] = {row[2][1] for row in load(like_real, "AG-ReID", "train")}
    assert not names["val"] & names["test"]
    people = {s: {re.fullmatch(r"P(\d{4})T\d{5}A0C0F\d+\.jpg", n)[1] for n in x} for s, x in names.items()}  # fmt: skip
    assert people["val"] == people["test"] and people["train"] & people["test"] == {"0001"}
    keys = attributes(like_real)
    for (source, _), entries in images(like_real).items():
        for path, _ in entries:
            assert like_real.joinpath(source, *path).is_file() and key(source, path) in keys
            assert source == "AG-ReID" or len(path[1]) == 22


@pytest.mark.parametrize(
    ("layout", "names"),
    [("AERI-PEDES", ("train_caption", "test_caption")), ("TAG-PEDES", ("train_reid", "test_reid"))],
)
def test_layouts_with_a_file_for_train_and_one_for_test_have_no_val(layout, names, tmp_path):
    sizes = {"train_ids": 3, "test_ids": 2, "pairs": 2, "layout": layout}
    for folder, workers in (("one", 1), ("two", 2)):
        render(tmp_path / folder, seed=0, workers=workers, **sizes)
    written = files(tmp_path / "one")
    assert written == files(tmp_path / "two")
    made = sorted(f for f in written if f.endswith(".jpg"))
    assert sorted(set(written) - set(made)) == sorted(["mini.json", *(f"{n}.json" for n in names)])
    named, ids = [], []
    for name in names:
        for row in json.loads(written[f"{name}.json"]):
            one = [row[key] for key in ("aerial_img", "ground_img", "file_path") if key in row]
            named += [*one, *row.get("file_paths", []), *row.get("ground_file_paths", [])]
            ids.append(row["pid" if layout == "AERI-PEDES" else "id"])
    assert sorted(path.removeprefix("AERI-PEDES/") for path in named) == made
    assert len(made) == 2 * 2 * (3 + 2)
    assert sorted(set(ids)) == list(range(min(ids), min(ids) + 5))
    assert min(ids) == int(layout == "AERI-PEDES") and "val_ids" not in json.loads(written["mini.json"])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": "real"}, "val real is none of disjoint, like_real"),
        ({"val": "like_real", "layout": "custom"}, "only for the layout TBAGPR"),
        ({"val": "like_real", "val_ids": 3}, "val_ids must equal test_ids"),
    ],
)
def test_a_val_that_cannot_be_rendered_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        render(tmp_path / "set", **{**SIZES, **options})
    assert not (tmp_path / "set").exists()


def test_the_light_of_an_image_is_mostly_that_of_its_identity():
    people = sample_people(0, 0, 400)
    pairs = [(p, sample_pair(0, 0, s, i, 0, p)[0]) for s, i, p in people]
    same = np.mean([view.dim == person.light for person, views in pairs for view in views])
    assert 0.85 < same < 0.95


@pytest.fixture(scope="module")
def captions() -> list[tuple]:
    """(person, caption) of many pairs."""
    rows = []
    for i in range(3000):
        rng = np.random.default_rng(i)
        person = sample_person(rng)
        views = tuple(sample_view(rng, person, i % 2, aerial) for aerial in (True, False))
        rows.append((person, caption(person, views, rng)))
    return rows


def test_captions_have_the_intended_lengths(captions):
    words = np.array([len(text.split()) for _, text in captions])
    long = words > 50
    assert 0.01 < long.mean() < 0.035
    assert words.min() >= 15 and words[long].min() >= 80 and words.max() <= 110
    assert len({text for _, text in captions}) > 0.99 * len(captions)


def test_captions_are_correct_english(captions):
    for _, text in captions:
        assert text[0].isupper() and text.endswith(".") and text.isascii()
        assert not re.search(
            r"\b[Aa] (?!univ)[aeiou]|\b[Aa]n [^aeiou]|  |\.\.| ,|,,|[a-z]\. [a-z]", text
        ), text


def colours_before(text: str, nouns: tuple[str, ...]) -> str | None:
    """The words between the article (or comma) and the garment's noun."""
    for noun in sorted(nouns, key=len, reverse=True):
        match = re.search(
            rf"(?:^|,|\band|\b[Aa]n?|\bpair of|\bwears|\bin)((?: [\w-]+){{1,7}}?) {noun}\b", text
        )
        if match:
            return match.group(1)
    return None


def test_captions_name_the_true_colours(captions):
    named = 0
    for person, text in captions:
        for nouns, colour in (
            (UPPER_WORDS[person.upper], person.upper_colour),
            (LOWER_WORDS[person.lower], person.lower_colour),
        ):
            before = colours_before(text, nouns)
            if before is not None:
                named += 1
                words = COLOUR_WORDS.get(colour, (colour,))
                assert any(word in before for word in words), (text, before, colour)
    assert named > 1.9 * len(captions)


def view_of(**changes) -> View:
    base = View(
        source=0, aerial=False, angle=FRONT, yaw=np.pi, dim=0, phase=0.5, stride=0.1,
        size=(90, 220), elevation=0.1, roll=0.0, span=2.1, centre=(0.5, 0.5),
        occluder="none", seed=7,
    )  # fmt: skip
    return replace(base, **changes)


def silhouette(person, view: View) -> np.ndarray:
    """Where the person changes the picture, [H, W] bool, without the faint shadow on the ground."""
    with_person, without = (np.asarray(paint(p, view), int) for p in (person, None))
    return np.abs(with_person - without).max(axis=2) > 60


def people(count: int = 5):
    plain = {"bag": "none", "hat": "none", "item": "none", "age": 0, "upper_colour": "red"}
    return [replace(sample_person(np.random.default_rng(i)), **plain) for i in range(count)]


def test_pictures_in_dim_light_are_darker():
    for person in people():
        for aerial in (False, True):
            bright, dim = (
                np.mean(paint(person, view_of(aerial=aerial, dim=dim))) for dim in (0, 1)
            )
            assert dim < 0.75 * bright


def test_weight_and_height_are_visible():
    for person in people():
        area = [silhouette(replace(person, weight=w), view_of()).sum() for w in (1, 0, 2)]
        assert area[0] < area[1] < area[2] and area[2] > 1.2 * area[0]
        rows = [
            np.flatnonzero(silhouette(replace(person, height=h), view_of()).sum(axis=1) > 2)
            for h in (2, 0, 1)
        ]
        extent = [r.max() - r.min() for r in rows]
        assert extent[0] < extent[1] < extent[2] and extent[2] > 1.12 * extent[0]


def test_the_colour_of_clothes_is_visible_in_both_views():
    for colour in ("red", "blue", "green", "yellow"):
        person = replace(people(1)[0], upper="sweater", sleeve="long", pattern="plain",
                         upper_colour=colour, opened=False)  # fmt: skip
        for view in (view_of(), view_of(aerial=True, elevation=0.85, size=(60, 120))):
            pixels = np.asarray(paint(person, view), float)
            height, width = pixels.shape[:2]
            chest = pixels[
                int(0.34 * height) : int(0.44 * height), 4 * width // 10 : 6 * width // 10
            ]
            seen = np.median(chest, axis=(0, 1))
            distance = {name: np.abs(rgb - seen).sum() for name, rgb in COLOURS.items()}
            assert min(distance, key=distance.get) == colour


def test_views_differ_in_size_and_shape():
    for source in (0, 1):
        sizes = {
            aerial: np.array([
                sample_view(np.random.default_rng(i), people(1)[0], source, aerial).size
                for i in range(40)
            ])
            for aerial in (True, False)
        }  # fmt: skip
        shape = {aerial: size[:, 0] / size[:, 1] for aerial, size in sizes.items()}
        assert sizes[True][:, 1].max() < sizes[False][:, 1].min()
        assert shape[True].min() > shape[False].max()
        assert len({tuple(s) for s in sizes[True]}) > 10


def test_render_people_returns_captions_and_attributes_of_each_pair(tmp_path):
    pairs = render_people(tmp_path, identities=3, pairs=2, seed=1)
    assert [pair.identity for pair in pairs] == [0, 0, 1, 1, 2, 2]
    assert sorted(files(tmp_path)) == sorted(
        p for pair in pairs for p in (pair.aerial, pair.ground)
    )
    for pair in pairs:
        assert Image.open(tmp_path / pair.aerial).height < Image.open(tmp_path / pair.ground).height
        assert (
            len(pair.captions) == 3 and pair.attributes["gender"] == pair.pair_attributes["gender"]
        )
        assert (pair.attributes["altitude"], pair.pair_attributes["altitude"]) == ("above", "level")
    assert render_people(tmp_path / "again", identities=3, pairs=2, seed=1) == pairs
    assert render_people(tmp_path / "other", identities=3, pairs=2, seed=2) != pairs


def test_a_complete_set_is_kept_and_other_folders_are_not_overwritten(root, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    assert not render(root, seed=0, workers=1, **SIZES)
    with pytest.raises(FileExistsError, match="remove it"):
        render(root, seed=5, workers=1, **SIZES)
    assert before == {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        render(tmp_path / "mine", workers=1, **SIZES)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    small = {"train_ids": 1, "val_ids": 1, "test_ids": 1, "pairs": 1}
    assert render(tmp_path / "mine", workers=1, force=True, **small)
    assert not (tmp_path / "mine" / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
