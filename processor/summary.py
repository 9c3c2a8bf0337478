"""What is said of a run before and after it: its data, its protocol, its best epoch."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from prettytable import PrettyTable

from datasets.fingerprint import changes, fingerprint
from datasets.heldout import HELDOUT
from datasets.loaders import TrainLoader
from datasets.overlap import Overlap, overlap
from datasets.records import Data
from datasets.registry import selecting_splits
from processor.evaluator import Evaluator
from utils.command_line import command_line_only_arguments
from utils.distributed import Processes
from utils.metrics import METRICS, Retrieval
from utils.runs import LAST_EPOCH
from utils.text import visible


def describe(
    log: logging.Logger,
    data: Data,
    loader: TrainLoader,
    evaluators: Sequence[Evaluator],
    args: EasyDict,
    device: torch.device,
    processes: Processes,
) -> None:
    """Log the data, the protocol, and what the run is made of."""
    sizes = "".join(
        f"; {e.name}: {len(e.split.captions)} captions, {sum(map(len, e.images.values()))} images"
        for e in evaluators
    )
    log.info(f"{data.name}: {data.num_identities} identities, {len(data.train)} samples{sizes}")
    warn(log, data)
    for i, split in enumerate(selecting_splits(args.val_dataset) or (LAST_EPOCH,)):
        protocol = Protocol(data, split, processes, args.finetune)
        log.info(f"{f'best_{split}.pth' if i else 'best.pth'} is {protocol}")
        if protocol.overlap and split != HELDOUT:
            log.info("--val_dataset heldout chooses on people who leave training instead")
    shared = f"{processes.size} processes, " if processes.size > 1 else ""
    log.info(f"losses {args.loss_names}; {shared}{device.type}, {args.precision}, seed {args.seed}")
    if loader.num_workers < args.num_workers:
        each = " for each process" if processes.size > 1 else ""
        log.info(f"{loader.num_workers} loader processes{each}, since there are no more cores")


class Protocol:
    """How a checkpoint is chosen, and what that has to do with test.

    Args:
        chosen_on: the split that chooses it, or `LAST_EPOCH`.
        processes: rank 0 looks at the files, for all processes.
        finetune: the checkpoint that the run began with, if there was one.
    """

    def __init__(
        self, data: Data, chosen_on: str, processes: Processes, finetune: str = ""
    ) -> None:
        self.chosen_on, self.finetune = chosen_on, finetune
        self.overlap: Overlap | None = None  # where another split than test chooses
        if chosen_on != "test" and chosen_on in data.splits:
            self.overlap = processes.from_rank_0(
                overlap(data, chosen_on) if processes.is_rank_0 else None
            )

    def __str__(self) -> str:
        """To follow "best.pth is"."""
        if not self.finetune:
            return self._chosen()
        began = f"the run began with {self.finetune}, and what trained and chose that counts too"
        return f"{self._chosen()}; {began}"

    def _chosen(self) -> str:
        if self.chosen_on == LAST_EPOCH:
            return "the last epoch's: no split chooses it"
        if self.chosen_on == "test":
            return "chosen by R@1 on the test split: this is the paper's protocol"
        out = " (people who have left training)" if self.chosen_on == HELDOUT else ""
        chosen = f"chosen by R@1 on the {self.chosen_on} split{out}"
        if self.overlap is None:
            return f"{chosen}, which is not here to be compared with test"
        if self.overlap:
            return f"{chosen}, which is not disjoint from test: {self.overlap}"
        return f"{chosen}, which shares no image and no known person with test"

    def role(self, split: str) -> str:
        """The part of an evaluated split, to follow "which"."""
        if split == self.chosen_on:
            return "chose this checkpoint"
        if split != "test" or self.chosen_on == LAST_EPOCH:
            return "had no part in choosing this checkpoint"
        if self.overlap is None:
            return (
                f"may have had a part in choosing this checkpoint: {self.chosen_on}, which chose "
                "it, is not here to be compared"
            )
        if self.overlap:
            return f"had a part in choosing this checkpoint: {self.overlap}"
        return (
            f"had no part in choosing this checkpoint: {self.chosen_on} shares no image and no "
            "known person with it"
        )

    def results(self) -> dict[str, Any]:
        """For test_results.json."""
        found, shared = self.overlap, None
        if found is not None:
            shared = {"images": found.images, "people": found.people}
        text = f"This checkpoint is {self}."
        return {"chosen_on": self.chosen_on, "overlap": shared, "text": text}


def protocol_of(
    checkpoint: dict[str, Any], args: EasyDict, data: Data, processes: Processes
) -> Protocol:
    """Of a checkpoint that is evaluated: what it says itself, else by the run's options. No split
    chooses the last.pth of a run."""
    best, chosen_on = epoch_and_best(checkpoint)[1], LAST_EPOCH
    if best:
        chosen_on = best["split"]
    elif "progress" not in checkpoint:  # which last.pth has
        chosen_on = next(iter(selecting_splits(args.val_dataset)), LAST_EPOCH)
    return Protocol(data, chosen_on, processes, args.finetune)


def data_of(checkpoint: dict[str, Any], data: Data) -> tuple[dict[str, Any], list[str]]:
    """For test_results.json: the data's fingerprint, and by split what has changed since training
    (None if the checkpoint does not tell); and the same for the log."""
    here = fingerprint(data)
    changed = changes(checkpoint.get("data"), here)
    told = ["the checkpoint keeps no fingerprint of its data: nobody can tell if it changed"]
    if changed is not None:
        told = [f"{split} is not what it was in training: {how}" for split, how in changed.items()]
    return {**here, "changed": changed}, told


def epoch_and_best(checkpoint: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The epoch of a checkpoint, and what chose it: `split`, `epoch` and, unless the last epoch was
    taken, metrics in percent. None and empty where it says nothing, or what other code means."""
    epoch: Any = checkpoint.get("epoch")
    best: Any = checkpoint.get("best")
    plain = isinstance(best, dict) and all(
        type(value) is (str if key == "split" else int if key == "epoch" else float)
        for key, value in best.items()
    )
    whole = plain and {"epoch", "split"} <= set(best)
    whole = whole and best["split"] in ("test", "val", HELDOUT, LAST_EPOCH)
    whole = whole and (best["split"] == LAST_EPOCH or set(METRICS) <= set(best))
    return (epoch if type(epoch) is int else None), (best if whole else {})


