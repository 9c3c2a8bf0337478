"""The fingerprint of a data set, which a run stores."""

import json

import pytest

from datasets.fingerprint import changes, fingerprint
from tests.helpers import read


def alter(root, change, split="train"):
    file = root / f"AG-ReID/agtext_{split}.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


def test_moving_the_folder_does_not_change_it(mini_copy, tmp_path):
    before = fingerprint(read("AGDataAttr", mini_copy))
    assert before["counts"]["train"] == {"identities": 8, "captions": 16, "images": 32}
    moved = mini_copy.rename(tmp_path / "elsewhere")
    assert changes(before, fingerprint(read("AGDataAttr", moved))) == {}


@pytest.mark.parametrize("name", ["CUHK-PEDES", "AERI-PEDES", "TAG-PEDES", "custom"])
def test_another_path_to_the_folder_does_not_change_it(name, rendered, tmp_path):
    (tmp_path / name).symlink_to(rendered(name))
    linked = tmp_path if name != "custom" else tmp_path / name
    assert fingerprint(read(name, linked)) == fingerprint(read(name, rendered(name)))


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
def test_everything_that_training_sees_changes_it(change, mini_copy):
    before = fingerprint(read("AGDataAttr", mini_copy))
    alter(mini_copy, change)
    changed = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    assert list(changed) == ["train"]
    assert "8 identities, 16 captions, 3" in changed["train"] and " now" in changed["train"]


def test_labels_and_other_splits_change_it_and_counts_are_shown(mini_copy):
    before = fingerprint(read("AGDataAttr", mini_copy))

    def drop_last_caption(lists):
        for key in ("caption_pids", "captions"):
            lists[key] = lists[key][:-1]

    alter(mini_copy, drop_last_caption, "val")
    changed = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    count = before["counts"]["val"]["captions"]
    assert list(changed) == ["val"]
    assert f"{count} captions, 16 images then" in changed["val"]
    assert f"{count - 1} captions, 16 images now" in changed["val"]
    file = mini_copy / "attrs.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{key: [*v[:5], (v[5] + 1) % 3, v[6]] for key, v in row.items()} for row in rows]))  # fmt: skip
    changed = changes(before, fingerprint(read("AGDataAttr", mini_copy)))
    assert set(changed) == {"train", "val", "test"}
    assert "the same counts, but other" in changed["train"]
    held_out = fingerprint(read("AGDataAttr", mini_copy, val_dataset="heldout"))
    assert "no such split then" in changes(before, held_out)["heldout"]


@pytest.mark.parametrize(
    "then", [None, 3, {}, {"fingerprint": {}}, {"fingerprint": {}, "counts": 1}]
)
def test_a_checkpoint_without_a_fingerprint_gives_none(then, mini_root):
    assert changes(then, fingerprint(read("AGDataAttr", mini_root))) is None
