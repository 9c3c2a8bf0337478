"""Data sets written as shards are the data sets that they were, here and in WebDataset."""

import fcntl
import io
import json
import os
import shutil
import tarfile
from collections import Counter

import pytest
import webdataset

import tools.make_shards as tool
from datasets.overlap import overlap
from datasets.records import Data, Gallery, Image, Split, TrainSample
from datasets.shards import open_image
from tests.helpers import read, run
from tools.make_shards import entries_of
from utils.errors import UserError
from utils.files import lock

SETS = [
    ("AGDataAttr", {}), ("AGSGData", {"views": "ag"}), ("G2APS", {}), ("CUHK-PEDES", {}),
    ("ICFG-PEDES", {}), ("RSTPReid", {}), ("AERI-PEDES", {}), ("TAG-PEDES", {}), ("custom", {}),
]  # fmt: skip


def make(monkeypatch, output, name, root, *more):
    argv = ["--output", output, "--dataset_name", name, "--root_dir", root, *more]
    run(tool.main, monkeypatch, *argv)
    return output


def index(monkeypatch, folder, *more):
    run(tool.main, monkeypatch, "--index", folder, "--workers", 1, *more)
    return [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]


def content(image):
    with open_image(image.path) as file:
        return file.read(), image.attributes


def samples(data):
    """What training sees: identity, caption, bytes and labels of the images."""
    return [(s.pid, s.caption, *map(content, s.images)) for s in data.train]


def split_content(split):
    """What an evaluation depends on: the identities of captions and of images, as multisets. They
    are numbered anew, in the same order."""
    rank = {pid: i for i, pid in enumerate(sorted({*split.image_pids, *split.caption_pids}))}
    captions = zip(split.captions, split.caption_pids, strict=True)
    return Counter((caption, rank[pid]) for caption, pid in captions), [
        [(content(i), rank[p]) for i, p in zip(g.images, g.pids, strict=True)]
        for g in split.galleries.values()
    ]


def add_jpg(tar, name, value=b"an image"):
    info = tarfile.TarInfo(name)
    info.size = len(value)
    tar.addfile(info, io.BytesIO(value))


@pytest.fixture
def shard(tmp_path):
    """Write a shard of given members."""

    def write(name, **members):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as tar:
            for key, value in members.items():
                value = json.dumps(value).encode() if isinstance(value, dict) else value
                add_jpg(tar, key.replace("_", "."), value)
        return tmp_path

    return write


@pytest.mark.parametrize(("name", "more"), SETS, ids=[name for name, _ in SETS])
def test_a_data_set_in_shards_has_the_same_samples_and_galleries(
    name, more, mini_root, rendered, tmp_path, monkeypatch
):
    root = mini_root if name.startswith(("AG", "G2")) else rendered(name)
    options = [word for key, value in more.items() for word in (f"--{key}", value)]
    made = make(monkeypatch, tmp_path / "shards", name, root, *options)
    original, data = read(name, root, **more), read("custom", made)
    assert samples(data) == samples(original)
    assert data.attribute_classes == original.attribute_classes
    assert set(data.splits) == set(original.splits) and data.warnings == original.warnings
    for split in original.splits:
        assert split_content(data.splits[split]) == split_content(original.splits[split])
    if name != "AGSGData":  # its aerial images come first, so few samples share a path
        assert len({i.path for s in data.train for i in s.images}) == len(
            {i.path for s in original.train for i in s.images}
        )
    for split, ids in original.ids.items():
        assert data.ids[split] == ids


def test_an_identity_of_one_split_is_no_identity_of_another(mini_root, tmp_path, monkeypatch):
    data = read("custom", make(monkeypatch, tmp_path / "shards", "AGDataAttr", mini_root))
    assert not {*data.ids["train"]} & {*data.ids["test"]} and len(data.ids["train"]) == 8


def test_people_and_pictures_in_two_splits_are_found_in_shards_as_in_files(
    like_real, tmp_path, monkeypatch
):
    original = read("AGDataAttr", like_real)
    data = read("custom", make(monkeypatch, tmp_path / "shards", "AGDataAttr", like_real))
    for pair in (("val", "test"), ("train", "test")):
        one, other = (overlap(d, *pair) for d in (original, data))
        assert other.people == one.people > 0 and other.of_people == one.of_people
        assert (other.images, other.of_images) == (one.images, one.of_images)


