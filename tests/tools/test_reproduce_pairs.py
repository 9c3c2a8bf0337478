"""Intervals and paired tests of a table's rows."""

import argparse
import re

import pytest

from processor.results import intervals, per_query, write_results
from tests.tools.test_compare_runs import cells, ranked
from tools._reproduce_jobs import Job
from tools._reproduce_output import tables_of, write_tables
from tools._reproduce_pairs import RESAMPLES, comparison
from tools._reproduce_table import Table
from tools.compare_runs import compare


@pytest.fixture
def finished(tmp_path):
    """A function that makes a finished job, with the results of each caption on disk."""

    def make(row, seed, result, test="aa"):
        folder = tmp_path / f"{row}{seed}"
        folder.mkdir()
        results = {
            "epoch": 3,
            "protocol": {"chosen_on": "test", "overlap": None, "text": ""},
            "data": {"name": "AGDataAttr", "fingerprint": {"test": test}},
            "splits": {"test": {"galleries": {"mixed": result.summary().results()}}},
        }
        write_results(folder / "best.pth", results, per_query("test", {"mixed": result}))
        metrics = {**result.summary().metrics, "queries": str(folder / "test_queries.npz")}
        args = argparse.Namespace(val_dataset="test")
        return Job(row, seed, args, folder, new_results={"paper": metrics})

    return make


TABLE = Table("t", "T", [{"name": "a"}, {"name": "b"}, {"name": "c"}], against="a")


def test_a_rows_difference_is_what_compare_runs_prints_for_its_seeds(finished):
    jobs = [finished("a", s, ranked(s)) for s in (1, 2)]
    jobs += [finished("b", s, ranked(s, 0.4)) for s in (1, 2, 3)]
    about, titles, rows = comparison(TABLE, jobs, "paper")
    assert about.startswith("difference from a, best epoch chosen on test")
    assert about.endswith("intervals cover other people and seeds, p other people")
    assert [row[0] for row in rows] == ["a", "b"] and len(rows[0]) == len(titles)
    assert rows[0][3:5] == ["", ""]  # not compared with itself
    sides = {n: [j.folder / "test_queries.npz" for j in jobs if j.row == n] for n in "ab"}
    report = compare(sides, "test", "mixed", RESAMPLES)
    for metric, column in (("R@1", 2), ("mAP", 5)):
        _, b, difference, interval, p = cells(report, metric)
        assert rows[1][column + 1 : column + 3] == [f"{difference} ({interval})", p]
        assert rows[1][column].startswith(f"{b.split(' ± ')[0]} (")


def test_the_interval_of_a_single_seed_is_that_of_test_py(finished):
    result = ranked(4)
    about, _, (row,) = comparison(TABLE, [finished("a", 1, result)], "paper")
    assert about.endswith("intervals cover other people, p other people")
    expected = intervals(result, RESAMPLES, 0)
    for shown, metric in ((row[2], "R@1"), (row[5], "mAP")):
        low, high = expected[metric]
        assert shown.endswith(f"({low:.2f} to {high:.2f})")


def test_two_seeds_that_differ_have_a_wider_interval_than_one_of_them(finished):
    def width(cell):
        low, high = map(float, re.findall(r"-?[\d.]+", cell.split("(")[1]))
        return high - low

    jobs = [finished("a", 1, ranked(0)), finished("a", 2, ranked(0, 0.4))]
    one, two = (comparison(TABLE, some, "paper")[2][0][2] for some in (jobs[:1], jobs))
    assert width(two) > 1.5 * width(one)


def test_rows_that_cannot_be_compared_have_a_reason_in_place_of_numbers(finished):
    jobs = [finished("a", 1, ranked(0)), finished("b", 1, ranked(1), test="bb")]
    about, _, rows = comparison(TABLE, jobs, "paper")
    assert rows == [] and "cannot be compared: test has other captions or images" in about
    about, _, rows = comparison(TABLE, jobs[1:], "paper")
    assert rows == [] and about.endswith("(the paper's protocol): it has no finished job")
    (jobs[0].folder / "test_queries.npz").unlink()
    about, _, rows = comparison(TABLE, jobs[:1], "paper")
    assert rows == [] and "not computed" in about and "no such file" in about


def test_the_comparison_follows_each_protocol_only_in_tables_that_ask(finished, tmp_path):
    jobs = [finished("a", 1, ranked(0)), finished("b", 1, ranked(0, 0.4))]
    plain = Table("t", "T", TABLE.rows)
    assert len([*tables_of(plain, jobs, {})]) == 1 and len([*tables_of(TABLE, jobs, {})]) == 2
    out = tmp_path / "out"
    out.mkdir()
    write_tables(TABLE, jobs, {}, out)
    for name in ("md", "csv", "tex"):
        text = (out / f"table.{name}").read_text()
        assert "R@1 difference (95" in text and len(re.findall(r"\([+-][\d.]+ to ", text)) == 2
