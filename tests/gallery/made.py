"""Small galleries with known features, and galleries of mini-TBAGPR."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from gallery.index import unit
from gallery.records import id_of, schema_with
from gallery.store import Gallery

ATTRIBUTES = ("gender", "hair colour")
NASTY = ["it's", 'a "b"', "50 %", "a_b", "back\\slash", "new\nline", "ünï 人", "'; drop", "1=1) or (1=1"]  # fmt: skip


def made_items(count: int, seed: int = 0) -> pa.Table:
    """Items with values of every type, nulls among them, and texts that need escapes."""
    random = np.random.default_rng(seed)

    def some(values: list, share: float = 0.25) -> list:
        return [None if random.random() < share else values[random.integers(len(values))] for _ in range(count)]  # fmt: skip

    paths = [f"{'ab'[n % 2]}/{n:04d}.jpg" for n in range(count)]
    times = some([0.0, 0.5, 12.5, 1e-3, 90.0])
    columns = {
        "id": [id_of(path, time, None) for path, time in zip(paths, times, strict=True)],
        "path": paths,
        "frame_time": times,
        "left": some([0, 5, 80]), "top": some([0, 7]), "width": some([20, 64]), "height": some([50, 128]),
        "size": [1000 + n for n in range(count)],
        "mtime_ns": [10**18 + n * 10**10 for n in range(count)],
        "digest": [f"{n:016x}" for n in range(count)],
        "taken": [None if t is None else 1_700_000_000 + 3600 * t for t in some([0, 1, 2])],
        "view": some(["aerial", "ground"]),
        "camera": some(NASTY),
        "source": some(["AG-ReID", "G2APS", *NASTY]),
        "identity": [str(n // 4) for n in range(count)],
        "gender": some(["female", "male"]),
        "gender_score": some([0.5, 0.9, 0.1]),
        "hair colour": some(["black", "red"]),
        "hair colour_score": some([0.25, 0.9]),
    }  # fmt: skip
    return pa.table(columns, schema=schema_with(ATTRIBUTES))


def made_features(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Unit features [N, D] float16, four of each person near each other."""
    random = np.random.default_rng(seed)
    persons = random.standard_normal((-(-count // 4), width)).repeat(4, axis=0)[:count]
    return unit(persons + 0.3 * random.standard_normal((count, width))).astype(np.float16)


def path_of(gallery: Gallery, row: int) -> str:
    """The path of the picture of a row."""
    return os.path.join(gallery.manifest["root"], gallery.items["path"][row].as_py())
