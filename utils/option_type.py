"""What an option is: a name, a type, a default, what values it may have, and a help text."""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from utils.errors import UserError
from utils.files import expand

LARGEST = 2**31 - 1  # no option needs a larger number
# What a value is compared with, by the name of the field; and the words for it.
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


@dataclass(frozen=True)
class Option:
    """One option: a flag of the command line, a key of presets and of configs.yaml."""

    name: str
    type: type  # str, int, float or bool; of each value, if there are several
    default: Any
    _: KW_ONLY
    help: str
    choices: tuple[str, ...] = ()
    count: int | str | None = (
        None  # None: one value; a number: a list of so many; "+": of any length
    )
    ge: float | None = None  # the value must be greater than or equal to this,
    gt: float | None = None  # greater than this,
    lt: float | None = None  # less than this,
    le: float | None = None  # less than or equal to this
    pattern: str = ""  # regular expression for the whole text
    const: str = ""  # the value of a flag that stands without one
    path: bool = False  # may name a file or folder of this machine: `~` is expanded
    may_differ: bool = False  # between two runs of the same experiment
    same_results: bool = False  # changes memory or speed, and results by rounding only

    def coerce(self, value: Any, where: str) -> Any:
        """Check a value from a preset or the command line and give it its type.

        YAML reads `1e-5` as text, so numbers are also taken from strings. `where` says in a message
        where the value stands. Raises UserError.
        """
        if value is None and self.default is None:
            return None
        if self.count is None:
            return self.coerce_one(value, where)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(self.count, int) and len(values) != self.count:
            found = reprlib.repr(values)
            raise UserError(f"{where}: {self.name} takes {self.count} values, got {found}")
        return [self.coerce_one(v, where) for v in values]

    def coerce_one(self, value: Any, where: str) -> Any:
        """The same for the only value, or for one of a list."""
        if self.const and isinstance(value, bool):
            value = self.const if value else self.default
        typed = self._typed(value, where)
        if self.type is bool:
            return typed
        if self.path:
            typed = expand(typed)
        if self.pattern and not re.fullmatch(self.pattern, typed):
            raise UserError(f"{where}: {self.name} cannot be {typed!r}; {self.help}")
        if self.choices and typed not in self.choices:
            known = ", ".join(self.choices)
            raise UserError(f"{where}: {self.name} is {typed!r}; choose one of: {known}")
        if not all(holds(typed, bound) for holds, _, bound in self._bounds()):
            raise UserError(f"{where}: {self.name} must be {self.bounds}, got {typed}")
        if self.type is not str and not -LARGEST <= typed <= LARGEST:  # nor NaN
            raise UserError(f"{where}: {self.name} is out of range, got {typed}")
        return typed

    @property
    def bounds(self) -> str:
        """Its bounds in words, such as "at least 1 and at most 64"; empty if it has none."""
        return " and ".join(f"{words} {bound:g}" for _, words, bound in self._bounds())

    def _bounds(self) -> list[tuple[Callable[[Any, Any], bool], str, float]]:
        fields = ((*BOUNDS[name], getattr(self, name)) for name in BOUNDS)
        return [field for field in fields if field[-1] is not None]

    def _typed(self, value: Any, where: str) -> Any:
        """The value in its type. Raises UserError if it is of another one."""
        wrong = UserError(
            f"{where}: {self.name} takes a value of type {self.type.__name__}, "
            f"got {reprlib.repr(value)}"
        )
        if isinstance(value, bool) != (self.type is bool):  # bool(x) and int(True) never fail
            raise wrong
        if isinstance(value, (list, dict)) or value is None:
            raise wrong
        try:
            typed = self.type(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if self.type is int and isinstance(value, float) and value != typed:
            raise wrong
        return typed
