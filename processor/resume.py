"""What a run is saved as, and going on from it as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import textwrap
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datasets.fingerprint import changes
from datasets.heldout import HELDOUT
from model.build import check_input
from processor.summary import told_by
from utils.checkpoint import (
    Lost,
    digest,
    load_checkpoint,
    older,
    refuse_dead,
    restore,
    save_checkpoint,
)
from utils.errors import UserError
from utils.metrics import FIGURES
from utils.runs import LAST_EPOCH

if TYPE_CHECKING:
    from processor.trainer import Trainer

# What `state_of` holds and going on with a run needs.
STATE = {
    "model": dict, "optimizer": dict, "scaler": dict, "epoch": int, "step": int, "sums": dict,
    "skipped": int, "best": dict, "sampler": dict, "generators": dict,
}  # fmt: skip


def read_state(path: str | Path, keep: int = 1) -> tuple[dict[str, Any], Path, list[str]]:
    """A checkpoint that a run can go on from, its file, and warnings: if it is damaged or has
    weights that are not finite, one of the `keep` kept ones is taken. Raises UserError if there is
    none."""
    warnings: list[str] = []
    for number in range(keep):
        candidate = older(Path(path), number)
        try:
            state = load_checkpoint(candidate)
            refuse_dead(state["model"], candidate)
        except Lost as error:
            warnings.append(str(error))
            continue
        missing = sorted(
            name
            for name, kind in STATE.items()
            if type(state.get(name)) not in (kind, OrderedDict) or (kind is int and state[name] < 0)
        )
        if missing:
            raise UserError(
                f"{candidate}: cannot be resumed, it lacks {', '.join(missing)}; "
                "give last.pth, or start from its weights with --finetune"
            )
        return state, candidate, [*warnings, f"taken: {candidate}"] if warnings else []
    untried = (older(Path(path), number) for number in itertools.count(keep))
    others = [file.name for file in itertools.takewhile(Path.is_file, untried)]
    also = f"; --resume_ckpt_file takes one of those beside it: {', '.join(others)}"
    raise UserError(warnings[0] + (also if others else ""))


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that going on with the run needs. All processes must call it."""
    return {
        "model": trainer.model.state_dict(),
        "input": trainer.model.base_model.input,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "sums": trainer.sums,
        "skipped": sum(trainer.world.objects(trainer.skipped)),
        "in_a_row": trainer.guard.in_a_row,
        "best": trainer.best,
        "data": trainer.data,
        "sampler": trainer.loader.batch_sampler.state(trainer.step),
        "generators": {
            "firm": trainer.model.generator.get_state(),
            "processes": trainer.world.objects(_generators(trainer.device)),
        },
    }


def resume(
    trainer: Trainer, path: str | Path, state: dict[str, Any], taken: Path, notes: list[str]
) -> list[str]:
    """Go on from `read_state(path)`. Returns what the log should say of it. Raises UserError if
    it does not fit the options, or if processes have read different ones.

    Learning rates are those of the present options at that epoch, so that a run may be given
    more epochs.
    """
    own = digest({k: v for k, v in state.items() if k not in ("model", "optimizer")})
    if len(set(trainer.world.objects(own))) > 1:
        raise UserError(f"{path}: processes find different checkpoints there; share the folder")
    notes = notes + _check_data(trainer, state, path)
    if trainer.world.leads and taken != Path(path):  # or it would be kept in a good one's place
        restore(Path(path), taken)
    _load(trainer, state, path)
    own = _best_files(trainer) if trainer.world.leads else None
    told, trainer.best = trainer.world.from_leader(own)
    complete = trainer.epoch == trainer.args.num_epoch
    more = ": the run is complete, a larger --num_epoch goes on" if complete else ""
    done = f"resumed after {trainer.epoch} epochs and {trainer.step} steps{more}"
    return [*notes, *told, done]


def _check_data(trainer: Trainer, state: dict[str, Any], path: str | Path) -> list[str]:
    """Whether the run's data is what it was. Returns what the log should say; raises UserError if
    what it trains on or chooses by has changed."""
    found = changes(state.get("data"), trainer.data)
    if found is None:
        if HELDOUT in trainer.choosers:
            raise UserError(
                f"{path}: it was trained when nothing could be held out (--val_dataset both was "
                "val and test); go on with --val_dataset val or test"
            )
        return [f"{path}: keeps no fingerprint of its data, so nobody can tell whether it changed"]
    told = [f"{split}: {change}" for split, change in found.items()]
    chose = {*trainer.choosers} & {*(state["best"] or trainer.choosers)}  # before as from here on
    if {"train", *chose} & {*found}:
        raise UserError(
            f"{path}: the run's data has changed ({'; '.join(told)}). Put it back, with --views, "
            "--val_dataset, --heldout and --heldout_seed as they were, or start a new run "
            "(--finetune takes this one's weights)"
        )
    return [f"the data has changed, {change}" for change in told]


