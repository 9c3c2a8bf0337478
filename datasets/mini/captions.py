"""Captions of a pair of pictures, from a small grammar with synonyms and omissions.

A caption mentions only what at least one of the two pictures shows. For example, it does not
mention a print on the chest if both pictures show the person from behind.
"""

import re

import numpy as np

from .people import Person
from .view import BACK, FRONT, View

SHORTEST, LONGEST = 15, 50  # words of an ordinary caption
LONG_SHARE = 0.02  # of captions have over 77 tokens, the limit of CLIP's text encoder
LONG_WORDS = (80, 110)  # fewest and most words of those

COLOUR_WORDS = {
    "grey": ("grey", "gray"),
    "navy": ("dark blue", "navy blue", "navy"),
    "beige": ("beige", "tan", "khaki"),
}
UPPER_WORDS = {
    "t-shirt": ("T-shirt", "tee", "t-shirt"),
    "polo shirt": ("polo shirt", "polo"),
    "shirt": ("shirt", "button-up shirt"),
    "tank top": ("tank top", "sleeveless top"),
    "sweater": ("sweater", "pullover", "jumper"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket",),
    "coat": ("long coat", "coat", "overcoat"),
    "down jacket": ("down jacket", "puffer jacket", "padded jacket"),
    "blazer": ("blazer", "suit jacket"),
    "dress": ("dress",),
}
LOWER_WORDS = {
    "trousers": ("trousers", "pants"),
    "jeans": ("jeans", "denim jeans"),
    "shorts": ("shorts",),
    "leggings": ("leggings", "tight pants"),
    "skirt": ("skirt",),
    "dress": ("dress",),
}
SHOE_WORDS = {
    "sneakers": ("sneakers", "trainers", "sport shoes", "shoes"),
    "leather shoes": ("leather shoes", "shoes"),
    "boots": ("boots", "ankle boots"),
    "sandals": ("sandals",),
}
_NOUNS = {  # by (gender, age)
    (0, 0): ("man", "man", "male", "gentleman", "guy", "male pedestrian"),
    (1, 0): ("woman", "woman", "lady", "female", "female pedestrian"),
    (0, 1): ("young man", "boy", "young guy", "young male"),
    (1, 1): ("young woman", "girl", "young lady", "young girl"),
    (0, 2): ("old man", "elderly man", "elderly gentleman", "senior man"),
    (1, 2): ("old woman", "elderly woman", "elderly lady", "senior woman"),
}
_WEIGHTS = {1: ("slim", "thin", "slender"), 2: ("heavy-set", "stout", "overweight", "chubby")}
_HEIGHTS = {1: ("tall",), 2: ("short",)}


def caption(person: Person, views: tuple[View, ...], rng: np.random.Generator) -> str:
    """Describe the person of a pair of views (aerial, ground), or of a single view, in English.

    Only captions of pairs can be long, because those compare the two views.
    """
    long = rng.random() < LONG_SHARE and len(views) > 1
    low, high = LONG_WORDS if long else (SHORTEST, LONGEST)
    keep = float(rng.uniform(0.6, 1.0))
    while True:
        text = (_long if long else _ordinary)(_Speaker(person, views, rng, keep))
        if low <= len(text.split()) <= high:
            return text
        keep = min(1.0, keep + 0.1) if len(text.split()) < low else max(0.0, keep - 0.1)


class _Speaker:
    """Phrases for one pair of pictures, or a single one, with random choice among synonyms.

    `keep` scales the probability with which a minor detail is mentioned.
    """

    def __init__(
        self, person: Person, views: tuple[View, ...], rng: np.random.Generator, keep: float
    ) -> None:
        self.p, self.views, self.rng, self.keep = person, views, rng, keep
        self.angles = {view.angle for view in views}
        self.ground = views[-1]  # of a single aerial view, that one
        self.he, self.his = ("she", "her") if person.gender else ("he", "his")

    def any(self, *words: str) -> str:
        return str(words[self.rng.integers(len(words))])

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def colour(self, name: str) -> str:
        return self.any(*COLOUR_WORDS.get(name, (name,)))

    def who(self) -> str:
        """Noun phrase without article: height, weight, age and gender."""
        p, words = self.p, []
        if p.height and self.chance(0.6 * self.keep + 0.1):
            words.append(self.any(*_HEIGHTS[p.height]))
        if p.weight and self.chance(0.7 * self.keep + 0.1):
            words.append(self.any(*_WEIGHTS[p.weight]))
        noun = self.any(*_NOUNS[p.gender, p.age])
        return " ".join([*words, noun])

    def upper(self) -> str:
        """The upper garment, with its article."""
        p = self.p
        noun, colour = self.any(*UPPER_WORDS[p.upper]), self.colour(p.upper_colour)
        second, after = self.colour(p.pattern_colour), ""
        if p.pattern == "stripes":
            colour = self.any(f"{colour} and {second} striped", f"striped {colour} and {second}")
        elif p.pattern == "checks":
            both = f"{colour} and {second}" if self.chance(0.5) else colour
            colour = self.any(f"checked {both}", f"{both} plaid", f"{both} checkered")
        elif p.pattern == "print" and self.angles != {BACK} and self.chance(0.7):
            after = self.any(f" with a {second} print", f" with a {second} logo on the chest")
        if p.upper in ("t-shirt", "polo shirt", "shirt", "dress") and self.chance(0.35):
            how = {"short": "short-sleeved", "long": "long-sleeved", "none": "sleeveless"}[p.sleeve]
            noun = f"{how} {noun}"
        elif p.opened and self.angles != {BACK} and self.chance(0.7):
            under = self.colour(p.inner_colour)
            after = self.any(f" over a {under} shirt", f" worn open over a {under} top")
        return _article(f"{colour} {noun}{after}")

    def lower(self) -> str:
        p = self.p
        noun, colour = self.any(*LOWER_WORDS[p.lower]), self.colour(p.lower_colour)
        if p.lower == "skirt":
            return _article(f"{self.any('', 'knee-length ')}{colour} {noun}")
        pair = "a pair of " if self.chance(0.15) else ""
        return f"{pair}{colour} {noun}"

    def shoes(self) -> str:
        return f"{self.colour(self.p.shoe_colour)} {self.any(*SHOE_WORDS[self.p.shoes])}"

    def clothes(self, shoes: bool) -> str:
        parts = [self.upper()] if self.p.upper == "dress" else [self.upper(), self.lower()]
        return _listing(parts + [self.shoes()] * shoes)

    def hair(self) -> str:
        """The hair, to follow "has"; empty if a hat hides it."""
        p = self.p
        if p.hair == "bald":
            return "" if p.hat != "none" else self.any("a bald head", "almost no hair")
        if p.hat != "none" and p.hair in ("short", "bun"):
            return ""
        tint = self.any("grey", "gray", "white") if p.hair_colour == "grey" else p.hair_colour
        tint = self.any("blond", "blonde") if tint == "blond" else tint
        return {
            "short": f"short {tint} hair",
            "bob": self.any(f"chin-length {tint} hair", f"a {tint} bob"),
            "long": self.any(f"long {tint} hair", f"long loose {tint} hair"),
            "ponytail": self.any(f"a {tint} ponytail", f"{tint} hair tied in a ponytail"),
            "bun": self.any(f"{tint} hair tied in a bun", f"a {tint} bun"),
        }[p.hair]

    def bag(self) -> str:
        """The bag as a participle phrase, or an empty text."""
        p, colour = self.p, self.colour(self.p.bag_colour)
        hidden = all(np.sin(view.yaw) < -0.75 for view in self.views)  # behind the body in both
        if p.bag == "none" or (p.bag == "handbag" and hidden):
            return ""
        if p.bag == "backpack":
            if self.angles == {FRONT}:
                return f"with the {colour} straps of a backpack over {self.his} shoulders"
            sack = self.any("backpack", "backpack", "rucksack")
            return self.any(
                f"carrying {_article(colour)} {sack}",
                f"with {_article(colour)} {sack} on {self.his} back",
                f"wearing {_article(colour)} {sack}",
            )
        if p.bag == "handbag":
            return self.any(
                f"carrying {_article(colour)} handbag",
                f"holding {_article(colour)} handbag",
                f"with {_article(colour)} bag in {self.his} hand",
            )
        return self.any(
            f"carrying {_article(colour)} shoulder bag",
            f"with {_article(colour)} crossbody bag",
            f"with {_article(colour)} bag slung across {self.his} body",
        )

    def hat(self) -> str:
        p, colour = self.p, self.colour(self.p.hat_colour)
        if p.hat == "none":
            return ""
        if p.hat == "cap":
            return _article(f"{colour} {self.any('cap', 'baseball cap')}")
        return _article(f"{colour} {self.any('hat', 'wide-brimmed hat', 'sun hat')}")

    def worn(self) -> str:
        """Glasses or a mask, to follow "wearing"; empty unless the ground view shows the face."""
        if self.ground.angle == BACK:
            return ""
        parts = ["glasses"] * self.p.glasses + [self.any("a face mask", "a mask")] * self.p.mask
        return _listing(parts) if parts else ""

    def held(self) -> str:
        what = {
            "none": (),
            "phone": ("holding a phone", "looking at a phone"),
            "umbrella": ("holding a folded umbrella", "holding a closed blue umbrella"),
            "cane": ("leaning on a cane", "walking with a cane", "using a walking stick"),
        }[self.p.item]
        if not what or (self.p.item == "phone" and self.angles == {BACK}):
            return ""
        return self.any(*what)

    def extras(self) -> list[str]:
        """Participle phrases for the things carried, some left out, mostly the bag first."""
        phrases = []
        for phrase, likely in ((self.bag(), 0.45 + 0.5 * self.keep), (self.held(), self.keep)):
            if phrase and self.chance(likely):
                phrases.append(phrase)
        if self.chance(0.2):
            phrases.reverse()
        return phrases

    def pose(self) -> str:
        still = self.ground.stride < 0.2
        verb = self.any("standing", "standing still") if still else self.any("walking", "strolling")
        if self.ground.angle == BACK:
            away = "with the back to the camera"
            return f"{verb} {away if still else self.any('away from the camera', away)}"
        if self.ground.angle == FRONT:
            return verb + (" facing the camera" if still else " towards the camera")
        return f"{verb} sideways to the camera" if still else f"{verb} past the camera"


def _ordinary(say: _Speaker) -> str:
    """A caption in one of six sentence forms."""
    keep, form = say.keep, say.rng.integers(6)
    shoes = say.chance(0.3 + 0.5 * keep)
    who, clothes, extras = say.who(), say.clothes(shoes), say.extras()
    hair = say.hair() if say.chance(0.25 + 0.5 * keep) else ""
    hat = say.hat() if say.chance(0.45 + 0.5 * keep) else ""
    worn = say.worn() if say.chance(keep) else ""
    head = [part for part in (hat, worn) if part]
    pose = say.pose() if form == 3 or say.chance(0.3) else ""
    he, tail = say.he, "".join(f", {phrase}" for phrase in extras)
    with_hair = f" with {hair}" if hair else ""
    wears = say.any("is wearing", "wears", "is dressed in")
    if form == 0:
        first = f"{_article(who)}{with_hair} {say.any('wearing', 'dressed in', 'in')} {clothes}"
        parts = [first + tail]
        parts += [f"{he} wears {_listing(head)}"] if head else []
        parts += [f"{he} is {pose}"] if pose else []
    elif form == 1:
        start = say.any(
            "the pedestrian in the image appears to be",
            "the person in the image is",
            "the picture shows",
            "this is",
        )
        who = who.replace(" pedestrian", "")
        parts = [f"{start} {_article(who)}{with_hair}", f"{he} {wears} {clothes}{tail}"]
        parts += [f"{he} is also wearing {_listing(head)}"] if head else []
        parts += [f"{he} is {pose}"] if pose else []
    elif form == 2:
        parts = [f"{_article(who)}{pose and f', {pose},'} {wears} {clothes}"]
        has = [f"has {hair}"] * bool(hair) + [f"wears {_listing(head)}"] * bool(head)
        parts += [f"{he} {_listing(has)}"] if has else []
        parts += [_clause(he, extras)] if extras else []
    elif form == 3:
        the = say.any("the", "this")
        parts = [f"wearing {clothes}, {the} {who}{with_hair} is {pose}{tail}"]
        parts += [f"{he} wears {_listing(head)}"] if head else []
    elif form == 4:
        has = [f"has {hair}"] * bool(hair)
        parts = [f"{say.any('the', 'this')} {who} {_listing([*has, f'{wears} {clothes}'])}"]
        parts += [f"{he} wears {_listing(head)}{tail}"] if head else []
        parts += [_clause(he, extras)] if extras and not head else []
        parts += [f"{he} is {pose}"] if pose else []
    else:
        parts = [f"{_article(who)} in {say.upper()}{tail}"]
        rest = [*head, *([] if say.p.lower == "dress" else [say.lower()]), *[say.shoes()] * shoes]
        parts += (
            [f"{he} {say.any('is also wearing', 'also wears')} {_listing(rest)}"] if rest else []
        )
        parts += [f"{he} has {hair}"] if hair else []
        parts += [f"{he} is {pose}"] if pose else []
    return " ".join(_sentence(part) for part in parts)


def _long(say: _Speaker) -> str:
    """A caption with all details, and then posture, light and place until it is long enough."""
    p, he, his = say.p, say.he, say.his
    him = "her" if p.gender else "him"
    build = ("of medium build", "rather slim", "rather heavy")[p.weight]
    stature = ("of average height", "clearly taller than average", "shorter than most people")
    hair, head = say.hair(), [part for part in (say.hat(), say.worn()) if part]
    extras = [phrase for phrase in (say.bag(), say.held()) if phrase]
    who = _article(say.who().replace(" pedestrian", ""))
    parts = [f"the pedestrian in the image appears to be {who}{hair and f' with {hair}'}"]
    parts += [f"{he} is wearing {say.clothes(True)}"]
    parts += [f"{he} also wears {_listing(head)}"] if head else []
    parts += [_clause(he, extras) if extras else f"{he} does not seem to carry anything"]
    optional = [
        f"{he} is {build} and {stature[p.height]}",
        f"in the picture from the street {he} is {say.pose()}",
    ]
    if say.ground.dim:
        optional += [
            "it is dark, so that the colours look dull and small details are hard to make out"
        ]
    else:
        optional += ["the picture is bright, and the colours of the clothes are easy to tell apart"]
    place = "a city street" if say.ground.source else "the grounds of a university campus"
    optional += [
        f"the place is {place}",
        f"the other picture shows {him} from high above, as a drone sees {him}, so that {his} head "
        f"and shoulders look large and {his} legs look short",
    ]
    for i in say.rng.permutation(len(optional)):
        if len(" ".join(parts).split()) < LONG_WORDS[0]:
            parts.append(optional[i])
    return " ".join(_sentence(part) for part in parts)


def _clause(he: str, phrases: list[str]) -> str:
    """Turn participle and "with" phrases into a clause: he has a bag and is holding a phone."""
    verbs = [f"has {x[5:]}" if x.startswith("with ") else f"is {x}" for x in phrases]
    return f"{he} {_listing(verbs)}"


def _article(phrase: str) -> str:
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def _listing(parts: list[str]) -> str:
    """Join words: "a"; "a and b"; "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().rstrip(",")
    return text[0].upper() + text[1:] + "."
