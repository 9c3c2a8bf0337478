"""Noisy correspondence: captions of training samples are exchanged on purpose, to study methods
that can stand wrong captions (RDE; Qin et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datasets.compact import TrainSamples
from datasets.records import Data, TrainSample
from utils.errors import UserError


def exchange_captions(data: Data, rate: float, seed: int) -> Data:
    """The data set in which this fraction of the training samples, chosen at random, have their
    captions permuted among themselves. Identities and images stay.

    `noisy` of the result tells which samples now have a caption of another identity. These are
    fewer than `rate` says, since the permutation may leave a caption in its place or give it to
    another sample of the identity. The result depends only on the number of samples, `rate` and
    `seed`. Raises UserError if fewer than two samples are chosen.
    """
    count, pids = len(data.train), data.train_pids
    number = _number(data, rate)
    if number < 2:
        raise UserError(
            f"--noise_rate {rate}: of {count} training samples it chooses {number}, but two are "
            f"needed to exchange captions; give a larger one, or 0"
        )
    # RandomState, because NumPy promises that its numbers stay the same in later versions.
    random = np.random.RandomState(seed)
    chosen = random.permutation(count)[:number]
    origin = np.arange(count)  # of each sample's new caption
    origin[chosen] = random.permutation(chosen)
    noisy = pids[origin] != pids
    train: Sequence[TrainSample] = data.train
    if isinstance(train, TrainSamples):
        train = train.with_captions(train.captions[i] for i in map(int, origin))
    else:
        captions = [train[i].caption for i in origin.tolist()]
        train = [replace(s, caption=text) for s, text in zip(train, captions, strict=True)]
    return replace(data, train=train, noisy=noisy)


def noise_note(data: Data, rate: float, seed: int) -> str:
    """A line for the log of a training about what `exchange_captions` did to `data`, or ""."""
    if data.noisy is None:
        return ""
    return (
        f"--noise_rate {rate}, --noise_seed {seed}: {_number(data, rate)} of {len(data.train)} "
        f"training samples have exchanged captions, {data.noisy.sum()} of them now one of another "
        "identity"
    )


def _number(data: Data, rate: float) -> int:
    """How many samples are chosen."""
    return round(rate * len(data.train))
