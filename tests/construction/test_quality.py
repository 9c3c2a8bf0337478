"""Quality: what is measured, and which pictures fall out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from construction.quality import (
    judge,
    judge_sharpness,
    least_sharpness,
    measure_file,
    repetitions,
)
from construction.recipe import Limit, Quality
from datasets.mini import render_people
from tests.construction.made import candidate, picture

RECIPE = Quality(min_width=32, min_height=64, brightness=(30, 220), clipped=0.5)


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """A rendered picture of a person."""
    folder = tmp_path_factory.mktemp("people")
    return folder / render_people(folder, 1, 1)[0].ground


def save(image: Image.Image, path: Path) -> str:
    image.save(path, quality=95)
    return str(path)


def measured(file, **values):
    return measure_file(str(file), [picture(**values)], Path("/nowhere"))[0]


def test_sharpness_is_the_variance_of_the_laplacian_at_128x384(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (384, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grey = np.pad(np.asarray(Image.fromarray(pixels).convert("L"), np.float64), 1, mode="reflect")
    laplacian = (
        grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    )
    measure = measured(tmp_path / "a.png")
    assert measure.sharpness == pytest.approx(laplacian.var(), rel=1e-6)
    assert measure.brightness == pytest.approx(grey[1:-1, 1:-1].mean(), abs=1e-3)


def test_blur_lowers_the_sharpness_and_hardly_changes_the_hash(person, tmp_path):
    image = Image.open(person)
    blurred = save(image.filter(ImageFilter.GaussianBlur(3)), tmp_path / "b.jpg")
    sharp, blurry = measured(person), measured(blurred)
    assert blurry.sharpness < sharp.sharpness / 3
    assert (int(sharp.phash, 16) ^ int(blurry.phash, 16)).bit_count() <= 8


def test_a_box_is_cut_out_to_a_file_of_its_own(person, tmp_path):
    frame = Image.new("RGB", (400, 500), "green")
    inset = Image.open(person).resize((60, 150))
    frame.paste(inset, (100, 200))
    frame.save(tmp_path / "frame.png")
    one = picture(name="img/f_00000.jpg", box=(100, 200, 60, 150))
    edge = picture(name="img/f_00001.jpg", box=(-10, 450, 60, 150))
    out = picture(name="img/f_00002.jpg", box=(400, 0, 60, 150))
    crops = tmp_path / "crops"
    measures = measure_file(str(tmp_path / "frame.png"), [one, edge, out], crops)
    assert [(m.width, m.height) for m in measures] == [(60, 150), (50, 50), (0, 0)]
    assert "outside of the picture (400x500)" in measures[2].problem
    cut = Image.open(crops / "s/img/f_00000.jpg")
    difference = np.asarray(cut, float) - np.asarray(inset.convert("RGB"), float)
    assert np.abs(difference).mean() < 3
    content = Path(measures[0].file).read_bytes()
    assert measures[0].sha256 == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in (crops / "s/img").iterdir()) == ["f_00000.jpg", "f_00001.jpg"]


def test_a_truncated_picture_is_a_problem_of_all_its_boxes_and_no_error(person, tmp_path):
    content = Path(person).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    pictures = [picture(name=f"{i}.jpg", box=(0, 0, 9, 9)) for i in range(2)]
    measures = measure_file(str(tmp_path / "cut.jpg"), pictures, tmp_path)
    assert all("cut.jpg" in m.problem for m in measures) and len(measures) == 2
    missing = measured(tmp_path / "no.jpg")
    assert missing.problem.startswith("no.jpg: cannot be opened: No such file")


@pytest.mark.parametrize(
    "measure, reason, detail",
    [
        ({}, None, ""),
        ({"problem": "a.jpg: truncated"}, "broken", "a.jpg: truncated"),
        ({"width": 31}, "small", "31x160, under 32x64"),
        ({"height": 63}, "small", "64x63, under 32x64"),
        ({"brightness": 29.9}, "dark", "brightness 29.9, under 30"),
        ({"brightness": 221.0}, "bright", "brightness 221.0, over 220"),
        ({"clipped": 0.51}, "clipped", "51% of the pixels are nearly black or white, over 50%"),
        ({"sharpness": 0.0}, None, ""),
        ({"problem": "a.jpg: cannot be opened: x"}, "unreadable", "a.jpg: cannot be opened: x"),
    ],
)
def test_each_reason_names_the_value_and_the_limit(measure, reason, detail):
    wanted = None if reason is None else (reason, detail)
    assert judge(candidate(1, measure).measure, RECIPE) == wanted


def test_a_picture_under_the_limit_of_sharpness_is_blurry():
    measure = candidate(1, {"sharpness": 19.9}).measure
    assert judge_sharpness(measure, 20) == ("blurry", "sharpness 19.9, under 20.0")
    assert judge_sharpness(measure, 19.9) is None


def test_a_quantile_takes_out_this_share_of_a_view():
    values = list(np.random.default_rng(0).permutation(1000).astype(float))
    least = least_sharpness(Limit(quantile=0.05), values)
    assert sum(value < least for value in values) == 50
    assert least_sharpness(Limit(at_least=12), values) == 12
    assert least_sharpness(None, values) == least_sharpness(Limit(quantile=0.5), []) == 0


def test_of_pictures_that_repeat_each_other_the_sharpest_stays():
    base = 0x123456789ABCDEF0
    hashes = [base, base ^ 0b111, base ^ 0b11111, base ^ 0xFF00FF]
    sharpness = [10.0, 30.0, 20.0, 5.0]
    pictures = [
        candidate(i, {"phash": f"{h:016x}", "sharpness": s})
        for i, (h, s) in enumerate(zip(hashes, sharpness, strict=True))
    ]
    assert repetitions(pictures, 3) == {0: (1, 3), 2: (1, 2)}
    assert repetitions(pictures, 2) == {2: (1, 2)}
    assert repetitions(pictures, 64) == {0: (1, 3), 2: (1, 2), 3: (1, 13)}


def test_repetitions_equal_a_slow_obvious_version():
    rng = np.random.default_rng(1)
    centres = rng.integers(0, 2**63, 6)
    pictures = []
    for number in range(60):
        flips = sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 7), replace=False))
        value = int(centres[number % 6]) ^ flips
        measure = {"phash": f"{value:016x}", "sharpness": float(rng.integers(0, 20))}
        pictures.append(candidate(number, measure))
    kept: list = []
    for one in sorted(pictures, key=lambda c: (-c.measure.sharpness, c.number)):
        distances = [
            (int(one.measure.phash, 16) ^ int(o.measure.phash, 16)).bit_count() for o in kept
        ]
        if not distances or min(distances) > 5:
            kept.append(one)
    stay = {c.number for c in pictures} - set(repetitions(pictures, 5))
    assert stay == {c.number for c in kept} and 6 <= len(stay) < 60
