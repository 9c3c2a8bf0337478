import json

import pytest

from datasets.registry import datasets_table
from tests.helpers import ROOT, read
from utils.attributes import read_attributes
from utils.errors import UserError

FILES = {
    "CUHK-PEDES": "reid_raw.json",
    "ICFG-PEDES": "ICFG-PEDES.json",
    "RSTPReid": "data_captions.json",
    "custom": "dataset.json",
}
ATTRIBUTES = read_attributes(ROOT / "configs/attributes.yaml")


def edited(source, tmp_path, change, name="custom"):
    """A folder with changed entries and links to the images."""
    entries = json.loads((source / FILES[name]).read_text())
    changed = change(entries)
    entries = entries if changed is None else changed
    for folder in ("imgs", "aerial", "ground"):
        if (source / folder).is_dir():
            (tmp_path / folder).symlink_to(source / folder)
    (tmp_path / FILES[name]).write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("name", ["CUHK-PEDES", "ICFG-PEDES", "RSTPReid"])
def test_a_benchmark_is_read_completely(name, rendered):
    root = rendered(name)
    entries = json.loads((root / FILES[name]).read_text())
    data = read(name, root)
    key = "img_path" if name == "RSTPReid" else "file_path"
    first = 1 if name == "CUHK-PEDES" else 0
    train = [(e["id"] - first, c, e[key]) for e in entries if e["split"] == "train" for c in e["captions"]]  # fmt: skip
    samples = [(s.pid, s.caption, s.image.path.split("/imgs/")[1]) for s in data.train]
    assert samples == train and data.num_identities == 8 and len(train) == 32
    assert not data.has_pairs and data.views == ("ground",) and data.train[0].pair is None
    assert set(data.splits) == ({"test"} if name == "ICFG-PEDES" else {"val", "test"})
    test = [e for e in entries if e["split"] == "test"]
    split = data.splits["test"]
    assert split.captions == [c for e in test for c in e["captions"]]
    assert [i.path.split("/imgs/")[1] for i in split.galleries["ground"].images] == [
        e[key] for e in test
    ]
    numbers = {pid: n for n, pid in enumerate(sorted({e["id"] for e in test}))}
    assert split.galleries["ground"].pids == [numbers[e["id"]] for e in test]
    assert split.caption_pids == [numbers[e["id"]] for e in test for _ in e["captions"]]


def test_root_dir_may_be_the_folder_above_a_benchmark(rendered, tmp_path):
    (tmp_path / "RSTPReid").symlink_to(rendered("RSTPReid"))
    assert len(read("RSTPReid", tmp_path).train) == 32
    with pytest.raises(UserError, match="expected CUHK-PEDES/reid_raw.json and CUHK-PEDES/imgs/"):
        read("CUHK-PEDES", tmp_path)


def test_a_split_that_does_not_exist_is_refused(rendered):
    message = "--val_dataset val: ICFG-PEDES has only test; --val_dataset heldout takes some"
    with pytest.raises(UserError, match=message):
        read("ICFG-PEDES", rendered("ICFG-PEDES"), val_dataset="val")


def test_a_custom_data_set_may_have_pairs_and_attributes(rendered):
    root = rendered("custom")
    data = read("custom", root)
    entry = json.loads((root / "dataset.json").read_text())[0]
    assert data.has_pairs and data.attribute_classes == {a.name: len(a.classes) for a in ATTRIBUTES}
    sample = data.train[1]
    assert sample.caption == entry["captions"][1]
    assert sample.image.path == str(root / entry["image"])
    assert sample.pair.path == str(root / entry["pair_image"])
    for image, key in ((sample.image, "attributes"), (sample.pair, "pair_attributes")):
        named = {a.name: a.classes[v] for a, v in zip(ATTRIBUTES, image.attributes, strict=True)}
        assert named == entry[key]
    galleries = data.splits["test"].galleries
    assert {view: len(g.images) for view, g in galleries.items()} == {"image": 12, "pair image": 12}


def test_the_example_in_the_documentation_can_be_read(tmp_path):
    text = (ROOT / "docs/custom.md").read_text().split("```json")[1].split("```")[0]
    entries = json.loads(text)
    (tmp_path / "dataset.json").write_text(json.dumps([*entries, {**entries[0], "split": "test"}]))
    for path in ("aerial", "ground"):
        (tmp_path / path).mkdir()
        (tmp_path / path / "0001.jpg").touch()
    data = read("custom", tmp_path)
    assert len(data.train) == 2 and data.ids == {"train": ["anna"], "test": ["anna"]}


def test_a_custom_data_set_without_pairs_and_attributes_has_one_view(rendered, tmp_path):
    def strip(entries):
        for entry in entries:
            for key in ("pair_image", "attributes", "pair_attributes"):
                del entry[key]

    data = read("custom", edited(rendered("custom"), tmp_path, strip))
    assert not data.has_pairs and not data.attribute_classes