def _best_files(trainer: Trainer) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Make the best checkpoints those of the run that goes on. One that a kill came before is
    written, since the save has its weights; one that the run does not know, since it goes on from
    before it, is set aside. Returns what the log should say, and the best that there is a file of.
    """
    told, best = [], dict(trainer.best)
    for split in trainer.choosers:
        file, found = trainer.best_file(split), {}
        expected = chosen(split, best[split]) if split in best else None
        with suppress(Lost):
            found = load_checkpoint(file)
        epoch, its = told_by(found)
        if its == expected if expected else "best" not in found:
            continue
        here = bool(expected) and (expected["epoch"], 0) == (trainer.epoch, trainer.step)
        if trainer.epoch == trainer.args.num_epoch and not here:  # nothing more will be saved
            continue
        what = f"{file.name} is missing or damaged"
        if here and (trainer.epoch if epoch is None else epoch) < trainer.epoch:
            what = f"{file.name} is of epoch {epoch}, which this one was to replace"
        elif file.exists():
            names = (file.with_suffix(f".aside{n}.pth") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(file, aside)
            of = "damaged" if epoch is None else f"of epoch {epoch}"
            what = f"{file.name} is {of}, and not this run's; now {aside.name}"
        if here:
            save_checkpoint(file, best_of(trainer, split))
            told.append(f"{what}; written, of epoch {trainer.epoch}, whose weights this save has")
            continue
        best.pop(split, None)
        was = f"epoch {expected['epoch']}, R@1 {expected['R@1']:.2f}" if expected else "none"
        told.append(f"{what}; this run's best was of {was}; the best from here on will be kept")
    return told, best


def _load(trainer: Trainer, state: dict[str, Any], path: str) -> None:
    check_input(trainer.model.base_model, state, path)
    sampler = trainer.loader.batch_sampler
    if state["epoch"] > trainer.args.num_epoch:
        raise UserError(
            f"{path}: {state['epoch']} epochs are done; --num_epoch {trainer.args.num_epoch} "
            "is fewer"
        )
    try:
        trainer.model.load_state_dict(state["model"])
        _load_optimizer(trainer, state["optimizer"])
        if not state["sampler"]["step"] == state["step"] <= len(sampler):
            raise ValueError(f"step {state['step']} of an epoch of {len(sampler)}")
        for split, found in state["best"].items():
            if type(found["epoch"]) is not int or type(split) is not str:
                raise ValueError("its best epochs are no numbers")
            if split != LAST_EPOCH and split not in found["figures"]:
                raise ValueError(f"its best epoch by {split} has no figures")
            for figures in found["figures"].values():
                if [type(figures[name]) for name in FIGURES] != [float] * len(FIGURES):
                    raise ValueError("its best figures are no numbers")
        trainer.scheduler.last_epoch = state["epoch"]
        for group, base, factor in zip(
            trainer.optimizer.param_groups,
            trainer.scheduler.base_lrs,
            trainer.scheduler.lr_lambdas,
            strict=True,
        ):
            group["initial_lr"], group["lr"] = base, base * factor(state["epoch"])
        trainer.scheduler._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]
        # Or the schedule warns where the next thing to do is an epoch's evaluation.
        trainer.optimizer._opt_called = True
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.epoch, trainer.step, trainer.best = state["epoch"], state["step"], state["best"]
        trainer.sums = {k: v.to(trainer.device) for k, v in state["sums"].items()}
        if trainer.step and not {"total", "grad_norm", "steps", "norms"} <= set(trainer.sums):
            raise ValueError("its sums of losses are others")
        trainer.skipped = state["skipped"] if trainer.world.leads else 0
        trainer.guard.in_a_row = int(state.get("in_a_row", 0))
        sampler.load_state(state["sampler"])
        trainer.model.generator.set_state(state["generators"]["firm"])
        own = state["generators"]["processes"]
        if trainer.world.rank < len(own):  # with more processes than before, these begin anew
            _set_generators(own[trainer.world.rank], trainer.device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a stranger's file may hold anything
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise UserError(f"{path}: does not fit these options: {reason}") from None


def _load_optimizer(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Its moments; rates, decay and betas are those of the present options."""
    groups = trainer.optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in saved["param_groups"]]:
        raise ValueError("the optimizer's groups are others")
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():
        for name, value in moments.items():
            if value.dim() and value.shape != parameters[index].shape:
                raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}")
            if value.isnan().any():
                raise ValueError(f"the optimizer's {name} holds NaN")
    trainer.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def seed_generators(seed: int) -> None:
    """Seed the global generators of this process."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _generators(device: torch.device) -> dict[str, Any]:
    """The global generators of this process. Nothing here draws from them, but a method that is
    built on it may (dropout)."""
    kind, keys, position, *gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), position, *gauss],
        "python": random.getstate(),
    }


def _set_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


def best_of(trainer: Trainer, split: str) -> dict[str, Any]:
    """What a best checkpoint holds, when the model is that of the epoch that `split` has chosen."""
    best = trainer.best[split]
    return {
        "model": trainer.model.state_dict(), "input": trainer.model.base_model.input,
        "epoch": best["epoch"], "best": chosen(split, best),
        "data": trainer.data,
    }  # fmt: skip


def chosen(split: str, best: dict[str, Any]) -> dict[str, Any]:
    """What a best checkpoint says of itself."""
    return {**best["figures"].get(split, {}), "epoch": best["epoch"], "split": split}
