import numpy as np
import pytest
import torch
import yaml

import tools.compare_runs as tool
from processor.results import per_query, read_queries, write_results
from tests.helpers import options, run
from utils.errors import UserError
from utils.metrics import Ranked


def ranked(seed, better=0.0, gallery=100):
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(30).repeat_interleave(2)
    noise = torch.rand(60, generator=generator)
    first = torch.where(noise < 0.4 + better, 1.0, 7.0).double()
    rows = torch.stack([first, 1 / first, 1 / first], dim=1)
    rows[4] = torch.nan
    return Ranked(rows, pids, gallery)


def make(folder, result, stem="test", chosen_on="heldout", overlap=None, test="aa", **more):
    """The folder of an evaluated run, as train.py and test.py write it."""
    folder.mkdir(exist_ok=True)
    results = {
        "epoch": 7,
        "protocol": {"chosen_on": chosen_on, "overlap": overlap, "text": ""},
        "data": {"name": "AGDataAttr", "fingerprint": {"train": "cc", "test": test}},
    }
    checkpoint = folder / ("best.pth" if stem == "test" else f"{stem}.pth")
    write_results(checkpoint, results, per_query("test", {"aerial": result}))
    (folder / "configs.yaml").write_text(yaml.safe_dump(dict(options(**more))))
    return folder


@pytest.fixture
def runs(tmp_path):
    return make(tmp_path / "a", ranked(0)), make(tmp_path / "b", ranked(0, better=0.4))


def report(monkeypatch, capsys, *words):
    run(tool.main, monkeypatch, *words, "--resamples", 500)
    return capsys.readouterr().out


def cells(shown, name):
    """The cells of a row of either table, by its first column."""
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in shown.splitlines() if "|" in x]
    return next(row[1:] for row in rows if row[0] == name)


def test_per_caption_results_are_read_as_they_were_written(runs):
    loaded, result = read_queries(runs[0] / "test_queries.npz", "test", "aerial"), ranked(0)
    torch.testing.assert_close(loaded.rows_Q3, result.rows_Q3, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.pids_Q, result.pids_Q) and loaded.gallery == 100
    assert loaded.summary() == result.summary()


def test_a_clear_difference_has_a_low_p_value_and_the_same_run_has_none(runs, monkeypatch, capsys):
    shown = report(monkeypatch, capsys, *runs)
    a, b = (ranked(0, x).summary().metrics["R@1"] for x in (0, 0.4))
    row = cells(shown, "R@1")
    assert row[:3] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] and float(row[4]) < 0.01
    assert (
        "nothing known differs" in shown
        and "a: one seed, so this says nothing about other" in shown
    )
    row = cells(report(monkeypatch, capsys, runs[0], runs[0]), "R@1")
    assert row[3:] == ["+0.00 to +0.00", "1.0000"]


def test_differences_between_the_runs_come_first(tmp_path, monkeypatch, capsys):
    a = make(tmp_path / "a", ranked(0), num_epoch=12, MLM=True, seed=1)
    overlap = {"images": 5, "people": 3}
    b = make(tmp_path / "b", ranked(1), num_epoch=1, warmup_epochs=0, chosen_on="test",
             overlap=overlap, seed=2, num_workers=3, accum_steps=2)  # fmt: skip
    (a / "test_results.json").write_text(
        (a / "test_results.json")
        .read_text()
        .replace('"cc"', '"dd"')
        .replace('"epoch": 7', '"epoch": 11')  # fmt: skip
    )
    shown = report(monkeypatch, capsys, a, b)
    assert cells(shown, "--num_epoch") == ["12", "1"] and cells(shown, "--MLM") == ["True", "False"]
    assert cells(shown, "epoch evaluated") == ["11", "7"]
    assert cells(shown, "epoch chosen on") == ["heldout", "test"]
    assert cells(shown, "data, train") == ["dd", "cc"]
    assert not any(
        name in shown for name in ("--num_workers", "--accum_steps", "--seed")
    )  # they make no other experiment
    assert shown.index("--num_epoch") < shown.index("R@1")
    assert "b: test itself chose the epoch" in shown and "a: test itself" not in shown
    assert "b: 5 images and 3 people of test" in shown and "chosen in different ways" in shown


def test_facts_that_older_results_lack_are_unknown(runs, monkeypatch, capsys):
    for path in runs:
        (path / "test_results.json").unlink()
    (runs[1] / "configs.yaml").unlink()
    shown = report(monkeypatch, capsys, *runs)
    assert f"b: the options of {runs[1]} are unknown" in shown and "--lr" not in shown
    assert (
        "only by their number and identities" in shown
        and "a: what chose the epoch is unknown" in shown
    )
    (runs[0] / "test_results.json").write_text('{"protocol": "x", "data": 3}')
    with np.load(runs[0] / "test_queries.npz") as archive:
        unmarked = {name: archive[name] for name in archive.files if name != "evaluation"}
    np.savez(runs[0] / "test_queries.npz", **unmarked)
    assert "only by their number and identities" in report(monkeypatch, capsys, *runs)


