"""Optimizer and learning rate schedule.

The name of a parameter decides its settings. If two rules set the same value, the later one wins:
- `cross` in the name: lr * lr_factor;
- `bias`: lr * bias_lr_factor, and weight_decay_bias as the weight decay;
- `classifier` or `mlm_head`, or a name that begins with `head_`: lr * lr_factor;
- `log_scale`, the learned temperature: no weight decay, as in TBPS-CLIP.
`--layer_decay` then lowers the learning rate of an encoder's early layers, see `depth_below_top`.
Parameters with equal settings share one group, so an update is a few fused kernel launches instead
of one launch per parameter.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import torch
from easydict import EasyDict
from torch import nn
from torch.optim import Optimizer

# The layers of an encoder: its embeddings, and its blocks by number.
EMBEDDINGS = re.compile(
    r"base_model\.(visual\.)?(conv1|ln_pre|class_embedding|positional_embedding|token_embedding)\b"
)
BLOCKS = re.compile(r"base_model\.(visual\.)?transformer\.resblocks\.(\d+)\.")


def settings_of(name: str, args: EasyDict, depth: int = 0) -> tuple[float, float]:
    """Learning rate and weight decay of the parameter with this name.

    Args:
        depth: of `depth_below_top`.
    """
    lr, weight_decay = args.lr, args.weight_decay
    if "cross" in name:
        lr = args.lr * args.lr_factor
    if "bias" in name:
        lr, weight_decay = args.lr * args.bias_lr_factor, args.weight_decay_bias
    if "classifier" in name or "mlm_head" in name or name.startswith("head_"):
        lr = args.lr * args.lr_factor
    if name == "log_scale":
        weight_decay = 0.0
    return lr * args.layer_decay**depth, weight_decay


def depth_below_top(names: Iterable[str]) -> dict[str, int]:
    """By name, how many layers of its encoder are above a parameter, as BEiT counts them.

    Of L blocks the last has depth 1, the first L, and the embeddings (with the patches' convolution
    and the normalisation before the blocks) L + 1. Everything above the blocks has depth 0: last
    normalisation, projection, heads of the losses.
    """
    names = list(names)
    blocks = {name: match for name in names if (match := BLOCKS.match(name))}
    counts: dict[str | None, int] = {}  # by encoder
    for match in blocks.values():
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    depths = dict.fromkeys(names, 0)
    depths |= {name: counts[match[1]] - int(match[2]) for name, match in blocks.items()}
    embeddings = {name: match for name in names if (match := EMBEDDINGS.match(name))}
    depths |= {name: counts.get(match[1], 0) + 1 for name, match in embeddings.items()}
    return depths


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], args: EasyDict
) -> Optimizer:
    """Adam, AdamW or SGD, with one group for each combination of learning rate and weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    parameters = dict(named_parameters)
    depths = depth_below_top(parameters)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            groups.setdefault(settings_of(name, args, depths[name]), []).append(parameter)
    params: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), members in groups.items()
    ]
    # Fused kernels take no half-precision weights on the CPU; with None, torch chooses a kernel.
    weights = [p for group in params for p in group["params"]]
    fused = all(p.is_cuda or p.dtype != torch.float16 for p in weights) or None
    if args.optimizer == "SGD":
        optimizer = torch.optim.SGD(params, args.lr, momentum=args.momentum, fused=fused)
        if args.momentum:
            # Equal to what the first step would create. If that step is skipped, the fused kernel
            # would leave the buffer uninitialised.
            for parameter in weights:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[args.optimizer]
    betas = (args.alpha, args.beta)
    return kind(params, args.lr, betas=betas, eps=args.adam_eps, fused=fused)


def lr_at(epoch: int, base_lr: float, args: EasyDict) -> float:
    """Learning rate of an epoch, counted from 0.

    During warm-up, the factor of `base_lr` rises linearly from `warmup_factor` to 1, or stays at
    `warmup_factor` (`constant`). After warm-up, r is the fraction of the remaining epochs that is
    done:

    - `cosine` falls to target_lr along half a cosine.
    - `linear` falls to 0.
    - `step` multiplies by gamma at each milestone.
    - `exp` multiplies by power^r.
    - `poly` multiplies the part above target_lr by power^(1 - r). It rises; this is what the
      original computes, and it is kept to give the same results.
    """
    if epoch < args.warmup_epochs:
        done = epoch / args.warmup_epochs if args.warmup_method == "linear" else 0.0
        return base_lr * (args.warmup_factor * (1 - done) + done)
    if args.lrscheduler == "step":
        return base_lr * args.gamma ** bisect_right(args.milestones, epoch)
    r = (epoch - args.warmup_epochs) / (args.num_epoch - args.warmup_epochs)
    if args.lrscheduler == "exp":
        return base_lr * args.power**r
    if args.lrscheduler == "linear":
        return base_lr * (1 - r)
    if args.lrscheduler == "poly":
        factor = args.power ** (1 - r)
    else:
        factor = (1 + math.cos(math.pi * r)) / 2
    return args.target_lr + (base_lr - args.target_lr) * factor


def set_lr(optimizer: Optimizer, epoch: int, args: EasyDict) -> float:
    """Set the learning rate of every group for an epoch, counted from 0.

    Returns that of `--lr` itself.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(epoch, group["base_lr"], args)
    return lr_at(epoch, args.lr, args)
