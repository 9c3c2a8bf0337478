"""bench.py --what search: a search among a million persons, exact and by an index."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from gallery.index import (
    Approximate,
    Exact,
    build,
    faiss_library,
    mixed_queries,
    open_index,
    recall_of,
    unit,
)

PERSONS, WIDTH, LATENT, PICTURES = 1_000_000, 512, 64, 50
HITS, QUERIES, ADDED = 50, 100, 1_000
MEMORY = 2**29  # bytes of the index

Measured = tuple[str, list[float], dict[str, float]]  # name, seconds of each call, notes


def bench_search(once: Callable[[Callable[[], object]], float], repeat: int) -> Iterator[Measured]:
    """Lines of the table. Searches whose times are to be compared are called in turn.

    The features lie in a file that is mapped. They are clustered: PICTURES of each person, which
    differ from each other in LATENT directions, and a little in all others.

    Args:
        once: gives the seconds of a call.
        repeat: calls of each search.
    """

    def in_turn(searches: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        for search in searches.values():
            search()
        seconds: dict[str, list[float]] = {name: [] for name in searches}
        for _ in range(repeat):
            for name, search in searches.items():
                seconds[name].append(once(search))
        return seconds

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = _features(folder / "features.npy", PERSONS + ADDED)
        some, items = features[:PERSONS], _items(PERSONS)
        random = np.random.default_rng(1)
        queries_QD = mixed_queries(some, QUERIES, random)
        first = (queries_QD[:1], HITS)
        mask = random.random(PERSONS) < 0.01

        memory = [own_mib()]
        flat = faiss_library().IndexFlatIP(WIDTH)
        for start in range(0, PERSONS, 50_000):
            flat.add(some[start : start + 50_000].astype(np.float32))
        memory.append(own_mib())
        exact = Exact(some)
        exact.search(*first)
        memory.append(own_mib())
        kept = Exact(some, keep=True)
        memory.append(own_mib())
        searches: dict[str, Callable[[], object]] = {
            "search, faiss IndexFlatIP": partial(flat.search, *first),
            "search, exact": partial(exact.search, *first),
            "search, exact, kept in memory": partial(kept.search, *first),
            "search, exact, 1 % by a filter": partial(exact.search, *first, mask),
        }
        for (name, seconds), more in zip(
            in_turn(searches).items(), [*np.diff(memory).tolist(), 0.0], strict=True
        ):
            yield name, seconds, {"memory_mib": more}
        true_QK = kept.search(queries_QD, HITS)[1]
        del flat, kept, searches

        yield "build the index", [once(partial(build, items, some, folder, MEMORY))], {}
        index = open_index(items, some, folder)
        assert isinstance(index, Approximate)
        recall = recall_of(index.search(queries_QD, HITS)[1], true_QK)
        all_items = _items(PERSONS + ADDED)
        opening = [once(partial(open_index, all_items, features, folder))]
        grown = open_index(all_items, features, folder)
        plain, new = "search, by the index", f"search, by the index, {ADDED:,} new persons"
        times = in_turn(
            {
                plain: partial(index.search, *first),
                f"{plain}, 1 % by a filter": partial(index.search, *first, mask),
                new: partial(grown.search, *first),
            }
        )
        notes = {plain: {"memory_mib": index.manifest["bytes"] / 2**20, "recall": recall}}
        for name, seconds in times.items():
            yield name, seconds, notes.get(name, {})
        yield f"open the index with {ADDED:,} new persons", opening, {}


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
