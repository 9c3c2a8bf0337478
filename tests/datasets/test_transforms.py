import struct
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torchvision.transforms import v2

from datasets.images import UPRIGHT, BrokenImage, read_image
from datasets.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    ERASED_AREA,
    UNIFORM_AUGMENTED,
    UNIFORM_PLAIN,
    erased_area,
    load_image,
    normalise,
    train_transform,
)

HEIGHT, WIDTH = 96, 32
RAMP = np.tile(np.arange(16) * 17, (8, 1))  # grey from black to white, the expected result


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def uniform(count: int, kind: int, seed: int = 0) -> torch.Tensor:
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
    loaded = normalise(load_image(str(tmp_path / "a.png"), (HEIGHT, WIDTH))[None])[0]
    torch.testing.assert_close(loaded, reference(image), rtol=1e-5, atol=1e-5)


def test_a_large_jpeg_is_decoded_at_a_reduced_size_with_little_difference(tmp_path):
    """A smooth image, like a photograph, of six times the size differs by four grey levels at most."""
    rough = torch.rand((1, 3, 24, 8), generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(rough, (6 * HEIGHT, 6 * WIDTH), mode="bicubic").clamp(0, 1)[0]
    image = PILImage.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy())
    path = str(tmp_path / "large.jpg")
    image.save(path, quality=95)
    assert read_image(path).size == (6 * WIDTH, 6 * HEIGHT)
    assert read_image(path, at_least=(2 * HEIGHT, 2 * WIDTH)).size == (3 * WIDTH, 3 * HEIGHT)
    full = v2.functional.resize(v2.functional.pil_to_tensor(read_image(path)), [HEIGHT, WIDTH])
    difference = (load_image(path, (HEIGHT, WIDTH)).int() - full.int()).abs()
    assert difference.max() <= 4 and difference.float().mean() < 0.5


def tiff(path, values, order, bits=16, white_is=1, form=1) -> str:
    """A grey TIFF that PIL can read but not write."""
    e, data = {b"II": "<", b"MM": ">"}[order], values
    tags = [(256, 3, 16), (257, 3, 8), (258, 3, bits), (259, 3, 1), (262, 3, white_is), (273, 4, 8),
            (277, 3, 1), (278, 3, 8), (279, 4, len(data)), (339, 3, form)]  # fmt: skip
    content = order + struct.pack(f"{e}HI", 42, 8 + len(data)) + data
    content += struct.pack(f"{e}H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(f"{e}HH", value, 0) if kind == 3 else struct.pack(f"{e}I", value)
        content += struct.pack(f"{e}HHI", tag, kind, 1) + packed
    path.write_bytes(content + bytes(4))
    return str(path)


def grey(path) -> list[int]:
    image = np.asarray(read_image(str(path)))
    assert image.shape == (8, 16, 3) and (image == image[:1, :, :1]).all()
    return image[0, :, 0].tolist()


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_grey_of_16_bits_is_read_as_the_same_grey_of_8_bits(kind, tmp_path):
    for name, picture in (("8", RAMP.astype(np.uint8)), ("16", (RAMP * 257).astype(np.uint16))):
        PILImage.fromarray(picture).save(tmp_path / f"{name}.{kind}")
        assert grey(tmp_path / f"{name}.{kind}") == RAMP[0].tolist()


def test_grey_tiffs_of_other_byte_orders_depths_and_inverted_white_are_scaled_too(tmp_path):
    wide, path = RAMP * 257, tmp_path / "x.tif"
    assert grey(tiff(path, wide.astype(">u2").tobytes(), b"MM")) == RAMP[0].tolist()
    inverted = (65535 - wide).astype("<u2").tobytes()
    assert grey(tiff(path, inverted, b"II", white_is=0)) == RAMP[0].tolist()
    pairs = np.round(RAMP / 255 * 4095).astype(int).reshape(-1, 2).tolist()
    packed = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    assert grey(tiff(path, packed, b"II", bits=12)) == RAMP[0].tolist()


def test_grey_values_of_unknown_scale_are_refused(tmp_path):
    path = tmp_path / "x.tif"
    for values in (RAMP.astype(np.int32), (RAMP / 255).astype(np.float32)):
        PILImage.fromarray(values).save(path)
        with pytest.raises(
            BrokenImage, match="x.tif.*whose white is unknown; save it with 8 or 16"
        ):
            read_image(str(path))
    with pytest.raises(BrokenImage, match="whose white is unknown"):
        read_image(tiff(path, (RAMP * 257 - 32768).astype("<i2").tobytes(), b"II", form=2))


def test_other_modes_keep_their_colours_and_lose_transparency(tmp_path):
    picture = PILImage.fromarray(RAMP.astype(np.uint8))
    clear = {"transparency": bytes(range(256))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode, name, more in (
            ("P", "p.png", clear), ("P", "one.png", {"transparency": 3}), ("P", "p.gif", {}),
            ("LA", "la.png", {}), ("RGBA", "rgba.png", {}), ("CMYK", "cmyk.tif", {}),
        ):  # fmt: skip
            image = (
                picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
            )
            if mode.endswith("A"):
                image.putalpha(7)
            image.save(tmp_path / name, **more)
            assert grey(tmp_path / name) == RAMP[0].tolist(), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_as_exif_says(kind, orientation, tmp_path):
    """An upright image, 64 wide and 160 high, has a white corner at the top left. A JPEG is decoded
    at a quarter of its size, for every orientation in the file."""
    upright = np.zeros((160, 64, 3), np.uint8)
    upright[:80, :32] = 255
    image, exif = PILImage.fromarray(upright), PILImage.Exif()
    if orientation in UPRIGHT:  # 6 and 8 are inverse to each other, all others to themselves
        image = image.transpose(UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)])
    exif[274] = orientation
    path = str(tmp_path / f"x.{kind}")
    image.save(path, exif=exif)
    for at_least, size in ((None, (64, 160)), ((40, 16), (16, 40) if kind == "jpg" else (64, 160))):
        image = read_image(path, at_least=at_least)
        assert image.size == size and image.getexif().get(274, 1) == 1
        corner = np.asarray(image.resize((2, 2), PILImage.Resampling.BOX))[..., 0]
        assert corner[0, 0] > 200 and corner.sum() - corner[0, 0] < 60


