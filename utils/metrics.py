"""Retrieval metrics: R@k, mAP and mINP, exact, without a loop over queries.

Shapes: Q queries, G gallery items, M the most matches that any query of a chunk has.

What is counted
- A match is a gallery item of the query's identity; its rank counts from 1.
- Ties: similarities within TIE of each other count as equal, and of equals the matches are ranked
  last. So a picture that is there twice has one rank wherever it stands, and a model that gives
  every item the same score gets the worst metrics. (Without TIE they would not: kernels round a
  row's last bits by its position in a batch.)
- A query whose identity the gallery lacks has no rank; it is left out of every mean and counted
  in `Retrieval.unmatched`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.devices import at_least_float32
from utils.errors import UserError

CHUNK_BYTES = 256 * 2**20  # similarities that are held at a time
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")  # in this order everywhere
TIE = 1e-6  # some ten times what float32 rounds a cosine by, and far below what separates people
COUNTED = 64  # matches per query up to which counting is faster than sorting


@dataclass(frozen=True)
class Retrieval:
    """Means over queries."""

    metrics: dict[str, float]  # those of METRICS, in percent
    queries: int  # queries with at least one match
    unmatched: int  # queries without any
    gallery: int

    def results(self) -> dict[str, float]:
        """All of it by name, as test_results.json has it."""
        counts = {"queries": self.queries, "unmatched": self.unmatched, "gallery": self.gallery}
        return {**self.metrics, **counts}


@dataclass(frozen=True)
class Ranked:
    """What a ranking gave each query: `query_metrics`' rows [Q, 3], identities [Q], gallery."""

    rows_Q3: Tensor
    pids_Q: Tensor
    gallery: int

    def summary(self) -> Retrieval:
        """Means over the queries with a match. Raises UserError if there is none."""
        return summarize(self.rows_Q3, self.gallery)

    def percentages(self) -> Tensor:
        """R@1, R@5, R@10, AP and INP of each query in percent, [Q, 5]; NaN without a match."""
        first, ap, inp = self.rows_Q3.unbind(1)
        hits = [torch.where(first.isnan(), torch.nan, (first <= k).double()) for k in (1, 5, 10)]
        return 100 * torch.stack([*hits, ap, inp], dim=1)


