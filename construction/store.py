"""What is kept from run to run, by its content: measures, answers of models, scores, features.

A store is a SQLite file in the folder `store/` of the work folder. Every run merges the files of
other runs there (those of shards, for example) into its own, so nothing is computed or paid for
twice. A value that has been put is on disk before `put` returns.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.errors import UserError

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS kept (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))"
)


def key_of(*parts: object) -> str:
    """The key of a content: a hash of its parts, in JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """Values (anything that JSON holds) by kind and key. Raises UserError for errors of the disk.

    Args:
        folder: holds the files of all runs.
        name: of this run's file, such as "3-of-16".
        others: merge the files of other runs.
    """

    def __init__(self, folder: Path, name: str = "all", others: bool = True) -> None:
        self.path = folder / f"{name}.sqlite"
        self._lock = threading.Lock()  # a commit of one thread would end another's transaction
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True)
            # The default journal, because a write-ahead log does not work on network file systems.
            self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.execute(SCHEMA)
            self._file.commit()
        for other in sorted(folder.glob("*.sqlite")) if others else ():
            if other != self.path:
                self._merge(other)

    def get(self, kind: str, key: str) -> Any:
        """The value, or None."""
        with self._errors():
            query = "SELECT value FROM kept WHERE kind = ? AND key = ?"
            row = self._file.execute(query, (kind, key)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, kind: str, values: Iterable[tuple[str, Any]]) -> None:
        """Keep (key, value) pairs, all of them or none."""
        rows = [(kind, key, json.dumps(value)) for key, value in values]
        with self._lock, self._errors(), self._file:  # commits
            self._file.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)

    def values(self, kind: str) -> Iterator[Any]:
        """All values of a kind, in the order of their keys."""
        query = "SELECT value FROM kept WHERE kind = ? ORDER BY key"
        with self._errors():
            for (value,) in self._file.execute(query, (kind,)):
                yield json.loads(value)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _merge(self, other: Path) -> None:
        with self._errors(other):
            self._file.execute("ATTACH ? AS other", (str(other),))
            try:
                with self._file:
                    self._file.execute("INSERT OR IGNORE INTO kept SELECT * FROM other.kept")
            finally:
                self._file.execute("DETACH other")

    @contextmanager
    def _errors(self, path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{path or self.path}: what earlier runs have paid for is kept here, but it cannot "
                f"be read or written: {error}"
            ) from None
