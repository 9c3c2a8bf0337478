"""The best epoch by each split that chooses a checkpoint, and its file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from processor.summary import epoch_and_best
from utils.checkpoint import UnusableFile, load_checkpoint
from utils.metrics import METRICS
from utils.runs import LAST_EPOCH


class Best:
    """best.pth and, with several splits that choose, best_<split>.pth.

    Args:
        choosers: names of the splits; the first one's is best.pth. With none the last epoch counts.
        folder: of the run.
    """

    def __init__(self, choosers: Sequence[str], folder: Path) -> None:
        self.choosers = list(choosers) or [LAST_EPOCH]
        self.folder = folder
        # By the split that chose it: its `epoch`, and all splits' `metrics` there.
        self.found: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return self.found

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Raises ValueError for what `state_dict` does not give."""
        for split, best in state.items():
            if type(best["epoch"]) is not int or type(split) is not str:
                raise ValueError("its best epochs are no numbers")
            if split != LAST_EPOCH and split not in best["metrics"]:
                raise ValueError(f"its best epoch by {split} has no metrics")
            for metrics in best["metrics"].values():
                if [type(metrics[name]) for name in METRICS] != [float] * len(METRICS):
                    raise ValueError("its best metrics are no numbers")
        self.found = state

    def update(self, epoch: int, metrics: dict[str, dict[str, float]]) -> list[str]:
        """Compare an epoch's metrics by split with the best so far. Returns the splits by which it
        is the best now; without splits that choose, the last epoch's stand-in."""
        better = [
            split
            for split in metrics or (LAST_EPOCH,)
            if split not in self.found
            or not metrics
            or metrics[split]["R@1"] > self.found[split]["metrics"][split]["R@1"]
        ]
        self.found |= {split: {"epoch": epoch, "metrics": metrics} for split in better}
        self.found = {split: self.found[split] for split in self.choosers if split in self.found}
        return better

    def file(self, split: str) -> Path:
        """The checkpoint that a split has chosen."""
        name = "best.pth" if split == self.choosers[0] else f"best_{split}.pth"
        return self.folder / name

    def described(self, split: str) -> dict[str, Any]:
        """What that checkpoint says of itself."""
        best = self.found[split]
        return {**best["metrics"].get(split, {}), "epoch": best["epoch"], "split": split}

    def check_files(
        self, epoch: int, here: bool, complete: bool, write: Callable[[str], None]
    ) -> list[str]:
        """Make the files those of a run that is resumed. Returns what the log should say.

        One that a kill came before is written, since the resumed checkpoint has its weights; one
        that the run does not know, since it resumes from before it, is renamed; and the best of
        which there is no file is forgotten.

        Args:
            epoch: that the run has done.
            here: whether no step of the next epoch is done, so that the weights are the epoch's.
            complete: whether no epoch is left, so that nothing more will be saved.
            write: writes the file of a split, with the weights of the resumed checkpoint.
        """
        notes = []
        for split in self.choosers:
            file, found = self.file(split), {}
            expected = self.described(split) if split in self.found else None
            with suppress(UnusableFile):
                found = load_checkpoint(file)
            its_epoch, its = epoch_and_best(found)
            if its == expected if expected else "best" not in found:
                continue
            ours = here and expected is not None and expected["epoch"] == epoch
            if complete and not ours:
                continue
            what = f"{file.name} is missing or corrupted"
            if ours and (epoch if its_epoch is None else its_epoch) < epoch:
                what = f"{file.name} is of epoch {its_epoch}, which this one was to replace"
            elif file.exists():
                names = (file.with_suffix(f".backup{n}.pth") for n in itertools.count(1))
                backup = next(name for name in names if not name.exists())
                os.replace(file, backup)
                of = "corrupted" if its_epoch is None else f"of epoch {its_epoch}"
                what = f"{file.name} is {of}, and not this run's; now {backup.name}"
            if ours:
                write(split)
                notes.append(f"{what}; written, of epoch {epoch}, whose weights this save has")
                continue
            self.found.pop(split, None)
            was = f"epoch {expected['epoch']}, R@1 {expected['R@1']:.2f}" if expected else "none"
            notes.append(
                f"{what}; this run's best was of {was}; the best from here on will be kept"
            )
        return notes
