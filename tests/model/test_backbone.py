import io

import pytest
import safetensors.torch
import torch

from model.backbone import Backbone, load_backbone
from model.weights import BackboneConfig, config_of, fit_positions
from tests.helpers import golden, golden_batch, golden_clip, noise
from utils.errors import UserError

AERIAL, GROUND = noise((4, 3, 96, 32), 0, 1.5), noise((4, 3, 96, 32), 1, 1.5)


@pytest.fixture
def backbone(clip_file):
    return load_backbone(str(clip_file), (96, 32)).eval()


def close(actual, expected, rtol=1e-4):
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= rtol * scale


@torch.no_grad()
def test_features_equal_the_original(backbone):
    figures = golden()["features"]
    for images, name in ((AERIAL, "aerial"), (GROUND, "ground")):
        pooled, tokens = backbone.encode_images(images)
        close(pooled, figures[name])
        if name == "aerial":
            close(tokens.sum(-1), figures["aerial_all_tokens_sum"])
            assert torch.equal(tokens[:, 0], pooled)
    close(backbone.encode_captions(golden_batch()["caption_ids"])[0], figures["text"])


@torch.no_grad()
def test_overlapping_patches_equal_the_original(clip_file):
    backbone = load_backbone(str(clip_file), (96, 32), stride=8).eval()
    pooled, tokens = backbone.encode_images(AERIAL)
    close(pooled, golden()["features_stride_8"]["aerial"])
    assert tokens.shape[1] == golden()["features_stride_8"]["tokens"]


