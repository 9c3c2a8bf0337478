"""The best epoch by each selecting split, and its checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets.heldout import HELDOUT
from utils.checkpoint import UnusableFile, load_checkpoint
from utils.metrics import METRICS
from utils.runs import LAST_EPOCH


class Best:
    """The best epochs, whose checkpoints are best.pth (first split) and best_<split>.pth (others).

    Args:
        selecting_splits: their names; without any, the last epoch is the best.
        folder: the run's.
    """

    def __init__(self, selecting_splits: Sequence[str], folder: Path) -> None:
        self.selecting_splits = list(selecting_splits) or [LAST_EPOCH]
        self.folder = folder
        # By selecting split: the best `epoch`, and the `metrics` of all splits at that epoch.
        self.by_split: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return self.by_split

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        for split, best in state.items():
            if type(best["epoch"]) is not int or type(split) is not str:
                raise ValueError("its best epochs are not numbers")
            if split != LAST_EPOCH and split not in best["metrics"]:
                raise ValueError(f"its best epoch by {split} has no metrics")
            for metrics in best["metrics"].values():
                if [type(metrics[name]) for name in METRICS] != [float] * len(METRICS):
                    raise ValueError("its best metrics are not numbers")
        self.by_split = state

    def update(self, epoch: int, metrics: dict[str, dict[str, float]]) -> list[str]:
        """Compare an epoch's metrics by split with the best so far. Returns the selecting splits
        by which it is now the best; without metrics (no split selects), [LAST_EPOCH]."""
        improved = [
            split
            for split in metrics or (LAST_EPOCH,)
            if split not in self.by_split
            or not metrics
            or metrics[split]["R@1"] > self.by_split[split]["metrics"][split]["R@1"]
        ]
        best = self.by_split | {s: {"epoch": epoch, "metrics": metrics} for s in improved}
        self.by_split = {split: best[split] for split in self.selecting_splits if split in best}
        return improved

    def file(self, split: str) -> Path:
        """The checkpoint that a split selects."""
        name = "best.pth" if split == self.selecting_splits[0] else f"best_{split}.pth"
        return self.folder / name

    def describe(self, split: str) -> dict[str, Any]:
        """The entry `best` of that checkpoint."""
        best = self.by_split[split]
        return {**best["metrics"].get(split, {}), "epoch": best["epoch"], "split": split}

    def check_files(
        self, epoch: int, at_epoch_end: bool, complete: bool, write: Callable[[str], None]
    ) -> list[str]:
        """Make the files match a resumed run. Returns lines for the log.

        - A kill may have come between last.pth and a best checkpoint of the same epoch. Then the
          best checkpoint is written with the resumed weights.
        - A run resumed from an older save may find a later best checkpoint, which is renamed.
        - A best epoch without a file is forgotten.

        Args:
            epoch: completed epochs.
            at_epoch_end: no step of the next epoch is done, so the weights are those of `epoch`.
            complete: no epoch remains, so nothing else will be saved.
            write: writes the checkpoint of a split with the resumed weights.
        """
        notes = []
        for split in self.selecting_splits:
            file, content = self.file(split), {}
            expected = self.describe(split) if split in self.by_split else None
            with suppress(UnusableFile):
                content = load_checkpoint(file)
            file_epoch, file_best = epoch_and_best(content)
            if file_best == expected if expected else "best" not in content:
                continue
            can_write = at_epoch_end and expected is not None and expected["epoch"] == epoch
            if complete and not can_write:
                continue
            problem = f"{file.name} is missing or corrupted"
            if can_write and (epoch if file_epoch is None else file_epoch) < epoch:
                problem = f"{file.name} is still of epoch {file_epoch}"
            elif file.exists():
                names = (file.with_suffix(f".backup{n}.pth") for n in itertools.count(1))
                backup = next(name for name in names if not name.exists())
                os.replace(file, backup)
                state = f"of epoch {file_epoch} and belongs to another save"
                state = "corrupted" if file_epoch is None else state
                problem = f"{file.name} is {state}; renamed to {backup.name}"
            if can_write:
                write(split)
                notes.append(f"{problem}; written with the weights of this save, epoch {epoch}")
                continue
            self.by_split.pop(split, None)
            was = f"epoch {expected['epoch']}, R@1 {expected['R@1']:.2f}" if expected else "none"
            notes.append(
                f"{problem}; this run's best was of {was}; the best from here on will be kept"
            )
        return notes


def epoch_and_best(checkpoint: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The entries `epoch` and `best` of a checkpoint, or None and {} if they are missing or of
    other code. `best` has `split`, `epoch` and, unless no split selected, metrics in percent."""
    epoch: Any = checkpoint.get("epoch")
    best: Any = checkpoint.get("best")
    valid = isinstance(best, dict) and all(
        type(value) is (str if key == "split" else int if key == "epoch" else float)
        for key, value in best.items()
    )
    valid = valid and {"epoch", "split"} <= set(best)
    valid = valid and best["split"] in ("test", "val", HELDOUT, LAST_EPOCH)
    valid = valid and (best["split"] == LAST_EPOCH or set(METRICS) <= set(best))
    return (epoch if type(epoch) is int else None), (best if valid else {})
