"""Filters over the columns of a gallery: `view = 'aerial' and frame_time >= 12.5`.

    view = 'aerial' and (frame_time >= 12.5 or source in ('AG-ReID', 'G2APS-AG'))
    not gender = 'female' and path like 'gate 3/%' and camera is not null
    taken >= '2025-05-01 08:00' and "hair colour" != 'black'

A condition compares a column with a value, by `=`, `!=`, `<`, `<=`, `>`, `>=`, `in`, `not in`,
`like` (% stands for any text, _ for one character), `not like`, `is null` or `is not null`. `not`,
`and` and `or` bind in this order; parentheses change it. Text is in single quotes, and a quote in
it is written twice. A column whose name is no plain word is in double quotes. `taken` is compared
with a date, or a date and a time.

As in SQL, a comparison with a missing value is neither true nor false: neither `gender = 'female'`
nor `not gender = 'female'` keeps an item without a gender.

A filter is parsed into the records below and checked against the columns and their types. Nothing
of its text is run, and `to_milvus` writes the text for Milvus from the records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gallery.records import column_of
from utils.errors import UserError, suggest

MAX_LENGTH = 4000  # characters of a filter
SHOWN = 10  # values of a column in a message
MAX_DEPTH = 50  # nested parentheses and `not`
OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
KERNELS = {
    "=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal,
    ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
WORDS = {"and", "or", "not", "in", "like", "is", "null"}
TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*')
    | (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w.])
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<word>[^\W\d]\w*)
    | (?P<symbol><=|>=|!=|[=<>(),])""",
    re.VERBOSE,
)
SPACE = re.compile(r"\s*")
DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?)?", re.ASCII)
Value = str | int | float | datetime


@dataclass(frozen=True)
class Comparison:
    """A column against a value; `operator` is a key of KERNELS."""

    column: str
    operator: str
    value: Value


@dataclass(frozen=True)
class Among:
    """A column is one of several values."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Like:
    """A column fits a pattern with the wildcards % and _."""

    column: str
    pattern: str


@dataclass(frozen=True)
class Missing:
    """A column has no value."""

    column: str


@dataclass(frozen=True)
class Not:
    part: Filter


@dataclass(frozen=True)
class And:
    parts: tuple[Filter, ...]  # two or more


@dataclass(frozen=True)
class Or:
    parts: tuple[Filter, ...]  # two or more


Filter = Comparison | Among | Like | Missing | Not | And | Or


def parse(text: str, schema: pa.Schema) -> Filter:
    """The filter that a text says. Raises UserError, which names the place of the mistake.

    Args:
        schema: of the items; its strings, numbers and timestamps can be compared.
    """
    return _Parser(text, schema).parse()


def all_of(parts: Sequence[Filter]) -> Filter | None:
    """The filter that keeps what all of these keep; None if there is none."""
    return And(tuple(parts)) if len(parts) > 1 else next(iter(parts), None)


def to_text(part: Filter) -> str:
    """The filter as a text that `parse` reads as the same filter."""
    if isinstance(part, Comparison):
        return f"{_name(part.column)} {part.operator} {_literal(part.value)}"
    if isinstance(part, Among):
        return f"{_name(part.column)} in ({', '.join(map(_literal, part.values))})"
    if isinstance(part, Like):
        return f"{_name(part.column)} like {_literal(part.pattern)}"
    if isinstance(part, Missing):
        return f"{_name(part.column)} is null"
    if isinstance(part, Not):
        return f"not {_grouped(part.part)}"
    return (" and " if isinstance(part, And) else " or ").join(map(_grouped, part.parts))


def to_mask(part: Filter, table: pa.Table) -> np.ndarray:
    """Which rows of a table a filter keeps, bool [N]."""
    mask = pc.fill_null(_evaluate(part, table), False)
    return mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy()


def unknown_values(part: Filter, table: pa.Table) -> list[str]:
    """Lines about texts that a filter asks for and nobody has, with those that there are: "no view
    is 'airial'; there are aerial, ground"."""
    if isinstance(part, Not):
        return unknown_values(part.part, table)
    if isinstance(part, (And, Or)):
        return [line for p in part.parts for line in unknown_values(p, table)]
    values: tuple[Value, ...] = ()
    if isinstance(part, Comparison) and part.operator in ("=", "!="):
        values = (part.value,)
    elif isinstance(part, Among):
        values = part.values
    lines = []
    for value in values:
        if isinstance(value, str) and not pc.any(pc.equal(table[part.column], value)).as_py():
            known = sorted(pc.unique(table[part.column].drop_null()).to_pylist())
            more = ", ..." if len(known) > SHOWN else ""
            there = f"there are {', '.join(known[:SHOWN])}{more}" if known else "it has no values"
            lines.append(f"no {part.column} is '{value}'; {there}")
    return lines


