"""Which samples make up an epoch. Samplers yield (index, seed) pairs.

The seed makes a sample's augmentation and masking a function of run, epoch and position alone: the
same for any number of workers, and the same after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class Key(NamedTuple):
    """What a training data set is indexed with."""

    index: int
    seed: int


class RandomSampler(Sampler[Key]):
    """Every sample once per epoch, in random order.

    Args:
        count: samples.
        generator: the only source of randomness; its state belongs in a checkpoint.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Key]:
        order = torch.randperm(self.count, generator=self.generator).tolist()
        return _with_seeds(order, self.generator)


class IdentitySampler(Sampler[Key]):
    """Batches of `batch_size / num_instance` identities with `num_instance` samples each.

    Every identity's samples are shuffled and dealt in groups of `num_instance`; a group that
    comes out short is filled by drawing again from the identity. Batches take one group from each
    of so many random identities until too few identities are left (Hermans et al., 2017).

    Args:
        pids: identity of each sample.
    """

    def __init__(
        self, pids: Sequence[int], batch_size: int, num_instance: int, generator: torch.Generator
    ) -> None:
        if batch_size % num_instance:
            raise ValueError("batch_size must be a multiple of num_instance")
        self.per_batch, self.num_instance = batch_size // num_instance, num_instance
        self.generator = generator
        self.by_pid: dict[int, list[int]] = {}
        for index, pid in enumerate(pids):
            self.by_pid.setdefault(pid, []).append(index)
        groups = [-(-len(indices) // num_instance) for indices in self.by_pid.values()]
        # A batch needs distinct identities, so an identity with many groups may not use them all.
        self.length = self._count_batches(groups) * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        groups = {pid: self._deal(indices) for pid, indices in self.by_pid.items()}
        order: list[int] = []
        for _ in range(self.length // (self.per_batch * self.num_instance)):
            # The identities with most groups left go first, ties in random order: this uses as
            # many groups as any order can, and makes the number of batches known beforehand.
            pids = list(groups)
            shuffled = [pids[i] for i in self._permutation(len(pids))]
            chosen = sorted(shuffled, key=lambda pid: -len(groups[pid]))[: self.per_batch]
            for pid in chosen:
                order += groups[pid].pop()
                if not groups[pid]:
                    del groups[pid]
        return _with_seeds(order, self.generator)

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

    def _deal(self, indices: list[int]) -> list[list[int]]:
        shuffled = [indices[i] for i in self._permutation(len(indices))]
        short = -len(shuffled) % self.num_instance
        draws = torch.randint(len(indices), (short,), generator=self.generator).tolist()
        shuffled += [indices[i] for i in draws]
        return [
            shuffled[i : i + self.num_instance] for i in range(0, len(shuffled), self.num_instance)
        ]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()


def _with_seeds(order: list[int], generator: torch.Generator) -> Iterator[Key]:
    seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
    return map(Key, order, seeds)
