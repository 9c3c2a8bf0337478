"""Results caption by caption: test_queries.npz beside a checkpoint.

A NumPy archive. For each split and gallery, `<split>/<gallery>/<what>` holds an array over that
gallery's captions in the order of the data set: `pid` (identity), `first` (rank of the first match,
counted from 1), `ap` and `inp` in [0, 1]; NaN for a caption without a match. `images` is the number
of images in the gallery. Other checkpoints' archives have their names: best_test_queries.npz.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.files import write_atomically
from utils.metrics import Ranked

COLUMNS = ("first", "ap", "inp")  # of `query_metrics`
# By --val_dataset: the protocols that a run follows, and the checkpoint of each.
CHECKPOINTS = {
    "test": {"paper": "best.pth"},
    "heldout": {"clean": "best.pth"},
    "val": {"val": "best.pth"},
    "last": {"last": "best.pth"},
    "both": {"paper": "best_test.pth", "clean": "best.pth"},
}


def stem(checkpoint: str) -> str:
    """What the names of a checkpoint's results begin with: "test" for best.pth."""
    return "test" if checkpoint == "best.pth" else Path(checkpoint).stem


def per_query(split: str, galleries: dict[str, Ranked]) -> dict[str, np.ndarray]:
    """The arrays of one split's galleries."""
    arrays = {}
    for name, ranked in galleries.items():
        arrays[f"{split}/{name}/pid"] = ranked.pids_Q.numpy()
        arrays[f"{split}/{name}/images"] = np.array(ranked.gallery)
        for column, values in zip(COLUMNS, ranked.rows_Q3.unbind(1), strict=True):
            arrays[f"{split}/{name}/{column}"] = values.numpy()
    return arrays


def write_results(checkpoint: Path, results: dict[str, Any], queries: dict[str, np.ndarray]) -> str:
    """Write the figures as JSON and the archive beside a checkpoint, each whole or not at all.
    Returns what to tell."""
    name = stem(checkpoint.name)
    target = checkpoint.parent / f"{name}_results.json"
    write_atomically(target, lambda file: file.write(json.dumps(results, indent=2).encode()))
    archive = checkpoint.parent / f"{name}_queries.npz"
    write_atomically(archive, lambda file: np.savez_compressed(file, **queries))
    return f"written to {target} and, caption by caption, to {archive.name} beside it"


def read_queries(path: Path, split: str, gallery: str) -> Ranked:
    """One gallery's results; `gallery` is 0 where the file does not say its size.

    Raises UserError if they are not there, or not what `per_query` makes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = sorted({name.rsplit("/", 1)[0] for name in archive.files})
            if f"{split}/{gallery}" not in names:
                raise UserError(f"{path}: no '{split}/{gallery}'; it has {', '.join(names)}")
            found = {
                name: archive[f"{split}/{gallery}/{name}"]
                for name in (*COLUMNS, "pid", "images")
                if name != "images" or f"{split}/{gallery}/images" in archive.files
            }
        images = int(found.pop("images", 0))
        pids = torch.from_numpy(found.pop("pid").astype(np.int64, casting="safe"))
        rows_Q3 = torch.stack([torch.from_numpy(c.astype(np.float64)) for c in found.values()], 1)
        if rows_Q3.shape != (len(pids), 3) or pids.ndim != 1:
            raise ValueError("arrays of different lengths")
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, EOFError,
        AttributeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: no results of test.py: {error}") from None
    return Ranked(rows_Q3, pids, images)