def test_what_the_lists_of_a_split_may_be_stays_so():
    """Images without captions, and captions that only the identity ties to an image."""
    split = Split(["s"], {"view": Gallery()})
    for number, pid in enumerate([5, 2, 5, 9]):
        split.galleries["view"].add(Image(f"{number}.jpg"), pid, 0)
    for caption, pid in [("a", 5), ("b", 5), ("c", 5), ("d", 2), ("e", 4)]:
        split.add_caption(caption, pid, 0)
    train = [TrainSample(0, "x", Image("t.jpg"), None, "e")]
    data = Data("s", train, {"test": split}, views=("view",))
    entries, messages = entries_of(data)
    test = [entry for entry in entries if entry.split == "test"]
    assert [entry.captions for entry in test] == [["a", "b"], ["d"], ["c"], []]
    assert [entry.given for entry in test] == [f"test-{pid:08}" for pid in (5, 2, 5, 9)]
    assert messages == ["test: 1 captions of identities without an image are left out"]
    assert entries[0].given is None  # an image of train that is an identity of its own
    split.galleries["other"] = Gallery([Image("y")], [1], [0])
    with pytest.raises(UserError, match="views of test show other identities in another order"):
        entries_of(data)


def test_the_same_options_give_the_same_bytes_and_the_seed_shuffles_only_train(
    rendered, tmp_path, monkeypatch
):
    root = rendered("CUHK-PEDES")
    one, same, other = (
        make(monkeypatch, tmp_path / str(i), "CUHK-PEDES", root, "--seed", seed)
        for i, seed in enumerate([1, 1, 2])
    )

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(one) == files(same)
    changed = {name for name, value in files(other).items() if value != files(one)[name]}
    assert changed == {"train-000000.tar", "dataset.jsonl"}
    assert samples(read("custom", one)) == samples(read("custom", other))


def test_a_shard_ends_at_its_size(rendered, tmp_path):
    data = read("CUHK-PEDES", rendered("CUHK-PEDES"))
    entries, _ = entries_of(data)
    tool.Writer(tmp_path, [], 20_000).write(entries, seed=1)
    shards = sorted(tmp_path.glob("train-*.tar"))
    assert len(shards) > 2 and shards[-1].name == f"train-{len(shards) - 1:06}.tar"
    assert all(20_000 <= path.stat().st_size < 50_000 for path in shards[:-1])
    assert samples(read("custom", tmp_path)) == samples(data)


def test_webdataset_reads_the_shards(mini_root, tmp_path, monkeypatch):
    made = make(monkeypatch, tmp_path / "shards", "AGDataAttr", mini_root)
    data = read("custom", made)
    dataset = webdataset.WebDataset(str(made / "train-000000.tar"), shardshuffle=False)
    found = []
    for row in dataset:
        about = json.loads(row["json"])
        labels = about["attributes"]["gender"], about["split"]
        found.append((about["captions"], *labels, row["jpg"], row["pair.jpg"]))
    expected = [
        ([s.caption], ("male", "female")[s.image.attributes[0]], "train",
         content(s.image)[0], content(s.pair)[0])
        for s in data.train
    ]  # fmt: skip
    assert sorted(found) == sorted(expected) and len(found) == 16


def test_the_index_of_written_shards_is_the_one_that_was_written(mini_root, tmp_path, monkeypatch):
    made = make(monkeypatch, tmp_path / "shards", "AGDataAttr", mini_root)
    written = read("custom", made)
    rows = index(monkeypatch, made)
    again = read("custom", made)
    assert len(rows) == 16 + 8 + 12
    assert Counter(samples(again)) == Counter(samples(written))
    for split in ("val", "test"):
        assert split_content(again.splits[split]) == split_content(written.splits[split])


def test_shards_of_webdatasets_writer_are_indexed(rendered, tmp_path, monkeypatch):
    root = rendered("custom")
    entries = json.loads((root / "dataset.json").read_text())
    for split in ("train", "test"):
        with webdataset.ShardWriter(
            str(tmp_path / f"{split}-%03d.tar"), maxcount=9, verbose=0
        ) as sink:
            for number, entry in enumerate(e for e in entries if e["split"] == split):
                about = {key: entry[key] for key in ("id", "captions", "attributes")}
                about["pair_attributes"] = entry["pair_attributes"]
                sink.write({
                    "__key__": f"{number:05}", "json": about,
                    "jpg": (root / entry["image"]).read_bytes(),
                    "pair.jpg": (root / entry["pair_image"]).read_bytes(),
                })  # fmt: skip
    index(monkeypatch, tmp_path)
    original, data = read("custom", root), read("custom", tmp_path)
    assert samples(data) == samples(original)
    assert split_content(data.splits["test"]) == split_content(original.splits["test"])


