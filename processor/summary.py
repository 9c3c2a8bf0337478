"""Descriptions of a run: its data, the protocol that selects its checkpoint, its best epoch."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict

from datasets.fingerprint import changes, fingerprint
from datasets.heldout import HELDOUT
from datasets.loaders import TrainLoader
from datasets.noise import noise_note
from datasets.overlap import Overlap, overlap
from datasets.records import Data
from datasets.registry import selecting_splits
from processor.averages import mean_of
from processor.best import Best, epoch_and_best
from processor.evaluator import Evaluator
from processor.result_tables import best_table
from utils.command_line import command_line_only_arguments
from utils.distributed import Processes
from utils.metrics import Retrieval
from utils.runs import AVERAGED, BEST, CONFIG, LAST_EPOCH
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
    """Log the data, the protocol, the losses and the machine."""
    sizes = "".join(
        f"; {e.name}: {len(e.split.captions)} captions, {sum(map(len, e.images.values()))} images"
        for e in evaluators
    )
    log.info(f"{data.name}: {data.num_identities} identities, {len(data.train)} samples{sizes}")
    warn(log, data)
    if note := noise_note(data, args.noise_rate, args.noise_seed):
        log.info(note)
    for i, split in enumerate(selecting_splits(args.val_dataset) or (LAST_EPOCH,)):
        protocol = Protocol(data, split, processes, args.finetune)
        log.info(f"{f'best_{split}.pth' if i else 'best.pth'} is {protocol}")
        if protocol.overlap and split != HELDOUT:
            log.info("--val_dataset heldout chooses on held-out identities instead")
    several = f"{processes.size} processes, " if processes.size > 1 else ""
    log.info(
        f"losses {args.loss_names}; {several}{device.type}, {args.precision}, seed {args.seed}"
    )
    if args.ema:
        log.info(
            f"evaluations and best.pth have the moving average of the weights, --ema {args.ema:g}"
        )
    if loader.num_workers < args.num_workers:
        each = " for each process" if processes.size > 1 else ""
        log.info(f"{loader.num_workers} loader processes{each}, since there are no more cores")


def warn(log: logging.Logger, data: Data) -> None:
    """Log the warnings of the data set's reader, one line each."""
    for text in data.warnings:
        log.info(f"warning: {text}")


class Protocol:
    """How a checkpoint is chosen, and how independent of test that is.

    Args:
        chosen_on: the selecting split, or `LAST_EPOCH`.
        processes: rank 0 compares the files, for all processes.
        finetune: the checkpoint that the run started from, if any.
        epochs: those in whose mean of the weights the checkpoint is, if it is one.
    """

    def __init__(
        self,
        data: Data,
        chosen_on: str,
        processes: Processes,
        finetune: str = "",
        epochs: Sequence[int] = (),
    ) -> None:
        self.chosen_on, self.finetune, self.epochs = chosen_on, finetune, list(epochs)
        self.overlap: Overlap | None = None  # of another selecting split with test
        if chosen_on != "test" and chosen_on in data.splits:
            self.overlap = processes.from_rank_0(
                overlap(data, chosen_on) if processes.is_rank_0 else None
            )

    def __str__(self) -> str:
        """Text to follow "best.pth is"."""
        if not self.finetune:
            return self._how_chosen()
        start = f"the run started from {self.finetune}, whose training and selection count too"
        return f"{self._how_chosen()}; {start}"

    def _how_chosen(self) -> str:
        if self.epochs:
            return f"{mean_of(self.epochs)}: no split chooses it"
        if self.chosen_on == LAST_EPOCH:
            return "the last epoch's: no split chooses it"
        if self.chosen_on == "test":
            return "chosen by R@1 on the test split: this is the paper's protocol"
        heldout = " (identities held out of training)" if self.chosen_on == HELDOUT else ""
        chosen = f"chosen by R@1 on the {self.chosen_on} split{heldout}"
        if self.overlap is None:
            return f"{chosen}, which is not available for a comparison with test"
        if self.overlap:
            return f"{chosen}, which is not disjoint from test: {self.overlap}"
        return f"{chosen}, which shares no image and no known person with test"

    def role(self, split: str) -> str:
        """The part of an evaluated split in the choice, to follow "which"."""
        if split == self.chosen_on:
            return "chose this checkpoint"
        if split != "test" or self.chosen_on == LAST_EPOCH:
            return "had no part in choosing this checkpoint"
        if self.overlap is None:
            return (
                f"may have had a part in choosing this checkpoint: {self.chosen_on}, which chose "
                "it, is not available for a comparison"
            )
        if self.overlap:
            return f"had a part in choosing this checkpoint: {self.overlap}"
        return (
            f"had no part in choosing this checkpoint: {self.chosen_on} shares no image and no "
            "known person with it"
        )

    def results(self) -> dict[str, Any]:
        """The entry `protocol` of test_results.json."""
        overlap = None
        if self.overlap is not None:
            overlap = {"images": self.overlap.images, "people": self.overlap.people}
        text = f"This checkpoint is {self}."
        return {"chosen_on": self.chosen_on, "overlap": overlap, "text": text}


