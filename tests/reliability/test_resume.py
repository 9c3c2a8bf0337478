"""A run that is stopped at any moment and resumed ends like the uninterrupted one, bit for bit."""

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
from tests.reliability.runs import assert_same, assert_same_end, flags, folder_of, start, with_r1
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import StoppedBySignal, UserError
from utils.interrupt import StopRequest

SETUPS = {
    "random": {},
    "identity, mlm": {
        "loss_names": "sdm+id+mlm", "MLM": True, "cmt_depth": 1, "sampler": "identity",
        "num_instance": 2, "batch_size": 6, "optimizer": "SGD", "momentum": 0.9, "num_workers": 1,
    },
    "averages": {"ema": 0.8, "average_last": 2, "layer_decay": 0.7, "save_period": "0.0001min"},
    "LoRA": {"lora_rank": 2, "lora_dropout": 0.2, "ema": 0.8, "average_last": 2, "accum_steps": 2,
             "save_period": "0.0001min"},
    "fp16": {"precision": "fp16", "accum_steps": 2, "loss_names": "itc+supitc+queue+tal+nitc"},
    "tse, ccd": {
        "loss_names": "tal+tse+ccd+nitc+mvs+simclr+fta", "cmt_depth": 1, "tse_dim": 8,
        "learn_temperature": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(mini_root, tmp_path_factory):
    """Folders of uninterrupted runs, by setup."""
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for setup, overrides in SETUPS.items():
            out = tmp_path_factory.mktemp("uninterrupted")
            run(train_entry.main, monkeypatch, *flags(mini_root, out, **overrides))
            folders[setup] = folder_of(out)
    return folders


def send_signal_at_step(monkeypatch, step, number):
    """Send this process a signal during a step (counted over the run)."""
    steps = iter(range(1, 1000))

    def watched(*args):
        for batch in on_device(*args):
            if next(steps) == step:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(processor.trainer, "on_device", watched)


def let_recall_rise(monkeypatch, after=0, by=1):
    """R@1 is 1 after the first epoch, 2 after the second, ..."""
    evaluate, epochs = Evaluator.evaluate, itertools.count(1 + after)
    while hasattr(evaluate, "inner"):
        evaluate = evaluate.inner

    def evaluated(*args):
        return with_r1(evaluate(*args), by * float(next(epochs)))

    evaluated.inner = evaluate
    monkeypatch.setattr(Evaluator, "evaluate", evaluated)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGUSR1), (6, signal.SIGHUP)],
)
def test_a_run_that_a_signal_stops_resumes_to_the_same_end(
    setup, step, number, uninterrupted, mini_root, tmp_path, monkeypatch
):
    argv = flags(mini_root, tmp_path, **SETUPS[setup], resume="auto")
    with monkeypatch.context() as patch:
        send_signal_at_step(patch, step, number)
        with pytest.raises(
            StoppedBySignal, match=f"{number.name}: saved at epoch .*, step .*; resume with"
        ):
            run(train_entry.main, patch, *argv)
    state = load_checkpoint(folder_of(tmp_path) / "last.pth")
    per_epoch = 2 if "identity" in setup else 4
    assert state["epoch"] * per_epoch + state["progress"]["step"] == step
    run(train_entry.main, monkeypatch, *argv)
    assert_same_end(folder_of(tmp_path), uninterrupted[setup])


@pytest.mark.parametrize("setup", ["random", "averages", "LoRA"])
def test_a_run_that_is_stopped_during_an_evaluation_repeats_it(
    setup, uninterrupted, mini_root, tmp_path, monkeypatch
):
    encode = Evaluator.encode

    def encode_after_a_signal(self, model, between):
        signal.raise_signal(signal.SIGTERM)
        return encode(self, model, between)

    argv = flags(mini_root, tmp_path, **SETUPS[setup], resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "encode", encode_after_a_signal)
        with pytest.raises(StoppedBySignal, match="saved at epoch 1, step 4"):
            run(train_entry.main, patch, *argv)
    assert not (folder_of(tmp_path) / "best.pth").exists()
    run(train_entry.main, monkeypatch, *argv)
    assert_same_end(folder_of(tmp_path), uninterrupted[setup])


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
    # The run's configs.yaml names it, too. A finished run has nothing left to do.
    run(train_entry.main, monkeypatch, "--resume", "--config_file", folder / "configs.yaml")
    assert "resumed after 2 epochs and 0 steps" in capsys.readouterr().out


