"""Losses that are not finite, broken images, dying processes, full memory and full disks."""

import errno
import functools
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

import datasets.image_cache
import processor.nonfinite
import processor.step
import processor.trainer
import train as train_entry
from datasets.image_cache import ImageFiles
from datasets.loaders import on_device, train_loader
from datasets.samplers import Key
from datasets.training_set import TrainDataset
from processor.failures import explain_failures
from processor.resume import read_state
from processor.step import TrainStep
from processor.trainer import Trainer
from tests.helpers import ROOT, options, read, run
from tests.reliability.runs import (
    assert_same,
    assert_same_end,
    flags,
    folder_of,
    forks,
    scalars,
    start,
)
from utils.checkpoint import digest, load_checkpoint
from utils.errors import StoppedBySignal, UserError, run_main
from utils.files import lock
from utils.runs import new_run_dir

CPU = torch.device("cpu")


def poisoned(monkeypatch, steps, how="images"):
    """Make some steps (counted over the run) fail: NaN in all values through the images, only one
    infinite gradient, or only one loss of NaN."""
    count = iter(range(1, 1000))

    def watched(*args):
        for batch in on_device(*args):
            step = next(count)
            batch["poisoned"] = step in steps
            if step in steps and how == "images":
                batch["images"] = batch["images"] * float("nan")
            yield batch

    backward = TrainStep.backward

    def differentiate(self, batch):
        losses = backward(self, batch)
        if batch["poisoned"] and how == "gradient":
            self.parameters[3].grad.fill_(float("inf"))
        if batch["poisoned"] and how == "loss":
            losses |= dict.fromkeys(("supkl", "total"), losses["total"] * float("nan"))
        return losses

    monkeypatch.setattr(processor.trainer, "on_device", watched)
    monkeypatch.setattr(TrainStep, "backward", differentiate)


