"""k-reciprocal re-ranking of the first hits (Zhong et al., CVPR 2017).

Two pictures are near if they have the same neighbours. A hit's neighbours are the hits among its k1
nearest that also have it among theirs, and the neighbours of half as many that these agree on. Each
has a weight exp(-d), averaged over the hit's k2 nearest; the Jaccard distance J compares the
weights of two hits. Hits are ranked by (1 - weight) J + weight d, where d is the query's distance.

The published values are k1 = 20, k2 = 6 and a weight of 0.3, for data with some 17 pictures of a
person. Those here are for galleries with few; the published ones then make the ranking worse
(docs/evaluation.md).

Distances are 1 - cosine, divided by the largest of their row. A sentence lies far from every
picture, and is no picture's near neighbour. So the query's own neighbours are its first k1 hits,
whether or not they have it among theirs, and the query is nobody's.

Shapes: K hits, M = K + 1 with the query first, Q queries, G gallery items, D width of the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from utils.metrics import Ranked

RERANKED = 200  # hits that are ranked again
K1, K2, WEIGHT = 5, 2, 0.7


def rerank(
    query_D: np.ndarray, hits_KD: np.ndarray, k1: int = K1, k2: int = K2, weight: float = WEIGHT
) -> np.ndarray:
    """The new order of hits: positions [K], best first; equal ones keep their order.

    Args:
        hits_KD: unit features of the hits, best first.
    """
    return np.argsort(distances(query_D, hits_KD, k1, k2, weight), kind="stable")


def distances(
    query_D: np.ndarray, hits_KD: np.ndarray, k1: int = K1, k2: int = K2, weight: float = WEIGHT
) -> np.ndarray:
    """The distance of each hit to the query after re-ranking, float32 [K], between 0 and 1."""
    if not len(hits_KD):
        return np.zeros(0, np.float32)
    every_MD = np.concatenate([query_D[None], hits_KD]).astype(np.float32)
    distance_MM = 1 - every_MD @ every_MD.T
    np.fill_diagonal(distance_MM, 0)
    distance_MM = distance_MM.clip(min=0)
    distance_MM /= np.maximum(distance_MM.max(axis=1, keepdims=True), 1e-12)
    # The query comes last in the order of every hit, so that it is nobody's neighbour.
    ordered_MM = distance_MM.copy()
    ordered_MM[1:, 0] = np.inf
    np.fill_diagonal(ordered_MM, -1)  # each is its own first neighbour, also before duplicates
    rank_MM = np.argsort(ordered_MM, axis=1, kind="stable")

    wide_MM = _reciprocal(rank_MM, k1)
    narrow_MM = _reciprocal(rank_MM, (k1 + 1) // 2)
    shared_MM = wide_MM.astype(np.float32) @ narrow_MM.T.astype(np.float32)
    agreed_MM = wide_MM & (shared_MM > 2 / 3 * narrow_MM.sum(axis=1))
    neighbours_MM = wide_MM | (agreed_MM.astype(np.float32) @ narrow_MM.astype(np.float32) > 0)

    neighbours_MM[0, 0] = False
    weight_MM = np.exp(-distance_MM) * neighbours_MM
    weight_MM /= weight_MM.sum(axis=1, keepdims=True)
    weight_MM = weight_MM[rank_MM[:, : min(max(1, k2), len(hits_KD))]].mean(axis=1)
    common_K = np.minimum(weight_MM[0], weight_MM[1:]).sum(axis=1)
    jaccard_K = 1 - common_K / (2 - common_K)
    return (1 - weight) * jaccard_K + weight * distance_MM[0, 1:]


def _reciprocal(rank_MM: np.ndarray, k: int) -> np.ndarray:
    """Who is a neighbour of whom, bool [M, M]: both are among the other's k nearest besides itself.
    For the query, in row 0, it is enough that they are among its own."""
    near_MM = np.zeros(rank_MM.shape, bool)
    np.put_along_axis(near_MM, rank_MM[:, : k + 1], True, axis=1)
    near_MM[1:, 0] = False
    both_MM = near_MM & near_MM.T
    both_MM[0] = near_MM[0]
    return both_MM


def rank_reranked(
    query_QD: Tensor, gallery_GD: Tensor, query_pids_Q: Tensor, gallery_pids_G: Tensor
) -> Ranked:
    """As `utils.metrics.rank_gallery`, with the first RERANKED hits of each query ranked again."""
    import torch  # not above: a query by an id needs no torch

    from utils.devices import at_least_float32
    from utils.metrics import CHUNK_BYTES, Ranked, query_metrics

    query_QD = torch.nn.functional.normalize(at_least_float32(query_QD), dim=-1)
    gallery_GD = torch.nn.functional.normalize(at_least_float32(gallery_GD), dim=-1)
    chunk = max(1, CHUNK_BYTES // (4 * len(gallery_GD)))
    rows = []
    for start in range(0, len(query_QD), chunk):
        part_QD = query_QD[start : start + chunk]
        scores_QG = part_QD @ gallery_GD.T
        hits_QK = scores_QG.topk(min(RERANKED, len(gallery_GD)), dim=1).indices
        for query_D, scores_G, hits_K in zip(part_QD, scores_QG, hits_QK, strict=True):
            new_K = distances(query_D.cpu().numpy(), gallery_GD[hits_K].cpu().numpy())
            # Above every cosine; equal distances stay equal scores, as `query_metrics` wants.
            scores_G[hits_K] = 3 - torch.from_numpy(new_K).to(scores_G)
        pids_Q = query_pids_Q[start : start + chunk]
        rows.append(query_metrics(scores_QG, pids_Q, gallery_pids_G))
    return Ranked(torch.cat(rows), query_pids_Q.cpu(), len(gallery_GD))
