"""What is kept from run to run."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from construction.store import Store, key_of
from utils.errors import UserError


def test_a_value_is_there_in_the_next_run(tmp_path):
    with Store(tmp_path) as store:
        assert store.get("answer", "a") is None
        store.put("answer", [("a", {"text": "ü\ud800"}), ("b", [1, None, 0.5])])
        store.put("score", [("a", 1)])
    with Store(tmp_path) as store:
        assert store.get("answer", "a") == {"text": "ü\ud800"}
        assert store.get("score", "a") == 1
        assert list(store.values("answer")) == [{"text": "ü\ud800"}, [1, None, 0.5]]


def _put_and_die(folder):
    store = Store(folder)
    store.put("answer", [("a", 1)])
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_value_that_was_put_survives_a_kill(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_put_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Store(tmp_path).get("answer", "a") == 1


def test_a_run_finds_what_the_shares_have_kept(tmp_path):
    for share in ("1-of-2", "2-of-2"):
        Store(tmp_path, share).put("answer", [(share, share), ("both", share)])
    store = Store(tmp_path)
    assert [store.get("answer", key) for key in ("1-of-2", "2-of-2")] == ["1-of-2", "2-of-2"]
    assert store.get("answer", "both") == "1-of-2"


def test_a_corrupted_file_is_named_and_not_overwritten(tmp_path):
    (tmp_path / "all.sqlite").write_bytes(b"paid for" * 1000)
    with pytest.raises(UserError, match=r"all\.sqlite: what earlier runs have paid for is kept"):
        Store(tmp_path)
    assert (tmp_path / "all.sqlite").read_bytes() == b"paid for" * 1000
    (tmp_path / "all.sqlite").rename(tmp_path / "1-of-2.sqlite")
    with pytest.raises(UserError, match=r"1-of-2\.sqlite: what earlier"):
        Store(tmp_path)


def test_keys_differ_with_every_part():
    keys = {key_of("a", 1), key_of("a", "1"), key_of("a1"), key_of("a", [1]), key_of("a")}
    assert len(keys) == 5 and key_of("a", 1) == key_of("a", 1)
