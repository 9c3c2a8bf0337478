"""Retrieval metrics: R@k, mAP, mINP and RSum, exact, without a loop over queries.

Shapes: Q queries, G gallery items, D features, M the largest number of matches of a query in a
chunk, X matches of all queries in a chunk.

Definitions
- A match is a gallery item of the query's identity. Ranks count from 1.
- Ties: similarities that differ by at most TIE count as equal, and a match is ranked after equal
  items of other identities. So the position of a duplicate image does not matter, and a model that
  gives every item the same score gets the worst metrics. (TIE is needed because the rounding of a
  similarity depends on its position in a batch.)
- A query without a match in the gallery has no rank. It is left out of all means and counted in
  `Retrieval.unmatched`.
- RSum is R@1 + R@5 + R@10, from 0 to 300. It follows from the others, so only tables and
  test_results.json have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from utils.devices import at_least_float32
from utils.errors import UserError

CHUNK_BYTES = 256 * 2**20  # similarities in memory at the same time
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")  # in this order everywhere
SHOWN = (*METRICS, "RSum")  # of tables
TIE = 1e-6  # ten times the rounding error of a float32 cosine; people differ by far more
CACHED = 2**18  # comparisons, of a byte each, that fit into a processor's cache
COUNTED = 64  # up to this number of matches per query, counting is faster than sorting

Value = TypeVar("Value", float, Tensor)


def with_rsum(metrics: Mapping[str, Value]) -> dict[str, Value]:
    """The values of METRICS and RSum, by the names in SHOWN."""
    values = {name: metrics[name] for name in METRICS}
    return {**values, "RSum": metrics["R@1"] + metrics["R@5"] + metrics["R@10"]}


@dataclass(frozen=True)
class Retrieval:
    """Means over queries."""

    metrics: dict[str, float]  # by the names in METRICS, in percent
    queries: int  # number of queries with a match
    unmatched: int  # number of queries without a match
    gallery: int  # number of items

    def results(self) -> dict[str, float]:
        """Metrics, RSum and counts by name, as in test_results.json."""
        counts = {"queries": self.queries, "unmatched": self.unmatched, "gallery": self.gallery}
        return {**with_rsum(self.metrics), **counts}


@dataclass(frozen=True)
class Ranked:
    """The result of a ranking for each query."""

    rows_Q3: Tensor  # the result of `query_metrics`
    pids_Q: Tensor
    gallery: int  # number of items

    def summary(self) -> Retrieval:
        """Means over the queries with a match. Raises UserError if there is none."""
        return summarise(self.rows_Q3, self.gallery)

    def percentages(self) -> Tensor:
        """The values of SHOWN of each query in percent, [Q, 6]; NaN without a match."""
        first, ap, inp = self.rows_Q3.unbind(1)
        hits = [torch.where(first.isnan(), torch.nan, (first <= k).double()) for k in (1, 5, 10)]
        values = with_rsum(dict(zip(METRICS, (*hits, ap, inp), strict=True)))
        return 100 * torch.stack(list(values.values()), dim=1)


def rank_gallery(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_pids_Q: Tensor,
    gallery_pids_G: Tensor,
    chunk: int | None = None,
) -> Ranked:
    """Rank the gallery for every query by cosine similarity, on the features' device.

    Features need no normalisation. `chunk` queries are ranked at a time. By default their
    similarities fill CHUNK_BYTES, which limits the memory for a gallery of any size. Raises
    UserError for features that are not finite, and ValueError for shapes that do not match.
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


def query_metrics(similarity_QG: Tensor, query_pids_Q: Tensor, gallery_pids_G: Tensor) -> Tensor:
    """Rank of the first match, average precision and inverse negative penalty of each query.

    Returns [Q, 3] float64: rank of the first match, AP in [0, 1], INP in [0, 1], or a row of NaN
    for a query without a match. AP is the mean over matches of precision at their
    rank; INP is the number of matches divided by the rank of the last one (Ye et al., TPAMI 2021).
    """
    # Sorting the identities finds the matches; comparing all pairs would take as long as ranking.
    order_G = gallery_pids_G.argsort()
    sorted_G = gallery_pids_G[order_G]
    query_pids_Q = query_pids_Q.contiguous()  # searchsorted copies others, and warns
    start_Q = torch.searchsorted(sorted_G, query_pids_Q)
    count_Q = torch.searchsorted(sorted_G, query_pids_Q, right=True) - start_Q
    most = int(count_Q.max()) if count_Q.numel() else 0
    if most == 0:
        return torch.full((len(query_pids_Q), 3), torch.nan, dtype=torch.float64)
    # Similarities of each query's matches, best first; -inf fills rows with fewer matches.
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


def summarise(rows_Q3: Tensor, gallery: int) -> Retrieval:
    """Means over the queries with a match, in percent. Raises UserError if there is none."""
    first, ap, inp = rows_Q3[~rows_Q3[:, 0].isnan()].unbind(1)
    if not len(first):
        raise UserError(
            "no query has a match in the gallery: captions and images have no identity in common"
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


def _not_below(similarity_QG: Tensor, least_QM: Tensor) -> Tensor:
    """For each threshold in `least_QM`, how many similarities of the query reach it, [Q, M].

    The metrics need only the ranks of the matches. Counting takes one pass over the similarities
    per match; sorting takes as long as about COUNTED passes.
    """
    if least_QM.shape[1] > COUNTED:
        ascending_QG = similarity_QG.sort(dim=1).values
        return similarity_QG.shape[1] - torch.searchsorted(ascending_QG, least_QM)
    # On a CPU the comparisons of a block of queries fit into the cache: this is four times as fast.
    rows = len(similarity_QG) if similarity_QG.is_cuda else max(1, CACHED // similarity_QG.shape[1])
    count_QM = torch.empty_like(least_QM, dtype=torch.int32)
    for i in range(0, len(similarity_QG), rows):
        for m, least_Q in enumerate(least_QM[i : i + rows].unbind(1)):
            not_below_QG = similarity_QG[i : i + rows] >= least_Q[:, None]
            count_QM[i : i + rows, m] = not_below_QG.sum(dim=1, dtype=torch.int32)
    return count_QM
