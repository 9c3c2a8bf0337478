"""Which augmentation the images of a training batch get, and how many random numbers each needs.

The ordinary augmentation is that of `datasets/transforms.py: train_transform`. A loss may ask for
further images of the first view: `second`, augmented in the same way with other random numbers, and
`strong_1` and `strong_2` with SimCLR's augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from easydict import EasyDict
from torch import Tensor

from datasets.batched import TRIES, blur, geometry, grey, jitter, random_box, warp
from datasets.transforms import UNIFORM_AUGMENTED, UNIFORM_PLAIN, normalise, train_transform

STRONG = ("strong_1", "strong_2")
MORE_IMAGES = ("second", *STRONG)

UNIFORM_BOX = 2 * TRIES + 2
SIMCLR_AREA = (0.2, 1.0)  # of the crop, as a fraction of the image
SIMCLR_JITTER, SIMCLR_HUE, SIMCLR_SIGMA = 0.4, 0.1, (0.1, 2.0)
# Flip or not; box; jitter or not; brightness, contrast, saturation; hue; grey or not; blur or not;
# sigma.
UNIFORM_SIMCLR = 1 + UNIFORM_BOX + 1 + 3 + 1 + 1 + 1 + 1


def numbers_of(args: EasyDict) -> int:
    """How many random numbers the ordinary augmentation of an image needs."""
    return UNIFORM_AUGMENTED if args.img_aug else UNIFORM_PLAIN


def more_numbers(args: EasyDict, names: Sequence[str]) -> dict[str, int]:
    """The same for further images of the first view, by name. Raises ValueError if there is no such
    image."""
    for name in names:
        if name not in MORE_IMAGES:
            raise ValueError(f"no further image '{name}'; there are {', '.join(MORE_IMAGES)}")
    return {name: UNIFORM_SIMCLR if name in STRONG else numbers_of(args) for name in names}


def augment(
    name: str, images_BCHW: Tensor, uniform_BK: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Augment and normalise a batch of bytes; float32, on the device of the images.

    Args:
        name: of a further image; every other name means the ordinary augmentation.
        uniform_BK: uniform random numbers in [0, 1), as many as `numbers_of` or `more_numbers` say.
        mean, std: of the images that the pretrained weights were trained on.
    """
    if name in STRONG:
        return normalise(simclr(images_BCHW, uniform_BK), mean, std)
    return train_transform(images_BCHW, uniform_BK, mean, std)


def simclr(images_BCHW: Tensor, uniform_BK: Tensor) -> Tensor:
    """SimCLR's augmentation (Chen et al., ICML 2020) as TBPS-CLIP uses it; float, 0 to 255.

    In this order: a crop of 20 to 100 % of the area, resized (`random_box`), and a flip with
    probability 0.5; with probability 0.8 brightness, contrast and saturation times 0.6 to 1.4, and
    the hue turned by up to 0.1; with probability 0.2 grey; with probability 0.5 a Gaussian blur of
    0.1 to 2 pixels. The crop is one of the image that has been resized already, so it is less sharp
    than one of a large file.
    """
    height, width = images_BCHW.shape[-2:]
    flip_B, box_BK, number_BK = uniform_BK.tensor_split((1, 1 + UNIFORM_BOX), dim=1)
    box_B4 = random_box(height, width, box_BK, SIMCLR_AREA)
    upright_B = torch.zeros_like(box_B4[:, 0])
    map_B23 = geometry(height, width, box_B4, upright_B, flip_B[:, 0] < 0.5)
    images_BCHW = warp(images_BCHW.float(), [map_B23])
    jitter_B1, factor_B3, hue_B1, grey_B1, blur_B1, sigma_B1 = number_BK.split(
        (1, 3, 1, 1, 1, 1), 1
    )
    factor_B3 = 1 + SIMCLR_JITTER * (2 * factor_B3 - 1)
    factor_B3 = torch.where(jitter_B1 < 0.8, factor_B3, 1.0)
    hue_B1 = torch.where(jitter_B1 < 0.8, SIMCLR_HUE * (2 * hue_B1 - 1), 0.0)
    images_BCHW = jitter(images_BCHW, factor_B3, hue_B1[:, 0])
    is_grey_B111 = grey_B1[..., None, None] < 0.2
    images_BCHW = torch.where(is_grey_B111, grey(images_BCHW), images_BCHW)
    low, high = SIMCLR_SIGMA
    sigma_B1 = torch.where(blur_B1 < 0.5, low + (high - low) * sigma_B1, 0.0)
    return blur(images_BCHW, sigma_B1[:, 0])
