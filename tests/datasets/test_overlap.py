"""Which images and people two splits share."""

import json
import os
import shutil

import pytest

from datasets.overlap import overlap
from datasets.reading import same_content
from tests.helpers import read


def test_files_of_the_same_bytes_share_a_number(tmp_path):
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "d", tmp_path / "link")
    names = ["a", "b", "c", "d", "a", "e", "link", "missing", "gone", "missing"]
    assert same_content([str(tmp_path / n) for n in names]) == [0, 1, 0, 2, 0, 0, 2, 3, 4, 3]
    assert same_content([]) == []


def test_the_overlap_of_the_real_val_with_test_is_measured(like_real):
    """G2APS-AG's val is its test; AG-ReID's shows the same people, by the numbers in file names."""
    shared = overlap(read("AGDataAttr", like_real), "val")
    assert (shared.images, shared.of_images, shared.people, shared.of_people) == (8, 16, 4, 4)
    assert str(shared) == "val shares 8 of its 16 images and 4 of its 4 people with test"
    shared = overlap(read("AGTBPR", like_real), "val")
    assert shared and shared.images == 0 and shared.people == shared.of_people == 2
    assert shared.shared_people[0] == "person P0001"
    shared = overlap(read("G2APS", like_real), "val")
    assert shared.images == shared.of_images == 8 and shared.people == 2
    # Training shows one of AG-ReID's people under another identity.
    shared = overlap(read("AGTBPR", like_real), "train")
    assert shared.images == 0 and shared.shared_people == ["person P0001"]
    data = read("AGDataAttr", like_real, val_dataset="heldout", heldout=0.4)
    assert not overlap(data, "heldout")  # other people are held out first


def test_an_image_under_another_name_is_shared(mini_copy):
    lists = [json.loads((mini_copy / f"AG-ReID/agtext_{s}.json").read_text()) for s in ("val", "test")]  # fmt: skip
    val, test = ("/".join(x["img_paths"][0]) for x in lists)
    assert not overlap(read("AGDataAttr", mini_copy), "val")
    shutil.copy(mini_copy / "AG-ReID" / test, mini_copy / "AG-ReID" / val)
    shared = overlap(read("AGDataAttr", mini_copy), "val")
    assert (shared.images, shared.people) == (1, 1)
    assert shared.shared_images == [f"{mini_copy}/AG-ReID/{val} = {mini_copy}/AG-ReID/{test}"]
    assert shared.shared_people == [f"identity {lists[0]['image_pids'][0]} of val"]


@pytest.mark.parametrize("split", ["val", "train"])
def test_ids_that_mean_the_same_in_every_split_are_people(split, rendered, tmp_path):
    entries = json.loads((rendered("custom") / "dataset.json").read_text())
    ids = [next(e["id"] for e in entries if e["split"] == name) for name in (split, "test")]
    for entry in entries:
        entry["id"] = "anna" if entry["id"] in ids else entry["id"]
    for folder in ("aerial", "ground"):
        (tmp_path / folder).symlink_to(rendered("custom") / folder)
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    shared = overlap(read("custom", tmp_path), split)
    assert shared.images == 0 and shared.shared_people == ["id anna"]
