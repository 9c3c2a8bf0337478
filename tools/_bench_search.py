"""bench.py --what search: a search among a million persons, exact and by an index."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gallery.index import Approximate, Exact, build, faiss_library, open_index, recall_of, unit

PERSONS, WIDTH, LATENT, PICTURES = 1_000_000, 512, 64, 50
HITS, QUERIES, ADDED = 50, 100, 1_000
MEMORY = 2**29  # bytes of the index

# Calls a function several times, or once=True; the row of the table has what else is given.
Measure = Callable[..., dict[str, Any]]


def bench_search(measure: Measure) -> Iterator[dict[str, Any]]:
    """Rows of the table. The features lie in a file that is mapped, as those of a gallery can.

    They are clustered: PICTURES of each person, which differ from each other in LATENT directions
    and a little in all others. Queries are sums of a few of them with random signs, which are as
    far from all of them as sentences are.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = _features(folder / "features.npy", PERSONS + ADDED)
        some, items = features[:PERSONS], _items(PERSONS)
        random = np.random.default_rng(1)
        mixed_QMD = some[np.sort(random.integers(0, PERSONS, (QUERIES, 16)))].astype(np.float32)
        signs_QM = random.choice([-1, 1], mixed_QMD.shape[:2])
        queries_QD = unit(np.einsum("qm,qmd->qd", signs_QM, mixed_QMD)).astype(np.float32)
        mask = random.random(PERSONS) < 0.01

        faiss, before = faiss_library(), own_mib()
        flat = faiss.IndexFlatIP(WIDTH)
        for start in range(0, PERSONS, 50_000):
            flat.add(some[start : start + 50_000].astype(np.float32))
        yield measure(
            "search, faiss IndexFlatIP", partial(flat.search, queries_QD[:1], HITS),
            memory_mib=own_mib() - before,
        )  # fmt: skip
        del flat

        before = own_mib()
        exact = partial(Exact(some).search, queries_QD[:1], HITS)
        exact()
        yield measure("search, exact", exact, memory_mib=own_mib() - before)
        yield measure("search, exact, 1 % by a filter", partial(exact, mask))
        before = own_mib()
        kept = Exact(some, keep=True)
        yield measure(
            "search, exact, kept in memory", partial(kept.search, queries_QD[:1], HITS),
            memory_mib=own_mib() - before,
        )  # fmt: skip
        true_QK = kept.search(queries_QD, HITS)[1]
        del kept

        yield measure("build the index", lambda: build(items, some, folder, MEMORY), once=True)
        index = open_index(items, some, folder)
        assert isinstance(index, Approximate)
        found_QK = index.search(queries_QD, HITS)[1]
        yield measure(
            "search, by the index", partial(index.search, queries_QD[:1], HITS),
            memory_mib=own_mib() - before, recall=recall_of(found_QK, true_QK),
        )  # fmt: skip
        yield measure(
            "search, by the index, 1 % by a filter",
            partial(index.search, queries_QD[:1], HITS, mask),
        )
        del index
        more = _items(PERSONS + ADDED)
        yield measure(
            f"open the index with {ADDED:,} new persons",
            lambda: open_index(more, features, folder), once=True,
        )  # fmt: skip
        index = open_index(more, features, folder)
        yield measure(
            f"search, by the index, {ADDED:,} new persons",
            partial(index.search, queries_QD[:1], HITS),
        )


def own_mib() -> float:
    """Memory of the process in MiB, without files that are mapped: the system takes that back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**10


def _features(path: Path, count: int) -> np.ndarray:
    """Features of clustered persons, made in parts and mapped from a file."""
    random = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float16, (count, WIDTH))
    basis = random.standard_normal((LATENT, WIDTH), dtype=np.float32) / np.sqrt(LATENT)
    persons = random.standard_normal((max(1, count // PICTURES), LATENT), dtype=np.float32)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        near = persons[random.integers(0, len(persons), size)]
        near = near + 0.5 * random.standard_normal((size, LATENT), dtype=np.float32)
        noise = 0.3 * random.standard_normal((size, WIDTH), dtype=np.float32)
        file[start : start + size] = unit(near @ basis + noise)
    file.flush()
    return np.load(path, mmap_mode="r")


def _items(count: int) -> pa.Table:
    return pa.table({"id": np.arange(count), "digest": pa.array(["0" * 16]).take([0] * count)})
