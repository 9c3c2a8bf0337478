"""Balance and pairing of an identity's pictures."""

from __future__ import annotations

import pytest

from construction.balance import overflow, pair
from construction.recipe import Balance
from tests.construction.made import candidate


def views(aerial: int, ground: int):
    """Pictures 0, 1, ... aerial and 100, 101, ... ground, one a second, ever sharper."""
    return [
        [candidate(base + i, {"sharpness": float(i)}, view=view, time=float(i)) for i in range(n)]
        for base, view, n in ((0, "aerial", aerial), (100, "ground", ground))
    ]


def test_the_sharpest_of_the_larger_view_stay():
    assert overflow(*views(5, 2), Balance()) == {0, 1, 2}
    assert overflow(*views(2, 5), Balance()) == {100, 101, 102}
    assert overflow(*views(3, 3), Balance()) == set()


def test_a_ratio_lets_the_larger_view_keep_more():
    assert overflow(*views(6, 2), Balance(ratio=1.5)) == {0, 1, 2}
    assert overflow(*views(3, 2), Balance(ratio=1.5)) == set()
    assert overflow(*views(90, 1), Balance(ratio=None)) == set()


def test_spread_keeps_pictures_over_the_whole_time():
    removed = overflow(*views(9, 3), Balance(keep="spread"))
    assert set(range(9)) - removed == {0, 4, 8}
    assert set(range(9)) - overflow(*views(9, 1), Balance(keep="spread")) == {0}


def test_round_robin_gives_each_picture_of_the_larger_view_the_next_one_of_the_smaller():
    numbers = [(a.number, g.number) for a, g in pair(*views(5, 2), Balance())]
    assert numbers == [(0, 100), (1, 101), (2, 100), (3, 101), (4, 100)]
    numbers = [(a.number, g.number) for a, g in pair(*views(2, 3), Balance())]
    assert numbers == [(0, 100), (1, 101), (0, 102)]


def test_nearest_time_gives_the_partner_that_was_seen_at_about_the_same_time():
    aerial = [candidate(i, view="aerial", time=t) for i, t in enumerate((10.0, 11.0, 50.0))]
    ground = [candidate(100 + i, view="ground", time=t) for i, t in enumerate((12.0, 40.0))]
    numbers = [
        (a.number, g.number) for a, g in pair(aerial, ground, Balance(pairing="nearest_time"))
    ]
    # Each ground picture has one partner, the nearest ones first; then the rest go on.
    assert numbers == [(0, 100), (1, 100), (2, 101)]


def test_nearest_time_uses_every_picture_of_balanced_views_once():
    aerial, ground = views(6, 6)
    late = [candidate(c.number, view="ground", time=c.picture.time + 100) for c in ground]
    pairs = pair(aerial, late, Balance(pairing="nearest_time"))
    assert {g.number for _, g in pairs} == {c.number for c in late} and len(pairs) == 6
    assert (pairs[5][0].number, pairs[5][1].number) == (5, 100)  # the nearest two of all


@pytest.mark.parametrize("pairing", ["round_robin", "nearest_time"])
def test_pairs_do_not_depend_on_the_order_of_the_pictures(pairing):
    aerial, ground = views(4, 7)
    recipe = Balance(pairing=pairing)
    assert pair(aerial[::-1], ground[::-1], recipe) == pair(aerial, ground, recipe)


def test_without_times_partners_go_round_robin():
    aerial = [candidate(0, view="aerial"), candidate(1, view="aerial", time=3.0)]
    ground = [candidate(100 + i, view="ground") for i in range(3)]
    pairs = pair(aerial, ground, Balance(pairing="nearest_time"))
    assert [(a.number, g.number) for a, g in pairs] == [(0, 100), (1, 101), (0, 102)]
