"""Resuming a run from its last.pth, as if nothing had happened."""

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


class Found(NamedTuple):
    """A checkpoint to resume from."""

    state: dict[str, Any]
    path: Path  # where it was looked for
    taken: Path  # where it was found
    warnings: list[str]  # about those that were not taken


def read_state(path: str | Path, keep: int = 1) -> Found:
    """Read a checkpoint to resume from. If it is corrupted or has weights that are not finite, the
    newest good one of the `keep` kept ones is taken. Raises UserError if there is none."""
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
        told = [*warnings, f"taken: {candidate}"] if warnings else []
        return Found(state, Path(path), candidate, told)
    untried = (earlier_save(Path(path), number) for number in itertools.count(keep))
    others = [file.name for file in itertools.takewhile(Path.is_file, untried)]
    also = f"; --resume_ckpt_file takes one of those beside it: {', '.join(others)}"
    raise UserError(warnings[0] + (also if others else ""))


def resume(trainer: Trainer, found: Found) -> list[str]:
    """Put a new trainer where the checkpoint is. Returns what the log should say.

    Learning rates are those of the present options at that epoch, so that a run may be given more
    epochs. Raises UserError if the checkpoint does not fit the options or the data, or if processes
    have read different ones.
    """
    state, path, processes = found.state, found.path, trainer.processes
    own = digest({k: v for k, v in state.items() if k not in ("model", "optimizer")})
    if len(set(processes.all_gather_objects(own))) > 1:
        raise UserError(f"{path}: processes find different checkpoints there; share the folder")
    notes = found.warnings + _check_data(trainer, state, path)
    if processes.is_rank_0 and found.taken != path:  # or it would be kept in a good one's place
        restore(path, found.taken)
    _load(trainer, state, path)
    progress, best = trainer.progress, trainer.best
    complete = progress.epoch == trainer.args.num_epoch
    told = []
    if processes.is_rank_0:

        def write(split: str) -> None:
            save_checkpoint(best.file(split), trainer.best_content(split))

        told = best.check_files(progress.epoch, progress.step == 0, complete, write)
    told, best.found = processes.from_rank_0((told, best.found))
    more = ": the run is complete, a larger --num_epoch goes on" if complete else ""
    done = f"resumed after {progress.epoch} epochs and {progress.step} steps{more}"
    return [*notes, *told, done]


def _check_data(trainer: Trainer, state: dict[str, Any], path: Path) -> list[str]:
    """Whether the run's data is what it was. Returns what the log should say; raises UserError if
    what it trains on or chooses by has changed."""
    choosers = trainer.best.choosers
    found = changes(state.get("data"), trainer.data)
    if found is None:
        if HELDOUT in choosers:
            raise UserError(
                f"{path}: it was trained when nothing could be held out (--val_dataset both was "
                "val and test); go on with --val_dataset val or test"
            )
        return [f"{path}: keeps no fingerprint of its data, so nobody can tell whether it changed"]
    told = [f"{split}: {change}" for split, change in found.items()]
    chose = {*choosers} & {*(state["best"] or choosers)}  # before as from here on
    if {"train", *chose} & {*found}:
        raise UserError(
            f"{path}: the run's data has changed ({'; '.join(told)}). Put it back, with --views, "
            "--val_dataset, --heldout and --heldout_seed as they were, or start a new run "
            "(--finetune takes this one's weights)"
        )
    return [f"the data has changed, {change}" for change in told]


def _load(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Raises UserError if a part of the state does not fit."""
    check_input(trainer.model.base_model, state, str(path))
    epochs = trainer.args.num_epoch
    try:
        load_state(trainer.parts, state)
        progress, steps = trainer.progress, len(trainer.loader)
        if progress.step > steps:
            raise ValueError(f"step {progress.step} of an epoch of {steps}")
        if progress.step and not trainer.epoch_log.sums:
            raise ValueError("its sums of losses are missing")
        then, now = state["batches"], trainer.sampler.describe()
        if progress.step and then != now:
            raise ValueError(
                f"it was saved within an epoch of {then}, and this one is of {now}; finish the "
                "epoch with the options that it began with, or resume from a save at an epoch's end"
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # an untrusted file may hold anything
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise UserError(f"{path}: does not fit these options: {reason}") from None
    if progress.epoch > epochs:
        raise UserError(f"{path}: {progress.epoch} epochs are done; --num_epoch {epochs} is fewer")
