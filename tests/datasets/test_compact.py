"""Samples as columns are the samples; what millions of entries need is checked as exactly."""

import json
import multiprocessing
import pickle
import time

import numpy as np
import pytest
import torch

from datasets import pedes
from datasets.compact import Entries, ImagePaths, Texts, TrainSamples
from datasets.fingerprint import fingerprint
from datasets.loaders import train_loader
from datasets.reading import CompactChecks, EntryChecks
from datasets.records import Image, TrainSample
from tests.helpers import options, read
from utils.errors import UserError

CPU = torch.device("cpu")
TEXTS = ["a man", "", "男", "caf\udce9.jpg", "x" * 300]


def samples(views):
    rows = []
    for n in range(5):
        images = [Image(f"/data/set/{v}/{n // 2}.jpg", (n % 2, v)) for v in range(views)]
        images[0] = Image("/elsewhere/x.jpg", (1, 1)) if n == 4 else images[0]
        pair = images[1] if views > 1 else None
        rows.append(TrainSample(n, TEXTS[n], images[0], pair, f"a.json, entry {n}", n % 3))
    return rows


def test_texts_come_back_as_they_were():
    texts = Texts(TEXTS)
    assert list(texts) == TEXTS and texts[-1] == TEXTS[-1] and texts[1:3] == TEXTS[1:3]
    assert list(pickle.loads(pickle.dumps(texts))) == TEXTS  # for loader processes
    with pytest.raises(IndexError):
        texts[5]


def test_names_of_entries_come_back_as_they_were():
    names = ["a.json, entry 0", "a.json, entry 17", "b", "x 007", "9", "", f"y {10**20}", "z -3"]
    entries = Entries()
    for name in names:
        entries.append(name)
    assert list(entries) == names


@pytest.mark.parametrize("views", [1, 2])
def test_samples_come_back_as_they_were(views):
    rows = samples(views)
    columns = TrainSamples(rows, root="/data/set")
    assert list(columns) == rows and columns[-1] == rows[-1] and columns[1:3] == rows[1:3]
    assert columns.pids.tolist() == [0, 1, 2, 3, 4]
    assert list(TrainSamples.of(columns.columns(), "/data/set")) == rows
    paths = [s.images[v].path for v in range(views) for s in rows]
    assert list(ImagePaths(columns, views)) == paths
    assert list(ImagePaths(columns, views, entries=True)) == [s.entry for s in rows] * views
    columns.renumber([4, 3, 2, 1, 0])
    assert [s.pid for s in columns] == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="entry 9: not as many images and labels as the first"):
        columns.append(TrainSample(0, "x", Image("a", (1,)), rows[0].pair, "entry 9"))


def test_captions_of_one_entry_share_their_images():
    rows = [TrainSample(0, text, Image("a.jpg"), None, "e 0") for text in TEXTS]
    assert len(TrainSamples(rows)._paths) == 1


