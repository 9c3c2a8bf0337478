"""How much metrics would change with other people and seeds: bootstrap and permutation test.

Captions of the same person are not independent, so identities are resampled, not captions. Each of
the M metrics is a mean over captions; captions without a match (NaN) are left out.

Shapes: Q captions, I identities, M metrics, N resamples, R runs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_identity(values_QM: Tensor, pids_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [I, M] of the values of each identity's captions, and the number [I] of captions."""
    has_match_Q = ~values_QM.isnan().any(dim=1)
    _, identity_Q = pids_Q[has_match_Q].unique(return_inverse=True)
    count = int(identity_Q.max()) + 1
    sums_IM = torch.zeros(count, values_QM.shape[1], dtype=torch.float64)
    sums_IM.index_add_(0, identity_Q, values_QM[has_match_Q].double())
    return sums_IM, identity_Q.bincount(minlength=count).double()


def bootstrap(
    values_QM: Tensor, pids_Q: Tensor, resamples: int, seed: int = 0, level: float = 0.95
) -> Tensor:
    """Lower and upper end [2, M] of the percentile interval of each mean (Efron, 1979).

    Args:
        values_QM: per caption, for example 1 for a hit and 0 for a miss.
        resamples: number of resamples. Each draws I identities with replacement.
        level: fraction of the resamples between the two ends.
    """
    times_NI, sums_IM, count_I, _ = _resample_identities(values_QM, pids_Q, resamples, seed)
    return _ends((times_NI @ sums_IM) / (times_NI @ count_I)[:, None], level)


def bootstrap_difference(
    a_RQM: Tensor, b_RQM: Tensor, pids_Q: Tensor, resamples: int, seed: int = 0, level: float = 0.95
) -> Tensor:
    """Percentile interval [2, M] of the mean of the runs b minus that of the runs a.

    Each resample draws identities, the same for all runs. For each side it also draws n - 1 of the
    n runs (seeds), with replacement: this gives a mean over n seeds its correct variance (Rao and
    Wu, 1988; drawing n of n would halve it for n = 2). So the interval covers other people and
    other seeds of the same two recipes. Few seeds give poor coverage: if seeds vary more than
    people, the interval contains the true difference in about 88 of 100 cases with three runs per
    side, and in about 65 with two. With one run on a side, the interval does not cover other seeds
    of that side.

    Args:
        a_RQM, b_RQM: the runs of each side, evaluated on the same captions. The sides may have
            different numbers of runs.
    """
    runs, queries, metrics = len(a_RQM) + len(b_RQM), *a_RQM.shape[1:]
    values = torch.cat([a_RQM, b_RQM]).transpose(0, 1).reshape(queries, runs * metrics)
    times_NI, sums_IX, count_I, generator = _resample_identities(values, pids_Q, resamples, seed)
    means_NX = (times_NI @ sums_IX) / (times_NI @ count_I)[:, None]
    sides = means_NX.view(resamples, runs, metrics).split([len(a_RQM), len(b_RQM)], dim=1)
    means = []
    for side_NRM in sides:
        count = side_NRM.shape[1]
        picks_NP = torch.randint(count, (resamples, max(1, count - 1)), generator=generator)
        means.append(side_NRM[torch.arange(resamples)[:, None], picks_NP].mean(dim=1))
    return _ends(means[1] - means[0], level)


def permutation_p(values_QM: Tensor, pids_Q: Tensor, flips: int, seed: int = 0) -> Tensor:
    """Two-sided p-values [M] of the means of paired differences, by flipping signs per identity.

    If two runs do not differ, the differences of a person are as likely to have the opposite sign.
    p = (1 + flips at least as extreme) / (1 + flips), so it is never 0. It covers other people, but
    not other seeds: for differences between means over seeds it holds for these seeds only.
    """
    sums_IM, count_I = by_identity(values_QM, pids_Q)
    generator = torch.Generator().manual_seed(seed)
    signs_NI = torch.randint(2, (flips, len(count_I)), generator=generator).double() * 2 - 1
    flipped_NM, observed_M = (signs_NI @ sums_IM).abs(), sums_IM.sum(dim=0).abs()
    # The tolerance counts flips with the same sum, however it is rounded.
    return (1 + (flipped_NM >= observed_M * (1 - 1e-12)).sum(dim=0)) / (1 + flips)


def _resample_identities(
    values_QM: Tensor, pids_Q: Tensor, resamples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """How often each resample has each identity [N, I], `by_identity`'s results, the generator."""
    sums_IM, count_I = by_identity(values_QM, pids_Q)
    generator = torch.Generator().manual_seed(seed)
    count = len(count_I)
    picks_NI = torch.randint(count, (resamples, count), generator=generator)
    times_NI = torch.zeros(resamples, count, dtype=torch.float64)
    times_NI.scatter_add_(1, picks_NI, torch.ones_like(times_NI))
    return times_NI, sums_IM, count_I, generator


def _ends(means_NM: Tensor, level: float) -> Tensor:
    """The ends [2, M] of the central fraction `level` of all resamples."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return means_NM.quantile(ends, dim=0)
