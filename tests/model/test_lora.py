"""LoRA: updates that change nothing at first, are trained alone, and can be merged."""

import sys

import pytest
import torch

from model.build import build_training_model
from model.lora import add_lora, base_names, merged_weights
from processor.averages import averaged_tensors
from processor.state import ModelState
from tests.helpers import SCRATCH, golden_batch, noise, options
from tests.model.test_backbone import RESNET
from utils.errors import UserError

RANK, ALPHA = 4, 12.0


def build(weights, names="itc", **values):
    args = options(pretrain_choice=str(weights), loss_names=names, cmt_depth=1, **values)
    return build_training_model(args, names.split("+"), num_classes=9)


def adapted(weights, names="itc", **values):
    return build(weights, names, lora_rank=RANK, lora_alpha=ALPHA, **values)


def fill(model):
    """Updates of an adapted model that change its weights, unlike those at the start."""
    with torch.no_grad():
        for j, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(noise(parameter.shape, j, 0.1))
    return model


def encoded(model):
    return model.encode(golden_batch())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("attn", {"attn.in_proj", "attn.out_proj"}),
        ("mlp", {"mlp.c_fc", "mlp.c_proj"}),
        ("both", {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_updates_start_at_nothing_and_are_trained_alone_with_the_heads(targets, layers, clip_file):
    plain = build(clip_file, "supkl+match2+dot+id")
    model = adapted(clip_file, "supkl+match2+dot+id", lora_targets=targets)
    torch.testing.assert_close(encoded(model), encoded(plain), rtol=0, atol=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    updates = {
        f"base_model.{tower}transformer.resblocks.{block}.{layer}.lora_{x}.default.weight"
        for tower in ("", "visual.")
        for block in (0, 1)
        for layer in layers
        for x in "AB"
    }
    heads = {n for n, _ in plain.named_parameters() if not n.startswith("base_model.")}
    assert heads and trained == updates | heads == set(averaged_tensors(model))
    # What a checkpoint has, and what it leaves out.
    assert set(ModelState(model).state_dict()) >= trained
    assert not set(ModelState(model).state_dict()) & base_names(model)
    count = sum(n.startswith("base_model.") for n in plain.state_dict())
    assert len(base_names(model)) == count and not base_names(plain)
    (note,) = [n for n in model.base_model.notes if "LoRA" in n]
    assert note.startswith(f"LoRA of rank {RANK}: ")


@pytest.mark.parametrize("precision", ["fp32", "fp64", "half"])
def test_merged_updates_compute_what_the_layers_compute(precision, clip_file):
    model = fill(adapted(clip_file, precision=precision))
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "half": torch.float16}[precision]
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {dtype}
    apart, state = encoded(model), ModelState(model)
    with state.evaluated({}):
        torch.testing.assert_close(
            encoded(model), apart, **({"rtol": 1e-2, "atol": 2e-2} if precision == "half" else
                                      {"rtol": 1e-5, "atol": 1e-5})
        )  # fmt: skip
        saved = state.state_dict()
    torch.testing.assert_close(encoded(model), apart, rtol=0, atol=0)
    assert all(value.equal(model.state_dict()[name]) for name, value in saved.items())
    # peft's own merging gives the same weights (in half precision it rounds the update first).
    merged = merged_weights(model, {})
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.merge()
            torch.testing.assert_close(
                merged[f"{name}.base_layer.weight"].to(dtype), module.weight,
                **({"rtol": 2e-3, "atol": 2e-4} if precision == "half" else {}),
            )  # fmt: skip


def test_updates_are_merged_with_other_values_by_name(clip_file):
    """As an average of the weights has them."""
    model, other = fill(adapted(clip_file)), adapted(clip_file)
    values = {name: tensor.detach() for name, tensor in averaged_tensors(model).items()}
    with ModelState(model).evaluated({}):
        expected = encoded(model)
    with ModelState(other).evaluated(values):
        torch.testing.assert_close(encoded(other), expected, rtol=0, atol=0)


def test_the_packed_weight_of_an_adapted_attention_has_its_update(clip_file):
    model = fill(adapted(clip_file))
    attention, name = model.base_model.transformer.resblocks[1].attn, "attn.in_proj"
    merged = merged_weights(model.base_model, {})
    expected = merged[f"transformer.resblocks.1.{name}.base_layer.weight"]
    assert attention.in_proj_weight.equal(expected)
    with ModelState(model).evaluated({}):
        assert attention.in_proj_weight.equal(expected)


def test_gradients_of_updates_follow_from_those_of_the_weights(clip_file):
    """With G the gradient of W + s B A: that of A is s B^T G, that of B is s G A^T."""
    model, plain = fill(adapted(clip_file, precision="fp64")), build(clip_file, precision="fp64")
    weights, scale = plain.state_dict(), ALPHA / RANK
    for name, value in merged_weights(model, {}).items():
        name = name.replace("in_proj.base_layer.", "in_proj_").replace("base_layer.", "")
        weights[name] = value
    plain.load_state_dict(weights)
    losses = [m(golden_batch())["total"] for m in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    checked = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            g = gradients[f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.testing.assert_close(a.grad, scale * b.T @ g, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(b.grad, scale * g @ a.T, rtol=1e-8, atol=1e-10)
            checked += 1
    assert checked == 16  # two blocks of two encoders, four layers each
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_the_seed_gives_the_updates_and_other_random_numbers_stay(clip_file):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    states = [ModelState(adapted(clip_file, seed=seed)).state_dict() for seed in (1, 1, 2)]
    assert torch.rand(1).equal(expected)
    name = "base_model.visual.transformer.resblocks.0.mlp.c_fc.lora_A.default.weight"
    assert states[0][name].equal(states[1][name]) and not states[0][name].equal(states[2][name])


def test_what_lora_cannot_do_is_refused(clip_file, tmp_path, monkeypatch):
    from model.backbone import Backbone

    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    with pytest.raises(UserError, match="--lora_rank: a ResNet has no attention and MLP blocks"):
        adapted(tmp_path / "rn.pt")
    with pytest.raises(UserError, match="--lora_alpha 3.0 is for LoRA; give --lora_rank too"):
        options(lora_alpha=3.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    model = build(clip_file)
    message = "--lora_rank: peft is not installed: pip install -r requirements-methods.txt"
    with pytest.raises(UserError, match=message):
        add_lora(model.base_model, options(lora_rank=RANK, **SCRATCH))
