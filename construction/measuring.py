"""Measuring all pictures, by several processes, and only those that no earlier run has measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from construction.quality import UNREADABLE, VERSION, measure_file
from construction.records import Measure, Picture
from construction.store import Store, key_of
from utils.errors import UserError
from utils.interrupt import init_worker_signals

Group = tuple[str, list[tuple[int, Picture]]]  # a file, and the numbered pictures in it
BATCH = 2000  # files that are looked up at once
KIND = "measure"  # in the store
KEPT_EVERY = 5.0  # seconds of measuring that a kill may lose


def measured(
    frames: Iterable[Group], store: Store, crops: Path, shard: tuple[int, int], workers: int
) -> Iterator[list[tuple[int, Measure]]]:
    """Measures by the pictures' numbers, some files at a time, from the store or made now.

    Args:
        frames: every file with its pictures.
        crops: where boxes are cut to.
        shard: (k, n): measure only share k of n, and give no measures for what is missing then.
        workers: processes.

    Raises UserError, OSError if a crop cannot be written.
    """
    frames, (k, n) = iter(frames), shard
    measure = partial(_measure, crops=crops)
    # Spawned, because forked workers would inherit threads and memory.
    pool = (
        ProcessPoolExecutor(workers, get_context("spawn"), init_worker_signals, (os.getpid(), 0))
        if workers > 1
        else nullcontext()
    )
    with pool as executor:
        while batch := list(islice(frames, BATCH)):
            keys = [_key(*group) for group in batch]
            found = [_kept(store, key) for key in keys]
            todo = [
                i for i, kept in enumerate(found) if kept is None and int(keys[i], 16) % n == k - 1
            ]
            jobs = [batch[i] for i in todo]
            fresh: list[tuple[str, list[Measure]]] = []
            began = time.monotonic()
            try:
                made = executor.map(measure, jobs, chunksize=8) if executor else map(measure, jobs)
                for i, measures in zip(todo, made, strict=True):
                    found[i] = measures
                    if not any(UNREADABLE in m.problem for m in measures):
                        fresh.append((keys[i], measures))
                    if time.monotonic() - began > KEPT_EVERY:
                        store.put(KIND, fresh)
                        fresh, began = [], time.monotonic()
            except BrokenProcessPool:
                raise UserError(
                    "a process that measures pictures was killed, probably for its memory; run "
                    "the same command again with fewer --workers"
                ) from None
            except BaseException:
                if executor:
                    executor.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                store.put(KIND, fresh)
            yield [
                (number, measure_of)
                for (_, pictures), measures in zip(batch, found, strict=True)
                for (number, _), measure_of in zip(pictures, measures or (), strict=False)
            ]


def _measure(group: Group, crops: Path) -> list[Measure]:
    file, pictures = group
    return measure_file(file, [picture for _, picture in pictures], crops)


def _key(file: str, pictures: list[tuple[int, Picture]]) -> str:
    """The key of a file's measures: it changes with the file and with the boxes in it."""
    try:
        status = os.stat(file)
        facts = [status.st_size, status.st_mtime_ns]
    except OSError:
        facts = []
    names = [(picture.source, picture.name, picture.box) for _, picture in pictures]
    return key_of(VERSION, os.path.abspath(file), facts, names)


def _kept(store: Store, key: str) -> list[Measure] | None:
    """The measures of an earlier run, unless one of its crops has been deleted."""
    kept = store.get(KIND, key)
    measures = [Measure(*values) for values in kept or ()]
    if kept is None or not all(m.problem or os.path.exists(m.file) for m in measures):
        return None
    return measures
