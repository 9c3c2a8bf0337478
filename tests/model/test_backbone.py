import io

import pytest
import safetensors.torch
import torch

from model.backbone import Backbone, load_backbone
from model.weights import BackboneConfig, config_from_weights, resize_positions
from tests.helpers import golden, golden_batch, golden_clip, noise
from utils.errors import UserError

AERIAL, GROUND = noise((4, 3, 96, 32), 0, 1.5), noise((4, 3, 96, 32), 1, 1.5)


@pytest.fixture
def backbone(clip_file):
    return load_backbone(str(clip_file), (96, 32)).eval()


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to `rtol` of the largest expected value."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= rtol * scale


@torch.no_grad()
def test_features_equal_the_original(backbone):
    expected = golden()["features"]
    for images, name in ((AERIAL, "aerial"), (GROUND, "ground")):
        pooled, tokens = backbone.encode_images(images)
        assert_near(pooled, expected[name])
        if name == "aerial":
            assert_near(tokens.sum(-1), expected["aerial_all_tokens_sum"])
            assert torch.equal(tokens[:, 0], pooled)
    assert_near(backbone.encode_captions(golden_batch()["caption_ids"])[0], expected["text"])


@torch.no_grad()
def test_overlapping_patches_equal_the_original(clip_file):
    backbone = load_backbone(str(clip_file), (96, 32), stride=8).eval()
    pooled, tokens = backbone.encode_images(AERIAL)
    assert_near(pooled, golden()["features_stride_8"]["aerial"])
    assert tokens.shape[1] == golden()["features_stride_8"]["tokens"]


