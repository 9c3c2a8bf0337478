"""What all readers need: JSON, checked values, and images that are known to exist."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.errors import UserError

LARGEST_PID = 2**31 - 1


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError naming the file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None


def checked_pid(value: Any, entry: str) -> int:
    """An identity: a whole number of at least 0."""
    if type(value) is not int or not 0 <= value <= LARGEST_PID:
        raise UserError(
            f"{entry}: identity must be a whole number of at least 0, at most {LARGEST_PID}, "
            f"got {reprlib.repr(value)}"
        )
    return value


def checked_caption(value: Any, entry: str) -> str:
    """A caption: text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value == "" else reprlib.repr(value)
        raise UserError(f"{entry}: the caption is {found}")
    return value


class ImageFolder:
    """Finds images below a folder; one listing per folder beats a look at every image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[str, set[str]] = {}

    def find(self, relative: str, entry: str) -> str:
        """Full path of an image. Raises UserError if it is missing or outside the folder."""
        shown = ascii(relative[:200])[1:-1]  # whatever stands there, a message can be printed
        if ".." in relative.split("/") or os.path.isabs(relative):
            raise UserError(f"{entry}: image path {shown} leaves the data set's folder")
        full = self.root / relative
        parent = str(full.parent)
        if parent not in self._listed:
            try:
                with os.scandir(parent) as found:
                    self._listed[parent] = {item.name for item in found if item.is_file()}
            except (OSError, ValueError):  # ValueError: no path at all, with a zero byte in it
                self._listed[parent] = set()
        if full.name not in self._listed[parent]:
            raise UserError(f"{entry}: image {shown} is missing in {self.root}")
        return str(full)


def same_content(paths: Sequence[str]) -> list[int]:
    """A number for every file, equal where the bytes are equal.

    Only files of equal size are read. One that cannot be read is like no other.
    """

    def size_of(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    def digest(path: str) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
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
