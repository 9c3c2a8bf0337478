"""Processor cores and open files, for programs with and without torch."""

from __future__ import annotations

import os
import resource

from utils.errors import UserError

WANTED_FILES, MIN_FILES = 4096, 256  # open files of a process


def cores() -> int:
    """Number of processor cores that this process may use: a scheduler may allow it only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(num_workers: int) -> None:
    """Raise this process's limit on open files. Raises UserError if it stays too low for loader
    processes: they pass batches as open files, and would wait forever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        soft = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if num_workers and soft < MIN_FILES:
        raise UserError(
            f"this shell allows {soft} open files at once (ulimit -n), and loader processes need "
            f"{MIN_FILES}: allow more (ulimit -n 4096), or give --num_workers 0"
        )
