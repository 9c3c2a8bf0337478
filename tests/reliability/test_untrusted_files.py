"""What an untrusted run folder, name or file system may do to a run. Each test is an attempt that
once succeeded; `make reliability` prints the table of them."""

import errno
import os
import stat
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import yaml

import test as test_entry
import train as train_entry
from datasets.images import BrokenImage
from processor.nonfinite import NonFiniteGuard
from processor.resume import read_state
from tests.helpers import options, run
from tests.reliability.runs import flags, folder_of, start, train_small_run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.command_line import parse_options, parse_test_options
from utils.config import read_yaml
from utils.console import say
from utils.distributed import SINGLE_PROCESS
from utils.errors import UserError
from utils.files import append, lock, read_file, write_atomically
from utils.run_log import setup_logger
from utils.runs import open_run
from utils.text import Multiline, visible


@pytest.fixture(scope="module")
def source(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def untrusted_run(source, tmp_path):
    """A copy of that run, as if from another user."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pth", "best.pth", "configs.yaml"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def resume_run(folder: Path, monkeypatch, *overrides) -> None:
    argv = ["--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch", 2, *overrides]
    run(train_entry.main, monkeypatch, *argv)


# 2: links


def test_a_log_that_is_a_link_is_not_written_through(untrusted_run, tmp_path, monkeypatch, attempt):
    profile = tmp_path / "profile"
    profile.write_text("# mine\n")
    (untrusted_run / "train_log.txt").symlink_to(profile)
    with pytest.raises(UserError, match=r"train_log.txt: a link, .*remove it") as error:
        resume_run(untrusted_run, monkeypatch)
    assert profile.read_text() == "# mine\n"
    tried = "resume a run whose train_log.txt links to a shell's start-up file"
    attempt("2", tried, "the log was written there", error.value)


def test_a_run_name_with_a_line_break_is_refused(untrusted_run, monkeypatch, attempt):
    config = untrusted_run / "configs.yaml"
    config.write_text(config.read_text().replace("name: baseline", 'name: "x\\ntouch harm"'))
    with pytest.raises(UserError, match="name cannot be") as error:
        resume_run(untrusted_run, monkeypatch)
    attempt("2", "a run name with a line break and a command", "accepted", error.value)


def test_a_logged_text_stays_on_one_line(tmp_path, attempt, capsys):
    log = setup_logger(tmp_path / "train_log.txt")
    log.info("run folder: /x/a\ntouch harm \x1b[2J")
    log.info(Multiline("a table\nof two lines"))
    setup_logger()
    first, second, third = (tmp_path / "train_log.txt").read_text().splitlines()
    assert first.endswith(r"  run folder: /x/a\ntouch harm \x1b[2J")
    assert second.endswith("  a table") and third == "of two lines"
    assert capsys.readouterr().out.splitlines()[0] == first[21:]
    attempt("2", "a folder name with a line break and ESC, in the log", "a second line", first[21:])  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["lock", "train_log.txt"])
def test_a_run_writes_only_into_regular_files(name, kind, tmp_path, attempt):
    folder, target = tmp_path / "run", tmp_path / "mine"
    folder.mkdir()
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("mine")
    with pytest.raises(UserError, match="a link, a folder or a pipe") as error:
        lock(folder) if name == "lock" else append(path)
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "mine"
    if name == "lock":
        attempt("2", f"{name} is a {kind}", "followed, or a traceback", error.value)


def test_a_list_of_samples_is_not_written_through_a_linked_folder(tmp_path, attempt, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "run/nonfinite").symlink_to(tmp_path / "mine")
    args = options(pretrain_choice="scratch")
    guard = NonFiniteGuard(args, None, tmp_path / "run", setup_logger())
    values = {"total": torch.tensor(float("nan"))}
    guard.watch("epoch 1, step 1", [], values, torch.tensor(True))
    assert not list((tmp_path / "mine").iterdir())
    line = capsys.readouterr().out.splitlines()[0]
    assert "nonfinite: a link" in line
    attempt("2", "nonfinite/ links to another folder", "JSON files were written there", line)


def test_a_copy_by_hard_links_has_its_own_log(tmp_path, attempt):
    (tmp_path / "log").write_text("then\n")
    os.link(tmp_path / "log", tmp_path / "copy")
    with append(tmp_path / "copy") as file:
        file.write("now\n")
    assert (tmp_path / "log").read_text() == "then\n"
    assert (tmp_path / "copy").read_text() == "then\nnow\n"
    attempt("8", "resume a copy of a run made with cp -al", "both logs grew", "each log has its own lines")  # fmt: skip


def test_a_copy_by_hard_links_shares_its_lock_and_reports_it(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    holder = os.fork()
    if not holder:  # a lock belongs to a process
        lock(tmp_path / "a")
        os.link(tmp_path / "a/lock", tmp_path / "b/lock")
        time.sleep(30)
        os._exit(0)
    while not (tmp_path / "b/lock").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="using a copy of it that shares its files"):
        lock(tmp_path / "b")
    os.kill(holder, 9)
    os.waitpid(holder, 0)


# 3: text of others


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\r\nerror: b", r"a\r\nerror: b"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\x9b31m\u2028\x07\x7f", r"\x9b31m\u2028\x07\x7f"),
        ("half \udce9", r"half \udce9"),
        ("Grüße, 人, \U0001f600", "Grüße, 人, \U0001f600"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown, attempt, capsys):
    assert visible(text) == shown == str(UserError(text)) == visible(visible(text))
    say(text)
    assert capsys.readouterr().out == visible(text, lines=True) + "\n"
    if shown != text:
        attempt("3", f"{ascii(text)} printed to the terminal", "raw", shown)


class _Broken(torch.utils.data.Dataset):
    """One sample, whose caption looks like an error message."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise BrokenImage("a.jpg, caption 'x\nBrokenImage: UserError: all is well'")


def test_a_caption_that_looks_like_an_error_message_is_not_taken_for_one(attempt):
    with pytest.raises(BrokenImage) as error:
        list(torch.utils.data.DataLoader(_Broken(), num_workers=1))
    assert str(error.value) == r"a.jpg, caption 'x\nBrokenImage: UserError: all is well'"
    attempt("3", "a caption with 'UserError: all is well', in a loader process", "error: all is well'", error.value)  # fmt: skip


# 4: time and memory


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, attempt):
    os.mkfifo(tmp_path / "x")
    for read in (read_file, read_yaml, load_checkpoint, lambda path: read_state(path)):
        with pytest.raises((UserError, OSError), match="not a regular file") as error:
            read(tmp_path / "x")
    attempt("4", "a pipe in place of a preset or checkpoint", "waited for ever", error.value)
    with pytest.raises(OSError, match="not a regular file"):
        read_file("/dev/zero")


