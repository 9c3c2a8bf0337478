"""What the log says before a run and after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from easydict import EasyDict
from prettytable import PrettyTable

from datasets.records import Data
from processor.evaluator import Evaluator
from utils.distributed import World
from utils.metrics import FIGURES


def describe(
    log: logging.Logger,
    data: Data,
    evaluators: Sequence[Evaluator],
    args: EasyDict,
    device: torch.device,
    world: World,
) -> None:
    """Log the data, the protocol, and what the run is made of."""
    sizes = "; ".join(
        f"{e.name}: {len(e.split.captions)} captions, {sum(map(len, e.images.values()))} images"
        for e in evaluators
    )
    log.info(f"{data.name}: {data.num_identities} identities, {len(data.train)} samples; {sizes}")
    chosen = {
        "test": "best.pth is chosen by R@1 on the test split: this is the paper's protocol",
        "val": "best.pth is chosen by R@1 on the val split: test stays unseen",
        "both": "best.pth is chosen by R@1 on the val split, best_test.pth on the test split",
    }
    log.info(chosen[args.val_dataset])
    processes = f"{world.size} processes, " if world.size > 1 else ""
    log.info(
        f"losses {args.loss_names}; {processes}{device.type}, {args.precision}, seed {args.seed}"
    )
    workers = next(iter(evaluators[0].loaders.values())).num_workers
    if workers < args.num_workers:
        each = " for each process" if world.size > 1 else ""
        log.info(f"{workers} loader processes{each}, since there are no more cores")


def best_table(best: dict[str, dict[str, Any]]) -> str:
    """The best epoch by each split that chose one, with all splits' figures there."""
    table = PrettyTable(["best epoch", "chosen on", "figures of", *FIGURES])
    table.float_format = ".2"
    for chosen_on, found in best.items():
        for split, figures in found["figures"].items():
            table.add_row([found["epoch"], chosen_on, split, *figures.values()])
    return table.get_string()
