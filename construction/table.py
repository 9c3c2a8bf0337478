"""The table of pictures on disk (SQLite), so that a million of them need no memory.

It holds only what is cheap to compute, and every run makes it anew; what is expensive lies in the
store (store.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from construction.records import Box, Candidate, Caption, Label, Measure, Pair, Picture
from utils.errors import UserError

PICTURE = "source, name, file, view, person, identity, box, camera, time, split, notes"
MEASURE = ", ".join(Measure._fields)
SCHEMA = f"""
CREATE TABLE pictures (number INTEGER PRIMARY KEY, {PICTURE}, UNIQUE (source, name));
CREATE TABLE measures (number INTEGER PRIMARY KEY, {MEASURE.replace("file,", "crop,", 1)});
CREATE TABLE removed (number INTEGER PRIMARY KEY, stage, reason, detail);
CREATE TABLE labels (number, attribute, value, confidence, origin, PRIMARY KEY (number, attribute))
    WITHOUT ROWID;
CREATE TABLE pairs (number INTEGER PRIMARY KEY, split, aerial, ground, pid DEFAULT 0,
    removed DEFAULT '');
CREATE TABLE captions (number INTEGER PRIMARY KEY, text, origin, score, problem, tries);
"""
CANDIDATE = f"number, {PICTURE}, crop, {MEASURE.split(', ', 1)[1]}"
IN = "pictures JOIN measures USING (number) LEFT JOIN removed USING (number)"


class Table:
    """Pictures, and what the stages have found out about them. Raises UserError for errors of the
    disk, by `run_main`.

    Args:
        path: the file, which is made anew.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._file = sqlite3.connect(path, isolation_level=None)
        self._file.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;")
        for statement in SCHEMA.split(";"):
            self._file.execute(statement)

    def add(self, pictures: Iterable[Picture]) -> None:
        """Add pictures; their numbers follow each other. Raises UserError if two have the same
        name."""
        marks = ", ".join("?" * len(PICTURE.split(", ")))
        for picture in pictures:
            in_json = {"box": json.dumps(picture.box), "notes": json.dumps(dict(picture.notes))}
            values = (vars(picture) | in_json).values()
            try:
                self._file.execute(
                    f"INSERT INTO pictures ({PICTURE}) VALUES ({marks})", tuple(values)
                )
            except sqlite3.IntegrityError:
                raise UserError(
                    f"{picture.file}: a second picture with the name {picture.name} in the source "
                    f"{picture.source}"
                ) from None

    def count(self, what: str) -> int:
        return self._file.execute(f"SELECT count(*) FROM {what}").fetchone()[0]

    def frames(self) -> Iterator[tuple[str, list[tuple[int, Picture]]]]:
        """The files, each with the pictures in it (number, picture): one, or one for each box."""
        rows = self._file.execute(
            f"SELECT number, {PICTURE} FROM pictures LEFT JOIN removed USING (number) "
            "WHERE stage IS NULL ORDER BY file, number"
        )
        pictures = ((row[0], _picture(row[1:])) for row in rows)
        for file, group in groupby(pictures, key=lambda item: item[1].file):
            yield file, list(group)

    def set_measures(self, measures: Iterable[tuple[int, Measure]]) -> None:
        marks = ", ".join("?" * (1 + len(Measure._fields)))
        self._file.executemany(
            f"INSERT INTO measures VALUES ({marks})", ((n, *measure) for n, measure in measures)
        )

    def remove(self, stage: str, removed: Iterable[tuple[int, str, str]]) -> None:
        """Take pictures out, as (number, reason, detail)."""
        self._file.executemany(
            "INSERT INTO removed VALUES (?, ?, ?, ?)",
            ((number, stage, reason, detail) for number, reason, detail in removed),
        )

    def candidates(self) -> Iterator[Candidate]:
        """The pictures that are in, by source, split of the source, identity, view and name."""
        # The order is not that of an index. So SQLite sorts all rows before it gives the first one,
        # and what the caller writes meanwhile does not matter.
        rows = self._file.execute(
            f"SELECT {CANDIDATE} FROM {IN} "
            "WHERE stage IS NULL ORDER BY +source, +split, identity, view, time, name"
        )
        return map(_candidate, rows)

    def identities(self, by_split: bool) -> Iterator[list[Candidate]]:
        """The pictures that are in, identity by identity.

        Args:
            by_split: the pictures of an identity in two splits of its source are two identities.
        """
        of = ("source", "split", "identity") if by_split else ("source", "identity")
        key = attrgetter(*of)
        order = ", ".join(f"+{name}" for name in of)
        rows = self._file.execute(
            f"SELECT {CANDIDATE} FROM {IN} WHERE stage IS NULL ORDER BY {order}, view, time, name"
        )
        for _, group in groupby(map(_candidate, rows), key=lambda c: key(c.picture)):
            yield list(group)

    def column(self, name: str, source: str, view: str) -> list[Any]:
        """One measure of the pictures of a view that are in."""
        rows = self._file.execute(
            f"SELECT {name} FROM {IN} WHERE stage IS NULL AND source = ? AND view = ?",
            (source, view),
        )
        return [value for (value,) in rows]

    def people(self) -> list[tuple[str, str, str, int]]:
        """(source, person, split of the source, pictures) of all who are in, in order."""
        return self._file.execute(
            f"SELECT source, person, split, count(*) FROM {IN} WHERE stage IS NULL "
            "GROUP BY source, person, split ORDER BY source, person, split"
        ).fetchall()

    def set_labels(self, labels: Iterable[tuple[int, str, Label]]) -> None:
        """Add (number, attribute, label)."""
        self._file.executemany(
            "INSERT INTO labels VALUES (?, ?, ?, ?, ?)",
            ((number, attribute, *label) for number, attribute, label in labels),
        )

    def labels(self, number: int) -> dict[str, Label]:
        """The labels of a picture, by attribute."""
        rows = self._file.execute(
            "SELECT attribute, value, confidence, origin FROM labels WHERE number = ?", (number,)
        )
        return {attribute: Label(*rest) for attribute, *rest in rows}

    def add_pairs(self, pairs: Iterable[tuple[str, int, int]]) -> None:
        """Add (split, number of the aerial picture, number of the ground picture)."""
        self._file.executemany("INSERT INTO pairs (split, aerial, ground) VALUES (?, ?, ?)", pairs)

    def set_captions(self, captions: Iterable[tuple[int, Caption]]) -> None:
        """Keep the captions of pairs, by the pairs' numbers."""
        marks = ", ".join("?" * (1 + len(Caption._fields)))
        self._file.executemany(
            f"INSERT INTO captions VALUES ({marks})", ((n, *caption) for n, caption in captions)
        )

    def pairs(self, source: str = "", split: str = "") -> Iterator[Pair]:
        """The pairs that are in, in the order in which they were added; of a source and split, if
        given."""
        rows = self._file.execute(
            "SELECT pairs.number, pairs.split, pid, aerial, ground FROM pairs "
            "JOIN pictures ON pictures.number = aerial "
            "WHERE removed = '' AND (? = '' OR source = ?) AND (? = '' OR pairs.split = ?) "
            "ORDER BY pairs.number",
            (source, source, split, split),
        )
        for number, of_split, pid, *numbers in rows:
            aerial, ground = (self.candidate(n) for n in numbers)
            labels = {c.picture.view: self.labels(c.number) for c in (aerial, ground)}
            yield Pair(number, of_split, aerial, ground, labels, pid)

    def finish(self) -> None:
        """Take out the pairs that got no caption, with the kind of their problem (what stands
        before its colon), and number the identities of the others: 0, 1, ... in each source and
        split."""
        self._file.execute(
            "UPDATE pairs SET removed = coalesce((SELECT "
            "substr(problem, 1, instr(problem || ':', ':') - 1) FROM captions "
            "WHERE captions.number = pairs.number AND text = ''), '')"
        )
        self._file.execute(
            "UPDATE pairs SET pid = ranked.pid FROM (SELECT pairs.number, dense_rank() OVER "
            "(PARTITION BY source, pairs.split ORDER BY identity) - 1 AS pid FROM pairs "
            "JOIN pictures ON pictures.number = aerial WHERE removed = '') AS ranked "
            "WHERE pairs.number = ranked.number"
        )

    def written(self) -> Iterator[Candidate]:
        """The pictures of the pairs that are in, each once."""
        rows = self._file.execute(
            "SELECT aerial FROM pairs WHERE removed = '' UNION "
            "SELECT ground FROM pairs WHERE removed = '' ORDER BY 1"
        )
        return (self.candidate(number) for (number,) in rows)

    def candidate(self, number: int) -> Candidate:
        row = self._file.execute(
            f"SELECT {CANDIDATE} FROM pictures JOIN measures USING (number) WHERE number = ?",
            (number,),
        ).fetchone()
        return _candidate(row)

    def caption(self, number: int) -> Caption | None:
        """The caption of a pair."""
        row = self._file.execute("SELECT * FROM captions WHERE number = ?", (number,)).fetchone()
        return Caption(*row[1:]) if row else None

    def query(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, for the data card."""
        return iter(self._file.execute(sql, values))

    def close(self) -> None:
        self._file.close()


def _picture(values: Sequence[Any]) -> Picture:
    source, name, file, view, person, identity, box, camera, time, split, notes = values
    return Picture(
        source, name, file, view, person, identity, _box(box), camera, time, split,
        json.loads(notes),
    )  # fmt: skip


def _box(text: str) -> Box | None:
    values = json.loads(text)
    return tuple(values) if values else None


def _candidate(row: Sequence[Any]) -> Candidate:
    end = 1 + len(PICTURE.split(", "))
    return Candidate(row[0], _picture(row[1:end]), Measure(*row[end:]))
