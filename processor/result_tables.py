"""Tables of results for the log: the best epochs of a training, and the parts of an evaluation."""

from __future__ import annotations

from typing import Any

from utils.metrics import SHOWN, Retrieval, with_rsum
from utils.runs import LAST_EPOCH
from utils.tables import console


def best_table(best: dict[str, dict[str, Any]]) -> str:
    """The best epochs, with the metrics of all splits at each.

    Args:
        best: `Best.by_split`.
    """
    rows: list[list[object]] = []
    for chosen_on, row in best.items():
        for split, metrics in row["metrics"].items():
            cells = [f"{value:.2f}" for value in with_rsum(metrics).values()]
            rows.append([row["epoch"], chosen_on, split, *cells])
        if chosen_on == LAST_EPOCH:
            rows.append([row["epoch"], "no split: the last epoch", *[""] * (1 + len(SHOWN))])
    return console(["best epoch", "chosen on", "metrics of", *SHOWN], rows, left=3)


def gallery_table(galleries: dict[str, Retrieval]) -> str:
    """Metrics in percent and RSum, one row per gallery."""
    rows = [
        [name, result.queries, result.gallery,
         *(f"{value:.2f}" for value in with_rsum(result.metrics).values())]
        for name, result in galleries.items()
    ]  # fmt: skip
    lines = [console(["gallery", "queries", "images", *SHOWN], rows)]
    lines += [
        f"{name}: {result.unmatched} captions have no image of their identity and are skipped"
        for name, result in galleries.items()
        if result.unmatched
    ]
    return "\n".join(lines)


def interval_table(galleries: dict[str, dict[str, list[float]]]) -> str:
    """Confidence intervals, one row per gallery."""
    rows = [
        [name, *(f"{low:.2f} to {high:.2f}" for low, high in metrics.values())]
        for name, metrics in galleries.items()
    ]
    return console(["gallery", *SHOWN], rows)


def attribute_table(accuracy: dict[str, dict[str, float]]) -> str:
    """Accuracy in percent, one row per attribute, one column per view."""
    views = list(next(iter(accuracy.values())))
    rows = [[name, *(f"{row[view]:.2f}" for view in views)] for name, row in accuracy.items()]
    return console(["attribute", *views], rows)
