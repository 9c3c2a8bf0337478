import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from processor.results import read_queries
from tests.helpers import ROOT, SCRATCH, run
from tools import _reproduce_jobs
from tools import reproduce as tool
from tools._reproduce_jobs import PROTOCOLS, Job, code_version, make_jobs
from tools._reproduce_output import heading, tables_of
from tools._reproduce_runner import Runner
from tools._reproduce_table import TABLES, WEIGHTS, read_table
from utils.config import read_preset, resolve, write_config
from utils.errors import UserError
from utils.files import lock
from utils.metrics import METRICS
from utils.options import OPTIONS

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
    def write(rows, **keys):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        content = {"title": "A table", "base": "base.yaml", "rows": rows, **keys}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "small.yaml"

    return write


def arguments(table, root, out, *more):
    return ["--table", table, "--root_dir", root, "--output_dir", out, "--device", "cpu", *more]


def jobs_of(table, root, out="x", seeds=(1,), **options):
    given = {
        "root_dir": str(root),
        "seeds": seeds,
        "output_dir": str(out),
        "mllm4text": "",
        "ham": "",
        "rows": [],
    }
    jobs, _ = make_jobs(read_table(str(table)), argparse.Namespace(**given), options)
    return jobs


@pytest.fixture
def finish(monkeypatch):
    """A function that makes jobs finish at once, with metrics of 50, under the named code."""

    def by(sources, protocol=None, trained=None):
        code = {"commit": f"commit of {sources}", "sources": sources}
        monkeypatch.setattr(tool, "code_version", lambda: code)

        def call(runner, job, slot, program, *words):
            folder = job.folder / "logs/AGDataAttr/run"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "last.pth").write_bytes(b"")
            metrics = dict.fromkeys(METRICS, 50.0)
            galleries = {"aerial": {**metrics, "queries": 9, "gallery": 9}}
            result = {"epoch": 3, "splits": {"test": {"galleries": galleries}}, **(protocol or {})}
            for name in ("test", "best_test"):
                (folder / f"{name}_results.json").write_text(json.dumps(result))
            if trained is not None and program == "train.py":
                trained.append(job.row)

        monkeypatch.setattr(Runner, "_call", call)

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
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--jobs", 2) == 0
    results = list(done(out).values())
    assert [r["seed"] for r in sorted(results, key=lambda r: r["seed"])] == [1, 2]
    shown = capsys.readouterr().out
    for protocol, words in (("paper", "chosen on test"), ("clean", "on held-out training")):
        assert words in shown
        for result in results:
            archive = result[protocol]["queries"]
            metrics = read_queries(Path(archive), "test", "aerial").summary().metrics
            assert metrics == pytest.approx({name: result[protocol][name] for name in METRICS})
        mean = sum(r[protocol]["R@1"] for r in results) / 2
        markdown = (out / "small/table.md").read_text()
        assert f"{mean:.2f} ± " in markdown and f"{mean - 44.75:+.2f}" in markdown
    assert r"$\pm$" in (out / "small/table.tex").read_text()
    head = (out / "small/table.csv").read_text().splitlines()[0]
    assert head == "method,seeds,R@1,R@5,R@10,mAP,mINP,RSum,published R@1,difference"
    # A second call runs nothing, and writes the same table.
    before = (out / "small/table.md").read_text()
    monkeypatch.setattr(Runner, "run", None)
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


