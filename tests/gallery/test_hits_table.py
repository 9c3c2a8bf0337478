"""The table of hits: which columns it has, and how it fits into a terminal."""

import pytest

from gallery.hits_table import PATH, hits_table
from gallery.query import Hit

EMPTY = dict.fromkeys(("frame_time", "left", "top", "width", "height", "taken", "view", "source"))


def hits(**item):
    path = "G2APS-AG/ground/1240_0001_00012345.jpg"
    return [
        Hit(n, 6110056214522409932 + n, n, 0.5, EMPTY | {"path": path} | item, n) for n in (1, 2)
    ]


def head(table):
    return [cell.strip() for cell in table.splitlines()[1].split("|")[1:-1]]


def test_columns_that_are_empty_are_left_out():
    assert head(hits_table(hits(), False, None)) == ["rank", "score", "id", "path"]
    some = hits(view="aerial")
    some[0].item.update(frame_time=1.5)
    assert head(hits_table(some, True, None)) == [
        "rank", "score", "id", "path", "time", "view", "pictures"
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_table_is_as_wide_as_the_terminal(width):
    box = {"left": 1000, "top": 1000, "width": 200, "height": 300}
    table = hits_table(hits(view="ground", source="G2APS-AG", frame_time=1.0, **box), True, width)
    assert max(map(len, table.splitlines())) <= width
    assert "6110056214522409933" in table and "..." in table and "345.jpg" in table


def test_elsewhere_paths_are_whole():
    wide = hits_table(hits(source="G2APS-AG"), True, None)
    assert "| G2APS-AG/ground/1240_0001_00012345.jpg |" in wide


def test_a_terminal_that_is_too_narrow_gets_what_is_most_needed():
    table = hits_table(hits(view="ground", source="G2APS-AG"), False, 20)
    assert head(table) == ["rank", "score", "id", "path"]
    assert all(len(line.split("|")[4].strip()) <= PATH for line in table.splitlines()[3:-1])
