"""How far a figure would move on other people, and with other seeds: bootstrap and permutation.

The captions of one person stand or fall together, so identities are drawn, not captions. A figure
is a mean over captions, M figures side by side; captions without a match (NaN) are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_identity(values_QM: Tensor, pids_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [I, M] of the captions' values and their number [I], for each identity."""
    kept = ~values_QM.isnan().any(dim=1)
    _, identity_Q = pids_Q[kept].unique(return_inverse=True)
    count = int(identity_Q.max()) + 1
    sums_IM = torch.zeros(count, values_QM.shape[1], dtype=torch.float64)
    sums_IM.index_add_(0, identity_Q, values_QM[kept].double())
    return sums_IM, identity_Q.bincount(minlength=count).double()


def bootstrap(
    values_QM: Tensor, pids_Q: Tensor, draws: int, seed: int = 0, level: float = 0.95
) -> Tensor:
    """Lower and upper end [2, M] of the percentile interval of each mean (Efron, 1979).

    Args:
        values_QM: per caption, for example 1 for a hit and 0 for a miss.
        draws: how often as many identities are drawn, with replacement, as there are.
        level: share of the draws between the ends.
    """
    times_NI, sums_IM, number_I, _ = _draw_identities(values_QM, pids_Q, draws, seed)
    return _ends((times_NI @ sums_IM) / (times_NI @ number_I)[:, None], level)


def bootstrap_difference(
    a_RQM: Tensor, b_RQM: Tensor, pids_Q: Tensor, draws: int, seed: int = 0, level: float = 0.95
) -> Tensor:
    """Percentile interval [2, M] of the mean of the runs b minus that of the runs a.

    In every draw the identities are drawn anew, the same for all runs, and the runs (seeds) of each
    side: n - 1 of its n, with replacement, which gives a mean over n seeds its right variance (Rao
    and Wu, 1988; n of n would halve that of two). So the interval covers other people and other
    seeds of the same two recipes together. Of few seeds little is known: with three of each side,
    and seeds that matter more than people, the interval holds the truth in some 88 of 100 cases,
    with two in some 65. A side of one run has no spread over seeds: the interval then says nothing
    about other seeds of it.

    Args:
        a_RQM, b_RQM: each side's runs, evaluated on the same captions. The sides may have
            different numbers of runs.
    """
    runs, queries, figures = len(a_RQM) + len(b_RQM), *a_RQM.shape[1:]
    values = torch.cat([a_RQM, b_RQM]).transpose(0, 1).reshape(queries, runs * figures)
    times_NI, sums_IX, number_I, generator = _draw_identities(values, pids_Q, draws, seed)
    means_NX = (times_NI @ sums_IX) / (times_NI @ number_I)[:, None]
    sides = means_NX.view(draws, runs, figures).split([len(a_RQM), len(b_RQM)], dim=1)
    drawn = []
    for side_NRM in sides:
        count = side_NRM.shape[1]
        picks_NP = torch.randint(count, (draws, max(1, count - 1)), generator=generator)
        drawn.append(side_NRM[torch.arange(draws)[:, None], picks_NP].mean(dim=1))
    return _ends(drawn[1] - drawn[0], level)


def _draw_identities(
    values_QM: Tensor, pids_Q: Tensor, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """How often each draw has each identity [N, I], `by_identity`'s results, the generator."""
    sums_IM, number_I = by_identity(values_QM, pids_Q)
    generator = torch.Generator().manual_seed(seed)
    count = len(number_I)
    picks_NI = torch.randint(count, (draws, count), generator=generator)
    times_NI = torch.zeros(draws, count, dtype=torch.float64)
    times_NI.scatter_add_(1, picks_NI, torch.ones_like(times_NI))
    return times_NI, sums_IM, number_I, generator


def _ends(means_NM: Tensor, level: float) -> Tensor:
    """Ends [2, M] of the middle `level` of all draws."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return means_NM.quantile(ends, dim=0)


def permutation_p(values_QM: Tensor, pids_Q: Tensor, draws: int, seed: int = 0) -> Tensor:
    """Two-sided p-values [M] of the means of paired differences, by flipping signs per identity.

    Under the hypothesis that two runs are alike, a person's differences could as well have had the
    other sign. p = (1 + flips at least as extreme) / (1 + draws), so it is never 0. It covers other
    people alone: of differences between means over seeds it is the p-value for just these seeds.
    """
    sums_IM, number_I = by_identity(values_QM, pids_Q)
    generator = torch.Generator().manual_seed(seed)
    signs_NI = torch.randint(2, (draws, len(number_I)), generator=generator).double() * 2 - 1
    flipped_NM, seen_M = (signs_NI @ sums_IM).abs(), sums_IM.sum(dim=0).abs()
    # A hair below, so that a flip that gives the same sum counts whatever its rounding.
    return (1 + (flipped_NM >= seen_M * (1 - 1e-12)).sum(dim=0)) / (1 + draws)
