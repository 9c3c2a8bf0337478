"""bench.py --what methods: how long a step of each method takes, beside a step of InfoNCE."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from easydict import EasyDict

from datasets.loaders import to_device
from datasets.synthetic import synthetic_batch
from model.build import build_training_model
from processor.step import TrainStep
from solver.build import build_optimizer

BASE = "itc"
METHODS = (
    "sdm", "sdm+id+mlm", "supkl+queue", "supkl+queue+match2+dot", "tal", "tal+tse", "nitc",
    "nitc+mvs", "nitc+mvs+ritc+citc+simclr", "cda", "cda+fta",
)  # fmt: skip


def bench_methods(
    args: EasyDict, device: torch.device, clock: Any, row: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A step of each method. Between its steps, steps of InfoNCE run: a machine that becomes slower
    slows both, and the share is the median of the ratios of neighbours.

    Args:
        clock, row: of tools/bench.py.
    """
    base = _step_of(BASE, args, device)
    all_of_base: list[float] = []
    for names in METHODS:
        step = _step_of(names, args, device)
        base(), step()  # the warm-up
        pairs = [(clock.once(base), clock.once(step)) for _ in range(clock.repeat)]
        all_of_base += [first for first, _ in pairs]
        ratio = statistics.median(own / first for first, own in pairs)
        yield row(names, [own for _, own in pairs], share=ratio)
    yield row(BASE, all_of_base, share=1.0)


def _step_of(names: str, args: EasyDict, device: torch.device) -> Callable[[], object]:
    args = EasyDict(args, loss_names=names)
    model = build_training_model(args, names.split("+"), num_classes=11003).to(device).train()
    step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    raw = synthetic_batch(args, model.needs_masked, model.more_images)
    mean, std = model.base_model.config.image_mean, model.base_model.config.image_std
    return lambda: step(to_device(raw, device, mean, std))