def lower_first_scale(monkeypatch):
    """Let fp16's gradient scale start low. At the usual one the first steps overflow."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**10)
    monkeypatch.setattr(processor.step, "GradScaler", scaler)


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        (how, overrides)
        for how in ("images", "gradient", "loss")
        for overrides in (
            {"optimizer": "AdamW"},
            {"optimizer": "SGD", "grad_clip": 1.0},
            {"precision": "bf16", "accum_steps": 2},
            {"precision": "half"},
            {"precision": "fp64"},
            {"precision": "fp16"},
            {"ema": 0.5},
        )
        if (how, overrides)
        != ("gradient", {"precision": "fp16"})  # the scaler handles it, see below
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
    how, overrides, mini_root, tmp_path, monkeypatch, tally
):
    """Weights, their average, moments and queue stay as they were, bit for bit. The next step trains again."""
    poisoned(monkeypatch, {1, 3}, how)
    lower_first_scale(monkeypatch)
    step, unchanged, first = TrainStep.__call__, [], iter([True])

    def compared(self, batch):
        def state():
            average = self.average.state_dict() if self.average else {}
            return digest([self.model.state_dict(), self.optimizer.state_dict()["state"], average])

        before = None if next(first, False) else state()
        result = step(self, batch)
        if before:
            unchanged.append(state() == before)
        return result

    monkeypatch.setattr(TrainStep, "__call__", compared)
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, num_epoch=2, **overrides))
    assert unchanged == [False, True, False, False, False, False, False]
    folder = folder_of(tmp_path)
    reason = "the gradient's norm is (?:inf|nan)" if how == "gradient" else "loss supkl is nan"
    for place in (1, 3):
        (line,) = re.findall(rf"skipped: {reason} in epoch 1, step {place};.*", (folder / "train_log.txt").read_text())  # fmt: skip
        listed = json.loads((folder / f"nonfinite/epoch1_step{place}.json").read_text())
        assert len(listed["samples"]) == 5 and os.path.exists(listed["samples"][0]["image"])
        assert listed["samples"][0]["entry"] in line and "5 samples are listed in" in line
    assert all(v.isfinite().all() for v in load_checkpoint(folder / "last.pth")["model"].values())
    log = (folder / "train_log.txt").read_text()
    assert "nan" not in re.findall(r"epoch 1/2  loss ([^ ]+)", log)  # the mean of the finite steps
    tally["skipped steps with a loss or gradient that was not finite"] += 2


@pytest.mark.parametrize(("allowed", "stopped_at"), [(0, 2), (2, 4)])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(
    allowed, stopped_at, mini_root, tmp_path, monkeypatch
):
    poisoned(monkeypatch, set(range(2, 100)))
    argv = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0, max_nonfinite=allowed)
    with pytest.raises(UserError) as error:
        run(train_entry.main, monkeypatch, *argv)
    assert f"loss supkl is nan in epoch 1, step {stopped_at};" in str(error.value)
    assert f"{allowed + 1} in a row, --max_nonfinite {allowed}: try a lower --lr" in str(
        error.value
    )


def test_steps_in_a_row_are_counted_over_a_resume(mini_root, tmp_path, monkeypatch):
    """Otherwise the limit would never end a run that is often stopped."""
    argv = flags(mini_root, tmp_path, max_nonfinite=3, resume="auto")
    with monkeypatch.context() as patch:
        poisoned(patch, set(range(2, 100)))
        evaluate = processor.trainer.Evaluator.evaluate
        stop = lambda *args: signal.raise_signal(signal.SIGTERM) or evaluate(*args)  # noqa: E731
        patch.setattr(processor.trainer.Evaluator, "evaluate", stop)
        with pytest.raises(StoppedBySignal):
            run(train_entry.main, patch, *argv)
    assert load_checkpoint(folder_of(tmp_path) / "last.pth")["nonfinite"]["in_a_row"] == 3
    poisoned(monkeypatch, {1})
    with pytest.raises(
        UserError, match=r"4 in a row, --max_nonfinite 3: try a lower --lr, .* 1 \(saved"
    ):
        run(train_entry.main, monkeypatch, *argv)


def test_a_list_of_samples_that_cannot_be_written_does_not_end_the_run(
    mini_root, tmp_path, monkeypatch
):
    poisoned(monkeypatch, {1})
    write = processor.nonfinite.write_atomically

    def full(path, *args):
        if path.parent.name == "nonfinite":
            raise UserError(f"{path}: could not be written: No space left on device")
        write(path, *args)

    monkeypatch.setattr(processor.nonfinite, "write_atomically", full)
    argv = flags(mini_root, tmp_path, num_epoch=1, warmup_epochs=0, on_bad_image="skip")
    run(train_entry.main, monkeypatch, *argv)
    log = (folder_of(tmp_path) / "train_log.txt").read_text()
    assert "epoch1_step1.json: could not be written: No space left" in log
    assert re.search(r"skipped: loss supkl is nan in epoch 1, step 1, the first: /", log)


def test_half_precision_gradients_that_overflow_are_left_to_the_scaler(
    mini_root, tmp_path, monkeypatch
):
    """They may overflow at its large first scale. This is no fault while the scale can fall."""
    poisoned(monkeypatch, {1, 2}, "gradient")
    lower_first_scale(monkeypatch)
    step, queues = TrainStep.__call__, []

    def recorded(self, batch):
        result = step(self, batch)
        queues.append(bool((self.model.queue.pids >= 0).any()))
        return result

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, precision="fp16", num_epoch=2))
    log = (folder_of(tmp_path) / "train_log.txt").read_text()
    assert "skipped" not in log
    assert queues[:3] == [False, False, True]  # nor do their features stay in the queue
    assert load_checkpoint(folder_of(tmp_path) / "last.pth")["scaler"]["scale"] == 2**10 / 2**2
    assert all(0 < norm < float("inf") for norm in scalars(folder_of(tmp_path))["grad_norm"])


def broken_image(root, view=2, sample=5) -> str:
    """Truncate the image of a training sample."""
    row = json.loads((root / "AG-ReID/agtext_train.json").read_text())[sample]
    path = root / "AG-ReID" / "/".join(row[view])
    path.write_bytes(path.read_bytes()[:400])
    return str(path)


@pytest.mark.parametrize("overrides", [{}, {"num_workers": 1}, {"image_cache": True}], ids=str)
def test_a_broken_image_is_skipped_reported_and_counted(
    overrides, mini_copy, tmp_path, monkeypatch, tally
):
    path = broken_image(mini_copy)
    if "image_cache" in overrides:
        overrides = {"image_cache": tmp_path / "cache"}
    argv = flags(mini_copy, tmp_path / "logs", on_bad_image="skip", **overrides)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path / "logs")
    log = (folder / "train_log.txt").read_text()
    text = rf"skipped in epoch 1: {path} \(AG-ReID/agtext_train.json, sample 5\): the image cannot"
    assert len(re.findall(text, log)) == 1
    assert len(re.findall(r"epoch \d/3  loss .*  broken images skipped: 1", log)) == 3
    tally["skipped broken images"] += 3
    if overrides.get("image_cache"):  # without `skip` the cache reports it at once
        with pytest.raises(UserError, match=f"{path}.*the image cannot be read"):
            run(train_entry.main, monkeypatch, *flags(mini_copy, tmp_path / "no", **overrides))
        assert not (tmp_path / "no").exists()


def test_the_next_sample_of_the_epoch_replaces_a_broken_image(mini_copy):
    broken_image(mini_copy, view=3)  # of the pair
    data = read("AGDataAttr", mini_copy)
    args = options(root_dir=str(mini_copy), on_bad_image="skip")
    loader = train_loader(data, args, CPU)
    batches = [batch for batch in loader]
    sampler = loader.batch_sampler
    keys = [key for step in range(len(sampler)) for key in sampler.batch(step)]
    place = next(i for i, key in enumerate(keys) if key.index == 5)
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    expected = [key.index for key in keys]
    expected[place] = expected[(place + 1) % len(expected)]
    assert indices == expected and sum(len(b.get("skipped", [])) for b in batches) == 1


def test_broken_images_in_a_row_end_the_run_even_if_they_are_skipped(mini_copy):
    data = read("AGDataAttr", mini_copy)
    images = ImageFiles([__file__] * 2 * len(data.train), (96, 32))
    dataset = TrainDataset(data.train, images, skip=True)
    with pytest.raises(
        UserError, match="3 broken images in a row .*, the last: .*it is not one of JPEG"
    ):
        dataset[Key(0, 0, (1, 2))]


def test_a_broken_gallery_image_is_reported_before_training(mini_copy, tmp_path, monkeypatch):
    """No gallery image is skipped: metrics of a smaller gallery could not be compared."""
    rows = json.loads((mini_copy / "G2APS-AG/g2aps_test.json").read_text())
    path = mini_copy / "G2APS-AG" / "/".join(rows["img_paths"][1])
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{path}: the image cannot be read"):
        run(train_entry.main, monkeypatch, *flags(mini_copy, tmp_path / "o", on_bad_image="skip"))
    assert not (tmp_path / "o").exists()


def test_an_image_over_the_limit_is_refused_without_decoding(tmp_path, monkeypatch):
    from PIL import Image

    from datasets.images import read_image

    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    Image.init()  # decoders that are loaded later may call `load`
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(
        UserError, match="large.png: .* 300x200 is over the limit of 50000 pixels. Make it smaller"
    ):
        read_image(str(tmp_path / "large.png"), max_pixels=50_000)


def test_a_format_that_starts_programs_is_refused(tmp_path):
    """PIL would pass EPS to Ghostscript."""
    from datasets.images import read_image

    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UserError, match="a.jpg: the image cannot be read: it is not one of JPEG"):
        read_image(str(tmp_path / "a.jpg"))


def test_a_loader_process_that_dies_names_the_image_it_read(mini_root, tmp_path, monkeypatch):
    load = datasets.image_cache.load_image
    row = json.loads((mini_root / "AG-ReID/agtext_train.json").read_text())[5]

    def dying(path, *args):
        if path.endswith("/".join(row[2])):
            os.kill(os.getpid(), signal.SIGKILL)
        return load(path, *args)

    monkeypatch.setattr(datasets.image_cache, "load_image", dying)
    with pytest.raises(UserError) as error:
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, num_workers=1))
    assert re.search("a loader process died .(is killed by signal: Killed|exited unexpectedly)", str(error.value))  # fmt: skip
    assert f"while it read {mini_root}/AG-ReID/{'/'.join(row[2])} (AG-ReID/agtext_train.json, sample 5)" in str(error.value)  # fmt: skip
    assert "fewer --num_workers" in str(error.value)


def test_a_loader_process_that_dies_in_an_evaluation_names_the_image_it_read(
    mini_root, tmp_path, monkeypatch
):
    load = datasets.image_cache.load_image
    victim = read("AGDataAttr", mini_root).splits["test"].galleries["aerial"].images[3].path

    def dying(path, *args):
        if path == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(path, *args)

    monkeypatch.setattr(datasets.image_cache, "load_image", dying)
    with pytest.raises(UserError, match=f"while it read {victim}"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, num_workers=1))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device",
            UserError,
            "/dev/shm is full: .* --shm-size 8g.*, or give --num_workers 0",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nsizes differ",
            RuntimeError,
            "sizes differ",
        ),
    ],
)
def test_full_shared_memory_is_explained_and_other_errors_of_a_worker_are_not_changed(
    error, raised, message
):
    with pytest.raises(raised, match=message), explain_failures(options(), CPU, [], "training"):
        raise RuntimeError(error)


@pytest.mark.parametrize("inherited", [False, True])
def test_a_file_system_without_locks_gets_a_warning(inherited, tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in ("lockf", "flock"):
        monkeypatch.setattr(f"fcntl.{name}", missing)
    os.close(lock(tmp_path, inherited))
    assert "cannot be locked (Function not implemented): start no second" in "".join(
        capsys.readouterr()
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/lock: Not a directory"):
        lock(tmp_path / "file")


@pytest.mark.parametrize("inherited", [False, True])
def test_the_lock_of_a_process_that_is_just_ending_is_waited_for(inherited, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from utils.files import lock\n"
        f"lock(Path(sys.argv[1]), {inherited}); print('locked', flush=True); time.sleep(0.5)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=-1)
    assert child.stdout.readline() == b"locked\n"
    os.close(lock(tmp_path, inherited))
    child.communicate()


def out_of_cpu_memory():
    torch.empty(2**48, dtype=torch.uint8)  # the allocator's own error


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [out_of_cpu_memory, out_of_gpu_memory])
def test_out_of_memory_names_the_batch_size_and_what_to_try(fail, mini_root, tmp_path, monkeypatch):
    argv = flags(mini_root, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(TrainStep, "backward", lambda self, batch: fail())
        run(train_entry.main, patch, *argv)
    assert "out of memory in training at --batch_size 5 (accum_steps 1," in str(error.value)
    assert re.search(r"peak \d\.\d GiB", str(error.value))
    assert "Try --accum_steps 2 (the same losses, more time), or --grad_checkpointing" in str(error.value)  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(processor.trainer.Evaluator, "evaluate", lambda *_: fail())
        run(train_entry.main, patch, *argv)
    assert "out of memory in the evaluation at --test_batch_size 4" in str(error.value)


@pytest.mark.parametrize("stage", ["write", "flush", "fsync", "fchmod", "replace"])
def test_a_disk_that_fills_at_any_stage_of_a_save_leaves_only_the_files_before(
    stage, tmp_path, monkeypatch, tally
):
    from utils.checkpoint import save_checkpoint

    path = tmp_path / "last.pth"
    for value in (1, 2, 3):
        save_checkpoint(path, {"model": {"w": torch.full((1000,), value)}}, keep=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if stage in ("fsync", "fchmod", "replace"):
            patch.setattr(os, stage, full)
        else:
            patch.setattr(torch, "save", full if stage == "write" else lambda c, f: setattr(f, "flush", full))  # fmt: skip
        with pytest.raises(UserError, match="last.pth: could not be written: No space left"):
            save_checkpoint(path, {"model": {"w": torch.full((1000,), 4)}}, keep=2)
    assert load_checkpoint(path)["model"]["w"][0] == 3
    assert load_checkpoint(tmp_path / "last.1.pth")["model"]["w"][0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.1.pth", "last.pth"]
    tally["writes to a full disk"] += 1


def stop_after_one_epoch():
    """Press Ctrl-C twice after the first epoch."""
    steps = Trainer._train_steps

    def stop(self):
        if self.progress.epoch:
            raise KeyboardInterrupt
        return steps(self)

    Trainer._train_steps = stop


def limit_file_size():
    """Let writes beyond 300 KB fail from now on, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))


