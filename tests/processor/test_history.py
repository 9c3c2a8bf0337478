"""history.jsonl: one line per epoch, for tools and people."""

import json

import pytest

from processor.history import HISTORY, read_history, write_epoch
from utils.errors import UserError


def test_epochs_are_in_order_and_a_resumed_run_replaces_later_ones(tmp_path):
    for epoch, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 1.75)):
        write_epoch(tmp_path, {"epoch": epoch, "loss/total": loss, "val": {"R@1": 50.0}})
    assert [(row["epoch"], row["loss/total"]) for row in read_history(tmp_path)] == [(1, 3.0), (2, 1.75)]  # fmt: skip
    assert read_history(tmp_path)[1]["val"] == {"R@1": 50.0}


def test_values_that_are_not_finite_become_null_so_every_line_is_json(tmp_path):
    write_epoch(tmp_path, {"epoch": 1, "loss/total": float("nan"), "grad_norm": float("inf")})
    (line,) = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"epoch": 1, "loss/total": None, "grad_norm": None}  # fmt: skip


def test_lines_that_are_not_epochs_are_skipped(tmp_path):
    assert read_history(tmp_path) == []
    (tmp_path / HISTORY).write_bytes(
        b'{"epoch": 1}\n{"epo\n[]\n{"epoch": "2"}\n\xff\n{"epoch": 3}\n'
    )
    assert [row["epoch"] for row in read_history(tmp_path)] == [1, 3]


def test_a_history_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / HISTORY).mkdir()
    with pytest.raises(UserError, match=f"{HISTORY}: could not be written"):
        write_epoch(tmp_path, {"epoch": 1})
