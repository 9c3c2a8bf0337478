"""One log: the console and the run's train_log.txt say the same; progress bars stay below it."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from pathlib import Path

from utils.files import append
from utils.logger import LAST_WORDS, LOGGER_NAME, say
from utils.text import Lines, visible


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

    def _open(self) -> TextIOWrapper:
        return append(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        say(f"{self.baseFilename}: {sys.exc_info()[1]}")


class _FileForLast(_File):
    """Of a process that does not write the log, but for its last words."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == LAST_WORDS:
            super().emit(record)


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
