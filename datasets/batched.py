"""Operations on a batch of images, on their device, with other parameters for each image.

Images [B, 3, H, W] are float, from 0 to 255. No operation loops over images or waits for the
device. Colours are those of torchvision's `functional`, which takes one parameter for a batch:
grey is 0.2989 R + 0.587 G + 0.114 B, and results are limited to 0 and 255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WHITE = 255.0
BLUR_RADIUS = 6  # pixels: three times the largest sigma
TRIES = 10  # to find a rectangle that fits, as torchvision's crop and erasing


def first_fitting(
    uniform_BK: Tensor,
    pixels: int,
    area: tuple[float, float],
    shape: tuple[float, float],
    below: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The first of K / 2 random rectangles that fits.

    Areas are uniform, shapes (height / width) log-uniform. Sides are rounded to pixels.

    Args:
        uniform_BK: uniform random numbers in [0, 1): area and shape of each rectangle.
        pixels: area of the image.
        area: smallest and largest area, as a fraction of the image's.
        shape: smallest and largest height / width.
        below: a rectangle fits if its height and width are less than these.

    Returns:
        Heights and widths [B, 2], and which rows have one that fits [B] bool.
    """
    area_BT, shape_BT = uniform_BK.unflatten(1, (-1, 2)).unbind(2)
    low, high = area
    area_BT = (low + (high - low) * area_BT) * pixels
    low, high = map(math.log, shape)
    shape_BT = (low + (high - low) * shape_BT).exp()
    h_BT, w_BT = (area_BT * shape_BT).sqrt().round(), (area_BT / shape_BT).sqrt().round()
    fits_BT = (h_BT < below[0]) & (w_BT < below[1])
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)  # argmax takes the first of equals
    size_B2 = torch.cat([h_BT.gather(1, first_B1), w_BT.gather(1, first_B1)], dim=1)
    return size_B2, fits_BT.any(dim=1)


def random_box(
    height: int,
    width: int,
    uniform_BK: Tensor,
    area: tuple[float, float],
    crop_B: Tensor | None = None,
) -> Tensor:
    """Boxes of a random resized crop, [B, 4]: top, left, height, width.

    As torchvision's RandomResizedCrop at a square image: the first of TRIES boxes that fits, else
    the whole image. Its aspect ratios, 3/4 to 4/3, are here relative to that of the image. Of an
    image of 384x128, torchvision would take the same box of 171x128 in the centre nearly always.

    Args:
        uniform_BK: uniform random numbers in [0, 1): area and shape of each box, top and left. K is
            2 * TRIES + 2.
        area: smallest and largest area, as a fraction of the image's.
        crop_B: bool, which images to crop; the box of the others is the whole image.
    """
    shape = (3 / 4 * height / width, 4 / 3 * height / width)
    below = (height + 1, width + 1)
    size_B2, fits_B = first_fitting(uniform_BK[:, :-2], height * width, area, shape, below)
    if crop_B is not None:
        fits_B = fits_B & crop_B
    h_B = torch.where(fits_B, size_B2[:, 0], height)
    w_B = torch.where(fits_B, size_B2[:, 1], width)
    top_B = (uniform_BK[:, -2] * (height - h_B + 1)).floor()
    left_B = (uniform_BK[:, -1] * (width - w_B + 1)).floor()
    return torch.stack([top_B, left_B, h_B, w_B], dim=1)


def geometry(height: int, width: int, box_B4: Tensor, angle_B: Tensor, flip_B: Tensor) -> Tensor:
    """The map [B, 2, 3] of a crop that is resized to the image's size, then a rotation around the
    centre, then a flip: from a place (x, y, 1) of the result to one of the image.

    x and y are -1 at the left and top edge, and 1 at the right and bottom edge. With s = -1 for a
    flipped image, else 1, and a = angle, the maps of flip, rotation and crop are

        x <- s x
        (x, y) <- (cos a x - sin a (H / W) y,  sin a (W / H) x + cos a y)
        (x, y) <- ((w x + 2 left + w) / W - 1,  (h y + 2 top + h) / H - 1)

    Args:
        box_B4: top, left, height and width of the crop, pixels.
        angle_B: degrees, counter-clockwise.
        flip_B: bool.
    """
    top_B, left_B, h_B, w_B = box_B4.unbind(1)
    sign_B = 1 - 2 * flip_B.float()
    cos_B, sin_B = angle_B.deg2rad().cos(), angle_B.deg2rad().sin()
    x_B3 = torch.stack([cos_B * sign_B, -sin_B * (height / width), torch.zeros_like(sin_B)], dim=1)
    y_B3 = torch.stack([sin_B * sign_B * (width / height), cos_B, torch.zeros_like(sin_B)], dim=1)
    x_B3, y_B3 = x_B3 * (w_B / width)[:, None], y_B3 * (h_B / height)[:, None]
    x_B3[:, 2], y_B3[:, 2] = (2 * left_B + w_B) / width - 1, (2 * top_B + h_B) / height - 1
    return torch.stack([x_B3, y_B3], dim=1)


