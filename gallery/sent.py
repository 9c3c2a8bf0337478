"""A picture that a visitor of the search page sends: checked, encoded, and forgotten.

The browser reads the file, shrinks it if it is large (`templates/sent.js`), and sends it as a data
URL within the question. So the server has no address for uploads, and writes nothing to the disk.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from datasets.images import read_image
from utils.errors import UserError

MAX_BYTES = 2**20  # of a file
MAX_PIXELS = 2**22
SIDE = 1024  # pixels, width or height; the browser shrinks what is larger
ADDRESS = re.compile(r"data:[\w.+/-]*;base64,")


@dataclass(frozen=True)
class Sent:
    """What is kept of a picture.

    Attributes:
        feature_D: float32, of unit length.
        encoder: the hash of the weights that made it.
        small: a thumbnail, as a data URL.
    """

    feature_D: np.ndarray
    encoder: str
    small: str


def decoded(address: object) -> PILImage.Image:
    """The picture in a data URL, upright and in RGB. Raises UserError, for a visitor to read."""
    text = address if isinstance(address, str) else ""
    start = ADDRESS.match(text[:100])
    try:
        content = base64.b64decode(text[start.end() :], validate=True) if start else b""
    except (ValueError, binascii.Error):
        content = b""
    if not 0 < len(content) <= MAX_BYTES:
        raise UserError(
            f"The picture has no content, or more than {MAX_BYTES >> 20} MB in a format that this "
            "browser cannot shrink. Choose another one, such as a JPEG."
        )
    return read_image("your picture", content=content, max_pixels=MAX_PIXELS)
