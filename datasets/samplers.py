"""Which samples make up an epoch. Samplers yield batches, lists of `Key`.

An epoch's order is a function of the run's seed and the epoch's number, and the seed in a key makes
a sample's augmentation and masking one of its place there: the same for any number of workers and
processes, and the same after a resume, which has nothing but epoch and step to remember.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.distributed import SINGLE_PROCESS, Processes, shard_sizes

SPARES = 3  # samples that may stand in for one whose image is broken


@dataclass(frozen=True)
class Key:
    """What a training data set is indexed with."""

    index: int
    seed: int
    spares: tuple[int, ...] = ()  # the next samples of the epoch


class EpochSampler(Sampler[list[Key]]):
    """Batches of an epoch, or one process's shards of them; a subclass says in which order.

    Every process orders the same epoch, and takes its rows out of each batch: one after the other,
    the shards of a batch are the batch that a single process would see. A process whose shard of a
    last, small batch is empty gets the batch's first sample, so that it has something to encode.

    Args:
        batch_size: samples of all processes together.
        seed: with the number of the epoch the only source of randomness.
    """

    def __init__(self, batch_size: int, seed: int, processes: Processes = SINGLE_PROCESS) -> None:
        self.batch_size, self.seed, self.processes = batch_size, seed, processes
        self.set_epoch(0)

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

    def order(self, generator: torch.Generator) -> list[int]:
        """Indices of a new epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Say which epoch (from 0) comes next, and how many of its batches are done already."""
        self.epoch, self.first = epoch, step
        self.keys: list[Key] = []  # of the whole epoch, once it has begun

    def __iter__(self) -> Iterator[list[Key]]:
        seed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        order = self.order(generator)
        seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
        again = order + order[:SPARES]
        self.keys = [
            Key(index, seed, tuple(again[i + 1 : i + 1 + SPARES]))
            for i, (index, seed) in enumerate(zip(order, seeds, strict=True))
        ]
        for step in range(self.first, len(self)):
            batch, counts = self.batch(step), self.counts(step)
            start = sum(counts[: self.processes.rank])
            yield batch[start : start + counts[self.processes.rank]] or batch[:1]

    def batch(self, step: int) -> list[Key]:
        """The whole batch of a step (from 0) of the epoch that has begun."""
        return self.keys[step * self.batch_size : (step + 1) * self.batch_size]

    def counts(self, step: int) -> list[int]:
        """Samples of each process in a step."""
        rest = self.count - step * self.batch_size
        return shard_sizes(min(rest, self.batch_size), self.processes.size)

    def describe(self) -> str:
        """What an epoch that is resumed must have in common with its beginning."""
        return f"{self.count} samples in batches of {self.batch_size} ({type(self).__name__})"


class RandomSampler(EpochSampler):
    """Every sample once per epoch, in random order.

    Args:
        count: samples.
    """

    def __init__(self, count: int, *args: Any) -> None:
        super().__init__(*args)
        self._count = count

    @property
    def count(self) -> int:
        return self._count

    def order(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self._count, generator=generator).tolist()


class IdentitySampler(EpochSampler):
    """Batches of `batch_size / num_instance` identities with `num_instance` samples each.

    Every identity's samples are shuffled and dealt in groups of `num_instance`; a group that
    comes out short is filled by drawing again from the identity. Batches take one group from each
    of so many random identities until too few identities are left (Hermans et al., 2017).

    Args:
        pids: identity of each sample.
    """

    def __init__(self, pids: Sequence[int], num_instance: int, *args: Any) -> None:
        super().__init__(*args)
        if self.batch_size % num_instance:
            raise ValueError("batch_size must be a multiple of num_instance")
        self.per_batch, self.num_instance = self.batch_size // num_instance, num_instance
        self.pids = list(pids)
        self.by_pid: dict[int, list[int]] = {}
        for index, pid in enumerate(self.pids):
            self.by_pid.setdefault(pid, []).append(index)
        groups = [-(-len(indices) // num_instance) for indices in self.by_pid.values()]
        # A batch needs distinct identities, so an identity with many groups may not use them all.
        self._count = self._count_batches(groups) * self.batch_size

    @property
    def count(self) -> int:
        return self._count

    def describe(self) -> str:
        return f"{super().describe()}, {self.num_instance} of an identity"

    def order(self, generator: torch.Generator) -> list[int]:
        """In time that grows with the samples alone: all numbers are drawn at once, and identities
        lie in piles by the number of groups that they have left."""
        groups, draws = self._deal(generator)
        piles: dict[int, list[int]] = {}
        for pid, found in groups.items():
            piles.setdefault(len(found), []).append(pid)
        heights = [-height for height in piles]  # of piles that are not empty, highest first
        heapq.heapify(heights)
        order: list[int] = []
        for _ in range(len(self)):
            # The identities with most groups left go first, ties in random order: this uses as
            # many groups as any order can, and makes the number of batches known beforehand.
            lower: list[tuple[int, int]] = []
            while len(lower) < self.per_batch:
                height = -heights[0]
                pile = piles[height]
                chosen = next(draws) % len(pile)
                pid, pile[chosen] = pile[chosen], pile[-1]
                pile.pop()
                if not pile:
                    del piles[-heapq.heappop(heights)]
                order += groups[pid].pop()
                lower.append((height - 1, pid))
            for height, pid in lower:
                if height and height not in piles:
                    piles[height] = []
                    heapq.heappush(heights, -height)
                if height:
                    piles[height].append(pid)
        return order

    def _count_batches(self, groups: list[int]) -> int:
        """Most batches b with sum_i min(groups_i, b) >= b * per_batch: an identity once a batch."""
        low, high = 0, sum(groups) // self.per_batch
        while low < high:
            middle = (low + high + 1) // 2
            if sum(min(g, middle) for g in groups) >= middle * self.per_batch:
                low = middle
            else:
                high = middle - 1
        return low

    def _deal(self, generator: torch.Generator) -> tuple[dict[int, list[list[int]]], Iterator[int]]:
        """The groups of every identity, and a random number below 2^62 for each that is chosen."""
        size = self.num_instance
        shuffled: dict[int, list[int]] = {pid: [] for pid in self.by_pid}
        for index in torch.randperm(len(self.pids), generator=generator).tolist():
            shuffled[self.pids[index]].append(index)
        short = sum(-len(indices) % size for indices in self.by_pid.values())
        count = short + self.count // size
        draws = iter(torch.randint(2**62, (count,), generator=generator).tolist())
        groups = {}
        for pid, found in shuffled.items():
            own = self.by_pid[pid]
            found += [own[next(draws) % len(own)] for _ in range(-len(found) % size)]
            groups[pid] = [found[i : i + size] for i in range(0, len(found), size)]
        return groups, draws


def evaluation_batches(
    count: int, batch_size: int, processes: Processes = SINGLE_PROCESS
) -> tuple[list[list[int]], list[int]]:
    """This process's batches of a list's positions, and how many rows each process has.

    Each process gets a run of whole batches: so batches, and with them features to the
    last bit, are those of a single process.
    """
    batches = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    ends = [0]
    for share in shard_sizes(len(batches), processes.size):
        ends.append(ends[-1] + share)
    runs = [batches[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return runs[processes.rank], [sum(map(len, run)) for run in runs]
