"""Candidates and pairs of small pictures, and recipes for tests."""

from __future__ import annotations

import hashlib

from PIL import Image as PILImage

from construction.recipe import Recipe
from construction.records import Candidate, Label, Measure, Pair, Picture


def candidate(
    folder, number, view="ground", person="p0", brightness=120.0, notes=None
) -> Candidate:
    """A picture of one colour, which its number gives."""
    file = folder / f"{number}.png"
    PILImage.new("RGB", (16, 32), ((37 * number) % 256, (91 * number) % 256, 60)).save(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    picture = Picture(
        "AG-ReID", file.name, str(file), view, person, person, notes=notes or {}
    )  # fmt: skip
    measure = Measure(str(file), sha256, 16, 32, brightness=brightness)
    return Candidate(number, picture, measure)


def labels(origin="model", **values) -> dict[str, Label]:
    return {name: Label(value, 1.0, origin) for name, value in values.items()}


def pair(folder, number, aerial=None, ground=None) -> Pair:
    """A pair with the labels of both views."""
    pictures = (candidate(folder, 2 * number, "aerial"), candidate(folder, 2 * number + 1))
    return Pair(number, "train", *pictures, {"aerial": aerial or {}, "ground": ground or {}})


def recipe(**parts) -> Recipe:
    """A recipe with the layout custom, unless `parts` has another."""
    source = {"name": "AG-ReID", "reader": "ag_reid"}
    return Recipe.model_validate({"sources": [source], "output": {"layout": "custom"}, **parts})