def to_milvus(part: Filter, field: Callable[[str], str], negated: bool = False) -> str:
    """The filter as a boolean expression of Milvus, where timestamps are whole seconds.

    Milvus treats missing values differently from operator to operator. So `not` goes inward, to the
    single conditions, each of which asks for a value itself.

    Args:
        field: the name in Milvus of a column.
        negated: whether the expression is to say the opposite.
    """
    if isinstance(part, Not):
        return to_milvus(part.part, field, not negated)
    if isinstance(part, (And, Or)):
        word = "and" if isinstance(part, And) != negated else "or"
        return f" {word} ".join(f"({to_milvus(p, field, negated)})" for p in part.parts)
    name = field(part.column)
    if isinstance(part, Missing):
        return f"{name} is not null" if negated else f"{name} is null"
    if isinstance(part, Comparison):
        operator = OPPOSITE[part.operator] if negated else part.operator
        said = f"{name} {'==' if operator == '=' else operator} {_milvus_literal(part.value)}"
    elif isinstance(part, Among):
        values = ", ".join(map(_milvus_literal, part.values))
        said = f"{name} {'not in' if negated else 'in'} [{values}]"
    else:
        said = f"{name} like {_milvus_literal(part.pattern)}"
        said = f"not ({said})" if negated else said
    return f"{name} is not null and {said}"


def _evaluate(part: Filter, table: pa.Table) -> Any:
    """True, false or null for each row, [N]."""
    if isinstance(part, Not):
        return pc.invert(_evaluate(part.part, table))
    if isinstance(part, (And, Or)):
        join = pc.and_kleene if isinstance(part, And) else pc.or_kleene
        first, *others = (_evaluate(p, table) for p in part.parts)
        for other in others:
            first = join(first, other)
        return first
    column = table[part.column]
    if isinstance(part, Missing):
        return pc.is_null(column)
    if isinstance(part, Comparison):
        return KERNELS[part.operator](column, pa.scalar(part.value, column.type))
    if isinstance(part, Like):
        return pc.match_like(column, part.pattern)
    among = pc.is_in(column, value_set=pa.array(part.values, column.type))
    return pc.if_else(pc.is_valid(column), among, pa.scalar(None, pa.bool_()))


@dataclass(frozen=True)
class _Token:
    kind: str  # a group of TOKEN, or "end"
    text: str
    start: int


