"""Optimizer and schedule.

Per parameter, in this order: a name with `cross` has lr_factor times lr; a name with `bias` has
bias_lr_factor times lr and its own weight decay; a name with `classifier` or `mlm_head` has
lr_factor times lr. Parameters of equal settings share one group, so that an update is a few fused
launches instead of one per parameter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import torch
from easydict import EasyDict
from torch import nn
from torch.optim import Optimizer


def settings_of(name: str, args: EasyDict) -> tuple[float, float]:
    """Learning rate and weight decay of the parameter of this name."""
    lr, weight_decay = args.lr, args.weight_decay
    if "cross" in name:
        lr = args.lr * args.lr_factor
    if "bias" in name:
        lr, weight_decay = args.lr * args.bias_lr_factor, args.weight_decay_bias
    if "classifier" in name or "mlm_head" in name:
        lr = args.lr * args.lr_factor
    return lr, weight_decay


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], args: EasyDict
) -> Optimizer:
    """Adam, AdamW or SGD over the merged groups."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups.setdefault(settings_of(name, args), []).append(parameter)
    params: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), members in groups.items()
    ]
    # The fused kernels take no half-precision weights on the CPU; torch then chooses by itself.
    fused = all(p.dtype == torch.float32 for g in params for p in g["params"]) or None
    if args.optimizer == "SGD":
        optimizer = torch.optim.SGD(params, args.lr, momentum=args.momentum, fused=fused)
        if args.momentum:
            # What a first step makes of nothing; there from the start, since the fused kernel
            # leaves it unset where that step is skipped.
            for parameter in (p for group in params for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[args.optimizer]
    betas = (args.alpha, args.beta)
    return kind(params, args.lr, betas=betas, eps=args.adam_eps, fused=fused)


def lr_at(epoch: int, base_lr: float, args: EasyDict) -> float:
    """Learning rate of an epoch, counted from 0.

    Warm-up raises `warmup_factor` to 1 linearly, or holds it (`constant`). After it, with r the
    share of the remaining epochs that has passed: `cosine` falls to target_lr along half a cosine,
    `linear` falls to 0, `step` multiplies by gamma at each milestone, `exp` is power^r, and `poly`
    is power^(1 - r) above target_lr. The last rises: the original computes it so, and its figures
    are kept.
    """
    if epoch < args.warmup_epochs:
        share = epoch / args.warmup_epochs if args.warmup_method == "linear" else 0.0
        return base_lr * (args.warmup_factor * (1 - share) + share)
    if args.lrscheduler == "step":
        return base_lr * args.gamma ** bisect_right(args.milestones, epoch)
    passed = (epoch - args.warmup_epochs) / (args.num_epoch - args.warmup_epochs)
    if args.lrscheduler == "exp":
        return base_lr * args.power**passed
    if args.lrscheduler == "linear":
        return base_lr * (1 - passed)
    if args.lrscheduler == "poly":
        factor = args.power ** (1 - passed)
    else:
        factor = (1 + math.cos(math.pi * passed)) / 2
    return args.target_lr + (base_lr - args.target_lr) * factor


def set_lr(optimizer: Optimizer, epoch: int, args: EasyDict) -> float:
    """Give every group its learning rate of an epoch, counted from 0. Returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(epoch, group["base_lr"], args)
    return optimizer.param_groups[0]["lr"]