def test_captions_of_other_programs_are_read_and_the_rest_is_counted(shard, monkeypatch, capsys):
    """As img2dataset writes them, in folders, with texts next to images."""
    members = {
        "0_jpg": b"0", "0_txt": b"a man\n", "0_json": {"caption": "a woman", "url": "x", "id": None},
        "1_PNG": b"1", "1_txt": b"a boy", "1_json": {"key": "1", "status": "success"},
        "2_jpg": b"2", "2_json": {"captions": ["a girl", "", 3]},
        "3_jpg": b"3", "3_txt": b" ", "4_txt": b"a dog", "5_jpg": b"5",
        "6_webp": b"6", "6_txt": b"a coat", "6_cls": b"7", "README": b"", "._0.jpg": b"",
    }  # fmt: skip
    shard("a/00000.tar", **members)
    folder = shard("b/test-0.tar", **{"0_jpg": b"7", "0_json": {"id": 3, "captions": ["a hat"]}},
                   **{"1_jpg": b"8", "1_json": {"id": 3, "captions": []}})  # fmt: skip
    with pytest.raises(UserError, match="00000.tar, sample 0: its JSON has no split, nor does"):
        index(monkeypatch, folder)
    (folder / "a/00000.tar").rename(folder / "a/train_00000.tar")
    rows = index(monkeypatch, folder)
    captions = [["a woman"], ["a boy"], ["a girl"], ["a coat"], ["a hat"], []]
    assert [row["captions"] for row in rows] == captions
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"] * 2
    assert rows[1]["image"].startswith("a/train_00000.tar@") and "id" not in rows[0]
    data = read("custom", folder)
    assert [content(s.image)[0] for s in data.train] == [b"0", b"1", b"2", b"6"]
    assert len(data.splits["test"].galleries["image"].images) == 2
    shown = capsys.readouterr().out
    for line in (
        "samples in 2 shards: train: 4, test: 2",
        "left out: 2 samples without a caption",
        "left out: 1 samples without an image",
        "left out: 2 captions without words",
        "ignored: *.cls, key (JSON), members without an ending, status (JSON), url (JSON)\n",
    ):
        assert shown.count(line) == 1, line


