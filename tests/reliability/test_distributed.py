"""Two processes on a CPU train as one does with the same global batch."""

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
    flags,
    folder_of,
    forks,
    same,
    scalars,
    start,
    start_many,
    with_r1,
)
from utils.checkpoint import load_checkpoint
from utils.distributed import SINGLE_PROCESS, AgreedFlags, Processes, shard_sizes

WAYS = {
    # 16 samples in batches of 5: the last one is smaller than the number of three processes.
    "supkl+queue+match2+dot": {"precision": "fp64"},
    "supitc+queue+match2+cat+cmpm": {"precision": "fp64", "grad_clip": 1.0, "accum_steps": 2},
    "sdm+id+mlm": {"precision": "fp64", "MLM": True, "cmt_depth": 1, "sampler": "identity",
                   "num_instance": 2, "batch_size": 6, "grad_checkpointing": True},
    "itc+bisdm": {"precision": "fp64", "num_workers": 1, "optimizer": "SGD"},
}  # fmt: skip


def torchrun(processes: int, words) -> subprocess.Popen:
    """train.py under torchrun itself, which takes its time to begin."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *many, "train.py", *words]
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


def assert_close(found, expected, where, tolerance=1e-9):
    """Checkpoints and recorded figures agree, and so do the optimizer's moments: the gradients."""
    a, b = (load_checkpoint(folder / "last.pth") for folder in (found, expected))
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=0, atol=tolerance, msg=f"{where} {name}")  # fmt: skip
    for index, state in b["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(a["optimizer"]["state"][index][name], value, rtol=0, atol=tolerance, msg=f"{where} {name}")  # fmt: skip
    assert a["best"] == b["best"]  # metrics, to the last digit
    a, b = ((folder / "last.1.pth") for folder in (found, expected))
    if a.exists() and b.exists():
        a, b = load_checkpoint(a), load_checkpoint(b)
        assert a["progress"] == b["progress"] and {"total", "grad_norm"} < set(a["epoch_log"]["sums"])  # fmt: skip
        for name, value in b["epoch_log"]["sums"].items():
            torch.testing.assert_close(
                a["epoch_log"]["sums"][name], value, rtol=tolerance, atol=tolerance
            )
    figures = scalars(found), scalars(expected)
    assert figures[0].keys() == figures[1].keys()
    for name in figures[1]:  # recorded in single precision
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-6), name


@pytest.mark.parametrize("names", WAYS)
def test_two_and_three_processes_train_as_one(names, mini_root, tmp_path):
    """Whole trainings: losses, gradients, weights, queue, metrics and the best epoch."""
    sizes = (1, 2, 3) if names.startswith("supkl") else (1, 2)
    # Saved whenever it can be, so that last.1.pth holds the sums of the last epoch's losses.
    more = {"log_period": 100, "save_period": "0.0001min", "keep_last": 2, **WAYS[names]}
    words = {n: flags(mini_root, tmp_path / str(n), loss_names=names, **more) for n in sizes}
    join([process for n in sizes for process in start_many(n, words[n], tmp_path / f"said{n}")])
    for n in sizes[1:]:
        assert len(list((tmp_path / str(n)).glob("*/*/"))) == 1  # only the first one writes
        assert (folder_of(tmp_path / str(n)) / "last.1.pth").exists()
        assert_close(folder_of(tmp_path / str(n)), folder_of(tmp_path / "1"), f"{names}, {n}")


def test_a_run_of_two_processes_stops_at_a_signal_and_goes_on_as_one(mini_root, tmp_path):
    """The signal reaches torchrun alone; it tells its processes, and they agree on the step."""
    words = flags(mini_root, tmp_path / "cut", precision="fp64", num_epoch=12, resume="auto")
    two = torchrun(2, words)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "cut").glob("*/*/last.pth")) and time.monotonic() < deadline:
        time.sleep(0.02)
    two.send_signal(signal.SIGTERM)
    output, _ = two.communicate(timeout=100)
    assert two.returncode != 0 and "SIGTERM: saved at epoch" in output, output
    whole = flags(mini_root, tmp_path / "whole", precision="fp64", num_epoch=12)
    join([start(words, tmp_path / "said"), start(whole)])
    assert re.search(r"resumed after \d+ epochs", (tmp_path / "said").read_text())
    assert_close(folder_of(tmp_path / "cut"), folder_of(tmp_path / "whole"), "resumed")


