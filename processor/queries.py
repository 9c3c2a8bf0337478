"""Results caption by caption: test_queries.npz beside a checkpoint.

A NumPy archive. For each split and gallery, `<split>/<gallery>/<what>` holds an array over that
gallery's captions in the order of the data set: `pid` (identity), `first` (rank of the first match,
counted from 1), `ap` and `inp` in [0, 1]; NaN for a caption without a match.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError
from utils.files import write_atomically
from utils.metrics import Ranked

COLUMNS = ("first", "ap", "inp")  # of `query_metrics`


def per_query(split: str, galleries: dict[str, Ranked]) -> dict[str, np.ndarray]:
    """The arrays of one split's galleries."""
    arrays = {}
    for name, ranked in galleries.items():
        arrays[f"{split}/{name}/pid"] = ranked.pids_Q.numpy()
        for column, values in zip(COLUMNS, ranked.rows_Q3.unbind(1), strict=True):
            arrays[f"{split}/{name}/{column}"] = values.numpy()
    return arrays


def write_queries(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the archive, whole or not at all."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_queries(path: Path, split: str, gallery: str) -> Ranked:
    """One gallery's results. Raises UserError if they are not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = sorted({name.rsplit("/", 1)[0] for name in archive.files})
            if f"{split}/{gallery}" not in names:
                raise UserError(f"{path}: no '{split}/{gallery}'; it has {', '.join(names)}")
            columns = [archive[f"{split}/{gallery}/{c}"] for c in COLUMNS]
            pids = archive[f"{split}/{gallery}/pid"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no results of test.py: {error}") from None
    rows_Q3 = torch.stack([torch.from_numpy(c) for c in columns], dim=1)
    return Ranked(rows_Q3, torch.from_numpy(pids), gallery=0)
