"""Steps whose loss or gradient is not finite: named, listed with their samples, and counted."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor

from datasets.samplers import Key
from datasets.training_set import TrainDataset
from utils.errors import UserError
from utils.files import write_atomically

FILES = 100  # lists of samples that are written at most


@dataclass
class _Step:
    """A step whose values are on their way from the device."""

    place: str
    keys: Sequence[Key]
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None

    def here(self, wait: bool) -> bool:
        if self.arrived is not None and wait:
            self.arrived.synchronize()
        return self.arrived is None or self.arrived.query()


class NonFiniteGuard:
    """Finds steps whose loss or gradient is not finite, without a wait for the device.

    `TrainStep` skips such a step on the device. The losses travel to the host behind the
    computation; when they arrive, the step is named, its samples are listed in `nonfinite/`, and
    too many in a row end the run.

    Args:
        dataset: names the samples.
        folder: of the run; None writes nothing.
    """

    def __init__(
        self,
        args: EasyDict,
        dataset: TrainDataset,
        folder: Path | None,
        log: logging.Logger,
    ) -> None:
        self.args, self.dataset, self.folder, self.log = args, dataset, folder, log
        self.waiting: deque[_Step] = deque()
        self.in_a_row = self.files = 0

    def state_dict(self) -> dict[str, int]:
        """What survives a run that is cut off."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for what `state_dict` does not give."""
        if type(state["in_a_row"]) is not int:
            raise ValueError("its count of skipped steps is no number")
        self.in_a_row = state["in_a_row"]

    def watch(
        self, place: str, keys: Sequence[Key], values: dict[str, Tensor], skipped: Tensor
    ) -> None:
        """Send a step's values on their way, and look at those that have arrived.

        Args:
            place: "epoch 3, step 12".
            keys: the whole batch's samples.
            values: losses and gradient norm, scalars on the device.
            skipped: whether the step was, a bool on the device.
        """
        row, arrived = torch.stack([skipped.float(), *(v.float() for v in values.values())]), None
        if row.is_cuda:
            on_host = torch.empty(row.shape, pin_memory=True)
            row = on_host.copy_(row.detach(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.waiting.append(_Step(place, keys, tuple(values), row, arrived))
        self.look()

    def look(self, wait: bool = False) -> None:
        """Report the skipped ones of the steps that have arrived, or wait for all.

        Raises UserError after too many in a row."""
        while self.waiting and self.waiting[0].here(wait):
            step = self.waiting.popleft()
            skipped, *values = step.values.tolist()
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._report(step, dict(zip(step.names, values, strict=True)))

    def _report(self, step: _Step, values: dict[str, float]) -> None:
        wrong = [name for name, value in values.items() if not abs(value) < float("inf")]
        single = [name for name in wrong if name not in ("total", "grad_norm")]
        name = (single or wrong)[0]
        what = "the gradient's norm" if name == "grad_norm" else f"loss {name}"
        samples = [self._sample(key) for key in step.keys]
        text = f"{what} is {values[name]} in {step.place}"
        if self.folder is not None and self.files < FILES:
            self.files += 1
            name = step.place.replace(", ", "_").replace(" ", "")
            file = self.folder / "nonfinite" / f"{name}.json"
            shown = {k: v if abs(v) < float("inf") else str(v) for k, v in values.items()}
            content = {"place": step.place, "values": shown, "samples": samples}
            try:
                if file.parent.is_symlink():
                    raise UserError(f"{file.parent}: a link; a run writes only into its own folder")
                write_atomically(file, lambda f: f.write(json.dumps(content, indent=1).encode()))
                text += f"; its {len(samples)} samples are listed in {file}"
            except UserError as error:  # a full disk may cost the list, not the run
                self.log.warning(str(error))
        if samples:
            text += f", the first: {samples[0]['image']} ({samples[0]['entry']})"
        if self.in_a_row > self.args.max_nonfinite:
            count, self.in_a_row = (
                self.in_a_row,
                0,
            )  # a run that is resumed after this begins a new count
            also = "" if self.args.precision in ("fp32", "fp64") else ", --precision fp32"
            raise UserError(
                f"{text}. {count} in a row, --max_nonfinite {self.args.max_nonfinite}: try a lower "
                f"--lr, more --warmup_epochs, --grad_clip 1{also}"
            )
        self.log.info(f"skipped: {text}")

    def _sample(self, key: Key) -> dict[str, Any]:
        sample = self.dataset.samples[key.index]
        told = {
            "entry": sample.entry,
            "pid": sample.pid,
            "image": sample.image.path,
            "pair": sample.pair.path if sample.pair else None,
            "caption": sample.caption,
            "seed": key.seed,
        }
        if self.dataset.skip:  # whether it was broken is in the log
            told["or if broken"] = [self.dataset.samples[i].entry for i in key.spares]
        return told
