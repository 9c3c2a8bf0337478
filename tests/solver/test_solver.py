import pytest
import torch

from solver.build import build_optimizer, lr_at, set_lr, settings_of
from tests.helpers import golden, options


def test_settings_equal_the_original_for_every_parameter():
    for name, (lr, decay) in golden()["optimizer_groups"].items():
        assert settings_of(name, options()) == pytest.approx((lr, decay), rel=1e-9), name


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
