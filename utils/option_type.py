"""The type of a row in the table of options: name, type, default, allowed values and help text."""

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
# For each field of `Option` that is a bound: the comparison, and its words.
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


@dataclass(frozen=True)
class Option:
    """One option: a flag on the command line, a key in presets and in configs.yaml."""

    name: str
    type: type  # str, int, float or bool; the type of each value if there are several
    default: Any
    _: KW_ONLY
    help: str
    choices: tuple[str, ...] = ()
    # None: one value; a number: a list of that length; "+": a list of any length but 0
    count: int | str | None = None
    ge: float | None = None  # the value must be greater than or equal to this
    gt: float | None = None  # the value must be greater than this
    lt: float | None = None  # the value must be less than this
    le: float | None = None  # the value must be less than or equal to this
    pattern: str = ""  # regular expression that the complete text must match
    const: str = ""  # the value if the flag is given without one
    path: bool = False  # may name a file or folder on this machine: `~` is expanded
    may_differ: bool = False  # runs of the same experiment may have different values
    same_results: bool = False  # changes memory or speed; results change only by rounding

    def coerce(self, value: Any, where: str) -> Any:
        """Check a value from a preset or the command line and convert it to the option's type.

        YAML reads `1e-5` as text, so strings are converted to numbers. `where` is the file or
        "command line", for the message of an error. Raises UserError.
        """
        if value is None and self.default is None:
            return None
        if self.count is None:
            return self.coerce_one(value, where)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(self.count, int) and len(values) != self.count:
            shown = reprlib.repr(values)
            raise UserError(f"{where}: {self.name} takes {self.count} values, got {shown}")
        return [self.coerce_one(v, where) for v in values]

    def coerce_one(self, value: Any, where: str) -> Any:
        """Check and convert a single value, or one of a list. Raises UserError."""
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
        if not all(compare(typed, bound) for compare, _, bound in self._bounds()):
            raise UserError(f"{where}: {self.name} must be {self.bounds}, got {typed}")
        if self.type is not str and not -LARGEST <= typed <= LARGEST:  # also for NaN
            raise UserError(f"{where}: {self.name} is out of range, got {typed}")
        return typed

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "at least 1 and at most 64"; empty if there are none."""
        return " and ".join(f"{words} {bound:g}" for _, words, bound in self._bounds())

    def _typed(self, value: Any, where: str) -> Any:
        """Convert a value to the option's type. Raises UserError if it has another type."""
        wrong_type = UserError(
            f"{where}: {self.name} takes a value of type {self.type.__name__}, "
            f"got {reprlib.repr(value)}"
        )
        if isinstance(value, bool) != (self.type is bool):  # bool("x") and int(True) do not fail
            raise wrong_type
        if isinstance(value, (list, dict)) or value is None:
            raise wrong_type
        try:
            typed = self.type(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong_type from None
        if self.type is int and isinstance(value, float) and value != typed:
            raise wrong_type
        return typed

    def _bounds(self) -> list[tuple[Callable[[Any, Any], bool], str, float]]:
        fields = ((*BOUNDS[name], getattr(self, name)) for name in BOUNDS)
        return [field for field in fields if field[-1] is not None]
