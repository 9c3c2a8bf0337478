"""Nearest features: every one compared, or an index with compressed vectors for millions of them.

`Exact` compares all of a gallery's features where they lie. `build` writes an index into a folder:
"IVF", the vectors in clusters, of which a search opens some, with "PQ", a code of 4 bits for every
2, 4 or 8 numbers of a vector. What the index finds, `Approximate` scores again with the features
themselves, so both give the same scores.

    index = open_index(items, features, folder)  # Exact, unless `build` was called
    scores_QK, rows_QK = index.search(queries_QD, 50, mask)

Shapes: N items, Q queries, D width of the features, K hits of a query.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import write_atomically

INDEX = "index"  # its folder in a gallery
MANIFEST = "index.json"
VERSION = 1
BLOCK = 4_000  # vectors that are compared at once; they fit into a processor's cache
FEW = 0.2  # a filter that keeps less: its vectors are gathered; else the others are skipped
LEAST = 20_000  # a filter that keeps fewer items: all of them are compared
RECALL_AT, WANTED_RECALL, SAMPLE = 50, 0.95, 200
MIN_ROWS = 1_000  # for an index
MIXED = 16  # persons in a query that measures recall
# Codes of vectors, best first: numbers that share 4 bits, and how many times the hits that are
# wanted the index is asked for, to score these again.
CODES = ((2, 10), (4, 20), (8, 40))


def faiss_library() -> Any:
    """The module faiss. Raises UserError if it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError("faiss is not installed: pip install -r requirements-search.txt") from None
    return faiss


