"""A run cut at any moment and resumed ends as the unbroken one, bit for bit."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import processor.trainer
import train as train_entry
from datasets.loaders import on_device
from datasets.samplers import IdentitySampler
from processor.evaluator import Evaluator
from processor.resume import read_state
from tests.helpers import ROOT, read, run
from tests.reliability.runs import assert_same_end, flags, folder_of, same, start, with_r1
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import StoppedBySignal, UserError
from utils.interrupt import StopRequest

WAYS = {
    "random": {},
    "identity, mlm": {
        "loss_names": "sdm+id+mlm", "MLM": True, "cmt_depth": 1, "sampler": "identity",
        "num_instance": 2, "batch_size": 6, "optimizer": "SGD", "momentum": 0.9, "num_workers": 1,
    },
    "fp16": {"precision": "fp16", "accum_steps": 2, "loss_names": "itc+supitc+queue"},
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(mini_root, tmp_path_factory):
    """Folders of runs that nothing disturbed."""
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, more in WAYS.items():
            out = tmp_path_factory.mktemp("unbroken")
            run(train_entry.main, monkeypatch, *flags(mini_root, out, **more))
            folders[name] = folder_of(out)
    return folders


def raise_at_step(monkeypatch, moment, number):
    """Send this process a signal while the given step (counted over the run) is computed."""
    seen = iter(range(1, 1000))

    def watched(*args):
        for batch in on_device(*args):
            if next(seen) == moment:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(processor.trainer, "on_device", watched)


def rising(monkeypatch, after=0, by=1):
    """R@1 is 1 after the first epoch, 2 after the second, ..."""
    evaluate, epochs = Evaluator.evaluate, itertools.count(1 + after)
    while hasattr(evaluate, "inner"):
        evaluate = evaluate.inner

    def evaluated(*args):
        return with_r1(evaluate(*args), by * float(next(epochs)))

    evaluated.inner = evaluate
    monkeypatch.setattr(Evaluator, "evaluate", evaluated)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("moment", "number"),
    [(1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGUSR1), (6, signal.SIGHUP)],
)
def test_a_run_that_a_signal_stops_goes_on_to_the_same_end(
    way, moment, number, unbroken, mini_root, tmp_path, monkeypatch
):
    words = flags(mini_root, tmp_path, **WAYS[way], resume="auto")
    with monkeypatch.context() as patch:
        raise_at_step(patch, moment, number)
        with pytest.raises(
            StoppedBySignal, match=f"{number.name}: saved at epoch .*, step .*; resume with"
        ):
            run(train_entry.main, patch, *words)
    state = load_checkpoint(folder_of(tmp_path) / "last.pth")
    steps = 2 if "identity" in way else 4
    assert state["epoch"] * steps + state["progress"]["step"] == moment
    run(train_entry.main, monkeypatch, *words)
    assert_same_end(folder_of(tmp_path), unbroken[way])


def test_a_run_that_is_stopped_while_it_evaluates_evaluates_again(
    unbroken, mini_root, tmp_path, monkeypatch
):
    encode = Evaluator.encode

    def disturbed(self, model, between):
        signal.raise_signal(signal.SIGTERM)
        return encode(self, model, between)

    words = flags(mini_root, tmp_path, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "encode", disturbed)
        with pytest.raises(StoppedBySignal, match="saved at epoch 1, step 4"):
            run(train_entry.main, patch, *words)
    assert not (folder_of(tmp_path) / "best.pth").exists()
    run(train_entry.main, monkeypatch, *words)
    assert_same_end(folder_of(tmp_path), unbroken["random"])


def test_resume_without_a_path_takes_the_newest_run_of_that_name(
    mini_root, tmp_path, monkeypatch, capsys
):
    few = {"num_epoch": 1, "warmup_epochs": 0}
    for name in ("a", "b", "a_2"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, name=name, **few))
    capsys.readouterr()
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path, "--name", "a", "--num_epoch", 2)  # fmt: skip
    (folder,) = tmp_path.glob("*/*_a")
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2
    assert "resumed after 1 epochs and 0 steps" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/*/"))) == 3
    # Its own configs.yaml names the run, too; a finished one has nothing left to do.
    run(train_entry.main, monkeypatch, "--resume", "--config_file", folder / "configs.yaml")
    assert "resumed after 2 epochs and 0 steps" in capsys.readouterr().out


def test_what_makes_no_other_experiment_stays_where_a_preset_does_not_name_it(
    mini_root, tmp_path, monkeypatch
):
    few = {"num_epoch": 1, "warmup_epochs": 0}
    words = flags(mini_root, tmp_path, **few, keep_last=2, save_period="9min", slack=0.3)
    run(train_entry.main, monkeypatch, *words)
    at = words.index("--keep_last")
    (tmp_path / "preset.yaml").write_text("slack: 0.2\n")
    again = [*words[:at], "--config_file", tmp_path / "preset.yaml", "--resume", "--num_epoch", 2]
    run(train_entry.main, monkeypatch, *again)
    found = yaml.safe_load((folder_of(tmp_path) / "configs.yaml").read_text())
    assert (found["keep_last"], found["save_period"], found["slack"]) == (2, "9min", 0.2)


def test_resume_auto_refuses_other_options(mini_root, tmp_path, monkeypatch):
    few = {"num_epoch": 1, "warmup_epochs": 0, "resume": "auto"}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few))
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, save_period="30min"))
    with pytest.raises(UserError, match=r"runs with other options: --slack 0.3 \(was 0.15\)"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, slack=0.3))
    with pytest.raises(UserError, match="runs with other options: --finetune b.pth"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, finetune="b.pth"))


def test_the_precision_that_auto_meant_is_kept(mini_root, tmp_path, monkeypatch):
    """Also where the run goes on on another machine."""
    words = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0, precision="auto")
    monkeypatch.setattr(train_entry, "choose_precision", lambda name, _: {"auto": "fp64"}.get(name, name))  # fmt: skip
    run(train_entry.main, monkeypatch, *words)
    monkeypatch.undo()
    run(train_entry.main, monkeypatch, *words[:-2], "--precision", "auto", "--resume", "auto", "--num_epoch", 2)  # fmt: skip
    log = (folder_of(tmp_path) / "train_log.txt").read_text()
    assert log.count("cpu, fp64") == 2 and "changed: --num_epoch 2" in log


def test_a_best_checkpoint_from_after_the_point_gone_back_to_is_set_aside(
    mini_root, tmp_path, monkeypatch
):
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, keep_last=3))
    folder = folder_of(tmp_path)
    later = load_checkpoint(folder / "best.pth")
    later |= {"epoch": 3, "best": later["best"] | {"epoch": 3}}
    save_checkpoint(folder / "best.pth", later)
    again = ["--resume", "--config_file", folder / "configs.yaml", "--resume_ckpt_file"]
    run(train_entry.main, monkeypatch, *again, folder / "last.2.pth", "--lr", "1e-4")
    same(load_checkpoint(folder / "best.backup1.pth"), later)
    log = (folder / "train_log.txt").read_text()
    text = (
        "best.pth is of epoch 3 and belongs to another save; renamed to best.backup1.pth; written"
    )
    assert text in log
    (folder / "best.pth").unlink()
    run(train_entry.main, monkeypatch, *again, folder / "last.1.pth")
    assert load_checkpoint(folder / "best.pth")["epoch"] == 3
    log = (folder / "train_log.txt").read_text()
    text = (
        r"best.pth is missing or corrupted; this run's best was of epoch 1, R@1 \d+.\d\d; the best "
    )
    assert re.search(text + "from here on will be kept", log)
    # Another line's, though of the same epoch; and what was set aside before stays.
    other = load_checkpoint(folder / "best.pth")
    other |= {"best": other["best"] | {"R@1": -1.0}}
    save_checkpoint(folder / "best.pth", other)
    run(train_entry.main, monkeypatch, *again, folder / "last.pth", "--num_epoch", 4)
    same(load_checkpoint(folder / "best.backup2.pth"), other)
    same(load_checkpoint(folder / "best.backup1.pth"), later)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"batch_size": 8}, "of 16 samples in batches of 5 .*of 16 samples in batches of 8"),
        ({"sampler": "identity", "batch_size": 5, "num_instance": 1}, "RandomSampler.*Identity"),
    ],
    ids=["batch size", "sampler"],
)
def test_an_epoch_that_is_under_way_cannot_change_its_batches(
    other, told, mini_root, tmp_path, monkeypatch
):
    words = flags(mini_root, tmp_path, loss_names="itc")
    with monkeypatch.context() as patch:
        raise_at_step(patch, 2, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            run(train_entry.main, patch, *words)
    given = [word for name, value in other.items() for word in (f"--{name}", value)]
    again = ["--resume", "--output_dir", tmp_path, *given]
    with pytest.raises(UserError, match=told):
        run(train_entry.main, monkeypatch, *again)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)  # its own options
    run(train_entry.main, monkeypatch, *again, "--num_epoch", 4)  # between epochs it may


def test_batches_of_identities_are_described_by_all_that_makes_them():
    pids = [0, 0, 1, 1, 2, 2, 3, 3]
    two, one = (IdentitySampler(pids, n, 4, 0).describe() for n in (2, 1))
    assert two == "8 samples in batches of 4 (IdentitySampler), 2 of an identity" != one


def test_a_run_is_left_to_the_process_that_works_on_it(mini_root, tmp_path, monkeypatch):
    words = flags(mini_root, tmp_path, num_epoch=500, resume="auto")
    busy = start(words)
    wait_for(lambda: list(tmp_path.glob("*/*/last.pth")))
    with pytest.raises(UserError, match="another process is at work here"):
        run(train_entry.main, monkeypatch, *words)
    busy.terminate()
    busy.join()
    assert busy.exitcode == 75
    # Nor does `auto` begin a second one beside a run that has not saved yet.
    words = flags(mini_root, tmp_path / "b", num_epoch=500, save_period=500, resume="auto")
    busy = start(words)
    wait_for(lambda: list(tmp_path.glob("b/*/*/configs.yaml")))
    with pytest.raises(UserError, match="another process is at work here"):
        run(train_entry.main, monkeypatch, *words)
    assert sum(path.is_dir() for path in tmp_path.glob("b/*/*")) == 1
    busy.kill()
    busy.join()


def test_minutes_between_saves_are_kept_and_older_saves_stay(mini_root, tmp_path, monkeypatch):
    """With a save after every step the kept ones are a step apart."""
    words = flags(mini_root, tmp_path, save_period="1min", keep_last=3, num_epoch=1, warmup_epochs=0)  # fmt: skip
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(processor.trainer.time, "monotonic", lambda: next(clock))
    run(train_entry.main, monkeypatch, *words)
    folder = folder_of(tmp_path)
    states = [load_checkpoint(folder / f"last{n}.pth") for n in ("", ".1", ".2")]
    assert [tuple(s["progress"].values()) for s in states] == [(1, 0), (0, 4), (0, 4)]
    assert not (folder / "last.3.pth").exists()
    assert read_state(folder / "last.pth", 3).state["epoch"] == 1


def test_minutes_are_up_once_though_processes_agree_a_step_later(mini_root, tmp_path, monkeypatch):
    class Late:
        def __init__(self, processes):
            self.flags = [False, False]

        def __call__(self, *flags):
            answer, self.flags = self.flags, flags
            return answer

    saved, minutes = [], iter(range(1000))
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: 60 * next(minutes))
    trainer = processor.trainer.Trainer
    monkeypatch.setattr(processor.trainer, "AgreedFlags", Late)
    monkeypatch.setattr(processor.trainer, "time", clock)
    monkeypatch.setattr(trainer, "_write", lambda self, path, *_: saved.append((path.name, self.progress.epoch, self.progress.step)))  # fmt: skip
    run(
        train_entry.main,
        monkeypatch,
        *flags(mini_root, tmp_path, save_period="4min", eval_period=3),
    )
    steps = [4 * epoch + step for name, epoch, step in saved if name == "last.pth" and step]
    assert len(steps) >= 2
    assert min(b - a for a, b in itertools.pairwise(steps)) > 1


def test_epochs_between_saves_are_kept(mini_root, tmp_path, monkeypatch):
    saved = []
    rising(monkeypatch, by=0)
    monkeypatch.setattr(
        processor.trainer.Trainer, "save", lambda self: saved.append(self.progress.epoch)
    )
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, save_period=2, num_epoch=5))
    assert saved == [1, 2, 4, 5]  # the first is a new best


def test_a_run_whose_options_are_lost_is_not_begun_anew(mini_root, tmp_path, monkeypatch):
    words = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0)
    run(train_entry.main, monkeypatch, *words)
    config = folder_of(tmp_path) / "configs.yaml"
    text = config.read_text()
    config.unlink()
    last = ["--resume_ckpt_file", config.with_name("last.pth"), "--resume"]
    for given in ([*words, "--resume", "yes"], [*words, "--resume", "auto"], last):
        with pytest.raises(UserError, match=f"{config}: missing, and with it the run's options"):
            run(train_entry.main, monkeypatch, *given)
    with pytest.raises(UserError, match="--dataset_name x: unknown"):  # told, so it is tried
        run(train_entry.main, monkeypatch, *last, "--loss_names", "itc", "--dataset_name", "x")
    at = words.index("--output_dir")
    run(train_entry.main, monkeypatch, *words[:at], *words[at + 2 :], *last)
    log = config.with_name("train_log.txt").read_text()
    assert f"{config}: missing, so nobody can tell which options have changed" in log
    config.write_text(text)
    with pytest.raises(UserError, match="--seed 5: only a new run can have another than 1"):
        run(train_entry.main, monkeypatch, *words, "--resume", "--seed", 5)
    with pytest.raises(
        UserError, match="--finetune b.pth: only a new run can have another than ''"
    ):
        run(train_entry.main, monkeypatch, *words, "--resume", "--finetune", "b.pth")
    with pytest.raises(UserError, match="--dataset_name /abs: unknown"):
        run(train_entry.main, monkeypatch, *words, "--resume", "auto", "--dataset_name", "/abs")
    with pytest.raises(UserError, match=f"--config_file {config} says where the run is"):
        run(train_entry.main, monkeypatch, "--resume", "auto", "--config_file", config, "--output_dir", tmp_path)  # fmt: skip


def test_a_signal_before_training_leaves_with_the_status_of_one_that_may_start_again():
    code = (
        "import signal; from utils.errors import run_main; "
        "from utils.interrupt import leave_at_once; leave_at_once(); "
        "run_main(lambda: signal.raise_signal(signal.SIGTERM))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 75
    assert found.stderr == "SIGTERM: stopped; there was nothing to save\n"


def test_a_signal_while_a_file_is_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise StoppedBySignal("SIGTERM: stopped; there was nothing to save")

    torch.save({"model": {}}, tmp_path / "last.pth")
    monkeypatch.setattr(torch, "load", stop)
    with pytest.raises(StoppedBySignal):
        read_state(tmp_path / "last.pth", keep=2)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=str,
)  # fmt: skip
def test_a_read_error_that_may_pass_is_not_taken_for_damage(
    error, mini_root, tmp_path, monkeypatch
):
    """Or a good last.pth would give way to an older one, and a good best.pth be set aside."""
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, keep_last=2))
    folder = folder_of(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    load = torch.load
    for name in ("last.pth", "best.pth"):

        def failing(path, name=name, **more):
            if path.name == name:
                raise error
            return load(path, **more)

        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{folder}/{name}: "):
            patch.setattr(torch, "load", failing)
            run(train_entry.main, patch, "--resume", "--output_dir", tmp_path, "--num_epoch", 4)
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pth")}


def test_signals_that_are_ignored_stay_so():
    """`nohup` and the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_between_steps_saves_what_was_done(mini_copy, tmp_path, monkeypatch, unbroken):
    """An image that is corrupted for a while: the run goes on from where it met it."""
    words = flags(mini_copy, tmp_path, save_period="10min", num_workers=1)
    image = Path(read("AGDataAttr", mini_copy).splits["test"].galleries["aerial"].images[2].path)
    data = image.read_bytes()
    image.write_bytes(data[:400])
    with pytest.raises(UserError, match=r"^/.*\(saved at epoch 1, step 4; resume with: python "):
        run(train_entry.main, monkeypatch, *words)
    image.write_bytes(data)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)
    assert_same_end(folder_of(tmp_path), unbroken["random"])


