"""Indexing: people are encoded, and become parts of the gallery as they are ready.

Rank 0 writes the manifest; every process reads and encodes its share of the files and writes parts
of its own. A part is committed when it is full, or after a minute, so that a kill loses little.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from gallery.frames import Chunk, Done
from gallery.parts import ROWS, Part, files_table, write_part
from gallery.records import SURE, Guesses, column_of, schema_with
from gallery.store import Store
from utils.interrupt import StopRequest

if TYPE_CHECKING:
    from utils.distributed import Processes

LINE_SECONDS = 15.0  # between lines about the progress
SECONDS = 60.0  # after which a part is committed that is not full

Result = tuple[Chunk, np.ndarray, Guesses]  # with the features [n, D] float16 of its people


@dataclass
class Report:
    """What a process has done since its last report; picklable.

    Attributes:
        part: that it has written, or None.
        touched: paths of the files in the part, and of those without anybody.
    """

    part: Part | None
    touched: set[str]
    broken: list[tuple[str, str]]
    finished: bool
    stopped: str
    people: int


class ProgressLines:
    """In place of a bar where there is no terminal: a line in the log, now and then.

    Args:
        total: files to encode.
    """

    def __init__(self, total: int, log: logging.Logger, seconds: float = LINE_SECONDS) -> None:
        self.total, self.log, self.seconds = total, log, seconds
        self.done, self.told = 0, time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told >= self.seconds:
            self.told = time.monotonic()
            self.log.info(f"{self.done} of {self.total} files encoded")


class Alone:
    """The only process: `utils.distributed.Processes` for encoders without torch."""

    rank, size, is_rank_0 = 0, 1, True

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def from_rank_0(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def encode_parts(
    results: Iterable[Result],
    store: Store,
    replaced: dict[str, set[str]],
    processes: Processes | Alone,
    bar: tqdm | ProgressLines,
    seconds: float = SECONDS,
) -> list[Report]:
    """Take encoded chunks, and commit parts as they become ready. All processes call it. Returns
    the reports of all processes; one with `stopped` ends it early.

    Args:
        results: encoded while they are taken.
        store: of rank 0 only is written.
        replaced: from `apply_plan`, on rank 0.
    """
    reports: list[Report] = []
    with StopRequest() as stop:
        for report in _filled(results, store, stop, bar, seconds):
            together = processes.all_gather_objects(report)
            if processes.is_rank_0:
                _commit(store, together, replaced)
            reports += together
            if all(r.finished for r in together) or any(r.stopped for r in together):
                break
    return reports


@dataclass
class _Waiting:
    """People that are encoded and not yet in a part."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    files: list[Done] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def add(self, chunk: Chunk, features: np.ndarray) -> None:
        self.rows += chunk.rows
        self.features.append(features)
        self.files += chunk.done
        self.broken += chunk.broken

    def write(self, store: Store, width: int, finished: bool, stopped: str) -> Report:
        """Write them as a part, and report it. Raises UserError if the disk is full."""
        part = None
        if self.rows or self.files:
            items = pa.Table.from_pylist(self.rows, schema=schema_with(store.attributes()))
            features = np.concatenate([np.zeros((0, width), np.float16), *self.features])
            part = write_part(store.folder, items, features, files_table(self.files))
        touched = {row["path"] for row in self.rows} | {path for path, _ in self.broken}
        touched |= {done.job.path for done in self.files}
        return Report(part, touched, self.broken, finished, stopped, len(self.rows))


def _filled(
    results: Iterable[Result],
    store: Store,
    stop: StopRequest,
    bar: tqdm | ProgressLines,
    seconds: float,
) -> Iterator[Report]:
    """Write parts one after the other, each in a thread while the next one is encoded; after the
    last, reports without one, as other processes may have more to do."""
    columns = {name: column_of(name) for name in store.attributes()}
    width = store.manifest["encoder"]["embed_dim"]
    waiting, began = _Waiting(), time.monotonic()
    writing: Future[Report] | None = None
    with ThreadPoolExecutor(1) as thread:
        for chunk, feature_BD, guesses in results:
            full = bool(waiting.rows) and len(waiting.rows) + len(chunk.rows) > ROWS
            late = time.monotonic() - began > seconds
            if writing is not None and (writing.done() or full or late):
                yield writing.result()
                writing = None
            if full or late:
                writing = thread.submit(waiting.write, store, width, False, "")
                waiting, began = _Waiting(), time.monotonic()
            _add_attributes(chunk, guesses, columns)
            waiting.add(chunk, feature_BD)
            bar.update(len(chunk.done))
            if stop.name:
                break
        if writing is not None:
            yield writing.result()
        yield waiting.write(store, width, True, stop.name)
    while True:
        yield _Waiting().write(store, width, True, stop.name)


def _add_attributes(chunk: Chunk, guesses: Guesses, columns: Mapping[str, str]) -> None:
    """Give the rows of a chunk their attributes: what the encoder guesses, or the label."""
    for name, (classes, scores) in guesses.items():
        column, score_column = columns[name], f"{columns[name]}_score"
        for row, label, score in zip(chunk.rows, classes, scores, strict=True):
            row[column], row[score_column] = label, score
    for row in chunk.rows:
        for name, label in row.pop("labels").items():
            row[columns[name]], row[f"{columns[name]}_score"] = label, SURE


def _commit(store: Store, reports: Sequence[Report], replaced: dict[str, set[str]]) -> None:
    """Add the new parts; rows that they replace leave the old ones."""
    touched = set().union(*(report.touched for report in reports))
    parts: list[Part | None] = []
    for part in store.parts:
        paths = replaced.get(part["name"], set()) & touched
        if not paths:
            parts.append(part)
            continue
        new = store.without(part, paths)
        rest = replaced.pop(part["name"]) - paths
        if new is not None and rest:
            replaced[new["name"]] = rest
        parts.append(new)
    new_parts = [report.part for report in reports if report.part is not None]
    if new_parts or len(parts) != len(store.parts) or touched:
        store.commit([*parts, *new_parts])
