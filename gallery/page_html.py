"""The parts of the search page as HTML, each from its template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from gallery.query import Hit
from gallery.records import clock
from gallery.sent import MAX_BYTES, SIDE, Sent
from gallery.service import Person
from utils.errors import UserError
from utils.pages import render

TEMPLATES = Path(__file__).parent / "templates"


def part(template: str, **values: object) -> str:
    """A part of the page."""
    return render(TEMPLATES / f"{template}.html.jinja", **values, facts_of=_facts, name_of=_name)


def problem(error: UserError) -> str:
    """A message for the visitor."""
    return part("problem", text=f"{error}")


def sent_part(sent: Sent | None) -> str:
    """The picture that the hits are like, or what chooses one."""
    return part("sent", small=sent.small if sent else "", most=MAX_BYTES, side=SIDE)


def heat_part(
    identifier: int, picture: str, heat: str, words: list[str], number: int = 0, reason: str = ""
) -> str:
    """A person beside its heat map, and the words for which there can be one."""
    return part(
        "heat",
        of=identifier,
        picture=picture,
        heat=heat,
        words=words,
        number=number,
        problem=reason,
    )


def person_facts(person: Person) -> list[tuple[str, str]]:
    """What is known of a person besides attributes, in words."""
    item = person.item
    known = [(name, item[name]) for name in ("view", "source", "camera", "identity")]
    known += [("time", _time(item)), ("file", item["path"]), ("id", f"{item['id']}")]
    return [(name, value) for name, value in known if value]


def _facts(hit: Hit) -> list[str]:
    """What a card says of a hit."""
    facts = [hit.item[name] for name in ("view", "source", "camera") if hit.item[name]]
    return [*facts, _time(hit.item)] if _time(hit.item) else facts


def _name(hit: Hit) -> str:
    return PurePath(hit.item["path"]).name


def _time(item: Mapping[str, Any]) -> str:
    """When an item was seen, in a video or by the picture's own time."""
    if item["frame_time"] is not None:
        return clock(item["frame_time"])
    return f"{item['taken']}" if item["taken"] is not None else ""