class _Parser:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema, self.depth = text, schema, 0
        if len(text) > MAX_LENGTH:
            raise UserError(f"filter: {len(text)} characters; at most {MAX_LENGTH} are read")
        self.tokens = self._tokens()
        self.next = next(self.tokens)

    def parse(self) -> Filter:
        part = self._either()
        if self.next.kind != "end":
            raise self._error("'and', 'or' or the end is expected here")
        return part

    def _tokens(self) -> Iterator[_Token]:
        start = 0
        while True:
            space = SPACE.match(self.text, start)
            start = space.end() if space else start
            if start == len(self.text):
                break
            match = TOKEN.match(self.text, start)
            if not match:
                self.next = _Token("", self.text[start:], start)
                char = self.text[start]
                quote = "the text has no closing quote" if char in "'\"" else ""
                raise self._error(quote or "this is no column, value or operator")
            kind = str(match.lastgroup)
            if kind == "word" and match.group().lower() in WORDS:
                kind = match.group().lower()
            yield _Token(kind, match.group(), start)
            start = match.end()
        while True:
            yield _Token("end", "", len(self.text))

    def _error(self, what: str, token: _Token | None = None) -> UserError:
        token = token or self.next
        place = f"'{token.text[:40]}'" if token.text else "the end"
        return UserError(f"filter, character {token.start + 1}, at {place}: {what}")

    def _take(self) -> _Token:
        token, self.next = self.next, next(self.tokens)
        return token

    def _took(self, *kinds: str) -> bool:
        """Take the next token if it is a word or symbol of these."""
        if self.next.kind in kinds or (self.next.kind == "symbol" and self.next.text in kinds):
            self._take()
            return True
        return False

    def _either(self) -> Filter:
        parts = [self._both()]
        while self._took("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _both(self) -> Filter:
        parts = [self._single()]
        while self._took("and"):
            parts.append(self._single())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _single(self) -> Filter:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} nested parentheses and 'not'")
        part: Filter
        if self._took("not"):
            part = Not(self._single())
        elif self._took("("):
            part = self._either()
            if not self._took(")"):
                raise self._error("a ')' is missing here")
        else:
            part = self._condition()
        self.depth -= 1
        return part

    def _condition(self) -> Filter:
        token = self._take()
        if token.kind not in ("word", "quoted"):
            raise self._error("the name of a column is expected here", token)
        name = token.text[1:-1].replace('""', '"') if token.kind == "quoted" else token.text
        if name not in self.schema.names:
            raise self._error(f"no such column.{self._suggestion(name)}", token)
        kind = self.schema.field(name).type
        if self._took("is"):
            negated = self._took("not")
            if not self._took("null"):
                raise self._error("'is' is followed by 'null' or 'not null'")
            return Not(Missing(name)) if negated else Missing(name)
        negated = self._took("not")
        part: Filter
        if self._took("in"):
            part = Among(name, self._values(name, kind))
        elif self._took("like"):
            part = Like(name, self._pattern(name, kind))
        elif self.next.kind == "symbol" and self.next.text in OPPOSITE and not negated:
            operator = self._take().text
            part = Comparison(name, operator, self._value(name, kind))
        else:
            operators = "'in' or 'like'" if negated else f"{', '.join(OPPOSITE)}, in, like or is"
            raise self._error(f"{name} is followed by {operators}")
        return Not(part) if negated else part

    def _suggestion(self, name: str) -> str:
        return suggest(name, self.schema.names) or f" There are {', '.join(self.schema.names)}"

    def _values(self, name: str, kind: pa.DataType) -> tuple[Value, ...]:
        if not self._took("("):
            raise self._error("'in' is followed by values in parentheses: in ('a', 'b')")
        values = [self._value(name, kind)]
        while self._took(","):
            values.append(self._value(name, kind))
        if not self._took(")"):
            raise self._error("a ',' or a ')' is missing here")
        return tuple(values)

    def _pattern(self, name: str, kind: pa.DataType) -> str:
        token = self.next
        pattern = self._value(name, kind)
        if not isinstance(pattern, str):
            raise self._error(f"'like' is for text, and {name} is none", token)
        if "\\" in pattern:  # in some stores it makes the next character a plain one, in others not
            raise self._error("a pattern has no backslash; _ stands for any character", token)
        return pattern

    def _value(self, name: str, kind: pa.DataType) -> Value:
        token = self._take()
        if token.kind in ("word", "quoted"):
            raise self._error("a value is expected here; text is in single quotes", token)
        if token.kind not in ("text", "number"):
            raise self._error("a value is expected here: 'text' or a number", token)
        text = token.text[1:-1].replace("''", "'") if token.kind == "text" else token.text
        if pa.types.is_timestamp(kind):
            return self._date(name, text, token)
        if (token.kind == "text") != pa.types.is_string(kind):
            what = "text, in single quotes" if pa.types.is_string(kind) else "numbers"
            other = column_of(name)
            if token.kind == "text" and other != name and other in self.schema.names:
                what += f"; the attribute is {other}"
            raise self._error(f"{name} holds {what}", token)
        if token.kind == "text":
            if not text.isprintable() and re.search("[\0\ud800-\udfff]", text):
                raise self._error("the text has a character that no column holds", token)
            return text
        return self._number(name, text, kind, token)

    def _date(self, name: str, text: str, token: _Token) -> datetime:
        if token.kind == "text" and DATE.fullmatch(text):
            try:
                return datetime.fromisoformat(text)
            except ValueError:  # such as 2025-02-30
                pass
        example = "'2025-05-01' or '2025-05-01 08:30:00'"
        raise self._error(f"{name} is compared with a date such as {example}", token)

    def _number(self, name: str, text: str, kind: pa.DataType, token: _Token) -> int | float:
        value = float(text)
        if pa.types.is_floating(kind):
            value = float(kind.to_pandas_dtype()(value)) if abs(value) < 3e38 else math.inf
            if not math.isfinite(value):
                raise self._error("the number is too large", token)
            return value + 0.0  # there is no -0
        if not re.fullmatch(r"[+-]?[0-9]+", text):
            raise self._error(f"{name} holds whole numbers", token)
        whole = int(text)
        try:
            pa.scalar(whole, kind)
        except (pa.ArrowInvalid, OverflowError):
            raise self._error("the number is too large", token) from None
        return whole


def _name(column: str) -> str:
    plain = re.fullmatch(r"[^\W\d]\w*", column) and column.lower() not in WORDS
    return column if plain else '"' + column.replace('"', '""') + '"'


def _literal(value: Value) -> str:
    if isinstance(value, (str, datetime)):
        return "'" + str(value).replace("'", "''") + "'"
    return repr(value)


def _grouped(part: Filter) -> str:
    return f"({to_text(part)})" if isinstance(part, (And, Or)) else to_text(part)


def _milvus_literal(value: Value) -> str:
    if isinstance(value, datetime):
        return str(int((value - datetime(1970, 1, 1)).total_seconds()))
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        for char, escape in {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.items():
            quoted = quoted.replace(char, escape)
        return f'"{quoted}"'
    return repr(value)
