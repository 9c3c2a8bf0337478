"""What may make a table, a page or a comparison wrong without a message, and what untrusted text may
do in them. Each test is an attempt that once succeeded."""

import argparse
import contextlib
import csv
import errno
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import writer as tensorboard

from processor import results as results_module
from processor.results import per_query, read_queries, read_results, write_results
from tests.helpers import run
from tools import _report_charts as charts
from tools import compare_runs, report, reproduce
from tools._report_runs import ReportedRun, read_scalars
from tools._reproduce_jobs import Job, hash_folder, make_jobs
from tools._reproduce_output import write_tables
from tools._reproduce_runner import Runner
from tools._reproduce_table import read_table
from utils import files
from utils.errors import UserError
from utils.metrics import METRICS, Ranked
from utils.runs import EVENTS
from utils.tables import as_csv, console, latex, markdown

ROWS = [{"name": "sdm", "options": {"loss_names": "sdm"}}, {"name": "itc"}]


@pytest.fixture
def table(tmp_path):
    def write(content=None, **changes):
        (tmp_path / "base.yaml").write_text("num_epoch: 1\nwarmup_epochs: 0\n")
        complete = {"title": "A table", "base": "base.yaml", "rows": ROWS, **changes}
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(complete if content is None else content))
        return path

    return write


# 1: wrong without a message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [ROWS[0], {**ROWS[1], "name": "sdm"}]}, "row sdm has this name"),
        ({"rows": [ROWS[0], {**ROWS[1], "name": "SDM!"}]}, "row sdm has this name, apart from case"),
        ({"rows": None}, "rows must be a list, got None"),
        ({"rows": []}, "it has 0 rows; a table has 1 to 500"),
        ({"rows": [{"name": n} for n in range(501)]}, "it has 501 rows"),
        ({"rows": [3]}, "row 1: a row needs a name"),
        ({"rows": {"name": "x"}}, "rows must be a list"),
        ({"options": None}, "options must be a mapping"),
        ({"options": [1]}, "options must be a mapping"),
        ({"title": 3}, "title must be text"),
        ({"base": ["a"]}, "base must be text"),
        ({"seeds": [1]}, "'seeds': unknown"),
        ({"rows": [{"name": None}]}, "name must be text"),
        ({"rows": [{"name": "a\nb"}]}, "its name must be a line of 1 to 100 characters"),
        ({"rows": [{"name": "\x1b[2J"}]}, "its name must be a line"),
        ({"rows": [{"name": "x" * 101}]}, "its name must be a line"),
        ({"rows": [{"name": "x", "options": 7}]}, "options must be a mapping"),
        ({"rows": [{"name": "x", "published": 7}]}, "published must be a mapping"),
        ({"rows": [{"name": "x", "published": {"R@1": "39"}}]}, "published R@1: '39'"),
        ({"rows": [{"name": "x", "published": {"R@2": 39}}]}, "published R@2: 39"),
        ({"rows": [{"name": "x", "published": {"R@1": 390}}]}, "published R@1: 390"),
        ({"rows": [{"name": "x", "published": {"R@1": math.nan}}]}, "published R@1: nan"),
        ({"rows": [{"name": "x", "needs": "luck"}]}, "needs is 'luck'"),
        ({"rows": [{"name": "x", "ablation": "yes"}]}, "ablation must be true or false"),
        ({"rows": [{"name": "x", "option": {}}]}, "'option': unknown. Did you mean 'options'"),
    ],
)  # fmt: skip
def test_a_table_is_checked_completely_before_anything_runs(changes, message, table, attempt):
    with pytest.raises(UserError, match="small.yaml") as error:
        read_table(str(table(**changes)))
    assert message in str(error.value)
    if "has this name" in message:
        attempt("1", "two rows with one name and different options", "averaged as if they were seeds", error.value)  # fmt: skip
    if message.startswith(("rows must", "options must be a mapping", "published R@1: '")):
        attempt("5", f"a table with {json.dumps(changes)[:60]}", "traceback", error.value)


