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
    """(aerial, ground) pairs of an identity: every picture of the larger view is in one.

    With `round_robin`, the n-th picture of the larger view gets the n-th of the smaller one, modulo
    their number. With `nearest_time`, it gets the one that is nearest in time; if times are
    unknown, as with `round_robin`.
    """
    aerial, ground = (sorted(c, key=lambda c: _place(c.picture)) for c in (aerial, ground))
    more, fewer = (aerial, ground) if len(aerial) >= len(ground) else (ground, aerial)
    pairs = []
    for i, one in enumerate(more):
        other = fewer[i % len(fewer)]
        timed = [c for c in fewer if _apart(one.picture, c.picture) is not None]
        if recipe.pairing == "nearest_time" and timed:
            other = min(timed, key=lambda c: (_apart(one.picture, c.picture), c.number))
        pairs.append((one, other) if more is aerial else (other, one))
    return pairs


def _place(picture: Picture) -> tuple[float, str]:
    return picture.time or 0.0, picture.name


def _apart(one: Picture, other: Picture) -> float | None:
    """Seconds between two pictures, if their times are known."""
    if one.time is None or other.time is None:
        return None
    return abs(one.time - other.time)