@pytest.mark.parametrize("moment", [1, 5, 6])
def test_an_error_before_any_step_of_an_epoch_is_gone_on_from(
    moment, mini_root, tmp_path, monkeypatch, unbroken
):
    """The epoch's order has been drawn already, when its first batch cannot be read."""
    seen = iter(range(1, 1000))

    def failing(*args):
        for batch in on_device(*args):
            if next(seen) == moment:
                raise UserError("an image cannot be read.")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(processor.trainer, "on_device", failing)
        place = f"saved at epoch {1 + (moment - 1) // 4}, step {(moment - 1) % 4};"
        with pytest.raises(UserError, match=place):
            run(train_entry.main, patch, *flags(mini_root, tmp_path))
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)
    assert_same_end(folder_of(tmp_path), unbroken["random"])


@pytest.mark.parametrize("error", [UserError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", [1, 2])
def test_a_best_checkpoint_that_was_not_written_is_written_on_resuming(
    moment, error, mini_root, tmp_path, monkeypatch
):
    """A full disk, or a kill between last.pth and best.pth."""
    rising(monkeypatch)
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path / "whole", eval_period=1))
    seen = iter(range(1, 9))

    def full(path, *args):
        if path.name == "best.pth" and next(seen) == moment:
            raise error
        save_checkpoint(path, *args)

    rising(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(processor.trainer, "save_checkpoint", full)
        with pytest.raises(type(error)):
            run(train_entry.main, patched, *flags(mini_root, tmp_path / "cut", save_period=9))
    rising(monkeypatch, after=moment)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path / "cut")
    folder = folder_of(tmp_path / "cut")
    assert_same_end(folder, folder_of(tmp_path / "whole"))
    assert f"weights of this save, epoch {moment}" in (folder / "train_log.txt").read_text()
    assert not list(folder.glob("*backup*"))