def test_an_option_that_the_tool_sets_is_refused_in_a_row(table, mini_root, tmp_path, attempt):
    rows = [{"name": "x", "options": {"seed": 7}}]
    with pytest.raises(UserError, match="row x: seed is not an option of a row") as error:
        read_table(str(table(rows=rows)))
    attempt("1", "a row with options: {seed: 7}", "ignored", error.value)
    rows = [{"name": "x", "options": {"warmup_epochs": 9}}]
    args = argparse.Namespace(
        root_dir=mini_root, seeds=[1], output_dir=tmp_path, mllm4text="", ham="", rows=[]
    )
    with pytest.raises(UserError, match="small, row x: --warmup_epochs 9 must be less"):
        make_jobs(read_table(str(table(rows=rows))), args, {})


def test_a_table_whose_entries_refer_to_each_other_gets_a_short_error(table, attempt):
    """Written out, its title would have 9 ** 20 letters."""
    lists = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(20))
    path = table()
    path.write_text(f"title: [{lists}]\nbase: base.yaml\nrows: [{{name: a}}]\n")
    with pytest.raises(UserError, match="title must be text, got") as error:
        read_table(str(path))
    assert len(str(error.value)) < 2100
    attempt("4", "a title of nested lists, 2 KB of YAML", "all memory", str(error.value)[:120])  # fmt: skip


def test_a_base_whose_name_has_a_zero_byte_is_refused(table):
    with pytest.raises(UserError, match="row sdm: base: .* is not the name of a file"):
        read_table(str(table(base="a\0b")))


def test_a_repeated_seed_is_refused(table, mini_root, tmp_path, monkeypatch, attempt):
    argv = ["--table", table(), "--root_dir", mini_root, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="--seeds 1 1: a seed twice") as error:
        run(reproduce.main, monkeypatch, *argv, "--seeds", 1, 1)
    assert not (tmp_path / "out").exists()
    attempt("1", "--seeds 1 1", "a deviation of 0.00", error.value)


def test_a_data_set_behind_links_has_its_own_hash(mini_copy, tmp_path, attempt):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "attrs.json").symlink_to(mini_copy / "attrs.json")
    for name in ("AG-ReID", "G2APS-AG"):
        (linked / name).symlink_to(mini_copy / name)
    (mini_copy / "AG-ReID/again").symlink_to(mini_copy)  # a cycle
    before = hash_folder(linked)
    path = mini_copy / "AG-ReID/agtext_train.json"
    path.write_text(path.read_text().replace(" a ", " the "))
    assert hash_folder(linked) != before
    attempt("1", "change captions in a data set of linked folders", "jobs counted as done", "another fingerprint, so other jobs")  # fmt: skip


