"""The store: a gallery's folder, which can be moved, and read by other programs.

    manifest.json                   the encoder, the attributes, the parts and their hashes
    parts/<name>.items.parquet      people: the columns of `records.schema_with`
    parts/<name>.features.parquet   column `feature`: for each person a list of D float16
    parts/<name>.files.parquet      files that were read to their end, for the next run
    lock                            held by the process that writes

A part has at most 8192 people. Only the parts in the manifest count. A change writes new parts,
then replaces the manifest, then deletes the parts that it no longer names. So a kill at any moment
leaves the old or the new gallery, and readers need no lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gallery.manifest import MANIFEST, NEXT, read_manifest
from gallery.parts import (
    KINDS,
    PART_FILE,
    PARTS,
    ROWS,
    Damaged,
    Part,
    features_of,
    part_file,
    read_part,
    with_schema,
    write_part,
)
from gallery.records import schema_with
from utils.errors import UserError
from utils.files import expand, lock, write_atomically
from utils.machine import cores

ROUNDS = 20  # in which a reader tries to get ahead of a writer


@dataclass
class Gallery:
    """A gallery that has been read.

    Attributes:
        folder: of the gallery.
        manifest: the content of manifest.json.
        items: N rows, the columns of `records.schema_with`.
        features: [N, D] float16 of unit length; row n belongs to row n of `items`.
    """

    folder: Path
    manifest: dict[str, Any]
    items: pa.Table
    features: np.ndarray

    @staticmethod
    def open(folder: str | Path, features: bool = True) -> Gallery:
        """Read a gallery, also while another process changes it: all of it is of one moment.

        Args:
            features: False leaves them out ([N, 0]), for what needs the items alone.

        Raises UserError; Damaged names the part that is missing or corrupted.
        """
        folder = Path(expand(str(folder)))
        for _ in range(ROUNDS):
            manifest = read_manifest(folder)
            try:
                return _read(folder, manifest, features)
            except Damaged:
                # A writer may have replaced the part meanwhile.
                if read_manifest(folder)["parts"] == manifest["parts"]:
                    raise
        raise UserError(f"{folder}: changes faster than it can be read; try again later")


class Store:
    """A gallery's folder, for the one process that writes it; see `writing`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], name: str = MANIFEST) -> None:
        self.folder, self.manifest, self.name = folder, manifest, name

    @property
    def parts(self) -> list[Part]:
        return self.manifest["parts"]

    def commit(self, parts: Sequence[Part | None], **changes: Any) -> None:
        """Make these the gallery's parts, and change other entries of the manifest; then delete the
        parts that are no longer in it. Raises UserError if the disk is full; then nothing has
        changed.

        Args:
            parts: None, as `rewritten` gives it, is left out.
        """
        new = [part for part in parts if part is not None]
        kept = {part["name"] for part in new}
        old = [part["name"] for part in self.parts if part["name"] not in kept]
        manifest = {**self.manifest, **changes, "parts": new}
        text = json.dumps(manifest, indent=1).encode()
        write_atomically(self.folder / self.name, methodcaller("write", text))
        self.manifest = manifest
        for name in old:
            for kind in KINDS:
                part_file(self.folder, name, kind).unlink(missing_ok=True)

    def publish(self) -> None:
        """Make a gallery that was written under another name the gallery."""
        if self.name != MANIFEST:
            os.replace(self.folder / self.name, self.folder / MANIFEST)
            self.name = MANIFEST
        self.clean()

    def clean(self) -> None:
        """Delete what no manifest names: of killed processes, or of an older gallery."""
        named = {part["name"] for part in self.parts}
        if self.name != MANIFEST and (self.folder / MANIFEST).exists():
            named |= {part["name"] for part in read_manifest(self.folder)["parts"]}
        for path in (self.folder / PARTS).iterdir():
            match = PART_FILE.fullmatch(path.name)  # others are not ours
            if match and match[1] not in named:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".manifest*.json.*"):
            path.unlink(missing_ok=True)
        if self.name == MANIFEST:
            (self.folder / NEXT).unlink(missing_ok=True)

    def attributes(self) -> list[str]:
        return list(self.manifest["attributes"])

    def read(self, part: Part, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table of a part. Raises Damaged."""
        table = read_part(self.folder, part, kind, columns)
        if kind == "items" and columns is None:
            return with_schema(table, schema_with(self.attributes()))
        return table

    def rewritten(
        self,
        part: Part,
        keep: np.ndarray,
        items: pa.Table | None = None,
        files: pa.Table | None = None,
    ) -> Part | None:
        """The part with only the rows of a mask [rows]; None if it is empty.

        Args:
            items, files: replace the tables of the part, before the mask.
        """
        items = self.read(part, "items") if items is None else items
        files = self.read(part, "files") if files is None else files
        if not keep.any() and not len(files):
            return None
        features = features_of(self.read(part, "features"))
        return write_part(self.folder, items.filter(pa.array(keep)), features[keep], files)

    def without(
        self,
        part: Part,
        paths: Iterable[str],
        items: pa.Table | None = None,
        files: pa.Table | None = None,
    ) -> Part | None:
        """As `rewritten`, without the people and the files of some paths."""
        items = self.read(part, "items") if items is None else items
        files = self.read(part, "files") if files is None else files
        gone = pa.array(sorted(paths), pa.string())
        keep = ~pc.is_in(items["path"], value_set=gone).to_numpy(zero_copy_only=False)
        files = files.filter(pc.invert(pc.is_in(files["path"], value_set=gone)))
        return self.rewritten(part, keep, items, files)

    def compacted(self) -> list[Part]:
        """The parts, with small ones joined: many small runs shall not leave many small files."""
        small = [part for part in self.parts if part["rows"] < ROWS // 2]
        if len(small) < 2:
            return self.parts
        items = pa.concat_tables([self.read(part, "items") for part in small])
        files = pa.concat_tables([self.read(part, "files") for part in small])
        features = np.concatenate([features_of(self.read(part, "features")) for part in small])
        joined = []
        for start in range(0, max(1, len(items)), ROWS):
            some = slice(start, start + ROWS)
            rest = files if start == 0 else files.slice(0, 0)
            joined.append(write_part(self.folder, items.slice(start, ROWS), features[some], rest))
        return [part for part in self.parts if part not in small] + joined


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Make a gallery's folder if necessary, and lock it; if it is still no gallery at the end, for
    example after an error, it is taken away. Raises UserError if another process writes it, and for
    a folder of other files."""
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".manifest")}
    except FileNotFoundError:
        names = set()
    except OSError as error:
        raise UserError(f"--gallery {folder}: {error.strerror}") from None
    others = sorted(names - {PARTS, "lock"})
    if others and not names & {MANIFEST, NEXT}:
        raise UserError(
            f"--gallery {folder}: no gallery, but it has other files, such as {others[0]}; name an "
            "empty or a new folder"
        )
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--gallery {folder}: {error.strerror}") from None
    descriptor = lock(folder)
    try:
        yield folder
    finally:
        if not any((folder / name).exists() for name in (MANIFEST, NEXT)):
            with suppress(OSError):
                (folder / PARTS).rmdir()
                (folder / "lock").unlink()
                folder.rmdir()
        with suppress(OSError):
            os.close(descriptor)