def protocol_of(
    checkpoint: dict[str, Any], args: EasyDict, data: Data, processes: Processes
) -> Protocol:
    """The protocol of an evaluated checkpoint: recorded in it, or else from the run's options. No
    split chooses last.pth and averaged.pth."""
    best, chosen_on = epoch_and_best(checkpoint)[1], LAST_EPOCH
    epochs = averaged_epochs(checkpoint)
    if best:
        chosen_on = best["split"]
    elif "progress" not in checkpoint and not epochs:  # only last.pth has it
        chosen_on = next(iter(selecting_splits(args.val_dataset)), LAST_EPOCH)
    return Protocol(data, chosen_on, processes, args.finetune, epochs)


def averaged_epochs(checkpoint: dict[str, Any]) -> list[int]:
    """The epochs of which a checkpoint is the mean (`--average_last`); [] for others."""
    entry: Any = checkpoint.get("averaged")
    epochs: Any = entry.get("epochs") if isinstance(entry, dict) else None
    valid = isinstance(epochs, list) and all(type(epoch) is int for epoch in epochs)
    return list(epochs) if valid else []


def compare_data(checkpoint: dict[str, Any], data: Data) -> tuple[dict[str, Any], list[str]]:
    """Compare the data with that of training.

    Returns:
        The entry `data` of test_results.json: the fingerprint, and changes by split (None if the
        checkpoint has no fingerprint).
        The changes as lines for the log.
    """
    current = fingerprint(data)
    changed = changes(checkpoint.get("data"), current)
    notes = ["the checkpoint has no fingerprint of its data, so changes cannot be detected"]
    if changed is not None:
        notes = [f"{split} is not what it was in training: {how}" for split, how in changed.items()]
    return {**current, "changed": changed}, notes


def compare_metrics(best: dict[str, Any], result: Retrieval) -> str:
    """A line for the log: does an evaluation give the metrics of training at the best epoch?"""
    same = all(abs(best[k] - value) < 0.01 for k, value in result.metrics.items())
    metrics = " ".join(f"{k} {best[k]:.2f}" for k in result.metrics)
    return f"training at epoch {best['epoch']}: {metrics}: {'equal' if same else 'DIFFERENT'}"


def closing_lines(best: Best, run_dir: Path, args: EasyDict) -> str:
    """The table of a run's best epochs, and the commands that evaluate their checkpoints."""
    lines = [best_table(best.by_split)]
    files = [best.file(split) for split in best.by_split]
    for path in files + [run_dir / AVERAGED] * bool(args.average_last):
        command = ["python", "test.py", "--config_file", str(run_dir / CONFIG)]
        command += [] if path.name == BEST else ["--checkpoint", str(path)]
        command += command_line_only_arguments(args)
        lines.append(visible(f"evaluate {path.name} with: {shlex.join(command)}"))
    return "\n".join(lines)
