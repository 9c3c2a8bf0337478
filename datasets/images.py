"""Images: reading a file, turning it upright and resizing it, by PIL alone.

What encodes images without torch (gallery/onnx.py) reads them with the same code as the training.
"""

from __future__ import annotations

import errno
import io
import re
from typing import BinaryIO

import numpy as np
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from datasets.shards import INDEX_AGAIN, ShardChanged, open_image
from utils.errors import UserError

# Other formats of PIL can start programs (EPS), or are not used for photographs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
PILImage.MAX_IMAGE_PIXELS = None  # PIL's limit only warns at first; these limits replace it:
# A larger image may be a decompression bomb: a small file whose decoding takes all memory, or
# hours. Decoders need up to 16 bytes per pixel.
MAX_PIXELS = 61_000_000  # a full-frame camera has at most 60 million
MAX_SIDE = 30_000  # three times such a camera's; some decoders need much memory per row or column
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
# A progressive JPEG is decoded in several scans, usually 10. Each takes time for all pixels, even
# if the scan has few bytes. So there are limits on the scans and on scans x pixels.
MAX_SCANS, MAX_SCANNED = 100, 20 * MAX_PIXELS
HEADER = 2**16  # longest header of a PPM, in bytes
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # of JPEG; not in image data
ORIENTATION, BITS, WHITE_IS = 274, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {  # what undoes each EXIF orientation; 5 to 8 swap width and height
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}


class TooLarge(ValueError):
    """An image of more pixels than the limit."""


class BrokenImage(UserError):
    """An image that cannot be read. `--on_bad_image skip` skips it."""


def load_resized(path: str, size: tuple[int, int], entry: str = "") -> PILImage.Image:
    """Read an image and resize it to `size`, height and width.

    A JPEG of more than four times this size is decoded at a reduced size, which is still at least
    twice `size`. After resizing, the values differ by one or two grey levels from those of a full
    decoding.
    """
    return resized(read_image(path, entry, at_least=(2 * size[0], 2 * size[1])), size)


