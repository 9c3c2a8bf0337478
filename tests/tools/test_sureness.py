"""tools/sureness.py: how often the first hit is right, by how many fit about as well."""

import re

import numpy as np
import pytest

from tests.helpers import run
from tests.reliability.runs import train_small_run
from tools import sureness
from utils.errors import UserError


def test_every_caption_of_a_drawn_person_is_counted(mini_root, tmp_path, monkeypatch, capsys):
    folder = train_small_run(mini_root, tmp_path)
    words = (folder, "--root_dir", mini_root, "--captions", 30, "--device", "cpu")
    run(sureness.main, monkeypatch, *words, "--sizes", 3, 6)
    shown = capsys.readouterr().out
    assert shown.count("identities unknown") == 1
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in re.findall(r"\|.*\(.*", shown)]
    assert [row[:2] for row in rows] == 3 * [["3", "30"], ["not there", "30"], ["6", "30"]]
    for row in rows:
        shares = [int(re.search(r"\((\d+)\)", cell)[1]) for cell in row[2:]]
        assert abs(sum(shares) - 100) <= 2
    with pytest.raises(UserError, match="--sizes: 1 to 6"):
        run(sureness.main, monkeypatch, *words, "--sizes", 7)


def test_a_first_hit_of_the_captions_person_is_right():
    images = np.eye(3, dtype=np.float16)
    pids = np.array([4, 5, 6])
    found = sureness.of(images, pids, np.eye(3, dtype=np.float32), np.array([4, 6, 9]), True)
    assert found.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
