"""Resuming a run from its last.pth, as if it had never stopped."""

from __future__ import annotations

import itertools
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets.fingerprint import changes
from datasets.heldout import HELDOUT
from model.build import check_input
from model.lora import check_base
from processor.state import PARTS, load_state
from processor.trainer import Trainer
from utils.checkpoint import (
    UnusableFile,
    digest,
    earlier_save,
    load_checkpoint,
    refuse_nonfinite,
    restore,
    save_checkpoint,
)
from utils.errors import UserError


class SavedState(NamedTuple):
    """A checkpoint to resume from."""

    state: dict[str, Any]
    path: Path  # the file that was asked for
    source: Path  # the file that was read: `path` or an older save
    warnings: list[str]  # about files that could not be used


def read_state(path: str | Path, keep: int = 1) -> SavedState:
    """Read a checkpoint to resume from. If it is corrupted or has weights that are not finite, read
    the newest intact one of the `keep` saves. Raises UserError if there is none."""
    warnings: list[str] = []
    for number in range(keep):
        candidate = earlier_save(Path(path), number)
        try:
            state = load_checkpoint(candidate)
            refuse_nonfinite(state["model"], candidate)
        except UnusableFile as error:
            warnings.append(str(error))
            continue
        missing = [name for name in PARTS if type(state.get(name)) not in (dict, OrderedDict)]
        if missing:
            raise UserError(
                f"{candidate}: cannot be resumed, it lacks {', '.join(missing)}; give the last.pth "
                "of a run of this version, or start from its weights with --finetune"
            )
        if warnings:
            warnings.append(f"used instead: {candidate}")
        return SavedState(state, Path(path), candidate, warnings)
    untried = (earlier_save(Path(path), number) for number in itertools.count(keep))
    others = [file.name for file in itertools.takewhile(Path.is_file, untried)]
    also = f"; older saves for --resume_ckpt_file: {', '.join(others)}"
    raise UserError(warnings[0] + (also if others else ""))


def resume(trainer: Trainer, saved: SavedState) -> list[str]:
    """Load a checkpoint into a new trainer. Returns lines for the log.

    Learning rates follow the current options, so a run may get more epochs. Raises UserError if the
    checkpoint does not fit the options or the data, or if processes have read different ones.
    """
    state, path, processes = saved.state, saved.path, trainer.processes
    hash_ = digest({k: v for k, v in state.items() if k not in ("model", "optimizer")})
    if len(set(processes.all_gather_objects(hash_))) > 1:
        raise UserError(f"{path}: processes find different checkpoints there; share the folder")
    notes = saved.warnings + _check_data(trainer, state, path)
    _load(trainer, state, path)
    # Put the intact save in place of the corrupted one, which would otherwise be kept as an older
    # save.
    if processes.is_rank_0 and saved.source != path:
        restore(path, saved.source)
    progress, best = trainer.progress, trainer.best
    complete = progress.epoch == trainer.args.num_epoch
    file_notes = []
    if processes.is_rank_0:

        def write(split: str) -> None:
            save_checkpoint(best.file(split), trainer.best_content(split))

        file_notes = best.check_files(progress.epoch, progress.step == 0, complete, write)
    file_notes, best.by_split = processes.from_rank_0((file_notes, best.by_split))
    hint = ": the run is complete; give a larger --num_epoch to continue" if complete else ""
    done = f"resumed after {progress.epoch} epochs and {progress.step} steps{hint}"
    return [*notes, *file_notes, done]


def _check_data(trainer: Trainer, state: dict[str, Any], path: Path) -> list[str]:
    """Compare the data with that of the checkpoint. Returns lines for the log. Raises UserError if
    the training samples or a selecting split have changed."""
    selecting = trainer.best.selecting_splits
    changed = changes(state.get("data"), trainer.data)
    if changed is None:
        if HELDOUT in selecting:
            raise UserError(
                f"{path}: it was trained before --heldout existed, when --val_dataset both meant "
                "val and test; resume with --val_dataset val or test"
            )
        return [f"{path}: has no fingerprint of its data, so changes cannot be detected"]
    notes = [f"{split}: {change}" for split, change in changed.items()]
    # A split matters if it selected before and selects now.
    selected = {*selecting} & {*(state["best"] or selecting)}
    if {"train", *selected} & {*changed}:
        raise UserError(
            f"{path}: the run's data has changed ({'; '.join(notes)}). Restore it, with --views, "
            "--noise_rate, --noise_seed, --val_dataset, --heldout and --heldout_seed as they were, "
            "or start a new run (--finetune takes this one's weights)"
        )
    return [f"the data has changed, {note}" for note in notes]


def _load(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Load the parts. Raises UserError if one does not fit."""
    check_input(trainer.model.base_model, state, str(path))
    check_base(trainer.lora, state, path)
    epochs = trainer.args.num_epoch
    try:
        load_state(trainer.parts, state)
        progress, steps = trainer.progress, len(trainer.loader)
        if progress.step > steps:
            raise ValueError(f"step {progress.step} of an epoch of {steps} steps")
        if progress.step and not trainer.epoch_log.sums:
            raise ValueError("its sums of losses are missing")
        old, new = state["batches"], trainer.sampler.describe()
        if progress.step and old != new:
            raise ValueError(
                f"it was saved within an epoch of {old}, but these options make epochs of {new}; "
                "finish the epoch with the old options, or resume from a save at an epoch's end"
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # an untrusted file may hold anything
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise UserError(f"{path}: does not fit these options: {reason}") from None
    if progress.epoch > epochs:
        raise UserError(f"{path}: {progress.epoch} epochs are done, more than --num_epoch {epochs}")
