"""Hits as a table for the terminal, no wider than it if that can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gallery.query import Hit
from utils.tables import console
from utils.text import visible

HEAD = ("rank", "score", "id", "path", "box", "time", "view", "source", "pictures")
LEAVABLE = ("source", "box", "time", "view")  # in this order, where the terminal is narrow
PATH = 16  # characters of a path, at least


def hits_table(hits: Sequence[Hit], counts: bool, width: int | None) -> str:
    """The table, without columns that are empty.

    Args:
        counts: whether to show for how many pictures each hit stands.
        width: of the terminal. Paths are shortened from the left to fit, then columns left out.
            None: nothing is shortened.
    """
    rows = [dict(zip(HEAD, _cells(hit), strict=True)) for hit in hits]
    shown = [name for name in HEAD if any(row[name] != "" for row in rows)]
    if not counts:
        shown.remove("pictures")
    while True:
        table = console(shown, [[row[name] for name in shown] for row in rows], left=4)
        over = 0 if width is None else len(table.split("\n", 1)[0]) - width
        if over <= 0:
            return table
        longest = max(len(row["path"]) for row in rows)
        left_out = next((name for name in LEAVABLE if name in shown), None)
        if longest > PATH:
            for row in rows:
                row["path"] = _ending(row["path"], max(PATH, longest - over))
        elif left_out:
            shown.remove(left_out)
        else:
            return table


def _ending(text: str, most: int) -> str:
    return text if len(text) <= most else "..." + text[3 - most :]


def _cells(hit: Hit) -> list[Any]:
    """The cells of a hit, in the order of HEAD; "" for what is not known."""
    item = hit.item
    box = f"{item['width']}x{item['height']}+{item['left']}+{item['top']}"
    time = item["taken"] or ""
    if item["frame_time"] is not None:
        time = f"{item['frame_time']:.2f} s"
    return [
        hit.rank, f"{hit.score:.4f}", hit.id, visible(item["path"]),
        "" if item["left"] is None else box, time, item["view"] or "", item["source"] or "",
        hit.count,
    ]  # fmt: skip
