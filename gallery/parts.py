"""A part of a gallery: at most 8192 people in three Parquet files, checked when they are read."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.errors import UserError
from utils.files import read_file, write_atomically
from utils.machine import cores

if TYPE_CHECKING:
    from gallery.frames import Done

ROWS = 8192  # most people in a part
PARTS = "parts"  # their folder in a gallery
KINDS = ("items", "features", "files")
PART_FILE = re.compile(r"\.?([0-9a-f]{16})\.(items|features|files)\.parquet(\.\w+)?")
FILES = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("digest", pa.string()),
        ("request", pa.string()),  # what was asked of the file
        ("facts", pa.string()),  # a hash of what was known of its people
    ]
)

Part = dict[str, Any]  # of the manifest: name, rows, and the SHA-256 of each kind of file


class Damaged(UserError):
    """A part of a gallery is missing or corrupted."""


def write_part(folder: Path, items: pa.Table, features: np.ndarray, files: pa.Table) -> Part:
    """Write a part, which counts as soon as a manifest names it. Raises UserError if the disk is
    full.

    Args:
        features: [rows, D].
    """
    name = uuid.uuid4().hex[:16]
    kind = pa.list_(pa.field("element", pa.float16(), nullable=False), features.shape[1])
    values = pa.array(np.ascontiguousarray(features, np.float16).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=kind)
    schema = pa.schema([pa.field("feature", kind, nullable=False)])
    hashes = {}
    for what, table, options in (
        ("items", items, {"compression": "zstd"}),
        # They are noise to a compressor, and a dictionary or statistics would only take time.
        ("features", pa.table([column], schema=schema),
         {"compression": "none", "use_dictionary": False, "write_statistics": False}),
        ("files", files, {"compression": "zstd"}),
    ):  # fmt: skip
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, **options)
        content = buffer.getvalue()
        hashes[what] = hashlib.sha256(content).hexdigest()
        write_atomically(part_file(folder, name, what), methodcaller("write", content))
    return {"name": name, "rows": len(items), "sha256": hashes}


def part_file(folder: Path, name: str, kind: str) -> Path:
    """The path of one of a part's files."""
    return folder / PARTS / f"{name}.{kind}.parquet"


def read_part(
    folder: Path, part: Part, kind: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """A table of a part. Raises Damaged if the file is missing, or is not the one in the
    manifest."""
    path = part_file(folder, part["name"], kind)
    mend = "index with --repair encodes its pictures again"
    try:
        content = read_file(path)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}; {mend}") from None
    if hashlib.sha256(content).hexdigest() != part["sha256"][kind]:
        raise Damaged(f"{path}: corrupted: its content is not that of the manifest; {mend}")
    try:
        known = None if columns is None else list(columns)
        table = pq.read_table(pa.BufferReader(content), columns=known, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"{path}: not readable as Parquet: {error}; {mend}") from None
    if kind != "files" and len(table) != part["rows"]:
        raise Damaged(f"{path}: has {len(table)} rows, not {part['rows']}; {mend}")
    return table


def features_of(table: pa.Table) -> np.ndarray:
    """The features [rows, D] float16 of a part's table."""
    column = table["feature"].combine_chunks()
    return (
        column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    )


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of a schema; those that it lacks are null. Older parts lack
    attributes that the gallery got later."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def files_table(files: Iterable[Done]) -> pa.Table:
    """The table of files that were read to their end."""
    rows = [
        (f.job.path, f.job.size, f.job.mtime_ns, f.digest, f.job.request, f.job.facts)
        for f in files
    ]
    columns = zip(*rows, strict=True) if rows else [[] for _ in FILES]
    arrays = [pa.array(c, kind.type) for c, kind in zip(columns, FILES, strict=True)]
    return pa.table(arrays, schema=FILES)


def damaged_parts(folder: Path, parts: Iterable[Part]) -> list[tuple[Part, str]]:
    """The parts with a missing or corrupted file, with the messages."""

    def check(part: Part) -> str:
        try:
            for kind in KINDS:
                read_part(folder, part, kind)
        except Damaged as error:
            return str(error)
        return ""

    parts = list(parts)
    with ThreadPoolExecutor(cores()) as threads:
        messages = list(threads.map(check, parts))
    return [(part, text) for part, text in zip(parts, messages, strict=True) if text]