def rank(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_pids_Q: Tensor,
    gallery_pids_G: Tensor,
    chunk: int | None = None,
) -> Ranked:
    """Rank the gallery for every query by cosine similarity, on the features' device.

    Features need no normalisation. Queries go `chunk` at a time; left out, so many that their
    similarities fill CHUNK_BYTES, which bounds the memory at any size of the gallery. Raises
    UserError for features that are not finite, and ValueError for shapes that do not fit.
    """
    for name, features, pids in (
        ("query", query_QD, query_pids_Q),
        ("gallery", gallery_GD, gallery_pids_G),
    ):
        if features.dim() != 2 or pids.shape != features.shape[:1]:
            raise ValueError(
                f"{name}: features {list(features.shape)} and identities {list(pids.shape)}; "
                "expected [N, D] and [N]"
            )
    for name, features in (("query", query_QD), ("gallery", gallery_GD)):
        if not torch.isfinite(features).all():
            raise UserError(
                f"the {name} features are not finite: the model has diverged; "
                "try a lower --lr, or --grad_clip 1"
            )
    query_QD = torch.nn.functional.normalize(at_least_float32(query_QD), dim=-1)
    gallery_GD = torch.nn.functional.normalize(at_least_float32(gallery_GD), dim=-1)
    chunk = chunk or max(1, CHUNK_BYTES // (4 * len(gallery_GD)))
    rows = [
        query_metrics(
            query_QD[i : i + chunk] @ gallery_GD.T, query_pids_Q[i : i + chunk], gallery_pids_G
        )
        for i in range(0, len(query_QD), chunk)
    ]
    return Ranked(torch.cat(rows), query_pids_Q.cpu(), len(gallery_GD))


def retrieval(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_pids_Q: Tensor,
    gallery_pids_G: Tensor,
    chunk: int | None = None,
) -> Retrieval:
    """`rank`, then the means. Raises UserError where no query has a match."""
    return rank(query_QD, gallery_GD, query_pids_Q, gallery_pids_G, chunk).summary()


def query_metrics(similarity_QG: Tensor, query_pids_Q: Tensor, gallery_pids_G: Tensor) -> Tensor:
    """First match's rank, average precision and inverse negative penalty of each query.

    Returns [Q, 3] float64: rank of the first match (counted from 1), AP in [0, 1], INP in [0, 1];
    a row of NaN where the gallery has no match. AP is the mean over matches of precision at their
    rank; INP is the number of matches divided by the rank of the last one (Ye et al., TPAMI 2021).
    """
    # Matches are found among sorted identities: comparing all pairs would cost as much as ranking.
    order_G = gallery_pids_G.argsort()
    sorted_G = gallery_pids_G[order_G]
    start_Q = torch.searchsorted(sorted_G, query_pids_Q)
    count_Q = torch.searchsorted(sorted_G, query_pids_Q, right=True) - start_Q
    most = int(count_Q.max()) if count_Q.numel() else 0
    if most == 0:
        return torch.full((len(query_pids_Q), 3), torch.nan, dtype=torch.float64)
    # Similarities of a query's matches, best first; -inf fills the columns of those with fewer.
    row_X = torch.arange(len(count_Q), device=count_Q.device).repeat_interleave(count_Q)
    nth_X = torch.arange(len(row_X), device=row_X.device) - (count_Q.cumsum(0) - count_Q)[row_X]
    match_QM = similarity_QG.new_full((len(count_Q), most), -torch.inf)
    match_QM[row_X, nth_X] = similarity_QG[row_X, order_G[start_Q[row_X] + nth_X]]
    match_QM = match_QM.sort(dim=1, descending=True).values
    tied_QM = match_QM - TIE
    not_below_QM = _not_below(similarity_QG, tied_QM)
    matches_not_below_QM = most - torch.searchsorted(match_QM.flip(1).contiguous(), tied_QM)
    nth_M = torch.arange(1, most + 1, device=match_QM.device)
    rank_QM = (not_below_QM - matches_not_below_QM + nth_M).double()
    real_QM = nth_M[None, :] <= count_Q[:, None]
    average_precision_Q = (nth_M / rank_QM).where(real_QM, 0.0).sum(1) / count_Q
    last_rank_Q = rank_QM.gather(1, (count_Q - 1).clamp(min=0)[:, None])[:, 0]
    rows_Q3 = torch.stack([rank_QM[:, 0], average_precision_Q, count_Q / last_rank_Q], dim=1)
    rows_Q3[count_Q == 0] = torch.nan
    return rows_Q3.cpu()


def _not_below(similarity_QG: Tensor, least_QM: Tensor) -> Tensor:
    """How many of a query's similarities are at least each of the M given, [Q, M].

    Ranks of the matches are all that the metrics need. Counting takes one pass over the
    similarities per match; sorting them takes as long as some COUNTED passes.
    """
    if least_QM.shape[1] > COUNTED:
        ascending_QG = similarity_QG.sort(dim=1).values
        return similarity_QG.shape[1] - torch.searchsorted(ascending_QG, least_QM)
    # Query by query the comparisons stay in the processor's cache. Counts have their place from the
    # start: small tensors allocated between large ones would fragment the memory.
    count_QM = torch.empty_like(least_QM, dtype=torch.int32)
    for similarity_G, least_M, count_M in zip(similarity_QG, least_QM, count_QM, strict=True):
        torch.sum(similarity_G >= least_M[:, None], dim=1, dtype=torch.int32, out=count_M)
    return count_QM


def summarize(rows_Q3: Tensor, gallery: int) -> Retrieval:
    """Means over the queries that have a match, in percent."""
    first, ap, inp = rows_Q3[~rows_Q3[:, 0].isnan()].unbind(1)
    if not len(first):
        raise UserError(
            "no query has a match in the gallery: captions and images share no identity"
        )

    def percent(values: Tensor) -> float:
        return 100 * values.double().mean().item()

    return Retrieval(
        {
            **{f"R@{k}": percent(first <= k) for k in (1, 5, 10)},
            "mAP": percent(ap),
            "mINP": percent(inp),
        },
        queries=len(first),
        unmatched=len(rows_Q3) - len(first),
        gallery=gallery,
    )
