"""Captions from labels alone, by a small grammar: for trials of the construction without a model.

They say only what labels say, and labels know little of clothes and bags. So they are poor, and a
model that is trained on them learns little.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from construction.checks import problem_of
from utils.attributes import Attribute

NOTE = (
    "the captions were written by a grammar from labels alone: they are poor, because they name "
    "hardly any clothes and are the same for many people; use captions.by vision for a model that "
    "is to be of use"
)
DRAWS = 20  # captions that are tried until one has enough words

NOUNS = {  # by gender and age; "" if the label is not known
    ("male", ""): ("man", "male pedestrian"),
    ("male", "adult"): ("adult man", "grown man", "middle-aged man"),
    ("male", "young"): ("young man", "young male pedestrian"),
    ("male", "old"): ("old man", "elderly man", "senior man"),
    ("female", ""): ("woman", "female pedestrian"),
    ("female", "adult"): ("adult woman", "grown woman", "middle-aged woman"),
    ("female", "young"): ("young woman", "young female pedestrian"),
    ("female", "old"): ("old woman", "elderly woman", "senior woman"),
    ("", ""): ("pedestrian",),
    ("", "adult"): ("adult person", "grown-up person"),
    ("", "young"): ("young person", "young pedestrian"),
    ("", "old"): ("old person", "elderly person"),
}
# Before the noun; what begins with "of" stands behind it.
HEIGHTS = {
    "tall": ("tall",),
    "short": ("short",),
    "middle": ("of average height", "of medium height"),
}
WEIGHTS = {
    "slim": ("slim", "slender", "thin"),
    "fat": ("heavy-set", "stout", "solidly built"),
    "middle": ("of medium build", "of average weight"),
}
ANGLES = {
    "front": ("seen from the front", "facing forward"),
    "back": ("seen from behind", "seen from the back"),
    "side": ("seen from the side", "turned sideways"),
}
LIGHTS = {"bright": ("in bright light", "in good light"), "dim": ("in dim light", "in half-light")}
# The classes that it has words for. The height of the camera says nothing about the person.
SPOKEN = {
    "gender": {gender for gender, _ in NOUNS}, "age": {age for _, age in NOUNS},
    "height": {*HEIGHTS}, "weight": {*WEIGHTS}, "angle": {*ANGLES}, "light": {*LIGHTS},
    "altitude": {"level", "above"},
}  # fmt: skip


def write(
    labels: Mapping[str, str],
    attributes: Sequence[Attribute],
    seed: str,
    words: tuple[int, int] = (8, 120),
) -> str:
    """A caption, the same for the same arguments; empty if no label can be spoken of.

    Args:
        labels: classes by attribute, without those that nobody has seen (defaults).
        attributes: of `--attributes_file`. For others than TBAGPR's, the caption has one of the
            class's sentences there.
        seed: draws the sentence plan and the words.
        words: fewest and most of them.
    """
    rng = random.Random(seed)
    text = ""
    for _ in range(DRAWS):
        text = _draw(labels, attributes, rng)
        if not problem_of(text, words=words):
            break
    return text


def _draw(labels: Mapping[str, str], attributes: Sequence[Attribute], rng: random.Random) -> str:
    def word(choices: Mapping[str, tuple[str, ...]], attribute: str) -> str:
        options = choices.get(labels.get(attribute, ""))
        return rng.choice(options) if options else ""

    sentences = [
        rng.choice(attribute.sentences[attribute.classes.index(labels[attribute.name])])
        for attribute in attributes
        if attribute.name in labels and not _spoken(attribute)
    ]
    labels = {a.name: labels[a.name] for a in attributes if a.name in labels and _spoken(a)}
    noun = rng.choice(NOUNS[labels.get("gender", ""), labels.get("age", "")])
    traits = [t for t in (word(HEIGHTS, "height"), word(WEIGHTS, "weight")) if t]
    circumstances = [c for c in (word(ANGLES, "angle"), word(LIGHTS, "light")) if c]
    if not labels.keys() - {"altitude"}:
        return " ".join(sentences)
    he = {"male": "he", "female": "she"}.get(labels.get("gender", ""), "this person")
    plain = _article(noun)
    before = [trait for trait in traits if not trait.startswith("of ")]
    after = [trait for trait in traits if trait.startswith("of ")]
    full = " ".join([_article(", ".join(before) + " " * bool(before) + noun), " and ".join(after)])
    full, tail = full.strip(), "".join(f", {c}" for c in circumstances)
    plans = [
        [f"the person to look for is {full}{tail}"],
        [f"look for {full}{tail}"],
        [f"this pedestrian is {full}{tail}"],
        [f"look for {plain}"] + [f"{he} is {_listing(traits)}"] * bool(traits)
        + [f"{he} is {' '.join(circumstances)}"] * bool(circumstances),
        [f"the one to find is {plain}{tail}"] + [f"{he} is {_listing(traits)}"] * bool(traits),
        [f"{', '.join(circumstances)}, the person to find is {full}"] if circumstances
        else [f"the person to find is {full}"],
    ]  # fmt: skip
    main = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in rng.choice(plans)]
    return " ".join([*main, *sentences])


def _spoken(attribute: Attribute) -> bool:
    """Whether it is an attribute of TBAGPR, with the classes that it has there."""
    return {*attribute.classes} <= SPOKEN.get(attribute.name, set())


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _listing(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
