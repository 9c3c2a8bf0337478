"""Images: reading and resizing a file, augmenting and normalising a batch.

Decoding and resizing are done per file, by loader processes or once for all runs (`--image_cache`).
The rest (flip, crop, erasing, normalisation) is done for a complete batch on the training device.
Its random numbers are drawn per sample by the loader. So the result is the same on any device and
for any number of processes.
"""

from __future__ import annotations

import errno
import functools
import math
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

from datasets.shards import INDEX_AGAIN, ShardChanged, open_image
from utils.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PADDING = 10  # pixels around the image before the random crop
ERASED_AREA = (0.02, 0.4)  # fraction of the image
ERASED_SHAPE = (0.3, 3.3)  # height / width
ERASING_TRIES = 10  # to find a rectangle that fits; if none does, nothing is erased
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
# How many uniform random numbers an image needs:
UNIFORM_PLAIN = 1  # flip or not
# Flip or not; crop's top and left; erase or not; rectangles' areas and shapes; erased top and left.
UNIFORM_AUGMENTED = 1 + 2 + 1 + 2 * ERASING_TRIES + 2


class BrokenImage(UserError):
    """An image that cannot be read. `--on_bad_image skip` skips it."""


def load_image(path: str, size: tuple[int, int], entry: str = "") -> Tensor:
    """Read an image and resize it (bilinear, antialiased) to `size`, height and width. Returns
    [3, H, W] uint8.

    A JPEG of more than four times this size is decoded at a reduced size, which is still at least
    twice `size`. After resizing, the values differ by one or two grey levels from those of a full
    decoding.
    """
    return _resized(read_image(path, entry, at_least=(2 * size[0], 2 * size[1])), size)


def convert_image(image: PILImage.Image, size: tuple[int, int]) -> Tensor:
    """The same for an image that PIL has opened: turn it upright, as its EXIF data says, and resize
    it. Returns [3, H, W] uint8."""
    return _resized(upright(image), size)


def upright(image: PILImage.Image) -> PILImage.Image:
    """An image that PIL has opened, in RGB, turned upright as its EXIF data says."""
    image.load()  # also turns a TIFF upright and removes its orientation
    turn, rgb = UPRIGHT.get(_orientation(image)), to_rgb(image)
    return rgb if turn is None else _turned(rgb, turn)


def read_image(
    path: str, entry: str = "", at_least: tuple[int, int] | None = None
) -> PILImage.Image:
    """Decode an image to RGB and turn it upright, as its EXIF data says. Raises BrokenImage naming
    the file (and entry) if it cannot be read.

    Args:
        at_least: height and width; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at
            least at this size. This takes a fraction of the time.
    """
    advice = "Replace the file" + (", or remove its entry from the JSON" if entry else "")
    try:
        # Not opened by PIL: it would wait forever on a pipe, and it memory-maps some files, where
        # a truncation by another program would kill the process (SIGBUS).
        with open_image(path, MAX_BYTES) as file:
            scans = _scans(file)
            with PILImage.open(file, formats=FORMATS) as image:
                _refuse_bomb(*image.size, scans)  # before it is decoded
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
        error = f"it is not one of {', '.join(FORMATS)}"
    except MemoryError:
        raise
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


def train_transform(
    images_BCHW: Tensor,
    uniform_BK: Tensor,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Augment and normalise a batch of bytes; float32, on the device of the images.

    Flips with probability 0.5. With `--img_aug` also pads with 10 black pixels and crops at random,
    and with probability 0.5 erases a rectangle of 2 to 40 % of the area: its colour becomes the
    mean, which is 0 after normalising. (IRRA fills with the mean after normalising, a light grey.)

    Args:
        uniform_BK: uniform random numbers in [0, 1); K is UNIFORM_AUGMENTED, or UNIFORM_PLAIN to
            flip only.
        mean, std: of the images that the pretrained weights were trained on.
    """
    flip_B = uniform_BK[:, 0] < 0.5
    if uniform_BK.shape[1] == UNIFORM_PLAIN:
        flipped = torch.where(flip_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
        return normalise(flipped, mean, std)
    height, width = images_BCHW.shape[-2:]
    images = normalise(_shift(images_BCHW, flip_B, uniform_BK[:, 1:3]), mean, std)
    erased_BHW = erased_area(height, width, uniform_BK[:, 3:])
    return images.masked_fill_(erased_BHW[:, None], 0.0)


def normalise(
    images_BCHW: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Turn bytes into the encoder's input: (x / 255 - mean) / std, float32."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images_BCHW.device)
    return images_BCHW.float().mul_(scale).sub_(shift)


def erased_area(height: int, width: int, uniform_BK: Tensor) -> Tensor:
    """Where random erasing (Zhong et al., 2020) erases: [B, H, W] bool.

    Areas are uniform, shapes (height / width) log-uniform. Of ERASING_TRIES rectangles, the first
    one that fits into the image is taken.

    Args:
        uniform_BK: uniform random numbers in [0, 1): whether to erase, area and shape of each
            rectangle, top and left. K is 1 + 2 * ERASING_TRIES + 2.
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


def _refuse_bomb(width: int, height: int, scans: int) -> None:
    """Raise ValueError for an image that would take too much memory or time to decode."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is over the limit of {MAX_PIXELS} pixels")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height}: a side is over the limit of {MAX_SIDE} pixels")
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


def _resized(image: PILImage.Image, size: tuple[int, int]) -> Tensor:
    return tv.pil_to_tensor(tv.resize(image, list(size)))


def _shift(images_BCHW: Tensor, flip_B: Tensor, place_B2: Tensor) -> Tensor:
    """Flip some images, pad all, and crop each to its size at one of (2 * PADDING + 1)^2 places.

    Args:
        flip_B: bool, which images to flip.
        place_B2: top and left of the crop, uniform in [0, 1).
    """
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


@functools.cache  # once per device, because a copy in every step would wait for the device
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (mean, std))
    return (1 / (255 * std_C11)).to(device), (mean_C11 / std_C11).to(device)
