"""Each operation on a batch against torchvision's on single images."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from datasets.batched import (
    blur,
    first_fitting,
    geometry,
    grey,
    jitter,
    random_box,
    shift_hue,
    warp,
)
from tests.helpers import noise

HEIGHT, WIDTH = 48, 24
WHOLE = (0, 0, HEIGHT, WIDTH)


def pictures(count: int) -> torch.Tensor:
    """Smooth coloured images, 0 to 255, with values at both ends and pixels without colour."""
    rough = noise((count, 3, 6, 4), 1, 255, 127)
    images = F.interpolate(rough, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 255)
    images[:, :, :3, :3] = 60.0
    return images


def map_of(box=WHOLE, angle=0.0, flip=False) -> torch.Tensor:
    """The map of one image [1, 2, 3]."""
    values = torch.tensor([box], dtype=torch.float32), torch.tensor([angle]), torch.tensor([flip])
    return geometry(HEIGHT, WIDTH, *values)


def assert_near(images, expected, tolerance=0.02):
    """Within a fraction of a grey level."""
    torch.testing.assert_close(images, expected, rtol=0, atol=tolerance)


FACTORS = torch.tensor([[0.6, 1, 1], [1.4, 1, 1], [1, 0.6, 1], [1, 1.4, 1], [1, 1, 0.6], [1, 1, 1.4],
                        [1.3, 0.7, 1.2], [1, 1, 1]])  # fmt: skip


def test_brightness_contrast_and_saturation_are_torchvisions_in_this_order():
    images = pictures(len(FACTORS))
    result = jitter(images, FACTORS)
    for image, factors, changed in zip(images, FACTORS.tolist(), result, strict=True):
        expected = image / 255
        steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
        for adjust, factor in zip(steps, factors, strict=True):
            expected = adjust(expected, factor)
        assert_near(changed, 255 * expected)
    assert result[-1].equal(images[-1]) and not result[0].equal(images[0])


def test_hue_and_grey_are_torchvisions():
    shifts = torch.tensor([-0.5, -0.1, -0.03, 0.0, 0.08, 0.3])
    images = pictures(len(shifts))
    for image, shift, shifted in zip(images, shifts, shift_hue(images, shifts), strict=True):
        assert_near(shifted, 255 * tv.adjust_hue(image / 255, float(shift)))
    assert_near(grey(images), tv.rgb_to_grayscale(images))
    assert_near(jitter(images, torch.ones(6, 3), shifts), shift_hue(images, shifts))


def test_blur_is_torchvisions_and_a_sigma_of_0_changes_nothing():
    sigmas = torch.tensor([0.1, 0.5, 1.3, 2.0])
    images = pictures(len(sigmas))
    for image, sigma, blurred in zip(images, sigmas.tolist(), blur(images, sigmas), strict=True):
        assert_near(blurred, tv.gaussian_blur(image, [13, 13], [sigma, sigma]))
    assert blur(images, torch.zeros(4)).equal(images)


@pytest.mark.parametrize("angle", [-15.0, 4.0, 15.0])
def test_a_rotation_is_torchvisions_up_to_its_edge(angle):
    images = pictures(1)
    rotated = warp(images, [map_of(angle=angle)])
    expected = tv.rotate(images, angle, interpolation=tv.InterpolationMode.BILINEAR)
    covered = tv.rotate(torch.ones_like(images), angle, interpolation=tv.InterpolationMode.BILINEAR)
    inner, outer = covered == 1, covered == 0
    assert inner.float().mean() > 0.7 and outer.any()
    assert_near(rotated[inner], expected[inner], 0.2)
    assert (rotated[outer] == 0).all()


@pytest.mark.parametrize("box", [WHOLE, (0, 0, 30, 20), (9, 5, 30, 12), (18, 4, 30, 20)])
def test_a_crop_is_torchvisions_resized_crop_inside_its_box(box):
    """At the border of its box torchvision repeats pixels, where ours sees those outside."""
    images = pictures(1)
    cropped = warp(images, [map_of(box)])
    expected = tv.resized_crop(images, *box, [HEIGHT, WIDTH], antialias=False)
    inside = (..., slice(2, -2), slice(2, -2))
    assert_near(cropped[inside], expected[inside])
    top, left, height, width = box
    if top == left == 0:  # the image ends where the box does, so nothing outside is seen
        assert_near(cropped[..., :-2, :-2], expected[..., :-2, :-2])
    assert cropped.min() > -0.01 and cropped.max() < 255.01


def test_a_flip_mirrors_and_nothing_leaves_the_image_as_it_is():
    images = pictures(2)
    assert_near(warp(images, []), images, 0.01)
    maps = torch.cat([map_of(flip=True), map_of()])
    assert_near(warp(images, [maps]), torch.stack([images[0].flip(-1), images[1]]), 0.01)


def test_composed_maps_are_applied_in_their_order():
    images = pictures(1)
    first, second = map_of((9, 5, 30, 12), 10.0, True), map_of((0, 0, 40, 20), -7.0)
    once, twice = warp(images, [first, second]), warp(warp(images, [first]), [second])
    wrong = warp(images, [second, first])
    inside = (..., slice(6, -6), slice(4, -4))
    assert (once - twice)[inside].abs().mean() < 1.5 < 5 < (once - wrong)[inside].abs().mean()


def test_black_corners_of_a_rotation_stay_black_after_another_rotation_and_a_crop():
    white = torch.full((1, 3, HEIGHT, WIDTH), 255.0)
    turn = map_of(angle=15.0)
    corner = (HEIGHT - 14, 0, 14, 7)
    once = warp(white, [turn, map_of(corner)])
    assert_near(once.mean(), warp(white, [turn])[..., HEIGHT - 14 :, :7].mean(), 3.0)
    assert 20 < once.mean() < 235  # not the white that stood there before the rotation
    back = warp(white, [turn, map_of(angle=-15.0)])
    assert (back[..., 0, 0] == 0).all() and back[..., HEIGHT // 2, WIDTH // 2].min() == 255


def test_images_of_a_batch_do_not_see_each_other():
    images, factors = pictures(3), torch.tensor([[0.7, 1.3, 0.8], [1.0, 1.0, 1.0], [1.2, 0.9, 1.1]])
    maps = torch.cat([map_of((9, 5, 30, 12)), map_of(angle=9.0), map_of(flip=True)])
    sigma, shift = torch.tensor([1.5, 0.0, 0.4]), torch.tensor([0.1, 0.0, -0.1])

    def all_of(rows):
        changed = jitter(warp(images[rows], [maps[rows]]), factors[rows], shift[rows])
        return blur(changed, sigma[rows])

    together = all_of(slice(0, 3))
    for row in range(3):
        assert_near(all_of(slice(row, row + 1))[0], together[row], 1e-3)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (384, 128)])
def test_boxes_have_the_distribution_of_torchvisions_at_a_square(height, width):
    """At 224x224 their areas and shapes are torchvision's; at 384x128 the same, relatively."""
    uniform = torch.rand(4000, 22, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for area in ((0.2, 1.0), (0.9, 1.0)):
        boxes = random_box(height, width, uniform, area)
        assert boxes.equal(boxes.floor()) and (boxes >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()
        crop, square = RandomResizedCrop(224, scale=area), [torch.empty(3, 224, 224)]
        drawn = [crop.make_params(square) for _ in range(4000)]
        names = ("top", "left", "height", "width")
        expected = torch.tensor([[d[n] for n in names] for d in drawn]) / 224
        found = boxes / torch.tensor([height, width, height, width])
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            torch.testing.assert_close(
                found.quantile(quantile, dim=0),
                expected.quantile(quantile, dim=0),
                rtol=0,
                atol=0.03,
            )
        areas, expected_areas = found[:, 2] * found[:, 3], expected[:, 2] * expected[:, 3]
        assert areas.mean().item() == pytest.approx(expected_areas.mean().item(), abs=0.012)
        whole, expected_whole = ((a == 1).float().mean().item() for a in (areas, expected_areas))
        assert whole == pytest.approx(expected_whole, abs=0.03)


def test_the_first_rectangle_that_fits_is_taken():
    tall, small = [0.99, 0.99], [0.5, 0.5]
    uniform = torch.tensor([[*tall, *small], [*small, *tall], [*tall, *tall]])
    sizes, fits = first_fitting(uniform, 100, (0.1, 0.4), (0.25, 4.0), (10, 10))
    assert fits.tolist() == [True, True, False] and sizes[:2].tolist() == [[5, 5], [5, 5]]