def warp(images_BCHW: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Apply maps of `geometry`, the first one first, and sample the images once, bilinearly.

    Sampling once for each map would blur. What a map takes from outside of the image before it is
    black. No matrix product is used: its precision would depend on the device.
    """
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    x_W, y_H = ((2 * torch.arange(n, device=device) + 1) / n - 1 for n in (width, height))
    x_BHW, y_BHW = x_W.expand(batch, height, width), y_H[:, None].expand(batch, height, width)
    inside_BHW = torch.ones_like(x_BHW, dtype=torch.bool)
    for map_B23 in reversed(maps):  # from the result back to the image
        a, b, c, d, e, f = map_B23.flatten(1)[..., None, None].unbind(1)
        x_BHW, y_BHW = a * x_BHW + b * y_BHW + c, d * x_BHW + e * y_BHW + f
        inside_BHW = inside_BHW & (x_BHW.abs() <= 1) & (y_BHW.abs() <= 1)
    places_BHW2 = torch.stack([x_BHW, y_BHW], dim=-1)
    sampled = F.grid_sample(images_BCHW, places_BHW2, padding_mode="border", align_corners=False)
    return sampled.mul_(inside_BHW[:, None])


def grey(images_BCHW: Tensor) -> Tensor:
    """[B, 1, H, W]."""
    red, green, blue = images_BCHW.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def blend(images_BCHW: Tensor, others: Tensor | float, weight_B: Tensor) -> Tensor:
    """weight * images + (1 - weight) * others, limited to 0 and 255."""
    weight_B111 = weight_B[:, None, None, None]
    return (weight_B111 * images_BCHW + (1 - weight_B111) * others).clamp_(0, WHITE)


def jitter(images_BCHW: Tensor, factor_B3: Tensor, shift_B: Tensor | None = None) -> Tensor:
    """Change brightness, contrast and saturation by their factors, then the hue, in this order.

    (torchvision's ColorJitter takes a random order.) With 1, 1, 1 and 0 nothing changes.

    - brightness: factor * image
    - contrast: factor * image + (1 - factor) * mean of the grey image
    - saturation: factor * image + (1 - factor) * grey image
    - hue: `shift_hue`
    """
    brightness_B, contrast_B, saturation_B = factor_B3.unbind(1)
    images_BCHW = blend(images_BCHW, 0.0, brightness_B)
    mean_B111 = grey(images_BCHW).mean(dim=(1, 2, 3), keepdim=True)
    images_BCHW = blend(images_BCHW, mean_B111, contrast_B)
    images_BCHW = blend(images_BCHW, grey(images_BCHW), saturation_B)
    return images_BCHW if shift_B is None else shift_hue(images_BCHW, shift_B)


def shift_hue(images_BCHW: Tensor, shift_B: Tensor) -> Tensor:
    """Turn the hue by a fraction of the colour circle; value and saturation stay.

    With V = max(R, G, B), C = V - min(R, G, B) and h the hue in sixths of the circle, colour
    n = 5, 3, 1 (R, G, B) is V - C max(0, min(k, 4 - k, 1)), where k = (n + h) mod 6. (This is HSV.)
    """
    red, green, blue = images_BCHW.unbind(1)
    value = images_BCHW.amax(dim=1)
    chroma = value - images_BCHW.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)  # a grey has no hue, and stays
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * shift_B[:, None, None]
    n_3 = 5 - 2 * torch.arange(3, device=images_BCHW.device)
    k_BCHW = (n_3[:, None, None] + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k_BCHW, 4 - k_BCHW).clamp_(0, 1)


def blur(images_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur, by the weights exp(-d^2 / (2 sigma^2)) / their sum, for d from -6 to 6 pixels,
    down, then across. Edges are reflected.

    Args:
        sigma_B: pixels, at most 2; 0 leaves an image as it is.
    """
    distance_T = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images_BCHW.device)
    weight_BT = (-(distance_T**2) / (2 * sigma_B[:, None].clamp(min=0.01) ** 2)).exp()
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    weights = [weight_B[:, None, None, None] for weight_B in weight_BT.unbind(1)]
    blurred = F.pad(images_BCHW, [BLUR_RADIUS] * 4, mode="reflect")
    for dim in (2, 3):
        parts = [blurred.narrow(dim, t, images_BCHW.shape[dim]) for t in range(len(weights))]
        blurred = torch.zeros_like(parts[0])
        for part, weight_B111 in zip(parts, weights, strict=True):
            blurred.addcmul_(part, weight_B111)
    return blurred
