"""test.py --features: the metrics of an evaluation without it, from files that survive a kill."""

import json
import os
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import yaml

import test as test_entry
from processor import feature_files
from processor.feature_files import FeatureFiles
from tests.helpers import ROOT, run
from tests.reliability.runs import forks, train_small_run
from utils.errors import UserError, run_main
from utils.files import lock

SHARDS = {"captions": 4, "aerial": 3, "ground": 3}  # of four rows; see `mini_root`


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD_ROWS", 4)


@pytest.fixture(scope="module")
def evaluated(mini_root, tmp_path_factory):
    """A run's folder, and its results without --features."""
    folder = train_small_run(mini_root, tmp_path_factory.mktemp("logs"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    return folder, results(folder)


def results(folder):
    """The metrics and the results of every caption."""
    with np.load(folder / "test_queries.npz") as archive:
        queries = {name: archive[name].tolist() for name in archive if name != "evaluation"}
    return json.loads((folder / "test_results.json").read_text())["splits"], repr(queries)


@pytest.fixture
def evaluate(evaluated, tmp_path, monkeypatch):
    """A function that evaluates with --features and returns the shards that it has encoded."""

    def call(*more):
        written, write = [], FeatureFiles.write
        with monkeypatch.context() as patch:
            patch.setattr(FeatureFiles, "write", lambda files, name, shard, x: written.append((name, shard)) or write(files, name, shard, x))  # fmt: skip
            argv = ["--config_file", evaluated[0] / "configs.yaml"]
            run(test_entry.main, patch, *argv, "--features", tmp_path / "features", *more)
        return written

    return call


def evaluate_in_child(rank, size, port, argv, log, kill_after):
    """test.py as a process of torchrun, which may kill itself after some shards."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ |= {name: str(value) for name, value in group.items()}
    written, write = [], FeatureFiles.write

    def recorded(files, name, shard, features):
        if len(written) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        write(files, name, shard, features)
        written.append(name)
        with open(log, "a") as file:
            file.write(f"{files._path(name, shard).name}\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureFiles, "write", recorded)
        patch.setattr(feature_files, "SHARD_ROWS", 4)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run_main(lambda: run(test_entry.main, patch, *argv))


def evaluate_in_processes(size, argv, log, kill_after=None):
    """Exit statuses, and the names of the files that were written."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log.write_text("")
    processes = [
        forks.Process(target=evaluate_in_child, args=(rank, size, port, argv, log, kill_after))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes], sorted(log.read_text().split())


def test_a_killed_evaluation_goes_on_with_another_number_of_processes(evaluated, tmp_path):
    folder, expected = evaluated
    argv = ["--config_file", folder / "configs.yaml", "--features", tmp_path / "features"]
    statuses, first = evaluate_in_processes(2, argv, tmp_path / "log", kill_after=3)
    assert statuses == [-signal.SIGKILL] * 2 and len(first) == 6
    (folder / "test_results.json").unlink()
    statuses, second = evaluate_in_processes(3, argv, tmp_path / "log")
    assert statuses == [0] * 3 and results(folder) == expected
    every = [f"{name}-{i:05}.npy" for name, count in SHARDS.items() for i in range(count)]
    assert sorted(first + second) == sorted(every)
    names = {path.name for path in (tmp_path / "features/test").iterdir()}
    assert names == {*every, "manifest.json", "lock", *(f"{name}.json" for name in SHARDS)}


def test_bad_shards_are_encoded_again_and_the_others_are_read(
    evaluated, evaluate, tmp_path, capsys
):
    folder, expected = evaluated
    assert len(evaluate()) == sum(SHARDS.values()) and results(folder) == expected
    assert evaluate() == [] and results(folder) == expected
    test = tmp_path / "features/test"
    assert f"{test}: 3 of 3 shards of aerial are there" in capsys.readouterr().out
    flipped = bytearray((test / "aerial-00001.npy").read_bytes())
    flipped[200] ^= 1
    (test / "aerial-00001.npy").write_bytes(flipped)
    (test / "ground-00000.npy").write_bytes(b"")
    other = tmp_path / "other"
    evaluate("--precision", "fp64", "--features", other)
    shutil.copy(other / "test/captions-00002.npy", test)
    (test / ".ground-00001.npy.x1").write_bytes(b"of a killed process")
    capsys.readouterr()
    assert evaluate() == [("captions", 2), ("aerial", 1), ("ground", 0)]
    shown = capsys.readouterr().out
    for name in ("aerial-00001", "ground-00000", "captions-00002"):
        assert (
            f"{test}/{name}.npy: corrupted, or of another evaluation; it is encoded again" in shown
        )
    assert results(folder) == expected and not list(test.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "precision",
            r"manifest.json: of another evaluation \(other precision\); give another --fe",
        ),
        ("image", r"of another evaluation \(other aerial\)"),
        ("checkpoint", r"of another evaluation \(other checkpoint\)"),
        ("manifest", "manifest.json: malformed JSON.*give another --features"),
        ("lock", "another process is using this folder"),
        ("file", "--features .*: Not a directory"),
    ],
)
def test_a_folder_that_is_not_of_this_evaluation_is_refused(
    change, message, evaluated, mini_copy, tmp_path, monkeypatch
):
    folder, features = shutil.copytree(evaluated[0], tmp_path / "run"), tmp_path / "features"
    config = yaml.safe_load((folder / "configs.yaml").read_text())
    (folder / "configs.yaml").write_text(yaml.safe_dump({**config, "root_dir": str(mini_copy)}))
    argv = ["--config_file", folder / "configs.yaml", "--features", features]
    more, holder = [], None
    if change != "file":
        run(test_entry.main, monkeypatch, *argv)
    if change == "precision":
        more = ["--precision", "fp64"]
    elif change == "image":
        paths = json.loads((features / "test/aerial.json").read_text())
        with open(mini_copy / paths[1], "ab") as file:
            file.write(b" ")
    elif change == "checkpoint":
        shutil.copy(folder / "last.pth", folder / "best.pth")
    elif change == "manifest":
        (features / "test/manifest.json").write_text("{")
    elif change == "file":
        features.write_text("")
    else:
        monkeypatch.setattr(feature_files, "lock", lambda path: lock(path, inherited=True))
        holder = lock(features / "test", inherited=True)
    with pytest.raises(UserError, match=message):
        run(test_entry.main, monkeypatch, *argv, *more)
    if holder is not None:
        os.close(holder)