def lines(rendered, folder, change=None):
    """The rendered custom data set with one entry per line, in `folder`."""
    entries = json.loads((rendered("custom") / "dataset.json").read_text())
    if change:
        change(entries)
    for name in ("aerial", "ground"):
        (folder / name).symlink_to(rendered("custom") / name)
    (folder / "dataset.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    return folder


def contents(data):
    return list(data.train), data.splits, data.views, data.attribute_classes, data.ids


def test_entries_on_lines_are_the_entries_of_the_list(rendered, tmp_path):
    expected, data = read("custom", rendered("custom")), read("custom", lines(rendered, tmp_path))
    assert len(data.train) == len(expected.train) > 0
    for one, other in zip(data.train, expected.train, strict=True):
        assert one.entry == other.entry.replace("json, entry", "jsonl, line").replace(
            other.entry.split()[-1], str(int(other.entry.split()[-1]) + 1)
        )
        assert (one.pid, one.caption, one.images[0].attributes) == (
            other.pid, other.caption, other.images[0].attributes)  # fmt: skip
    assert data.splits["test"].captions == expected.splits["test"].captions
    assert data.splits["test"].caption_pids == expected.splits["test"].caption_pids
    assert data.warnings == expected.warnings == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[2].update(image=e[0]["image"], attributes=e[0]["attributes"]), "dataset.jsonl, line 3: the identity of .* in train is 1, but 0 in dataset.jsonl, line 1"),
        (lambda e: e[-1].update(id="0"), r"line \d+: the id 0 is '0', but 0 in dataset.jsonl, line 1"),
        (lambda e: e[1].update(captions=[" "]), "line 2, caption 0: the caption ' ' has no words"),
        (lambda e: e[1].pop("split"), "line 2: split missing"),
        (lambda e: e[-1].pop("id"), r"line \d+: id missing"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_with_its_number(change, message, rendered, tmp_path):
    with pytest.raises(UserError, match=message):
        read("custom", lines(rendered, tmp_path, change))


def test_a_line_that_is_not_json_is_refused_with_its_number(rendered, tmp_path):
    with open(lines(rendered, tmp_path) / "dataset.jsonl", "a") as file:
        file.write("{")
    with pytest.raises(UserError, match=r"dataset.jsonl, line \d+: malformed JSON"):
        read("custom", tmp_path)


def test_repetitions_on_lines_are_counted_with_the_first_example(rendered, tmp_path):
    def repeat(entries):
        entries[1]["captions"].append(entries[1]["captions"][0])
        entries.append(entries[-1])

    last = len(json.loads((rendered("custom") / "dataset.json").read_text()))
    assert read("custom", lines(rendered, tmp_path, repeat)).warnings == [
        "repeated: 1 samples of train (dataset.jsonl, line 2 repeats dataset.jsonl, line 2)",
        f"repeated: 1 images of test, which count again (dataset.jsonl, line {last + 1} repeats dataset.jsonl, line {last})",
        f"repeated: 2 captions of test, which count again (dataset.jsonl, line {last + 1} repeats dataset.jsonl, line {last})",
    ]  # fmt: skip


def test_an_entry_of_train_without_an_id_is_an_identity_of_its_own(rendered, tmp_path):
    def remove(entries):
        for entry in entries:
            if entry["split"] == "train":
                del entry["id"]

    data = read("custom", lines(rendered, tmp_path, remove))
    entries = {s.entry for s in data.train}
    assert data.num_identities == len(entries) < len(data.train)
    assert "train" not in data.ids and "test" in data.ids


def test_hashes_find_the_contradictions_and_repetitions_of_the_exact_checks():
    rng = np.random.RandomState(0)
    for _ in range(20):
        exact, compact = EntryChecks(), CompactChecks()
        contradiction = False
        for n in range(60):
            subject, value = ("the id", str(rng.randint(40))), rng.randint(50) // 49
            try:
                exact.require_same(subject, value, f"e {n}")
            except UserError:
                contradiction = True
            compact.require_same(subject, value, f"e {n}")
            for checks in (exact, compact):
                checks.count_repetition("pictures", subject, f"e {n}")
        assert bool(compact.contradictions()) == contradiction
        assert compact.warnings() == exact.warnings()


def test_a_later_start_reads_the_stored_data_set_and_tokens(rendered, tmp_path, monkeypatch):
    root, cache = lines(rendered, tmp_path), str(tmp_path / "cache")
    first = read("custom", root, image_cache=cache)
    plain = read("custom", root)
    assert contents(first) == contents(plain) and fingerprint(first) == fingerprint(plain)
    args = options(num_workers=0)
    tokens = train_loader(first, args, CPU).dataset.caption_ids
    monkeypatch.setattr("datasets.pedes._Reader", None)  # nothing is read again
    monkeypatch.setattr("datasets.text._word_ids", None)
    later = read("custom", root, image_cache=cache)
    assert contents(later) == contents(plain) and fingerprint(later) == fingerprint(plain)
    again = train_loader(later, args, CPU).dataset.caption_ids
    assert all(again[i].equal(tokens[i]) for i in range(len(first.train)))


def test_of_processes_that_start_at_once_one_reads(rendered, tmp_path, monkeypatch):
    root, cache = lines(rendered, tmp_path), str(tmp_path / "cache")

    class Slow(pedes._Reader):
        def __init__(self, *args):
            with open(tmp_path / "reads", "a") as file:
                file.write("x")
            time.sleep(0.5)
            super().__init__(*args)

    monkeypatch.setattr(pedes, "_Reader", Slow)

    def start():
        assert len(read("custom", root, image_cache=cache).train)

    processes = [multiprocessing.get_context("fork").Process(target=start) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "reads").read_text() == "x"


@pytest.mark.parametrize("damage", ["truncated", "other column", "content", "tokens"])
def test_a_corrupted_stored_data_set_is_read_again(damage, rendered, tmp_path, caplog):
    root, cache = lines(rendered, tmp_path), str(tmp_path / "cache")
    data = read("custom", root, image_cache=cache)
    before = contents(data)  # not the arrays, which this test changes on disk
    expected = [t.tolist() for t in map(train_loader(data, options(), CPU).dataset.caption_ids.__getitem__, range(3))]  # fmt: skip
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "truncated":
        path = folder / "captions.bytes.npy"
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "other column":
        (folder / "pids.npy").write_bytes((folder / "sources.npy").read_bytes())
    elif damage == "tokens":
        (folder / "tokens-77.flat.npy").write_bytes(b"")
    else:
        (folder / "content.json").write_text('{"folders": {}}')
    later = read("custom", root, image_cache=cache)
    tokens = train_loader(later, options(), CPU).dataset.caption_ids
    assert contents(later) == before and [tokens[i].tolist() for i in range(3)] == expected
    assert "cannot be used" in caplog.text


def test_a_change_of_the_file_or_of_an_image_folder_is_read(rendered, tmp_path):
    source = rendered("custom")
    root, cache = tmp_path / "set", str(tmp_path / "cache")
    (root / "aerial").mkdir(parents=True)
    entry = json.loads((source / "dataset.json").read_text())[0]
    for name in ("a", "b"):
        (root / f"aerial/{name}.jpg").write_bytes((source / entry["image"]).read_bytes())
    rows = [
        {"split": split, "id": split, "image": f"aerial/{name}.jpg", "captions": ["a man"]}
        for split, name in (("train", "a"), ("test", "b"))
    ]
    (root / "dataset.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read("custom", root, image_cache=cache).train[0].caption == "a man"
    rows[0]["captions"] = ["a woman"]
    (root / "dataset.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read("custom", root, image_cache=cache).train[0].caption == "a woman"
    (root / "aerial/b.jpg").unlink()
    with pytest.raises(UserError, match="line 2: image aerial/b.jpg is missing"):
        read("custom", root, image_cache=cache)


def test_a_folder_that_cannot_be_written_costs_later_starts_only(rendered, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    data = read("custom", lines(rendered, tmp_path), image_cache=str(tmp_path / "cache"))
    assert len(data.train) and "could not be stored for later starts" in caplog.text
