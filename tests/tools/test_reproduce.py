import dataclasses
import json
import os
import re
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
from utils.metrics import METRICS

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


def jobs_of(table, root, out="x", seeds=(1,), **options):
    given = {"root_dir": str(root), "seeds": seeds, "output_dir": str(out), "mllm4text": ""}
    jobs, _ = tool.make_jobs(tool.read_table(str(table)), tool.argparse.Namespace(**given), options)
    return jobs


@pytest.fixture
def finish(monkeypatch):
    """Jobs that are done at once, with these metrics, and by the named code."""

    def by(sources, protocol=None, epochs=None):
        code = {"commit": f"commit of {sources}", "sources": sources}
        monkeypatch.setattr(tool, "code_version", lambda: code)

        def call(runner, job, gpu, program, *words):
            folder = job.folder / "logs/AGDataAttr/run"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "last.pth").write_bytes(b"")
            metrics = dict.fromkeys(METRICS, 50.0)
            galleries = {"aerial": {**metrics, "queries": 9, "gallery": 9}}
            result = {"epoch": 3, "splits": {"test": {"galleries": galleries}}, **(protocol or {})}
            for name in ("test", "best_test"):
                (folder / f"{name}_results.json").write_text(json.dumps(result))
            if epochs is not None and program == "train.py":
                epochs.append(job.row)

        monkeypatch.setattr(tool.Runner, "_call", call)

    return by


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
    for protocol, words in (("paper", "chosen on test"), ("clean", "on held-out training")):
        assert words in shown
        for result in results:
            archive = result[protocol]["queries"]
            metrics = read_queries(tool.Path(archive), "test", "aerial").summary().metrics
            assert metrics == pytest.approx({name: result[protocol][name] for name in METRICS})
        mean = sum(r[protocol]["R@1"] for r in results) / 2
        markdown = (out / "small/table.md").read_text()
        assert f"{mean:.2f} ± " in markdown and f"{mean - 44.75:+.2f}" in markdown
    assert r"$\pm$" in (out / "small/table.tex").read_text()
    assert (out / "small/table.csv").read_text().startswith("method,seeds,R@1")
    # Again: nothing runs, the table is the same.
    before = (out / "small/table.md").read_text()
    monkeypatch.setattr(tool.Runner, "run", None)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2) == 0
    assert (out / "small/table.md").read_text() == before


def test_a_row_that_fails_is_reported_and_the_others_are_done(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    rows = [{"name": "broken", "options": {"loss_names": "supkl+dot"}}, ROWS[1]]
    out = tmp_path / "out"
    assert reproduce(monkeypatch, table(rows), mini_root, out, "--seeds", 1) == 1
    shown = capsys.readouterr().out
    assert "FAILED broken, seed 1: error: --loss_names supkl+dot: 'dot' needs match2" in shown
    assert "broken (1 failed)" in shown and [r["row"] for r in done(out).values()] == ["itc"]


def test_a_killed_table_goes_on_to_the_same_metrics(table, mini_root, tmp_path, monkeypatch):
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
    assert all(a["paper"][name] == b["paper"][name] for name in (*METRICS, "epoch"))
    console = next(cut.glob("small/*/console.txt")).read_text()
    assert "resumed after" in console


def test_other_data_options_or_seeds_make_other_jobs(table, mini_root, mini_copy, tmp_path):
    def keys(root, *more, **options):
        return [job.folder.name for job in jobs_of(path, root, *more, **options)]

    path = table(ROWS)
    same = keys(mini_root)
    assert keys(mini_root, "y", num_workers=3, image_cache="z", device="cpu") == same
    assert keys(mini_root, accum_steps=2, grad_checkpointing=True, compile=True) == same
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert keys(shutil.copytree(mini_root, tmp_path / "elsewhere")) == same
    assert not set(keys(mini_root, num_epoch=2)) & set(same)
    assert not set(keys(mini_root, seeds=[2])) & set(same)
    (mini_copy / "attrs.json").write_text((mini_copy / "attrs.json").read_text() + " ")
    assert not set(keys(mini_copy)) & set(same)


def test_a_job_survives_new_options_but_not_a_changed_default(
    table, mini_root, tmp_path, monkeypatch
):
    (job,) = jobs_of(table(ROWS[1:]), mini_root, tmp_path)
    tool.write_config(job.folder / "options.yaml", job.args)

    def default(name, value):
        option = tool.OPTIONS.get(name) or tool.OPTIONS["slack"]
        monkeypatch.setitem(
            tool.OPTIONS, name, dataclasses.replace(option, name=name, default=value)
        )

    default("new_option", 3)
    assert jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0].folder == job.folder
    default("slack", 0.2)
    other = jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0]
    assert other.args.slack == 0.2 and other.folder != job.folder
    assert jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0].folder == other.folder


