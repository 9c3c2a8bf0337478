"""One log: the console and the run's train_log.txt say the same; progress bars stay below it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from utils.text import Lines, visible

LOGGER_NAME = "aea_firm"
LAST_WORDS = logging.CRITICAL


class _Plain(logging.Formatter):
    """Of a message one line, whatever stands in it, unless it is `Lines`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = visible(record.message, lines=isinstance(record.msg, Lines))
        return super().formatMessage(record)


class _AboveBars(logging.Handler):
    """The console, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class _File(logging.FileHandler):
    """A full disk delays lines of the log, and ends no run."""

    def _open(self) -> TextIO:
        from utils.files import append  # which logs, too

        return append(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        say(f"{self.baseFilename}: {sys.exc_info()[1]}")


class _FileForLast(_File):
    """Of a process that does not write the log, but for its last words."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == LAST_WORDS:
            super().emit(record)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text at once, on stdout if no `file` is given; control characters but line breaks are
    shown by their numbers.

    A console that is gone or full gets no more lines, and ends no run.
    """
    file = file or sys.stdout
    try:
        tqdm.write(visible(text, lines=True), file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def note_in_file(message: str) -> None:
    """Add a line to the run's log, which the console has in another way."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in logger.handlers:
        if isinstance(handler, _File):
            handler.handle(logger.makeRecord(LOGGER_NAME, LAST_WORDS, "", 0, message, (), None))


def setup_logger(log_file: Path | None = None, rank: int = 0) -> logging.Logger:
    """The project's logger: plain lines on the console, the same with the time in `log_file`.
    Raises UserError if that cannot be opened, or is a link.

    Of several processes (`rank`) the others than the first write warnings alone, to the console.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    console = _AboveBars()
    console.setFormatter(_Plain(f"rank {rank}: %(message)s" if rank else None))
    logger.addHandler(console)
    if log_file is not None:
        handler = (_FileForLast if rank else _File)(log_file, delay=bool(rank))
        handler.setFormatter(_Plain("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger
