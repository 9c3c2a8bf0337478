"""The augmentations of a batch, and how often and how much they change an image."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets.augmentation import UNIFORM_SIMCLR, augment, more_numbers, numbers_of, simclr
from datasets.batched import blur, grey
from tests.helpers import options

HEIGHT, WIDTH = 48, 24


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def args_of(kind: str):
    return options(img_aug=kind == "img_aug")


KINDS = ["flip", "img_aug", "strong_1"]


def numbers(kind: str, count: int) -> torch.Tensor:
    args = args_of(kind)
    return uniform(
        count, more_numbers(args, [kind])[kind] if "strong" in kind else numbers_of(args)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_become_normalised_floats_in_their_range(kind):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    images, drawn = pictures(40), numbers(kind, 40)
    before = images.clone(), drawn.clone()
    result = augment(kind, images, drawn, mean, std)
    assert result.shape == images.shape and result.dtype == torch.float32
    for channel in range(3):
        low, high = -mean[channel] / std[channel], (1 - mean[channel]) / std[channel]
        assert low - 1e-5 <= result[:, channel].min() and result[:, channel].max() <= high + 1e-5
    assert images.equal(before[0]) and drawn.equal(before[1])
    assert augment(kind, images, drawn, mean, std).equal(result)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_augmented_alone_as_in_a_batch(kind):
    images, drawn, norm = pictures(12), numbers(kind, 12), ((0.5,) * 3, (0.2,) * 3)
    together = augment(kind, images, drawn, *norm)
    for row in range(12):
        alone = augment(kind, images[row : row + 1], drawn[row : row + 1], *norm)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_augmentation_waits_for_a_value(kind):
    """A fake tensor has none: reading one raises."""
    images, drawn, norm = pictures(4), numbers(kind, 4), ((0.5,) * 3, (0.2,) * 3)
    expected = augment(kind, images, drawn, *norm)  # makes the constants of `normalise`
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = augment(kind, mode.from_tensor(images), mode.from_tensor(drawn), *norm)
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


NOTHING = dict(flip=0.9, area=0.99999, shape=0.5, top=0.0, left=0.0, jitter=0.9, brightness=0.5,
               contrast=0.5, saturation=0.5, hue=0.5, grey=0.9, blur=0.9, sigma=0.5)  # fmt: skip


def simclr_of(images, **values):
    """SimCLR's augmentation with these random numbers; otherwise with some that change nothing."""
    v = {**NOTHING, **values}
    box = [v["area"], v["shape"]] * 10 + [v["top"], v["left"]]
    names = ("jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma")
    row = torch.tensor([v["flip"], *box, *(v[name] for name in names)])
    assert len(row) == UNIFORM_SIMCLR
    return simclr(images, row.expand(len(images), -1))


def test_each_number_of_simclr_does_what_it_should():
    images = pictures(2)
    plain = images.float()

    def same(values, expected, tolerance=0.02):
        torch.testing.assert_close(simclr_of(images, **values), expected, rtol=0, atol=tolerance)

    same({}, plain)
    same({"flip": 0.49}, plain.flip(-1))
    # Half of the area, as wide as high relative to the image: 34x17 at the bottom right.
    corner = simclr_of(images, area=0.375, top=0.999, left=0.999)
    nearest = plain[..., HEIGHT - 34 :, WIDTH - 17 :]
    assert corner[..., -1, -1].sub(nearest[..., -1, -1]).abs().max() < 40
    assert corner[..., 0, 0].sub(nearest[..., 0, 0]).abs().max() < 120
    same({"jitter": 0.79, "brightness": 0.0}, 0.6 * plain)
    same({"jitter": 0.79, "brightness": 1.0}, (1.4 * plain).clamp(max=255))
    same({"jitter": 0.79, "saturation": 0.0}, 0.6 * plain + 0.4 * grey(plain))
    mean = grey(plain).mean(dim=(1, 2, 3), keepdim=True)
    same({"jitter": 0.79, "contrast": 0.0}, 0.6 * plain + 0.4 * mean)
    same({"jitter": 0.8, "brightness": 0.0, "hue": 0.0}, plain)
    red = torch.tensor([250, 50, 50], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 16, 16)
    turned = simclr_of(red, jitter=0.0, hue=1.0)[0, :, 8, 8]  # 0.1 of the circle, towards yellow
    torch.testing.assert_close(turned, torch.tensor([250.0, 50 + 0.6 * 200, 50.0]))
    same({"grey": 0.19}, grey(plain).expand(-1, 3, -1, -1))
    for number, sigma in ((0.0, 0.1), (0.999999, 2.0)):
        same({"blur": 0.49, "sigma": number}, blur(plain, torch.full((2,), sigma)))


def test_simclr_changes_images_as_often_as_it_should():
    images, drawn = pictures(1).expand(3000, -1, -1, -1), numbers("strong_1", 3000)
    crop_free = drawn.clone()
    crop_free[:, 1:23] = torch.tensor([0.99999, 0.5] * 10 + [0, 0])
    result = torch.cat(
        [simclr(images[i : i + 300], crop_free[i : i + 300]) for i in range(0, 3000, 300)]
    )
    colourless = (result.amax(dim=1) - result.amin(dim=1)).amax(dim=(1, 2)) < 1e-3
    assert colourless.float().mean().item() == pytest.approx(0.2, abs=0.025)
    rough = (result - result.roll(1, -1)).abs().mean(dim=(1, 2, 3))
    assert (rough < rough.median() * 0.8).float().mean() > 0.3  # a large part is blurred
