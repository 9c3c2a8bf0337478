"""A gallery survives kills at any moment, and several processes make the same one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from gallery.copies import Copy
from gallery.manifest import MANIFEST
from gallery.store import Gallery
from tests.helpers import ROOT
from tests.reliability.runs import forks, train_small_run
from utils.errors import run_main


@pytest.fixture(scope="module")
def folder(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("logs"))


def words_of(folder, images, gallery, *more):
    common = ("--num_workers", 0, "--test_batch_size", 4, "--device", "cpu")
    words = ("index", "--config_file", folder / "configs.yaml", "--images", images, "--gallery", gallery)  # fmt: skip
    return [str(word) for word in (*words, *common, *more)]


def index(words, rows, begun):
    """Index with parts of few rows, and commits that take a while; for a child process."""
    import search
    from gallery import commands_index, indexing  # noqa: F401  imports are no part of the race

    def slow(*args):
        time.sleep(0.03)
        commit(*args)

    os.chdir(ROOT)
    indexing.ROWS, commit, indexing._commit = rows, indexing._commit, slow
    begun.set()
    sys.argv = ["search.py", *words]
    run_main(search.main)


def start(words, rows=8):
    begun = forks.Event()
    process = forks.Process(target=index, args=(words, rows, begun))
    process.start()
    begun.wait()
    return process


def content(path):
    """By id, the features."""
    gallery = Gallery.open(path)
    numbers = gallery.items["id"].to_pylist()
    assert len(set(numbers)) == len(numbers)
    return dict(zip(numbers, gallery.features.astype(float), strict=True))


def test_kills_at_random_moments_leave_a_whole_gallery_that_the_next_run_completes(
    folder, mini_root, tmp_path, pytestconfig, tally
):
    child = start(words_of(folder, mini_root, tmp_path / "whole"))
    began = time.monotonic()
    child.join()
    assert child.exitcode == 0
    longest, whole = time.monotonic() - began, content(tmp_path / "whole")
    rng, killed, complete = random.Random(1), tmp_path / "killed", False
    partial = survived = 0
    for _ in range(pytestconfig.getoption("kills")):
        if complete and rng.random() < 0.6:  # from the beginning
            shutil.rmtree(killed)
            complete = False
        # What is complete stays so while it is made anew.
        child = start(words_of(folder, mini_root, killed, *["--reencode"] * complete))
        child.join(rng.uniform(0, 1) * longest)
        child.kill()
        child.join()
        if not (killed / MANIFEST).exists():
            assert not complete
            continue
        now = content(killed)
        assert set(now) <= set(whole)
        assert all(np.abs(now[n] - whole[n]).max() < 1e-3 for n in now)
        assert len(now) == len(whole) or not complete
        partial += 0 < len(now) < len(whole)
        complete = len(now) == len(whole)
        survived += 1
    child = start(words_of(folder, mini_root, killed))
    child.join()
    assert child.exitcode == 0 and set(content(killed)) == set(whole)
    named = len(Gallery.open(killed).manifest["parts"])
    assert len(list((killed / "parts").iterdir())) == 3 * named  # nothing is left behind
    tally["kills that a gallery survived"] += survived
    tally["of them, in the middle of the first run"] += partial


def test_two_processes_of_torchrun_share_the_work(folder, mini_root, tmp_path):
    store = f"milvus:{tmp_path / 'milvus.db'}#both"  # which only one process can open
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "search.py", *words_of(folder, mini_root, tmp_path / "both", "--store", store)]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    child = start(words_of(folder, mini_root, tmp_path / "alone"), rows=8192)
    child.join()
    alone, both = content(tmp_path / "alone"), content(tmp_path / "both")
    assert set(alone) == set(both) == set(Copy(tmp_path / "both", store).milvus.others([]))
    # Batches differ, and with them the last digits.
    assert all(np.abs(alone[n] - both[n]).max() < 1e-3 for n in alone)
