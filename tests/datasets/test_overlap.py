"""What two splits share, measured."""

import json
import os
import shutil

import pytest

from datasets.files import same_content
from datasets.overlap import overlap
from tests.helpers import read


def test_files_of_the_same_bytes_share_a_number(tmp_path):
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "d", tmp_path / "link")
    names = ["a", "b", "c", "d", "a", "e", "link", "missing", "gone", "missing"]
    assert same_content([str(tmp_path / n) for n in names]) == [0, 1, 0, 2, 0, 0, 2, 3, 4, 3]
    assert same_content([]) == []


def test_the_real_datas_val_is_seen_for_what_it_is(like_real):
    """By source: G2APS-AG's val is its test; AG-ReID's shows the same people, by their numbers."""
    found = overlap(read("AGDataAttr", like_real), "val")
    assert (found.images, found.of_images, found.people, found.of_people) == (8, 16, 4, 4)
    assert str(found) == "val shares 8 of its 16 images and 4 of its 4 people with test"
    found = overlap(read("AGTBPR", like_real), "val")
    assert found and found.images == 0 and found.people == found.of_people == 2
    assert found.shared_people[0] == "person P0001"
    found = overlap(read("G2APS", like_real), "val")
    assert found.images == found.of_images == 8 and found.people == 2
    # Training shows one of them, under another identity.
    found = overlap(read("AGTBPR", like_real), "train")
    assert found.images == 0 and found.shared_people == ["person P0001"]
    data = read("AGDataAttr", like_real, val_dataset="heldout", heldout=0.4)
    assert not overlap(data, "heldout")  # enough others to draw


def test_a_picture_under_another_name_is_found(mini_copy):
    lists = [json.loads((mini_copy / f"AG-ReID/agtext_{s}.json").read_text()) for s in ("val", "test")]  # fmt: skip
    val, test = ("/".join(x["img_paths"][0]) for x in lists)
    assert not overlap(read("AGDataAttr", mini_copy), "val")
    shutil.copy(mini_copy / "AG-ReID" / test, mini_copy / "AG-ReID" / val)
    found = overlap(read("AGDataAttr", mini_copy), "val")
    assert (found.images, found.people) == (1, 1)
    assert found.shared_images == [f"{mini_copy}/AG-ReID/{val} = {mini_copy}/AG-ReID/{test}"]
    assert found.shared_people == [f"identity {lists[0]['image_pids'][0]} of val"]


@pytest.mark.parametrize("split", ["val", "train"])
def test_ids_that_mean_the_same_in_every_split_are_people(split, rendered, tmp_path):
    entries = json.loads((rendered("custom") / "dataset.json").read_text())
    mine = next(e["id"] for e in entries if e["split"] == split)
    theirs = next(e["id"] for e in entries if e["split"] == "test")
    for entry in entries:
        entry["id"] = "anna" if entry["id"] in (mine, theirs) else entry["id"]
    for folder in ("aerial", "ground"):
        (tmp_path / folder).symlink_to(rendered("custom") / folder)
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    found = overlap(read("custom", tmp_path), split)
    assert found.images == 0 and found.shared_people == ["id anna"]