def test_an_image_with_corrupted_exif_data_is_not_turned(tmp_path):
    path = tmp_path / "x.jpg"
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\0", b""):
        PILImage.new("RGB", (30, 60), (9, 9, 9)).save(path, exif=exif)
        assert read_image(str(path)).size == (30, 60)


def test_the_error_of_a_broken_image_names_its_entry_if_it_has_one(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(
        BrokenImage, match=r"x.jpg .a.json, entry 3.: .*remove its entry from the JSON"
    ):
        read_image(str(path), "a.json, entry 3")
    with pytest.raises(BrokenImage, match=r"Replace the file\.$"):
        read_image(str(path))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(PILImage, "open", refuse)
    with pytest.raises(
        BrokenImage, match="cannot be read: Permission denied. Give this user access"
    ):
        read_image(str(path), "a.json, entry 3")


def test_the_plain_transform_only_flips_half_of_the_images():
    images, numbers = pictures(64), uniform(64, UNIFORM_PLAIN)
    flipped = numbers[:, 0] < 0.5
    assert 20 < flipped.sum() < 44
    result = train_transform(images, numbers)
    assert torch.equal(result[flipped], normalise(images[flipped].flip(-1)))
    assert torch.equal(result[~flipped], normalise(images[~flipped]))


def test_augmenting_a_batch_equals_augmenting_its_images_one_by_one():
    images, numbers = pictures(40), uniform(40, UNIFORM_AUGMENTED)
    result = train_transform(images, numbers)
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
        torch.testing.assert_close(result[row], expected, rtol=0, atol=0)


def test_crops_reach_both_extreme_places_and_no_further():
    white = torch.full((1, 3, HEIGHT, WIDTH), 255, dtype=torch.uint8)
    numbers = torch.full((2, UNIFORM_AUGMENTED), 0.9)
    numbers[0, 1:3], numbers[1, 1:3] = 0.0, 1 - 1e-7
    first, last = train_transform(white.expand(2, -1, -1, -1), numbers)
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0]
    for image, inside in ((first, (slice(10, None),) * 2), (last, (slice(0, -10),) * 2)):
        dark = (image == black).all(dim=0)
        assert not dark[inside].any() and int((~dark).sum()) == (HEIGHT - 10) * (WIDTH - 10)


def test_half_of_the_images_lose_one_rectangle_of_2_to_40_percent():
    areas = erased_area(HEIGHT, WIDTH, uniform(2000, UNIFORM_AUGMENTED - 3))
    shares = areas.float().mean(dim=(1, 2))
    assert (shares > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    rectangles = areas[shares > 0]
    sides = [rectangles.any(dim=d).sum(dim=1) for d in (2, 1)]
    assert torch.equal(
        sides[0] * sides[1], rectangles.sum(dim=(1, 2))
    )  # so it is one full rectangle
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
    expected = torch.stack([(reference(image) < 0).float().mean() for _ in range(1500)])
    numbers = uniform(1500, UNIFORM_AUGMENTED - 3)
    numbers[:, 0] = 0
    areas = erased_area(HEIGHT, WIDTH, numbers).float().mean(dim=(1, 2))
    assert areas.mean().item() == pytest.approx(expected.mean().item(), abs=0.012)
    assert areas.std().item() == pytest.approx(expected.std().item(), abs=0.012)


def test_nothing_is_erased_if_no_rectangle_fits():
    numbers = torch.full((1, UNIFORM_AUGMENTED - 3), 0.999)  # 40 % of the area, 3.3 times as high
    numbers[:, 0] = 0
    assert not erased_area(32, 32, numbers).any()
