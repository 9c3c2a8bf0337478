import pytest
import torch

from model.build import build_model
from solver.build import build_optimizer, depth_below_top, lr_at, set_lr, settings_of
from tests.helpers import SCRATCH, golden, options

LAYERS = options(**{**SCRATCH, "vision_layers": 3, "text_layers": 2}, layer_decay=0.5, cmt_depth=1)


def test_settings_equal_the_original_for_every_parameter():
    for name, (lr, decay) in golden()["optimizer_groups"].items():
        assert settings_of(name, options()) == pytest.approx((lr, decay), rel=1e-9), name


def test_new_layers_learn_faster_and_a_learned_temperature_does_not_decay():
    args = options(lr_factor=100.0, weight_decay=0.1)
    assert settings_of("head_tse_text.linear.bias", args) == (100 * args.lr, args.weight_decay_bias)
    assert settings_of("head_simclr.0.weight", args) == (100 * args.lr, 0.1)
    assert settings_of("log_scale", args) == (args.lr, 0.0)


def test_parameters_with_equal_settings_share_a_group_and_each_is_in_one_group():
    names = golden()["optimizer_groups"]
    parameters = {name: torch.nn.Parameter(torch.ones(1)) for name in names}
    optimizer = build_optimizer(parameters.items(), options())
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(names) == len({id(p) for p in grouped})
    assert len(optimizer.param_groups) == len({tuple(v) for v in names.values()})
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, (lr, decay) in names.items():
        group = group_of[id(parameters[name])]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((lr, decay), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("classifier.weight", 0),
        ("ln_pre_t.weight", 0),  # of IRRA's head
        ("base_model.visual.proj", 0),
        ("base_model.visual.ln_post.bias", 0),
        ("base_model.text_projection", 0),
        ("base_model.ln_final.weight", 0),
        ("base_model.visual.transformer.resblocks.2.mlp.c_fc.weight", 1),
        ("base_model.visual.transformer.resblocks.1.ln_1.bias", 2),
        ("base_model.visual.transformer.resblocks.0.attn.in_proj_weight", 3),
        ("base_model.visual.ln_pre.weight", 4),
        ("base_model.visual.conv1.weight", 4),
        ("base_model.visual.class_embedding", 4),
        ("base_model.visual.positional_embedding", 4),
        ("base_model.transformer.resblocks.1.mlp.c_proj.bias", 1),
        ("base_model.transformer.resblocks.0.attn.out_proj.weight", 2),
        ("base_model.token_embedding.weight", 3),
        ("base_model.positional_embedding", 3),
    ],
)
def test_layer_decay_lowers_the_learning_rate_by_the_layers_above_in_the_same_encoder(name, depth):
    """Three blocks of the image encoder, two of the text encoder."""
    names = list(build_model(LAYERS, ["id", "mlm"], 3).state_dict())
    assert name in names and depth_below_top(names)[name] == depth
    lr, decay = settings_of(name, LAYERS, depth)
    plain = settings_of(name, options())
    assert (lr, decay) == (pytest.approx(plain[0] * 0.5**depth, rel=1e-12), plain[1])


def test_the_optimizer_gets_the_rates_of_layer_decay_and_without_it_the_groups_stay():
    model = build_model(LAYERS, ["id", "mlm"], 3)
    optimizer = build_optimizer(model.named_parameters(), LAYERS)
    # Rates of lr: 1 (top), 1/2, ..., 1/16; of biases: twice these; of the heads: five times lr, and
    # twice lr for biases with "cross" in their name.
    rates = {round(g["lr"] / LAYERS.lr, 6) for g in optimizer.param_groups}
    assert rates == {1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 2, 5}
    assert set_lr(optimizer, 0, LAYERS) == LAYERS.warmup_factor * LAYERS.lr
    plain = build_optimizer(model.named_parameters(), options())
    by_settings: dict = {}
    for name, parameter in model.named_parameters():
        by_settings.setdefault(settings_of(name, options()), []).append(parameter)
    assert [(g["lr"], g["weight_decay"]) for g in plain.param_groups] == list(by_settings)
    for group, members in zip(plain.param_groups, by_settings.values(), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in members]


@pytest.mark.parametrize("case", sorted(golden()["lr_schedule"]))
def test_schedules_equal_the_original(case):
    schedule, warmup = case.split("/")
    args = options(lrscheduler=schedule, warmup_method=warmup)
    rates = golden()["lr_schedule"][case]
    assert [lr_at(e, args.lr, args) for e in range(60)] == pytest.approx(rates, rel=1e-9)
    named = {name: torch.nn.Parameter(torch.ones(1)) for name in ("w", "bias", "classifier")}
    optimizer = build_optimizer(named.items(), args)
    for epoch, lr in enumerate(rates):
        assert set_lr(optimizer, epoch, args) == pytest.approx(lr, rel=1e-9)
        for group, factor in zip(optimizer.param_groups, (1, 2, 5), strict=True):
            assert group["lr"] == lr_at(epoch, factor * args.lr, args)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_every_optimizer_takes_its_options_and_updates_the_weights(kind):
    args = options(optimizer=kind, lr=0.1, momentum=0.7, alpha=0.8, beta=0.9, adam_eps=1e-5)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([("w", parameter)], args)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == kind
    if kind == "SGD":
        assert group["momentum"] == 0.7
    else:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_half_precision_weights_can_be_trained():
    parameter = torch.nn.Parameter(torch.ones(3).half())
    optimizer = build_optimizer([("w", parameter)], options(lr=0.1))
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()