def test_every_process_fails_when_one_fails(mini_copy, tmp_path):
    """A broken image that only the second process reads ends the first, too, with one message."""
    sampler = RandomSampler(16, 16, 1, Processes(1, 2))
    path = Path(read("AGDataAttr", mini_copy).train[next(iter(sampler))[0].index].image.path)
    path.write_bytes(path.read_bytes()[:400])
    process = torchrun(2, flags(mini_copy, tmp_path, batch_size=16, num_epoch=50, seed=1))
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    # Told when it happens, and once more at the end of torchrun's report.
    assert len(re.findall(rf"error: {path} .*the image cannot be read", output)) == 2, output
    assert "RuntimeError" not in output
    assert f"rank 1: error: {path}" in (folder_of(tmp_path) / "train_log.txt").read_text()


def elsewhere():
    read = train.read_state
    if os.environ["RANK"] == "1":
        train.read_state = lambda path, keep: read(path.replace("last.pth", "last.1.pth"))


def metrics_that_differ():
    """As on processors of two kinds, which round otherwise: one process's rise, the other's fall."""
    evaluate = Evaluator.evaluate
    found = iter([1, 2, 3] if os.environ["RANK"] == "0" else [3, 2, 1])
    Evaluator.evaluate = lambda *args: with_r1(evaluate(*args), next(found))


def test_processes_whose_metrics_differ_choose_the_same_checkpoint(mini_root, tmp_path):
    """Those of the first count; a process that would go its own way would wait for ever."""
    join(start_many(2, flags(mini_root, tmp_path), before=metrics_that_differ))
    assert load_checkpoint(folder_of(tmp_path) / "best.pth")["epoch"] == 3


def test_broken_images_of_every_process_are_in_the_log(mini_copy, tmp_path):
    data = read("AGDataAttr", mini_copy)
    sampler = RandomSampler(16, 16, 1)
    whole = next(iter(sampler))
    paths = [Path(data.train[whole[place].index].image.path) for place in (2, 12)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:400])
    words = flags(mini_copy, tmp_path / "o", batch_size=16, on_bad_image="skip")
    join(start_many(2, words))
    log = (folder_of(tmp_path / "o") / "train_log.txt").read_text()
    for path in paths:
        assert log.count(f"{path} (") == 1
    assert log.count("broken images skipped: 2") == 3


def test_processes_that_find_different_checkpoints_do_not_go_on(mini_root, tmp_path):
    """As on machines that do not share the folder: the second one's file is of an epoch before."""
    words = flags(mini_root, tmp_path / "o", keep_last=2, resume="auto")
    join([start(words)])
    before = load_checkpoint(folder_of(tmp_path / "o") / "last.pth")
    join(start_many(2, words, tmp_path / "said", before=elsewhere), status=2)
    assert "processes find different checkpoints there" in (tmp_path / "said").read_text()
    same(load_checkpoint(folder_of(tmp_path / "o") / "last.pth"), before)


def test_shares_are_even_and_whole():
    for count in range(0, 20):
        for size in range(1, 6):
            found = shard_sizes(count, size)
            assert sum(found) == count and max(found) - min(found) <= 1 and len(found) == size


