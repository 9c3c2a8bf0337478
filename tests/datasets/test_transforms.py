import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torchvision.transforms import v2

from datasets.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    DRAWS_AUGMENTED,
    DRAWS_PLAIN,
    ERASED_AREA,
    erased_area,
    load_image,
    normalise,
    read_image,
    train_transform,
)

HEIGHT, WIDTH = 96, 32


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def draws(count: int, kind: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, kind), generator=torch.Generator().manual_seed(seed))


def test_loading_and_normalising_equals_torchvision(tmp_path):
    image = PILImage.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).resize((53, 140))
    image.save(tmp_path / "a.png")
    reference = v2.Compose(
        [
            v2.Resize((HEIGHT, WIDTH)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    found = normalise(load_image(str(tmp_path / "a.png"), (HEIGHT, WIDTH))[None])[0]
    torch.testing.assert_close(found, reference(image), rtol=1e-5, atol=1e-5)


def test_a_large_jpeg_is_decoded_smaller_and_differs_by_little(tmp_path):
    """A smooth photograph-like picture of six times the size: bytes differ by two levels at most."""
    rough = torch.rand((1, 3, 24, 8), generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(rough, (6 * HEIGHT, 6 * WIDTH), mode="bicubic").clamp(0, 1)[0]
    image = PILImage.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy())
    path = str(tmp_path / "large.jpg")
    image.save(path, quality=95)
    assert read_image(path).size == (6 * WIDTH, 6 * HEIGHT)
    assert read_image(path, at_least=(2 * HEIGHT, 2 * WIDTH)).size == (3 * WIDTH, 3 * HEIGHT)
    whole = v2.functional.resize(v2.functional.pil_to_tensor(read_image(path)), [HEIGHT, WIDTH])
    difference = (load_image(path, (HEIGHT, WIDTH)).int() - whole.int()).abs()
    assert difference.max() <= 4 and difference.float().mean() < 0.5


def test_the_plain_transform_flips_half_of_the_images_and_changes_nothing_else():
    images, numbers = pictures(64), draws(64, DRAWS_PLAIN)
    flipped = numbers[:, 0] < 0.5
    assert 20 < flipped.sum() < 44
    found = train_transform(images, numbers)
    assert torch.equal(found[flipped], normalise(images[flipped].flip(-1)))
    assert torch.equal(found[~flipped], normalise(images[~flipped]))


def test_augmentation_of_a_batch_equals_one_image_after_another():
    images, numbers = pictures(40), draws(40, DRAWS_AUGMENTED)
    found = train_transform(images, numbers)
    erased = erased_area(HEIGHT, WIDTH, numbers[:, 3:])
    for row in range(40):
        flip, top, left = (
            numbers[row, 0] < 0.5,
            int(numbers[row, 1] * 21),
            int(numbers[row, 2] * 21),
        )
        image = F.pad(images[row].flip(-1) if flip else images[row], [10] * 4)
        expected = normalise(image[None, :, top : top + HEIGHT, left : left + WIDTH])[0]
        expected[:, erased[row]] = 0
        torch.testing.assert_close(found[row], expected, rtol=0, atol=0)


def test_crops_reach_every_place_and_no_other():
    white = torch.full((1, 3, HEIGHT, WIDTH), 255, dtype=torch.uint8)
    numbers = torch.full((2, DRAWS_AUGMENTED), 0.9)
    numbers[0, 1:3], numbers[1, 1:3] = 0.0, 1 - 1e-7
    first, last = train_transform(white.expand(2, -1, -1, -1), numbers)
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0]
    for image, inside in ((first, (slice(10, None),) * 2), (last, (slice(0, -10),) * 2)):
        dark = (image == black).all(dim=0)
        assert not dark[inside].any() and int((~dark).sum()) == (HEIGHT - 10) * (WIDTH - 10)


def test_erasing_takes_one_rectangle_of_2_to_40_percent_in_half_of_the_images():
    areas = erased_area(HEIGHT, WIDTH, draws(2000, DRAWS_AUGMENTED - 3))
    shares = areas.float().mean(dim=(1, 2))
    assert (shares > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    rectangles = areas[shares > 0]
    sides = [rectangles.any(dim=d).sum(dim=1) for d in (2, 1)]
    assert torch.equal(sides[0] * sides[1], rectangles.sum(dim=(1, 2)))  # full, so one rectangle
    shape = sides[0] / sides[1]
    assert shares[shares > 0].min() > 0.8 * ERASED_AREA[0]  # sides are rounded to pixels
    assert shares.max() < 1.1 * ERASED_AREA[1]
    assert shape.min() > 0.2 and shape.max() < 5
    covered = areas.any(dim=0)
    assert covered.any(dim=0).all() and covered.any(dim=1).all()  # every row and column is reached


def test_erasing_agrees_with_torchvision_in_its_mean_area():
    reference = v2.RandomErasing(p=1.0, scale=ERASED_AREA, value=-1.0)
    torch.manual_seed(0)
    image = torch.zeros(1, HEIGHT, WIDTH)
    theirs = torch.stack([(reference(image) < 0).float().mean() for _ in range(1500)])
    numbers = draws(1500, DRAWS_AUGMENTED - 3)
    numbers[:, 0] = 0
    ours = erased_area(HEIGHT, WIDTH, numbers).float().mean(dim=(1, 2))
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.012)
    assert ours.std().item() == pytest.approx(theirs.std().item(), abs=0.012)


def test_an_image_for_which_no_rectangle_fits_stays_whole():
    numbers = torch.full((1, DRAWS_AUGMENTED - 3), 0.999)  # 40 % of the area, 3.3 times as high
    numbers[:, 0] = 0
    assert not erased_area(32, 32, numbers).any()
