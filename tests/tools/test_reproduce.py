import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

import tools.reproduce as tool
from processor.queries import read_queries
from tests.helpers import ROOT, SCRATCH, run
from utils.errors import UserError
from utils.metrics import FIGURES

BASE = {
    **SCRATCH, "img_size": [32, 16], "batch_size": 6, "test_batch_size": 8, "num_epoch": 3,
    "warmup_epochs": 1, "lr": 1e-3, "num_workers": 0, "precision": "fp32",
}  # fmt: skip
ROWS = [
    {"name": "AEA-FIRM", "options": {"loss_names": "supkl+queue+match2+dot"},
     "published": {"R@1": 44.75}},
    {"name": "itc", "options": {"loss_names": "itc"}},
]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    def write(rows):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        content = {"title": "A table", "base": "base.yaml", "rows": rows}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "small.yaml"

    return write


def arguments(table, root, out, *more):
    return ["--table", table, "--root_dir", root, "--output_dir", out, "--device", "cpu", *more]


def reproduce(monkeypatch, table, root, out, *more):
    """Exit status."""
    with pytest.raises(SystemExit) as stopped:
        run(tool.main, monkeypatch, *arguments(table, root, out, *more))
    return stopped.value.code


def done(out):
    return {p.parent.name: json.loads(p.read_text()) for p in out.glob("small/*/done.json")}


def test_a_table_is_run_written_and_traced_to_single_captions(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    path = table([{**ROWS[0], "options": {**ROWS[0]["options"], "val_dataset": "both"}}])
    # Both seeds at once, as on two GPUs.
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--gpus", 0, 1) == 0
    results = list(done(out).values())
    assert [r["seed"] for r in sorted(results, key=lambda r: r["seed"])] == [1, 2]
    shown = capsys.readouterr().out
    for protocol, words in (("paper", "chosen on test"), ("clean", "chosen on val")):
        assert words in shown
        for result in results:
            archive = result[protocol]["queries"]
            figures = read_queries(tool.Path(archive), "test", "aerial").summary().percentages()
            assert figures == pytest.approx({name: result[protocol][name] for name in FIGURES})
        mean = sum(r[protocol]["R@1"] for r in results) / 2
        markdown = (out / "small/table.md").read_text()
        assert f"{mean:.2f} ± " in markdown and f"{mean - 44.75:+.2f}" in markdown
    assert r"$\pm$" in (out / "small/table.tex").read_text()
    assert (out / "small/table.csv").read_text().startswith("method,seeds,R@1")
    # Again: nothing runs, the table is the same.
    before = (out / "small/table.md").read_text()
    monkeypatch.setattr(tool.subprocess, "Popen", None)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2) == 0
    assert (out / "small/table.md").read_text() == before


def test_a_row_that_fails_is_reported_and_the_others_are_done(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    rows = [{"name": "broken", "options": {"loss_names": "supkl+mlm"}}, ROWS[1]]
    out = tmp_path / "out"
    assert reproduce(monkeypatch, table(rows), mini_root, out, "--seeds", 1) == 1
    shown = capsys.readouterr().out
    assert "FAILED broken, seed 1: error: --loss_names supkl+mlm: 'mlm' needs masked" in shown
    assert "broken (1 failed)" in shown and [r["row"] for r in done(out).values()] == ["itc"]


def test_a_killed_table_goes_on_to_the_same_figures(table, mini_root, tmp_path, monkeypatch):
    path = table(ROWS[:1])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert reproduce(monkeypatch, path, mini_root, whole, "--seeds", 1) == 0
    words = map(str, arguments(path, mini_root, cut, "--seeds", 1))
    child = subprocess.Popen(
        [sys.executable, "tools/reproduce.py", *words], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 100
    while not list(cut.glob("small/*/logs/*/*/last.pth")) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not done(cut)
    assert reproduce(monkeypatch, path, mini_root, cut, "--seeds", 1) == 0
    (a,), (b,) = done(whole).values(), done(cut).values()
    assert all(a["paper"][name] == b["paper"][name] for name in (*FIGURES, "epoch"))
    console = next(cut.glob("small/*/console.txt")).read_text()
    assert "resumed after" in console


def test_other_data_code_options_or_seeds_make_other_jobs(
    table, mini_root, mini_copy, tmp_path, monkeypatch
):
    def keys(root, **more):
        given = {"root_dir": str(root), "device": "cpu", "seeds": [1], "output_dir": "x",
                 "mllm4text": "", "num_workers": None, "image_cache": None, "num_epoch": None,
                 "precision": None, **more}  # fmt: skip
        jobs, _ = tool.make_jobs(tool.read_table(str(path)), tool.argparse.Namespace(**given))
        return [job.folder.name for job in jobs]

    path = table(ROWS)
    same = keys(mini_root)
    assert keys(mini_root, output_dir="y", num_workers=3, image_cache="z") == same
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert keys(shutil.copytree(mini_root, tmp_path / "elsewhere")) == same
    assert not set(keys(mini_root, num_epoch=2)) & set(same)
    assert not set(keys(mini_root, seeds=[2])) & set(same)
    (mini_copy / "attrs.json").write_text((mini_copy / "attrs.json").read_text() + " ")
    assert not set(keys(mini_copy)) & set(same)
    monkeypatch.setattr(tool, "code_version", lambda: "other")
    assert not set(keys(mini_root)) & set(same)


def test_a_dry_run_lists_jobs_with_hours_and_what_is_left_out(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    rows = [ROWS[0], {"name": "from MLLM4Text-ReID", "needs": "finetune"}]
    run(tool.main, monkeypatch, *arguments(table(rows), mini_root, tmp_path / "out", "--seeds", 1, "--dry_run"))  # fmt: skip
    shown = capsys.readouterr().out
    assert "to run" in shown and "needs --mllm4text" in shown and "hours of training" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(tool.TABLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_table_that_ships_is_read_and_its_rows_resolve(path):
    table = tool.read_table(path.stem)
    assert table.rows
    for row in table.rows:
        assert tool.resolve({**row["values"]})


def test_what_is_wrong_in_a_table_is_named(table, tmp_path):
    with pytest.raises(UserError, match="--table man: no such table. Did you mean 'main'"):
        tool.read_table("man")
    with pytest.raises(UserError, match="row x: unknown option 'lrr'"):
        tool.read_table(str(table([{"name": "x", "options": {"lrr": 1}}])))
    with pytest.raises(UserError, match="a row needs a name"):
        tool.read_table(str(table([{"nam": "x"}])))


def test_a_job_that_another_process_runs_is_left_to_it(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    out, path = tmp_path / "out", table(ROWS[1:])
    given = dict.fromkeys(("num_workers", "image_cache", "num_epoch", "precision"))
    given |= {"root_dir": str(mini_root), "device": "cpu", "seeds": [1], "output_dir": str(out)}
    jobs, _ = tool.make_jobs(tool.read_table(str(path)), tool.argparse.Namespace(**given, mllm4text=""))  # fmt: skip
    jobs[0].folder.mkdir(parents=True)
    holder = tool.lock(jobs[0].folder, inherited=True)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1) == 1
    assert "another process is at work here" in capsys.readouterr().out and not done(out)
    os.close(holder)
    os.close(tool.lock(jobs[0].folder, inherited=True))  # free again
