"""The run's log: the same lines on the console, above progress bars, and in train_log.txt."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from pathlib import Path

from utils.console import FINAL_MESSAGE, LOGGER_NAME, say
from utils.files import append
from utils.text import Multiline, visible


def setup_logger(log_file: Path | None = None, rank: int = 0) -> logging.Logger:
    """Set up the project's logger: lines on the console, and with the time in `log_file`.

    Ranks above 0 log only warnings, and only to the console. Raises UserError if `log_file` cannot
    be opened, or is a link.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    console = _Console()
    console.setFormatter(_Formatter(f"rank {rank}: %(message)s" if rank else None))
    logger.addHandler(console)
    if log_file is not None:
        handler = (_FinalMessageFile if rank else _File)(log_file, delay=bool(rank))
        handler.setFormatter(_Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class _Formatter(logging.Formatter):
    """Escape control characters of a message, and line breaks unless it is `Multiline`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = visible(record.message, lines=isinstance(record.msg, Multiline))
        return super().formatMessage(record)


class _Console(logging.Handler):
    """The console, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class _File(logging.FileHandler):
    """The log file. A full disk delays its lines, but does not end the run."""

    def _open(self) -> TextIOWrapper:
        return append(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        say(f"{self.baseFilename}: {sys.exc_info()[1]}")


class _FinalMessageFile(_File):
    """The log file of a process other than rank 0, which writes only its final message."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == FINAL_MESSAGE:
            super().emit(record)
