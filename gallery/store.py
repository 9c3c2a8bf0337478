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

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gallery.records import VERSION, schema_with
from utils.documents import load_json
from utils.errors import UserError
from utils.files import expand, lock, read_file, write_atomically
from utils.machine import cores

ROWS = 8192  # most people in a part
MANIFEST, NEXT, PARTS = "manifest.json", "manifest.next.json", "parts"
KINDS = ("items", "features", "files")
NAME = re.compile(r"[0-9a-f]{16}")
PART_FILE = re.compile(r"\.?([0-9a-f]{16})\.(items|features|files)\.parquet(\.\w+)?")
ROUNDS = 20  # in which a reader tries to get ahead of a writer
LIBRARIES = ("pillow", "pyarrow")  # and those of the encoder:
OF_TORCH = ("torch", "torchvision", "open_clip_torch")
OF_ONNX = ("onnxruntime", "onnxruntime-gpu")  # one of them
# What an encoder is known by in a manifest; with other values, features cannot be compared.
IDENTITY = ("sha256", "img_size", "stride_size")
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

    def commit(self, parts: Sequence[Part], **changes: Any) -> None:
        """Make these the gallery's parts, and change other entries of the manifest; then delete the
        parts that are no longer in it. Raises UserError if the disk is full; then nothing has
        changed."""
        kept = {part["name"] for part in parts}
        old = [part["name"] for part in self.parts if part["name"] not in kept]
        manifest = {**self.manifest, **changes, "parts": list(parts)}
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


def new_manifest(
    encoder: Mapping[str, Any], attributes: Mapping[str, Sequence[str]], root: str
) -> dict[str, Any]:
    """The manifest of an empty gallery."""
    return {
        "version": VERSION,
        "encoder": dict(encoder),
        "attributes": {name: list(classes) for name, classes in attributes.items()},
        "root": root,
        "libraries": libraries(encoder),
        "parts": [],
    }


def libraries(encoder: Mapping[str, Any]) -> dict[str, str]:
    """The versions of the libraries that an encoder's features depend on."""
    found = {}
    for name in (*(OF_ONNX if encoder.get("onnx") else OF_TORCH), *LIBRARIES):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_encoder(encoder: Mapping[str, Any], made_by: Mapping[str, Any], place: str) -> None:
    """Raise UserError if an encoder cannot ask a gallery. Its precision may be another: scores then
    differ a little.

    Args:
        encoder: what a manifest says of it.
        made_by: what the gallery's manifest says.
        place: of the encoder, for the message.
    """
    for name in IDENTITY:
        if encoder[name] != made_by[name]:
            raise UserError(
                f"{place}: its {name} is {encoder[name]}, but the gallery was made with "
                f"{made_by[name]}; give the encoder that made the gallery"
            )


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a gallery, checked. Raises UserError."""
    path = folder / name
    try:
        manifest = load_json(read_file(path))
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: version {manifest.get('version')!r}, and this code reads version "
                f"{VERSION}; make the gallery anew"
            )
        if not isinstance(manifest["root"], str) or not isinstance(manifest["libraries"], dict):
            raise ValueError("its root or libraries")
        encoder = manifest["encoder"]
        if not isinstance(encoder["sha256"], str) or type(encoder["embed_dim"]) is not int:
            raise ValueError("its encoder")
        for attribute, classes in manifest["attributes"].items():
            if not all(isinstance(text, str) for text in (attribute, *classes)):
                raise ValueError("its attributes")
        for part in manifest["parts"]:
            hashes = [part["sha256"][kind] for kind in KINDS]
            if not NAME.fullmatch(part["name"]) or not all(map(_is_hash, hashes)):
                raise ValueError("its parts")
            if type(part["rows"]) is not int or not 0 <= part["rows"] <= ROWS:
                raise ValueError("its parts")
    except FileNotFoundError:
        raise UserError(
            f"--gallery {folder}: no gallery (no {name} in it); make one with search.py index"
        ) from None
    except NotADirectoryError:
        raise UserError(f"--gallery {folder}: not the folder of a gallery") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the manifest of a gallery: {error}") from None
    return manifest


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


def size_on_disk(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Bytes of a gallery's files."""
    files = [part_file(folder, p["name"], kind) for p in manifest["parts"] for kind in KINDS]
    return sum(path.stat().st_size for path in (folder / MANIFEST, *files) if path.exists())


def is_unicode(text: str) -> bool:
    """Whether a gallery can have a text, such as the name of a file: some names are other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


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


def below(paths: pa.ChunkedArray, roots: Sequence[str]) -> np.ndarray:
    """Which paths are one of the roots, or below one: a mask [N]. The root "" has all relative
    paths below it."""
    mask = np.zeros(len(paths), bool)
    for root in roots:
        if not is_unicode(root):  # Arrow's text, like all Unicode, has no lone surrogates
            continue
        if root == "":
            mask |= ~pc.starts_with(paths, "/").to_numpy(zero_copy_only=False)
        else:
            mask |= pc.equal(paths, root).to_numpy(zero_copy_only=False)
            mask |= pc.starts_with(paths, f"{root.rstrip('/')}/").to_numpy(zero_copy_only=False)
    return mask