def test_options_that_do_not_change_the_experiment_stay_unless_a_preset_sets_them(
    mini_root, tmp_path, monkeypatch
):
    few = {"num_epoch": 1, "warmup_epochs": 0}
    argv = flags(mini_root, tmp_path, **few, keep_last=2, save_period="9min", slack=0.3)
    run(train_entry.main, monkeypatch, *argv)
    at = argv.index("--keep_last")
    (tmp_path / "preset.yaml").write_text("slack: 0.2\n")
    again = [*argv[:at], "--config_file", tmp_path / "preset.yaml", "--resume", "--num_epoch", 2]
    run(train_entry.main, monkeypatch, *again)
    config = yaml.safe_load((folder_of(tmp_path) / "configs.yaml").read_text())
    assert (config["keep_last"], config["save_period"], config["slack"]) == (2, "9min", 0.2)


def test_resume_auto_refuses_other_options(mini_root, tmp_path, monkeypatch):
    few = {"num_epoch": 1, "warmup_epochs": 0, "resume": "auto"}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few))
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, save_period="30min"))
    with pytest.raises(UserError, match=r"runs with other options: --slack 0.3 \(was 0.15\)"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, slack=0.3))
    with pytest.raises(UserError, match="runs with other options: --finetune b.pth"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few, finetune="b.pth"))


def test_the_precision_that_auto_chose_is_kept(mini_root, tmp_path, monkeypatch):
    """Also if another machine resumes the run."""
    argv = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0, precision="auto")
    monkeypatch.setattr(train_entry, "choose_precision", lambda name, _: {"auto": "fp64"}.get(name, name))  # fmt: skip
    run(train_entry.main, monkeypatch, *argv)
    monkeypatch.undo()
    run(train_entry.main, monkeypatch, *argv[:-2], "--precision", "auto", "--resume", "auto", "--num_epoch", 2)  # fmt: skip
    log = (folder_of(tmp_path) / "train_log.txt").read_text()
    assert log.count("cpu, fp64") == 2 and "changed: --num_epoch 2" in log


def test_a_best_checkpoint_of_a_later_epoch_than_the_resumed_save_is_backed_up(
    mini_root, tmp_path, monkeypatch
):
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, keep_last=3))
    folder = folder_of(tmp_path)
    later = load_checkpoint(folder / "best.pth")
    later |= {"epoch": 3, "best": later["best"] | {"epoch": 3}}
    save_checkpoint(folder / "best.pth", later)
    again = ["--resume", "--config_file", folder / "configs.yaml", "--resume_ckpt_file"]
    run(train_entry.main, monkeypatch, *again, folder / "last.2.pth", "--lr", "1e-4")
    assert_same(load_checkpoint(folder / "best.backup1.pth"), later)
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
    # So is one of the same epoch from another run. Earlier backups stay.
    other = load_checkpoint(folder / "best.pth")
    other |= {"best": other["best"] | {"R@1": -1.0}}
    save_checkpoint(folder / "best.pth", other)
    run(train_entry.main, monkeypatch, *again, folder / "last.pth", "--num_epoch", 4)
    assert_same(load_checkpoint(folder / "best.backup2.pth"), other)
    assert_same(load_checkpoint(folder / "best.backup1.pth"), later)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 8}, "of 16 samples in batches of 5 .*of 16 samples in batches of 8"),
        ({"sampler": "identity", "batch_size": 5, "num_instance": 1}, "RandomSampler.*Identity"),
    ],
    ids=["batch size", "sampler"],
)
def test_batches_cannot_change_within_an_epoch(other, message, mini_root, tmp_path, monkeypatch):
    argv = flags(mini_root, tmp_path, loss_names="itc")
    with monkeypatch.context() as patch:
        send_signal_at_step(patch, 2, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            run(train_entry.main, patch, *argv)
    changed_options = [text for name, value in other.items() for text in (f"--{name}", value)]
    again = ["--resume", "--output_dir", tmp_path, *changed_options]
    with pytest.raises(UserError, match=message):
        run(train_entry.main, monkeypatch, *again)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)  # the run's options
    run(train_entry.main, monkeypatch, *again, "--num_epoch", 4)  # between epochs they may