@torch.no_grad()
def test_cutting_the_padding_of_captions_changes_no_feature(backbone):
    ids = golden_batch()["caption_ids"]
    longest = int((ids != 0).sum(1).max())
    full = torch.cat([ids, torch.zeros(4, 77 - ids.shape[1], dtype=ids.dtype)], dim=1)
    torch.testing.assert_close(
        backbone.encode_captions(ids[:, :longest])[0],
        backbone.encode_captions(full)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_two_views_in_one_call_equal_two_calls(backbone):
    one_call = backbone.encode_images(torch.cat([AERIAL, GROUND]))[0]
    two_calls = torch.cat([backbone.encode_images(x)[0] for x in (AERIAL, GROUND)])
    torch.testing.assert_close(one_call, two_calls, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_plain_and_fused_attention_give_the_same_features(backbone, monkeypatch):
    ids = golden_batch()["caption_ids"]
    plain = (*backbone.encode_images(AERIAL), *backbone.encode_captions(ids))
    monkeypatch.setattr("model.backbone.PLAIN_ATTENTION_BELOW", 0)
    fused = (*backbone.encode_images(AERIAL), *backbone.encode_captions(ids))
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Archive(torch.nn.Module):
    """A module tree with CLIP's parameters, which can be saved like OpenAI's archives."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            *parents, last = name.split(".")
            module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(64))

    def forward(self, x):
        return x


@pytest.mark.parametrize("file_format", ["state dict", "wrapped", "safetensors", "archive"])
def test_every_file_format_gives_the_same_weights(file_format, tmp_path, backbone):
    weights, path = golden_clip(), tmp_path / "clip.pt"
    if file_format == "state dict":
        torch.save({**weights, "logit_scale": torch.tensor(4.6)}, path)
    elif file_format == "wrapped":
        torch.save({"model": {f"module.{n}": v for n, v in weights.items()}}, path)
    elif file_format == "safetensors":
        path = tmp_path / "clip.safetensors"
        safetensors.torch.save_file(weights, path)
    else:
        torch.jit.save(torch.jit.script(Archive(weights)), path)
    loaded = load_backbone(str(path), (96, 32)).state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_an_archive_that_calls_a_function_is_refused(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match="refused: the archive asks for builtins.print"):
        load_backbone(str(path), (96, 32))


def resized(weights, backbone):
    """The weights with positions for the backbone's grid."""
    return resize_positions(weights, backbone.config, backbone.grid, {}, "x.pt")[0]


def test_the_position_embedding_is_resized_and_keeps_the_class_token(backbone):
    weights = golden_clip()
    positions = resized(weights, backbone)["visual.positional_embedding"]
    assert positions.shape[0] == 1 + 6 * 2
    assert torch.equal(positions[0], weights["visual.positional_embedding"][0])
    constant = {**weights, "visual.positional_embedding": torch.ones(1 + 12 * 4, 128)}
    positions = resized(constant, backbone)["visual.positional_embedding"]
    torch.testing.assert_close(positions, torch.ones(13, 128))


def test_the_shapes_of_weights_give_the_architecture():
    assert config_from_weights(golden_clip(), "x") == BackboneConfig(64, 2, 128, 16, 64, 2)


RESNET = BackboneConfig(32, (1, 1, 1, 1), 64, None, 64, 1)


@torch.no_grad()
def test_a_resnet_takes_tall_images_and_its_saved_weights_load(tmp_path):
    resnet = Backbone(RESNET, (384, 128)).eval()
    assert resnet.visual.attnpool.positional_embedding.shape[0] == 1 + 12 * 4
    images = noise((2, 3, 384, 128), 5)
    pooled, tokens = resnet.encode_images(images)
    assert pooled.shape == (2, 32) and tokens.shape == (2, 1, 32)
    torch.save(resnet.state_dict(), tmp_path / "rn.pt")
    loaded = load_backbone(str(tmp_path / "rn.pt"), (384, 128)).eval()
    torch.testing.assert_close(loaded.encode_images(images)[0], pooled)
    # A square pretraining grid (7x7 at 224) is resized.
    square = {**resnet.state_dict(), "visual.attnpool.positional_embedding": torch.ones(50, 2048)}
    torch.save(square, tmp_path / "square.pt")
    loaded = load_backbone(str(tmp_path / "square.pt"), (384, 128))
    torch.testing.assert_close(loaded.visual.attnpool.positional_embedding, torch.ones(49, 2048))


def test_half_precision_weights_give_nearly_the_same_features(clip_file, backbone):
    half = load_backbone(str(clip_file), (96, 32), half=True).eval()
    assert half.visual.conv1.weight.dtype == torch.float16
    assert half.visual.ln_pre.weight.dtype == torch.float32
    with torch.no_grad():
        for a, b in zip(half.encode_images(AERIAL), backbone.encode_images(AERIAL), strict=True):
            assert_near(a.float(), b, rtol=2e-2)
        ids = golden_batch()["caption_ids"]
        text = backbone.encode_captions(ids)[0]
        assert_near(half.encode_captions(ids)[0].float(), text, rtol=2e-2)


def assert_refused(message, *args, **kwargs):
    with pytest.raises(UserError, match=message):
        load_backbone(*args, **kwargs)


def test_unusable_choices_are_refused_with_the_reason(tmp_path, clip_file):
    assert_refused("ViT-B/61: neither a file nor one of .* Did you mean 'ViT-B/16'", "ViT-B/61", (96, 32))  # fmt: skip
    path = tmp_path / "other.pt"
    torch.save({"layer.weight": torch.ones(2)}, path)
    assert_refused("no CLIP weights in OpenAI's naming.*layer.weight", str(path), (96, 32))
    incomplete = dict(golden_clip())
    del incomplete["visual.ln_post.bias"]
    torch.save(incomplete, path)
    assert_refused("1 entries missing .first: visual.ln_post.bias", str(path), (96, 32))
    misshapen = {**golden_clip(), "visual.ln_post.bias": torch.ones(3)}
    torch.save(misshapen, path)
    assert_refused(r"not a complete CLIP: visual.ln_post.bias has the shape \(3,\)$", str(path), (96, 32))  # fmt: skip
    assert_refused("exceeds the patch size 16", str(clip_file), (96, 32), stride=17)
    assert_refused("smaller than a patch", str(clip_file), (96, 8))
    buffer = io.BytesIO()
    torch.save(golden_clip(), buffer)
    path.write_bytes(buffer.getvalue()[:5000])
    assert_refused("corrupted", str(path), (96, 32))


def test_one_lookup_for_captions_and_sentences_gives_the_same_features_and_gradients(backbone):
    captions = golden_batch()["caption_ids"]
    sentences = captions[:2, :5]
    table = backbone.token_embedding.weight

    def table_gradient(features):
        return torch.autograd.grad(sum(f.square().sum() for f in features), table)[0]

    two_lookups = [backbone.encode_captions(ids)[0] for ids in (captions, sentences)]
    embedded = backbone.embed_tokens(captions, sentences)
    pairs = zip((captions, sentences), embedded, strict=True)
    one_lookup = [backbone.encode_captions(ids, rows)[0] for ids, rows in pairs]
    for a, b in zip(two_lookups, one_lookup, strict=True):
        assert torch.equal(a, b)
    expected = table_gradient(two_lookups)
    torch.testing.assert_close(table_gradient(one_lookup), expected, rtol=1e-5, atol=1e-6)