def test_a_full_disk_gives_one_line_and_keeps_what_is_there(evaluated, evaluate, tmp_path, monkeypatch):  # fmt: skip
    replace = os.replace

    def full(source, target):
        if target.name == "aerial-00001.npy":
            raise OSError(28, os.strerror(28))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("utils.files.os.replace", full)
        with pytest.raises(UserError, match=r"aerial-00001.npy: could not be written: No space") as error:  # fmt: skip
            evaluate()
    assert "\n" not in str(error.value)
    assert evaluate() == [("aerial", 1), ("aerial", 2), ("ground", 0), ("ground", 1), ("ground", 2)]
    assert results(evaluated[0]) == evaluated[1]


def test_the_documented_example_reads_features_of_whole_batches(
    evaluated, evaluate, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_files, "SHARD_ROWS", 10)  # two batches of four
    assert evaluate("--num_workers", 1).count(("aerial", 1)) == 1
    assert results(evaluated[0]) == evaluated[1]
    page = (ROOT / "docs/evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?manifest\.json.*?)```", page, re.DOTALL)
    assert len(example.split("\n\n")) == 2 and len(example.splitlines()) == 6  # five and a blank
    found = {}
    exec(example.replace("path/to/features", str(tmp_path / "features")), found)
    assert found["features_GD"].shape == (12, 64) and found["features_GD"].dtype == np.float32
    assert len(found["images"]) == 12 and found["images"][0].endswith(".jpg")
