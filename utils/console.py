"""Print lines on the console, above progress bars, and tell which rank this process has.

It is apart from utils/run_log.py, because utils/errors.py needs it and run_log.py needs errors.py.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from utils.text import visible

LOGGER_NAME = "aea_firm"
FINAL_MESSAGE = logging.CRITICAL  # level of a message that every rank may write to the log file


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text and flush, to stdout unless `file` is given.

    Control characters are escaped, line breaks are not. If the console is closed or its disk is
    full, later lines are dropped and the run continues.
    """
    file = file or sys.stdout
    try:
        tqdm.write(visible(text, lines=True), file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def log_to_file(message: str) -> None:
    """Add a line to the run's log file, but not to the console, which shows it in another way."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logger.makeRecord(LOGGER_NAME, FINAL_MESSAGE, "", 0, message, (), None))


def process_rank() -> int:
    """The rank of this process, from the environment; 0 for a single process, whatever RANK is."""
    single = os.environ.get("WORLD_SIZE", "1").strip() in ("", "1")
    text = os.environ.get("RANK", "").strip()
    return int(text) if text.isdecimal() and not single else 0
