"""Pictures and measures without files, for the tests of the stages."""

from __future__ import annotations

from typing import Any

from construction.records import Candidate, Measure, Picture

PICTURE = {
    "source": "s",
    "name": "a/1.jpg",
    "file": "/raw/a/1.jpg",
    "view": "aerial",
    "person": "P1",
    "identity": "1",
}


def picture(**values: Any) -> Picture:
    return Picture(**{**PICTURE, **values})


def candidate(number: int, measure: dict[str, Any] | None = None, **values: Any) -> Candidate:
    """A good picture: sharp, of middle brightness."""
    good = {
        "file": "x.jpg",
        "sha256": f"{number:064x}",
        "width": 64,
        "height": 160,
        "sharpness": 100.0,
        "brightness": 120.0,
        "phash": f"{number * 0x0F0F0F0F0F0F0F0F % 2**64:016x}",
    }
    name = f"{values.get('view', 'aerial')}/{number}.jpg"
    return Candidate(number, picture(**{"name": name, **values}), Measure(**good | (measure or {})))