@pytest.mark.parametrize(
    ("words", "slots"),
    [
        (("--gpus", "0", "1"), [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (("--jobs", 2), [{"OMP_NUM_THREADS": "3"}] * 2),
        (("--jobs", 9), [{"OMP_NUM_THREADS": "1"}] * 9),
        ((), [{}]),
    ],
)
def test_jobs_at_a_time_share_the_gpus_or_the_cores(
    words, slots, table, mini_root, tmp_path, monkeypatch
):
    barrier, seen = threading.Barrier(len(slots), timeout=60), []

    def call(runner, job, slot, *_):  # goes on when a job runs in each slot
        seen.append(slot)
        barrier.wait()
        raise UserError("enough")

    monkeypatch.setattr(Runner, "_call", call)
    monkeypatch.setattr("tools._reproduce_runner.cores", lambda: 6)
    seeds = range(1, len(slots) + 1)
    given = arguments(table(ROWS[1:]), mini_root, tmp_path, "--seeds", *seeds, *words)
    with pytest.raises((UserError, SystemExit)):
        run(tool.main, monkeypatch, *given)
    assert sorted(map(str, seen)) == sorted(map(str, slots))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--jobs", 0), "--jobs 0: must be at least 1"),
        (("--jobs", 2, "--gpus", "0"), "--jobs: the number of jobs at a time follows from --gpus"),
        (("--jobs", 2, "--cluster", "local"), "--jobs: the number .* or --cluster"),
    ],
)
def test_jobs_that_cannot_be_are_refused(words, message, table, mini_root, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(tool.main, monkeypatch, *arguments(table(ROWS[1:]), mini_root, tmp_path, *words))


def test_a_killed_table_resumes_to_the_same_metrics(table, mini_root, tmp_path, monkeypatch):
    path = table(ROWS[:1])
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert reproduce(monkeypatch, path, mini_root, complete, "--seeds", 1) == 0
    words = map(str, arguments(path, mini_root, killed, "--seeds", 1))
    child = subprocess.Popen(
        [sys.executable, "tools/reproduce.py", *words], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 100
    while not list(killed.glob("small/*/logs/*/*/last.pth")) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not done(killed)
    assert reproduce(monkeypatch, path, mini_root, killed, "--seeds", 1) == 0
    (a,), (b,) = done(complete).values(), done(killed).values()
    assert all(a["paper"][name] == b["paper"][name] for name in (*METRICS, "epoch"))
    console = next(killed.glob("small/*/console.txt")).read_text()
    assert "resumed after" in console


def test_rows_that_are_named_are_trained_and_the_others_stay(
    table, mini_root, tmp_path, monkeypatch, capsys, finish
):
    trained, out, path = [], tmp_path / "out", table(ROWS)
    finish("one", trained=trained)
    first, second = (row["name"] for row in ROWS[:2])
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, "--rows", second) == 0
    assert trained == [second] and "not in --rows" in capsys.readouterr().out
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, "--rows", first) == 0
    assert trained == [second, first] and "not in --rows" not in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--rows: small has no row 'itx'. Did you mean '{second}'"):
        run(tool.main, monkeypatch, *arguments(path, mini_root, out, "--rows", "itx"))


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
    write_config(job.folder / "options.yaml", job.args)

    def default(name, value):
        option = OPTIONS.get(name) or OPTIONS["slack"]
        monkeypatch.setitem(OPTIONS, name, dataclasses.replace(option, name=name, default=value))

    default("new_option", 3)
    assert jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0].folder == job.folder
    default("slack", 0.2)
    other = jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0]
    assert other.args.slack == 0.2 and other.folder != job.folder
    assert jobs_of(table(ROWS[1:]), mini_root, tmp_path)[0].folder == other.folder


def test_other_code_keeps_finished_jobs_with_a_note_and_strict_trains_them_again(
    table, mini_root, tmp_path, monkeypatch, capsys, finish
):
    out, path, trained = tmp_path / "out", table(ROWS), []
    finish("one", trained=trained)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1) == 0
    assert "other code" not in capsys.readouterr().out and len(trained) == 2
    finish("two", trained=trained)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2) == 0
    shown = capsys.readouterr().out
    assert shown.count("other code") == 1 and len(trained) == 4
    assert ("2 of 4 jobs ran, at least in part, with other code (commit of one; now commit of two): "
            "--strict trains them again") in shown  # fmt: skip
    codes = [[v["sources"] for v in r["code"]] for r in done(out).values()]
    assert sorted(codes) == [["one"], ["one"], ["two"], ["two"]]
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--strict") == 0
    assert len(trained) == 6 and "they are trained again" in capsys.readouterr().out
    results = done(out)
    assert {v["sources"] for n, r in results.items() if "backup" not in n for v in r["code"]} == {
        "two"
    }
    assert sum(".backup1" in name for name in results) == 2  # nothing is deleted
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1, 2, "--strict") == 0
    assert len(trained) == 6


def test_the_version_of_the_code_is_its_commit_or_without_git_a_hash(tmp_path, monkeypatch):
    for name in ("train.py", "model/a.py", "model/deep/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(_reproduce_jobs, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    without_git = code_version()
    assert without_git["commit"] == f"sources {without_git['sources'][:12]}"

    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "train.py", "model")
    git("commit", "-m", "x")
    clean = code_version()
    assert (
        re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["sources"] == without_git["sources"]
    )
    (tmp_path / "notes.txt").write_text("no code")
    assert code_version() == clean
    (tmp_path / "model/deep/b.py").write_text("other")
    changed = code_version()
    assert (
        changed["commit"] == f"{clean['commit']}-dirty" and changed["sources"] != clean["sources"]
    )
    monkeypatch.setenv("PATH", "")
    assert code_version()["commit"].startswith("sources ")


