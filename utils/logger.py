"""What is said: lines on the console, above progress bars, and in the run's log if there is one."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from utils.text import visible

LOGGER_NAME = "aea_firm"
LAST_WORDS = logging.CRITICAL


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
        if isinstance(handler, logging.FileHandler):
            handler.handle(logger.makeRecord(LOGGER_NAME, LAST_WORDS, "", 0, message, (), None))
