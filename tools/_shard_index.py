"""The samples in a shard by WebDataset's rule, and their entries for dataset.jsonl."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from datasets.pedes import SPLITS
from datasets.shards import BLOCK, Member, is_header_of, read_block
from utils.documents import load_json
from utils.errors import UserError
from utils.files import open_file
from utils.tokenizer import text_problem

# Endings of a member, after the first dot of its name: of the image and of the second view's.
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
PAIRS = tuple(f"pair.{ending}" for ending in IMAGES)
MAX_TEXT = 2**22  # bytes of a JSON or text member; larger ones are not read
OPTIONAL = ("pair_image", "attributes", "pair_attributes")  # keys that all samples have, or none
KNOWN = ("split", "id", "captions", "caption", *OPTIONAL[1:])  # keys of a sample's JSON
KINDS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(PAIRS, "pair_image")}
KINDS |= {"json": "json", "txt": "txt"}


@dataclass
class Indexed:
    """What a shard holds.

    Attributes:
        lines: of dataset.jsonl.
        left_out: counts, by what it is.
        ignored: endings of members, and keys of their JSON, that mean nothing here.
        counts: samples that were indexed, by split, and by optional key ("pair_image", ...).
    """

    lines: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Indexed) -> None:
        """Add the counts of another shard, without its lines."""
        self.left_out += other.left_out
        self.ignored |= other.ignored
        self.counts += other.counts


def index_shard(root: Path, shard: str, split: str) -> Indexed:
    """Index the tar `root/shard`.

    Args:
        split: of samples whose JSON has none; "" takes it from the shard's name.

    Raises UserError for a tar that is not readable to its end, and for a sample that cannot be what
    its writer meant.
    """
    path, indexed = root / shard, Indexed()
    try:
        with open_file(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            samples = _samples(tar, path, shard, file.fileno(), indexed)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not an uncompressed tar that is complete: {error}; copy or write it again"
        ) from None
    for key, sample in samples.items():
        if entry := _entry(sample, path, key, split, indexed):
            indexed.counts.update([entry["split"], *(key for key in OPTIONAL if key in entry)])
            indexed.lines.append(json.dumps(entry))
    return indexed


class _Headers(io.FileIO):
    """A tar for `tarfile`, which would take memory for an extended header of any size."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file.fileno(), closefd=False)

    def read(self, size: int | None = -1, /) -> Any:
        if size is not None and size > MAX_TEXT:
            raise ValueError(f"a header of {size} bytes is over the limit of {MAX_TEXT}")
        return super().read(size)


def _samples(
    tar: tarfile.TarFile, path: Path, shard: str, descriptor: int, indexed: Indexed
) -> dict[str, dict[str, Any]]:
    """By key and kind of member, the path of an image, or the bytes of a text."""
    samples: dict[str, dict[str, Any]] = {}
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        folder, _, last = info.name.rpartition("/")
        first, _, ending = last.partition(".")
        if info.isdir() or not first:  # "._x.jpg" is macOS's
            continue
        kind = KINDS.get(ending.lower())
        if kind is None:
            indexed.ignored.add(f"*.{ending}" if ending else "members without an ending")
            continue
        where, key = f"{path}, member {info.name}", f"{folder}/{first}".lstrip("/")
        if ".." in info.name.split("/"):
            raise UserError(f"{where}: a name with '..'; write the tar with other names")
        if not info.isreg() or info.issparse():
            raise UserError(
                f"{where}: a link, a sparse or a special file; write the tar with its content "
                "(tar --dereference --hard-dereference)"
            )
        sample = samples.setdefault(key, {})
        if kind in sample:
            raise UserError(
                f"{where}: the sample {key} has another {kind.replace('_', ' ')} in this tar; each "
                "sample needs a name of its own"
            )
        if kind in OPTIONAL or kind == "image":
            sample[kind] = str(_member(info, shard, descriptor))
            continue
        content = tar.extractfile(info) if info.size <= MAX_TEXT else None
        if content is None:
            raise UserError(f"{where}: its {info.size} bytes are over the limit of {MAX_TEXT}")
        sample[kind] = content.read()
    # `tarfile` also ends at a corrupted header, as if nothing followed.
    if read_block(descriptor, tar.offset, BLOCK) != bytes(BLOCK):
        raise ValueError(f"it has no end mark at byte {tar.offset}")
    return samples


def _member(info: tarfile.TarInfo, shard: str, descriptor: int) -> Member:
    """With the name by which the reader will check the header: the full one, unless the writer put
    another form of it there."""
    member = Member(shard, info.offset_data, info.size, info.name)
    header = read_block(descriptor, info.offset_data - BLOCK, BLOCK)
    if is_header_of(header, member):
        return member
    stored = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    return member._replace(name=stored.name)


def _entry(
    sample: dict[str, Any], path: Path, key: str, split: str, indexed: Indexed
) -> dict[str, Any] | None:
    """The line of a sample in dataset.jsonl; None if it is left out. Raises UserError."""
    where = f"{path}, sample {key}"
    try:
        given = load_json(sample.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"{where}: its JSON is not an object")
    given = {name: value for name, value in given.items() if value is not None}
    indexed.ignored.update(f"{name} (JSON)" for name in given if name not in KNOWN)
    if "image" not in sample:
        indexed.left_out["samples without an image"] += 1
        return None
    entry = {"split": _split(given, path, split, where), "image": sample["image"]}
    text = sample.get("txt", b"").decode("utf-8", "replace").strip()
    captions = given.get("captions", given.get("caption", text))
    captions = captions if isinstance(captions, list) else [captions]
    entry["captions"] = [caption for caption in captions if not text_problem(caption)]
    # A gallery image may have no caption, if its JSON says so.
    if not entry["captions"] and (captions or entry["split"] == "train"):
        indexed.left_out["samples without a caption"] += 1
        return None
    if bad := len(captions) - len(entry["captions"]):
        indexed.left_out["captions without words"] += bad
    if "id" not in given and entry["split"] != "train":
        raise UserError(
            f"{where}: its JSON has no id, which a sample of {entry['split']} needs; write one"
        )
    entry |= {name: given[name] for name in ("id", *OPTIONAL) if name in given}
    return entry | {name: sample[name] for name in sample if name == "pair_image"}


def _split(given: dict[str, Any], path: Path, otherwise: str, where: str) -> str:
    """The split in the JSON, else `otherwise`, else that of the shard's name."""
    named = re.match(rf"({'|'.join(SPLITS)})(?![A-Za-z])", path.name)
    split = given.get("split", otherwise or (named[1] if named else ""))
    if not split:
        raise UserError(
            f"{where}: its JSON has no split, nor does the shard's name begin with one "
            f"({', '.join(SPLITS)}); give --split"
        )
    if split not in SPLITS:
        raise UserError(f"{where}: split is {split!r:.60}; it must be {', '.join(SPLITS)}")
    return split
