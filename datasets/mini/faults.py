"""Pictures with known faults, as raw data has them: what to plant in whom, and how it looks."""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from .people import Person
from .view import View, paint, sample_view

FAULTS = ("truncated", "blurry", "duplicate", "dark", "bright", "small")
_BLUR = 0.045  # standard deviation of the blur, as a fraction of the picture's height
_SMALL = (24, 32)  # pixels, lowest and highest height of a picture that is too small
_KEPT = 0.6  # share of a truncated file's bytes


@dataclass(frozen=True)
class Picture:
    """A picture that is to be rendered, and what is known of it."""

    person: Person
    view: View
    fault: str | None = None  # one of FAULTS
    seed: int = 0  # of the fault
    of: int | None = None  # of a duplicate: the position in the same list of what it repeats


def sample_pictures(
    rng: np.random.Generator, person: Person, source: int, order: int, pairs: int
) -> list[Picture]:
    """The pictures of one identity: the good ones, then those with a fault.

    `order` is the number of the identity in the data set. Of ten identities seven have `pairs` good
    pictures of each view, two have twice as many aerial or ground ones, and one has only one view.
    There are half as many faults as pairs, at least two; over the identities all are equally
    frequent. In no two good pictures of a view the person faces the same way, so that they cannot
    be taken for duplicates.
    """
    good: list[Picture] = []
    for aerial, count in zip((True, False), _counts(order, pairs), strict=True):
        views: list[View] = []
        while len(views) < count:
            view = sample_view(rng, person, source, aerial)
            if all(_turned(view, other) > min(0.25, 2 / count) for other in views):
                views.append(view)
        good += [Picture(person, view) for view in views]
    faulty = []
    faults = max(2, pairs // 2)
    for turn in range(order * faults, (order + 1) * faults):
        fault, aerial = FAULTS[turn % len(FAULTS)], turn // len(FAULTS) % 2 == 0
        seen = [i for i, p in enumerate(good) if p.view.aerial == aerial] or range(len(good))
        of = int(rng.choice(seen))
        aerial, seed = good[of].view.aerial, int(rng.integers(2**31))
        if fault == "duplicate":
            faulty.append(Picture(person, good[of].view, fault, seed, of))
        else:
            view = sample_view(rng, person, source, aerial)
            if fault == "small":
                height = int(rng.integers(*_SMALL, endpoint=True))
                view = replace(view, size=(round(height * view.size[0] / view.size[1]), height))
            faulty.append(Picture(person, view, fault, seed))
    return good + faulty


def draw(picture: Picture) -> Image.Image:
    """The picture with its fault. A truncated one is still whole: only a file can be truncated."""
    image = paint(picture.person, picture.view)
    if picture.fault == "blurry":
        return image.filter(ImageFilter.GaussianBlur(_BLUR * image.height))
    if picture.fault == "duplicate":
        return _again(image, np.random.default_rng(picture.seed))
    if picture.fault == "dark":
        return image.point([round(0.12 * level) for level in range(256)] * 3)
    if picture.fault == "bright":
        return image.point([round(255 - 0.12 * (255 - level)) for level in range(256)] * 3)
    return image


def jpeg(image: Image.Image, quality: int, truncated: bool = False) -> bytes:
    """The bytes of a JPEG; of a truncated one, only the first part of them."""
    file = io.BytesIO()  # PIL's writer loses the system's error message
    image.save(file, "JPEG", quality=quality)
    data = file.getvalue()
    return data[: int(_KEPT * len(data))] if truncated else data


def _counts(order: int, pairs: int) -> tuple[int, int]:
    """Numbers of good aerial and ground pictures of an identity."""
    kind = order % 10
    if kind == 9:
        return (2 * pairs, 0) if order % 20 == 9 else (0, 2 * pairs)
    return pairs * (1 + (kind == 1)), pairs * (1 + (kind == 4))


def _turned(view: View, other: View) -> float:
    """By how many radians the person has turned between two views, from 0 to pi."""
    return float(abs((view.yaw - other.yaw + np.pi) % (2 * np.pi) - np.pi))


def _again(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The same view once more: with other noise, a little brighter, or compressed twice."""
    way = rng.integers(3)
    if way == 2:
        return Image.open(io.BytesIO(jpeg(image, 45))).convert("RGB")
    pixels: np.ndarray = np.asarray(image, np.float32)
    pixels = pixels + rng.normal(0, 1.5, pixels.shape) if way else pixels * rng.uniform(1.03, 1.07)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