def size_on_disk(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Bytes of a gallery's files."""
    files = [part_file(folder, p["name"], kind) for p in manifest["parts"] for kind in KINDS]
    return sum(path.stat().st_size for path in (folder / MANIFEST, *files) if path.exists())


def _read(folder: Path, manifest: dict[str, Any], with_features: bool) -> Gallery:
    parts, schema = manifest["parts"], schema_with(list(manifest["attributes"]))
    ends = np.cumsum([part["rows"] for part in parts], dtype=np.int64)
    count = int(ends[-1]) if parts else 0
    width = manifest["encoder"]["embed_dim"] if with_features else 0
    features = np.empty((count, width), np.float16)

    def read(number: int) -> pa.Table:
        part = parts[number]
        if with_features:
            rows = features_of(read_part(folder, part, "features"))
            if part["rows"] and rows.shape[1] != width:
                path = part_file(folder, part["name"], "features")
                raise Damaged(f"{path}: has {rows.shape[1]} columns, not {width}")
            features[ends[number] - part["rows"] : ends[number]] = rows.reshape(part["rows"], width)
        return with_schema(read_part(folder, part, "items"), schema)

    with ThreadPoolExecutor(cores()) as threads:
        tables = list(threads.map(read, range(len(parts))))
    items = pa.concat_tables([schema.empty_table(), *tables])
    features.flags.writeable = False
    return Gallery(folder, manifest, items, features)