def test_several_processes_index_as_one(shard, monkeypatch):
    for i in range(3):
        folder = shard(f"train-{i}.tar", **{"0_jpg": b"0", "0_txt": f"man {i}".encode()})
    rows = index(monkeypatch, folder)
    run(tool.main, monkeypatch, "--index", folder, "--workers", 2)
    assert [json.loads(r) for r in (folder / "dataset.jsonl").read_text().splitlines()] == rows
    assert [row["captions"] for row in rows] == [["man 0"], ["man 1"], ["man 2"]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0_jpg": b"", "0_png": b"", "0_txt": b"x"}, "member 0.png: the sample 0 has another image"),
        ({"0_jpg": b"", "0_json": b"{"}, "sample 0: malformed JSON"),
        ({"0_jpg": b"", "0_json": b"[]"}, "sample 0: its JSON is not an object"),
        ({"0_jpg": b"", "0_json": {"split": "dev"}}, "sample 0: split is 'dev'; it must be train"),
        ({"0_jpg": b"", "0_json": {"split": "test", "caption": "x"}}, "sample 0: its JSON has no id, which a sample of test needs"),
        ({"0_jpg": b"", "1_txt": b"x"}, "no sample has an image and a caption"),
        ({"0_jpg": b"", "0_txt": b"x", "1_jpg": b"", "1_pair.jpg": b"", "1_txt": b"x"}, "1 of 2 samples have pair image; all or none must have it"),
        ({"0_jpg": b"", "0_txt": bytes(2**22 + 1)}, "member 0.txt: its 4194305 bytes are over the limit"),
        ({"..": b"", "../0_jpg": b""}, "member ../0.jpg: a name with '..'"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_what_its_writer_meant_is_refused(
    members, message, shard, monkeypatch
):
    folder = shard("train-0.tar", **members)
    with pytest.raises(UserError, match=message):
        index(monkeypatch, folder)
    assert not (folder / "dataset.jsonl").exists()


def test_two_samples_with_the_same_key_are_reported(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg"):
            add_jpg(tar, name)
    with pytest.raises(UserError, match="train-0.tar, member 0.jpg: the sample 0 has another image in this tar; each sample"):  # fmt: skip
        index(monkeypatch, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gzip", "empty", "header", "no end"])
def test_a_tar_that_is_not_complete_is_refused(damage, shard, monkeypatch):
    folder = shard("train-0.tar", **{f"{i}_{e}": b"x" * 700 for i in range(5) for e in ("jpg", "txt")})  # fmt: skip
    path = folder / "train-0.tar"
    whole = path.read_bytes()
    if damage == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            add_jpg(tar, "0.jpg")
    else:
        broken = bytearray(whole)
        broken[1536 * 2 : 1536 * 2 + 100] = b"?" * 100
        contents = {"cut": whole[: 1536 * 9 + 600], "no end": whole[: 1536 * 6], "empty": b""}
        path.write_bytes({**contents, "header": broken}[damage])
    with pytest.raises(UserError, match="train-0.tar: not an uncompressed tar that is complete: .*; copy or write it again"):  # fmt: skip
        index(monkeypatch, folder)


def test_a_header_of_any_size_takes_no_memory(tmp_path, monkeypatch):
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    (tmp_path / "train-0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    os.truncate(tmp_path / "train-0.tar", 2**41)  # without its blocks
    with pytest.raises(UserError, match="a header of 1099511627776 bytes is over the limit"):
        index(monkeypatch, tmp_path)


def test_mistakes_are_refused_before_anything_is_written(rendered, tmp_path, monkeypatch):
    def refused(message, *argv):
        with pytest.raises(UserError, match=message):
            run(tool.main, monkeypatch, *argv)

    refused("give either --output, to write shards, or --index")
    refused("give either --output", "--output", tmp_path / "a", "--index", tmp_path)
    refused("--root_dir: not with --index", "--index", tmp_path, "--root_dir", tmp_path)
    refused("--seed: not with --index", "--index", tmp_path, "--seed", "0")
    refused("--split: not with --output", "--output", tmp_path / "a", "--split", "test")
    refused("--shard_size 0: must be from 1", "--output", tmp_path / "a", "--shard_size", "0")
    refused("--workers 0: must be from 1 to 512", "--index", tmp_path, "--workers", "0")
    refused(f"--output {tmp_path}: exists; give another folder", "--output", tmp_path)
    refused("there is no .*.tar in it or its subfolders", "--index", tmp_path)
    (tmp_path / "dataset.json").touch()
    refused("dataset.json: would be read instead of dataset.jsonl", "--index", tmp_path)
    root = shutil.copytree(rendered("CUHK-PEDES"), tmp_path / "set")
    entries = json.loads((root / "reid_raw.json").read_text())
    (root / "imgs" / entries[0]["file_path"]).rename(root / "imgs/x")
    entries[0]["file_path"] = "x"
    (root / "reid_raw.json").write_text(json.dumps(entries))
    command = ["--dataset_name", "CUHK-PEDES", "--root_dir", root, "--output", tmp_path / "a"]
    refused("imgs/x: its name must end with one of jpg, jpeg", *command)
    refused("dataset.json/a: Not a directory", *command[:-1], tmp_path / "dataset.json/a")
    (tmp_path / ".a.unfinished").mkdir()
    held = lock(tmp_path / ".a.unfinished", inherited=True)
    monkeypatch.setattr(fcntl, "lockf", fcntl.flock)  # which also excludes this process
    refused("another process is using this folder", *command)
    os.close(held)
    refused("imgs/x: its name must end with one of jpg, jpeg", *command)
    assert {path.name for path in tmp_path.iterdir()} == {"dataset.json", "set"}


def test_a_preset_names_the_data_set(rendered, tmp_path, monkeypatch):
    argv = ["--config_file", "configs/irra.yaml", "--root_dir", rendered("CUHK-PEDES")]
    run(tool.main, monkeypatch, *argv, "--output", tmp_path / "a")
    assert len(read("custom", tmp_path / "a").train) == 32
