"""Which samples make up an epoch. Samplers yield batches, lists of `Key`.

The seed in a key makes a sample's augmentation and masking a function of run, epoch and position
alone: the same for any number of workers and processes, and the same after a resume.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from utils.distributed import SINGLE_PROCESS, World, shares

SPARES = 3  # samples that may stand in for one whose image is broken


class Key(NamedTuple):
    """What a training data set is indexed with."""

    index: int
    seed: int
    spares: tuple[int, ...] = ()  # the next samples of the epoch


class EpochSampler(Sampler[list[Key]]):
    """Batches of an epoch, or one process's shares of them; a subclass says in which order.

    Every process draws the same epoch, and takes its rows out of each batch: one after the other,
    the shares of a batch are the batch that a single process would see. A process whose share of a
    last, small batch is empty gets the batch's first sample, so that it has something to encode.

    Args:
        batch_size: samples of all processes together.
        generator: the only source of randomness.
    """

    def __init__(
        self, batch_size: int, generator: torch.Generator, world: World = SINGLE_PROCESS
    ) -> None:
        self.batch_size, self.generator, self.world = batch_size, generator, world
        self.first = 0  # batches of the next epoch that are left out: they were done before
        self.step = 0  # batches that are done of it
        self.epoch: list[Key] = []  # the epoch that is under way
        self.begun = generator.get_state()  # before that epoch, or the next, is drawn

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

    def order(self) -> list[int]:
        """Indices of a new epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        self.begun = self.generator.get_state()
        first, self.first = self.first, 0
        order = self.order()
        seeds = torch.randint(2**62, (len(order),), generator=self.generator).tolist()
        again = order + order[:SPARES]
        self.epoch = [
            Key(index, seed, tuple(again[i + 1 : i + 1 + SPARES]))
            for i, (index, seed) in enumerate(zip(order, seeds, strict=True))
        ]
        for step in range(first, len(self)):
            batch, counts = self.batch(step), self.counts(step)
            start = sum(counts[: self.world.rank])
            yield batch[start : start + counts[self.world.rank]] or batch[:1]

    def batch(self, step: int) -> list[Key]:
        """The whole batch of a step (from 0) of the epoch under way."""
        return self.epoch[step * self.batch_size : (step + 1) * self.batch_size]

    def counts(self, step: int) -> list[int]:
        """Samples of each process in a step."""
        rest = self.count - step * self.batch_size
        return shares(min(rest, self.batch_size), self.world.size)

    def end_epoch(self) -> None:
        """The epoch that was under way is done. (Loaders draw batches ahead, so the last one that
        was drawn does not tell.)"""
        self.begun, self.step = self.generator.get_state(), 0

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands: `step`, which its user counts, and what it was drawn from."""
        return {"generator": self.begun, "step": self.step, "epoch": self._describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume there: the next epoch is the one that was under way, without its first batches.

        Raises ValueError if that epoch was cut into other batches.
        """
        now = self._describe()
        if state["step"] and state["epoch"] != now:
            raise ValueError(
                f"it was saved within an epoch of {state['epoch']}, and this one is of {now}; end "
                "the epoch as it was begun, or go on from a save at an epoch's end"
            )
        self.generator.set_state(state["generator"])
        self.begun, self.first = self.generator.get_state(), state["step"]
        self.step = self.first

    def _describe(self) -> str:
        """What a saved epoch must have in common with this one."""
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

    def order(self) -> list[int]:
        return torch.randperm(self._count, generator=self.generator).tolist()


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

    def _describe(self) -> str:
        # Another text than that of earlier versions, whose epochs had another order.
        return f"{super()._describe()}, {self.num_instance} of an identity in groups"

    def order(self) -> list[int]:
        """In time that grows with the samples alone: all numbers are drawn at once, and identities
        lie in piles by the number of groups that they have left."""
        groups, draws = self._deal()
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

    def _deal(self) -> tuple[dict[int, list[list[int]]], Iterator[int]]:
        """The groups of every identity, and a random number below 2^62 for each that is chosen."""
        size, shuffled = self.num_instance, {pid: [] for pid in self.by_pid}
        for index in torch.randperm(len(self.pids), generator=self.generator).tolist():
            shuffled[self.pids[index]].append(index)
        short = sum(-len(indices) % size for indices in self.by_pid.values())
        count = short + self.count // size
        draws = iter(torch.randint(2**62, (count,), generator=self.generator).tolist())
        groups = {}
        for pid, found in shuffled.items():
            own = self.by_pid[pid]
            found += [own[next(draws) % len(own)] for _ in range(-len(found) % size)]
            groups[pid] = [found[i : i + size] for i in range(0, len(found), size)]
        return groups, draws


def evaluation_batches(
    count: int, batch_size: int, world: World = SINGLE_PROCESS
) -> tuple[list[list[int]], list[int]]:
    """This process's batches of a list's positions, and how many rows each process has.

    Processes share whole batches, one run of them each: so batches, and with them features to the
    last bit, are those of a single process.
    """
    batches = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    ends = [0]
    for share in shares(len(batches), world.size):
        ends.append(ends[-1] + share)
    runs = [batches[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return runs[world.rank], [sum(map(len, run)) for run in runs]
