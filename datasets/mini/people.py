"""A person of mini-TBAGPR: labels, clothes and colours, sampled at random for each identity."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# RGB, 0..255, different enough to be distinguished in a noisy crop 60 pixels wide.
COLOURS = {
    "black": (30, 30, 34),
    "white": (240, 240, 238),
    "grey": (136, 138, 142),
    "red": (200, 32, 38),
    "blue": (52, 108, 214),
    "navy": (32, 42, 96),
    "green": (40, 138, 66),
    "yellow": (244, 208, 48),
    "pink": (246, 148, 184),
    "purple": (124, 62, 164),
    "orange": (240, 122, 30),
    "brown": (112, 70, 42),
    "beige": (216, 192, 150),
}
HAIR_COLOURS = {
    "black": (32, 28, 28),
    "brown": (98, 62, 38),
    "blond": (216, 178, 104),
    "red": (164, 70, 34),
    "grey": (172, 172, 174),
}
SKINS = ((242, 208, 182), (228, 186, 154), (198, 150, 114), (140, 96, 70))
STATURE = (1.70, 1.88, 1.53)  # metres, by the label of height: middle, tall, short
GIRTH = (1.0, 0.83, 1.27)  # relative width, by the label of weight: middle, slim, heavy

# Weights for sampling. Dark and neutral clothes are a little more common than others, but not as
# common as in reality, so that people look different.
_UPPER_COLOURS = dict(zip(COLOURS, (12, 11, 9, 10, 10, 7, 9, 8, 7, 7, 7, 5, 6), strict=True))
_LOWER_COLOURS = dict(zip(COLOURS, (15, 10, 10, 8, 10, 9, 8, 5, 5, 5, 4, 8, 9), strict=True))
_JEANS = {"blue": 45, "navy": 22, "black": 16, "grey": 9, "white": 8}
_BAG_COLOURS = dict(zip(COLOURS, (30, 6, 10, 11, 10, 6, 5, 4, 6, 3, 4, 14, 6), strict=True))
_HAT_COLOURS = dict(zip(COLOURS, (22, 20, 6, 14, 10, 8, 4, 6, 5, 1, 3, 3, 9), strict=True))
_SNEAKERS = {"white": 40, "black": 22, "grey": 10, "red": 9, "blue": 9, "pink": 5, "yellow": 5}
_BRIGHT_SNEAKERS = {"white": 25, "red": 20, "blue": 18, "pink": 12, "yellow": 13, "orange": 12}
_LEATHER = {"black": 60, "brown": 34, "beige": 6}

_WARM_TOPS = {"t-shirt": 46, "polo shirt": 16, "shirt": 22, "tank top": 8}
_COLD_TOPS = {
    "jacket": 24,
    "coat": 17,
    "hoodie": 19,
    "sweater": 16,
    "down jacket": 13,
    "blazer": 9,
}
_PATTERNED = {
    "t-shirt": {"plain": 56, "stripes": 20, "print": 24},
    "polo shirt": {"plain": 72, "stripes": 28},
    "shirt": {"plain": 62, "checks": 26, "stripes": 12},
    "sweater": {"plain": 70, "stripes": 30},
    "hoodie": {"plain": 68, "print": 32},
    "dress": {"plain": 66, "checks": 14, "stripes": 20},
}


@dataclass(frozen=True)
class Person:
    """One identity.

    gender, age, light, weight and height are the labels of attrs.json. The other fields describe
    clothes, hair and things carried. For a dress, both upper and lower are "dress". Colours are
    keys of COLOURS, hair_colour is a key of HAIR_COLOURS, skin an index into SKINS.
    """

    gender: int
    age: int
    light: int
    weight: int
    height: int
    skin: int
    hair: str  # short, bald, bob, long, ponytail, bun
    hair_colour: str
    upper: str
    upper_colour: str
    sleeve: str  # none, short, long
    pattern: str  # plain, stripes, checks, print
    pattern_colour: str
    opened: bool  # worn open over a garment of inner_colour
    inner_colour: str
    lower: str
    lower_colour: str
    shoes: str
    shoe_colour: str
    bag: str  # none, backpack, handbag, shoulder bag
    bag_colour: str
    hat: str  # none, cap, hat
    hat_colour: str
    glasses: bool
    mask: bool
    item: str  # none, phone, umbrella, cane: what the right hand holds
    tone: float  # brightness of the cloth, around 1

    @property
    def look(self) -> tuple[object, ...]:
        """A key that is different for any two identities of a split."""
        upper, lower = (self.upper, self.upper_colour), (self.lower, self.lower_colour)
        return upper, lower, self.bag, self.hat, (self.hair, self.hair_colour)


def sample_person(rng: np.random.Generator) -> Person:
    """Sample an identity. Clothes, hair and things carried depend on gender, age and season."""
    woman, warm = bool(rng.random() < 0.48), bool(rng.random() < 0.55)
    age = int(rng.choice(3, p=(0.7, 0.17, 0.13)))
    hair, hair_colour = _hair(rng, woman, age)
    upper, sleeve, lower = _garments(rng, woman, warm)
    upper_colour = pick(rng, _UPPER_COLOURS)
    others = {c: w for c, w in _UPPER_COLOURS.items() if c != upper_colour}
    # A pattern must be visible: dark on light, or light on dark.
    pale = sum(COLOURS[upper_colour]) > 420
    contrast = ("black", "navy", "red", "blue", "green") if pale else ("white", "yellow", "beige")
    contrasting = {c: others[c] for c in contrast if c in others}
    inner = {c: w for c, w in {"white": 5, "grey": 2, "black": 3, "red": 1}.items() if c in others}
    lower_colours = _JEANS if lower == "jeans" else _LOWER_COLOURS
    if lower == "leggings":
        lower_colours = {"black": 60, "grey": 20, "navy": 10, "purple": 5, "pink": 5}
    shoes, shoe_colour = _shoes(rng, woman, age, warm)
    bags = {"none": 30, "backpack": 30, "handbag": 20 if woman else 4, "shoulder bag": 16}
    if age == 1:
        bags["backpack"] += 14
    items = {"none": 76, "phone": 15 if age < 2 else 3, "umbrella": 5}
    if age == 2:
        items["cane"] = 50
    return Person(
        gender=int(woman),
        age=age,
        light=int(rng.random() < 0.15),
        weight=int(rng.choice(3, p=(0.56, 0.24, 0.20))),
        height=int(rng.choice(3, p=(0.54, 0.25, 0.21))),
        skin=int(rng.choice(4, p=(0.36, 0.34, 0.18, 0.12))),
        hair=hair,
        hair_colour=hair_colour,
        upper=upper,
        upper_colour=upper_colour,
        sleeve=sleeve,
        pattern=pick(rng, _PATTERNED.get(upper, {"plain": 1})),
        pattern_colour=pick(rng, contrasting),
        opened=upper == "blazer" or (upper in ("jacket", "coat") and bool(rng.random() < 0.4)),
        inner_colour=pick(rng, inner),
        lower=lower,
        lower_colour=upper_colour if lower == "dress" else pick(rng, lower_colours),
        shoes=shoes,
        shoe_colour=shoe_colour,
        bag=pick(rng, bags),
        bag_colour=pick(rng, _BAG_COLOURS),
        hat=pick(rng, {"none": 60, "cap": 24, "hat": 12 if woman or age == 2 else 3}),
        hat_colour=pick(rng, _HAT_COLOURS),
        glasses=bool(rng.random() < 0.17),
        mask=bool(rng.random() < 0.08),
        item=pick(rng, items),
        tone=float(rng.uniform(0.9, 1.08)),
    )


def _garments(rng: np.random.Generator, woman: bool, warm: bool) -> tuple[str, str, str]:
    """Upper garment, sleeve and lower garment that suit each other and the season."""
    if woman and rng.random() < 0.18:
        return "dress", pick(rng, {"short": 5, "none": 3} if warm else {"long": 1}), "dress"
    upper = pick(rng, _WARM_TOPS if warm else _COLD_TOPS)
    sleeve = "none" if upper == "tank top" else "long"
    if upper in ("t-shirt", "polo shirt"):
        sleeve = "long" if upper == "t-shirt" and rng.random() < 0.15 else "short"
    elif upper == "shirt" and rng.random() < 0.35:
        sleeve = "short"
    lowers = {"trousers": 42, "jeans": 36}
    if warm:
        lowers["shorts"] = 24
    if woman:
        lowers |= {"leggings": 14, "skirt": 26 if upper != "coat" else 0}
    return upper, sleeve, pick(rng, lowers)


def _hair(rng: np.random.Generator, woman: bool, age: int) -> tuple[str, str]:
    if woman:
        style = pick(rng, {"long": 38, "ponytail": 27, "bob": 20, "bun": 10, "short": 5})
    else:
        style = "bald" if rng.random() < (0.3 if age == 2 else 0.05) else "short"
    colours = {"black": 54, "brown": 27, "blond": 13, "red": 6}
    return style, "grey" if age == 2 else pick(rng, colours)


def _shoes(rng: np.random.Generator, woman: bool, age: int, warm: bool) -> tuple[str, str]:
    if age == 1:
        return "sneakers", pick(rng, _BRIGHT_SNEAKERS)
    kinds = {"sneakers": 54, "leather shoes": 30, "sandals": 10 * warm, "boots": 16 * (not warm)}
    kind = pick(rng, kinds)
    return kind, pick(rng, _SNEAKERS if kind == "sneakers" else _LEATHER)


def pick(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """A random key of `weights`, with a probability in proportion to its value."""
    values = np.fromiter(weights.values(), float)
    return list(weights)[rng.choice(len(values), p=values / values.sum())]
