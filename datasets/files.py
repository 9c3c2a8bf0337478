"""What all readers need: JSON, checked values, and images that are known to exist."""

from __future__ import annotations

import hashlib
import os
import reprlib
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from datasets.records import Image, TrainSample
from utils.documents import load_json
from utils.errors import UserError
from utils.files import open_file, read_file
from utils.text import READ, WORD, fault, is_cut

LARGEST_PID = 2**31 - 1


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError naming the file."""
    try:
        return load_json(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. Raises UserError if this user may not look."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (OSError, ValueError):  # ValueError: no path at all, with a zero byte in it
        return False
    return True


def checked_pid(value: Any, entry: str) -> int:
    """An identity: a whole number of at least 0."""
    if type(value) is not int or not 0 <= value <= LARGEST_PID:
        raise UserError(
            f"{entry}: identity must be a whole number of at least 0, at most {LARGEST_PID}, "
            f"got {reprlib.repr(value)}"
        )
    return value


def checked_caption(value: Any, entry: str, said: Said) -> str:
    """A caption: text with a word in it; `said` counts those of which the end is never read."""
    if wrong := fault(value):
        raise UserError(f"{entry}: the caption {wrong}")
    if is_cut(value):
        said.cut.append(entry)
    return value


def composed(path: str) -> str:
    """A path as another system may spell it: slashes for back-slashes, letters with their accents
    (Unicode's NFC; macOS writes them apart)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


class _Listing(NamedTuple):
    """A folder's content."""

    files: frozenset[str]
    names: dict[str, str]  # of files and folders, by their composed form
    problem: str  # why it could not be listed, unless there is no such folder


class ImageFolder:
    """Finds images below a folder; one listing per folder beats a look at every image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[str, _Listing] = {}

    def find(self, relative: str, entry: str) -> str:
        """Full path of an image; if no file has exactly this name, of the one whose name differs
        only as `composed` says. Raises UserError if it is missing or outside the folder."""
        shown = ascii(relative[:200])[1:-1]  # whatever stands there, a message can be printed
        full = self.root / relative
        outside = ".." in relative.split("/") or os.path.isabs(relative)
        if not outside and full.name in self._list(full.parent).files:
            return str(full)
        parts = composed(relative).split("/")
        if outside or ".." in parts:
            raise UserError(f"{entry}: image path {shown} leaves the data set's folder")
        *folders, name = [part for part in parts if part not in ("", ".")] or [""]
        folder = self.root
        for part in folders:
            folder /= self._list(folder).names.get(part, part)
        listing = self._list(folder)
        if (name := listing.names.get(name, name)) in listing.files:
            return str(folder / name)
        if listing.problem:
            raise UserError(f"{entry}: image {shown}: {folder} cannot be read: {listing.problem}")
        raise UserError(f"{entry}: image {shown} is missing in {self.root}")

    def _list(self, folder: Path) -> _Listing:
        if (known := self._listed.get(str(folder))) is not None:
            return known
        files, names, problem = set(), {}, ""
        try:
            with os.scandir(folder) as found:
                for item in found:
                    # Whatever encoding the system has for names, on disk they are UTF-8.
                    name = os.fsencode(item.name).decode("utf-8", "surrogateescape")
                    names[composed(name)] = item.name
                    if _is_file(item):
                        files.add(item.name)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass  # ValueError: no path at all, with a zero byte in it
        except OSError as error:
            problem = error.strerror or str(error)
        listing = self._listed[str(folder)] = _Listing(frozenset(files), names, problem)
        return listing


def _is_file(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_file()
    except OSError:  # a link into a folder that is not to be read: opening it will say so
        return True


class Said:
    """What a data set's files have said so far: contradictions are refused, repetitions counted."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, ...], tuple[Any, str]] = {}
        self._seen: dict[tuple[object, ...], str] = {}
        self._again: dict[str, list[str]] = {}  # by kind: places
        self.cut: list[str] = []  # where captions stand that are too long to be read whole

    def once(self, kind: str, key: Any, entry: str) -> None:
        """Count what is said a second time: a warning."""
        if (kind, key) in self._seen:
            self._again.setdefault(kind, []).append(f"{entry} repeats {self._seen[kind, key]}")
        else:
            self._seen[kind, key] = entry

    def agree(self, about: tuple[str, ...], value: Any, entry: str) -> None:
        """Remember a fact, as ("the id", "7"). Raises UserError if it was another before."""
        other, first = self._facts.setdefault(about, (value, entry))
        if other != value:
            raise UserError(
                f"{entry}: {' '.join(about)} is {value!r:.60}, and {other!r:.60} in {first}; "
                "correct one of them, or take it out"
            )

    def sample(self, sample: TrainSample, pid: Any) -> None:
        """A training sample, its identity as the file has it."""
        paths = [image.path for image in sample.images]
        self._show("train", pid, paths, sample.entry)
        self.once("samples of train", (pid, *paths, sample.caption), sample.entry)

    def images(self, split: str, pid: Any, images: Sequence[Image], entry: str) -> None:
        """What stands in a split's galleries together. Only a repetition of all of it counts: in
        TBAGPR an aerial image may belong to several pairs."""
        paths = [image.path for image in images]
        self._show(split, pid, paths, entry)
        self.once(f"images of {split}, which count again", (pid, *paths), entry)

    def caption(self, split: str, key: tuple[object, ...], entry: str) -> None:
        """A query, with the identity and all else that the file says of it."""
        self.once(f"captions of {split}, which count again", key, entry)

    def _show(self, split: str, pid: Any, paths: Sequence[str], entry: str) -> None:
        for path in paths:
            self.agree(("the identity of", path, "in", split), pid, entry)

    def warnings(self) -> list[str]:
        """A line for each kind of repetition, and for captions that are cut, with the count and the
        first."""
        lines = [f"said twice: {len(x)} {kind} ({x[0]})" for kind, x in self._again.items()]
        if self.cut:
            lines.append(
                f"cut: of {len(self.cut)} captions the first {READ} characters are read, or of "
                f"their words the first {WORD} ({self.cut[0]})"
            )
        return lines


def same_content(paths: Sequence[str]) -> list[int]:
    """A number for every file, equal where the bytes are equal: 0, 1, ... as they are first met.

    Only files of equal size are read. One that cannot be read is like no other.
    """

    def size_of(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    def digest(path: str) -> str:
        found = hashlib.sha256()
        try:
            with open_file(path) as file:
                while block := file.read(2**20):
                    found.update(block)
            return found.hexdigest()
        except OSError:
            return path

    by_size: dict[int, list[str]] = {}
    for path in dict.fromkeys(paths):
        by_size.setdefault(size_of(path), []).append(path)
    alike = [path for group in by_size.values() if len(group) > 1 for path in group]
    with ThreadPoolExecutor() as pool:  # a slow disk answers several requests at once
        contents = dict(zip(alike, pool.map(digest, alike), strict=True))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(contents.get(path, path), len(numbers)) for path in paths]