def repeats(best: dict[str, Any], now: Retrieval) -> str:
    """Whether an evaluation gives the metrics that training had at the best epoch."""
    same = all(f"{best[k]:.2f}" == f"{value:.2f}" for k, value in now.metrics.items())
    then = " ".join(f"{k} {best[k]:.2f}" for k in now.metrics)
    return f"training at epoch {best['epoch']}: {then}: {'equal' if same else 'DIFFERENT'}"


def warn(log: logging.Logger, data: Data) -> None:
    """Log what its reader found odd: a line for each kind."""
    for text in data.warnings:
        log.info(f"warning: {text}")


def evaluate_with(config: Path, checkpoints: Sequence[Path], args: EasyDict) -> str:
    """The commands that evaluate a run's best checkpoints, a line each."""
    lines = []
    for path in checkpoints:
        command = ["python", "test.py", "--config_file", str(config)]
        command += [] if path.name == "best.pth" else ["--checkpoint", str(path)]
        command += command_line_only_arguments(args)
        lines.append(visible(f"evaluate {path.name} with: {shlex.join(command)}"))
    return "\n".join(lines)


def best_table(best: dict[str, dict[str, Any]]) -> str:
    """The best epoch by each split that chose one, with all splits' metrics there."""
    table = PrettyTable(["best epoch", "chosen on", "metrics of", *METRICS])
    table.float_format = ".2"
    for chosen_on, found in best.items():
        for split, metrics in found["metrics"].items():
            table.add_row([found["epoch"], chosen_on, split, *metrics.values()])
        if chosen_on == LAST_EPOCH:
            table.add_row([found["epoch"], "no split: the last epoch", *[""] * (1 + len(METRICS))])
    return table.get_string()