PAPER, CLEAN, VAL, LAST = (PROTOCOLS[name] for name in ("paper", "clean", "val", "last"))


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
def test_a_heading_names_what_chose_the_epoch_and_what_it_shares_with_test(
    protocol, chosen_on, overlap, expected, tmp_path
):
    recorded = {"chosen_on": chosen_on, "overlap": overlap, "text": ""} if chosen_on else None
    args = argparse.Namespace(val_dataset="any", heldout=0.1)
    jobs = []
    for seed, of_job in ((1, recorded), (2, recorded and {**recorded, "overlap": None})):
        jobs.append(Job("row", seed, args, tmp_path / str(seed)))
        jobs[-1].folder.mkdir()
        metrics = {**dict.fromkeys(METRICS, 1.0), "protocol": of_job}
        (jobs[-1].folder / "done.json").write_text(
            json.dumps(dict.fromkeys(("paper", "clean", protocol), metrics))
        )
    assert heading(protocol, jobs) == expected
    args.val_dataset = "both"
    apart = (
        ", trained without the 10 % of identities that are held out" if protocol == "paper" else ""
    )
    assert heading(protocol, jobs) == expected + apart
    assert "clean" not in heading(protocol, [Job("row", 3, args, tmp_path / "not run")])


def test_val_dataset_makes_other_jobs_and_another_title(
    table, mini_root, tmp_path, monkeypatch, finish
):
    out = tmp_path / "out"
    finish("one", {"protocol": {"chosen_on": "val", "overlap": {"images": 41, "people": 7}}})
    words = ("--seeds", 1, "--val_dataset", "val")
    assert reproduce(monkeypatch, table(ROWS[1:]), mini_root, out, *words) == 0
    text = (out / "small/table.md").read_text()
    assert "41 of its images" in text and text.startswith("# A table (but val_dataset val)")
    assert next(iter(done(out).values()))["val"]["protocol"]["chosen_on"] == "val"