def test_a_link_to_a_parent_folder_does_not_add_its_files_to_the_hash(tmp_path, attempt):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.json").write_text("[]")
    (tmp_path / "data/up").symlink_to(tmp_path)
    for number in range(40):  # 2 ** 40 paths through them
        (tmp_path / f"far/{number}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"far/{number}/{name}").symlink_to(tmp_path / f"far/{number + 1}")
    (tmp_path / "data/far").symlink_to(tmp_path / "far/0")
    before = hash_folder(tmp_path / "data")
    (tmp_path / "done.json").write_text("{}")
    assert hash_folder(tmp_path / "data") == before
    folder = tmp_path / "data"
    for _ in range(300):  # deeper than the limit on recursion
        folder /= "a"
    folder.mkdir(parents=True)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(200 + len(inspect.stack()))
        hash_folder(tmp_path / "data")
    finally:
        sys.setrecursionlimit(limit)


def test_a_fingerprint_without_links_has_not_changed(tmp_path):
    """Otherwise finished jobs would run again."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.json").write_text("[1]")
    (tmp_path / "a/y.jpg").write_bytes(b"12")
    expected = hashlib.sha256(b"\na/b/x.json\x003[1]\na/y.jpg\x002").hexdigest()
    assert hash_folder(tmp_path) == expected


def test_a_data_set_with_a_pipe_and_a_name_that_is_not_utf8_is_fingerprinted(tmp_path, attempt):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    os.mkfifo(tmp_path / "pipe.json")
    assert len(hash_folder(tmp_path)) == 64
    attempt("5", "a stray file in root_dir whose name is not UTF-8", "UnicodeEncodeError", "fingerprinted")  # fmt: skip


def ranked(seed, count=30):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 20, (count,), generator=generator).double()
    return Ranked(torch.stack([first, 1 / first, 1 / first], 1), torch.arange(count) // 3, 40)


def evaluated(folder, seed=0):
    """Write a run's folder as test.py does."""
    folder.mkdir(exist_ok=True)
    metrics = {**dict.fromkeys(METRICS, 50.0), "queries": 30, "gallery": 40}
    results = {"epoch": 3, "splits": {"test": {"galleries": {"aerial": metrics}}}}
    write_results(folder / "best.pth", results, per_query("test", {"aerial": ranked(seed)}))
    (folder / "configs.yaml").write_text("name: x\n")
    return folder


def test_files_of_two_evaluations_are_not_taken_for_one(tmp_path, monkeypatch, attempt):
    folder = evaluated(tmp_path / "a")
    write_atomically = files.write_atomically

    def killed(path, write, **kwargs):
        if path.suffix == ".json":
            kwargs["before"]()
            raise KeyboardInterrupt
        write_atomically(path, write, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("processor.results.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(folder, seed=1)
    other = evaluated(tmp_path / "b")
    for use in (
        lambda: report.read_run(folder, "red"),
        lambda: compare_runs.compare({"a": [folder], "b": [other]}, "test", "aerial", 10),
    ):
        with pytest.raises(UserError, match="are of different evaluations.*evaluate the run again") as error:  # fmt: skip
            use()
    evaluated(folder, seed=1)
    report.read_run(folder, "red")
    attempt("1", "test.py killed between its two files", "metrics of two models in one report", error.value)  # fmt: skip


@pytest.mark.parametrize("name", ["test_results.json", "test_queries.npz"])
def test_a_full_disk_leaves_both_files_of_the_evaluation_before(
    name, tmp_path, monkeypatch, attempt
):
    folder = evaluated(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(prefix, open_=files.tempfile.NamedTemporaryFile, **kwargs):
        if name in prefix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_(prefix=prefix, **kwargs)

    monkeypatch.setattr("utils.files.tempfile.NamedTemporaryFile", full)
    with pytest.raises(UserError, match="could not be written: No space left") as error:
        evaluated(folder, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if "json" in name:
        attempt("1", "a disk that is full at the second file of test.py", "files of two models", f"both unchanged; {error.value}")  # fmt: skip


def test_curves_of_older_versions_are_complete_though_the_clock_went_back(tmp_path, monkeypatch):
    """Their event files have no number."""

    def write(clock, begin, values):
        monkeypatch.setattr("time.time", lambda: clock)
        with SummaryWriter(tmp_path, purge_step=begin) as curves:
            for epoch, value in enumerate(values, begin):
                curves.add_scalar("loss/total", value, epoch)

    write(2_000_000.0, 1, [9, 8, 7, 6])
    write(1_000_000.0, 3, [70, 60, 50])  # resumed after epoch 2
    monkeypatch.undo()
    curve = read_scalars(tmp_path)["loss/total"]
    assert curve == [(1, 9), (2, 8), (3, 70), (4, 60), (5, 50)]


def test_curves_are_ordered_by_epoch_though_the_clock_went_back(tmp_path, monkeypatch, attempt):
    now = [2_000_000.0]
    monkeypatch.setattr(tensorboard.time, "time", lambda: now[0])
    import tensorboard.summary.writer.event_file_writer as file_writer

    monkeypatch.setattr(file_writer.time, "time", lambda: now[0])

    def write(number, epochs, value, purge):
        suffix = EVENTS.format(number)
        with SummaryWriter(tmp_path, purge_step=purge, filename_suffix=suffix) as curves:
            for epoch in epochs:
                now[0] += 1
                curves.add_scalar("loss/total", value + epoch, epoch)

    write(1, range(1, 7), 100, 1)
    now[0] = 1_000_000.0  # the machine that resumes has another clock
    write(2, range(4, 9), 200, 4)
    now[0] = 1_500_000.0
    write(3, range(7, 8), 300, 7)  # resumed after epoch 6, for one more epoch
    curve = read_scalars(tmp_path)["loss/total"]
    assert curve == [(1, 101), (2, 102), (3, 103), (4, 204), (5, 205), (6, 206), (7, 307)]
    attempt("1", "report a run that was resumed under an earlier clock", "half of its epochs", f"epochs {[step for step, _ in curve]}")  # fmt: skip


def test_a_run_counts_its_starts(mini_root, tmp_path, monkeypatch):
    import train as train_entry
    from tests.reliability.runs import flags, folder_of

    argv = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path)
    resume = ["--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch", 2]
    run(train_entry.main, monkeypatch, *resume)
    assert sorted(path.suffix for path in folder.glob("events.*")) == [".00001", ".00002"]
    assert [step for step, _ in read_scalars(folder)["loss/total"]] == [1, 2]


# 3: text of others

EVIL = [
    r"\input{/etc/passwd}", "50 % of $x_1$ & #2 ~ ^", "a | b", "a\r\n\\end{tabular}", "\x1b[2J",
    "=cmd|' /C calc'!A0", "+1+2", "-1-2", "@SUM(A1)", "\t=1", "<script>alert(1)</script>", "![x](y)", "[2cm] *x*", "a--b",
    "half \ud800", "`rm`",
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_a_cell_stays_one_cell_in_every_format(evil, attempt):
    head, rows = ["method", "difference"], [[evil, "+0.12"], ["x", "-3.00"]]
    shown = {f.__name__: f(head, rows) for f in (console, markdown, latex, as_csv)}
    assert all(text.isprintable() for output in shown.values() for text in output.split("\n"))
    assert [output.rstrip("\n").count("\n") for output in shown.values()] == [5, 3, 4, 2]
    (name, difference), (_, other) = list(csv.reader(io.StringIO(shown["as_csv"])))[1:]
    assert not name.lstrip().startswith(("=", "+", "-", "@")) and (difference, other) == (
        "+0.12",
        "-3.00",
    )
    for line in shown["latex"].split("\n")[2:4]:
        plain = re.sub(r"\\text[a-z]+\{\}|\{[\[*]\}|-\{\}", "", line).removesuffix(r" \\")
        for special in r"\&", r"\%", r"\$", r"\#", r"\_", r"\{", r"\}":
            plain = plain.replace(special, "")
        assert plain.count("&") == 1 and not set(plain) & set("\\%$#_{}~^<>|[*")
    assert not set("<>`|[]") & set(re.sub(r"\\.", "", shown["markdown"].split("\n")[2][2:-2]).replace(" | ", ""))  # fmt: skip
    now = {"=": shown["as_csv"], "\\": shown["latex"], "a": shown["markdown"]}.get(evil[0], "")
    if now and evil in EVIL[:6]:
        attempt(
            "3", f"a row named {ascii(evil)}", "raw", now.split("\n")[1 if evil[0] == "=" else 2]
        )


def test_the_files_of_a_table_escape_the_text_of_its_rows(table, mini_root, tmp_path, monkeypatch, capsys):  # fmt: skip
    evil = r"=cmd|' /C'!A0 \input{x} <b>"
    path = table(title=r"A \input{x} | <b>", rows=[{"name": evil, "needs": "mllm4text"}])
    argv = ["--table", path, "--root_dir", mini_root, "--output_dir", tmp_path / "out"]
    jobs = [Job(evil, 1, argparse.Namespace(val_dataset="test", heldout=0), tmp_path)]
    write_tables(read_table(str(path)), jobs, {evil: "left out"}, tmp_path / "out")
    capsys.readouterr()
    text = {p.suffix: p.read_bytes().decode() for p in (tmp_path / "out").iterdir()}
    assert argv and set(text) == {".md", ".tex", ".csv"}
    assert r"\input" not in text[".tex"].replace(r"\textbackslash{}input", "")
    assert "<b>" not in text[".md"].replace(r"\<b\>", "") and "\r" not in text[".csv"]
    assert next(csv.reader(io.StringIO(text[".csv"].split("\n", 1)[1])))[0].startswith("'=cmd")


# 5: unusual content


def npz(**arrays):
    held = io.BytesIO()
    np.savez_compressed(held, **{f"test/aerial/{name}": value for name, value in arrays.items()})
    return held.getvalue()


def swollen():
    """Arrays of 8 MB in 8 KB. The test lowers the limit."""
    return npz(**GOOD | {"pid": np.zeros(2**20, np.int64)})


GOOD = {"pid": np.arange(3), "first": np.ones(3), "ap": np.ones(3), "inp": np.ones(3)}


def header(shape):
    held = io.BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(held, about)
    return held.getvalue()


def with_column(content, method=zipfile.ZIP_DEFLATED):
    """An archive whose `first` is these bytes."""
    held = io.BytesIO(npz(**{name: value for name, value in GOOD.items() if name != "first"}))
    with zipfile.ZipFile(held, "a", method) as archive:
        archive.writestr("test/aerial/first.npy", content)
    return held.getvalue()


ARCHIVES = {
    "empty": lambda: b"",
    "no captions": lambda: npz(**{name: value[:0] for name, value in GOOD.items()}),
    "truncated": lambda: npz(**GOOD)[:-30],
    "corrupted inside": lambda: npz(**GOOD).replace(b"PK\x03\x04", b"PK\x03\x05", 1),
    "text instead of numbers": lambda: npz(**GOOD | {"ap": np.array(["x"] * 3)}),
    "objects": lambda: npz(**GOOD | {"pid": np.array([{}, [], 3], dtype=object)}),
    "complex numbers": lambda: npz(**GOOD | {"ap": np.ones(3, complex)}),
    "a column of 16 MB that would become 128 MB": lambda: npz(
        **GOOD | {"first": np.ones(2**24, np.int8)}
    ),
    "a column that claims a terabyte": lambda: with_column(header((2**37,))),
    "a header without an end": lambda: with_column(b"\x93NUMPY\1\0\x10\x27" + b"(" * 10000),
    "corrupted LZMA": lambda: with_column(header((3,)) + bytes(24), zipfile.ZIP_LZMA).replace(
        b"first.npy\t\x04", b"first.npy\t\x05"
    ),
    "infinite ranks": lambda: npz(**GOOD | {"first": np.full(3, np.inf)}),
    "two numbers of images": lambda: npz(**GOOD, images=np.ones(2)),
    "other lengths": lambda: npz(**GOOD | {"ap": np.ones(2)}),
    "rank 0": lambda: npz(**GOOD | {"first": np.zeros(3)}),
    "a precision of 7": lambda: npz(**GOOD | {"inp": np.full(3, 7.0)}),
    "more bytes than test.py writes": swollen,
}


@pytest.mark.parametrize("tried", ARCHIVES)
def test_a_corrupted_archive_of_results_is_refused(tried, tmp_path, attempt, monkeypatch):
    monkeypatch.setattr(results_module, "MAX_CAPTIONS", 2**17)
    path = tmp_path / "test_queries.npz"
    path.write_bytes(ARCHIVES[tried]())
    with pytest.raises(UserError, match="test_queries.npz: not results of test.py") as error:
        read_queries(path, "test", "aerial")
    attempt("5" if tried != "more bytes than test.py writes" else "4", f"test_queries.npz: {tried}", "a traceback, or accepted", error.value)  # fmt: skip


def test_any_changed_byte_of_an_archive_of_results_is_refused_or_harmless(tmp_path):
    path = evaluated(tmp_path / "a") / "test_queries.npz"
    original, expected = path.read_bytes(), read_queries(path, "test", "aerial")
    for place in range(0, len(original), 3):
        for end in (bytes([original[place] ^ 0x5A]) + original[place + 1 :], b""):
            path.write_bytes(original[:place] + end)
            with contextlib.suppress(UserError):
                changed = read_queries(path, "test", "aerial")
                assert torch.equal(changed.rows_Q3, expected.rows_Q3)


RESULTS = [
    "null", "3", "[]", "{}", '{"splits": null}', '{"splits": {"test": []}}',
    '{"splits": {"test": {"galleries": {}}}}', '{"splits": {"test": {"galleries": {"aerial": 3}}}}',
    '{"splits": {"test": {"galleries": {"aerial": {"R@1": "x"}}}}}', '{"splits": NaN}', "{", "\xff",
    '{"splits": {}, "splits": {}}', "[" * 9999, '{"protocol": 3, "splits": {"test": {}}}', "9" * 9999,
]  # fmt: skip


@pytest.mark.parametrize("text", RESULTS, ids=lambda text: ascii(text)[:40])
def test_corrupted_results_are_refused(text, tmp_path):
    folder = evaluated(tmp_path / "a")
    (folder / "test_queries.npz").unlink()
    (folder / "test_results.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"test_results.json: not results of test.py"):
        report.read_run(folder, "red")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"R@1": 10**400}, "test, aerial: R@1 is 1000"),
        ({"R@1": 500}, "test, aerial: R@1 is 500"),
        ({"R@1": math.nan}, "test, aerial: R@1 is nan"),
        ({"queries": -1}, "test, aerial: queries is -1"),
        ({"data": {"changed": [1]}}, "its 'data' has no object under 'changed'"),
        ({"accuracy": {"age": {"aerial": 10**400}}}, "its attribute_accuracy is not a table"),
    ],
)
def test_metrics_that_test_py_cannot_have_written_are_refused(changes, message, tmp_path, attempt):
    folder = evaluated(tmp_path / "a")
    path = folder / "test_results.json"
    results = json.loads(path.read_text())
    split = results["splits"]["test"]
    split["attribute_accuracy"] = changes.pop("accuracy", {})
    results |= {"data": changes.pop("data", {})}
    split["galleries"]["aerial"] |= changes
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="test_results.json: not results of test.py") as error:
        report.read_run(folder, "red")
    assert message in str(error.value)
    if "1000" in message:
        attempt("5", "a metric of 400 digits in test_results.json", "OverflowError", error.value)


def test_a_pipe_in_place_of_results_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "test_results.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_results(tmp_path / "test_results.json", tmp_path / "test_queries.npz")
    folder = evaluated(tmp_path / "a")
    for name in ("test_results.json", "test_queries.npz"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=f"{name}: not results of test.py: not a regular file"):
            compare_runs.compare(
                {"a": [folder], "b": [evaluated(tmp_path / "b")]}, "test", "aerial", 10
            )
        evaluated(folder)


@pytest.mark.parametrize("content", ["null", "[]", '{"paper": 3}', '{"paper": {"R@1": "x"}}', "{", "{}", '{"paper": {"protocol": 3}}'])  # fmt: skip
def test_corrupted_notes_of_a_job_are_refused(content, tmp_path):
    (tmp_path / "done.json").write_text(content)
    (tmp_path / "code.json").write_text('[{"commit": 3}]')
    job = Job("row", 1, argparse.Namespace(val_dataset="test"), tmp_path)
    for ask, name in ((lambda: job.results, "done.json"), (lambda: job.code, "code.json")):
        with pytest.raises(UserError, match=f"{name}: corrupted; delete it"):
            ask()


@pytest.mark.parametrize(
    ("curve", "pieces"),
    [
        ([(1, 1.0), (2, math.nan), (3, 3.0), (4, 2.0)], 2),
        ([(1, math.inf), (2, 1.0)], 1),
        ([(1, math.nan), (2, -math.inf)], 0),
        ([(1, 3e38), (2, -3e38)], 1),
        ([(1, 1e-45), (2, 0.0)], 1),
        ([(1, 3e38)], 1),
    ],
)
def test_a_curve_with_nan_or_infinity_has_a_gap(curve, pieces, tmp_path, attempt):
    folder = evaluated(tmp_path / "a")
    with SummaryWriter(folder) as writer:
        for step, value in curve:
            writer.add_scalar("loss/total", value, step)
    args = argparse.Namespace(queries=0, root_dir="", attributes_file="", device="cpu")
    runs = [report.read_run(folder, "red")]
    page = report.report(runs, args)
    drawn = charts.training(runs)["loss"][0].svg
    lines = re.findall(r'<path d="([^"]*)"[^>]*fill: none; stroke: #ff0000', drawn)
    assert sum(line.count("M ") for line in lines) == pieces and "nan" not in drawn
    assert page.encode() and ("no finite value" in page) == (not pieces)
    if pieces == 2:
        attempt("5", "a curve of 1, NaN, 3, 2 in the report", "traceback", f"{pieces} lines with a gap")  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-5), (0, 3 * math.nextafter(1000, 0)), (79.59, 100), (-3, 4)])  # fmt: skip
