"""history.jsonl in a run's folder: one line of JSON per completed epoch.

{"epoch": 3, "seconds": 25.1, "loss/total": 21.6, ..., "lr": 0.0003, "val": {"R@1": 23.3, ...}}

Values that are not finite are null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from utils.documents import load_json
from utils.files import read_file, write_atomically

HISTORY = "history.jsonl"


def write_epoch(folder: Path, row: dict[str, Any]) -> None:
    """Add an epoch after the earlier ones. Later epochs, of a run that was resumed from an older
    save, are removed. Raises UserError if the file cannot be written."""
    row = {k: None if type(v) is float and not math.isfinite(v) else v for k, v in row.items()}
    rows = [*(old for old in read_history(folder) if old["epoch"] < row["epoch"]), row]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_atomically(folder / HISTORY, lambda file: file.write(text.encode()))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The completed epochs, in order. Lines that are not epochs are skipped."""
    try:
        lines = read_file(folder / HISTORY).splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = load_json(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("epoch")) is int:
            rows.append(row)
    return rows
