"""Reads what a report shows: the metrics of evaluated runs, and the curves of their training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from processor.results import check_metrics, read_results
from utils.errors import UserError
from utils.metrics import with_rsum
from utils.runs import EVENTS

DIGITS = len(EVENTS.format(0)) - 1  # of the number at the end of an event file's name
Points = list[tuple[float, float]]


@dataclass
class ReportedRun:
    """The content of a run's folder."""

    folder: Path
    name: str
    results: dict[str, Any]
    scalars: dict[str, Points]  # by TensorBoard's tag: (epoch, value)
    colour: str


def read_run(folder: Path, colour: str) -> ReportedRun:
    """A run by its folder. Raises UserError if the folder is not an evaluated run."""
    path = folder / "test_results.json"
    results = read_results(path, folder / "test_queries.npz")
    check_metrics(results, path)
    return ReportedRun(folder, folder.absolute().name, results, read_scalars(folder), colour)


def percentages(gallery: dict[str, Any]) -> list[float]:
    """The values of SHOWN of a gallery in test_results.json, which in older ones lacks RSum."""
    return list(with_rsum(gallery).values())


def read_scalars(folder: Path) -> dict[str, Points]:
    """(epoch, value) of every curve in a run's event files, ordered by epoch.

    A resumed run has one file per start. TensorBoard orders them by the clock, which may have been
    set back. Here the order is that of the number at the end of their names, which the trainer
    counts up. A file replaces all epochs of older files from its own first epoch on. Files of older
    versions have no number; they replace only the epochs that they contain. Raises UserError.
    """
    files = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if not path.is_file():
            continue
        events = EventAccumulator(
            str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False
        )
        try:
            events.Reload()
            scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        except Exception as error:  # the parser may raise anything on a corrupted file
            raise UserError(f"{path}: not readable as events of TensorBoard: {error}") from None
        first = min((event.step for curve in scalars.values() for event in curve), default=math.inf)
        ending = path.suffix.removeprefix(".")
        number = int(ending) if ending.isdecimal() and len(ending) == DIGITS else 0
        files.append((number, first, scalars))
    files.sort(key=lambda file: file[0])
    older = [file for file in files if not file[0]]
    # The oldest file starts at the lowest epoch. If another one does, the clock was set back.
    if any(first < older[0][1] for _, first, _ in older):
        files.sort(key=lambda file: (file[0], 0 if file[0] else file[1]))
    curves: dict[str, dict[int, float]] = {}
    for number, first, scalars in files:
        for tag in (*curves, *scalars):
            before = {s: v for s, v in curves.get(tag, {}).items() if s < first or not number}
            curves[tag] = before | {e.step: e.value for e in scalars.get(tag, ())}
    return {tag: sorted(points.items()) for tag, points in curves.items()}