def test_axes_can_be_read(low, high, tmp_path):
    run = ReportedRun(tmp_path, "a", {}, {"lr": [(1, low), (2, high)]}, "red")
    ticks = re.findall(r"end;[^>]*>([^<]*)", charts.training([run])[""][0].svg)
    assert 2 < len(set(ticks)) == len(ticks) < 9


def test_a_single_point_between_gaps_can_be_seen(tmp_path):
    long = [(n, math.nan if n != 50 else 1.0) for n in range(100)]
    chart = charts.training([ReportedRun(tmp_path, "a", {}, {"loss": long}, "red")])[""][0]
    assert chart.svg.count("<use") == 1 and chart.notes == ["a: 99 of 100 points are not finite"]


def test_half_a_character_is_shown_as_an_escape_in_a_page(tmp_path, attempt):
    run = report.read_run(evaluated(tmp_path / "a"), "red")
    run.name = "half \ud800 <b> \x1b"
    args = argparse.Namespace(queries=0, root_dir="", attributes_file="", device="cpu")
    shown = report.report([run], args)
    assert shown.encode() and r"half \ud800 &lt;b&gt; \x1b" in shown
    attempt("5", "half a character in a caption, in the report", "'?' or UnicodeEncodeError", r"half \ud800")  # fmt: skip


