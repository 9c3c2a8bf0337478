"""What every reader needs: checked values, images that exist, checks across entries."""

from __future__ import annotations

import functools
import hashlib
import os
import reprlib
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from datasets.compact import Entries
from datasets.images import MAX_BYTES
from datasets.records import Data, Image, TrainSample
from datasets.shards import BLOCK, INDEX_AGAIN, Member, image_status, open_image, split_member
from utils.errors import UserError
from utils.tokenizer import MAX_TEXT, MAX_WORD, is_cut, text_problem

LARGEST_PID = 2**31 - 1


def exists(path: Path) -> bool:
    """Whether the file or folder exists. Raises UserError if this user may not look."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (OSError, ValueError):  # ValueError: a zero byte, which no path can have
        return False
    return True


def checked_pid(value: Any, entry: str) -> int:
    """An identity: an integer from 0. Raises UserError naming the entry."""
    if type(value) is not int or not 0 <= value <= LARGEST_PID:
        raise UserError(
            f"{entry}: identity must be an integer from 0 to {LARGEST_PID}, "
            f"got {reprlib.repr(value)}"
        )
    return value


def checked_caption(value: Any, entry: str, checks: EntryChecks) -> str:
    """A caption: text with at least one word. Raises UserError naming the entry; `checks` counts
    the captions that are too long to be read to their end."""
    if problem := text_problem(value):
        raise UserError(f"{entry}: the caption {problem}")
    if is_cut(value):
        checks.cut_captions.append(entry)
    return value


def checked_captions(value: Any, entry: str, checks: EntryChecks, some: bool) -> list[str]:
    """A list of captions, not empty if there must be `some`. Raises UserError as
    `checked_caption`."""
    if not isinstance(value, list) or (some and not value):
        raise UserError(f"{entry}: captions must be a list of texts, got {value!r:.60}")
    return [checked_caption(c, f"{entry}, caption {k}", checks) for k, c in enumerate(value)]


class ImageFolder:
    """Finds images below a folder: files, and members of tar files (datasets/shards.py). It lists
    each folder once, which is faster than asking for every image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[str, _Listing] = {}
        self._tars: dict[str, tuple[str, int]] = {}  # by relative path: full path, bytes

    def find(self, relative: str, entry: str) -> str:
        """Full path of an image. If no file has exactly this name, the file whose name is equal
        after `normalise_path`. Raises UserError if it is missing or outside the folder, or if its
        tar ends before it does."""
        member = split_member(relative)
        if member is None:
            return self._find_file(relative, entry)
        shown = ascii(relative[:200])[1:-1]
        if ".." in member.name.split("/"):
            raise UserError(f"{entry}: image path {shown} leaves the data set's folder")
        if member.tar not in self._tars:
            path = self._find_file(member.tar, f"{entry}: image {shown}", "its shard")
            try:
                self._tars[member.tar] = path, os.stat(path).st_size
            except OSError as error:
                raise UserError(f"{entry}: {path}: {error.strerror}") from None
        path, length = self._tars[member.tar]
        if not BLOCK <= member.offset <= length - member.size:
            raise UserError(
                f"{entry}: image {shown}: {path} has only {length} bytes: it is incomplete, or was "
                "written anew after it was indexed; copy it again, or index it again: "
                f"{INDEX_AGAIN}"
            )
        return str(Member(path, *member[1:]))

    def _find_file(self, relative: str, entry: str, what: str = "image") -> str:
        shown = ascii(relative[:200])[1:-1]  # printable, whatever the file contains
        folder_name, name = os.path.split(relative)
        outside = ".." in relative.split("/") or os.path.isabs(relative)
        if (
            not outside
            and "//" not in relative
            and self._list(self._in_root(folder_name)).has(name)
        ):
            return os.path.join(self._in_root(folder_name), name)
        parts = normalise_path(relative).split("/")
        if outside or ".." in parts:
            raise UserError(f"{entry}: {what} path {shown} leaves the data set's folder")
        *folders, name = [part for part in parts if part not in ("", ".")] or [""]
        folder = self.root
        for part in folders:
            folder /= self._list(str(folder)).names.get(part, part)
        listing = self._list(str(folder))
        if listing.has(name := listing.names.get(name, name)):
            return str(folder / name)
        if listing.problem:
            raise UserError(f"{entry}: {what} {shown}: {folder} cannot be read: {listing.problem}")
        raise UserError(f"{entry}: {what} {shown} is missing in {self.root}")

    @property
    def folders(self) -> list[str]:
        """The folders that were listed, and the tar files with images."""
        return [*self._listed, *(path for path, _ in self._tars.values())]

    def _in_root(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else str(self.root)

    def _list(self, folder: str) -> _Listing:
        known = self._listed.get(folder)
        if known is None:
            known = self._listed[folder] = _Listing(Path(folder))
        return known


def normalise_path(path: str) -> str:
    """A path in one spelling: slashes instead of backslashes (Windows), and a letter with its
    accent as one character (Unicode's NFC; macOS writes two)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


class EntryChecks:
    """Checks across all entries of a data set: contradictions are refused, repetitions counted."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, ...], tuple[Any, str]] = {}  # by subject: value, entry
        self._first: dict[tuple[object, ...], str] = {}  # by kind and key: the first entry
        self._repetitions: dict[str, list[str]] = {}  # by kind: which entry repeats which
        self.cut_captions: list[str] = []  # entries whose caption is too long

    def count_repetition(self, kind: str, key: Any, entry: str) -> None:
        """Count the entry as a repetition if one before it has the same kind and key."""
        if (kind, key) in self._first:
            repetition = f"{entry} repeats {self._first[kind, key]}"
            self._repetitions.setdefault(kind, []).append(repetition)
        else:
            self._first[kind, key] = entry

    def require_same(self, subject: tuple[str, ...], value: Any, entry: str) -> None:
        """Raises UserError if an earlier entry has another value for a subject, such as
        ("the id", "7")."""
        other, first = self._facts.setdefault(subject, (value, entry))
        if other != value:
            raise UserError(
                f"{entry}: {' '.join(subject)} is {value!r:.60}, but {other!r:.60} in {first}; "
                "correct or remove one of them"
            )

    def add_sample(self, sample: TrainSample, pid: Any) -> None:
        """Check a training sample. `pid` is its identity as written in the file."""
        paths = [image.path for image in sample.images]
        self._require_same_pid("train", pid, paths, sample.entry)
        self.count_repetition("samples of train", (pid, *paths, sample.caption), sample.entry)

    def add_images(self, split: str, pid: Any, images: Sequence[Image], entry: str) -> None:
        """Check the gallery images of one entry. Only an entry with the same images in all views is
        a repetition: in TBAGPR an aerial image may belong to several pairs."""
        paths = [image.path for image in images]
        self._require_same_pid(split, pid, paths, entry)
        self.count_repetition(f"images of {split}, which count again", (pid, *paths), entry)

    def add_caption(self, split: str, key: tuple[object, ...], entry: str) -> None:
        """Check a query. `key` holds its caption and everything else that the file says of it."""
        self.count_repetition(f"captions of {split}, which count again", key, entry)

    def _require_same_pid(self, split: str, pid: Any, paths: Sequence[str], entry: str) -> None:
        for path in paths:
            self.require_same(("the identity of", path, "in", split), pid, entry)

    def warnings(self) -> list[str]:
        """A line for each kind of repetition, and one for captions that are too long, with the
        count and the first example."""
        lines = [f"repeated: {len(x)} {kind} ({x[0]})" for kind, x in self._repetitions.items()]
        if self.cut_captions:
            lines.append(
                f"cut: {len(self.cut_captions)} captions have over {MAX_TEXT} characters, or a "
                f"word of over {MAX_WORD}; the rest is not read ({self.cut_captions[0]})"
            )
        return lines


class CompactChecks(EntryChecks):
    """The same checks for millions of entries: 16 bytes for a fact instead of 500.

    It keeps hashes and sorts them at the end. Hashes cannot say what contradicts what, so
    `read_checked` reads the files again with the `suspects`, whose facts are then kept.
    """

    def __init__(self, suspects: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.suspects = suspects  # hashes of subjects
        self._subjects, self._values = array("q"), array("q")
        self._kinds: dict[str, tuple[array[int], array[int]]] = {}  # hashes, numbers of entries
        self._entries = Entries()
        self._last = ""

    def require_same(self, subject: tuple[str, ...], value: Any, entry: str) -> None:
        if hash(subject) in self.suspects:
            super().require_same(subject, value, entry)
        self._subjects.append(hash(subject))
        self._values.append(hash(value))

    def count_repetition(self, kind: str, key: Any, entry: str) -> None:
        if entry != self._last or not len(self._entries):
            self._entries.append(entry)
            self._last = entry
        hashes, numbers = self._kinds.setdefault(kind, (array("q"), array("i")))
        hashes.append(hash(key))
        numbers.append(len(self._entries) - 1)

    def contradictions(self) -> frozenset[int]:
        """Hashes of the subjects that have two values."""
        subjects, values = (
            np.frombuffer(self._subjects, np.int64),
            np.frombuffer(self._values, np.int64),
        )
        order = np.lexsort((values, subjects))
        subjects, values = subjects[order], values[order]
        differ = (subjects[1:] == subjects[:-1]) & (values[1:] != values[:-1])
        return frozenset(subjects[1:][differ].tolist())

    def warnings(self) -> list[str]:
        for kind, (hashes, numbers) in self._kinds.items():
            keys = np.frombuffer(hashes, np.int64)
            order = keys.argsort(kind="stable")  # equal ones in the order of the entries
            starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
            first = np.empty_like(order)  # by position, the first one that is equal
            first[order] = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
            repeats = np.flatnonzero(first != np.arange(len(first)))
            if len(repeats):
                pair = int(repeats[0]), int(first[repeats[0]])
                example = " repeats ".join(self._entries[numbers[i]] for i in pair)
                self._repetitions[kind] = [example] * len(repeats)
        return super().warnings()


def read_checked(read: Callable[[EntryChecks], Data]) -> Data:
    """Read a data set of millions of entries with checks across them. Raises UserError."""
    checks = CompactChecks()
    data = read(checks)
    if suspects := checks.contradictions():
        data = read(CompactChecks(suspects))  # raises, and names both entries
    return data


def same_content(paths: Sequence[str]) -> list[int]:
    """A number for every path, the same for images of the same bytes: 0, 1, ... in the order in
    which the contents first appear.

    Only images of equal size are read. An image that cannot be read equals no other.
    """

    def size_of(path: str) -> int:
        try:
            return image_status(path).size
        except OSError:
            return -1

    def digest(path: str) -> str:
        sha256 = hashlib.sha256()
        try:
            with open_image(path, MAX_BYTES) as file:
                while block := file.read(2**20):
                    sha256.update(block)
            return sha256.hexdigest()
        except (OSError, ValueError):
            return path

    by_size: dict[int, list[str]] = {}
    for path in dict.fromkeys(paths):
        by_size.setdefault(size_of(path), []).append(path)
    same_size = [path for group in by_size.values() if len(group) > 1 for path in group]
    with ThreadPoolExecutor() as pool:  # a slow disk answers several requests at once
        contents = dict(zip(same_size, pool.map(digest, same_size), strict=True))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(contents.get(path, path), len(numbers)) for path in paths]


class _Listing:
    """A folder's content: eight bytes for a file, since there may be millions.

    Attributes:
        problem: why the folder cannot be listed; empty if it can, or does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.problem = folder, ""
        files = (hash(item.name) for item in self._scan() if _is_file(item))
        self._hashes = np.sort(np.fromiter(files, np.int64))

    def has(self, name: str) -> bool:
        """Whether there is a file of exactly this name."""
        place = int(self._hashes.searchsorted(hash(name)))
        return place < len(self._hashes) and self._hashes[place] == hash(name)

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Of files and folders, by `normalise_path` of them."""
        # On disk, names are UTF-8, even if the system is set to another encoding.
        decoded = ((os.fsencode(item.name), item.name) for item in self._scan())
        return {normalise_path(n.decode("utf-8", "surrogateescape")): name for n, name in decoded}

    def _scan(self) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as items:
                yield from items
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass  # ValueError: a zero byte, which no path can have
        except OSError as error:
            self.problem = error.strerror or str(error)


def _is_file(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_file()
    except OSError:  # a link into a folder without access: opening the file will report it
        return True
