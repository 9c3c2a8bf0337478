"""Filters: what they say, what they refuse, and that their text is never more than a filter."""

from datetime import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gallery.records import schema_with
from gallery.where import (
    MAX_DEPTH,
    MAX_LENGTH,
    OPPOSITE,
    Among,
    And,
    Comparison,
    Like,
    Missing,
    Not,
    Or,
    parse,
    to_mask,
    to_text,
    unknown_values,
)
from tests.gallery.made import NASTY, made_items
from utils.errors import UserError

ITEMS = made_items(60)
SCHEMA = ITEMS.schema
ROWS = ITEMS.to_pylist()


def values_of(column: str) -> st.SearchStrategy:
    """Values that a column can be compared with: those that occur in it, and others."""
    kind = SCHEMA.field(column).type
    present = [row[column] for row in ROWS if row[column] is not None]
    if pa.types.is_string(kind):
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)  # fmt: skip
        return st.sampled_from(present + NASTY) | text
    if pa.types.is_timestamp(kind):
        return st.sampled_from(present) | st.datetimes().map(lambda t: t.replace(microsecond=0))  # fmt: skip
    if pa.types.is_floating(kind):
        bits = 32 if kind == pa.float32() else 64
        return st.sampled_from(present) | st.floats(-(2.0**99), 2.0**99, width=bits).map(
            lambda x: x + 0.0
        )
    return st.sampled_from(present) | st.integers(-(2**31), 2**31 - 1)


def conditions() -> st.SearchStrategy:
    columns = st.sampled_from(SCHEMA.names)
    texts = st.sampled_from([f.name for f in SCHEMA if pa.types.is_string(f.type)])
    pattern = st.text("ab%_/.0'u\nG", max_size=5)
    return st.one_of(
        columns.flatmap(lambda c: st.builds(Comparison, st.just(c), st.sampled_from(list(OPPOSITE)), values_of(c))),
        columns.flatmap(lambda c: st.builds(Among, st.just(c), st.lists(values_of(c), min_size=1, max_size=3).map(tuple))),
        st.builds(Like, texts, pattern),
        st.builds(Missing, columns),
    )  # fmt: skip


