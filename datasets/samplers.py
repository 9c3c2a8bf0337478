"""Samplers: they choose the samples of each batch. A batch is a list of `Key`.

The order of an epoch depends only on the run's seed and the epoch. Each key contains a seed for the
sample's augmentation and masking, which depends only on its place in that order. So batches are the
same for any number of workers and processes, and after a resume, which needs only epoch and step.
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

SPARES = 3  # samples that may replace one whose image is broken


@dataclass(frozen=True)
class Key:
    """The index of a sample in an epoch, for `TrainDataset`."""

    index: int
    seed: int
    spares: tuple[int, ...] = ()  # indices of the next samples of the epoch


class EpochSampler(Sampler[list[Key]]):
    """The batches of an epoch, or one process's shards of them. Subclasses define the order.

    All processes compute the same order, and each takes its shard of every batch. The shards of a
    batch, one after the other, are the batch of a single process. If the last batch is so small
    that a process's shard is empty, that process gets the batch's first sample, because it must
    encode something.

    Args:
        batch_size: samples of all processes together.
        seed: the only source of randomness, together with the epoch.
    """

    def __init__(self, batch_size: int, seed: int, processes: Processes = SINGLE_PROCESS) -> None:
        self.batch_size, self.seed, self.processes = batch_size, seed, processes
        self.set_epoch(0)

    @property
    def count(self) -> int:
        """Number of samples in an epoch."""
        raise NotImplementedError

    def order(self, generator: torch.Generator) -> Sequence[int] | np.ndarray:
        """Sample indices of an epoch, `count` of them. `generator` is seeded for the epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Choose the next epoch (from 0), and how many of its batches to skip."""
        self.epoch, self.first = epoch, step
        # Of the complete epoch, as soon as iteration begins: sample indices and seeds.
        self._order = self._seeds = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[list[Key]]:
        seed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        self._order = np.asarray(self.order(generator), np.int64)
        self._seeds = torch.randint(2**62, (len(self._order),), generator=generator).numpy()
        for step in range(self.first, len(self)):
            batch, counts = self.batch(step), self.counts(step)
            start = sum(counts[: self.processes.rank])
            yield batch[start : start + counts[self.processes.rank]] or batch[:1]

    def batch(self, step: int) -> list[Key]:
        """The complete batch, of all processes, of a step (from 0) of the current epoch."""
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, len(self._order))
        places = np.arange(start, stop)[:, None] + np.arange(1 + SPARES)
        indices = self._order.take(places, mode="wrap").tolist()  # the epoch begins again
        seeds = self._seeds[start:stop].tolist()
        return [
            Key(index, seed, tuple(spares))
            for (index, *spares), seed in zip(indices, seeds, strict=True)
        ]

    def counts(self, step: int) -> list[int]:
        """Number of samples of each process in a step (from 0)."""
        rest = self.count - step * self.batch_size
        return shard_sizes(min(rest, self.batch_size), self.processes.size)

    def describe(self) -> str:
        """What must not change when a run resumes in the middle of an epoch."""
        return f"{self.count} samples in batches of {self.batch_size} ({type(self).__name__})"


class RandomSampler(EpochSampler):
    """Every sample once per epoch, in random order.

    Args:
        count: number of samples.
    """

    def __init__(self, count: int, *args: Any) -> None:
        super().__init__(*args)
        self._count = count

    @property
    def count(self) -> int:
        return self._count

    def order(self, generator: torch.Generator) -> np.ndarray:
        return torch.randperm(self._count, generator=generator).numpy()


class IdentitySampler(EpochSampler):
    """Batches of `batch_size / num_instance` identities with `num_instance` samples each.

    The samples of each identity are shuffled and cut into groups of `num_instance` samples. If the
    last group is too small, random samples of the identity fill it. A batch takes one group from
    each of several different identities. The epoch ends when too few identities have groups left
    (Hermans et al., 2017).

    Example: num_instance 2, batch_size 4. Identity A has the samples 1, 2, 3, 4, 5, identity B has
    6, 7 and identity C has 8. Possible groups: A [3, 1] [5, 2] [4, 1], B [7, 6], C [8, 8]. Each
    batch has two identities, such as A and C, then A and B. The third group of A is not used.

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
        # A batch takes one group per identity, so some groups of large identities may not be used.
        self._count = self._count_batches(groups) * self.batch_size

    @property
    def count(self) -> int:
        return self._count

    def describe(self) -> str:
        return f"{super().describe()}, {self.num_instance} of an identity"

    def order(self, generator: torch.Generator) -> list[int]:
        """Each batch takes the identities that have the most groups left, with random choice among
        equals. No other choice uses more groups, and the number of batches is known beforehand.

        The time is linear in the number of samples: identities are kept in lists by the number of
        groups that they have left, and all random numbers are drawn at once.
        """
        groups, random_numbers = self._make_groups(generator)
        pids_with: dict[int, list[int]] = {}  # by number of groups left: identities
        for pid, groups_of_pid in groups.items():
            pids_with.setdefault(len(groups_of_pid), []).append(pid)
        # A heap of the keys of `pids_with`, negative, because heapq gives the smallest first.
        negative_counts = [-count for count in pids_with]
        heapq.heapify(negative_counts)
        order: list[int] = []
        for _ in range(len(self)):
            # The identities of this batch, each with the number of groups that it has left. They
            # return to `pids_with` only after the batch, so no identity comes twice in it.
            used: list[tuple[int, int]] = []
            while len(used) < self.per_batch:
                most = -negative_counts[0]
                candidates = pids_with[most]
                chosen = next(random_numbers) % len(candidates)
                # Remove the chosen one in constant time: the last one takes its place.
                pid, candidates[chosen] = candidates[chosen], candidates[-1]
                candidates.pop()
                if not candidates:
                    del pids_with[-heapq.heappop(negative_counts)]
                order += groups[pid].pop()
                used.append((most - 1, pid))
            for left, pid in used:
                if left and left not in pids_with:
                    pids_with[left] = []
                    heapq.heappush(negative_counts, -left)
                if left:
                    pids_with[left].append(pid)
        return order

    def _count_batches(self, groups: list[int]) -> int:
        """How many batches the groups of the identities are enough for: the largest b with
        sum_i min(groups_i, b) >= b * per_batch, because b batches use at most b groups of an
        identity."""
        low, high = 0, sum(groups) // self.per_batch
        while low < high:
            middle = (low + high + 1) // 2
            if sum(min(g, middle) for g in groups) >= middle * self.per_batch:
                low = middle
            else:
                high = middle - 1
        return low

    def _make_groups(
        self, generator: torch.Generator
    ) -> tuple[dict[int, list[list[int]]], Iterator[int]]:
        """The groups of each identity, and a random number below 2^62 for each group of the epoch.
        Remainders of such numbers are close enough to uniform."""
        size = self.num_instance
        shuffled: dict[int, list[int]] = {pid: [] for pid in self.by_pid}
        for index in torch.randperm(len(self.pids), generator=generator).tolist():
            shuffled[self.pids[index]].append(index)
        missing = sum(-len(indices) % size for indices in self.by_pid.values())
        count = missing + self.count // size
        random_numbers = iter(torch.randint(2**62, (count,), generator=generator).tolist())
        groups = {}
        for pid, indices in shuffled.items():
            choices = self.by_pid[pid]
            for _ in range(-len(indices) % size):  # fill the last group
                indices.append(choices[next(random_numbers) % len(choices)])
            groups[pid] = [indices[i : i + size] for i in range(0, len(indices), size)]
        return groups, random_numbers


def evaluation_batches(
    count: int, batch_size: int, processes: Processes = SINGLE_PROCESS
) -> tuple[list[list[int]], list[int]]:
    """This process's batches of the positions 0 ... count - 1, and how many positions each process
    has.

    Each process gets complete batches, one after the other. So the batches are those of a single
    process, and the features are equal to the last bit.
    """
    batches = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    ends = [0]
    for size in shard_sizes(len(batches), processes.size):
        ends.append(ends[-1] + size)
    shards = [batches[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return shards[processes.rank], [sum(map(len, shard)) for shard in shards]
