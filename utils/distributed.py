"""Several processes train one model, each on its shard of every batch; torchrun starts them.

    torchrun --nproc_per_node 4 train.py ...

`--batch_size` is that of all processes together, and the losses are those of the whole batch: every
process encodes its shard, the shards are gathered, and every process computes the same losses of
all of them. Gradients flow back through `Processes.all_gather` to the own shard.
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

# How long a process waits for the others outside of a step: the first may resize 100,000 images.
PATIENCE = timedelta(hours=6)
# What torchrun tells each process that it starts, in numbers.
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among all of a training. The defaults are those of a single process.

    What decides whether a collective is called must be the same everywhere, so it comes from
    `from_rank_0` or from `AgreedFlags`, never from a process's own arithmetic or clock.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # this process among those on this machine
    local_size: int = 1
    control: Any = None  # a gloo group for small things that no device should wait for

    @property
    def is_rank_0(self) -> bool:
        """Whether this process writes files and the log."""
        return self.rank == 0

    def all_gather(self, parts: dict[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
        """Rows of all processes, in their order, for several tensors by one collective.

        Args:
            parts: tensors [n, ...] of one dtype, n = counts[rank].
            counts: rows of each process.

        A gradient that arrives at the result goes to the own rows times `size`: with the mean that
        DistributedDataParallel takes over processes, encoders get the sum over shards, and heads,
        which every process applies to all rows, the gradient that each has computed whole.
        """
        if self.size == 1:
            return parts
        widths = [math.prod(value.shape[1:]) for value in parts.values()]
        flat = [v.reshape(len(v), w) for v, w in zip(parts.values(), widths, strict=True)]
        # torch leaves `apply` untyped; it gives what `forward` gives.
        rows = _Gather.apply(torch.cat(flat, dim=1), tuple(counts), self)  # type: ignore[no-untyped-call]
        return {
            name: column.reshape(len(column), *value.shape[1:])
            for (name, value), column in zip(parts.items(), rows.split(widths, dim=1), strict=True)
        }

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every process's small object, in their order, at every process."""
        found = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(found, value, group=self.control)
        return found

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's small object at every process."""
        return self.all_gather_objects(value)[0]

    def barrier(self) -> None:
        """Until all processes are here, however long one of them writes."""
        if self.size > 1:
            dist.barrier(self.control)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """What is inside runs at rank 0, then at the first process of every other machine, then at
        all others: they find what was made, be it on a shared disk or on each machine's own."""
        turn = 0 if self.is_rank_0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(turn, 2):
            self.barrier()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def all_reduce_mean(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over processes."""
        if self.size == 1:
            return
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()
        torch._foreach_div_(list(gradients), self.size)


SINGLE_PROCESS = Processes()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, counts: tuple[int, ...], processes: Processes) -> Tensor:
        ctx.start, ctx.own, ctx.size = sum(counts[: processes.rank]), len(rows_BD), processes.size
        padded = rows_BD.new_zeros((max(counts), rows_BD.shape[1]))  # collectives want one shape
        padded[: ctx.own] = rows_BD
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.start : ctx.start + ctx.own] * ctx.size, None, None


class AgreedFlags:
    """Flags on which all processes must act at the same step, such as "a signal came: stop".

    Every process calls as often as the others. The answer is that of the call before: so it has
    arrived already, and nobody waits for it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.pending: tuple[Tensor, Any] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has raised it."""
        if self.processes.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(
            votes, dist.ReduceOp.MAX, group=self.processes.control, async_op=True
        )
        before, self.pending = self.pending, (votes, work)
        if before is None:
            return [False] * len(flags)
        before[1].wait()
        return [bool(flag) for flag in before[0].tolist()]


def shard_sizes(count: int, size: int) -> list[int]:
    """Rows of each of `size` processes, as even as can be, the first ones having one more."""
    return [count // size + (rank < count % size) for rank in range(size)]


def start(device_name: str) -> tuple[Processes, torch.device]:
    """Join the processes that torchrun started, if it did: this process's place and device.

    NCCL carries tensors between GPUs, gloo between CPUs. Raises UserError if this machine has fewer
    GPUs than processes, or if something else than torchrun speaks of several.
    """
    device = choose_device(device_name)
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return SINGLE_PROCESS, device
    found = {name: os.environ.get(name, "") for name in TORCHRUN}
    wrong = [f"{name}={value}" for name, value in found.items() if not value.strip().isdecimal()]
    if wrong:
        raise UserError(
            f"WORLD_SIZE={found['WORLD_SIZE']} says that this is one of several processes, but "
            f"{' '.join(wrong)} is no number: start them with torchrun, or unset WORLD_SIZE"
        )
    size, _, local_rank, local_size = map(int, found.values())
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node {local_size}: this machine has {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), size, local_rank, local_size, control), device


def finish() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