@pytest.mark.parametrize(
    ("tried", "text"),
    [
        (
            "400 bytes of YAML with merges of merges",
            "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 19)),
        ),
        ("a hexadecimal number of 5,000 digits", "lr: 0x" + "f" * 5000),
        ("a base-60 number of 3,000 parts", "lr: 1" + ":59" * 3000),
        ("a base-60 fraction of 30,000 parts", "lr: 1" + ":59" * 30000 + ".5"),
        ("one mapping of 900 keys merged 900 times", "a: &a {" + ", ".join(f"k{i}: 1" for i in range(900)) + "}\nb: {<<: [" + ", ".join(["*a"] * 900) + "]}"),
        ("300 KB of YAML", "# " + "x" * 300_000),
    ],
)  # fmt: skip
def test_yaml_that_grows_is_refused_at_once(tried, text, tmp_path, attempt):
    (tmp_path / "p.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match="p.yaml: not readable as YAML") as error:
        parse_options(["--config_file", str(tmp_path / "p.yaml")])
    assert time.process_time() - started < 10
    attempt("4", tried, "minutes, gigabytes or a traceback", error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("vision_layers: 1000000000", "vision_layers must be .* at most 256"),
        ("vision_width: 16384\nvision_layers: 256", "make 8.2e.11 weights; 5e.09 is the limit"),
        ("keep_last: 2000000000", "keep_last must be .* at most 1000"),
        ("img_size: [2000000000, 2000000000]", "img_size must be .* at most 4096"),
        ("queue_batches: 2000000000", "queue_batches must be .* at most 1000"),
    ],
)
def test_a_preset_with_impossible_sizes_is_refused(sizes, message, tmp_path, attempt):
    (tmp_path / "p.yaml").write_text(f"pretrain_choice: scratch\n{sizes}\n")
    with pytest.raises(UserError, match=message) as error:
        parse_options(["--config_file", str(tmp_path / "p.yaml")])
    attempt("4", f"a preset with {ascii(sizes)[1:-1]}", "hours or all memory", error.value)