def test_every_new_best_is_saved_with_all_that_going_on_needs(mini_root, tmp_path, monkeypatch):
    """Or a kill would take a run back to before the best that best.pth no longer has."""
    rising(monkeypatch)
    written = []
    monkeypatch.setattr(processor.trainer, "save_checkpoint", lambda path, content, keep: written.append((path.name, content["epoch"])))  # fmt: skip
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, save_period=9))
    assert written == [(name, epoch) for epoch in (1, 2, 3) for name in ("last.pth", "best.pth")]


def test_a_console_that_is_gone_ends_no_run(mini_root, tmp_path):
    reading, writing = os.pipe()
    child = start(flags(mini_root, tmp_path), f"/proc/{os.getpid()}/fd/{writing}")
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    child.join()
    assert child.exitcode == 0
    assert "epoch 3/3" in (folder_of(tmp_path) / "train_log.txt").read_text()


def test_a_console_that_is_full_ends_no_run(mini_root, tmp_path):
    child = start(flags(mini_root, tmp_path), "/dev/full")
    child.join()
    assert child.exitcode == 0
    assert "epoch 3/3" in (folder_of(tmp_path) / "train_log.txt").read_text()
    child = start(flags(mini_root, tmp_path, lr=-1), "/dev/full")
    child.join()
    assert child.exitcode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_is_closed_from_the_start_ends_no_run(tmp_path, closed):
    command = f"{sys.executable} train.py --lr 0 {closed}"
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: --lr must be more than 0") or "2" in closed
    code = "from utils.errors import run_main; from utils.run_log import setup_logger; run_main("
    code += f"lambda: setup_logger(__import__('pathlib').Path('{tmp_path}/log')).info('hello'))"
    command = f'{sys.executable} -c "{code}" {closed}'
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == 0
    assert "hello" in (tmp_path / "log").read_text()


