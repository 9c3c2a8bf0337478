"""Results of an evaluation: test_results.json (metrics) and test_queries.npz (every caption).

Both are in the checkpoint's folder. Files of other checkpoints start with their name, for example
best_test_queries.npz.

The NumPy archive has arrays `<split>/<gallery>/<column>` over the captions of a gallery, in the
order of the data set: `pid` (identity), `first` (rank of the first match, from 1), `ap` and `inp`
in [0, 1]; NaN for a caption without a match. `images` is the number of images in the gallery.

Both files have a random id, `evaluation`. If test.py is killed between the two files, their ids
differ, and readers refuse them.
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

from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import open_file, write_atomically
from utils.metrics import METRICS, SHOWN, Ranked
from utils.uncertainty import bootstrap

COLUMNS = ("first", "ap", "inp")  # of `query_metrics`
EVALUATION_ID = "evaluation"  # the entry of both files that tells evaluations apart
AGAIN = "evaluate the run again (test.py)"
OLD_NAMES = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}  # in results of older versions
MAX_CAPTIONS = 2**23  # per gallery; arrays of that length take a quarter of a GB
# By --val_dataset: the protocols that a run follows, and the checkpoint of each.
CHECKPOINTS = {
    "test": {"paper": "best.pth"},
    "heldout": {"clean": "best.pth"},
    "val": {"val": "best.pth"},
    "last": {"last": "best.pth"},
    "both": {"paper": "best_test.pth", "clean": "best.pth"},
}


def stem(checkpoint: str) -> str:
    """The start of the names of a checkpoint's results: "test" for best.pth."""
    return "test" if checkpoint == "best.pth" else Path(checkpoint).stem


def per_query(split: str, galleries: dict[str, Ranked]) -> dict[str, np.ndarray]:
    """The archive's arrays for one split."""
    arrays = {}
    for name, ranked in galleries.items():
        arrays[f"{split}/{name}/pid"] = ranked.pids_Q.numpy()
        arrays[f"{split}/{name}/images"] = np.array(ranked.gallery)
        for column, values in zip(COLUMNS, ranked.rows_Q3.unbind(1), strict=True):
            arrays[f"{split}/{name}/{column}"] = values.numpy()
    return arrays


def intervals(ranked: Ranked, samples: int, seed: int) -> dict[str, list[float]]:
    """95 % confidence interval of each metric, from bootstrap `samples` of identities."""
    low, high = bootstrap(ranked.percentages(), ranked.pids_Q, samples, seed).tolist()
    return {name: [a, b] for name, a, b in zip(SHOWN, low, high, strict=True)}


def write_results(checkpoint: Path, results: dict[str, Any], queries: dict[str, np.ndarray]) -> str:
    """Write the metrics and the archive next to a checkpoint, atomically; neither if the disk is
    full. Returns a message."""
    name, evaluation = stem(checkpoint.name), secrets.token_hex(8)
    target = checkpoint.parent / f"{name}_results.json"
    text = json.dumps({EVALUATION_ID: evaluation, **results}, indent=2)
    archive = checkpoint.parent / f"{name}_queries.npz"
    arrays: dict[str, Any] = {**queries, EVALUATION_ID: np.array(evaluation)}

    def write_archive() -> None:
        write_atomically(archive, lambda file: np.savez_compressed(file, **arrays))

    write_atomically(target, lambda file: file.write(text.encode()), before=write_archive)
    return f"metrics written to {target}, results of every caption to {archive.name}"


def read_queries(path: Path, split: str, gallery: str) -> Ranked:
    """Results of one gallery. Their `gallery` is 0 if the file lacks the number of images.

    Raises UserError if they are missing, or not as `per_query` makes them.
    """
    with _open_archive(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.NameToInfo}
        galleries = sorted({name.rsplit("/", 1)[0] for name in names if "/" in name})
        if f"{split}/{gallery}" not in galleries:
            raise UserError(f"{path}: no '{split}/{gallery}'; it has {', '.join(galleries)}")
        *required, size = (f"{split}/{gallery}/{name}" for name in (*COLUMNS, "pid", "images"))
        *columns, pids = (_read_array(archive, name) for name in required)
        images = _read_array(archive, size) if size in names else np.array(0)
        if images.shape != () or not {images.dtype.kind, pids.dtype.kind} <= set("iu"):
            raise ValueError("identities, or a number of images, that are not whole numbers")
        if pids.ndim != 1 or not len(pids) or any(c.shape != pids.shape for c in columns):
            raise ValueError("arrays of different lengths, or empty")
        rows_Q3 = torch.from_numpy(np.stack(columns, 1).astype(np.float64))
        first_Q, precisions_Q2 = rows_Q3[:, 0], rows_Q3[:, 1:]
        bad_precisions = ((precisions_Q2 < 0) | (precisions_Q2 > 1)).any()
        if (first_Q < 1).any() or first_Q.isinf().any() or bad_precisions:
            raise ValueError("ranks below 1, or precisions outside of 0 to 1")
        return Ranked(rows_Q3, torch.from_numpy(pids.astype(np.int64, casting="safe")), int(images))


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive of results. Errors of opening and of reading become a UserError."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)") from None
    except UserError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy raise many types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: not results of test.py: {reason}; {AGAIN}") from None


