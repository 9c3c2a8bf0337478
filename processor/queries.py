"""Results caption by caption: test_queries.npz beside a checkpoint.

A NumPy archive. For each split and gallery, `<split>/<gallery>/<what>` holds an array over that
gallery's captions in the order of the data set: `pid` (identity), `first` (rank of the first match,
counted from 1), `ap` and `inp` in [0, 1]; NaN for a caption without a match. `images` is the number
of images in the gallery. Other checkpoints' archives have their names: best_test_queries.npz.

`evaluation` is a mark of the evaluation, which the figures in test_results.json have too: a kill
between the two files leaves them of two evaluations, and who reads both must know.
"""

from __future__ import annotations

import json
import secrets
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.documents import load_json
from utils.errors import UserError
from utils.files import open_file, read_file, write_atomically
from utils.metrics import Ranked

COLUMNS = ("first", "ap", "inp")  # of `query_metrics`
MARK = "evaluation"
LARGEST = 2**30  # bytes of an archive's arrays; those of 100,000 captions on 8 galleries have 26 MB
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
    name, mark = stem(checkpoint.name), secrets.token_hex(8)
    target = checkpoint.parent / f"{name}_results.json"
    text = json.dumps({MARK: mark, **results}, indent=2)
    archive = checkpoint.parent / f"{name}_queries.npz"
    marked = {**queries, MARK: np.array(mark)}
    write_atomically(archive, lambda file: np.savez_compressed(file, **marked))
    write_atomically(target, lambda file: file.write(text.encode()))
    return f"written to {target} and, caption by caption, to {archive.name} beside it"


def read_queries(path: Path, split: str, gallery: str) -> Ranked:
    """One gallery's results; `gallery` is 0 where the file does not say its size.

    Raises UserError if they are not there, or not what `per_query` makes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)")
    try:
        with _opened(path) as archive:
            names = sorted({name.rsplit("/", 1)[0] for name in archive.files if "/" in name})
            if f"{split}/{gallery}" not in names:
                raise UserError(f"{path}: no '{split}/{gallery}'; it has {', '.join(names)}")
            found = {
                name: archive[f"{split}/{gallery}/{name}"]
                for name in (*COLUMNS, "pid", "images")
                if name != "images" or f"{split}/{gallery}/images" in archive.files
            }
        images = int(found.pop("images", 0))
        pids = torch.from_numpy(found.pop("pid").astype(np.int64, casting="safe"))
        columns = [c.astype(np.float64, casting="same_kind") for c in found.values()]
        rows_Q3 = torch.stack([torch.from_numpy(c) for c in columns], 1)
        if rows_Q3.shape != (len(pids), 3) or pids.ndim != 1 or not len(pids):
            raise ValueError("arrays of different lengths, or empty")
        first_Q, shares_Q2 = rows_Q3[:, 0], rows_Q3[:, 1:]
        if (
            (first_Q < 1).any()
            or first_Q.isinf().any()
            or ((shares_Q2 < 0) | (shares_Q2 > 1)).any()
        ):
            raise ValueError("ranks below 1, or precisions outside of 0 to 1")
    except ARCHIVE_FAULTS as error:
        raise UserError(f"{path}: no results of test.py: {error}") from None
    return Ranked(rows_Q3, pids, images)


# What NumPy and zipfile raise for archives that are damaged, or made to be.
ARCHIVE_FAULTS = (
    OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, EOFError, AttributeError,
    MemoryError, SyntaxError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    """Raises one of `ARCHIVE_FAULTS`, also if its arrays are larger than any of ours."""
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        size = sum(record.file_size for record in archive.infolist())
        file.seek(0)
        if file.read(4) != b"PK\3\4":  # or NumPy would take it for a pickle
            raise ValueError("it does not begin as an archive")
    if size > LARGEST:
        raise ValueError(f"its arrays have {size} bytes; those of test.py have {LARGEST} at most")
    return np.load(path, allow_pickle=False)


def read_results(path: Path, archive: Path) -> dict[str, Any]:
    """The figures that test.py has written, whose results caption by caption are in `archive`.

    Raises UserError if there are none, or none that it writes, or if the two files are of different
    evaluations.
    """
    try:
        results = load_json(read_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no results of test.py: {error}") from None
    if not isinstance(results, dict):
        raise UserError(f"{path}: no results of test.py: it holds a {type(results).__name__}")
    if archive.is_file():
        try:
            with _opened(archive) as arrays:
                mark = str(arrays[MARK]) if MARK in arrays.files else None
        except ARCHIVE_FAULTS as error:
            raise UserError(f"{archive}: no results of test.py: {error}") from None
        if mark != results.get(MARK):
            raise UserError(
                f"{path} and {archive.name} are of different evaluations, since one was cut off "
                "between the two; evaluate the run again (test.py)"
            )
    return results


def check_figures(results: dict[str, Any], path: Path) -> None:
    """Raise UserError unless all that `read_results` has found is as test.py writes it."""
    if wrong := _wrong(results):
        raise UserError(f"{path}: no results of test.py: {wrong}; evaluate the run again")


def _wrong(results: dict[str, Any]) -> str:
    if not isinstance(results.get("splits"), dict) or "test" not in results["splits"]:
        return "it has no 'splits' with 'test'"
    for key in ("protocol", "data"):
        if not isinstance(results.get(key, {}), dict):
            return f"its '{key}' is no object"
    if not isinstance(results.get("epoch"), (int, type(None))):
        return "its 'epoch' is no number"
    for split, content in results["splits"].items():
        galleries = content.get("galleries") if isinstance(content, dict) else None
        if not isinstance(galleries, dict) or not galleries:
            return f"{split} has no galleries"
        for name, figures in galleries.items():
            for key in ("r1", "r5", "r10", "mAP", "mINP", "queries", "gallery"):
                value = figures.get(key) if isinstance(figures, dict) else None
                if type(value) not in (int, float) or not abs(value) < float("inf"):
                    return f"{split}, {name}: {key} is {value!r:.60}"
        accuracy = content.get("attribute_accuracy") or {}
        rows = list(accuracy.values()) if isinstance(accuracy, dict) else [None]
        if not all(
            isinstance(row, dict)
            and list(row) == list(rows[0])
            and all(type(value) in (int, float) for value in row.values())
            for row in rows
        ):
            return f"{split}: its attribute_accuracy is no table"
    return ""
