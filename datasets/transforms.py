"""From an image file to a normalised tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms import v2

from utils.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def train_transform(size: tuple[int, int], augment: bool = False) -> Callable:
    """PIL image to [3, H, W]: resize, flip with 0.5; `augment` (`--img_aug`) adds pad 10 and
    random crop, and with 0.5 the erasing of 2 to 40 % of the area, filled with the mean."""
    steps = [v2.Resize(size), v2.RandomHorizontalFlip(0.5)]
    if augment:
        steps += [v2.Pad(10), v2.RandomCrop(size)]
    steps += _to_normalised()
    if augment:
        steps.append(v2.RandomErasing(p=0.5, scale=(0.02, 0.4), value=0.0))  # 0 is the mean here
    return v2.Compose(steps)


def eval_transform(size: tuple[int, int]) -> Callable:
    """PIL image to [3, H, W]: resize and normalise."""
    return v2.Compose([v2.Resize(size), *_to_normalised()])


def _to_normalised() -> list[Callable]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(CLIP_MEAN, CLIP_STD),
    ]


def read_image(path: str, entry: str = "") -> PILImage.Image:
    """Decode an RGB image. Raises UserError naming the file (and entry) if it cannot be read."""
    try:
        with PILImage.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        where = f" ({entry})" if entry else ""
        raise UserError(
            f"{path}{where}: the image cannot be read: {error}. Replace the file, or take its "
            "entry out of the JSON."
        ) from None


def image_tensor(path: str, transform: Callable, entry: str = "") -> Tensor:
    """`read_image`, then the transform: [3, H, W] float32."""
    return transform(read_image(path, entry))