def test_a_run_whose_disk_is_full_ends_and_resumes_when_there_is_space(mini_root, tmp_path, tally):
    """The system itself refuses bytes in the middle of last.pth."""
    argv = flags(mini_root, tmp_path / "cut", resume="auto")
    for child, status in (
        (start(flags(mini_root, tmp_path / "uninterrupted")), 0),
        (start(argv, before=stop_after_one_epoch), 130),
    ):
        child.join()
        assert child.exitcode == status
    folder = folder_of(tmp_path / "cut")
    child = start(argv, output=tmp_path / "printed", before=limit_file_size)
    child.join()
    assert child.exitcode == 2
    shown = (tmp_path / "printed").read_text()
    assert re.search(rf"^error: {folder}/(best|last).pth: could not be written: File too large$", shown, re.M), shown  # fmt: skip
    assert "Traceback" not in shown
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    child = start(argv)
    child.join()
    assert child.exitcode == 0
    assert_same_end(folder, folder_of(tmp_path / "uninterrupted"))
    tally["writes to a full disk"] += 1


def test_curves_that_cannot_be_written_do_not_end_the_run(
    mini_root, tmp_path, monkeypatch, capfd, tally
):
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path / "uninterrupted"))
    write, written = RecordWriter.write, iter(range(1000))

    def full(self, data):
        if next(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path / "full"))
    shown = capfd.readouterr()
    assert "no more curves for TensorBoard: [Errno 28] No space left on device\n" in shown.out
    assert "Traceback" not in shown.out + shown.err
    folders = [folder_of(tmp_path / name) for name in ("full", "uninterrupted")]
    assert_same(*(load_checkpoint(folder / "last.pth") for folder in folders))
    tally["writes to a full disk"] += 1