def test_finished_jobs_survive_other_code_which_is_told_and_strict_trains_again(
    table, mini_root, tmp_path, monkeypatch, capsys, finish
):
    out, path, trained = tmp_path / "out", table(ROWS), []
    finish("one", epochs=trained)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1) == 0
    assert "other code" not in capsys.readouterr().out and len(trained) == 2
    finish("two", epochs=trained)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2) == 0
    shown = capsys.readouterr().out
    assert shown.count("other code") == 1 and len(trained) == 4
    assert ("2 of 4 jobs were done or begun with other code (commit of one; now commit of two): "
            "--strict trains them again") in shown  # fmt: skip
    codes = [[v["sources"] for v in r["code"]] for r in done(out).values()]
    assert sorted(codes) == [["one"], ["one"], ["two"], ["two"]]
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--strict") == 0
    assert len(trained) == 6 and "they are trained again" in capsys.readouterr().out
    found = done(out)
    assert {v["sources"] for n, r in found.items() if "backup" not in n for v in r["code"]} == {
        "two"
    }
    assert sum(".backup1" in name for name in found) == 2  # nothing is deleted
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--strict") == 0
    assert len(trained) == 6


def test_the_version_of_the_code_is_its_commit_or_a_hash_where_git_is_not(tmp_path, monkeypatch):
    for name in ("train.py", "model/a.py", "model/deep/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    alone = tool.code_version()
    assert alone["commit"] == f"sources {alone['sources'][:12]}"

    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "train.py", "model")
    git("commit", "-m", "x")
    clean = tool.code_version()
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["sources"] == alone["sources"]
    (tmp_path / "notes.txt").write_text("no code")
    assert tool.code_version() == clean
    (tmp_path / "model/deep/b.py").write_text("other")
    changed = tool.code_version()
    assert (
        changed["commit"] == f"{clean['commit']}-dirty" and changed["sources"] != clean["sources"]
    )
    monkeypatch.setenv("PATH", "")
    assert tool.code_version()["commit"].startswith("sources ")


PAPER, CLEAN, VAL, LAST = (tool.PROTOCOLS[name] for name in ("paper", "clean", "val", "last"))


@pytest.mark.parametrize(
    ("protocol", "chosen_on", "overlap", "expected"),
    [
        ("clean", "heldout", None, f"{CLEAN} (the clean protocol: test had no part in it)"),
        ("clean", "heldout", {"images": 0, "people": 9},
         f"{CLEAN}; 0 of its images and 9 of its people are in test too"),
        ("clean", "", None, f"{CLEAN}; whether test has the same people is unknown"),
        ("val", "val", {"images": 41, "people": 7},
         f"{VAL}; 41 of its images and 7 of its people are in test too"),
        ("val", "val", None, f"{VAL}; none of its images or people is in test"),
        ("val", "", None, f"{VAL}; whether test has the same people is unknown"),
        ("last", "last", None, LAST),
        ("paper", "test", None, PAPER),
    ],
)  # fmt: skip
def test_a_table_says_what_chose_and_whether_that_is_in_test(
    protocol, chosen_on, overlap, expected, tmp_path
):
    said = {"chosen_on": chosen_on, "overlap": overlap, "text": ""} if chosen_on else None
    args = tool.argparse.Namespace(val_dataset="any", heldout=0.1)
    jobs = []
    for seed, measured in ((1, said), (2, said and {**said, "overlap": None})):
        jobs.append(tool.Job("row", seed, args, tmp_path / str(seed)))
        jobs[-1].folder.mkdir()
        found = {**dict.fromkeys(tool.METRICS, 1.0), "protocol": measured}
        (jobs[-1].folder / "done.json").write_text(
            json.dumps(dict.fromkeys(("paper", "clean", protocol), found))
        )
    assert tool.heading(protocol, jobs) == expected
    args.val_dataset = "both"
    apart = (
        ", trained without the 10 % of identities that are held out" if protocol == "paper" else ""
    )
    assert tool.heading(protocol, jobs) == expected + apart
    assert "clean" not in tool.heading(protocol, [tool.Job("row", 3, args, tmp_path / "not run")])