class Exact:
    """Compares every feature with the query.

    The features stay where they are, for example in a mapped file.

    Args:
        features: [N, D] float16 of unit length.
        keep: copy them into memory once; each search then takes half the time.
    """

    def __init__(self, features: np.ndarray, keep: bool = False) -> None:
        if features.dtype != np.float16 or features.ndim != 2:
            raise ValueError(f"features {features.dtype} {features.shape}; expected float16 [N, D]")
        self.features = features
        self.block = max(1, len(features)) if keep else BLOCK
        self._kept = _flat(features) if keep else None

    def search(
        self, queries_QD: np.ndarray, k: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [Q, K] float32 and rows [Q, K] of the k best items, best first.

        Of equal scores the lower row is first. Where a filter keeps fewer than k items, rows are -1
        and scores -inf.

        Args:
            queries_QD: of unit length.
            mask: bool [N], the items to compare; None: all.
        """
        queries_QD = _checked(queries_QD, self.features)
        scores, rows = [_nothing(queries_QD, k)[0]], [_nothing(queries_QD, k)[1]]
        for start in range(0, len(self.features), self.block):
            part = self.features[start : start + self.block]
            keep = None if mask is None else mask[start : start + self.block]
            found = self._search_part(part, queries_QD, k, keep)
            if found is not None:
                scores.append(found[0])
                rows.append(np.where(found[1] < 0, -1, found[1] + start))
        return best(np.concatenate(scores, 1), np.concatenate(rows, 1), k)

    def _search_part(
        self, part_ND: np.ndarray, queries_QD: np.ndarray, k: int, keep_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Scores and rows of the best of some features, or None if the mask keeps none of them."""
        kept = len(part_ND) if keep_N is None else int(np.count_nonzero(keep_N))
        if not kept:
            return None
        k, faiss = min(k, kept), faiss_library()
        if keep_N is None or kept == len(part_ND):
            return (self._kept or _flat(part_ND)).search(queries_QD, k)
        if kept < FEW * len(part_ND):
            rows = np.flatnonzero(keep_N)
            scores_QK, at_QK = _flat(part_ND[rows]).search(queries_QD, k)
            return scores_QK, rows[at_QK]
        bits = np.packbits(keep_N, bitorder="little")
        params = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        return (self._kept or _flat(part_ND)).search(queries_QD, k, params=params)


class Approximate:
    """Searches an index of `build`, and compares the items that it lacks.

    The features are best mapped from a file: of them, a search reads only those of its candidates.

    Args:
        rows_I: the row now of each vector of the index, -1 if it is gone.
        manifest: what `build` wrote of it.
    """

    def __init__(
        self, features: np.ndarray, path: Path, rows_I: np.ndarray, manifest: dict[str, Any]
    ) -> None:
        faiss = faiss_library()
        self.features, self.manifest = features, manifest
        self.exact = Exact(features)
        self.index = faiss.read_index(str(path))
        if self.index.ntotal != len(rows_I):
            raise ValueError(f"{self.index.ntotal} vectors, but {len(rows_I)} keys")
        self.rows_I = rows_I
        indexed = np.zeros(len(features), bool)
        indexed[rows_I[rows_I >= 0]] = True
        self.new = np.flatnonzero(~indexed)
        self.whole = bool((rows_I >= 0).all())

    def search(
        self, queries_QD: np.ndarray, k: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Exact.search`, but a few of the k best may be missing."""
        kept = len(self.features) if mask is None else int(np.count_nonzero(mask))
        if kept <= max(LEAST, k):
            return self.exact.search(queries_QD, k, mask)
        queries_QD = _checked(queries_QD, self.features)
        return best(*self._scored(queries_QD, self._candidates(queries_QD, k, mask, kept)), k)

    def search_index(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by the index also where comparing every feature would be faster."""
        rows_QC = self._candidates(queries_QD, k, None, len(self.features))
        return best(*self._scored(queries_QD, rows_QC), k)

    def _candidates(
        self, queries_QD: np.ndarray, k: int, mask: np.ndarray | None, kept: int
    ) -> np.ndarray:
        """Rows [Q, C] that may be among the k best, and -1; the mask keeps `kept` items."""
        faiss = faiss_library()
        probes = min(self.index.nlist, math.ceil(self.manifest["nprobe"] * len(self.rows_I) / kept))
        params = faiss.SearchParametersIVF(nprobe=probes)
        if mask is not None or not self.whole:
            allowed_I = self.rows_I >= 0
            if mask is not None:
                allowed_I &= mask[self.rows_I]
            selector = faiss.IDSelectorBitmap(np.packbits(allowed_I, bitorder="little"))
            params = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        wanted = min(self.manifest["enlarge"] * k, self.index.ntotal)
        at_QC = self.index.search(queries_QD, wanted, params=params)[1]
        rows_QC = np.where(at_QC < 0, -1, self.rows_I[at_QC])
        new = self.new if mask is None else self.new[mask[self.new]]
        return np.concatenate([rows_QC, np.broadcast_to(new, (len(rows_QC), len(new)))], axis=1)

    def _scored(self, queries_QD: np.ndarray, rows_QC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The features' own scores of rows; -inf for -1."""
        scores = np.full(rows_QC.shape, -np.inf, np.float32)
        for query_D, rows_C, scores_C in zip(queries_QD, rows_QC, scores, strict=True):
            real = rows_C >= 0
            scores_C[real] = self.features[rows_C[real]].astype(np.float32) @ query_D
        return scores, rows_QC


def remove_index(folder: Path) -> bool:
    """Delete the index in a folder, which holds compressed features. Returns whether one was
    there."""
    there = (folder / MANIFEST).exists()
    shutil.rmtree(folder, ignore_errors=True)
    return there


def open_index(items: pa.Table, features: np.ndarray, folder: Path) -> Exact | Approximate:
    """The index in a folder, or `Exact` if there is none.

    Items that were added or have changed since `build` are compared one by one; those that are gone
    are left out. Raises UserError if the index cannot be read, or is not of such features.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return Exact(features)
    again = "; delete it, or build the index again"
    manifest = read_json_file(path, "not the manifest of an index: ", again)
    name = str(manifest.get("build", "")) if isinstance(manifest, dict) else ""
    numbers = [manifest.get(n) for n in ("width", "nprobe", "enlarge")] if name else []
    complete = name and all(type(n) is int and n > 0 for n in numbers)
    if not complete or not re.fullmatch("[0-9a-f]{16}", name) or manifest.get("version") != VERSION:
        raise UserError(f"{path}: not the manifest of an index of version {VERSION}{again}")
    if manifest["width"] != features.shape[1]:
        raise UserError(f"{path}: features of {manifest['width']} numbers, and the gallery's have "
            f"{features.shape[1]}: another encoder{again}")  # fmt: skip
    try:
        keys_I = np.load(folder / f"{name}.npy", mmap_mode="r")
        return Approximate(features, folder / f"{name}.faiss", _rows_of(keys_I, items), manifest)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[-1]
        raise UserError(f"{folder / name}.faiss: it cannot be read: {reason}{again}") from None


def build(
    items: pa.Table, features: np.ndarray, folder: Path, memory: int, seed: int = 0
) -> dict[str, Any]:
    """Write an index of all items, and return its manifest.

    The vectors get the longest code that `memory` allows, and searches open as many clusters as a
    recall at 50 of 0.95 needs. The manifest has the recall that was measured against `Exact`, with
    `mixed_queries`.

    Args:
        memory: bytes of the index.

    Raises UserError if that is too little, or if the gallery is too small.
    """
    count, width = features.shape
    if count < MIN_ROWS:
        raise UserError(f"{count} people need no index; from {MIN_ROWS:,} on there can be one")
    clusters = 2 ** round(math.log2(math.sqrt(count)))
    shared, enlarge = _code(count, width, clusters, memory)
    factory = f"IVF{clusters},PQ{width // shared}x4fs"
    name, keys_N = secrets.token_hex(8), keys_of(items)
    path = folder / f"{name}.faiss"
    _write(features, factory, 50 * clusters, path, seed)
    write_atomically(folder / f"{name}.npy", lambda file: np.save(file, keys_N))
    manifest: dict[str, Any] = {
        "version": VERSION, "build": name, "rows": count, "width": width, "factory": factory,
        "bytes": path.stat().st_size, "enlarge": enlarge, "nprobe": max(1, clusters // 64),
    }  # fmt: skip
    queries_QD = mixed_queries(features, SAMPLE, np.random.default_rng(seed))
    _, true_QK = Exact(features).search(queries_QD, RECALL_AT)
    opened = Approximate(features, path, np.arange(count), manifest)
    while True:  # each time a quarter more clusters
        _, rows_QK = opened.search_index(queries_QD, RECALL_AT)
        recall = recall_of(rows_QK, true_QK)
        if recall >= WANTED_RECALL or manifest["nprobe"] >= clusters:
            break
        manifest["nprobe"] = min(clusters, math.ceil(1.25 * manifest["nprobe"]))
    manifest[f"recall@{RECALL_AT}"] = round(recall, 4)
    text = json.dumps(manifest, indent=2)
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))
    for old in (*folder.glob("*.faiss"), *folder.glob("*.npy")):
        if old.stem != name and len(old.stem) == len(name):
            old.unlink()
    return manifest


def mixed_queries(features: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Queries [count, D] of unit length that measure recall: sums of the features of random persons
    with random signs. Like sentences, they are about as far from every feature, so that their
    nearest ones lie in many clusters. A feature of the gallery as a query would find its neighbours
    in the cluster where it is itself."""
    mixed_QMD = features[random.integers(0, len(features), (count, MIXED))].astype(np.float32)
    signs_QM = random.choice([-1, 1], (count, MIXED))
    return unit(np.einsum("qm,qmd->qd", signs_QM, mixed_QMD)).astype(np.float32)


def _write(features: np.ndarray, factory: str, sample: int, path: Path, seed: int) -> None:
    """Train an index on a sample of the features, fill it with all of them, and write it."""
    faiss = faiss_library()
    count, width = features.shape
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter = seed + 1, 10
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(count, min(count, sample), replace=False))
    index.train(features[chosen].astype(np.float32))
    for start in range(0, count, 50_000):
        index.add(features[start : start + 50_000].astype(np.float32))
    write_atomically(path, lambda f: faiss.write_index(index, faiss.PyCallbackIOWriter(f.write)))


def recall_of(rows_QK: np.ndarray, true_QK: np.ndarray) -> float:
    """The share of the true hits that are among those found, mean over queries."""
    shares = [np.isin(true, rows).mean() for rows, true in zip(rows_QK, true_QK, strict=True)]
    return float(np.mean(shares))


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Features of unit length; zeros stay zeros."""
    return features_ND / np.maximum(np.linalg.norm(features_ND, axis=-1, keepdims=True), 1e-12)


def keys_of(items: pa.Table) -> np.ndarray:
    """What tells items apart in an index, int64 [N]: their ids and the content of their files."""
    digests = pc.fill_null(items["digest"], "0" * 16).to_pylist()
    content = np.frombuffer(bytes.fromhex("".join(digests)), ">i8").astype(np.int64)
    return items["id"].to_numpy() ^ content


def best(scores_QC: np.ndarray, rows_QC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of some hits, best first, and of equal ones the lower row first."""
    if scores_QC.shape[1] > 4 * k:  # sorting all of them would take longer than the search
        at_QK = np.argpartition(-scores_QC, k, axis=1)[:, : k + 1]
        scores_QC, rows_QC = (np.take_along_axis(x, at_QK, 1) for x in (scores_QC, rows_QC))
    order_QK = np.lexsort((rows_QC, -scores_QC), axis=1)[:, :k]
    return np.take_along_axis(scores_QC, order_QK, 1), np.take_along_axis(rows_QC, order_QK, 1)


def _flat(features_ND: np.ndarray) -> Any:
    """A faiss index of features, which are copied as they are."""
    faiss = faiss_library()
    width = features_ND.shape[1]
    index = faiss.IndexScalarQuantizer(
        width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.is_trained = True  # nothing to learn: a code is the number in float16
    index.add_sa_codes(np.ascontiguousarray(features_ND).view(np.uint8).reshape(-1, 2 * width))
    return index


def _checked(queries_QD: np.ndarray, features: np.ndarray) -> np.ndarray:
    if queries_QD.ndim != 2 or queries_QD.shape[1] != features.shape[1]:
        raise ValueError(f"queries {queries_QD.shape}; expected [Q, {features.shape[1]}]")
    if not np.isfinite(queries_QD).all():
        raise UserError("the query's features are not finite: the model has diverged")
    return np.ascontiguousarray(queries_QD, np.float32)


def _nothing(queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(queries_QD), k)
    return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)


def _rows_of(keys_I: np.ndarray, items: pa.Table) -> np.ndarray:
    """The row now of each key of an index, -1 for those that are gone."""
    keys_N = keys_of(items)
    if np.array_equal(keys_I, keys_N):
        return np.arange(len(keys_N))
    order = np.argsort(keys_N)
    at_I = np.searchsorted(keys_N, keys_I, sorter=order)
    rows_I = order[np.minimum(at_I, len(order) - 1)] if len(order) else np.zeros_like(keys_I)
    return np.where(keys_N[rows_I] == keys_I, rows_I, -1) if len(order) else rows_I - 1


def _code(count: int, width: int, clusters: int, memory: int) -> tuple[int, int]:
    """The longest code that fits into the memory, of CODES."""
    if width % 8:
        raise UserError(f"features of {width} numbers: an index needs a multiple of 8")
    fixed = 8 * count + 4 * width * clusters  # ids, and the centres of the clusters
    for shared, enlarge in CODES:
        size = fixed + count * width // shared // 2
        if size <= memory:
            return shared, enlarge
    raise UserError(
        f"--memory: an index of {count:,} people takes at least {math.ceil(size / 2**20):,}MiB; "
        f"{memory // 2**20:,}MiB are given"
    )