def test_the_description_of_identity_batches_names_all_their_settings():
    pids = [0, 0, 1, 1, 2, 2, 3, 3]
    two, one = (IdentitySampler(pids, n, 4, 0).describe() for n in (2, 1))
    assert two == "8 samples in batches of 4 (IdentitySampler), 2 of an identity" != one


def test_a_run_that_another_process_trains_is_refused(mini_root, tmp_path, monkeypatch):
    argv = flags(mini_root, tmp_path, num_epoch=500, resume="auto")
    process = start(argv)
    wait_for(lambda: list(tmp_path.glob("*/*/last.pth")))
    with pytest.raises(UserError, match="another process is using this folder"):
        run(train_entry.main, monkeypatch, *argv)
    process.terminate()
    process.join()
    assert process.exitcode == 75
    # Nor does `auto` start a second run while the first has not saved yet.
    argv = flags(mini_root, tmp_path / "b", num_epoch=500, save_period=500, resume="auto")
    process = start(argv)
    wait_for(lambda: list(tmp_path.glob("b/*/*/configs.yaml")))
    with pytest.raises(UserError, match="another process is using this folder"):
        run(train_entry.main, monkeypatch, *argv)
    assert sum(path.is_dir() for path in tmp_path.glob("b/*/*")) == 1
    process.kill()
    process.join()


def test_saves_are_the_given_minutes_apart_and_older_saves_stay(mini_root, tmp_path, monkeypatch):
    """Each step takes a minute here, so each is saved."""
    argv = flags(mini_root, tmp_path, save_period="1min", keep_last=3, num_epoch=1, warmup_epochs=0)  # fmt: skip
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(processor.trainer.time, "monotonic", lambda: next(clock))
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path)
    states = [load_checkpoint(folder / f"last{n}.pth") for n in ("", ".1", ".2")]
    assert [tuple(s["progress"].values()) for s in states] == [(1, 0), (0, 4), (0, 4)]
    assert not (folder / "last.3.pth").exists()
    assert read_state(folder / "last.pth", 3).state["epoch"] == 1


def test_a_save_is_made_once_though_processes_agree_on_it_a_step_later(
    mini_root, tmp_path, monkeypatch
):
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


def test_saves_are_the_given_epochs_apart(mini_root, tmp_path, monkeypatch):
    saved = []
    let_recall_rise(monkeypatch, by=0)
    monkeypatch.setattr(
        processor.trainer.Trainer, "save", lambda self: saved.append(self.progress.epoch)
    )
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, save_period=2, num_epoch=5))
    assert saved == [1, 2, 4, 5]  # the first is a new best


def test_a_run_whose_configs_yaml_is_missing_is_not_started_again(mini_root, tmp_path, monkeypatch):
    argv = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0)
    run(train_entry.main, monkeypatch, *argv)
    config = folder_of(tmp_path) / "configs.yaml"
    text = config.read_text()
    config.unlink()
    last = ["--resume_ckpt_file", config.with_name("last.pth"), "--resume"]
    for attempted in ([*argv, "--resume", "yes"], [*argv, "--resume", "auto"], last):
        with pytest.raises(UserError, match=f"{config}: missing, and with it the run's options"):
            run(train_entry.main, monkeypatch, *attempted)
    with pytest.raises(
        UserError, match="--dataset_name x: unknown"
    ):  # options are given, so it tries to resume
        run(train_entry.main, monkeypatch, *last, "--loss_names", "itc", "--dataset_name", "x")
    at = argv.index("--output_dir")
    run(train_entry.main, monkeypatch, *argv[:at], *argv[at + 2 :], *last)
    log = config.with_name("train_log.txt").read_text()
    assert f"{config}: missing, so changes of options are unknown" in log
    config.write_text(text)
    with pytest.raises(UserError, match="--seed 5: the run has 1; only a new run can change it"):
        run(train_entry.main, monkeypatch, *argv, "--resume", "--seed", 5)
    with pytest.raises(UserError, match="--finetune b.pth: the run has ''"):
        run(train_entry.main, monkeypatch, *argv, "--resume", "--finetune", "b.pth")
    with pytest.raises(UserError, match="--dataset_name /abs: unknown"):
        run(train_entry.main, monkeypatch, *argv, "--resume", "auto", "--dataset_name", "/abs")
    with pytest.raises(UserError, match=f"--config_file {config} says where the run is"):
        run(train_entry.main, monkeypatch, "--resume", "auto", "--config_file", config, "--output_dir", tmp_path)  # fmt: skip


