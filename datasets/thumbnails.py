"""Pictures in pages: a box of a picture, and a small JPEG as a data URL."""

from __future__ import annotations

import base64
import io

from PIL import Image as PILImage


def cropped(image: PILImage.Image, box: tuple[int, int, int, int]) -> PILImage.Image:
    """The part of a picture in a box (left, top, width, height); the box may exceed the picture.

    Raises ValueError if none of the picture is in it.
    """
    left, top, width, height = box
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    left, top = max(left, 0), max(top, 0)
    if left >= right or top >= bottom:
        size = f"{image.width}x{image.height}"
        raise ValueError(f"the box {box} is outside of the picture ({size})")
    return image.crop((left, top, right, bottom))


def thumbnail(image: PILImage.Image, size: tuple[int, int]) -> tuple[PILImage.Image, str]:
    """A small copy of a picture, and its JPEG as a data URL.

    Args:
        size: largest width and height, in pixels.
    """
    small = image.copy()
    small.thumbnail(size)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return small, "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
