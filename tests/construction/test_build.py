"""The whole way: raw sources to a data set that trains."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

import build_dataset
import train
from construction import quality
from construction.build import Build
from construction.recipe import Recipe
from datasets.mini import render_raw
from tests.construction.server import ModelServer
from tests.helpers import read, run
from tools import check_dataset
from utils.errors import UserError
from utils.files import read_file

RECIPE = "configs/construction/mini.yaml"
LAYOUTS = {"AG-ReID": "AG-ReID-raw", "G2APS": "G2APS-raw"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Both raw sources, of 20 people each."""
    root = tmp_path_factory.mktemp("raw")
    for name, layout in LAYOUTS.items():
        render_raw(root / name, layout, train_ids=14, test_ids=6, pairs=2, workers=1)
    return root


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    """The data set of the recipe `mini`."""
    output = tmp_path_factory.mktemp("built") / "set"
    build(raw, output)
    return output


def build(raw, to, shard=(1, 1), until="", force=False, workers=1, **changes):
    content = yaml.safe_load(Path(RECIPE).read_text())
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    paths = {"ag_reid": raw / "AG-ReID", "g2aps": raw / "G2APS"}
    recipe = Recipe.model_validate(content)
    Build(recipe, paths, to, shard, workers).run(until, force)


def manifest(folder):
    return (folder / "manifest.sha256").read_text()


def picture_name(source, row):
    """The name that a row of the truth has in the data set."""
    if source == "AG-ReID":
        return row["file"]
    return f"img/{Path(row['file']).stem}_{row['box']:05d}.jpg"


def test_every_planted_fault_is_found_and_no_good_picture_is_lost(raw, built):
    with open(built / "construction/removed.csv", newline="") as file:
        removed = {(row["source"], row["picture"]): row for row in csv.DictReader(file)}
    wanted = {
        "truncated": {"broken"}, "dark": {"dark"}, "bright": {"bright"}, "small": {"small"},
        "blurry": {"blurry"}, None: set(),
    }  # fmt: skip
    found: Counter = Counter()
    for source, folder in (("AG-ReID", "AG-ReID"), ("G2APS-AG", "G2APS")):
        rows = json.loads(read_file(raw / folder / "mini-raw.json"))
        repeated_ones = {
            (source, picture_name(source, row["of"])) for row in rows if row["fault"] == "duplicate"
        }
        for row in (row for row in rows if row["identity"] is not None):
            name = picture_name(source, row)
            gone = removed.get((source, name))
            reason = {gone["reason"]} if gone and gone["stage"] == "quality" else set()
            if row["fault"] == "duplicate":  # of the two, the sharper one stays
                other = picture_name(source, row["of"])
                assert reason == {"repeated"} or removed[source, other]["reason"] == "repeated"
            elif reason == {"repeated"}:  # a good one may be the less sharp of two
                assert not row["fault"] and (source, name) in repeated_ones, name
            else:
                assert reason == wanted[row["fault"]], name
            found[row["fault"]] += 1
    assert set(found) == {*wanted, "duplicate"}


def test_the_data_set_is_read_checked_and_trains(built, monkeypatch, tmp_path, capsys):
    argv = "--dataset_name", "AGDataAttr", "--root_dir", str(built)
    with pytest.raises(SystemExit, match="0"):
        run(check_dataset.main, monkeypatch, *argv)
    assert "pass" in capsys.readouterr().out
    run(
        train.main, monkeypatch, "--config_file", "configs/mini.yaml", "--root_dir", str(built),
        "--output_dir", str(tmp_path), "--num_epoch", "2", "--batch_size", "16",
        "--num_instance", "2", "--image_cache", "", "--num_workers", "0",
    )  # fmt: skip
    assert list(tmp_path.glob("*/*/best.pth"))


def test_nobody_is_in_two_splits_whatever_their_clothes(built):
    people = {}
    for split in ("train", "val", "test"):
        content = json.loads((built / "AG-ReID" / f"agtext_{split}.json").read_text())
        paths = [row[2] for row in content] if split == "train" else content["img_paths"]
        people[split] = {name[:5] for _, name in paths}
        assert people[split]
    assert not people["train"] & people["test"] and not people["val"] & people["test"]
    assert not people["train"] & people["val"]


def test_each_identity_has_as_many_aerial_as_ground_pictures(built):
    rows = json.loads((built / "G2APS-AG" / "g2aps_train.json").read_text())
    pids = sorted({row[0] for row in rows})
    assert pids == list(range(len(pids)))
    for pid in pids:
        of = [row for row in rows if row[0] == pid]
        assert len({r[2][1] for r in of}) == len({r[3][1] for r in of}) == len(of)
        assert all(r[2][1][0] == "D" and r[3][1][0] == "S" for r in of)


