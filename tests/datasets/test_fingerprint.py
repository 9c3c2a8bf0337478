"""What a run keeps of its data."""

import json

import pytest

from datasets.fingerprint import changes, fingerprint
from tests.helpers import read


def alter(root, change, split="train"):
    file = root / f"AG-ReID/agtext_{split}.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


def test_it_stays_when_the_folder_moves(mini_copy, tmp_path):
    before = fingerprint(read("AGDataAttr", mini_copy))
    assert before["counts"]["train"] == {"identities": 8, "captions": 16, "images": 32}
    moved = mini_copy.rename(tmp_path / "elsewhere")
    assert changes(before, fingerprint(read("AGDataAttr", moved))) == {}


@pytest.mark.parametrize("name", ["CUHK-PEDES", "custom"])
def test_it_stays_where_the_folder_is_named_in_another_way(name, rendered, tmp_path):
    (tmp_path / name).symlink_to(rendered(name))
    there = tmp_path if name != "custom" else tmp_path / name
    assert fingerprint(read(name, there)) == fingerprint(read(name, rendered(name)))


def swap_ids(rows):
    for row in rows:
        row[0] = {0: 1, 1: 0}.get(row[0], row[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0].__setitem__(4, "A man."),
        lambda rows: rows[::-1],
        lambda rows: rows[0].__setitem__(2, rows[1][2]),
        swap_ids,
    ],
    ids=["caption", "order", "image", "identities"],
)
def test_what_a_training_would_see_differently_changes_it(change, mini_copy):
    before = fingerprint(read("AGDataAttr", mini_copy))
    alter(mini_copy, change)
    found = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    assert list(found) == ["train"]
    assert "8 identities, 16 captions, 3" in found["train"] and " now" in found["train"]


def test_labels_and_other_splits_change_it_and_counts_tell(mini_copy):
    before = fingerprint(read("AGDataAttr", mini_copy))

    def shorter(lists):
        for key in ("caption_pids", "captions"):
            lists[key] = lists[key][:-1]

    alter(mini_copy, shorter, "val")
    found = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    count = before["counts"]["val"]["captions"]
    assert list(found) == ["val"]
    assert f"{count} captions, 16 images then" in found["val"]
    assert f"{count - 1} captions, 16 images now" in found["val"]
    file = mini_copy / "attrs.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{key: [*v[:5], (v[5] + 1) % 3, v[6]] for key, v in row.items()} for row in rows]))  # fmt: skip
    found = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    assert set(found) == {"train", "val", "test"} and "the same counts, but other" in found["train"]
    held = fingerprint(read("AGDataAttr", mini_copy, val_dataset="heldout"))
    assert "no such split then" in changes(before, held)["heldout"]


@pytest.mark.parametrize(
    "then", [None, 3, {}, {"fingerprint": {}}, {"fingerprint": {}, "counts": 1}]
)
def test_a_checkpoint_of_before_tells_nothing(then, mini_root):
    assert changes(then, fingerprint(read("AGDataAttr", mini_root))) is None
