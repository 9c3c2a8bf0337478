"""Queries: sentences and pictures, wanted or not, to ranked hits.

The query's feature is q = normalise(w_1 f_1 + w_2 f_2 + ...), where f_i are the unit features of
its sentences and pictures and w_i their weights, negative for what is not wanted. An item's score
is the cosine of its feature and q, so for a single sentence it is the score of the evaluation.

A picture moves the ranking more than a sentence of the same weight, because cosines of pictures
with each other differ more than their cosines with sentences.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from gallery.index import unit
from gallery.rerank import RERANKED
from utils.errors import UserError

UNWANTED = 0.5  # weight of what is not wanted, if none is given
COLLAPSE = 0.95  # least cosine of near-duplicates, if none is given
SECONDS = 2.0  # between pictures of a scene that may show one person as if once
SAMPLE = 10_000  # items that tell the median score
NEAR = 0.2  # of the way from the first score to the median: what fits about as well as the first
LOOKED = 64  # hits that are looked at for that, at least
FEWEST = 20  # people, among whom docs/search.md measured how often the first hit is right
NEXT = 256  # hits from a hit on, among which its near-duplicates are counted

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # [Q, D], k: scores, rows
Rerank = Callable[[np.ndarray, np.ndarray], np.ndarray]  # [D], [K, D]: positions, best first


@dataclass(frozen=True)
class Hit:
    """An item that was found.

    Attributes:
        rank: from 1.
        row: in the gallery.
        score: cosine with the query.
        item: the columns of the item.
        count: how many it stands for: itself, and its near-duplicates among the NEXT hits from it
            on, however many hits are asked for.
    """

    rank: int
    id: int
    row: int
    score: float
    item: dict[str, Any]
    count: int


def as_json(hit: Hit) -> dict[str, Any]:
    """A hit as JSON holds it: rank, score and count, and the item's columns under their names."""
    item = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in hit.item.items()
    }
    return {"rank": hit.rank, "score": hit.score, "count": hit.count, "row": hit.row, "item": item}


@dataclass(frozen=True)
class Sureness:
    """How many fit the query about as well as the first hit. A hint: it compares scores, and knows
    nothing of whether the person is in the gallery at all. docs/search.md says how often the first
    hit was right where that was measured.

    Attributes:
        near: people who fit about as well, the first one included; hits, if the identities of some
            of them are not known.
        people: whether `near` counts people.
        more: whether all hits that were looked at are near, so that there may be more.
        few: whether fewer than FEWEST people were searched.
    """

    near: int
    people: bool
    more: bool
    few: bool

    def __str__(self) -> str:
        if self.few:
            return "too few people were searched to say how sure the first hit is"
        if self.near == 1:
            return "the first hit stands out: no other comes near it"
        whom = "people who" if self.people else "hits that"
        least = "at least " if self.more else ""
        return f"the first hit is one of {least}{self.near} {whom} fit about as well"


