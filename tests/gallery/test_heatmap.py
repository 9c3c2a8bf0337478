"""Heat maps: their gradients against slow definitions, their form, and the words they are made of."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage

import tools.pointing as pointing
from datasets.mini.build import sample_pair, sample_people
from datasets.transforms import convert_image, normalise
from gallery.heatmap import about, heat, heat_maps, overlay, phrases
from model.backbone import Backbone
from model.build import build_model
from model.weights import BackboneConfig
from tests.helpers import SCRATCH, noise, options, run
from utils.checkpoint import save_checkpoint
from utils.config import write_config
from utils.errors import UserError

IMAGES, TEXT = noise((2, 3, 96, 32), 5), noise((64,), 6)
SIZES = {**SCRATCH, "vision_width": 128, "vision_layers": 3}


@pytest.fixture(scope="module")
def model():
    return build_model(options(**SIZES), (), num_classes=0).eval()


def picture(seed=0, width=40, height=90):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PILImage.fromarray(values)


def slow_grad_eclip(visual, images, text):
    """The paper's formula, with attention written out and the gradient with regard to what attention
    gives before its output projection."""
    x, layers = visual._embeds(images), []
    for block in visual.transformer.resblocks:
        q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)  # fmt: skip
        mixed = []
        for head in range(block.attn.num_heads):
            at = slice(64 * head, 64 * head + 64)
            mixed.append((q[..., at] @ k[..., at].mT / 8).softmax(-1) @ v[..., at])
        layers.append((q, k, v, torch.cat(mixed, -1)))
        x = x + block.attn.out_proj(layers[-1][-1])
        x = x + block.mlp(block.ln_2(x))
    feature = visual.ln_post(x)[:, 0] @ visual.proj
    cosine = (feature @ text) / (feature.norm(dim=-1) * text.norm())
    total = 0
    for q, k, v, mixed in layers:
        (gradient,) = torch.autograd.grad(cosine.sum(), mixed, retain_graph=True)
        alike = torch.stack(
            [F.cosine_similarity(q[:, 0], k[:, n]) for n in range(1, k.shape[1])], 1
        )
        near = torch.stack([(a - a.min()) / (a.max() - a.min()) for a in alike])
        total = total + torch.relu((gradient[:, :1] * v[:, 1:]).sum(-1) * near)
    return total.detach()


def test_a_vits_map_is_grad_eclip_summed_over_its_blocks(model):
    with torch.no_grad():  # as searches call it
        fast = heat(model.base_model, IMAGES, TEXT)
    slow = slow_grad_eclip(model.base_model.visual, IMAGES, TEXT)
    assert fast.shape == (2, 12) and slow.max() > 0
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-7)


def test_a_resnets_map_is_grad_cam_of_its_last_feature_map():
    resnet = Backbone(BackboneConfig(32, (1, 1, 1, 1), 64, None, 64, 1), (96, 64)).eval()
    images, text = noise((2, 3, 96, 64), 5), noise((32,), 7)
    visual = resnet.visual
    features = visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))
    features = visual.layer4(features).detach().requires_grad_()
    F.cosine_similarity(visual.attnpool(features), text[None]).sum().backward()
    weight = features.grad.mean(dim=(2, 3), keepdim=True)
    expected = (weight * features).sum(1).relu().flatten(1).detach()
    fast = heat(resnet, images, text)
    assert fast.shape == (2, 6)
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-8)


def test_a_sentence_that_changes_no_similarity_gives_no_heat(model):
    assert not heat(model.base_model, IMAGES, torch.zeros(64)).any()
    (flat,) = heat_maps(model, [picture()], torch.zeros(64))
    assert not flat.any() and flat.shape == (90, 40)


def test_maps_have_their_pictures_size_and_a_maximum_of_1_and_are_the_same_each_time(
    model, tmp_path
):
    picture(1, 33, 57).save(tmp_path / "a.png")
    maps = heat_maps(model, [picture(), tmp_path / "a.png"], TEXT)
    assert [m.shape for m in maps] == [(90, 40), (57, 33)]
    assert all(m.dtype == np.float32 and m.min() >= 0 and m.max() == 1 for m in maps)
    again = heat_maps(model, [picture(), tmp_path / "a.png"], TEXT)
    assert all(map(np.array_equal, maps, again))
    steps = [np.abs(np.diff(m, axis=axis)).max() for m in maps for axis in (0, 1)]
    assert max(steps) < 0.2  # smooth: a patch has 16 pixels, here less than 16 of the picture


def test_a_coarse_map_is_that_of_the_picture_as_it_is(model):
    config, image = model.base_model.config, picture(2, 32, 96)
    (coarse,) = heat_maps(model, [image], TEXT, fine=False)
    given = normalise(convert_image(image, (96, 32))[None], config.image_mean, config.image_std)
    patches = heat(model.base_model, given, TEXT).view(1, 1, 6, 2)
    expected = F.interpolate(patches, (96, 32), mode="bilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(coarse, expected / expected.max(), atol=1e-5)
    (fine,) = heat_maps(model, [image], TEXT)
    assert np.abs(fine - coarse).max() > 0.01


def test_a_map_leaves_no_gradient_and_no_hook_in_the_model(model):
    heat_maps(model, [picture()], TEXT)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_picture_that_is_turned_by_exif_has_an_upright_map(model, tmp_path):
    image, exif = picture(), PILImage.Exif()
    exif[274] = 6
    image.transpose(PILImage.Transpose.ROTATE_90).save(tmp_path / "t.png", exif=exif)
    turned, upright = heat_maps(model, [tmp_path / "t.png", image], TEXT)
    assert np.array_equal(turned, upright)


def test_an_overlay_has_colour_only_where_the_map_is_hot():
    image, hot = picture(), np.zeros((90, 40), np.float32)
    hot[20:30] = 1
    drawn = np.asarray(overlay(image, hot)).astype(int)
    grey = np.asarray(image.convert("L"))
    assert (drawn[:20] == grey[:20, :, None]).all()
    red, green, blue = drawn[20:30].mean(axis=(0, 1))
    assert red > green + 50 and red > blue + 50


def test_phrases_are_the_things_that_a_sentence_names():
    assert phrases("A woman in a yellow dress, with a black bag.") == ["woman", "yellow dress", "black bag"]  # fmt: skip
    assert phrases("He wears blue jeans and a pair of grey sneakers") == ["blue jeans", "grey sneakers"]  # fmt: skip
    assert phrases(" the , a. ") == []


def test_a_word_stands_for_the_thing_that_it_belongs_to():
    sentence = "A man in a dark blue coat with a T-shirt and\n grey jeans"
    assert about(sentence, "coat") == "A person with dark blue coat."
    assert about(sentence, "Blue Coat") == "A person with dark blue coat."
    assert about(sentence, "t-shirt") == "A person with T-shirt."
    assert about(sentence, "coat with a T-shirt") == "A person with coat with a T-shirt."
    assert about(sentence, "with") == "A person with with."
    for missing in ("shirts", "oat", "", "   "):
        with pytest.raises(UserError, match="is not in the sentence"):
            about(sentence, missing)


def test_a_garments_pixels_are_those_of_its_colour():
    (source, identity, person), *_ = sample_people(0, pointing.TEST, 4)
    views, _, _ = sample_pair(0, pointing.TEST, source, identity, 0, person)
    ground = views[1]
    upper, shoes = (pointing.garment(person, ground, [f"{n}_colour"]) for n in ("upper", "shoe"))
    assert upper.shape == ground.size[::-1] and upper.any() and shoes.any()
    rows = np.arange(len(upper))
    assert (rows * upper.sum(1)).sum() / upper.sum() < (rows * shoes.sum(1)).sum() / shoes.sum()
    assert not pointing.garment(person, ground, ["hat_colour"]).any() or person.hat != "none"


def test_the_pointing_game_counts_garments_and_persons(tmp_path, monkeypatch, capsys):
    args = options(**SIZES)
    model = build_model(args, (), num_classes=0)
    content = {"model": model.state_dict(), "input": model.base_model.input}
    save_checkpoint(tmp_path / "best.pth", content)
    write_config(tmp_path / "configs.yaml", args)
    run(pointing.main, monkeypatch, tmp_path, "--people", 2, "--device", "cpu")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "." in line]
    counts = {row[0].strip(): int(row[1]) for row in rows}
    assert counts["caption, person"] == 4
    assert counts["all garments"] == sum(counts.values()) - 4 - counts["all garments"] > 0
    with pytest.raises(UserError, match="--people 0"):
        run(pointing.main, monkeypatch, tmp_path, "--people", 0)