def _read_array(archive: zipfile.ZipFile, name: str, kinds: str = "iuf") -> np.ndarray:
    """Read a 1-D array or a single value. A small record can expand to a huge array, so all sizes
    are checked before anything is decompressed or allocated."""
    record = archive.getinfo(f"{name}.npy")
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that test.py does not use")
    with archive.open(record) as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"{name} has version {version} of the format; test.py writes 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in kinds or len(shape) > 1 or dtype.itemsize > 8 and dtype.kind != "U":
            raise ValueError(f"{name} is not of the type that test.py writes")
        size = dtype.itemsize * (shape[0] if shape else 1)
        if file.tell() + size != record.file_size or size > 8 * MAX_CAPTIONS:
            raise ValueError(f"{name} has a wrong size, or more than {MAX_CAPTIONS} values")
        return np.frombuffer(file.read(), dtype).reshape(shape)


def read_results(path: Path, archive: Path) -> dict[str, Any]:
    """Read test_results.json. Metrics of older versions get their current names.

    Args:
        archive: test_queries.npz of the same checkpoint.

    Raises UserError if the file is missing or not written by test.py, or if the two files are of
    different evaluations.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; evaluate the run first (test.py)")
    results = read_json_file(path, "not results of test.py: ", f"; {AGAIN}")
    if not isinstance(results, dict):
        raise UserError(
            f"{path}: not results of test.py: it holds a {type(results).__name__}; {AGAIN}"
        )
    if os.path.lexists(archive):
        with _open_archive(archive) as arrays:
            has_id = f"{EVALUATION_ID}.npy" in arrays.NameToInfo
            evaluation = str(_read_array(arrays, EVALUATION_ID, "U")) if has_id else None
        if evaluation != results.get(EVALUATION_ID):
            raise UserError(
                f"{path} and {archive.name} are of different evaluations, since one was stopped "
                f"between the two; {AGAIN}"
            )
    for split in _child_dicts(results, "splits"):
        for gallery in _child_dicts(split, "galleries"):
            for old_name in OLD_NAMES.keys() & gallery.keys():
                gallery[OLD_NAMES[old_name]] = gallery.pop(old_name)
    return results


def _child_dicts(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The dicts among the values of `parent[key]`; none if that is not a dict."""
    value = parent.get(key)
    children = value.values() if isinstance(value, dict) else ()
    return [child for child in children if isinstance(child, dict)]


def check_metrics(results: dict[str, Any], path: Path) -> None:
    """Raise UserError unless all of `results` (of `read_results`) is as test.py writes it."""
    if problem := _find_problem(results):
        raise UserError(f"{path}: not results of test.py: {problem}; {AGAIN}")


def _find_problem(results: dict[str, Any]) -> str:
    """What is wrong, or nothing."""
    if not isinstance(results.get("splits"), dict) or "test" not in results["splits"]:
        return "it has no 'splits' with 'test'"
    for key in ("protocol", "data"):
        if not isinstance(results.get(key, {}), dict):
            return f"its '{key}' is not an object"
    if not isinstance(results.get("data", {}).get("changed"), (dict, type(None))):
        return "its 'data' has no object under 'changed'"
    if not isinstance(results.get("epoch"), (int, type(None))):
        return "its 'epoch' is not a number"
    for split, content in results["splits"].items():
        galleries = content.get("galleries") if isinstance(content, dict) else None
        if not isinstance(galleries, dict) or not galleries:
            return f"{split} has no galleries"
        for name, metrics in galleries.items():
            for key in (*METRICS, "queries", "gallery"):
                value: Any = metrics.get(key) if isinstance(metrics, dict) else None
                limit = 2**31 if key in ("queries", "gallery") else 100.001  # 100 plus rounding
                if type(value) not in (int, float) or not 0 <= value <= limit:
                    return f"{split}, {name}: {key} is {value!r:.60}"
        accuracy = content.get("attribute_accuracy") or {}
        rows = list(accuracy.values()) if isinstance(accuracy, dict) else [()]
        if not all(
            isinstance(row, dict)
            and list(row) == list(rows[0])
            and all(type(v) in (int, float) and 0 <= v <= 100.001 for v in row.values())
            for row in rows
        ):
            return f"{split}: its attribute_accuracy is not a table"
    return ""
