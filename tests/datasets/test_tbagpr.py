import json

import pytest
from PIL import Image as PILImage

from datasets.tbagpr import SOURCES, read_tbagpr, vote
from utils.errors import UserError

TRAIN = "AG-ReID/agtext_train.json"
VAL = "G2APS-AG/g2aps_val.json"
TEST = "AG-ReID/agtext_test.json"


def edit(root, file, change):
    """Load a JSON file, let `change` alter (or replace) it, write it back."""
    path = root / file
    content = json.loads(path.read_text())
    replaced = change(content)
    path.write_text(json.dumps(content if replaced is None else replaced))


def test_sources_are_joined_and_identities_shifted(mini_root):
    data = read_tbagpr(mini_root)
    rows = [
        json.loads((mini_root / s.folder / s.json.format("train")).read_text()) for s in SOURCES
    ]
    first = len({row[0] for row in rows[0]})
    expected = [row[0] for row in rows[0]] + [row[0] + first for row in rows[1]]
    assert [s.pid for s in data.train] == expected
    assert data.num_identities == 8 and data.views == ("aerial", "ground")
    sample, row = data.train[len(rows[0])], rows[1][0]
    assert sample.caption == row[4]
    assert sample.image.path.endswith("/".join(["G2APS-AG", *row[2]]))
    assert sample.pair.path.endswith("/".join(["G2APS-AG", *row[3]]))
    test = data.splits["test"]
    assert len(set(test.image_pids)) == 6 and test.sources == ["AG-ReID", "G2APS-AG"]
    assert set(test.caption_pids) <= set(test.image_pids)
    sources = dict(
        zip(test.galleries["aerial"].pids, test.galleries["aerial"].sources, strict=True)
    )
    assert all(
        sources[p] == s for p, s in zip(test.caption_pids, test.caption_sources, strict=True)
    )


def test_votes_take_the_most_frequent_label_and_in_a_tie_the_first():
    labels = [
        (0, (0, 2, 1, 0, 1, 9, 9)),
        (0, (1, 2, 0, 1, 2, 9, 9)),
        (1, (1, 1, 1, 1, 1, 9, 9)),
        (0, (1, 0, 0, 2, 2, 9, 9)),
        (0, (0, 0, 1, 2, 0, 9, 9)),
    ]
    assert vote(labels) == {0: (0, 2, 1, 2, 2), 1: (1, 1, 1, 1, 1)}


def test_five_attributes_are_voted_aerial_first_and_two_are_kept_per_image(mini_copy):
    """Two samples of identity 0 have the genders 1, 0 (aerial) and 0, 1 (ground). In this tie the
    first aerial label wins."""
    rows = [r for r in json.loads((mini_copy / TRAIN).read_text()) if r[0] == 0]
    assert len(rows) == 2
    keys = [f"{r[k][0].split('/')[-1]}_{r[k][1][:-4]}" for k in (2, 3) for r in rows]
    labels = dict(zip(keys, ([1, 0, 0, 0, 0, 2, 1], [0, 1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 2, 2, 0]), strict=True))  # fmt: skip
    edit(mini_copy, "attrs.json", lambda old: [r for r in old if next(iter(r)) not in labels] + [{k: v} for k, v in labels.items()])  # fmt: skip
    samples = [s for s in read_tbagpr(mini_copy).train if s.pid == 0]
    voted = (1, 1, 0, 0, 0)
    assert [s.image.attributes for s in samples] == [(*voted, 2, 1), (*voted, 0, 1)]
    assert [s.pair.attributes for s in samples] == [(*voted, 1, 0), (*voted, 2, 0)]


def test_without_attributes_the_attribute_file_is_not_needed(mini_copy):
    (mini_copy / "attrs.json").unlink()
    data = read_tbagpr(mini_copy, attributes=False)
    assert data.attribute_names == () and data.train[0].image.attributes == ()


def first_image(root):
    return root / "AG-ReID" / "/".join(json.loads((root / TRAIN).read_text())[0][2])


def drop(key):
    return lambda content: content.pop(key) and None


