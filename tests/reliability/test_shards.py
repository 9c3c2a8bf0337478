"""Training on shards is training on the files; a killed make_shards.py leaves no half data set."""

import json
import os
import random
import signal
import sys
import tarfile

import pytest
import torch

import test as test_entry
import tools.make_shards as tool
import train as train_entry
from datasets.shards import _opened, open_image, split_member
from tests.datasets.test_shards import NAMES, paths_in, with_captions, write_tar
from tests.helpers import ROOT, SCRATCH, run
from tests.reliability.runs import (
    assert_same,
    flags,
    folder_of,
    forks,
    logged_losses,
    start_many,
    train_small_run,
)
from tests.reliability.test_resume import send_signal_at_step
from utils.checkpoint import load_checkpoint
from utils.errors import StoppedBySignal, UserError


@pytest.fixture(scope="module")
def shards(rendered, tmp_path_factory):
    """The rendered custom data set in shards."""
    output = tmp_path_factory.mktemp("made") / "shards"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(tool.main, monkeypatch, *argv_of(rendered, output))
    return output


def argv_of(rendered, output):
    root = rendered("custom")
    return ["--dataset_name", "custom", "--root_dir", str(root), "--output", str(output)]


def assert_same_run(folder, other):
    """Equal losses in the log, equal weights, equal evaluations, bit for bit."""
    assert logged_losses(folder) == logged_losses(other)
    one, two = (load_checkpoint(f / "last.pth") for f in (folder, other))
    assert_same(one["model"], two["model"])
    assert one["best"] == two["best"]


OPTIONS = {"dataset_name": "custom", "num_workers": 1}


@pytest.fixture(scope="module")
def on_files(rendered, tmp_path_factory):
    """A run on the files."""
    return train_small_run(rendered("custom"), tmp_path_factory.mktemp("files"), num_epoch=2, **OPTIONS)  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_training_on_shards_is_training_on_the_files(cached, shards, on_files, tmp_path):
    more = {"image_cache": tmp_path / "cache"} if cached else {}
    folder = train_small_run(shards, tmp_path / "o", num_epoch=2, **OPTIONS, **more)
    assert_same_run(folder, on_files)


def test_a_run_on_shards_that_is_stopped_resumes_to_the_same_end(
    shards, on_files, tmp_path, monkeypatch
):
    options = {"num_epoch": 2, "warmup_epochs": 0, "text_length": 12, **OPTIONS, "resume": "auto"}
    argv = flags(shards, tmp_path, **options)
    with monkeypatch.context() as patch:
        send_signal_at_step(patch, 3, signal.SIGTERM)
        with pytest.raises(StoppedBySignal, match="saved at epoch"):
            run(train_entry.main, patch, *argv)
    run(train_entry.main, monkeypatch, *argv)
    assert_same_run(folder_of(tmp_path), on_files)


def test_two_processes_on_shards_train_as_on_the_files(shards, rendered, tmp_path):
    roots = {"files": rendered("custom"), "shards": shards}
    processes = []
    for name, root in roots.items():
        argv = flags(root, tmp_path / name, num_epoch=1, warmup_epochs=0, **OPTIONS)
        processes += start_many(2, argv, tmp_path / f"{name}.txt")
    for process in processes:
        process.join()
        assert process.exitcode == 0, (tmp_path / "files.txt").read_text()
    assert_same_run(folder_of(tmp_path / "files"), folder_of(tmp_path / "shards"))


def test_the_pretraining_preset_trains_on_shards_without_identities_and_finetunes(
    shards, mini_root, tmp_path, monkeypatch
):
    """As docs/training.md says, on few people and with a small model."""
    small = {"img_size": (32, 16), "batch_size": 8, "num_epoch": 1, "warmup_epochs": 0,
             "num_workers": 0, "device": "cpu", "precision": "fp32", **SCRATCH}  # fmt: skip
    words = []
    for name, value in small.items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    rows = [json.loads(line) for line in (shards / "dataset.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "train":
            del row["id"]
    for name in ("train", "val", "test"):
        os.symlink(shards / f"{name}-000000.tar", tmp_path / f"{name}-000000.tar")
    (tmp_path / "dataset.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--config_file", "configs/pretrain.yaml", "--root_dir", tmp_path]
    run(train_entry.main, monkeypatch, *argv, "--output_dir", tmp_path / "pretrained", *words)
    folder = folder_of(tmp_path / "pretrained")
    assert "custom: 16 identities, 32 samples" in (folder / "train_log.txt").read_text()
    assert load_checkpoint(folder / "best.pth")["epoch"] == 1
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    argv = ["--config_file", "configs/aea_firm.yaml", "--root_dir", mini_root, "--finetune",
            folder / "best.pth", "--output_dir", tmp_path / "finetuned"]  # fmt: skip
    run(train_entry.main, monkeypatch, *argv, *words)
    log = (folder_of(tmp_path / "finetuned") / "train_log.txt").read_text()
    assert str(folder / "best.pth") in log


def kill_at(number: int, argv: list[str]) -> None:
    """Run make_shards.py and kill this process at its n-th file, or before the last renaming."""
    os.chdir(ROOT)
    write, rename = tool.write_atomically, os.rename
    left = iter([False] * number + [True] * 9)

    def counted(path, fill):
        def fill_and_die(file):
            fill(file)
            if next(left):
                os.kill(os.getpid(), signal.SIGKILL)

        write(path, fill_and_die)

    def renamed(*paths):
        os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    tool.write_atomically, tool.os.rename = counted, renamed
    torch.set_num_threads(1)
    sys.argv = ["make_shards.py", *argv]
    tool.main()


def test_a_killed_make_shards_leaves_no_half_data_set_and_its_repetition_succeeds(
    shards, rendered, tmp_path, monkeypatch
):
    output = tmp_path / "o"
    for number in range(5):  # three shards, the index, the renaming
        process = forks.Process(target=kill_at, args=(number, argv_of(rendered, output)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not output.exists(), number
    assert [path.name for path in tmp_path.iterdir()] == [".o.unfinished"]
    run(tool.main, monkeypatch, *argv_of(rendered, output))
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert {path.name for path in output.iterdir()} == {path.name for path in shards.iterdir()}
    for path in shards.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_corrupted_tar_is_refused_or_gives_an_index_that_fits_it(form, tmp_path, request, tally):
    members = with_captions({name: bytes([i]) * 300 for i, name in enumerate(NAMES)})
    content = write_tar(tmp_path / "a.tar", members, form).read_bytes()
    rng, count = random.Random(0), request.config.getoption("fuzz")
    for _ in range(count):
        broken = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5])):
            broken[rng.randrange(len(broken) // 512) * 512 + rng.randrange(512)] = rng.randrange(
                256
            )
        for start in range(0, len(broken), 512):  # otherwise most are refused by their checksum
            if broken[start + 257 :].startswith(b"ustar") and rng.random() < 0.9:
                block = broken[start : start + 512]
                total = sum(block[:148]) + sum(block[156:]) + 256
                broken[start + 148 : start + 156] = b"%06o\0 " % total
        (tmp_path / "b.tar").write_bytes(broken)
        _opened.cache_clear()
        try:
            paths = paths_in(tmp_path / "b.tar")
        except UserError:
            continue
        for path in paths:
            with open_image(path) as file:
                assert len(file.read()) == split_member(path).size
    tally["fuzzed tars"] += count
