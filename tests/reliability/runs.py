"""Small trainings, here or in processes that can be killed, and what two of them must share."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_entry
from tests.helpers import ROOT, SCRATCH, run
from utils.checkpoint import load_checkpoint
from utils.errors import run_main
from utils.metrics import Retrieval

RECIPE = "supkl+queue+match2+dot"
# Forked from a process that has imported everything and computed nothing: starts in no time.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train"])


def with_r1(result: Retrieval, r1: float) -> Retrieval:
    """An evaluation with another R@1."""
    return replace(result, metrics={**result.metrics, "R@1": r1})


def flags(root, out, **more) -> list[str]:
    """Three epochs of four steps, on images of 32x16."""
    values = {
        "root_dir": root, "output_dir": out, "loss_names": RECIPE, "img_size": (32, 16),
        "batch_size": 5, "test_batch_size": 4, "num_epoch": 3, "warmup_epochs": 1, "lr": 1e-3,
        "num_workers": 0, "device": "cpu", "precision": "fp32", "log_period": 1, "img_aug": True,
        "optimizer": "AdamW", **SCRATCH, **more,
    }  # fmt: skip
    words = []
    for name, value in values.items():
        many = value if isinstance(value, (tuple, list)) else [] if value is True else [value]
        words += [f"--{name}", *map(str, many)]
    return words


def main(words: list[str], threads: int = 1, before=None) -> None:
    """train.py with these words; for a process of its own."""
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *words]
    if before is not None:
        before()
    run_main(train_entry.main)


def start(words: list[str], output=os.devnull, environment=None, **more):
    """The same in a process, which is returned; `output` receives what it prints."""
    process = forks.Process(target=into, args=(output, environment or {}, words), kwargs=more)
    process.start()
    return process


def start_many(size: int, words: list[str], output=os.devnull, **more) -> list:
    """The same in so many processes that know of each other, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return [
        start(
            words, output, {**shared, "RANK": rank, "LOCAL_RANK": rank} if size > 1 else {}, **more
        )
        for rank in range(size)
    ]


def into(output, environment: dict, words: list[str], **more) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as for train.py
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main(words, **more)


def folder_of(out: Path) -> Path:
    """The one run's folder."""
    (config,) = out.glob("*/*/configs.yaml")
    return config.parent


def finished(root, out: Path, **more) -> Path:
    """The folder of a small run that has been trained here, of one epoch unless given."""
    values = {"num_epoch": 1, "warmup_epochs": 0, "text_length": 12, **more}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(train_entry.main, monkeypatch, *flags(root, out, **values))
    return folder_of(out)


def log_of_losses(folder: Path) -> dict[str, str]:
    """What the log says of each step and epoch, but for its speed and time."""
    found = {}
    for line in (folder / "train_log.txt").read_text().splitlines():
        match = re.search(r"(epoch \d+/\d+(?: step \d+/\d+)?)  (loss .*)", line)
        if match:
            text = re.sub(r"\d+ samples/s|[\d.]+ s$", "", match[2])
            assert found.setdefault(match[1], text) == text  # done twice: with the same numbers
    return found


def scalars(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard shows, but for speed."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [n for n in events.Tags()["scalars"] if n != "samples_per_second"]
    return {name: [e.value for e in events.Scalars(name)] for name in names}


def same(a, b, where="") -> None:
    """Equal, bit for bit and however nested."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_end(folder: Path, unbroken: Path) -> None:
    """Checkpoints bit for bit, and the log of losses."""
    for name in ("last.pth", "best.pth"):
        same(load_checkpoint(folder / name), load_checkpoint(unbroken / name), name)
    assert log_of_losses(folder) == log_of_losses(unbroken)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