def test_the_chooser_can_be_told_and_makes_another_table(
    table, mini_root, tmp_path, monkeypatch, finish
):
    out = tmp_path / "out"
    finish("one", {"protocol": {"chosen_on": "val", "overlap": {"images": 41, "people": 7}}})
    words = ("--seeds", 1, "--val_dataset", "val")
    assert reproduce(monkeypatch, table(ROWS[1:]), mini_root, out, *words) == 0
    text = (out / "small/table.md").read_text()
    assert "41 of its images" in text and text.startswith("# A table (but val_dataset val)")
    assert next(iter(done(out).values()))["val"]["protocol"]["chosen_on"] == "val"


def test_memory_options_reach_the_jobs_and_are_checked_as_train_py_checks_them(
    table, mini_root, tmp_path, monkeypatch, capsys, finish
):
    out, path = tmp_path / "out", table(ROWS[1:])
    finish("one")
    words = ("--seeds", 1, "--accum_steps", 3, "--grad_checkpointing", "--test_batch_size", 5)
    assert reproduce(monkeypatch, path, mini_root, out, *words) == 0
    config = yaml.safe_load(next(out.glob("small/*/options.yaml")).read_text())
    assert [config[n] for n in ("accum_steps", "grad_checkpointing", "test_batch_size")] == [3, True, 5]  # fmt: skip
    assert (out / "small/table.md").read_text().startswith("# A table\n")  # it is the same table
    for wrong, match in (
        (("--accum_steps", 0), "--accum_steps must be at least 1"),
        (("--accum_steps", 7), "--accum_steps 7 exceeds --batch_size 6"),
        (("--lr", 1), "unrecognized arguments: --lr"),
    ):
        with pytest.raises(UserError, match=match):
            run(tool.main, monkeypatch, *arguments(path, mini_root, out, *wrong))


def test_a_dry_run_lists_jobs_with_hours_and_what_is_left_out(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    rows = [ROWS[0], {"name": "from MLLM4Text-ReID", "needs": "finetune"}]
    run(tool.main, monkeypatch, *arguments(table(rows), mini_root, tmp_path / "out", "--seeds", 1, "--dry_run"))  # fmt: skip
    shown = capsys.readouterr().out
    assert "to run" in shown and "needs --mllm4text" in shown and "hours of training" in shown
    assert len(re.findall(r"[\d.e-]+ \([\d.e-]+ to [\d.e-]+\)", shown)) == 2  # a job, and all
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
    jobs = jobs_of(path, mini_root, out)
    jobs[0].folder.mkdir(parents=True)
    holder = tool.lock(jobs[0].folder, inherited=True)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1) == 1
    assert "another process is at work here" in capsys.readouterr().out and not done(out)
    os.close(holder)
    os.close(tool.lock(jobs[0].folder, inherited=True))  # free again


def test_ablations_are_marked_and_only_they_leave_the_papers_recipe(table, mini_root, tmp_path):
    """Rows that mask no captions, or augment images, where the paper's command does otherwise."""
    for path in sorted(tool.TABLES.glob("*.yaml")):
        read = tool.read_table(path.stem)
        base = yaml.safe_load(path.read_text())["base"]
        for row in read.rows:
            recipe = tool.read_preset(path.parent / row.get("base", base))
            changed = any(
                row["values"].get(n) != recipe.get(n) for n in ("MLM", "txt_aug", "img_aug")
            )
            assert bool(row.get("ablation")) == changed, (path.stem, row["name"])
    marked = {r["name"] for r in tool.read_table("losses").rows if r.get("ablation")}
    assert {"AEA-FIRM without --MLM", "supkl+queue, --img_aug"} <= marked
    rows = [{**ROWS[1], "ablation": True}]
    shown = next(
        tool.tables_of(tool.read_table(str(table(rows))), jobs_of(table(rows), mini_root), {})
    )
    assert shown[2][0][0] == "itc (ablation)"
