"""Quality: measure each picture once, then decide which are good enough.

Blur is the variance of the Laplacian at one fixed size, because it depends on the size. Repetitions
(frames of a video, copies) are found by the distance of perceptual hashes (pHash) within an
identity and view.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import imagehash
import numpy as np
from PIL import Image

from construction.recipe import Limit, Quality
from construction.records import Candidate, Measure, Picture
from datasets.images import BrokenImage, read_image
from datasets.thumbnails import cropped
from utils.files import add_to_hash

SIZE = (128, 384)  # width and height at which sharpness is measured
NEARLY_BLACK, NEARLY_WHITE = 8, 247  # grey levels
CROP_QUALITY = 95  # of a crop's JPEG
UNREADABLE = "cannot be opened"  # in a problem that may pass, and so is not kept
VERSION = 2  # increase it when the same picture gives other measures


def measure_file(file: str, pictures: Sequence[Picture], crops: Path) -> list[Measure]:
    """Measures of the pictures in one file, which is decoded once. A box is cut out, and written
    to `crops`/<source>/<name>. What cannot be read is a measure with a `problem`. Raises OSError if
    a crop cannot be written."""
    name, digest = os.path.basename(file), hashlib.sha256()
    try:
        add_to_hash(digest, file)
    except OSError as error:
        problem = f"{name}: {UNREADABLE}: {error.strerror or error}"
        return [Measure(problem=problem) for _ in pictures]
    try:
        frame = read_image(file)
    except BrokenImage as error:
        # Without the folder, because the records must not depend on where the source lies.
        problem = str(error).replace(file, name)
        return [Measure(problem=problem) for _ in pictures]
    found = Measure(file, digest.hexdigest())
    return [_measure(frame, found, picture, crops) for picture in pictures]


def _measure(frame: Image.Image, found: Measure, picture: Picture, crops: Path) -> Measure:
    """The measures of a picture in a frame; `found` has the frame's file and hash."""
    image, file, sha256 = frame, found.file, found.sha256
    if picture.box is not None:
        try:
            image = cropped(frame, picture.box)
        except ValueError as error:
            return Measure(problem=f"{error}")
        file = str(crops / picture.source / picture.name)
        sha256 = _write_crop(image, Path(file))
    grey = np.asarray(image.convert("L").resize(SIZE, Image.Resampling.BILINEAR))
    clipped = (grey <= NEARLY_BLACK) | (grey >= NEARLY_WHITE)
    return Measure(
        file,
        sha256,
        *image.size,
        round(float(cv2.Laplacian(grey, cv2.CV_64F).var()), 3),
        round(float(grey.mean()), 3),
        round(float(clipped.mean()), 4),
        str(imagehash.phash(image)),
    )


def _write_crop(image: Image.Image, path: Path) -> str:
    """Write a JPEG and rename it; returns its hash. It is not synced to disk, which would take
    longer than all else; a crop that a loss of power destroys has another hash, and writing the
    data set finds it."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=CROP_QUALITY, subsampling=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.getvalue())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return hashlib.sha256(content.getvalue()).hexdigest()


def least_sharpness(limit: Limit | None, of_view: Sequence[float]) -> float:
    """The smallest sharpness that is good enough for a view, whose pictures have `of_view`."""
    if limit is None or not len(of_view):
        return 0.0
    if limit.at_least is not None:
        return limit.at_least
    return float(np.quantile(np.asarray(of_view), limit.quantile or 0.0))


def judge(measure: Measure, recipe: Quality) -> tuple[str, str] | None:
    """Why a picture cannot be used, however sharp it is, as (reason, detail); None if it can."""
    darkest, brightest = recipe.brightness
    if measure.problem:
        return "unreadable" if UNREADABLE in measure.problem else "broken", measure.problem
    if measure.width < recipe.min_width or measure.height < recipe.min_height:
        least_size = f"{recipe.min_width}x{recipe.min_height}"
        return "small", f"{measure.width}x{measure.height}, under {least_size}"
    if measure.brightness < darkest:
        return "dark", f"brightness {measure.brightness:.1f}, under {darkest:g}"
    if measure.brightness > brightest:
        return "bright", f"brightness {measure.brightness:.1f}, over {brightest:g}"
    if measure.clipped > recipe.clipped:
        share = f"{measure.clipped:.0%} of the pixels are nearly black or white"
        return "clipped", f"{share}, over {recipe.clipped:.0%}"
    return None


def judge_sharpness(measure: Measure, least: float) -> tuple[str, str] | None:
    """The same for blur.

    Args:
        least: the smallest sharpness of its view.
    """
    if measure.sharpness < least:
        return "blurry", f"sharpness {measure.sharpness:.1f}, under {least:.1f}"
    return None


def repetitions(pictures: Sequence[Candidate], distance: int) -> dict[int, tuple[int, int]]:
    """The pictures of one identity and view that repeat a sharper one: by number, the number of
    that one and the distance of their hashes (at most `distance` of 64 bits).

    The sharpest picture stays. Then every other one, in the order of sharpness, stays unless it is
    near one that stays.
    """
    order = sorted(pictures, key=lambda c: (-c.measure.sharpness, c.number))
    hashes = np.array([int(c.measure.phash, 16) for c in order], np.uint64)
    stay: list[int] = []  # positions in `order`
    repeated: dict[int, tuple[int, int]] = {}
    for i, candidate in enumerate(order):
        distances = np.bitwise_count(hashes[stay] ^ hashes[i]) if stay else np.zeros(0, np.uint8)
        if len(distances) and distances.min() <= distance:
            near = int(distances.argmin())
            repeated[candidate.number] = order[stay[near]].number, int(distances[near])
        else:
            stay.append(i)
    return repeated