@torch.no_grad()
def test_cutting_the_padding_changes_nothing(backbone):
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
    both = backbone.encode_images(torch.cat([AERIAL, GROUND]))[0]
    apart = torch.cat([backbone.encode_images(x)[0] for x in (AERIAL, GROUND)])
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_plain_and_fused_attention_give_the_same_features(backbone, monkeypatch):
    ids = golden_batch()["caption_ids"]
    plain = (*backbone.encode_images(AERIAL), *backbone.encode_captions(ids))
    monkeypatch.setattr("model.backbone.PLAIN_ATTENTION_BELOW", 0)
    fused = (*backbone.encode_images(AERIAL), *backbone.encode_captions(ids))
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Archive(torch.nn.Module):
    """A module tree with CLIP's parameters, to be saved as OpenAI's archives are."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            *folders, last = name.split(".")
            node = self
            for folder in folders:
                if not hasattr(node, folder):
                    node.add_module(folder, torch.nn.Module())
                node = getattr(node, folder)
            node.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(64))

    def forward(self, x):
        return x


@pytest.mark.parametrize("form", ["state dict", "wrapped", "safetensors", "archive"])
def test_every_file_format_gives_the_same_weights(form, tmp_path, backbone):
    weights, path = golden_clip(), tmp_path / "clip.pt"
    if form == "state dict":
        torch.save({**weights, "logit_scale": torch.tensor(4.6)}, path)
    elif form == "wrapped":
        torch.save({"model": {f"module.{n}": v for n, v in weights.items()}}, path)
    elif form == "safetensors":
        path = tmp_path / "clip.safetensors"
        safetensors.torch.save_file(weights, path)
    else:
        torch.jit.save(torch.jit.script(Archive(weights)), path)
    loaded = load_backbone(str(path), (96, 32)).state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_an_archive_that_asks_for_a_function_is_refused(tmp_path):
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


def fitted(weights, backbone):
    return fit_positions(weights, backbone.config, backbone.grid, {}, "x.pt")[0]


def test_position_embedding_is_resized_there_and_back(backbone):
    weights = golden_clip()
    there = fitted(weights, backbone)["visual.positional_embedding"]
    assert there.shape[0] == 1 + 6 * 2
    assert torch.equal(there[0], weights["visual.positional_embedding"][0])
    flat = {**weights, "visual.positional_embedding": torch.ones(1 + 12 * 4, 128)}
    back = fitted(flat, backbone)["visual.positional_embedding"]
    torch.testing.assert_close(back, torch.ones(13, 128))


def test_sizes_are_read_off_the_shapes():
    assert config_of(golden_clip(), "x") == BackboneConfig(64, 2, 128, 16, 64, 2)


RESNET = BackboneConfig(32, (1, 1, 1, 1), 64, None, 64, 1)


@torch.no_grad()
def test_resnet_takes_tall_images_and_round_trips(tmp_path):
    made = Backbone(RESNET, (384, 128)).eval()
    assert made.visual.attnpool.positional_embedding.shape[0] == 1 + 12 * 4
    images = noise((2, 3, 384, 128), 5)
    pooled, tokens = made.encode_images(images)
    assert pooled.shape == (2, 32) and tokens.shape == (2, 1, 32)
    torch.save(made.state_dict(), tmp_path / "rn.pt")
    loaded = load_backbone(str(tmp_path / "rn.pt"), (384, 128)).eval()
    torch.testing.assert_close(loaded.encode_images(images)[0], pooled)
    # A square pretraining grid (7x7 at 224) is resized.
    square = {**made.state_dict(), "visual.attnpool.positional_embedding": torch.ones(50, 2048)}
    torch.save(square, tmp_path / "square.pt")
    fitted = load_backbone(str(tmp_path / "square.pt"), (384, 128))
    torch.testing.assert_close(fitted.visual.attnpool.positional_embedding, torch.ones(49, 2048))


def test_half_keeps_weights_in_half_precision_and_agrees_roughly(clip_file, backbone):
    half = load_backbone(str(clip_file), (96, 32), half=True).eval()
    assert half.visual.conv1.weight.dtype == torch.float16
    assert half.visual.ln_pre.weight.dtype == torch.float32
    with torch.no_grad():
        for a, b in zip(half.encode_images(AERIAL), backbone.encode_images(AERIAL), strict=True):
            close(a.float(), b, rtol=2e-2)
        ids = golden_batch()["caption_ids"]
        close(half.encode_captions(ids)[0].float(), backbone.encode_captions(ids)[0], rtol=2e-2)


def refused(message, *args, **kwargs):
    with pytest.raises(UserError, match=message):
        load_backbone(*args, **kwargs)


def test_bad_choices_are_told(tmp_path, clip_file):
    refused("ViT-B/61: neither a file nor one of .* Did you mean 'ViT-B/16'", "ViT-B/61", (96, 32))
    other = tmp_path / "other.pt"
    torch.save({"layer.weight": torch.ones(2)}, other)
    refused("no CLIP weights in OpenAI's naming.*layer.weight", str(other), (96, 32))
    part = dict(golden_clip())
    del part["visual.ln_post.bias"]
    torch.save(part, other)
    refused("1 entries missing .first: visual.ln_post.bias", str(other), (96, 32))
    refused("exceeds the patch size 16", str(clip_file), (96, 32), stride=17)
    refused("smaller than a patch", str(clip_file), (96, 8))
    buffer = io.BytesIO()
    torch.save(golden_clip(), buffer)
    other.write_bytes(buffer.getvalue()[:5000])
    refused("corrupted", str(other), (96, 32))


def test_one_lookup_for_captions_and_sentences_gives_the_same_features_and_gradients(backbone):
    captions = golden_batch()["caption_ids"]
    sentences = captions[:2, :5]
    table = backbone.token_embedding.weight

    def gradient(features):
        (found,) = torch.autograd.grad(sum(f.square().sum() for f in features), table)
        return found

    apart = [backbone.encode_captions(ids)[0] for ids in (captions, sentences)]
    embedded = backbone.embed_tokens(captions, sentences)
    pairs = zip((captions, sentences), embedded, strict=True)
    together = [backbone.encode_captions(ids, rows)[0] for ids, rows in pairs]
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(gradient(apart), gradient(together), rtol=1e-5, atol=1e-6)