def test_the_same_recipe_gives_the_same_bytes_anew_and_from_the_store(raw, built, tmp_path):
    build(raw, tmp_path / "again", workers=2)
    assert manifest(tmp_path / "again") == manifest(built)
    shutil.rmtree(tmp_path / "again")
    build(raw, tmp_path / "again")
    assert manifest(tmp_path / "again") == manifest(built)
    shutil.copytree(raw, tmp_path / "elsewhere", copy_function=shutil.copy)
    build(tmp_path / "elsewhere", tmp_path / "third")
    assert manifest(tmp_path / "third") == manifest(built)


def test_the_manifest_names_every_file(built):
    files = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    listed = {line.split("  ", 1)[1] for line in manifest(built).splitlines()}
    assert files - listed == {"manifest.sha256"} and listed <= files


def test_shares_of_the_stages_give_the_same_data_set(raw, built, tmp_path):
    output = tmp_path / "set"
    sentence = (
        "A {} in a red jacket, blue jeans and black shoes carries a bag on the left shoulder."
    )
    with ModelServer(lambda *_: sentence.format("man")) as server:
        asks = {
            "captions": {"by": "vision"},
            "models": {"endpoints": [{"url": server.url, "model": "tiny"}]},
        }
        build(raw, tmp_path / "alone", **asks)
        answers = sum(server.answered.values())
        with pytest.raises(UserError, match="are not measured yet; run the other shares first"):
            build(raw, output, (1, 2), "captions", **asks)
        for until in ("measure", "captions"):
            for share in ((1, 2), (2, 2)):
                build(raw, output, share, until, **asks)
        assert sum(server.answered.values()) == 2 * answers
    build(raw, output, **asks)  # all answers are there
    assert manifest(output) == manifest(tmp_path / "alone")
    prompt = (output / "construction/prompts/vision.txt").read_text()
    assert prompt == Path("configs/construction/prompts/vision.txt").read_text().strip() + "\n"


def test_the_quantile_of_sharpness_is_one_of_the_pictures_that_can_be_used(raw, tmp_path):
    quantiles = {view: {"quantile": 0.1} for view in ("aerial", "ground")}
    build(raw, tmp_path / "set", quality={"sharpness": quantiles})
    with open(tmp_path / "set/construction/removed.csv", newline="") as file:
        gone = Counter((row["source"], row["reason"]) for row in csv.DictReader(file))
    total = sum(1 for _ in (raw / "AG-ReID").glob("*/*.jpg"))
    unusable = sum(gone["AG-ReID", r] for r in ("broken", "small", "dark", "bright"))
    assert abs(gone["AG-ReID", "blurry"] - 0.1 * (total - unusable)) <= 2 < unusable


def test_a_picture_that_could_not_be_opened_is_measured_when_it_can(raw, tmp_path, monkeypatch):
    refused = ["query_all_c3"]

    def refuse(digest, path, real=quality.add_to_hash):
        if any(part in str(path) for part in refused):
            raise PermissionError(13, "Permission denied")
        real(digest, path)

    monkeypatch.setattr(quality, "add_to_hash", refuse)
    build(raw, tmp_path / "set")
    assert ",unreadable," in (tmp_path / "set/construction/removed.csv").read_text()
    refused.clear()
    build(raw, tmp_path / "set", force=True)
    assert ",unreadable," not in (tmp_path / "set/construction/removed.csv").read_text()


def test_an_identity_of_two_persons_is_refused(tmp_path):
    lines = [f"{i}.jpg,7,{view},{'ab'[i % 2]}" for i, view in enumerate(["aerial", "ground"] * 2)]
    (tmp_path / "t.csv").write_text("\n".join(["path,identity,view,person", *lines]))
    content = {"sources": [{"name": "own", "reader": "table"}], "output": {"layout": "custom"}}
    content["captions"] = {"by": "vision"}
    content["models"] = {"endpoints": [{"url": "http://127.0.0.1:1/v1", "model": "x"}]}
    made = Build(Recipe.model_validate(content), {"table": tmp_path / "t.csv"}, tmp_path / "set")
    with pytest.raises(UserError, match="own: the identity 7 is of several persons: a,b"):
        made.run()


def test_stages_that_ask_nothing_have_no_shares(raw, tmp_path):
    with pytest.raises(UserError, match="--until captions: a grammar writes them"):
        build(raw, tmp_path / "set", until="captions")
    with pytest.raises(UserError, match="--until labels: none of the recipe's origins asks"):
        build(raw, tmp_path / "set", until="labels")


