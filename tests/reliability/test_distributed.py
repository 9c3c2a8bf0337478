"""Several processes on a CPU train like one process with the same global batch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from datasets.samplers import IdentitySampler, RandomSampler, evaluation_batches
from processor.evaluator import Evaluator
from tests.helpers import ROOT, read
from tests.reliability.runs import (
    assert_same,
    flags,
    folder_of,
    forks,
    scalars,
    start,
    start_many,
    with_r1,
)
from utils.checkpoint import load_checkpoint
from utils.distributed import SINGLE_PROCESS, AgreedFlags, Processes, shard_sizes

SETUPS = {
    # 16 samples in batches of 5: the last one is smaller than the number of three processes.
    "supkl+queue+match2+dot": {"precision": "fp64"},
    "supitc+queue+match2+cat+cmpm": {"precision": "fp64", "grad_clip": 1.0, "accum_steps": 2},
    "sdm+id+mlm": {"precision": "fp64", "MLM": True, "cmt_depth": 1, "sampler": "identity",
                   "num_instance": 2, "batch_size": 6, "grad_checkpointing": True},
    "itc+bisdm+tal+nitc+citc+cda": {"precision": "fp64", "num_workers": 1, "optimizer": "SGD",
                                    "ema": 0.8, "average_last": 2, "layer_decay": 0.7},
    "tal+tse+ccd+nitc+mvs+simclr+fta": {"precision": "fp64", "cmt_depth": 1, "tse_dim": 8,
                                        "learn_temperature": True},
    "sdm+itc": {"precision": "fp64", "lora_rank": 2, "lora_alpha": 8.0, "ema": 0.8},
}  # fmt: skip


def torchrun(processes: int, argv) -> subprocess.Popen:
    """train.py under torchrun itself, which is slow to start."""
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *module, "train.py", *argv]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen, status=0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == status, output
    return output


def join(processes, status=0) -> None:
    for process in processes:
        process.join(200)
        assert process.exitcode == status


def assert_close(actual, expected, where, tolerance=1e-9):
    """Assert that weights, optimizer moments (sums of gradients), metrics and scalars agree."""
    a, b = (load_checkpoint(folder / "last.pth") for folder in (actual, expected))
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=0, atol=tolerance, msg=f"{where} {name}")  # fmt: skip
    for index, state in b["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(a["optimizer"]["state"][index][name], value, rtol=0, atol=tolerance, msg=f"{where} {name}")  # fmt: skip
    for part in {"ema", "epoch_average"} & set(b):
        for name, value in b[part]["values"].items():
            torch.testing.assert_close(a[part]["values"][name], value, rtol=0, atol=tolerance, msg=f"{where} {name}")  # fmt: skip
    assert a["best"] == b["best"]  # metrics, to the last digit
    saved_after_the_last_epoch = "epoch_average" in b  # while its mean is evaluated
    a, b = ((folder / "last.1.pth") for folder in (actual, expected))
    if a.exists() and b.exists() and not saved_after_the_last_epoch:
        a, b = load_checkpoint(a), load_checkpoint(b)
        assert a["progress"] == b["progress"] and {"total", "grad_norm"} < set(a["epoch_log"]["sums"])  # fmt: skip
        for name, value in b["epoch_log"]["sums"].items():
            torch.testing.assert_close(
                a["epoch_log"]["sums"][name], value, rtol=tolerance, atol=tolerance
            )
    curves = scalars(actual), scalars(expected)
    assert curves[0].keys() == curves[1].keys()
    for name in curves[1]:  # recorded in single precision
        assert curves[0][name] == pytest.approx(curves[1][name], rel=1e-6), name


@pytest.mark.parametrize("names", SETUPS)
def test_two_and_three_processes_train_as_one(names, mini_root, tmp_path):
    """Complete trainings: losses, gradients, weights, queue, metrics and the best epoch."""
    sizes = (1, 2, 3) if names.startswith("supkl") else (1, 2)
    # Save as often as possible, so that last.1.pth holds the sums of the last epoch's losses.
    overrides = {"log_period": 100, "save_period": "0.0001min", "keep_last": 2, **SETUPS[names]}
    argv = {n: flags(mini_root, tmp_path / str(n), loss_names=names, **overrides) for n in sizes}
    join([process for n in sizes for process in start_many(n, argv[n], tmp_path / f"output{n}")])
    for n in sizes[1:]:
        assert len(list((tmp_path / str(n)).glob("*/*/"))) == 1  # only rank 0 writes
        assert (folder_of(tmp_path / str(n)) / "last.1.pth").exists()
        assert_close(folder_of(tmp_path / str(n)), folder_of(tmp_path / "1"), f"{names}, {n}")


def test_a_run_of_two_processes_stops_at_a_signal_and_resumes_as_one(mini_root, tmp_path):
    """Only torchrun gets the signal. It passes it to its processes, which agree on the step."""
    argv = flags(mini_root, tmp_path / "cut", precision="fp64", num_epoch=12, resume="auto")
    process = torchrun(2, argv)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "cut").glob("*/*/last.pth")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and "SIGTERM: saved at epoch" in output, output
    uninterrupted = flags(mini_root, tmp_path / "uninterrupted", precision="fp64", num_epoch=12)
    join([start(argv, tmp_path / "output"), start(uninterrupted)])
    assert re.search(r"resumed after \d+ epochs", (tmp_path / "output").read_text())
    assert_close(folder_of(tmp_path / "cut"), folder_of(tmp_path / "uninterrupted"), "resumed")


def test_every_process_fails_when_one_fails(mini_copy, tmp_path):
    """A broken image that only rank 1 reads also ends rank 0, with one message."""
    sampler = RandomSampler(16, 16, 1, Processes(1, 2))
    path = Path(read("AGDataAttr", mini_copy).train[next(iter(sampler))[0].index].image.path)
    path.write_bytes(path.read_bytes()[:400])
    process = torchrun(2, flags(mini_copy, tmp_path, batch_size=16, num_epoch=50, seed=1))
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    # Reported when it happens, and once more at the end of torchrun's report.
    assert len(re.findall(rf"error: {path} .*the image cannot be read", output)) == 2, output
    assert "RuntimeError" not in output
    assert f"rank 1: error: {path}" in (folder_of(tmp_path) / "train_log.txt").read_text()


def read_an_older_save_on_rank_1():
    read = train.read_state
    if os.environ["RANK"] == "1":
        train.read_state = lambda path, keep: read(path.replace("last.pth", "last.1.pth"))


def metrics_that_differ():
    """As on two kinds of CPU, which round differently: R@1 rises on rank 0 and falls on rank 1."""
    evaluate = Evaluator.evaluate
    recalls = iter([1, 2, 3] if os.environ["RANK"] == "0" else [3, 2, 1])
    Evaluator.evaluate = lambda *args: with_r1(evaluate(*args), next(recalls))


def test_processes_whose_metrics_differ_choose_the_same_checkpoint(mini_root, tmp_path):
    """Those of rank 0 count. If each process chose for itself, one would wait for ever."""
    join(start_many(2, flags(mini_root, tmp_path), before=metrics_that_differ))
    assert load_checkpoint(folder_of(tmp_path) / "best.pth")["epoch"] == 3


def test_broken_images_of_every_process_are_in_the_log(mini_copy, tmp_path):
    data = read("AGDataAttr", mini_copy)
    sampler = RandomSampler(16, 16, 1)
    batch = next(iter(sampler))
    paths = [Path(data.train[batch[place].index].image.path) for place in (2, 12)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:400])
    argv = flags(mini_copy, tmp_path / "o", batch_size=16, on_bad_image="skip")
    join(start_many(2, argv))
    log = (folder_of(tmp_path / "o") / "train_log.txt").read_text()
    for path in paths:
        assert log.count(f"{path} (") == 1
    assert log.count("broken images skipped: 2") == 3


def test_processes_that_find_different_checkpoints_do_not_resume(mini_root, tmp_path):
    """As on machines that do not share the folder: the file of rank 1 is one epoch older."""
    argv = flags(mini_root, tmp_path / "o", keep_last=2, resume="auto")
    join([start(argv)])
    before = load_checkpoint(folder_of(tmp_path / "o") / "last.pth")
    join(start_many(2, argv, tmp_path / "output", before=read_an_older_save_on_rank_1), status=2)
    assert "processes find different checkpoints there" in (tmp_path / "output").read_text()
    assert_same(load_checkpoint(folder_of(tmp_path / "o") / "last.pth"), before)


def test_shards_are_even_and_complete():
    for count in range(0, 20):
        for processes in range(1, 6):
            sizes = shard_sizes(count, processes)
            assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and len(sizes) == processes


@pytest.mark.parametrize("kind", ["random", "identity"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_shards_together_are_the_batches_of_one_process(kind, size):
    """No overlap, nothing left out, the same order, and another order in the next epoch."""

    def sampler(processes):
        if kind == "random":
            return RandomSampler(22, 6, 4, processes)
        return IdentitySampler([i // 3 for i in range(22)], 2, 6, 4, processes)

    single = sampler(SINGLE_PROCESS)
    samplers = [sampler(Processes(rank, size)) for rank in range(size)]
    epochs = []
    for epoch in range(2):
        for each in (single, *samplers):
            each.set_epoch(epoch)
        batches, shards = list(single), [list(part) for part in samplers]
        epochs.append([key.index for batch in batches for key in batch])
        for step, batch in enumerate(batches):
            counts = single.counts(step)
            assert counts == [len(batch)]
            counts = samplers[0].counts(step)
            pieces = [shards[rank][step][: counts[rank]] for rank in range(size)]
            assert [key for keys in pieces for key in keys] == batch == samplers[-1].batch(step)
            assert all(
                shards[rank][step] for rank in range(size)
            )  # each process has something to encode
    assert epochs[0] != epochs[1]
    # A sampler can start in the middle of an epoch.
    resumed = sampler(SINGLE_PROCESS)
    resumed.set_epoch(1, 2)
    assert list(resumed) == batches[2:] and len(resumed) == len(batches)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 23])
def test_evaluation_is_sharded_by_complete_batches(count):
    single, counts = evaluation_batches(count, 4)
    assert counts == [count] and [i for batch in single for i in batch] == list(range(count))
    for size in (2, 3, 7):
        shards = [evaluation_batches(count, 4, Processes(rank, size)) for rank in range(size)]
        assert [batch for batches, _ in shards for batch in batches] == single
        assert all(c == [sum(map(len, b)) for b, _ in shards] for _, c in shards)


def gather_in_child(rank, size, store, results):
    """Gather rows with a gradient, gather integers, and agree on flags; for a child process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    processes = Processes(rank, size, [0, 0, 1][rank], size, dist.new_group(backend="gloo"))
    counts = [3, 0, 2][:size]
    start = sum(counts[:rank])
    rows = torch.arange(5 * 4, dtype=torch.float64).reshape(5, 2, 2).sin()
    shard = rows[start : start + counts[rank]].clone().requires_grad_()
    parts = {"a": shard, "b": 2 * shard[:, 0]}
    gathered = processes.all_gather(parts, counts)
    (gathered["a"] ** 3).sum().add((gathered["b"] ** 2).sum()).backward()
    labels = processes.all_gather({"pids": torch.arange(start, start + counts[rank])}, counts)[
        "pids"
    ]
    agreed = AgreedFlags(processes)
    answers = [agreed(rank == 1 and call == 1, False) for call in range(4)]
    with processes.rank_0_first(), open(f"{store}.turns", "a") as file:
        file.write(str(rank))
    broadcast = torch.full((2,), rank)
    processes.broadcast([broadcast])
    results.put((rank, gathered["a"].tolist(), shard.grad.tolist(), labels.tolist(), answers,
                 processes.all_gather_objects(rank), processes.from_rank_0(f"from {rank}"), broadcast.tolist()))  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def test_gathering_returns_all_rows_and_gives_each_process_its_gradient(tmp_path):
    results = forks.SimpleQueue()
    processes = [forks.Process(target=gather_in_child, args=(r, 3, tmp_path / "store", results)) for r in range(3)]  # fmt: skip
    for process in processes:
        process.start()
    outcomes = sorted(results.get() for _ in range(3))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = torch.arange(5 * 4, dtype=torch.float64).reshape(5, 2, 2).sin().requires_grad_()
    ((expected**3).sum() + ((2 * expected[:, 0]) ** 2).sum()).backward()
    gradients = []
    # Rank 0, the first rank of the other machine, the rest.
    assert (tmp_path / "store.turns").read_text() == "012"
    for rank, rows, gradient, labels, answers, ranks, message, broadcast in outcomes:
        assert rows == expected.tolist() and labels == [0, 1, 2, 3, 4]
        gradients += gradient
        # The third call returns what the processes agree on for the flags of the second.
        assert answers == [[False, False], [False, False], [True, False], [False, False]]
        assert ranks == [0, 1, 2] and message == "from 0" and rank in ranks and broadcast == [0, 0]
    torch.testing.assert_close(torch.tensor(gradients, dtype=torch.float64), 3 * expected.grad)


