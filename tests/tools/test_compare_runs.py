import pytest
import torch

import tools.compare_runs as tool
from processor.queries import per_query, read_queries, write_queries
from tests.helpers import run
from utils.errors import UserError
from utils.metrics import Ranked


def ranked(seed, better=0.0):
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(30).repeat_interleave(2)
    noise = torch.rand(60, generator=generator)
    first = torch.where(noise < 0.4 + better, 1.0, 7.0).double()
    rows = torch.stack([first, 1 / first, 1 / first], dim=1)
    rows[4] = torch.nan
    return Ranked(rows, pids, 100)


@pytest.fixture
def runs(tmp_path):
    for name, result in (("a", ranked(0)), ("b", ranked(0, better=0.4))):
        (tmp_path / name).mkdir()
        write_queries(tmp_path / name / "test_queries.npz", per_query("test", {"aerial": result}))
    return tmp_path / "a", tmp_path / "b"


def test_results_caption_by_caption_come_back_as_they_were(runs):
    again, result = read_queries(runs[0] / "test_queries.npz", "test", "aerial"), ranked(0)
    torch.testing.assert_close(again.rows_Q3, result.rows_Q3, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.pids_Q, result.pids_Q)
    assert again.summary().percentages() == result.summary().percentages()


def test_a_clear_difference_is_told_from_none(runs, monkeypatch, capsys):
    run(tool.main, monkeypatch, *runs, "--draws", 500)
    row = next(x for x in capsys.readouterr().out.splitlines() if "R@1 " in x)
    cells = [cell.strip() for cell in row.split("|")]
    a, b = (ranked(0, x).summary().r1 for x in (0, 0.4))
    assert cells[2:5] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] and float(cells[6]) < 0.01
    run(tool.main, monkeypatch, runs[0], runs[0], "--draws", 500)
    row = next(x for x in capsys.readouterr().out.splitlines() if "R@1 " in x)
    assert "+0.00 to +0.00" in row and "1.0000" in row


def test_what_cannot_be_compared_is_refused(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no 'test/ground'; it has test/aerial"):
        run(tool.main, monkeypatch, *runs, "--gallery", "ground")
    other = Ranked(ranked(0).rows_Q3, torch.arange(60), 100)
    write_queries(runs[1] / "test_queries.npz", per_query("test", {"aerial": other}))
    with pytest.raises(UserError, match="not evaluated on the same captions"):
        run(tool.main, monkeypatch, *runs)
    (runs[1] / "test_queries.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="no results of test.py"):
        run(tool.main, monkeypatch, *runs)