def test_memory_options_reach_the_jobs_and_are_checked_as_in_train_py(
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
    rows = [ROWS[0], {"name": "from MLLM4Text-ReID", "needs": "mllm4text"}]
    run(tool.main, monkeypatch, *arguments(table(rows), mini_root, tmp_path / "out", "--seeds", 1, "--dry_run"))  # fmt: skip
    shown, progress = capsys.readouterr()
    assert "to run" in shown and "needs --mllm4text" in shown and "hours of training" in shown
    assert f"measuring steps of {ROWS[0]['name']}" in progress
    assert len(re.findall(r"[\d.e-]+ \([\d.e-]+ to [\d.e-]+\)", shown)) == 2  # a job, and all
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_row_whose_losses_cannot_work_together(
    table, mini_root, tmp_path, monkeypatch
):
    path = table([{"name": "no TAL", "options": {"loss_names": "ccd"}}])
    with pytest.raises(UserError, match="row no TAL: --loss_names ccd: 'ccd' needs tal too"):
        run(tool.main, monkeypatch, *arguments(path, mini_root, tmp_path / "out", "--dry_run"))


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_table_in_configs_is_read_and_its_rows_resolve(path):
    table = read_table(path.stem)
    assert table.rows
    for row in table.rows:
        assert resolve({**row["values"]})


def test_an_error_names_the_faulty_entry_of_a_table(table, tmp_path):
    with pytest.raises(UserError, match="--table man: no such table. Did you mean 'main'"):
        read_table("man")
    with pytest.raises(UserError, match="row x: unknown option 'lrr'"):
        read_table(str(table([{"name": "x", "options": {"lrr": 1}}])))
    with pytest.raises(UserError, match="a row needs a name"):
        read_table(str(table([{"nam": "x"}])))

    def refused(match, row, **keys):
        with pytest.raises(UserError, match=match):
            read_table(str(table([row, ROWS[1]], **keys)))

    refused("row SSAN: published_only: it is not trained; remove options", {**WHOLE, "options": {}})
    refused("row SSAN: published_only: it has no published metrics", {**WHOLE, "published": {}})
    refused("row 1: encoder must be text, got 50", {**WHOLE, "encoder": 50})
    refused("needs is 'x'; known: mllm4text, ham", {"name": "x", "needs": "x"})
    refused("against is for tables with paired: true", WHOLE, against="itc")
    refused("against: no row 'SSAN' is trained", WHOLE, against="SSAN", paired=True)
    refused("no row 'it' is trained. Did you mean 'itc'", WHOLE, against="it", paired=True)
    with pytest.raises(UserError, match="all rows are published_only"):
        read_table(str(table([WHOLE])))
    assert read_table(str(table([WHOLE, ROWS[1]], paired=True))).against == "itc"


WHOLE = {"name": "SSAN", "encoder": "ResNet-50", "published_only": True,
         "published": {"R@1": 22.81, "R@5": 40.28, "R@10": 49.91, "mAP": 19.22}}  # fmt: skip


def test_a_row_that_is_only_published_stands_in_grey_and_is_not_trained(
    table, mini_root, tmp_path, monkeypatch, capsys, finish
):
    out, trained = tmp_path / "out", []
    finish("one", trained=trained)
    rows = [WHOLE, ROWS[1], {**WHOLE, "name": "R@1 alone", "published": {"R@1": 44.5}}]
    rows += [{"name": "HAM", "needs": "ham", "published": {"R@1": 47.81}}]
    assert reproduce(monkeypatch, table(rows), mini_root, out, "--seeds", 1) == 0
    assert trained == ["itc"]
    shown = capsys.readouterr().out
    values = "22.81 | 40.28 | 49.91 | 19.22 |  | 113.00 | 22.81 | "
    written = {n: (out / f"small/table.{n}").read_text() for n in ("md", "tex", "csv")}
    assert re.search(r"SSAN \(published\) +\| ResNet-50 +\| +\| +22.81 ", shown)
    line = next(x for x in written["csv"].splitlines() if "SSAN" in x)
    assert line == f"SSAN (published),ResNet-50,,{values.replace(' | ', ',')}"
    assert "*SSAN (published)*" in written["md"] and "Rows in italics" in written["md"]
    assert r"\textcolor{gray}{22.81}" in written["tex"] and r"\usepackage{xcolor}" in written["tex"]
    assert re.search(r"\*HAM \(published; needs --ham, a .*\* \| +\| +\| +\*47.81", written["md"])
    assert not re.search(r"\*\*|textcolor\{gray\}\{\}", written["md"] + written["tex"])
    assert ",44.50,,,,,,44.50," in written["csv"]  # RSum needs all three recalls
    finish("one")
    assert reproduce(monkeypatch, table(ROWS[1:]), mini_root, tmp_path / "plain", "--seeds", 1) == 0
    plain = "".join(p.read_text() for p in (tmp_path / "plain/small").glob("table.*"))
    assert not re.search("gray|xcolor|italics|encoder", plain)


def test_a_row_with_other_weights_needs_their_option(table, mini_root, tmp_path):
    rows = [{**ROWS[1], "name": n, "needs": n} for n in WEIGHTS] + ROWS[1:]
    (tmp_path / "ham.pth").write_bytes(b"weights")
    given = argparse.Namespace(root_dir=str(mini_root), seeds=[1], output_dir="x", mllm4text="",
                               rows=[], ham=str(tmp_path / "ham.pth"))  # fmt: skip
    (ham, itc), left_out = make_jobs(read_table(str(table(rows))), given, {})
    assert ham.args.finetune == given.ham and itc.args.finetune == ""
    assert left_out == {"mllm4text": "needs --mllm4text, a checkpoint of MLLM4Text-ReID"}
    (tmp_path / "ham.pth").write_bytes(b"other")
    (other, _), _ = make_jobs(read_table(str(table(rows))), given, {})
    assert other.folder != ham.folder
    given.ham, given.mllm4text = given.ham + "x", "none.pth"
    both = r"none.pth: No such file or directory \(--mllm4text\); .*ham.pthx: No such .* \(--ham\)"
    with pytest.raises(UserError, match=both):
        make_jobs(read_table(str(table(rows))), given, {})
    make_jobs(read_table(str(table(ROWS[1:]))), given, {})  # no row needs them


def test_all_data_sets_that_are_missing_are_named_before_a_job_starts(
    table, rendered, tmp_path, monkeypatch, capsys, finish
):
    """Twice the same data set is named once. What can run does, unless it is --dry_run."""
    out, trained = tmp_path / "out", []
    names = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "AGData", "AGSGData")
    rows = [{"name": n, "options": {"dataset_name": n, "loss_names": "itc"}} for n in names]
    (tmp_path / "data").mkdir()
    words = (monkeypatch, table(rows), tmp_path / "data", out, "--seeds", 1)
    finish("one", trained=trained)
    missing = [
        rf"--root_dir \S+/data: expected {name}/\S+ and {name}/imgs/ there"
        for name in ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
    ]
    sources = (
        "--root_dir \\S+/data: folder AG-ReID and folder G2APS-AG are missing; expected \\S+ \\S+"
    )
    with pytest.raises(UserError, match=f"^{'; '.join([*missing, sources])}$"):
        reproduce(*words)
    (tmp_path / "data/ICFG-PEDES").symlink_to(rendered("ICFG-PEDES"))
    some = f"{missing[0]}; {missing[2]}; {sources}"
    with pytest.raises(UserError, match=f"^{some}$"):
        reproduce(*words, "--dry_run")
    assert not trained and not out.exists()
    reproduce(*words)
    assert re.search(
        f"warning: jobs without their data will fail: {some}\n", capsys.readouterr().out
    )
    trained.clear()
    shutil.rmtree(next(out.glob("small/cuhk*")))
    with pytest.raises(UserError, match=f"^{missing[0]}$"):  # finished jobs need no data
        reproduce(*words)
    assert not trained


