"""Several processes train one model, each on its shard of every batch; torchrun starts them.

    torchrun --nproc_per_node 4 train.py ...

`--batch_size` counts the samples of all processes. Every process encodes its shard, gathers the
features of all shards, and computes the same losses on the complete batch. Gradients flow back
through `Processes.all_gather` to the shard of the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.devices import choose_device
from utils.errors import UserError

# A process waits this long for the others outside of a step: rank 0 may resize 100,000 images.
TIMEOUT = timedelta(hours=6)
# Variables that torchrun sets for each process; all of them are numbers.
TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """The process group of a training, as one process sees it. Defaults: a single process.

    All processes must call the same collectives. A condition for such a call therefore comes from
    `from_rank_0` or from `AgreedFlags`, never from a process's own computation or clock.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank among the processes on this machine
    local_size: int = 1
    control: Any = None  # a gloo group for small objects, so that no device waits for them

    @property
    def is_rank_0(self) -> bool:
        """Whether this process writes files and the log."""
        return self.rank == 0

    def all_gather(self, parts: dict[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
        """Concatenate the rows of all processes by rank; one collective for all tensors.

        Args:
            parts: tensors [n, ...] of one dtype, n = counts[rank].
            counts: rows of each process.

        The backward pass returns the gradient of the process's rows, times `size`. The mean over
        processes (`all_reduce_mean`) then gives encoders the sum over shards. Heads see all rows
        in every process, so each process has their complete gradient, and the mean keeps it.
        """
        if self.size == 1 or not parts:
            return parts
        widths = [math.prod(value.shape[1:]) for value in parts.values()]
        flat = [v.reshape(len(v), w) for v, w in zip(parts.values(), widths, strict=True)]
        # torch does not type `apply`; it returns what `forward` returns.
        rows = _Gather.apply(torch.cat(flat, dim=1), tuple(counts), self)  # type: ignore[no-untyped-call]
        return {
            name: column.reshape(len(column), *value.shape[1:])
            for (name, value), column in zip(parts.items(), rows.split(widths, dim=1), strict=True)
        }

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Gather a small object of every process, ordered by rank."""
        values = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_rank_0(self, value: Any) -> Any:
        """Send a small object of rank 0 to every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes, up to TIMEOUT: one of them may write files."""
        if self.size > 1:
            dist.barrier(self.control)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the first process of every other machine, then on the
        others: they find the files that an earlier process made, on a shared or a local disk."""
        turn = 0 if self.is_rank_0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(turn, 2):
            self.barrier()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors in place by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def all_reduce_mean(self, gradients: Sequence[Tensor]) -> None:
        """Replace the gradients in place by their means over processes."""
        if self.size == 1:
            return
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()
        torch._foreach_div_(list(gradients), self.size)


SINGLE_PROCESS = Processes()


class AgreedFlags:
    """Flags on which all processes must act at the same step, such as "stop after a signal".

    All processes must call it equally often. The result is that of the previous call, which has
    arrived by then, so that no process waits for it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.pending: tuple[Tensor, Any] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has set it."""
        if self.processes.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(
            values, dist.ReduceOp.MAX, group=self.processes.control, async_op=True
        )
        previous, self.pending = self.pending, (values, work)
        if previous is None:
            return [False] * len(flags)
        previous[1].wait()
        return [bool(flag) for flag in previous[0].tolist()]


def shard_sizes(count: int, size: int) -> list[int]:
    """Split `count` rows over `size` processes as evenly as possible; larger shards come first."""
    return [count // size + (rank < count % size) for rank in range(size)]


def start(device_name: str) -> tuple[Processes, torch.device]:
    """Join the process group if torchrun started this process. Returns the group and the device.

    NCCL sends tensors between GPUs, gloo between CPUs. Raises UserError if this machine has fewer
    GPUs than processes, or if a program other than torchrun has set WORLD_SIZE.
    """
    device = choose_device(device_name)
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return SINGLE_PROCESS, device
    variables = {name: os.environ.get(name, "") for name in TORCHRUN_VARIABLES}
    wrong = [
        f"{name}={value}" for name, value in variables.items() if not value.strip().isdecimal()
    ]
    if wrong:
        raise UserError(
            f"WORLD_SIZE={variables['WORLD_SIZE']} says that this is one of several processes, but "
            f"{' '.join(wrong)} is not a number; start them with torchrun, or unset WORLD_SIZE"
        )
    size, _, local_rank, local_size = map(int, variables.values())
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node {local_size}: this machine has {torch.cuda.device_count()} "
                "GPUs; start at most one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Processes(dist.get_rank(), size, local_rank, local_size, control), device


def finish() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, counts: tuple[int, ...], processes: Processes) -> Tensor:
        ctx.start, ctx.rows, ctx.size = sum(counts[: processes.rank]), len(rows_BD), processes.size
        padded = rows_BD.new_zeros((max(counts), rows_BD.shape[1]))  # collectives need equal shapes
        padded[: ctx.rows] = rows_BD
        shards = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(shards, padded)
        return torch.cat([shard[:count] for shard, count in zip(shards, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.start : ctx.start + ctx.rows] * ctx.size, None, None