# 6: a run from another machine


def test_a_run_from_another_machine_is_evaluated_and_its_paths_are_not_used(
    untrusted_run, tmp_path, monkeypatch, capsys, attempt
):
    config, elsewhere = untrusted_run / "configs.yaml", tmp_path / "elsewhere"
    values = yaml.safe_load(config.read_text())
    values |= {
        "image_cache": str(elsewhere / "cache"),
        "attributes_file": str(elsewhere / "a.yaml"),
    }
    config.write_text(yaml.safe_dump(values))
    run(test_entry.main, monkeypatch, "--config_file", config, "--device", "cpu")
    shown = capsys.readouterr().out
    assert not elsewhere.exists() and "test split" in shown
    for name in ("image_cache", "attributes_file"):
        assert f"its {name} is not trusted" in shown and f"to use it: --{name}" in shown
    line = next(line for line in shown.splitlines() if "not trusted" in line)
    attempt("6", "configs.yaml with an image cache and an attributes file in other folders", "the folders were made, or the evaluation failed", line)  # fmt: skip
    args, _, _ = parse_test_options(["--config_file", str(config), "--image_cache", "mine"])
    assert args.image_cache == "mine"


def test_resuming_makes_no_image_cache_at_the_path_in_a_config(
    untrusted_run, tmp_path, monkeypatch, capsys
):
    config, elsewhere = untrusted_run / "configs.yaml", tmp_path / "elsewhere"
    values = yaml.safe_load(config.read_text()) | {"image_cache": str(elsewhere)}
    config.write_text(yaml.safe_dump(values))
    for preset in ([], ["--config_file", str(config)]):
        argv = [*preset, "--resume", "--resume_ckpt_file", str(untrusted_run / "last.pth")]
        assert parse_options(argv).image_cache == ""
        assert parse_options([*argv, "--image_cache", "mine"]).image_cache == "mine"
    resume_run(untrusted_run, monkeypatch)
    assert not elsewhere.exists() and "its image_cache is not trusted" in capsys.readouterr().out


def test_the_command_that_evaluates_a_run_names_its_attributes_and_cache(mini_root, tmp_path, monkeypatch, capsys):  # fmt: skip
    mine = tmp_path / "mine.yaml"
    mine.write_bytes(Path(options().attributes_file).read_bytes())
    overrides = {"attributes_file": mine, "image_cache": tmp_path / "cache", "num_epoch": 1, "warmup_epochs": 0}  # fmt: skip
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path / "out", **overrides))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    _, argv = last.split(" with: python test.py ")
    args, _, notes = parse_test_options(argv.split())
    assert (args.attributes_file, args.image_cache) == (str(mine), str(tmp_path / "cache"))
    assert not notes


# 7: other file systems