def test_the_documents_name_every_table_and_the_rows_of_the_fields():
    page = (ROOT / "docs/tables.md").read_text()
    assert {path.stem for path in TABLES.glob("*.yaml")} == {
        *re.findall(r"^\| `(\w+)` \|", page, re.M)
    }
    rows = [
        f"| {r['name']} | `{r['values']['loss_names']}` |" for r in read_table("mini_field").rows
    ]
    assert "\n".join(rows) in (ROOT / "docs/field.md").read_text()


def test_the_tables_have_the_published_figures_of_the_papers():
    main = {row["name"]: row["published"]["R@1"] for row in read_table("main").rows}
    assert [*main.values()][:16] == [
        22.81, 25.25, 25.87, 28.22, 21.06, 39.63, 39.88, 38.84, 34.41, 37.31, 40.81, 44.75, 43.59,
        45.38, 46.56, 48.375,
    ]  # fmt: skip
    aeri = {r["name"]: r.get("published", {}).get("R@1") for r in read_table("aeri").rows}
    named = ("IRRA", "RDE", "AEA-FIRM", "AEA-FIRM from HAM", "MLLM4Text-ReID", "CFAN")
    assert [aeri[n] for n in named] == [35.14, 38.56, 37.94, 44.42, 42.47, 47.16]
    tag = [row["published"]["R@1"] for row in read_table("tag").rows]
    assert tag == [59.61, 60.28, 61.58, 51.83, 62.64]


def test_a_job_that_another_process_runs_is_not_run_again(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    out, path = tmp_path / "out", table(ROWS[1:])
    jobs = jobs_of(path, mini_root, out)
    jobs[0].folder.mkdir(parents=True)
    holder = lock(jobs[0].folder, inherited=True)
    assert reproduce(monkeypatch, path, mini_root, out, "--seeds", 1) == 1
    assert "another process is using this folder" in capsys.readouterr().out and not done(out)
    os.close(holder)
    os.close(lock(jobs[0].folder, inherited=True))  # free again


def test_a_row_is_marked_as_an_ablation_if_it_leaves_the_papers_recipe(table, mini_root, tmp_path):
    """Such a row masks no captions, or augments images, and the paper's command does not."""
    for path in sorted(TABLES.glob("*.yaml")):
        shipped = read_table(path.stem)
        base = yaml.safe_load(path.read_text())["base"]
        for row in shipped.rows:
            recipe = read_preset(path.parent / row.get("base", base))
            changed = any(
                row["values"].get(n) != recipe.get(n) for n in ("MLM", "txt_aug", "img_aug")
            )
            assert bool(row.get("ablation")) == changed, (path.stem, row["name"])
    marked = {r["name"] for r in read_table("losses").rows if r.get("ablation")}
    assert {"AEA-FIRM without --MLM", "supkl+queue, --img_aug"} <= marked
    rows = [{**ROWS[1], "ablation": True}]
    shown = next(tables_of(read_table(str(table(rows))), jobs_of(table(rows), mini_root), {}))
    assert shown[2][0][0] == "itc (ablation)"