def combine(features_ND: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The query's feature [D], of unit length. Raises UserError if the weights are not numbers, or
    if the features cancel each other."""
    if not len(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"weights {', '.join(map(str, weights))}: they must be numbers")
    if not any(weight > 0 for weight in weights):
        raise UserError("a query wants something: give a sentence or a picture a positive weight")
    sum_D = np.asarray(weights, np.float32) @ unit(np.asarray(features_ND, np.float32))
    if np.linalg.norm(sum_D) < 1e-3 * np.abs(weights).sum():
        raise UserError("the query's sentences and pictures cancel each other; change the weights")
    return unit(sum_D)


def find_hits(
    search: Search,
    items: pa.Table,
    features: np.ndarray,
    query_D: np.ndarray,
    top: int,
    collapse: float | None = None,
    rerank: Rerank | None = None,
) -> list[Hit]:
    """The first hits.

    Args:
        search: finds the k best items of a query.
        collapse: hits of one scene with at least this cosine become one (`groups_of`).
        rerank: with the query [D] and the features [K, D] of the first RERANKED hits, gives their
            new order.
    """
    wanted = max(top if collapse is None else 3 * top + NEXT, 0 if rerank is None else RERANKED)
    while True:
        scores, rows = (found[0] for found in search(query_D[None], min(wanted, len(items))))
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        if rerank is not None:
            first = rows[:RERANKED]
            order = rerank(query_D, features[first].astype(np.float32))
            rows[:RERANKED], scores[:RERANKED] = first[order], scores[:RERANKED][order]
        records = items.take(pa.array(rows)).to_pylist()
        groups = [[n] for n in range(len(rows))]
        if collapse is not None:
            groups = groups_of(records, features[rows].astype(np.float32), collapse)
        counted = len(groups) >= top and (
            collapse is None or len(rows) >= groups[top - 1][0] + NEXT
        )
        if counted or wanted >= len(items) or len(rows) < wanted:
            break
        wanted *= 4
    hits = []
    for rank, group in enumerate(groups[:top], 1):
        first = group[0]
        count = sum(n < first + NEXT for n in group)
        row, score, item = int(rows[first]), float(scores[first]), records[first]
        hits.append(Hit(rank, item["id"], row, score, item, count))
    return hits


def groups_of(
    items: Sequence[dict[str, Any]], features_KD: np.ndarray, threshold: float
) -> list[list[int]]:
    """Hits in groups of near-duplicates: positions, best first, in the order of the groups' best.

    A hit joins the first group of which all of this holds: its best hit has a cosine of at least
    `threshold` with it; one of its hits is of the same video or folder, and of the same view,
    camera and source, at most SECONDS away (by the time in the video, or when the picture was
    taken), or, if no time is known, in a copy of the same file; none is in the same picture or of
    another identity. When a file was written does not count: a folder is copied in a moment.
    """
    groups: list[list[int]] = []
    by_scene: defaultdict[object, list[list[int]]] = defaultdict(list)
    cosines_KK = features_KD @ features_KD.T
    for n, item in enumerate(items):
        scene, time = _scene(item)
        for group in by_scene[scene]:
            others = [items[m] for m in group]
            if (
                cosines_KK[group[0], n] >= threshold
                and all(_frame(item) != _frame(other) for other in others)
                and all(_may_be_one(item, other) for other in others)
                and any(abs(time - _scene(other)[1]) <= SECONDS for other in others)
            ):
                group.append(n)
                break
        else:
            groups.append([n])
            by_scene[scene].append(groups[-1])
    return groups


def sureness(
    features: np.ndarray, query_D: np.ndarray, hits: Sequence[Hit], mask: np.ndarray | None = None
) -> Sureness:
    """How many fit about as well as the first hit: their scores are at most NEAR below it, of the
    way down to the median of what was searched.

    Args:
        hits: at least one; LOOKED or more, unless there are no more.
        mask: bool [N], the items that were searched; None: all.
    """
    rows = np.arange(len(features)) if mask is None else np.flatnonzero(mask)
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
    median = float(np.median(features[rows].astype(np.float32) @ query_D))
    least = hits[0].score - NEAR * max(0.0, hits[0].score - median)
    near = [hit for hit in hits if hit.score >= least]
    identities = [hit.item["identity"] for hit in near]
    people = None not in identities
    count = len(set(identities)) if people else len(near)
    different = {hit.id if hit.item["identity"] is None else hit.item["identity"] for hit in hits}
    few = len(hits) < LOOKED and len(different) < FEWEST
    return Sureness(count, people, len(near) == len(hits) >= LOOKED, few)


def _scene(item: dict[str, Any]) -> tuple[object, float]:
    """What pictures of one scene have in common, and a picture's time in seconds."""
    place = (item["view"], item["camera"], item["source"])
    if item["frame_time"] is not None:
        return ("video", item["path"], *place), item["frame_time"]
    folder = os.path.dirname(item["path"])
    if item["taken"] is not None:
        return ("taken", folder, *place), item["taken"].timestamp()
    return ("copies", item["digest"], *place), 0.0


def _frame(item: dict[str, Any]) -> tuple[str, float | None]:
    return item["path"], item["frame_time"]


def _may_be_one(item: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two items may show one person: unless both have identities, and different ones."""
    return None in (item["identity"], other["identity"]) or item["identity"] == other["identity"]