def test_a_signal_before_training_ends_it_with_the_status_for_another_start():
    code = (
        "import signal; from utils.errors import run_main; "
        "from utils.interrupt import exit_on_signals; exit_on_signals(); "
        "run_main(lambda: signal.raise_signal(signal.SIGTERM))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 75
    assert process.stderr == "SIGTERM: stopped; there was nothing to save\n"


def test_a_signal_while_a_file_is_read_is_not_taken_for_corruption(tmp_path, monkeypatch):
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
def test_a_temporary_read_error_is_not_taken_for_corruption(
    error, mini_root, tmp_path, monkeypatch
):
    """Otherwise an older save would replace an intact last.pth, and best.pth would be renamed."""
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


def test_signals_that_are_ignored_stay_ignored():
    """As under `nohup`, and in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_between_steps_saves_what_was_done(
    mini_copy, tmp_path, monkeypatch, uninterrupted
):
    """An image that is corrupted for a while: the run resumes where it failed."""
    argv = flags(mini_copy, tmp_path, save_period="10min", num_workers=1)
    image = Path(read("AGDataAttr", mini_copy).splits["test"].galleries["aerial"].images[2].path)
    data = image.read_bytes()
    image.write_bytes(data[:400])
    with pytest.raises(UserError, match=r"^/.*\(saved at epoch 1, step 4; resume with: python "):
        run(train_entry.main, monkeypatch, *argv)
    image.write_bytes(data)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)
    assert_same_end(folder_of(tmp_path), uninterrupted["random"])


@pytest.mark.parametrize("failing_step", [1, 5, 6])
def test_a_run_resumes_after_an_error_in_reading_a_batch(
    failing_step, mini_root, tmp_path, monkeypatch, uninterrupted
):
    """The first batch too, when the order of the epoch is already drawn."""
    steps = iter(range(1, 1000))

    def failing(*args):
        for batch in on_device(*args):
            if next(steps) == failing_step:
                raise UserError("an image cannot be read.")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(processor.trainer, "on_device", failing)
        place = f"saved at epoch {1 + (failing_step - 1) // 4}, step {(failing_step - 1) % 4};"
        with pytest.raises(UserError, match=place):
            run(train_entry.main, patch, *flags(mini_root, tmp_path))
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path)
    assert_same_end(folder_of(tmp_path), uninterrupted["random"])


@pytest.mark.parametrize("error", [UserError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_best_checkpoint_that_was_not_written_is_written_on_resuming(
    epoch, error, mini_root, tmp_path, monkeypatch
):
    """As after a full disk, or a kill between last.pth and best.pth."""
    let_recall_rise(monkeypatch)
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path / "uninterrupted", eval_period=1))
    saves = iter(range(1, 9))

    def full(path, *args):
        if path.name == "best.pth" and next(saves) == epoch:
            raise error
        save_checkpoint(path, *args)

    let_recall_rise(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(processor.trainer, "save_checkpoint", full)
        with pytest.raises(type(error)):
            run(train_entry.main, patched, *flags(mini_root, tmp_path / "cut", save_period=9))
    let_recall_rise(monkeypatch, after=epoch)
    run(train_entry.main, monkeypatch, "--resume", "--output_dir", tmp_path / "cut")
    folder = folder_of(tmp_path / "cut")
    assert_same_end(folder, folder_of(tmp_path / "uninterrupted"))
    assert f"weights of this save, epoch {epoch}" in (folder / "train_log.txt").read_text()
    assert not list(folder.glob("*backup*"))


def test_every_new_best_is_saved_with_all_that_resuming_needs(mini_root, tmp_path, monkeypatch):
    """Otherwise a killed run would resume from an epoch before that of best.pth."""
    let_recall_rise(monkeypatch)
    written = []
    monkeypatch.setattr(processor.trainer, "save_checkpoint", lambda path, content, keep: written.append((path.name, content["epoch"])))  # fmt: skip
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, save_period=9))
    assert written == [(name, epoch) for epoch in (1, 2, 3) for name in ("last.pth", "best.pth")]


def test_a_console_that_is_gone_does_not_end_the_run(mini_root, tmp_path):
    reading, writing = os.pipe()
    child = start(flags(mini_root, tmp_path), f"/proc/{os.getpid()}/fd/{writing}")
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    child.join()
    assert child.exitcode == 0
    assert "epoch 3/3" in (folder_of(tmp_path) / "train_log.txt").read_text()


def test_a_console_that_is_full_does_not_end_the_run(mini_root, tmp_path):
    child = start(flags(mini_root, tmp_path), "/dev/full")
    child.join()
    assert child.exitcode == 0
    assert "epoch 3/3" in (folder_of(tmp_path) / "train_log.txt").read_text()
    child = start(flags(mini_root, tmp_path, lr=-1), "/dev/full")
    child.join()
    assert child.exitcode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_is_closed_from_the_start_does_not_end_the_run(tmp_path, closed):
    command = f"{sys.executable} train.py --lr 0 {closed}"
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: --lr must be more than 0") or "2" in closed
    code = "from utils.errors import run_main; from utils.run_log import setup_logger; run_main("
    code += f"lambda: setup_logger(__import__('pathlib').Path('{tmp_path}/log')).info('hello'))"
    command = f'{sys.executable} -c "{code}" {closed}'
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == 0
    assert "hello" in (tmp_path / "log").read_text()


def test_a_second_ctrl_c_ends_the_run_at_once(capfd):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        message = "\nfinishing this step, then saving; press Ctrl-C again to exit now\n"
        assert capfd.readouterr().err == message
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_kills_at_random_moments_change_nothing(mini_root, tmp_path, pytestconfig, tally):
    """SIGKILL, then the same command again with `--resume auto`, until it ends."""
    kills, rng = pytestconfig.getoption("kills"), random.Random(1)
    # A save after every step: otherwise the time decides which save is the one before the last.
    overrides = {"num_epoch": 12, "save_period": "0.0001min", "num_workers": 1, "keep_last": 2}
    uninterrupted = start(flags(mini_root, tmp_path / "uninterrupted", **overrides))
    began = time.monotonic()
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    longest = (time.monotonic() - began) / 4
    survived = runs = 0
    while survived < kills:
        out = tmp_path / f"cut{runs}"
        while True:
            child = start(flags(mini_root, out, **overrides, resume="auto"))
            child.join(rng.uniform(0, longest) if survived < kills else None)
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            child.kill()
            child.join()
            survived += 1
            for checkpoint in out.glob("*/*/last.pth"):
                load_checkpoint(checkpoint)  # it is intact
        # Kills before the first save leave folders without a checkpoint.
        (last,) = out.glob("*/*/last.pth")
        assert_same_end(last.parent, folder_of(tmp_path / "uninterrupted"))
        runs += 1
    tally["kills survived"] += survived
    tally["killed runs that ended like the uninterrupted one"] += runs


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def selected_on_val(mini_root, tmp_path_factory):
    """A run of one epoch whose best.pth val selects, and its data."""
    folder = tmp_path_factory.mktemp("selected_on_val")
    root = shutil.copytree(mini_root, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        argv = flags(root, folder / "logs", num_epoch=1, warmup_epochs=0, loss_names="itc")
        run(train_entry.main, patch, *argv, "--val_dataset", "val")
    return folder


def change_annotations(root, name, change):
    file = root / f"AG-ReID/agtext_{name}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        # One sample fewer, but the same identities, so no other check would notice.
        ("train", lambda rows: rows.pop(), "train: 8 identities, 16 captions, 32 images then, 8 identities, 15 captions, 30 images now"),
        ("train", lambda rows: rows.reverse(), "train: .*; the same counts, but other content or another order"),
        ("val", lambda lists: lists["captions"].__setitem__(0, "A man."), "val: .*; the same counts"),
    ],
    ids=["a sample fewer", "another order", "the split that selects"],
)  # fmt: skip
def test_a_run_does_not_resume_with_data_that_has_changed(
    name, change, message, selected_on_val, tmp_path, monkeypatch
):
    shutil.copytree(selected_on_val, tmp_path, dirs_exist_ok=True)
    folder = folder_of(tmp_path / "logs")
    change_annotations(tmp_path / "data", name, change)
    before = {p.name: p.read_bytes() for p in folder.glob("*.pth")}
    argv = ["--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch", 2]
    with pytest.raises(UserError, match=rf"last.pth: the run's data has changed \({message}"):
        run(train_entry.main, monkeypatch, *argv, "--root_dir", tmp_path / "data")
    assert before == {p.name: p.read_bytes() for p in folder.glob("*.pth")}


def test_a_run_does_not_resume_with_other_held_out_people(selected_on_val, tmp_path, monkeypatch):
    shutil.copytree(selected_on_val, tmp_path, dirs_exist_ok=True)
    argv = ["--resume", "--resume_ckpt_file", folder_of(tmp_path / "logs") / "last.pth"]
    with pytest.raises(UserError, match="--val_dataset, --heldout and --heldout_seed as they were"):
        run(train_entry.main, monkeypatch, *argv, "--num_epoch", 2, "--val_dataset", "heldout")


def test_a_run_does_not_resume_with_other_noise(selected_on_val, tmp_path, monkeypatch):
    shutil.copytree(selected_on_val, tmp_path, dirs_exist_ok=True)
    argv = ["--resume", "--resume_ckpt_file", folder_of(tmp_path / "logs") / "last.pth"]
    with pytest.raises(UserError, match=r"has changed \(train: .*the same counts.*--noise_rate, -"):
        run(train_entry.main, monkeypatch, *argv, "--num_epoch", 2, "--noise_rate", 0.5)


def test_a_split_that_does_not_select_may_change_with_a_warning(
    selected_on_val, tmp_path, monkeypatch, capsys
):
    shutil.copytree(selected_on_val, tmp_path, dirs_exist_ok=True)
    change_annotations(
        tmp_path / "data", "test", lambda lists: lists["captions"].__setitem__(0, "A man.")
    )
    argv = ["--resume", "--resume_ckpt_file", folder_of(tmp_path / "logs") / "last.pth"]
    run(train_entry.main, monkeypatch, *argv, "--num_epoch", 2, "--root_dir", tmp_path / "data")
    shown = capsys.readouterr().out
    assert "the data has changed, test: " in shown and "epoch 2/2" in shown


@pytest.mark.parametrize("val_dataset", ["val", "both"])
def test_a_checkpoint_without_a_fingerprint_resumes_with_a_warning(
    val_dataset, selected_on_val, tmp_path, monkeypatch, capsys
):
    """Older versions wrote no fingerprint. They could not hold people out either."""
    shutil.copytree(selected_on_val, tmp_path, dirs_exist_ok=True)
    last = folder_of(tmp_path / "logs") / "last.pth"
    state = load_checkpoint(last)
    del state["data"]
    save_checkpoint(last, state)
    argv = ["--resume", "--resume_ckpt_file", last, "--num_epoch", 2, "--val_dataset", val_dataset]
    if val_dataset == "both":
        with pytest.raises(UserError, match="resume with --val_dataset val or test"):
            run(train_entry.main, monkeypatch, *argv)
        return
    run(train_entry.main, monkeypatch, *argv)
    assert "has no fingerprint of its data" in capsys.readouterr().out


def test_a_run_does_not_resume_with_images_of_another_shape(mini_root, tmp_path, monkeypatch):
    """With the same number of patches, so that every weight would fit."""
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0))
    last = folder_of(tmp_path) / "last.pth"
    argv = ("--resume", "--resume_ckpt_file", last, "--num_epoch", 2, "--img_size", 16, 32)
    with pytest.raises(UserError, match="images of 32x16 at stride 16, the options say 16x32 at"):
        run(train_entry.main, monkeypatch, *argv)