def resized(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """An image at another height and width (bilinear, antialiased)."""
    return image.resize(size[::-1], PILImage.Resampling.BILINEAR)


def upright(image: PILImage.Image) -> PILImage.Image:
    """An image that PIL has opened, in RGB, turned upright as its EXIF data says."""
    image.load()  # also turns a TIFF upright and removes its orientation
    turn, rgb = UPRIGHT.get(_orientation(image)), to_rgb(image)
    return rgb if turn is None else _turned(rgb, turn)


def read_image(
    path: str,
    entry: str = "",
    at_least: tuple[int, int] | None = None,
    content: bytes | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PILImage.Image:
    """Decode an image to RGB and turn it upright, as its EXIF data says. Raises BrokenImage naming
    the file (and entry) if it cannot be read.

    Args:
        at_least: height and width; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at
            least at this size. This takes a fraction of the time.
        content: of the file, if it is in memory; `path` is then its name in messages.
        max_pixels: an image with more is refused.
    """
    advice = "Replace the file" if content is None else "Choose another one"
    advice += ", or remove its entry from the JSON" if entry else ""
    try:
        # Not opened by PIL: it would wait forever on a pipe, and it memory-maps some files, where
        # a truncation by another program would kill the process (SIGBUS).
        with open_image(path, MAX_BYTES) if content is None else io.BytesIO(content) as file:
            empty = not file.read(1)
            file.seek(0)
            scans = _scans(file)
            with PILImage.open(file, formats=FORMATS) as image:
                _refuse_bomb(*image.size, scans, max_pixels)  # before it is decoded
                if at_least is not None:
                    image.draft("RGB", at_least if _orientation(image) >= 5 else at_least[::-1])
                image.load()  # also turns a TIFF upright and removes its orientation
                turn = UPRIGHT.get(_orientation(image))
                rgb = to_rgb(image)
            if turn is None:
                return rgb
            if rgb is not image:
                image.close()  # also frees its pixels
            return _turned(rgb, turn)
    except UnidentifiedImageError:
        error = "it is empty" if empty else f"it is not one of {', '.join(FORMATS)}"
    except MemoryError:
        raise
    except TooLarge as reason:
        error, advice = f"{reason}", advice.replace("Replace the file", "Make it smaller")
    except ShardChanged as reason:
        error, advice = f"{reason}", f"Index the shards again: {INDEX_AGAIN}"
    except Exception as reason:  # decoders raise many kinds of errors on corrupted files
        error = f"{reason}" or type(reason).__name__
        if isinstance(reason, OSError) and reason.errno:
            error = reason.strerror or error
            if reason.errno in (errno.EACCES, errno.EPERM):  # the image itself may be intact
                advice = "Give this user access to it"
    where = f" ({entry})" if entry else ""
    raise BrokenImage(f"{path}{where}: the image cannot be read: {error}. {advice}.") from None


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert a decoded image of any mode to 8-bit RGB. Transparency is dropped, as in the original
    code, and the stored colours are kept. Raises ValueError for grey values of unknown scale.

    Grey values of 16 bits (12 in some TIFFs) are scaled by their depth. PIL's own conversion would
    clip them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # only a TIFF has them
        white, values = 2 ** tags.get(BITS, (16,))[0] - 1, np.asarray(image)
        scaled = np.empty(values.shape, np.uint8)
        for row, grey in enumerate(values):  # by row, because int64 needs much memory
            grey = (grey.astype(np.int64) * 255 + white // 2) // white
            scaled[row] = (255 - grey if tags.get(WHITE_IS) == 0 else grey).clip(0, 255)
        image = PILImage.fromarray(scaled)
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its grey values are {'32-bit numbers' if image.mode == 'F' else 'integers'} whose "
            "white is unknown; save it with 8 or 16 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns if it is converted to RGB directly
    return image if image.mode == "RGB" else image.convert("RGB")


def _scans(file: BinaryIO) -> int:
    """Number of scans of a JPEG, by its markers; 0 for other formats. Raises ValueError for a PPM
    with a long header, because PIL would read it byte by byte."""
    scans, at, data = 0, 2, file.read(HEADER)
    if data.startswith(b"\xff\xd8"):
        data += file.read()
        while scans <= MAX_SCANS and (match := MARKER.search(data, at)):
            at, code = match.end(), match[1][0]
            if code == 0xD9:  # end of the image
                break
            if code not in (0x01, 0xD8):  # after all other markers, a length follows
                at += int.from_bytes(data[at : at + 2], "big")
            scans += code == 0xDA
    elif data.startswith(b"P") and len(data) == HEADER:
        fields = len(re.sub(rb"#[^\r\n]*", b"", data).split())
        if fields < (3 if data[1:2] in b"14" else 4):  # kind, width, height, and value of white
            raise ValueError(f"its header is over the limit of {HEADER} bytes")
    file.seek(0)
    return scans


def _refuse_bomb(width: int, height: int, scans: int, max_pixels: int) -> None:
    """Raise ValueError for an image that would take too much memory or time to decode; TooLarge for
    its size."""
    if width * height > max_pixels:
        raise TooLarge(f"{width}x{height} is over the limit of {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise TooLarge(f"{width}x{height}: a side is over the limit of {MAX_SIDE} pixels")
    if scans > min(MAX_SCANS, MAX_SCANNED // max(1, width * height)):
        count = f"more than {MAX_SCANS}" if scans > MAX_SCANS else scans
        raise ValueError(f"a JPEG of {width}x{height} in {count} scans; encoders write about 10")


def _orientation(image: PILImage.Image) -> int:
    """The EXIF orientation, 1 to 8. If it is missing or corrupted, 1 (upright), as in viewers."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # corrupted EXIF data raises many kinds of errors
        return 1
    return value if value in UPRIGHT else 1


def _turned(image: PILImage.Image, turn: PILImage.Transpose) -> PILImage.Image:
    turned = image.transpose(turn)
    turned.info.clear()  # otherwise its EXIF data would turn it again
    return turned