def test_a_second_ctrl_c_leaves_at_once(capfd):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        told = "\nfinishing this step, then saving; Ctrl-C leaves at once\n"
        assert capfd.readouterr().err == told
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_kills_at_random_moments_change_nothing(mini_root, tmp_path, pytestconfig, tally):
    """SIGKILL, then the same command again with `--resume auto`, until it ends."""
    kills, dice = pytestconfig.getoption("kills"), random.Random(1)
    words = {"num_epoch": 12, "save_period": "0.001min", "num_workers": 1, "keep_last": 2}
    whole = start(flags(mini_root, tmp_path / "whole", **words))
    began = time.monotonic()
    whole.join()
    assert whole.exitcode == 0
    longest = (time.monotonic() - began) / 4
    survived = ended = 0
    while survived < kills:
        out = tmp_path / f"cut{ended}"
        while True:
            child = start(flags(mini_root, out, **words, resume="auto"))
            child.join(dice.uniform(0, longest) if survived < kills else None)
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            child.kill()
            child.join()
            survived += 1
            for left in out.glob("*/*/last.pth"):
                load_checkpoint(left)  # whole
        # Kills before the first save leave folders without a checkpoint.
        (last,) = out.glob("*/*/last.pth")
        assert_same_end(last.parent, folder_of(tmp_path / "whole"))
        ended += 1
    tally["kills survived"] += survived
    tally["killed runs that ended as the unbroken one"] += ended


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def chosen_on_val(mini_root, tmp_path_factory):
    """A run of one epoch that val chooses, and its data."""
    folder = tmp_path_factory.mktemp("chosen_on_val")
    root = shutil.copytree(mini_root, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        words = flags(root, folder / "logs", num_epoch=1, warmup_epochs=0, loss_names="itc")
        run(train_entry.main, patch, *words, "--val_dataset", "val")
    return folder


def changed(root, name, change):
    file = root / f"AG-ReID/agtext_{name}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        # Two samples less: identities stay, so nothing else would tell.
        ("train", lambda rows: rows.pop(), "train: 8 identities, 16 captions, 32 images then, 8 identities, 15 captions, 30 images now"),
        ("train", lambda rows: rows.reverse(), "train: .*; the same counts, but other content or another order"),
        ("val", lambda lists: lists["captions"].__setitem__(0, "A man."), "val: .*; the same counts"),
    ],
    ids=["a sample less", "another order", "the split that chooses"],
)  # fmt: skip
def test_a_run_does_not_go_on_with_data_that_has_changed(
    name, change, told, chosen_on_val, tmp_path, monkeypatch
):
    shutil.copytree(chosen_on_val, tmp_path, dirs_exist_ok=True)
    folder = folder_of(tmp_path / "logs")
    changed(tmp_path / "data", name, change)
    before = {p.name: p.read_bytes() for p in folder.glob("*.pth")}
    words = ["--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch", 2]
    with pytest.raises(UserError, match=rf"last.pth: the run's data has changed \({told}"):
        run(train_entry.main, monkeypatch, *words, "--root_dir", tmp_path / "data")
    assert before == {p.name: p.read_bytes() for p in folder.glob("*.pth")}