FILTERS = st.recursive(
    conditions(),
    lambda parts: st.one_of(
        st.builds(Not, parts),
        st.builds(And, st.lists(parts, min_size=2, max_size=3).map(tuple)),
        st.builds(Or, st.lists(parts, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


def slow(part, row) -> bool | None:
    """A filter's truth for one item, by SQL's rules, without Arrow."""
    if isinstance(part, Not):
        inner = slow(part.part, row)
        return None if inner is None else not inner
    if isinstance(part, (And, Or)):
        decisive = isinstance(part, Or)
        truths = [slow(p, row) for p in part.parts]
        if decisive in truths:
            return decisive
        return None if None in truths else not decisive
    value = row[part.column]
    if isinstance(part, Missing):
        return value is None
    if value is None:
        return None
    if isinstance(part, Among):
        return value in part.values
    if isinstance(part, Like):
        return fits(value, part.pattern)
    compared = {"=": value == part.value, "<": value < part.value, ">": value > part.value}
    compared |= {"!=": not compared["="], ">=": not compared["<"], "<=": not compared[">"]}
    return compared[part.operator]


def fits(text: str, pattern: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "%":
        return any(fits(text[n:], pattern[1:]) for n in range(len(text) + 1))
    return bool(text) and pattern[0] in ("_", text[0]) and fits(text[1:], pattern[1:])


@settings(max_examples=150, deadline=None)
@given(FILTERS)
def test_a_filter_survives_its_text(part):
    assert parse(to_text(part), SCHEMA) == part


@settings(max_examples=150, deadline=None)
@given(FILTERS)
def test_the_mask_is_that_of_a_slow_python_version(part):
    assert to_mask(part, ITEMS).tolist() == [slow(part, row) is True for row in ROWS]


@settings(max_examples=300, deadline=None)
@given(st.text("aview='()<>!=,% \"andornotinlike.0-1e\\;\n", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_filter_or_an_error_of_one_line(text):
    try:
        part = parse(text, SCHEMA)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("filter, character ")
    else:
        assert len(to_mask(part, ITEMS)) == len(ITEMS)


def test_the_words_bind_as_in_sql():
    text = "view = 'aerial' or not left < 3 and source in ('a', 'b') and camera is not null"
    assert parse(text, SCHEMA) == Or(
        (
            Comparison("view", "=", "aerial"),
            And(
                (
                    Not(Comparison("left", "<", 3)),
                    Among("source", ("a", "b")),
                    Not(Missing("camera")),
                )
            ),
        )
    )
    assert parse("(view = 'a' or left < 3) and top > -1", SCHEMA) == And(
        (Or((Comparison("view", "=", "a"), Comparison("left", "<", 3))), Comparison("top", ">", -1))
    )
    assert parse("NOT view LIKE 'a%'", SCHEMA) == parse("view not like 'a%'", SCHEMA)
    assert parse("\"hair colour\" = 'it''s'", SCHEMA) == Comparison("hair colour", "=", "it's")


def test_a_date_is_midnight_and_a_time_may_follow():
    assert parse("taken >= '2025-05-01'", SCHEMA).value == datetime(2025, 5, 1)
    assert parse("taken < '2025-05-01T08:30'", SCHEMA).value == datetime(2025, 5, 1, 8, 30)


def test_a_score_equals_the_number_that_was_stored_in_single_precision():
    mask = to_mask(parse("gender_score = 0.9", SCHEMA), ITEMS)
    assert mask.any() and mask.tolist() == [
        score is not None and abs(score - 0.9) < 1e-6 for score in ITEMS["gender_score"].to_pylist()
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1, at the end: the name of a column is expected"),
        ("veiw = 'aerial'", "character 1, at 'veiw': no such column. Did you mean 'view'?"),
        ("view = aerial", "character 8, at 'aerial': a value is expected here; text is in single quotes"),
        ('view = "aerial"', "text is in single quotes"),
        ("view == 'aerial'", "character 7, at '=': a value is expected"),
        ("view 'aerial'", "view is followed by =, !=, <, <=, >, >=, in, like or is"),
        ("view = 'aerial", "character 8, at ''aerial': the text has no closing quote"),
        ("view = 3", "character 8, at '3': view holds text, in single quotes"),
        ("left = 'a'", "character 8, at ''a'': left holds numbers"),
        ("left > 2.5", "left holds whole numbers"),
        ("left > 99999999999", "the number is too large"),
        ("frame_time > 1e999", "the number is too large"),
        ("frame_time > 1.2.3", "no column, value or operator"),
        ("left like '1%'", "left holds numbers"),
        ("frame_time like 3", "'like' is for text, and frame_time is none"),
        ("path like 'a\\%'", "a pattern has no backslash"),
        ("taken > 'yesterday'", "taken is compared with a date such as '2025-05-01'"),
        ("taken > '2025-02-30'", "taken is compared with a date"),
        ("taken > 3", "taken is compared with a date"),
        ("view in 'a'", "'in' is followed by values in parentheses"),
        ("view in ('a' 'b')", "character 14, at ''b'': a ',' or a ')' is missing"),
        ("view in ()", "a value is expected"),
        ("view is 'a'", "'is' is followed by 'null' or 'not null'"),
        ("view not = 'a'", "view is followed by 'in' or 'like'"),
        ("(view = 'a'", "character 12, at the end: a ')' is missing"),
        ("view = 'a')", "character 11, at ')': 'and', 'or' or the end is expected"),
        ("view = 'a'; drop", "character 11, at '; drop': this is no column, value or operator"),
        ("view = 'a' view = 'b'", "'and', 'or' or the end is expected"),
        ("__import__('os')", "no such column"),
        ("view = '\0'", "a character that no column holds"),
        ("(" * 60, f"more than {MAX_DEPTH} nested"),
        ("not " * 60, f"more than {MAX_DEPTH} nested"),
        ("a" * (MAX_LENGTH + 1), f"at most {MAX_LENGTH} are read"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(text, message):
    with pytest.raises(UserError) as error:
        parse(text, SCHEMA)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", NASTY)
def test_a_text_that_looks_like_code_is_compared_as_it_is(text):
    quoted = text.replace("'", "''")
    mask = to_mask(parse(f"camera = '{quoted}'", SCHEMA), ITEMS)
    assert mask.tolist() == [row["camera"] == text for row in ROWS]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("view = 'airial'", ["no view is 'airial'; there are aerial, ground"]),
        ("not view = 'airial' and left > 3", ["no view is 'airial'; there are aerial, ground"]),
        ("gender in ('female', 'men') or view != 'x'", ["no gender is 'men'; there are female, male", "no view is 'x'; there are aerial, ground"]),
        ("view = 'aerial' and path like 'x%' and left = 12345", []),
        ("path = 'x'", ["no path is 'x'; there are a/0000.jpg, a/0002.jpg, a/0004.jpg, a/0006.jpg, a/0008.jpg, a/0010.jpg, a/0012.jpg, a/0014.jpg, a/0016.jpg, a/0018.jpg, ..."]),
    ],
)  # fmt: skip
def test_texts_that_nobody_has_are_told_with_those_that_there_are(text, lines):
    assert unknown_values(parse(text, SCHEMA), ITEMS) == lines


def test_an_attribute_with_the_name_of_a_column_is_told():
    schema = schema_with(["height"])
    with pytest.raises(UserError, match="height holds numbers; the attribute is person_height"):
        parse("height = 'short'", schema)
    with pytest.raises(UserError, match="left holds numbers$"):
        parse("left = 'short'", schema)