# 8: full disks


def test_a_table_is_printed_even_if_the_disk_is_full(tmp_path, monkeypatch, capsys, table, attempt):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    jobs = [Job("sdm", 1, argparse.Namespace(val_dataset="test", heldout=0), tmp_path)]
    with pytest.raises(UserError, match="table.md: could not be written: No space left") as error:
        write_tables(read_table(str(table())), jobs, {}, tmp_path / "out")
    assert "| sdm    |" in capsys.readouterr().out
    attempt("8", "reproduce.py on a full disk", "the table was lost", f"printed, then: {error.value}")  # fmt: skip


def test_a_full_disk_ends_one_job_but_not_the_others(
    table, mini_root, tmp_path, monkeypatch, capsys
):
    def call(runner, job, *_):
        if job.row == "sdm":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.folder / "x"))
        raise UserError("the other was tried")

    monkeypatch.setattr(Runner, "_call", call)
    argv = ["--table", table(), "--root_dir", mini_root, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run(reproduce.main, monkeypatch, *argv, "--seeds", 1)
    shown = capsys.readouterr().out
    assert "FAILED sdm, seed 1: [Errno 28] No space left" in shown
    assert "FAILED itc, seed 1: the other was tried" in shown


def test_metrics_that_cannot_be_saved_are_in_the_table(table, mini_root, tmp_path, monkeypatch, capsys, attempt):  # fmt: skip
    def call(runner, job, *_):
        folder = job.folder / "logs/AGDataAttr/run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.pth").write_bytes(b"")
        evaluated(folder)

    def full(source, target, replace=os.replace):
        if target.name == "done.json" and "/sdm-seed1-" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(Runner, "_call", call)
    monkeypatch.setattr("utils.files.os.replace", full)
    argv = ["--table", table(), "--root_dir", mini_root, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run(reproduce.main, monkeypatch, *argv, "--seeds", 1)
    failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")][-1]
    assert re.match(r"FAILED sdm, seed 1: .*/done.json: could not be written: No", failed)
    text = (tmp_path / "out/small/table.md").read_text()
    assert len(re.findall(r"\| (?:sdm|itc) +\| +1 \| 50.00", text)) == 2
    attempt("8", "a disk that is full when a job's done.json is written", "its metrics were lost", f"in the table, and {failed}")  # fmt: skip


def test_a_console_on_a_full_disk_does_not_end_the_jobs(table, mini_root, tmp_path, monkeypatch):
    rows = [{"name": name} for name in "ab"]
    jobs = []
    monkeypatch.setattr(Runner, "_call", lambda runner, job, *_: jobs.append(job.row))
    argv = ["--table", table(rows=rows), "--root_dir", mini_root, "--output_dir", tmp_path / "out"]
    console = os.open(tmp_path / "console", os.O_CREAT | os.O_WRONLY)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit):
            run(reproduce.main, monkeypatch, *argv, "--seeds", 1)
        os.dup2(console, full.fileno())
    os.close(console)
    assert jobs == ["a", "b"]


# 9: growth


def test_a_page_compares_only_the_captions_that_it_shows():
    generator = torch.Generator().manual_seed(0)
    captions, images = (torch.randn(n, 16, generator=generator) for n in (200, 50))
    similarity = F.normalize(captions, dim=1) @ F.normalize(images, dim=1).T
    expected = similarity.topk(10, dim=1)
    chosen = [3, 177, 42]
    values, positions = report.best_images(captions[chosen], images)
    assert positions == expected.indices[chosen].tolist()
    torch.testing.assert_close(torch.tensor(values), expected.values[chosen])
    assert len(report.best_images(captions[:1], images[:4])[0][0]) == 4
