"""Results caption by caption: test_queries.npz beside a checkpoint.

A NumPy archive. For each split and gallery, `<split>/<gallery>/<what>` holds an array over that
gallery's captions in the order of the data set: `pid` (identity), `first` (rank of the first match,
counted from 1), `ap` and `inp` in [0, 1]; NaN for a caption without a match. `images` is the number
of images in the gallery. Other checkpoints' archives have their names: best_test_queries.npz.

`evaluation` is a mark of the evaluation, which the metrics in test_results.json have too: a kill
between the two files leaves them of two evaluations, and who reads both must know.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.documents import load_json
from utils.errors import UserError
from utils.files import open_file, read_file, write_atomically
from utils.metrics import METRICS, Ranked

COLUMNS = ("first", "ap", "inp")  # of `query_metrics`
MARK, AGAIN = "evaluation", "evaluate the run again (test.py)"
FORMER = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}  # names in results of older versions
MOST = 2**23  # captions of a gallery; its arrays take a quarter of a GB then
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
    """Write the metrics as JSON and the archive beside a checkpoint, each whole or not at all, and
    none if the disk is full. Returns what to tell."""
    name, mark = stem(checkpoint.name), secrets.token_hex(8)
    target = checkpoint.parent / f"{name}_results.json"
    text = json.dumps({MARK: mark, **results}, indent=2)
    archive = checkpoint.parent / f"{name}_queries.npz"
    marked: dict[str, Any] = {**queries, MARK: np.array(mark)}

    def write_archive() -> None:
        write_atomically(archive, lambda file: np.savez_compressed(file, **marked))

    write_atomically(target, lambda file: file.write(text.encode()), before=write_archive)
    return f"written to {target} and, caption by caption, to {archive.name} beside it"


def read_queries(path: Path, split: str, gallery: str) -> Ranked:
    """One gallery's results; `gallery` is 0 where the file does not say its size.

    Raises UserError if they are not there, or not what `per_query` makes.
    """
    with _opened(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.NameToInfo}
        galleries = sorted({name.rsplit("/", 1)[0] for name in names if "/" in name})
        if f"{split}/{gallery}" not in galleries:
            raise UserError(f"{path}: no '{split}/{gallery}'; it has {', '.join(galleries)}")
        wanted = [f"{split}/{gallery}/{name}" for name in (*COLUMNS, "pid", "images")]
        *columns, pids = (_array(archive, name) for name in wanted[:-1])
        images = _array(archive, wanted[-1]) if wanted[-1] in names else np.array(0)
        if images.shape != () or not {images.dtype.kind, pids.dtype.kind} <= set("iu"):
            raise ValueError("identities, or a number of images, that are no whole numbers")
        if pids.ndim != 1 or not len(pids) or any(c.shape != pids.shape for c in columns):
            raise ValueError("arrays of different lengths, or empty")
        rows_Q3 = torch.from_numpy(np.stack(columns, 1).astype(np.float64))
        first_Q, shares_Q2 = rows_Q3[:, 0], rows_Q3[:, 1:]
        if (
            (first_Q < 1).any()
            or first_Q.isinf().any()
            or ((shares_Q2 < 0) | (shares_Q2 > 1)).any()
        ):
            raise ValueError("ranks below 1, or precisions outside of 0 to 1")
        return Ranked(rows_Q3, torch.from_numpy(pids.astype(np.int64, casting="safe")), int(images))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive of results. Raises UserError, also for whatever is wrong with what is read."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)") from None
    except UserError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy raise all kinds
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: no results of test.py: {told}; {AGAIN}") from None


def _array(archive: zipfile.ZipFile, name: str, kinds: str = "iuf") -> np.ndarray:
    """An array of an archive, in a row or a single value. A small record may stand for a large one,
    so nothing is unpacked, nor room made for it, before its sizes are known to be right."""
    record = archive.getinfo(f"{name}.npy")
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that test.py does not use")
    with archive.open(record) as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"{name} has version {version} of the format; test.py writes 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in kinds or len(shape) > 1 or dtype.itemsize > 8 and dtype.kind != "U":
            raise ValueError(f"{name} is not of the kind that test.py writes")
        size = dtype.itemsize * (shape[0] if shape else 1)
        if file.tell() + size != record.file_size or size > 8 * MOST:
            raise ValueError(f"{name} has not the size that it says, or more than {MOST} values")
        return np.frombuffer(file.read(), dtype).reshape(shape)


def read_results(path: Path, archive: Path) -> dict[str, Any]:
    """The metrics that test.py has written, by the names of today if an older version wrote them.

    `archive` has their results caption by caption.

    Raises UserError if there are none, or none that it writes, or if the two files are of different
    evaluations.
    """
    try:
        results = load_json(read_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)") from None
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: no results of test.py: {told}; {AGAIN}") from None
    if not isinstance(results, dict):
        raise UserError(
            f"{path}: no results of test.py: it holds a {type(results).__name__}; {AGAIN}"
        )
    if os.path.lexists(archive):
        with _opened(archive) as arrays:
            known = f"{MARK}.npy" in arrays.NameToInfo
            mark = str(_array(arrays, MARK, "U")) if known else None
        if mark != results.get(MARK):
            raise UserError(
                f"{path} and {archive.name} are of different evaluations, since one was cut off "
                f"between the two; {AGAIN}"
            )
    for split in _objects(results, "splits"):
        for gallery in _objects(split, "galleries"):
            for former in FORMER.keys() & gallery.keys():
                gallery[FORMER[former]] = gallery.pop(former)
    return results


def _objects(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects in an entry of an object; none where it is something else."""
    found = parent.get(key)
    children = found.values() if isinstance(found, dict) else ()
    return [child for child in children if isinstance(child, dict)]


def check_metrics(results: dict[str, Any], path: Path) -> None:
    """Raise UserError unless all that `read_results` has found is as test.py writes it."""
    if wrong := _wrong(results):
        raise UserError(f"{path}: no results of test.py: {wrong}; {AGAIN}")


def _wrong(results: dict[str, Any]) -> str:
    if not isinstance(results.get("splits"), dict) or "test" not in results["splits"]:
        return "it has no 'splits' with 'test'"
    for key in ("protocol", "data"):
        if not isinstance(results.get(key, {}), dict):
            return f"its '{key}' is no object"
    if not isinstance(results.get("data", {}).get("changed"), (dict, type(None))):
        return "its 'data' has no object under 'changed'"
    if not isinstance(results.get("epoch"), (int, type(None))):
        return "its 'epoch' is no number"
    for split, content in results["splits"].items():
        galleries = content.get("galleries") if isinstance(content, dict) else None
        if not isinstance(galleries, dict) or not galleries:
            return f"{split} has no galleries"
        for name, metrics in galleries.items():
            for key in (*METRICS, "queries", "gallery"):
                value: Any = metrics.get(key) if isinstance(metrics, dict) else None
                most = 2**31 if key in ("queries", "gallery") else 100.001  # but for rounding
                if type(value) not in (int, float) or not 0 <= value <= most:
                    return f"{split}, {name}: {key} is {value!r:.60}"
        accuracy = content.get("attribute_accuracy") or {}
        rows = list(accuracy.values()) if isinstance(accuracy, dict) else [()]
        if not all(
            isinstance(row, dict)
            and list(row) == list(rows[0])
            and all(type(v) in (int, float) and 0 <= v <= 100.001 for v in row.values())
            for row in rows
        ):
            return f"{split}: its attribute_accuracy is no table"
    return ""