def assign(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (TRAIN, lambda c: {}, f"{TRAIN}: expected a list of samples"),
        (TRAIN, assign(3, value=[1, 2]), f"{TRAIN}, sample 3: expected .pid, image_id"),
        (TRAIN, assign(2, 0, value=-1), f"{TRAIN}, sample 2: identity must be an integer"),
        (TRAIN, assign(2, 0, value="7"), f"{TRAIN}, sample 2: identity must be an integer"),
        (TRAIN, assign(2, 4, value=" \n"), f"{TRAIN}, sample 2: the caption ' .n' has no words"),
        (TRAIN, assign(2, 4, value="&nbsp;"), f"{TRAIN}, sample 2: the caption '&nbsp;' has no words"),
        (VAL, assign("captions", 1, value="&#32;"), f"{VAL}, caption 1: the caption .* has no words"),
        (TEST, assign("captions", 0, value="<end_of_text>"), f"{TEST}, caption 0: .* has no words"),
        (TEST, assign("captions", 0, value="a \ud83d man"), f"{TEST}, caption 0: .* half a character"),
        (TRAIN, assign(2, 4, value=""), f"{TRAIN}, sample 2: the caption is empty"),
        (TRAIN, assign(2, 4, value=None), f"{TRAIN}, sample 2: the caption is None"),
        (TRAIN, assign(2, 2, value="a.jpg"), f"{TRAIN}, sample 2: expected an image as"),
        (TRAIN, assign(2, 2, 1, value="no.jpg"), f"{TRAIN}, sample 2: image AG-ReID/.*no.jpg is mis"),
        (TRAIN, assign(2, 2, value=["../..", "passwd"]), "leaves the data set's folder"),
        (TRAIN, assign(2, 2, value=["/etc", "passwd"]), "leaves the data set's folder"),
        (TRAIN, lambda c: [r for r in c if r[0] != 1], f"{TRAIN}: identities must be .*; 1 is miss"),
        (VAL, drop("captions"), f"{VAL}: the list 'captions' is missing"),
        (VAL, lambda c: c["captions"].pop() and None, f"{VAL}: lists of different lengths"),
        (VAL, assign("captions", 1, value=""), f"{VAL}, caption 1: the caption is empty"),
        (VAL, assign("image_pids", 0, value=1.5), f"{VAL}, image 0: identity must be"),
        ("attrs.json", lambda c: c[1:], "attrs.json: no attributes for image '.*' .AG-ReID/.*sample 0"),
        ("attrs.json", lambda c: [{}], "attrs.json, entry 0: expected one .image key: labels"),
        ("attrs.json", lambda c: [{"k": [0] * 6}], "entry 0 .'k'.: expected 7 labels"),
        ("attrs.json", lambda c: [{"k": [0, 3, 0, 0, 0, 0, 0]}], "'k'.: age is 3; it must be 0 to 2"),
        ("attrs.json", lambda c: [{"k": [0, 0, 0, 0, 0, 0, True]}], "altitude is True"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_with_its_number(file, change, message, mini_copy):
    edit(mini_copy, file, change)
    with pytest.raises(UserError, match=message):
        read_tbagpr(mini_copy)


def test_a_contradiction_between_two_entries_is_refused(mini_copy):
    """The message names both entries. An image shows two people, in train and in a gallery; then an
    image has two labels."""
    originals = {name: (mini_copy / name).read_bytes() for name in (TRAIN, TEST, "attrs.json")}

    def refused(file, change, message):
        edit(mini_copy, file, change)
        with pytest.raises(UserError, match=message):
            read_tbagpr(mini_copy)
        (mini_copy / file).write_bytes(originals[file])

    refused(TRAIN, lambda c: assign(2, 2, value=c[0][2])(c),
            f"{TRAIN}, sample 2: the identity of .*jpg in train is 1, but 0 in {TRAIN}, sample 0; corr")  # fmt: skip
    refused(TEST, lambda c: assign("pair_img_paths", 2, value=c["pair_img_paths"][0])(c),
            rf"{TEST}, image 2: the identity of .* in test is \d+, but \d+ in {TEST}, image 0")  # fmt: skip

    def other_labels(rows):
        ((key, labels),) = rows[3].items()
        rows.append({key: [1 - labels[0], *labels[1:]]})

    refused("attrs.json", other_labels, "attrs.json, entry .*: the label of image .* in .*, entry 3; corr")  # fmt: skip


def test_repetitions_are_read_with_a_warning_for_each_kind(mini_copy):
    assert read_tbagpr(mini_copy).warnings == []
    edit(mini_copy, TRAIN, lambda c: c + [c[0], c[1]])
    edit(mini_copy, "attrs.json", lambda c: c + [c[5]])

    def repeat(lists):
        for name, values in lists.items():
            values.append(values[0 if "image" in name or "img" in name else 1])

    edit(mini_copy, TEST, repeat)
    first, second, third, fourth = read_tbagpr(mini_copy).warnings
    assert first.startswith("repeated: 1 labels in attrs.json (attrs.json, entry")
    assert second == f"repeated: 2 samples of train ({TRAIN}, sample 8 repeats {TRAIN}, sample 0)"
    assert third.startswith("repeated: 1 images of test, which count again (AG-ReID")
    assert fourth.startswith("repeated: 1 captions of test, which count again (AG-ReID")


def test_an_aerial_image_in_several_pairs_is_no_repetition(mini_copy):
    def another_pair(lists):
        lists["image_pids"].append(lists["image_pids"][0])
        lists["img_paths"].append(lists["img_paths"][0])
        lists["pair_img_paths"].append(lists["pair_img_paths"][1])

    edit(mini_copy, TEST, another_pair)
    edit(mini_copy, TRAIN, lambda c: c + [[*c[0][:3], c[1][3], c[1][4]]])
    assert read_tbagpr(mini_copy).warnings == []


def test_files_and_labels_are_found_despite_backslashes_and_jpeg_suffixes(mini_copy):
    plain = read_tbagpr(mini_copy)
    for stem_of in (
        lambda name: name[:-5],
        lambda name: name[:-4],
    ):  # the proper key; the original's
        folder, file = json.loads((mini_copy / TRAIN).read_text())[0][2]
        path = mini_copy / "AG-ReID" / folder / file
        longer = file.removesuffix(".jpg") + ".jpeg"
        (path.parent / longer).write_bytes(path.read_bytes())
        edit(mini_copy, TRAIN, assign(0, 2, value=[f".\\{folder}", longer]))
        old, new = f"{folder}_{file[:-4]}", f"{folder}_{stem_of(longer)}"
        keys = (mini_copy / "attrs.json").read_text()
        (mini_copy / "attrs.json").write_text(keys.replace(f'"{old}"', f'"{new}"'))
        sample = read_tbagpr(mini_copy).train[0]
        assert sample.image.path == str(path.parent / longer)
        assert sample.image.attributes == plain.train[0].image.attributes
        (mini_copy / "attrs.json").write_text(keys)
        edit(mini_copy, TRAIN, assign(0, 2, value=[folder, file]))


def test_missing_and_malformed_files_are_refused_with_their_names(mini_copy, tmp_path):
    with pytest.raises(
        UserError, match="--root_dir .*nowhere: no such folder; it must hold AG-ReID"
    ):
        read_tbagpr(tmp_path / "nowhere")
    with pytest.raises(UserError, match="folder AG-ReID and folder G2APS-AG are missing"):
        read_tbagpr(tmp_path / "mini/AG-ReID")
    with pytest.raises(UserError, match="folder G2APS-AG is missing"):
        (tmp_path / "one/AG-ReID").mkdir(parents=True)
        read_tbagpr(tmp_path / "one")
    (mini_copy / VAL).write_text('{"captions": [')
    with pytest.raises(UserError, match=f"{VAL}: malformed JSON: .*line 1"):
        read_tbagpr(mini_copy)
    (mini_copy / VAL).unlink()
    with pytest.raises(UserError, match=f"{VAL}: No such file"):
        read_tbagpr(mini_copy)


def test_a_missing_image_is_refused_while_reading(mini_copy):
    first_image(mini_copy).unlink()
    with pytest.raises(UserError, match=f"{TRAIN}, sample 0: image AG-ReID/.* is missing"):
        read_tbagpr(mini_copy)


def test_the_error_of_a_broken_image_names_file_and_entry(mini_copy):
    from datasets.transforms import load_image

    path = first_image(mini_copy)
    path.write_bytes(path.read_bytes()[:300])
    sample = read_tbagpr(mini_copy).train[0]
    with pytest.raises(UserError, match=f"{path} .{TRAIN}, sample 0.: the image cannot be read"):
        load_image(sample.image.path, (96, 32), sample.entry)
    PILImage.new("L", (30, 60), 128).save(path)  # grey images are fine
    assert load_image(str(path), (96, 32)).shape == (3, 96, 32)