@pytest.mark.parametrize(
    ("call", "reason"), [("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP), ("fchmod", errno.EPERM)]
)
def test_a_file_system_that_cannot_sync_or_change_rights_is_reported_once(
    call, reason, tmp_path, monkeypatch, capsys, attempt
):
    def refused(*_):
        raise OSError(reason, os.strerror(reason))

    setup_logger()
    monkeypatch.setattr(os, call, refused)
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path / "last.pth", {"model": {"w": torch.tensor([value])}})
    assert load_checkpoint(tmp_path / "last.pth")["model"]["w"].item() == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "files there cannot be" in line and "continuing without" in line
    tried = f"{call} answers {errno.errorcode[reason]}"
    attempt("7", tried, "the run ended: could not be written", line)


def test_a_disk_error_during_a_sync_is_an_error(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match="could not be written: Input/output error"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"x"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_process_has_started_meanwhile_is_not_started_again(
    mini_root, tmp_path, monkeypatch
):
    argv = flags(mini_root, tmp_path / "out", num_epoch=1, warmup_epochs=0, resume="auto")
    args = parse_options(argv)  # before there is a run
    run(train_entry.main, monkeypatch, *argv)
    with pytest.raises(UserError, match="another process has just started this run"):
        open_run(args, SINGLE_PROCESS)
    assert folder_of(tmp_path / "out")


def test_a_colleague_may_resume_if_the_umask_allows_it(tmp_path, attempt):
    before = os.umask(0o002)
    try:
        os.close(lock(tmp_path))
        append(tmp_path / "train_log.txt").close()
    finally:
        os.umask(before)
    modes = {p.name: stat.filemode(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert set(modes.values()) == {"-rw-rw-r--"}
    attempt("7", "a folder of a group, with umask 002", "lock was -rw-r--r--", modes)


# 8: kills and races


class Killed(BaseException):
    """Stands for a SIGKILL: nothing after it runs."""


def test_kills_between_keeping_a_save_and_writing_the_next_lose_no_kept_save(
    tmp_path, monkeypatch, attempt
):
    path = tmp_path / "last.pth"

    def save(value, killed=False):
        with monkeypatch.context() as patch:
            if killed:

                def replace(source, target):
                    if Path(target) == path:
                        raise Killed
                    os.rename(source, target)

                patch.setattr(os, "replace", replace)
            save_checkpoint(path, {"model": {"w": torch.tensor(value)}}, keep=4)

    for value in (1.0, 2.0, 3.0):
        save(value)
    for _ in range(3):
        with pytest.raises(Killed):
            save(4.0, killed=True)
    save(5.0)
    names = ("last.pth", "last.1.pth", "last.2.pth", "last.3.pth")
    saves = [load_checkpoint(tmp_path / name)["model"]["w"].item() for name in names]
    assert saves[:1] == [5] and saves[1:] == [3, 2, 1]
    attempt("8", "three kills between link and rename, --keep_last 4", "all kept saves were the same", f"saves {saves}")  # fmt: skip


def test_without_hard_links_a_kept_save_is_recognised_by_its_content(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    test_kills_between_keeping_a_save_and_writing_the_next_lose_no_kept_save(
        tmp_path, monkeypatch, lambda *_: None
    )


def test_two_starts_in_the_same_second_are_one_run(mini_root, tmp_path, attempt):
    argv = flags(mini_root, tmp_path / "out", num_epoch=500, resume="auto")
    processes = [start(argv, tmp_path / f"{i}.txt") for i in range(2)]
    wait([process.sentinel for process in processes], timeout=60)
    (refused,) = [i for i in range(2) if processes[i].exitcode is not None]
    assert processes[refused].exitcode == 2
    processes[1 - refused].kill()
    processes[1 - refused].join()
    folders = [p for p in (tmp_path / "out/AGDataAttr").iterdir() if p.is_dir()]
    assert len(folders) == 1
    output = (tmp_path / f"{refused}.txt").read_text()
    assert "another process is using this folder" in output
    attempt(
        "8", "two starts with --resume auto in the same second", "two runs", output.splitlines()[-1]
    )


# 5: names that are not UTF-8


def test_a_run_in_a_folder_whose_name_is_not_utf8_lacks_only_curves(
    mini_root, tmp_path, monkeypatch, capsys, attempt
):
    argv = flags(mini_root, tmp_path / os.fsdecode(b"caf\xe9"), num_epoch=1, warmup_epochs=0)
    run(train_entry.main, monkeypatch, *argv)
    (folder,) = (path.parent for path in tmp_path.rglob("configs.yaml"))
    assert {"best.pth", "last.pth", "train_log.txt"} <= {path.name for path in folder.iterdir()}
    line = next(x for x in capsys.readouterr().out.splitlines() if "no curves" in x)
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml", "--device", "cpu")
    attempt("5", "--output_dir with a name that is not UTF-8", "UnicodeEncodeError", line)
