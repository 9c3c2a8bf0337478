"""One log: the console and the run's train_log.txt say the same; progress bars stay below it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

LOGGER_NAME = "aea_firm"
LAST_WORDS = logging.CRITICAL


class _AboveBars(logging.Handler):
    """A console that is gone or full loses lines, not the run."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except BrokenPipeError:  # what read it has ended; later lines go nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError:
            pass


class _File(logging.FileHandler):
    """A full disk loses lines of the log, not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{self.baseFilename}: {sys.exc_info()[1]}")


class _FileForLast(_File):
    """Of a process that does not write the log, but for its last words."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == LAST_WORDS:
            super().emit(record)


def note_in_file(message: str) -> None:
    """Add a line to the run's log, which the console has in another way."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in logger.handlers:
        if isinstance(handler, _File):
            handler.handle(logger.makeRecord(LOGGER_NAME, LAST_WORDS, "", 0, message, (), None))


def setup_logger(log_file: Path | None = None, rank: int = 0) -> logging.Logger:
    """The project's logger: plain lines on the console, the same with the time in `log_file`.

    Of several processes (`rank`) the others than the first write warnings alone, to the console.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    console = _AboveBars()
    if rank:
        console.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    logger.addHandler(console)
    if log_file is not None:
        handler = (_FileForLast if rank else _File)(log_file, encoding="utf-8", delay=bool(rank))
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger
