"""One log: the console and the run's train_log.txt say the same; progress bars stay below it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

LOGGER_NAME = "aea_firm"


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def setup_logger(log_file: Path | None = None) -> logging.Logger:
    """The project's logger: plain lines on the console, the same with the time in `log_file`."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(_AboveBars())
    if log_file is not None:
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def new_run_dir(output_dir: str, dataset_name: str, name: str) -> Path:
    """Make `<output_dir>/<dataset_name>/<time>_<name>/`; runs of one second get a number each."""
    parent = Path(output_dir, dataset_name)
    stem = f"{time.strftime('%Y%m%d_%H%M%S')}_{name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = parent / (stem if number == 1 else f"{stem}_{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror} ({parent})") from None
    raise UserError(f"--output_dir {output_dir}: no free folder name for {stem}")