def assign(index, key, value):
    return lambda entries: entries[index].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: [], "dataset.json: expected a list of images"),
        (assign(2, "split", "dev"), "entry 2: split is 'dev'; it must be train, val, test"),
        (assign(2, "id", 1.5), "entry 2: id must be an integer or text, got 1.5"),
        (assign(2, "captions", []), "entry 2: captions must be a list of texts"),
        (assign(2, "captions", ["a man", " "]), "entry 2, caption 1: the caption ' ' has no words"),
        (lambda e: e[-1].update(captions=["&nbsp;"]), "entry .*, caption 0: the caption '&nbsp;' has no"),
        (assign(2, "id", "a\ud800"), "entry 2: id is 'a.ud800', with half a character"),
        (assign(-1, "id", "0"), r"entry \d+: the id 0 is '0', but 0 in dataset.json, entry 0; correct"),
        (lambda e: [{**x, "id": f"{x['id']}{' ' * (i % 2)}"} for i, x in enumerate(e)], "entry 1: the id 0 is '0 ', but '0' in"),
        (lambda e: e[2].update(image=e[0]["image"], attributes=e[0]["attributes"]), "entry 2: the identity of .* in train is 1, but 0 in dataset.json, entry 0"),
        (lambda e: e[1].update(image=e[0]["image"], attributes={**e[0]["attributes"], "gender": "male"}) or e[0]["attributes"].update(gender="female"), "entry 1: the label of .* in dataset.json, entry 0"),
        (assign(2, "image", "aerial/no.jpg"), "entry 2: image aerial/no.jpg is missing in"),
        (assign(2, "image", "../x.jpg"), "entry 2: image path ../x.jpg leaves the data set's folder"),
        (assign(2, "pair_image", 3), "entry 2: pair_image must be a path, got 3"),
        (assign(2, "attributes", {}), "entry 2, attributes: expected an object with gender, age"),
        (lambda e: e[2]["attributes"].update(age="teen"), "age is 'teen'; it must be one of adult"),
        (lambda e: e[2].pop("pair_image") and None, "entry 2: pair_image missing .needed in all"),
        (lambda e: e[0].pop("attributes") and None, "'attributes': needed in all entries or|'pair_attributes': needed"),
        (assign(2, "colour", "red"), "entry 2: 'colour': unknown"),
        (lambda e: [3, *e], "entry 0: captions, id, image, split missing"),
        (lambda e: [x for x in e if x["split"] != "test"], "no entry has the split 'test'"),
        (lambda e: [x for x in e if x["split"] != "train"], "no entry has the split 'train'"),
        (lambda e: [x if x["split"] != "test" else {**x, "captions": []} for x in e], "no test entry has a caption"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_with_its_number(change, message, rendered, tmp_path):
    with pytest.raises(UserError, match=message):
        read("custom", edited(rendered("custom"), tmp_path, change))


@pytest.mark.parametrize("name", ["custom", "CUHK-PEDES"])
def test_repetitions_are_read_with_a_warning_for_each_kind(name, rendered, tmp_path):
    assert read(name, rendered(name)).warnings == []

    def repeat(entries):
        entries[0]["captions"].append(entries[0]["captions"][0])
        return [*entries, entries[-1]]

    file, warnings = (
        FILES[name],
        read(name, edited(rendered(name), tmp_path, repeat, name)).warnings,
    )
    last = len(json.loads((tmp_path / file).read_text())) - 1
    assert warnings == [
        f"repeated: 1 samples of train ({file}, entry 0 repeats {file}, entry 0)",
        f"repeated: 1 images of test, which count again ({file}, entry {last} repeats {file}, entry {last - 1})",
        f"repeated: 2 captions of test, which count again ({file}, entry {last} repeats {file}, entry {last - 1})",
    ]  # fmt: skip


def test_a_custom_folder_without_dataset_json_is_refused_with_a_link_to_the_documentation(tmp_path):
    with pytest.raises(
        UserError, match=r"expected dataset.json or dataset.jsonl there \(docs/custom.md\)"
    ):
        read("custom", tmp_path)


@pytest.mark.parametrize(("views", "aerial", "ground"), [("a", 1, 0), ("g", 0, 1), ("ag", 1, 1)])
def test_single_images_of_tbagpr_become_samples(views, aerial, ground, mini_root):
    both, data = read("AGData", mini_root), read("AGSGData", mini_root, views=views)
    images = [*[s.image for s in both.train] * aerial, *[s.pair for s in both.train] * ground]
    assert [s.image for s in data.train] == images and not data.has_pairs
    assert {s.caption for s in data.train} == {s.caption for s in both.train}
    original, split = both.splits["test"], data.splits["test"]
    (gallery,) = split.galleries.values()
    first, second = original.galleries.values()
    assert gallery.images == [*first.images * aerial, *second.images * ground]
    assert gallery.pids == [*first.pids * aerial, *second.pids * ground]
    assert split.captions == original.captions and len(gallery.sources) == len(gallery.images)


def test_one_source_of_tbagpr_can_be_read_without_the_other(mini_root, mini_copy):
    joined = read("AGDataAttr", mini_root)
    for name, source in (("AGTBPR", 0), ("G2APS", 1)):
        data = read(name, mini_root)
        folder = joined.splits["test"].sources[source]
        assert {s.entry.split("/")[0] for s in data.train} == {folder}
        assert {s.pid for s in data.train} == set(range(4)) and data.attribute_classes
        split = joined.splits["test"]
        pairs = zip(split.captions, split.caption_sources, strict=True)
        assert data.splits["test"].captions == [c for c, s in pairs if s == source]
    (mini_copy / "attrs.json").unlink()
    (mini_copy / "G2APS-AG").rename(mini_copy / "elsewhere")
    assert not read("AGTBPR", mini_copy).attribute_classes


def test_the_option_views_is_only_for_single_images(mini_root):
    with pytest.raises(
        UserError, match="--views a: only for AGSGData, not for --dataset_name AGData"
    ):
        read("AGData", mini_root, views="a")


def test_the_table_of_data_sets_in_the_documentation_is_current():
    assert datasets_table() in (ROOT / "docs/data.md").read_text()
