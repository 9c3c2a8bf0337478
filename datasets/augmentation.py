"""Which augmentation the images of a training batch get, and how many random numbers each needs.

The ordinary augmentation is that of `datasets/transforms.py: train_transform`, or with `--img_pool`
that of `pool`. A loss may ask for further images of the first view: `second`, augmented in the same
way with other random numbers, and `strong_1` and `strong_2` with SimCLR's augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from easydict import EasyDict
from torch import Tensor

from datasets.batched import TRIES, blur, geometry, grey, jitter, random_box, warp
from datasets.transforms import (
    UNIFORM_AUGMENTED,
    UNIFORM_ERASING,
    UNIFORM_PLAIN,
    erased_area,
    normalise,
    train_transform,
)

STRONG = ("strong_1", "strong_2")
MORE_IMAGES = ("second", *STRONG)

POOL = ("jitter", "rotation", "crop", "grey", "flip", "erasing")
POOL_JITTER, POOL_ANGLE = 0.1, 15.0  # degrees
POOL_CROPPED_AREA, POOL_ERASED_AREA = (0.9, 1.0), (0.1, 0.2)  # fractions of the image
# Which of the pool, and its own numbers, of which erasing needs the most.
UNIFORM_POOL = 1 + UNIFORM_ERASING

UNIFORM_BOX = 2 * TRIES + 2
SIMCLR_AREA = (0.2, 1.0)  # of the crop, as a fraction of the image
SIMCLR_JITTER, SIMCLR_HUE, SIMCLR_SIGMA = 0.4, 0.1, (0.1, 2.0)
# Flip or not; box; jitter or not; brightness, contrast, saturation; hue; grey or not; blur or not;
# sigma.
UNIFORM_SIMCLR = 1 + UNIFORM_BOX + 1 + 3 + 1 + 1 + 1 + 1


def numbers_of(args: EasyDict) -> tuple[int, ...]:
    """The shape of the random numbers that the ordinary augmentation of an image needs."""
    if args.img_pool:
        return args.img_pool, UNIFORM_POOL
    return (UNIFORM_AUGMENTED if args.img_aug else UNIFORM_PLAIN,)


def more_numbers(args: EasyDict, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The same for further images of the first view, by name. Raises ValueError if there is no such
    image."""
    for name in names:
        if name not in MORE_IMAGES:
            raise ValueError(f"no further image '{name}'; there are {', '.join(MORE_IMAGES)}")
    return {name: (UNIFORM_SIMCLR,) if name in STRONG else numbers_of(args) for name in names}


def augment(
    name: str, images_BCHW: Tensor, uniform: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Augment and normalise a batch of bytes; float32, on the device of the images.

    Args:
        name: of a further image; every other name means the ordinary augmentation.
        uniform: uniform random numbers in [0, 1): [B, ...], of the shape that `numbers_of` or
            `more_numbers` say.
        mean, std: of the images that the pretrained weights were trained on.
    """
    if name in STRONG:
        return normalise(simclr(images_BCHW, uniform), mean, std)
    if uniform.ndim == 3:
        return normalise(pool(images_BCHW, uniform), mean, std)
    return train_transform(images_BCHW, uniform, mean, std)


def pool(images_BCHW: Tensor, uniform_BNK: Tensor) -> Tensor:
    """N augmentations of TBPS-CLIP's pool (AAAI 2024) for each image; float, 0 to 255.

    Each is drawn from these six, so one may come twice:

    - jitter: brightness, contrast and saturation times 0.9 to 1.1
    - rotation: by up to 15 degrees; what comes from outside is black
    - crop: 90 to 100 % of the area, resized (`random_box`)
    - grey: with probability 0.1
    - flip: with probability 0.5
    - erasing: a rectangle of 10 to 20 % of the area becomes black, with probability 0.5

    An image gets the geometric ones first, in the order in which they were drawn, then the colours,
    in this order too, then the erasing. (TBPS-CLIP applies all as they were drawn. That differs in
    a contrast before a geometric one, whose mean grey is here that of the result, and in an erased
    rectangle, which is here neither rotated nor resized.)

    Args:
        uniform_BNK: uniform random numbers in [0, 1): which of the six, then its own. K is
            UNIFORM_POOL.
    """
    height, width = images_BCHW.shape[-2:]
    which_BN, number_BNK = (uniform_BNK[..., 0] * len(POOL)).long(), uniform_BNK[..., 1:]
    maps, factors = [], []
    erased_BHW = torch.zeros_like(images_BCHW[:, 0], dtype=torch.bool)
    for which_B, number_BK in zip(which_BN.unbind(1), number_BNK.unbind(1), strict=True):
        drawn = {name: which_B == i for i, name in enumerate(POOL)}
        first_B, signed_B3 = number_BK[:, 0], 2 * number_BK[:, :3] - 1
        box_BK = number_BK[:, :UNIFORM_BOX]
        box_B4 = random_box(height, width, box_BK, POOL_CROPPED_AREA, drawn["crop"])
        angle_B = drawn["rotation"] * POOL_ANGLE * signed_B3[:, 0]
        flip_B = drawn["flip"] & (first_B < 0.5)
        maps.append(geometry(height, width, box_B4, angle_B, flip_B))
        factor_B3 = 1 + drawn["jitter"][:, None] * POOL_JITTER * signed_B3
        factor_B3[:, 2] *= ~(drawn["grey"] & (first_B < 0.1))  # without saturation it is grey
        factors.append(factor_B3)
        area_BHW = erased_area(height, width, number_BK, POOL_ERASED_AREA)
        erased_BHW |= drawn["erasing"][:, None, None] & area_BHW
    images_BCHW = warp(images_BCHW.float(), maps)
    for factor_B3 in factors:
        images_BCHW = jitter(images_BCHW, factor_B3)
    return images_BCHW.masked_fill_(erased_BHW[:, None], 0)


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
    changes_B1 = jitter_B1 < 0.8
    factor_B3 = 1 + changes_B1 * SIMCLR_JITTER * (2 * factor_B3 - 1)
    shift_B1 = changes_B1 * SIMCLR_HUE * (2 * hue_B1 - 1)
    images_BCHW = jitter(images_BCHW, factor_B3, shift_B1[:, 0])
    images_BCHW = torch.where(grey_B1[..., None, None] < 0.2, grey(images_BCHW), images_BCHW)
    low, high = SIMCLR_SIGMA
    sigma_B1 = (blur_B1 < 0.5) * (low + (high - low) * sigma_B1)
    return blur(images_BCHW, sigma_B1[:, 0])