def test_a_changed_picture_is_measured_again(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    build(tmp_path / "raw", tmp_path / "one")
    content = json.loads((tmp_path / "one/AG-ReID/agtext_train.json").read_text())
    name = "/".join(content[0][2])
    (tmp_path / "raw/AG-ReID" / name).write_bytes(b"no picture")
    (tmp_path / "one.work").rename(tmp_path / "two.work")
    build(tmp_path / "raw", tmp_path / "two")
    removed = (tmp_path / "two/construction/removed.csv").read_text()
    assert f"AG-ReID,{name}," in removed and "quality,broken" in removed


def test_the_sources_own_splits_are_kept_and_the_overlap_is_told(raw, tmp_path):
    build(raw, tmp_path / "set", splits={"by": "source", "val": 0.1})
    card = (tmp_path / "set" / "card.md").read_text()
    assert "its own splits are used, and" in card and "are in train too, such as P" in card
    rows = json.loads((tmp_path / "set/AG-ReID/agtext_train.json").read_text())
    assert {row[2][0] for row in rows} == {"bounding_box_train"}


def test_a_column_that_no_source_has_is_told_if_the_label_can_come_from_elsewhere(
    raw, tmp_path, capsys
):
    columns = {"gendermal": {2: "male"}}
    rule = {"origins": ["annotation"], "columns": columns, "default": "female"}
    build(raw, tmp_path / "set", attributes={"gender": rule})
    text = "attributes.gender.columns: no source has the column 'gendermal'"
    assert f"warning: {text}. Did you mean 'gendermale'" in capsys.readouterr().out
    assert text in (tmp_path / "set" / "card.html").read_text().replace("&#39;", "'")


def test_links_point_at_the_raw_pictures_and_crops_are_copied(raw, tmp_path):
    build(raw, tmp_path / "set", output={"files": "link"})
    linked = [p for p in (tmp_path / "set/AG-ReID").rglob("*.jpg")]
    crops = [p for p in (tmp_path / "set/G2APS-AG").rglob("*.jpg")]
    assert linked and all(p.is_symlink() and p.exists() for p in linked)
    assert crops and not any(p.is_symlink() for p in crops)


def test_the_layout_custom_has_the_same_pairs_and_labels(raw, built, tmp_path):
    build(raw, tmp_path / "set", output={"layout": "custom"})
    custom, tbagpr = read("custom", tmp_path / "set"), read("AGDataAttr", built)

    def samples(data):
        """Without light, which is voted per identity in TBAGPR alone."""
        return sorted(
            [
                ("/".join(Path(i.path).parts[-2:]), i.attributes[:2], i.attributes[3:])
                for i in s.images
            ]
            for s in data.train
        )

    assert samples(custom) == samples(tbagpr)
    assert custom.num_identities == tbagpr.num_identities


def test_a_folder_that_is_there_is_replaced_only_by_force_and_if_it_is_such_a_set(raw, tmp_path):
    build(raw, tmp_path / "set")
    before = manifest(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: exists; choose another folder, or replace it with"):
        build(raw, tmp_path / "set")
    build(raw, tmp_path / "set", force=True, seed=1)
    assert manifest(tmp_path / "set") != before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: exists; it is not a data set of this command"):
        build(raw, tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "set", "set.work"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quality": {"min_width": 5000}}, "quality: no picture is left .*small.*, such as .*under"),
        (
            {"attributes": {"gender": {"origins": ["annotation"], "columns": {"gendermal": {2: "male"}}}}},
            r"attributes.gender.columns: no source has the column 'gendermal'. Did you mean 'gendermale",
        ),
        ({"splits": {"test": 0.95, "val": 0.04}}, "the source .* has .* persons left, but val and test"),
    ],
)  # fmt: skip
def test_a_recipe_that_leaves_nothing_is_refused(raw, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build(raw, tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ag_reid", "x"], "the recipe has a source of g2aps: give its place by --g2aps"),
        (["--ag_reid", "x", "--g2aps", "y"], "x: no such folder"),
        (["--ag_reid", "x", "--g2aps", "y", "--images", "z"], "--images: the recipe has no such"),
        (["--shard", "1/2"], "--shard: name the stage with --until"),
        (["--workers", "0"], "--workers 0: at least 1"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, argv, message):
    with pytest.raises(UserError, match=message):
        run(
            build_dataset.main, monkeypatch,
            "--recipe", RECIPE, "--output", str(tmp_path / "set"), *argv,
        )  # fmt: skip
