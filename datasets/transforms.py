"""Images: a file becomes resized bytes, a batch of bytes becomes the encoder's input.

Decoding and resizing are done per file, by loader processes or once for all (`--image_cache`).
What follows (flip, crop, erasing, normalisation) is done for a whole batch, on the training device,
from random numbers that were drawn per sample: the same on any device, for any number of processes.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from utils.errors import UserError
from utils.files import open_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PADDING = 10  # pixels around the image before the random crop
ERASED_AREA = (0.02, 0.4)  # share of the image
ERASED_SHAPE = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10  # for a rectangle that fits; after them the image stays whole
# Others can start programs (EPS), or are no pictures of people.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
PILImage.MAX_IMAGE_PIXELS = None  # PIL warns, and refuses in words of its own; here is ours:
# More is a bomb: a small file that takes all memory or hours. Decoders take up to 16 bytes a pixel.
MAX_PIXELS = 61_000_000  # a full-frame camera has 60 million at most
MAX_SIDE = 30_000  # three times such a camera's; some decoders take much memory for a row or column
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
# A progressive JPEG's picture is gone over in scans, 10 in the usual encoders' files, each of which
# takes time, however few its bytes. Over many pixels fewer are allowed.
MAX_SCANS, MAX_SCANNED = 100, 20 * MAX_PIXELS
HEADER = 2**16  # bytes, of a PPM
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # of a JPEG, not in its data
ORIENTATION, BITS, WHITE_IS = 274, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {  # what undoes each orientation of EXIF; from 5 on, width and height change places
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
# How many uniform random numbers an image needs.
UNIFORM_PLAIN = 1  # the flip
UNIFORM_AUGMENTED = 1 + 2 + 1 + 2 * ERASING_TRIES + 2  # flip; crop; erase?; rectangles; place


class BrokenImage(UserError):
    """An image that cannot be read, which `--on_bad_image skip` passes over."""


def read_image(
    path: str, entry: str = "", at_least: tuple[int, int] | None = None
) -> PILImage.Image:
    """Decode an RGB image and turn it upright, as EXIF says. Raises BrokenImage naming the file
    (and entry) if it cannot be read.

    Args:
        at_least: height and width; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as
            long as it stays at least so large, which takes a fraction of the time.
    """
    advice = "Replace the file" + (", or take its entry out of the JSON" if entry else "")
    try:
        # A pipe or device would keep its reader waiting; and a mapped file, as PIL reads some that
        # it has opened itself, ends the process if it is cut meanwhile.
        with open_file(path) as file:
            if (length := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise ValueError(f"its {length} bytes are over the limit of {MAX_BYTES}")
            scans = _scans(file)
            with PILImage.open(file, formats=FORMATS) as image:
                _refuse_bomb(*image.size, scans)  # before it is decoded
                if at_least is not None:
                    image.draft("RGB", at_least if _orientation(image) >= 5 else at_least[::-1])
                image.load()  # which turns a TIFF upright, and clears its orientation
                turn = UPRIGHT.get(_orientation(image))
                upright = to_rgb(image)
            if turn is None:
                return upright
            if upright is not image:
                image.close()  # its pixels, too
            return _turned(upright, turn)
    except UnidentifiedImageError:
        error = f"it is none of {', '.join(FORMATS)}"
    except MemoryError:
        raise
    except Exception as reason:  # decoders of corrupted files raise nearly anything
        error = f"{reason}" or type(reason).__name__
        if isinstance(reason, OSError) and reason.errno:
            error = reason.strerror or error
            if reason.errno in (errno.EACCES, errno.EPERM):  # not the picture's fault
                advice = "Give this user access to it"
    where = f" ({entry})" if entry else ""
    raise BrokenImage(f"{path}{where}: the image cannot be read: {error}. {advice}.") from None


def _scans(file: BinaryIO) -> int:
    """How many scans a JPEG has, by its markers; 0 for another format. Raises ValueError if it is a
    PPM whose header is long, since that is read byte by byte."""
    scans, at, data = 0, 2, file.read(HEADER)
    if data.startswith(b"\xff\xd8"):
        data += file.read()
        while scans <= MAX_SCANS and (found := MARKER.search(data, at)):
            at, code = found.end(), found[1][0]
            if code == 0xD9:  # the end
                break
            if code not in (0x01, 0xD8):  # which stand alone; of others the length follows
                at += int.from_bytes(data[at : at + 2], "big")
            scans += code == 0xDA
    elif data.startswith(b"P") and len(data) == HEADER:
        fields = len(re.sub(rb"#[^\r\n]*", b"", data).split())
        if fields < (3 if data[1:2] in b"14" else 4):  # kind, width, height, and white
            raise ValueError(f"its header is over the limit of {HEADER} bytes")
    file.seek(0)
    return scans


def _refuse_bomb(width: int, height: int, scans: int) -> None:
    """Raise ValueError if it would take too much memory or time to decode."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is over the limit of {MAX_PIXELS} pixels")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height}: a side is over the limit of {MAX_SIDE} pixels")
    if scans > min(MAX_SCANS, MAX_SCANNED // max(1, width * height)):
        count = f"more than {MAX_SCANS}" if scans > MAX_SCANS else scans
        raise ValueError(f"a JPEG of {width}x{height} in {count} scans; encoders write about 10")


def _orientation(image: PILImage.Image) -> int:
    """EXIF's, 1 to 8; 1, upright, if there is none or it is corrupted, as viewers take it."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # as decoders do
        return 1
    return value if value in UPRIGHT else 1


def _turned(image: PILImage.Image, turn: PILImage.Transpose) -> PILImage.Image:
    turned = image.transpose(turn)
    turned.info.clear()  # EXIF would have it turned again
    return turned


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """8-bit RGB of a decoded image of any mode. Transparency is dropped, as in the original: the
    colours that stand in the file count. Raises ValueError for grey values of unknown scale.

    Grey of 16 bits (12 in some TIFFs) is scaled by its depth; PIL's own conversion would clip it.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # a TIFF's
        white, values = 2 ** tags.get(BITS, (16,))[0] - 1, np.asarray(image)
        scaled = np.empty(values.shape, np.uint8)
        for row, grey in enumerate(values):  # whole, the wide numbers would take much memory
            grey = (grey.astype(np.int64) * 255 + white // 2) // white
            scaled[row] = (255 - grey if tags.get(WHITE_IS) == 0 else grey).clip(0, 255)
        image = PILImage.fromarray(scaled)
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its grey values are {'32-bit numbers' if image.mode == 'F' else 'integers'} whose "
            "white is unknown; save it with 8 or 16 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str, size: tuple[int, int], entry: str = "") -> Tensor:
    """Read an image and resize it (bilinear, antialiased) to height and width: [3, H, W] uint8.

    A JPEG of more than four times the size is decoded smaller, but at twice the size or more, so
    that the resizing filter still decides: the bytes differ by a level or two.
    """
    return _resized(read_image(path, entry, at_least=(2 * size[0], 2 * size[1])), size)


def convert_image(image: PILImage.Image, size: tuple[int, int]) -> Tensor:
    """The same of an image that PIL has opened: turned upright, as EXIF says, and resized."""
    image.load()  # which turns a TIFF upright, and clears its orientation
    turn, rgb = UPRIGHT.get(_orientation(image)), to_rgb(image)
    return _resized(rgb if turn is None else _turned(rgb, turn), size)


def _resized(image: PILImage.Image, size: tuple[int, int]) -> Tensor:
    return tv.pil_to_tensor(tv.resize(image, list(size)))


def normalise(
    images_BCHW: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Bytes to the encoder's input: (x / 255 - mean) / std, float32."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images_BCHW.device)
    return images_BCHW.float().mul_(scale).sub_(shift)


@functools.cache  # once per device: a copy to it in every step would be a wait
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (mean, std))
    return (1 / (255 * std_C11)).to(device), (mean_C11 / std_C11).to(device)


def train_transform(
    images_BCHW: Tensor,
    uniform_BK: Tensor,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Augment and normalise a batch of bytes; float32, on the device of the images.

    Flip with 0.5. With `--img_aug` also: pad 10 with black and crop at random, then with 0.5 erase
    a rectangle of 2 to 40 % of the area, filling it with the mean colour (0 after normalising).

    Args:
        uniform_BK: uniform random numbers in [0, 1); K is UNIFORM_AUGMENTED for all of it,
            UNIFORM_PLAIN for the flip alone.
        mean, std: of the pretrained weights' own input.
    """
    flip_B = uniform_BK[:, 0] < 0.5
    if uniform_BK.shape[1] == UNIFORM_PLAIN:
        flipped = torch.where(flip_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
        return normalise(flipped, mean, std)
    height, width = images_BCHW.shape[-2:]
    images = normalise(_shift(images_BCHW, flip_B, uniform_BK[:, 1:3]), mean, std)
    erased_BHW = erased_area(height, width, uniform_BK[:, 3:])
    return images.masked_fill_(erased_BHW[:, None], 0.0)


def _shift(images_BCHW: Tensor, flip_B: Tensor, place_B2: Tensor) -> Tensor:
    """Flip where told, pad, and crop to the old size at one of (2 * PADDING + 1)^2 places."""
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    padded = F.pad(images_BCHW, [PADDING] * 4)
    top_B, left_B = (place_B2 * (2 * PADDING + 1)).long().unbind(1)
    rows_BH = top_B[:, None] + torch.arange(height, device=device)
    columns_BW = left_B[:, None] + torch.arange(width, device=device)
    last = width + 2 * PADDING - 1
    columns_BW = torch.where(flip_B[:, None], last - columns_BW, columns_BW)
    each_B = torch.arange(batch, device=device)[:, None, None]
    return padded[each_B, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def erased_area(height: int, width: int, uniform_BK: Tensor) -> Tensor:
    """Where random erasing (Zhong et al., 2020) erases: [B, H, W] bool.

    uniform: whether to erase; area and shape of ERASING_TRIES rectangles, of which the first that
    fits is taken; its place. Areas are uniform, shapes log-uniform.
    """
    erase_B, place_B2 = uniform_BK[:, 0] < 0.5, uniform_BK[:, -2:]
    area_BT, shape_BT = uniform_BK[:, 1:-2].unflatten(1, (ERASING_TRIES, 2)).unbind(2)
    low, high = ERASED_AREA
    area_BT = (low + (high - low) * area_BT) * (height * width)
    low, high = map(math.log, ERASED_SHAPE)
    shape_BT = (low + (high - low) * shape_BT).exp()
    h_BT, w_BT = (area_BT * shape_BT).sqrt().round(), (area_BT / shape_BT).sqrt().round()
    fits_BT = (h_BT < height) & (w_BT < width)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)  # argmax takes the first of equals
    erase_B &= fits_BT.any(dim=1)
    size_B2 = torch.cat([h_BT.gather(1, first_B1), w_BT.gather(1, first_B1)], dim=1)
    room_B2 = torch.stack([height - size_B2[:, 0], width - size_B2[:, 1]], dim=1) + 1
    (top_B, left_B), (h_B, w_B) = (place_B2 * room_B2).floor().unbind(1), size_B2.unbind(1)

    def between(start_B: Tensor, length_B: Tensor, total: int) -> Tensor:
        place = torch.arange(total, device=uniform_BK.device)
        return (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])

    rows_BH, columns_BW = between(top_B, h_B, height), between(left_B, w_B, width)
    return erase_B[:, None, None] & rows_BH[:, :, None] & columns_BW[:, None, :]
