"""What losses take from the encoders besides features: attention, features for the ranking."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import Backbone
from model.build import build_evaluation_model, build_model, build_training_model
from model.losses.rde import tse_feature
from tests.helpers import SCRATCH, golden_batch, options
from tests.model.test_backbone import RESNET
from utils.errors import UserError

TWO_LAYERS = {**SCRATCH, "vision_layers": 2, "text_layers": 2, "tse_dim": 8}


def model_of(names, **values):
    args = options(**{**TWO_LAYERS, **values}, loss_names=names)
    return build_model(args, names.split("+"), num_classes=0).eval()


@pytest.mark.parametrize("name", ["image", "text"])
def test_the_attention_of_the_pooled_token_is_its_row_of_the_complete_matrices(name):
    backbone, batch = model_of("sdm").base_model, golden_batch()
    backbone.keep_attention()
    attention, seen = backbone._last_attention(name), {}
    attention.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    if name == "image":
        backbone.encode_images(batch["images"])
        row, at, mask = backbone.pooled_attention("image"), torch.zeros(4, dtype=torch.long), None
    else:
        ids = batch["caption_ids"]
        backbone.encode_captions(ids)
        row, at = backbone.pooled_attention("text", ids), ids.argmax(dim=1)
        mask = torch.ones(77, 77, dtype=torch.bool).triu(1)
    x = seen["x"]
    full = nn.MultiheadAttention.forward(attention, x, x, x, need_weights=True, attn_mask=mask)[1]
    torch.testing.assert_close(row, full[torch.arange(4), at])
    assert not row.requires_grad


def test_selected_tokens_of_a_caption_do_not_depend_on_the_padding():
    model, ids = model_of("tal+tse"), golden_batch()["caption_ids"]
    short = ids[:, : int(ids.argmax(dim=1).max()) + 1]
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(short))


def test_the_cosine_of_joined_features_is_the_mean_of_both_cosines():
    plain, model = model_of("tal"), model_of("tal+tse")
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = golden_batch()
    images, ids = batch["images"], batch["caption_ids"]
    text, image = model.encode_text(ids), model.encode_image(images)
    assert model.feature_dim == text.shape[1] == image.shape[1] == 64 + 8
    assert text[:, :64].equal(plain.encode_text(ids))
    assert image[:, :64].equal(plain.encode_image(images))
    selected_text = tse_feature(model._encode_captions(ids))
    selected_image = tse_feature(model._encode_images(images))
    mean = (
        F.cosine_similarity(text[:, None, :64], image[None, :, :64], dim=2)
        + F.cosine_similarity(selected_text[:, None], selected_image[None], dim=2)
    ) / 2
    torch.testing.assert_close(F.normalize(text) @ F.normalize(image).T, mean)


def test_firm_reads_the_backbones_feature_alone():
    plain, model = model_of("match2+dot"), model_of("tal+tse+match2+dot")
    plain.load_state_dict(model.state_dict(), strict=False)
    images = golden_batch()["images"]
    expected = plain.predict_attributes(plain.encode_image(images))
    assert model.predict_attributes(model.encode_image(images)).equal(expected)


def test_an_evaluation_has_the_scores_of_the_training_and_refuses_weights_without_them():
    args = options(**TWO_LAYERS, loss_names="tal+tse")
    model = build_training_model(args, ["tal", "tse"], num_classes=0)
    model(golden_batch())  # changes the statistics of batch normalisation
    weights = model.eval().state_dict()
    again = build_evaluation_model(args, {"model": weights}, "best.pth")
    images = golden_batch()["images"]
    assert again.eval().encode_image(images).equal(model.encode_image(images))
    less = {name: value for name, value in weights.items() if not name.startswith("head_tse")}
    with pytest.raises(UserError, match="head_tse_text.linear.weight is missing, but the scores"):
        build_evaluation_model(args, {"model": less}, "best.pth")


def test_a_resnet_has_no_tokens_to_select(tmp_path):
    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    args = options(pretrain_choice=str(tmp_path / "rn.pt"), loss_names="tal+tse")
    with pytest.raises(
        UserError, match="'tse' needs a class token .* ResNet of --pretrain_.*rn.pt"
    ):
        build_model(args, ["tal", "tse"], num_classes=0)


@pytest.mark.parametrize("losses", ["tal", "tal+tse"])
def test_a_temperature_that_no_loss_would_learn_is_refused(losses):
    model = model_of(losses, learn_temperature=True)
    with pytest.raises(UserError, match=f"no loss of {re.escape(losses)} has this temperature"):
        model(golden_batch())


def test_a_learned_temperature_gets_a_gradient_and_stays_in_its_bounds():
    model = model_of("sdm", learn_temperature=True, temperature=0.05, min_temperature=0.04)
    fixed = model_of("sdm", temperature=0.05)
    batch = golden_batch()
    losses = model(batch)
    assert losses["temperature/learned"].item() == pytest.approx(0.05)
    loss = losses["sdm"]
    torch.testing.assert_close(loss, fixed(batch)["sdm"])
    loss.backward()
    assert model.log_scale.grad.abs() > 0
    with torch.no_grad():
        model.log_scale.fill_(10)
    limit = model_of("sdm", temperature=0.04)
    torch.testing.assert_close(model(batch)["sdm"], limit(batch)["sdm"])
    assert model.log_scale.item() == pytest.approx(-math.log(0.04))
    assert "log_scale" not in fixed.state_dict()
