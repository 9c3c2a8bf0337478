"""The augmentations of a batch, and how often and how much they change an image."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets.augmentation import (
    POOL,
    UNIFORM_POOL,
    UNIFORM_SIMCLR,
    augment,
    more_numbers,
    numbers_of,
    pool,
    simclr,
)
from datasets.batched import blur, geometry, grey, jitter, random_box, warp
from datasets.transforms import erased_area
from tests.helpers import options

HEIGHT, WIDTH = 48, 24


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


KINDS = ["flip", "img_aug", "img_pool", "strong_1"]


def numbers(kind: str, count: int) -> torch.Tensor:
    args = options(img_aug=kind == "img_aug", img_pool=2 if kind == "img_pool" else 0)
    shape = more_numbers(args, [kind])[kind] if kind == "strong_1" else numbers_of(args)
    return uniform(count, *shape)


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


def assert_near(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=0.02)


def pool_of(images, *draws):
    """The pool with these draws: the name of each, and its first numbers (the others are 0.5)."""
    numbers = torch.full((len(draws), UNIFORM_POOL), 0.5)
    for row, (name, *values) in zip(numbers, draws, strict=True):
        row[0] = (POOL.index(name) + 0.5) / len(POOL)
        row[1 : 1 + len(values)] = torch.tensor(values)
    return pool(images, numbers.expand(len(images), -1, -1))


def test_each_of_the_pool_does_what_it_should():
    images = pictures(2)
    plain = images.float()
    whole, no = torch.tensor([[0, 0, HEIGHT, WIDTH]]), torch.tensor([False])

    def rotated(angle):
        return warp(plain, [geometry(HEIGHT, WIDTH, whole, torch.tensor([angle]), no)])

    assert_near(pool_of(images, ("rotation", 0.0)), rotated(-15.0))
    assert_near(pool_of(images, ("rotation", 0.8)), rotated(9.0))
    factors = torch.tensor([[0.9, 1.1, 1.05]])
    assert_near(pool_of(images, ("jitter", 0.0, 1.0, 0.75)), jitter(plain, factors))
    assert_near(pool_of(images, ("grey", 0.09)), grey(plain).expand(-1, 3, -1, -1))
    assert_near(pool_of(images, ("grey", 0.11)), plain)
    assert_near(pool_of(images, ("flip", 0.49)), plain.flip(-1))
    assert_near(pool_of(images, ("flip", 0.51)), plain)
    drawn = uniform(1, UNIFORM_POOL - 1)[0].tolist()
    box = random_box(HEIGHT, WIDTH, torch.tensor([drawn[:22]]), (0.9, 1.0))
    assert 0.85 * HEIGHT * WIDTH < box[0, 2] * box[0, 3] < HEIGHT * WIDTH
    expected = warp(plain, [geometry(HEIGHT, WIDTH, box, torch.zeros(1), no)])
    assert_near(pool_of(images, ("crop", *drawn)), expected)
    drawn[0] = 0.3
    erased = erased_area(HEIGHT, WIDTH, torch.tensor([drawn]), (0.1, 0.2))
    assert 0.09 < erased.float().mean() < 0.22
    assert_near(pool_of(images, ("erasing", *drawn)), plain * ~erased)
    assert_near(pool_of(images, ("erasing", 0.6, *drawn[1:])), plain)


def test_two_of_the_pool_are_both_applied_and_what_is_erased_or_outside_is_black():
    images = pictures(2)
    plain, brighter = images.float(), torch.tensor([[1.1, 1.0, 1.0]])
    bright, more = jitter(plain, brighter), ("jitter", 1.0, 0.5, 0.5)
    assert_near(pool_of(images, ("flip", 0.0), ("flip", 0.0)), plain)
    assert_near(pool_of(images, more, ("flip", 0.0)), bright.flip(-1))
    assert_near(pool_of(images, ("flip", 0.0), more), bright.flip(-1))
    assert_near(pool_of(images, more, more), jitter(bright, brighter))
    drawn = [0.3, *uniform(1, UNIFORM_POOL - 2)[0].tolist()]
    erased = erased_area(HEIGHT, WIDTH, torch.tensor([drawn]), (0.1, 0.2)).expand(2, 3, -1, -1)
    less = ("jitter", 0.5, 0.0, 0.5)  # contrast, which turns black into a dark grey
    for draws in ([("erasing", *drawn), less], [less, ("erasing", *drawn)]):
        assert (pool_of(images, *draws)[erased] == 0).all()
    turned = pool_of(images, ("rotation", 1.0))[..., 0, 0]
    dark = pool_of(images, less, ("rotation", 1.0))[..., 0, 0]
    assert (turned == 0).all() and (dark > 0).all()  # in both orders colours come after it


def test_each_of_the_pool_is_drawn_as_often_as_the_others_independently_and_also_twice():
    drawn = numbers("img_pool", 6000)
    assert drawn.shape == (6000, 2, UNIFORM_POOL)
    which = (drawn[..., 0] * len(POOL)).long()
    pairs = (which[:, 0] * len(POOL) + which[:, 1]).bincount(minlength=36) / 6000
    torch.testing.assert_close(pairs, torch.full((36,), 1 / 36), rtol=0, atol=0.008)


def test_images_are_changed_as_often_as_the_pools_probabilities_say():
    """Of one draw, each of the six is chosen with 1/6. Then grey changes an image with 0.1, flip and
    erasing with 0.5, and the crop if it finds a box."""
    drawn = numbers("img_pool", 3000)[:, :1]
    image = pictures(1)
    images = image.expand(3000, -1, -1, -1)
    result = torch.cat([pool(images[i : i + 500], drawn[i : i + 500]) for i in range(0, 3000, 500)])
    plain = image.float()

    def share(chosen):
        return chosen.float().mean().item()

    def like(expected):
        return (result - expected).abs().amax(dim=(1, 2, 3)) < 0.1

    assert share(like(plain.flip(-1))) == pytest.approx(1 / 12, abs=0.015)
    assert share(like(grey(plain))) == pytest.approx(1 / 60, abs=0.007)
    black = (result == 0).all(dim=1).flatten(1).float().mean(dim=1)
    which = (drawn[:, 0, 0] * len(POOL)).long()
    erased = (which == POOL.index("erasing")) & (black > 0.08)
    assert share(erased) == pytest.approx(1 / 12, abs=0.015)
    assert black[erased].max() < 0.23
    turned = which == POOL.index("rotation")
    assert share(black[turned] > 0) > 0.9 and black[turned].max() < 0.2
    boxes = random_box(HEIGHT, WIDTH, drawn[:, 0, 1:23], (0.9, 1.0))
    no_box = share((boxes[:, 2] == HEIGHT) & (boxes[:, 3] == WIDTH))
    assert share(like(plain)) == pytest.approx((0.9 + 0.5 + 0.5 + no_box) / 6, abs=0.03)


def test_more_than_two_and_one_of_the_pool_are_possible():
    images = pictures(3)
    for count in (1, 5):
        shape = numbers_of(options(img_pool=count))
        assert shape == (count, UNIFORM_POOL)
        assert augment("", images, uniform(3, *shape), (0.5,) * 3, (0.2,) * 3).isfinite().all()