def test_a_resnet_refuses_several_processes(tmp_path):
    from model.backbone import Backbone
    from model.build import build_training_model
    from tests.helpers import options
    from tests.model.test_backbone import RESNET
    from utils.errors import UserError

    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    args = options(pretrain_choice=str(tmp_path / "rn.pt"))
    with pytest.raises(UserError, match="torchrun with several processes: a ResNet normalises"):
        build_training_model(args, ["itc"], 0, Processes(0, 2))


def test_a_slurm_job_that_is_warned_is_queued_again_and_finishes(mini_root, tmp_path):
    """With stand-ins for SLURM's commands: the job saves and is queued again. Its second start
    resumes, finishes and is not queued again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (
        ("srun", f'echo "$1" >> {tmp_path}/steps; shift; exec "$@"'),
        ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"'),
        ("scontrol", f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/queue || echo localhost'),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "1",
             "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment = os.environ | slurm | {"PATH": f"{commands}:{os.environ['PATH']}"}
    argv = ["docs/train.slurm", *flags(mini_root, tmp_path / "o", num_epoch=10)]

    def submit():
        return subprocess.Popen(argv, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    job = submit()
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("o/*/*_slurm_77/last.pth")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=100)
    assert job.returncode != 0 and "SIGUSR1: saved at epoch" in output, output
    assert (tmp_path / "queue").read_text() == "77\n"
    assert (tmp_path / "steps").read_text() == "--cpus-per-task=2\n"
    output = finish(submit())
    assert re.search(r"resumed after [1-9]\d* epochs", output) and "epoch 10/10" in output
    assert (tmp_path / "queue").read_text() == "77\n"