def test_several_seeds_per_side(tmp_path, monkeypatch, capsys):
    a = [make(tmp_path / f"a{s}", ranked(s), seed=s) for s in (1, 2, 3)]
    b = [make(tmp_path / f"b{s}", ranked(s, 0.4), seed=s) for s in (1, 2)]
    shown = report(monkeypatch, capsys, "--a", *a, "--b", *b)
    means = [np.mean([ranked(s, x).summary().metrics["R@1"] for s in seeds]) for seeds, x in (((1, 2, 3), 0), ((1, 2), 0.4))]  # fmt: skip
    row = cells(shown, "R@1")
    assert [c.split(" ± ")[0] for c in row[:2]] == [f"{m:.2f}" for m in means]
    assert row[2] == f"{means[1] - means[0]:+.2f}" and "95 % (people and seeds)" in shown
    assert "nothing known differs" in shown and "one seed" not in shown
    # Seeds of different recipes, and a repeated seed.
    other = make(tmp_path / "other", ranked(5), seed=1, lr=1e-3)
    shown = report(monkeypatch, capsys, "--a", *a, other, "--b", *b)
    assert "a: not one recipe with several seeds: its runs differ in --lr" in shown
    assert "a: a seed occurs twice" in shown


def test_the_results_of_either_protocol_are_read(tmp_path, monkeypatch, capsys):
    both = {"val_dataset": "both"}
    a, b = (make(tmp_path / name, ranked(0), **both) for name in "ab")
    make(a, ranked(0, 0.2), "best_test", "test", **both)
    clean, paper = (f"{ranked(0, x).summary().metrics['R@1']:.2f}" for x in (0, 0.2))
    make(b, ranked(0, 0.2), "best_test", "test", **both)
    for protocol, expected in (("", clean), ("clean", clean), ("paper", paper)):
        words = ("--protocol", protocol) if protocol else ()
        assert cells(report(monkeypatch, capsys, a, b, *words), "R@1")[:2] == [expected] * 2
    shown = report(monkeypatch, capsys, a / "best_test_queries.npz", b)
    assert cells(shown, "R@1")[:2] == [paper, clean]
    assert cells(shown, "epoch chosen on") == ["test", "heldout"]
    make(b, ranked(0), val_dataset="test")
    with pytest.raises(
        UserError, match="no checkpoint of --protocol clean; .* test, which has: paper"
    ):
        run(tool.main, monkeypatch, "--protocol", "clean", a, b)


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, monkeypatch):
    def refused(match, *words):
        with pytest.raises(UserError, match=match):
            run(tool.main, monkeypatch, *words)

    def against(result, **more):
        return runs[0], make(tmp_path / "other", result, **more)

    refused("no 'test/ground'; it has test/aerial", *runs, "--gallery", "ground")
    one = ranked(0)
    longer = Ranked(torch.cat([one.rows_Q3] * 2), torch.cat([one.pids_Q] * 2), 100)
    refused("test has other captions: 60 and 120", *against(longer))
    refused("captions of other identities", *against(Ranked(one.rows_Q3, torch.arange(60), 100)))
    refused("other galleries: 100 and 90 images", *against(ranked(0, gallery=90)))
    rows = one.rows_Q3.clone()
    rows[5] = torch.nan
    refused("a caption has a match in one and none", *against(Ranked(rows, one.pids_Q, 100)))
    refused("other captions or images .fingerprints aa, bb", *against(one, test="bb"))
    refused("--a: a run is given twice", "--a", runs[0], runs[0], "--b", runs[1])
    refused("give two runs, or --a", runs[0])
    refused("give two runs, or --a", *runs, "--a", runs[0])
    refused("--resamples 0: must be 1 or more", *runs, "--resamples", 0)


def test_an_error_names_an_unreadable_archive(runs, monkeypatch):
    path = runs[1] / "test_queries.npz"
    content = path.read_bytes()
    with np.load(path) as archive:
        arrays = dict(archive)
    for broken in (
        lambda: path.write_bytes(b"x"),
        lambda: path.write_bytes(content[:-40]),
        lambda: np.savez(path, **arrays | {"test/aerial/pid": arrays["test/aerial/pid"][:9]}),
        lambda: np.savez(path, **arrays | {"test/aerial/first": np.array(["x"] * 60)}),
        lambda: np.savez(path, **arrays | {"test/aerial/images": np.array([[1, 2]])}),
    ):
        broken()
        with pytest.raises(UserError, match="b/test_queries.npz: not results of test.py"):
            run(tool.main, monkeypatch, *runs)
    path.unlink()
    with pytest.raises(UserError, match="test_queries.npz: no such file; evaluate the run first: python test.py"):  # fmt: skip
        run(tool.main, monkeypatch, *runs)
