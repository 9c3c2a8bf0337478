"""Identities as the files of a data set name them, and the numbers that they get."""

from __future__ import annotations

from typing import Any

from datasets.reading import EntryChecks, normalise_path
from utils.errors import UserError
from utils.tokenizer import has_lone_surrogate


def checked_id(value: Any, entry: str, checks: EntryChecks, key: str = "id") -> int | str:
    """An identity as a file has it under `key`: an integer or text. Raises UserError naming the
    entry, also if an earlier entry wrote it in another way."""
    if type(value) not in (int, str):
        raise UserError(f"{entry}: {key} must be an integer or text, got {value!r:.60}")
    if has_lone_surrogate(str(value)):
        raise UserError(
            f"{entry}: {key} is {value!r}, with half a character (a lone surrogate) in it"
        )
    # Otherwise 7 and "7", or "anna" and "anna ", would be two people.
    checks.require_same((f"the {key}", normalise_path(str(value)).strip()), value, entry)
    return value


class People:
    """The identities of a split, numbered in the order of their first entries."""

    def __init__(self) -> None:
        self.numbers: dict[int | str, int] = {}
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def number(self, given: int | str | None) -> int:
        """The number of an id. An entry without one is an identity of its own."""
        known = None if given is None else self.numbers.get(given)
        if known is not None:
            return known
        if given is not None:
            self.numbers[given] = self.count
        self.count += 1
        return self.count - 1

    def sorted(self) -> list[int | str]:
        """The ids, integers before texts; empty if an entry has none."""
        if len(self.numbers) < self.count:
            return []
        return sorted(self.numbers, key=lambda given: (isinstance(given, str), given))

    def sorted_numbers(self) -> list[int]:
        """By number, the number in the order of `sorted`; without all ids, the same number."""
        new = list(range(self.count))
        for place, given in enumerate(self.sorted()):
            new[self.numbers[given]] = place
        return new
