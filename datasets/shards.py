"""Images to open: files, and members of tar files ("shards") by their place in them.

    shards/train-000012.tar@5324800+18343/000123.jpg

names the tar file, where the member's content starts in it and how long that is (bytes), and the
member. tools/make_shards.py writes such paths into `dataset.jsonl`, the index for random access.
WebDataset's own index reader (wids) is no longer in its package; it scanned a whole tar whenever it
opened one, and kept only ten open. Here Python's `tarfile` makes the index, and reading a member is
one `pread` on a tar that stays open.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.files import open_file

BLOCK = tarfile.BLOCKSIZE  # bytes of a member's header, right before its content
MAX_OPEN = 256  # tars that stay open, in each process
MARK = ".tar@"
MEMBER = re.compile(r"(.*?\.tar)@([0-9]{1,18})\+([0-9]{1,18})/(.+)", re.DOTALL)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # of one piece, not sparse
NAME_FIELD = 100  # bytes of a name in the header; the rest of a longer one is in another block
INDEX_AGAIN = "python tools/make_shards.py --index FOLDER, the folder of dataset.jsonl"


class ShardChanged(OSError):
    """A tar does not have the member at the place that the index says."""


class Member(NamedTuple):
    """A member of a tar file; as text, the path of its image."""

    tar: str
    offset: int  # of its content
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}@{self.offset}+{self.size}/{self.name}"


class ImageStatus(NamedTuple):
    """What tells that an image was replaced."""

    size: int  # bytes
    mtime_ns: int  # of the file, or of the member's tar


def split_member(path: str | Path) -> Member | None:
    """The member of a tar that a path names; None for the path of a file."""
    path = os.fspath(path)
    match = MEMBER.fullmatch(path) if MARK in path else None
    return Member(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def open_image(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Open an image, a file or a member of a tar, for reading.

    Raises OSError as `open_file` does; ShardChanged if the tar has another member there; and
    ValueError, before anything is read, for more than `limit` bytes.
    """
    member = split_member(path)
    if member is not None:
        _check_size(member.size, limit)
        return BytesIO(_read(member))
    file = open_file(path)
    try:
        _check_size(os.fstat(file.fileno()).st_size, limit)
    except ValueError:
        file.close()
        raise
    return file


def image_status(path: str | Path) -> ImageStatus:
    """Size and time of the last change of an image. Raises OSError."""
    member = split_member(path)
    status = os.stat(path if member is None else member.tar)
    return ImageStatus(status.st_size if member is None else member.size, status.st_mtime_ns)


def is_header_of(header: bytes, member: Member) -> bool:
    """Whether a block is the header of the member: a file of this size and name.

    The header has only the start of a name of over 100 bytes, and in PAX format "?" for characters
    outside ASCII.
    """
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    stored = info.name.encode("utf-8", "surrogateescape")
    names = member.name.encode("utf-8", "surrogateescape"), member.name.encode("ascii", "replace")
    same = stored in names or (
        len(stored) == NAME_FIELD and any(name.startswith(stored) for name in names)
    )
    return same and info.type in REGULAR and info.size == member.size


def read_block(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`, or fewer at its end. Raises OSError."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


class _OpenTar:
    """A tar file for reading at any place, by any thread; closed when nothing uses it."""

    def __init__(self, path: str) -> None:
        self.file = open_file(path)

    def __del__(self) -> None:
        if "file" in vars(self):
            self.file.close()

    def read(self, member: Member) -> bytes:
        size = BLOCK + member.size
        data = read_block(self.file.fileno(), member.offset - BLOCK, size)
        if len(data) < size or not is_header_of(data[:BLOCK], member):
            raise ShardChanged("the tar no longer has this member at this place")
        return data[BLOCK:]


@functools.lru_cache(MAX_OPEN)
def _opened(tar: str) -> _OpenTar:
    return _OpenTar(tar)


def _read(member: Member) -> bytes:
    try:
        return _opened(member.tar).read(member)
    except OSError:  # another file may be at this path by now, or too many files are open
        _opened.cache_clear()
    return _opened(member.tar).read(member)


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"its {size} bytes are over the limit of {limit}")