def test_held_out_people_are_those_of_the_run(chosen_on_val, tmp_path, monkeypatch):
    shutil.copytree(chosen_on_val, tmp_path, dirs_exist_ok=True)
    words = ["--resume", "--resume_ckpt_file", folder_of(tmp_path / "logs") / "last.pth"]
    with pytest.raises(UserError, match="--val_dataset, --heldout and --heldout_seed as they were"):
        run(train_entry.main, monkeypatch, *words, "--num_epoch", 2, "--val_dataset", "heldout")


def test_a_split_that_does_not_choose_may_change_and_that_is_told(
    chosen_on_val, tmp_path, monkeypatch, capsys
):
    shutil.copytree(chosen_on_val, tmp_path, dirs_exist_ok=True)
    changed(tmp_path / "data", "test", lambda lists: lists["captions"].__setitem__(0, "A man."))
    words = ["--resume", "--resume_ckpt_file", folder_of(tmp_path / "logs") / "last.pth"]
    run(train_entry.main, monkeypatch, *words, "--num_epoch", 2, "--root_dir", tmp_path / "data")
    shown = capsys.readouterr().out
    assert "the data has changed, test: " in shown and "epoch 2/2" in shown


@pytest.mark.parametrize("val_dataset", ["val", "both"])
def test_a_checkpoint_without_a_fingerprint_goes_on_with_a_word(
    val_dataset, chosen_on_val, tmp_path, monkeypatch, capsys
):
    """One of before; but then nothing could be held out."""
    shutil.copytree(chosen_on_val, tmp_path, dirs_exist_ok=True)
    last = folder_of(tmp_path / "logs") / "last.pth"
    state = load_checkpoint(last)
    del state["data"]
    save_checkpoint(last, state)
    words = ["--resume", "--resume_ckpt_file", last, "--num_epoch", 2, "--val_dataset", val_dataset]
    if val_dataset == "both":
        with pytest.raises(UserError, match="resume with --val_dataset val or test"):
            run(train_entry.main, monkeypatch, *words)
        return
    run(train_entry.main, monkeypatch, *words)
    assert "keeps no fingerprint of its data" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_images_of_another_shape(mini_root, tmp_path, monkeypatch):
    """Of as many patches, so that every weight would fit."""
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0))
    last = folder_of(tmp_path) / "last.pth"
    words = ("--resume", "--resume_ckpt_file", last, "--num_epoch", 2, "--img_size", 16, 32)
    with pytest.raises(UserError, match="images of 32x16 at stride 16, the options say 16x32 at"):
        run(train_entry.main, monkeypatch, *words)