@pytest.mark.parametrize("kind", ["random", "identity"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shares_of_processes_are_the_batches_of_one(kind, size):
    """No overlap, nothing left out, the same order, and another order in the next epoch."""

    def sampler(processes):
        if kind == "random":
            return RandomSampler(22, 6, 4, processes)
        return IdentitySampler([i // 3 for i in range(22)], 2, 6, 4, processes)

    alone = sampler(SINGLE_PROCESS)
    parts = [sampler(Processes(rank, size)) for rank in range(size)]
    epochs = []
    for epoch in range(2):
        for one in (alone, *parts):
            one.set_epoch(epoch)
        whole, shared = list(alone), [list(part) for part in parts]
        epochs.append([key.index for batch in whole for key in batch])
        for step, batch in enumerate(whole):
            counts = alone.counts(step)
            assert counts == [len(batch)]
            counts = parts[0].counts(step)
            own = [shared[rank][step][: counts[rank]] for rank in range(size)]
            assert [key for keys in own for key in keys] == batch == parts[-1].batch(step)
            assert all(shared[rank][step] for rank in range(size))  # each has something to encode
    assert epochs[0] != epochs[1]
    # The middle of an epoch is found again.
    again = sampler(SINGLE_PROCESS)
    again.set_epoch(1, 2)
    assert list(again) == whole[2:] and len(again) == len(whole)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 23])
def test_evaluation_is_shared_by_whole_batches(count):
    alone, counts = evaluation_batches(count, 4)
    assert counts == [count] and [i for batch in alone for i in batch] == list(range(count))
    for size in (2, 3, 7):
        found = [evaluation_batches(count, 4, Processes(rank, size)) for rank in range(size)]
        assert [batch for batches, _ in found for batch in batches] == alone
        assert all(c == [sum(map(len, b)) for b, _ in found] for _, c in found)


def gathering(rank, size, store, results):
    """Gather rows with a gradient, gather integers, and vote; for a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    processes = Processes(rank, size, [0, 0, 1][rank], size, dist.new_group(backend="gloo"))
    counts = [3, 0, 2][:size]
    start = sum(counts[:rank])
    whole = torch.arange(5 * 4, dtype=torch.float64).reshape(5, 2, 2).sin()
    own = whole[start : start + counts[rank]].clone().requires_grad_()
    parts = {"a": own, "b": 2 * own[:, 0]}
    found = processes.all_gather(parts, counts)
    (found["a"] ** 3).sum().add((found["b"] ** 2).sum()).backward()
    labels = processes.all_gather({"pids": torch.arange(start, start + counts[rank])}, counts)[
        "pids"
    ]
    votes = AgreedFlags(processes)
    answers = [votes(rank == 1 and call == 1, False) for call in range(4)]
    with processes.rank_0_first(), open(f"{store}.turns", "a") as file:
        file.write(str(rank))
    spread = torch.full((2,), rank)
    processes.broadcast([spread])
    results.put((rank, found["a"].tolist(), own.grad.tolist(), labels.tolist(), answers,
                 processes.all_gather_objects(rank), processes.from_rank_0(f"from {rank}"), spread.tolist()))  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def test_gathering_gives_all_rows_and_the_gradient_of_the_own(tmp_path):
    results = forks.SimpleQueue()
    processes = [forks.Process(target=gathering, args=(r, 3, tmp_path / "store", results)) for r in range(3)]  # fmt: skip
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in range(3))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    whole = torch.arange(5 * 4, dtype=torch.float64).reshape(5, 2, 2).sin().requires_grad_()
    ((whole**3).sum() + ((2 * whole[:, 0]) ** 2).sum()).backward()
    gradients = []
    # The leader, the first of the other machine, the rest.
    assert (tmp_path / "store.turns").read_text() == "012"
    for rank, rows, gradient, labels, answers, ranks, word, spread in found:
        assert rows == whole.tolist() and labels == [0, 1, 2, 3, 4]
        gradients += gradient
        # The answer to the second call's votes arrives with the third.
        assert answers == [[False, False], [False, False], [True, False], [False, False]]
        assert ranks == [0, 1, 2] and word == "from 0" and rank in ranks and spread == [0, 0]
    torch.testing.assert_close(torch.tensor(gradients, dtype=torch.float64), 3 * whole.grad)


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


def test_the_slurm_file_goes_back_into_the_queue_when_it_is_warned(mini_root, tmp_path):
    """With stand-ins for SLURM's own commands: a warned job saves and is queued again; the same job
    then goes on to the end, and is not."""
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
    words = ["docs/train.slurm", *flags(mini_root, tmp_path / "o", num_epoch=10)]

    def submit():
        return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

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
