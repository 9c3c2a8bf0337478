"""Images as tensors: of a file, and augmenting and normalising a batch.

Decoding and resizing are done per file, by loader processes or once for all runs (`--image_cache`).
The rest (flip, crop, erasing, normalisation) is done for a complete batch on the training device.
Its random numbers are drawn per sample by the loader. So the result is the same on any device and
for any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from datasets.batched import TRIES, first_fitting
from datasets.images import load_resized, resized, upright

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PADDING = 10  # pixels around the image before the random crop
ERASED_AREA = (0.02, 0.4)  # fraction of the image
ERASED_SHAPE = (0.3, 3.3)  # height / width
# How many uniform random numbers an image needs:
UNIFORM_PLAIN = 1  # flip or not
# Erase or not; rectangles' areas and shapes; erased top and left.
UNIFORM_ERASING = 1 + 2 * TRIES + 2
UNIFORM_AUGMENTED = 1 + 2 + UNIFORM_ERASING  # flip or not; crop's top and left; erasing


def load_image(path: str, size: tuple[int, int], entry: str = "") -> Tensor:
    """`load_resized` as a tensor, [3, H, W] uint8."""
    return tv.pil_to_tensor(load_resized(path, size, entry))


def convert_image(image: PILImage.Image, size: tuple[int, int]) -> Tensor:
    """The same for an image that PIL has opened: turn it upright, as its EXIF data says, and resize
    it. Returns [3, H, W] uint8."""
    return tv.pil_to_tensor(resized(upright(image), size))


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


def erased_area(
    height: int, width: int, uniform_BK: Tensor, area: tuple[float, float] = ERASED_AREA
) -> Tensor:
    """Where random erasing (Zhong et al., 2020) erases: [B, H, W] bool.

    The rectangle is the first of TRIES that fits into the image (`first_fitting`). If none does,
    nothing is erased.

    Args:
        uniform_BK: uniform random numbers in [0, 1): whether to erase, area and shape of each
            rectangle, top and left. K is UNIFORM_ERASING.
        area: smallest and largest area, as a fraction of the image's.
    """
    erase_B, place_B2 = uniform_BK[:, 0] < 0.5, uniform_BK[:, -2:]
    size_B2, fits_B = first_fitting(
        uniform_BK[:, 1:-2], height * width, area, ERASED_SHAPE, (height, width)
    )
    erase_B &= fits_B
    room_B2 = torch.stack([height - size_B2[:, 0], width - size_B2[:, 1]], dim=1) + 1
    (top_B, left_B), (h_B, w_B) = (place_B2 * room_B2).floor().unbind(1), size_B2.unbind(1)

    def between(start_B: Tensor, length_B: Tensor, total: int) -> Tensor:
        place = torch.arange(total, device=uniform_BK.device)
        return (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])

    rows_BH, columns_BW = between(top_B, h_B, height), between(left_B, w_B, width)
    return erase_B[:, None, None] & rows_BH[:, :, None] & columns_BW[:, None, :]


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