def test_the_previous_save_replaces_a_corrupted_checkpoint(
    mini_root, tmp_path, monkeypatch, capsys
):
    argv = flags(mini_root, tmp_path / "a", keep_last=2)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path / "a")
    intact = load_checkpoint(folder / "last.pth")
    data = bytearray((folder / "last.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "last.pth").write_bytes(data)
    with pytest.raises(UserError, match="does not fit these options"):
        config = ["--config_file", folder / "configs.yaml", "--resume", "--embed_dim", 128]
        run(train_entry.main, monkeypatch, *config)
    assert (folder / "last.pth").read_bytes() == data  # a refused start changes no file
    capsys.readouterr()
    run(train_entry.main, monkeypatch, *argv, "--resume", "auto")
    shown = capsys.readouterr().out
    assert re.search(r".*/last.pth: .*corrupted.*\nused instead: .*/last.1.pth", shown)
    assert "resumed after 2 epochs and 0 steps" in shown
    assert_same(load_checkpoint(folder / "last.pth"), intact)
    assert (
        folder / "last.corrupted.pth"
    ).read_bytes() == data  # not one of the saves of --keep_last
    assert load_checkpoint(folder / "last.1.pth")["epoch"] == 2


def test_saves_kept_after_a_corruption_are_different_files(mini_root, tmp_path, monkeypatch):
    """Not two names of one file, which would be corrupted together."""
    argv = flags(mini_root, tmp_path, keep_last=3)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path)
    cut = (folder / "last.pth").read_bytes()[:-100]
    (folder / "last.pth").write_bytes(cut)
    run(train_entry.main, monkeypatch, *argv, "--resume", "auto")
    kept = [folder / f"last{n}.pth" for n in ("", ".1", ".2")]
    assert [load_checkpoint(path)["epoch"] for path in kept] == [3, 2, 1]
    assert len({path.stat().st_ino for path in kept}) == 3
    (folder / "last.pth").write_bytes(cut)
    preset = ["--config_file", folder / "configs.yaml", "--resume", "--keep_last", 1]
    with pytest.raises(UserError, match="corrupted.*; older saves for --resume_ckpt_file: last.1.pth, last.2.pth"):  # fmt: skip
        run(train_entry.main, monkeypatch, *preset)
    (folder / "last.1.pth").write_bytes(cut)
    with pytest.raises(UserError, match="_ckpt_file: last.2.pth$"):  # not one that was tried
        run(train_entry.main, monkeypatch, *preset[:-1], 2)


def make_run_folder(barrier, out, results):
    barrier.wait()
    results.put(str(new_run_dir(str(out), "X", "run")))


def test_runs_that_start_in_the_same_second_get_different_folders(mini_root, tmp_path):
    """First eight processes at the same time, then two complete trainings."""
    barrier, results = forks.Barrier(8), forks.SimpleQueue()
    processes = [forks.Process(target=make_run_folder, args=(barrier, tmp_path / "n", results)) for _ in range(8)]  # fmt: skip
    for process in processes:
        process.start()
    assert len({results.get() for _ in processes}) == 8
    for process in processes:
        process.join()
    argv = flags(mini_root, tmp_path / "t", num_epoch=1, warmup_epochs=0)
    for process in [start(argv), start(argv)]:
        process.join()
        assert process.exitcode == 0
    folders = list((tmp_path / "t").glob("*/*/last.pth"))
    assert len(folders) == 2
    assert_same(*(load_checkpoint(path)["model"] for path in folders))


def test_memory_that_runs_out_outside_of_steps_gets_a_one_line_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(out_of_gpu_memory)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


def test_a_full_disk_outside_of_saves_gets_a_one_line_error(capsys):
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: events.out: No space left on device\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_ignore_signals_and_end_with_the_training(
    method, mini_root, tmp_path, monkeypatch
):
    """With both start methods: only the training reacts to a scheduler's signal to all processes,
    and a training that is killed leaves no process behind."""
    import time

    printed = tmp_path / "workers"
    child = forks.Process(target=load_in_child, args=(str(mini_root), method, str(printed)))
    child.start()
    deadline = time.monotonic() + 100
    while not (printed.exists() and printed.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(pid) for pid in printed.read_text().split()]
    assert len(workers) == 1
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)[: 3 if method == "fork" else 2]:
        os.kill(workers[0], number)
    time.sleep(0.5)
    assert running(workers[0])
    child.kill()
    child.join()
    while running(workers[0]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def load_in_child(root, method, printed):
    """Start a loader process, write its id to a file, and wait."""
    import time

    import torch.utils.data

    import datasets.loaders

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, multiprocessing_context=method, **kwargs)

    datasets.loaders.DataLoader = Loader
    data = read("AGDataAttr", root)
    args = options(root_dir=root, num_workers=1)
    loader = train_loader(data, args, CPU)
    for _ in loader:
        break
    with open(printed, "w") as file:
        print(*[w.pid for w in loader._iterator._workers], file=file)
    time.sleep(100)


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(
    mini_root, tmp_path, monkeypatch
):
    """As Adam once made them in half precision. Every later loss is NaN."""
    update, steps = TrainStep.update, itertools.count()

    def poison(self, skipped):
        update(self, skipped)
        if next(steps) == 5:  # the second step of the second epoch
            with torch.no_grad():
                self.model.base_model.visual.proj[3, 5] = float("nan")

    monkeypatch.setattr(TrainStep, "update", poison)
    with pytest.raises(UserError) as error:
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, max_nonfinite=1))
    assert "in a row, --max_nonfinite 1" in str(error.value) and "saved at" not in str(error.value)
    folder = folder_of(tmp_path)
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    # If an older version saved such weights, the previous save is resumed instead.
    state = load_checkpoint(folder / "last.pth")
    os.replace(folder / "last.pth", folder / "last.1.pth")
    state["model"]["base_model.visual.proj"][3, 5] = float("nan")
    torch.save(state, folder / "last.pth")
    with pytest.raises(UserError, match="base_model.visual.proj holds NaN or infinite values"):
        read_state(folder / "last.pth")
    resumed = read_state(folder / "last.pth", keep=2)
    assert resumed.source.name == "last.1.pth" and resumed.state["epoch"] == 1
    assert "base_model.visual.proj holds NaN" in resumed.warnings[0]
