"""Measure heat maps on rendered people, whose garments' pixels are known: the pointing game.

    python tools/pointing.py logs/AGDataAttr/<run> --people 60

The run must be trained on mini-TBAGPR. Test people are rendered anew, each in an aerial and a
ground picture. For each garment that a caption names, a heat map is made of the words that name it.
It hits if its hottest pixel lies on the garment (the pointing game, Zhang et al., 2018, without its
margin of 15 pixels). `mass` is the share of the heat that lies there. By chance both are the
garment's share of the picture, `area`. The last row is the whole caption and the whole person.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import numpy as np

from datasets.mini.build import sample_pair, sample_people
from datasets.mini.captions import LOWER_WORDS, SHOE_WORDS, UPPER_WORDS
from datasets.mini.people import Person
from datasets.mini.view import View, paint
from gallery.heatmap import about, heat_maps
from processor.inference import load_run
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.options import OPTIONS
from utils.tables import console

TEST = 2  # the split's number in the renderer
CHANGED = 12  # grey levels by which a pixel of a garment changes with its colour
SMALLEST = 0.004  # share of the picture; what is smaller is hidden
OTHERS = ("white", "black", "red")  # colours; each pixel differs from one of them
WHOLE = "caption, person"


def names_of(person: Person) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """For each garment, the words that captions have for it, and the person's fields of colour."""
    dress = person.upper == "dress"
    names: dict[str, tuple[tuple[str, ...], list[str]]] = {
        "upper": (UPPER_WORDS[person.upper], ["upper_colour"] + ["lower_colour"] * dress)
    }
    if not dress:
        names["lower"] = LOWER_WORDS[person.lower], ["lower_colour"]
    names["shoes"] = SHOE_WORDS[person.shoes], ["shoe_colour"]
    if person.bag != "none":
        names["bag"] = ("backpack", "rucksack", "handbag", "bag"), ["bag_colour"]
    if person.hat != "none":
        names["hat"] = ("cap", "hat"), ["hat_colour"]
    return names


def garment(person: Person, view: View, fields: Sequence[str]) -> np.ndarray:
    """Which pixels change with the colours of a garment, [h, w] bool."""
    picture, changed = np.asarray(paint(person, view), int), []
    for colour in OTHERS:
        other = paint(replace(person, **dict.fromkeys(fields, colour)), view)  # type: ignore[arg-type]
        changed.append(np.abs(picture - np.asarray(other, int)).max(axis=-1) > CHANGED)
    return np.any(changed, axis=0)


def scenes(people: int, seed: int = 0) -> Iterator[tuple[Any, str, dict[str, tuple[str, Any]]]]:
    """For each picture: the picture, its caption, and {garment: (words of the caption, pixels)}."""
    for source, identity, person in sample_people(seed, TEST, people):
        views, captions, _ = sample_pair(seed, TEST, source, identity, 0, person)
        for view in views:
            image, named = paint(person, view), {}
            for part, (words, fields) in names_of(person).items():
                said = [w for w in words if re.search(rf"(?<![\w-]){w}(?![\w-])", captions[0])]
                mask = garment(person, view, fields) if said else np.zeros(1, bool)
                if mask.mean() > SMALLEST:
                    named[part] = max(said, key=len), mask
            nobody = np.abs(np.asarray(image, int) - np.asarray(paint(None, view), int))
            named[WHOLE] = "", nobody.max(axis=-1) > CHANGED
            yield image, captions[0], named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument("--people", default=60, type=int, help="test people, two pictures of each")
    parser.add_argument(
        "--coarse", action="store_true", default=False, help="maps of one copy of the picture"
    )
    parser.add_argument("--device", default="auto", choices=OPTIONS["device"].choices)
    given = parser.parse_args()
    if given.people < 1:
        raise UserError(f"--people {given.people}: must be 1 or more")
    run = load_run(given.run, device=given.device, precision="fp32")
    results: dict[str, list[tuple[float, float, float]]] = {}
    for image, caption, named in scenes(given.people):
        for part, (word, mask) in named.items():
            text_D = run.encode_text(about(caption, word) if word else caption)[0]
            (heat,) = heat_maps(run.model, [image], text_D, fine=not given.coarse)
            hit = bool(mask[np.unravel_index(heat.argmax(), heat.shape)])
            mass = float(heat[mask].sum() / (heat.sum() or 1))
            results.setdefault(part, []).append((hit, mass, float(mask.mean())))
    whole = results.pop(WHOLE)
    results = dict(sorted(results.items()))
    results |= {"all garments": sum(results.values(), []), WHOLE: whole}
    rows = [
        [part, len(of), *(f"{100 * value:.1f}" for value in np.mean(of, axis=0))]
        for part, of in results.items()
    ]
    say(console(["heat map of", "maps", "hits %", "mass %", "area %"], rows))


if __name__ == "__main__":
    run_main(main)
