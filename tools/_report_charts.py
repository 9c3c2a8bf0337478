"""Draws a report's charts as SVG: every scalar of TensorBoard by epoch, and recall against rank.

Uses Matplotlib without pyplot, because pyplot keeps global state. Matplotlib receives only numbers.
The page shows names around the drawing: they are untrusted text, in which Matplotlib would read "$"
as the start of a formula.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from processor.results import read_queries
from tools._report_runs import Points, ReportedRun

MOST = 500  # points that are drawn of a line
MARKED = 40  # with up to this many points, each gets a marker
INK = "#010203"  # a placeholder for currentColor, which Matplotlib does not know
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "none", "lines.markersize": 4,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "grid.color": INK,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.formatter.limits": (-3, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One drawing. `svg` is empty if no value is finite; `summary` describes the lines in words."""

    title: str
    svg: Markup
    summary: str
    notes: list[str]


def training(runs: Sequence[ReportedRun]) -> dict[str, list[Chart]]:
    """A chart of each scalar with all runs in it, by the part of its tag before "/" ("loss",
    "val"); tags without "/" come last. All charts share one axis of epochs, whatever the lengths
    of the runs."""
    epochs = [x for run in runs for points in run.scalars.values() for x, _ in points]
    groups: dict[str, list[Chart]] = {}
    for tag in dict.fromkeys(tag for run in runs for tag in run.scalars):
        lines = [(run, run.scalars[tag]) for run in runs if run.scalars.get(tag)]
        if lines:
            charts = groups.setdefault(tag.split("/")[0] if "/" in tag else "", [])
            charts.append(chart(tag, lines, "epoch", (min(epochs), max(epochs))))
    return dict(sorted(groups.items(), key=lambda group: not group[0]))


def recall(runs: Sequence[ReportedRun], most: int = 50) -> list[Chart]:
    """Share of captions with a match among the first k images, by gallery, on common axes."""
    by_gallery: dict[str, list[tuple[ReportedRun, Points]]] = {}
    for gallery in runs[0].results["splits"]["test"]["galleries"]:
        for run in runs:
            if gallery in run.results["splits"]["test"]["galleries"]:
                ranked = read_queries(run.folder / "test_queries.npz", "test", gallery)
                first = ranked.rows_Q3[:, 0]
                first = first[~first.isnan()]
                curve: Points = [
                    (k, 100 * (first <= k).double().mean().item()) for k in range(1, most + 1)
                ]
                by_gallery.setdefault(gallery, []).append((run, curve))
    values = [y for lines in by_gallery.values() for _, curve in lines for _, y in curve]
    low = min(filter(math.isfinite, values), default=0)
    return [
        chart(f"{gallery}, %", lines, "images looked at", (1, most), (low, 100))
        for gallery, lines in by_gallery.items()
    ]


def chart(
    title: str,
    lines: Sequence[tuple[ReportedRun, Points]],
    xlabel: str,
    x: tuple[float, float],
    y: tuple[float, float] | None = None,
) -> Chart:
    """A chart of the runs' lines. `x` and `y` are the ends of the axes; `y` is by default the range
    of the values."""
    summary, notes = [], []
    for run, points in lines:
        finite = [value for _, value in points if math.isfinite(value)]
        if finite:
            summary.append(
                f"{run.name}: {finite[-1]:.4g} in the end, {min(finite):.4g} to {max(finite):.4g}"
            )
        if gaps := len(points) - len(finite):
            notes.append(f"{run.name}: {gaps} of {len(points)} points are not finite")
    svg = ""
    if summary:
        with style.context(["default", {**STYLE, "svg.hashsalt": ascii(title)}]):
            buffer = io.StringIO()
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            drawn = figure([(run.colour, points) for run, points in lines], xlabel, x, y)
            drawn.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        svg = _inline(buffer.getvalue())
    return Chart(title, Markup(svg), "; ".join(summary), notes)


def figure(
    lines: Iterable[tuple[str, Points]],
    xlabel: str,
    x: tuple[float, float],
    y: tuple[float, float] | None,
) -> Figure:
    """A figure of lines (colour, points).

    A value that is not finite leaves a gap. A single point between gaps gets a marker, because it
    would be invisible otherwise. The axes are in the same place in every figure.
    """
    drawn = Figure(figsize=(4.4, 2.7))
    axes = drawn.add_axes((0.14, 0.18, 0.84, 0.74))
    for colour, points in lines:
        points = thinned(points)
        finite = [False, *(math.isfinite(value) for _, value in points), False]
        marked = [
            n for n in range(len(points))
            if len(points) <= MARKED or not (finite[n] or finite[n + 2])
        ]  # fmt: skip
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=1, marker="o", markevery=marked
        )
    for ends, limit in ((x, axes.set_xlim), (y, axes.set_ylim)):
        if ends:
            margin = (ends[1] - ends[0]) / 40 or max(1, abs(ends[0]) / 1000)
            limit(ends[0] - margin, ends[1] + margin)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.tick_params(left=False, bottom=False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    return drawn


def thinned(points: Points) -> Points:
    """At most `MOST` points of a line, chosen so that peaks and gaps stay.

    These are the first and the last, and for each stretch the lowest, the highest and one that is
    not finite.
    """
    if len(points) <= MOST:
        return points
    kept, stretches = {0, len(points) - 1}, (MOST - 2) // 3
    for n in range(stretches):
        stretch = range(len(points) * n // stretches, len(points) * (n + 1) // stretches)
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        if finite:
            kept.update(f(finite, key=lambda i: points[i][1]) for f in (min, max))
        kept.update([i for i in stretch if not math.isfinite(points[i][1])][:1])
    return [points[i] for i in sorted(kept)]


def _inline(svg: str) -> str:
    """Matplotlib's file as part of a page: as wide as the space, in the page's text colour.

    Its style sheet is removed, because it would style the page too; so are ids, because other
    charts have the same.
    """
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\" height=\"[^\"]*\"", r"\1", svg, count=1)
    return re.sub(r"\s*\n\s*", " ", svg)
