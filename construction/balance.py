"""Balance: as many aerial as ground pictures of an identity; and which of them make a pair.

TBAGPR's authors removed the overflow of the view with more pictures, and gave each aerial picture
the next ground picture of its identity, starting again after the last one (round robin).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from construction.recipe import Balance
from construction.records import Candidate, Picture


def overflow(aerial: Sequence[Candidate], ground: Sequence[Candidate], recipe: Balance) -> set[int]:
    """Numbers of the pictures of an identity that are too many. Both views have some.

    The larger view keeps `ratio` times as many as the smaller one: the sharpest, or pictures that
    are spread evenly over time.
    """
    if recipe.ratio is None:
        return set()
    wanted = int(recipe.ratio * min(len(aerial), len(ground)))
    removed: set[int] = set()
    for pictures in (aerial, ground):
        if len(pictures) <= wanted:
            continue
        if recipe.keep == "sharpest":
            order = sorted(pictures, key=lambda c: (-c.measure.sharpness, c.number))
            kept = order[:wanted]
        else:
            order = sorted(pictures, key=lambda c: _place(c.picture))
            kept = [order[i] for i in np.linspace(0, len(order) - 1, wanted).round().astype(int)]
        removed |= {c.number for c in pictures} - {c.number for c in kept}
    return removed


def pair(
    aerial: Sequence[Candidate], ground: Sequence[Candidate], recipe: Balance
) -> list[tuple[Candidate, Candidate]]:
    """(aerial, ground) pairs of an identity: every picture of the larger view is in one, and those
    of the smaller view are in equally many.

    With `round_robin`, the n-th picture of the larger view gets the n-th of the smaller one, modulo
    their number. With `nearest_time`, the two that are nearest in time are a pair, then the nearest
    two of the others, and so on. If a time is unknown, it is `round_robin`.
    """
    aerial, ground = (sorted(c, key=lambda c: _place(c.picture)) for c in (aerial, ground))
    more, fewer = (aerial, ground) if len(aerial) >= len(ground) else (ground, aerial)
    timed = all(c.picture.time is not None for c in (*more, *fewer))
    if recipe.pairing == "nearest_time" and timed:
        pairs = _nearest(more, fewer)
    else:
        pairs = [(one, fewer[i % len(fewer)]) for i, one in enumerate(more)]
    return pairs if more is aerial else [(two, one) for one, two in pairs]


def _nearest(
    more: Sequence[Candidate], fewer: Sequence[Candidate]
) -> list[tuple[Candidate, Candidate]]:
    """Pairs by time, in rounds: in each of them a picture of `fewer` gets at most one partner."""
    times, other_times = (np.array([c.picture.time for c in view]) for view in (more, fewer))
    order = np.abs(times[:, None] - other_times[None]).argsort(axis=None, kind="stable")
    ranked = [divmod(int(place), len(fewer)) for place in order]
    partner: dict[int, int] = {}
    while len(partner) < len(more):
        used: set[int] = set()
        for i, j in ranked:
            if i not in partner and j not in used:
                partner[i] = j
                used.add(j)
    return [(more[i], fewer[j]) for i, j in sorted(partner.items())]


def _place(picture: Picture) -> tuple[float, str]:
    return picture.time or 0.0, picture.name
