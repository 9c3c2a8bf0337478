"""Small trainings, in this process or in a child that can be killed, and how to compare two."""

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
from model.build import build_model
from tests.helpers import ROOT, SCRATCH, options, run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import run_main
from utils.metrics import Retrieval

RECIPE = "supkl+queue+match2+dot"
# Forked from a process that has imported everything and computed nothing, so children start fast.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train"])


def with_r1(result: Retrieval, r1: float) -> Retrieval:
    """The result of an evaluation with another R@1."""
    return replace(result, metrics={**result.metrics, "R@1": r1})


def flags(root, out, **overrides) -> list[str]:
    """Arguments of a run of three epochs of four steps, on images of 32x16. For LoRA it starts from
    a checkpoint next to the data."""
    if overrides.get("lora_rank"):
        overrides = {"finetune": write_start(Path(root).parent / "start.pth"), **overrides}
    values = {
        "root_dir": root, "output_dir": out, "loss_names": RECIPE, "img_size": (32, 16),
        "batch_size": 5, "test_batch_size": 4, "num_epoch": 3, "warmup_epochs": 1, "lr": 1e-3,
        "num_workers": 0, "device": "cpu", "precision": "fp32", "log_period": 1, "img_aug": True,
        "optimizer": "AdamW", **SCRATCH, **overrides,
    }  # fmt: skip
    argv = []
    for name, value in values.items():
        items = value if isinstance(value, (tuple, list)) else [] if value is True else [value]
        argv += [f"--{name}", *map(str, items)]
    return argv


def write_start(path: Path) -> Path:
    """Write a checkpoint of the small model with random weights, unless it exists."""
    if not path.exists():
        model = build_model(options(**SCRATCH, img_size=[32, 16], seed=9), [], num_classes=0)
        save_checkpoint(path, {"model": model.state_dict(), "input": model.base_model.input})
    return path


def main(argv: list[str], threads: int = 1, before=None) -> None:
    """Call `before`, then run train.py with these arguments; for a child process."""
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *argv]
    if before is not None:
        before()
    run_main(train_entry.main)


def start(argv: list[str], output=os.devnull, environment=None, **kwargs):
    """Start `main` in a child process that prints to the file `output`; returns the process."""
    process = forks.Process(target=child, args=(output, environment or {}, argv), kwargs=kwargs)
    process.start()
    return process


def start_many(size: int, argv: list[str], output=os.devnull, **kwargs) -> list:
    """Start `main` in `size` child processes of one process group, as torchrun does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return [
        start(
            argv,
            output,
            {**environment, "RANK": rank, "LOCAL_RANK": rank} if size > 1 else {},
            **kwargs,
        )
        for rank in range(size)
    ]


def child(output, environment: dict, argv: list[str], **kwargs) -> None:
    """Run `main` with its output in a file; for a child process."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as under train.py
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main(argv, **kwargs)


def folder_of(out: Path) -> Path:
    """The folder of the only run in `out`."""
    (config,) = out.glob("*/*/configs.yaml")
    return config.parent


def train_small_run(root, out: Path, **overrides) -> Path:
    """Train in this process, by default for one epoch, and return the run's folder."""
    values = {"num_epoch": 1, "warmup_epochs": 0, "text_length": 12, **overrides}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(train_entry.main, monkeypatch, *flags(root, out, **values))
    return folder_of(out)


def logged_losses(folder: Path) -> dict[str, str]:
    """The losses in the log for each step and epoch, without speed and time."""
    losses = {}
    for line in (folder / "train_log.txt").read_text().splitlines():
        match = re.search(r"(epoch \d+/\d+(?: step \d+/\d+)?)  (loss .*)", line)
        if match:
            text = re.sub(r"\d+ samples/s|[\d.]+ s$", "", match[2])
            assert losses.setdefault(match[1], text) == text  # a repeated step has the same losses
    return losses


def scalars(folder: Path) -> dict[str, list[float]]:
    """The values of each TensorBoard scalar except speed."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [n for n in events.Tags()["scalars"] if n != "samples_per_second"]
    return {name: [e.value for e in events.Scalars(name)] for name in names}


def assert_same(a, b, where="") -> None:
    """Assert that two nested values are equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_end(folder: Path, uninterrupted: Path) -> None:
    """Assert equal checkpoints, bit for bit, and equal losses in the logs."""
    names = [path.name for path in uninterrupted.glob("*.pth")]
    assert {"last.pth", "best.pth"} <= {*names}
    for name in names:
        assert_same(load_checkpoint(folder / name), load_checkpoint(uninterrupted / name), name)
    assert logged_losses(folder) == logged_losses(uninterrupted)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
