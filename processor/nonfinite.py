"""Steps whose loss or gradient is not finite: reported, listed with their samples, counted."""

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

MAX_FILES = 100  # lists of samples per start of a run


@dataclass
class _Step:
    """A step whose values are being copied from the device."""

    place: str
    keys: Sequence[Key]
    names: tuple[str, ...]
    values: Tensor
    copied: torch.cuda.Event | None

    def has_arrived(self, wait: bool) -> bool:
        if self.copied is not None and wait:
            self.copied.synchronize()
        return self.copied is None or self.copied.query()


class NonFiniteGuard:
    """Reports steps whose loss or gradient is not finite, without waiting for the device.

    `TrainStep` skips such a step on the device. Its losses are copied to the host asynchronously.
    When they arrive, the step is reported and its samples are listed in `nonfinite/`. Too many such
    steps in a row stop the run.

    Args:
        dataset: knows the samples of a key.
        folder: the run's; with None nothing is written.
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
        """What a resumed run needs."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        if type(state["in_a_row"]) is not int:
            raise ValueError("its count of skipped steps is not a number")
        self.in_a_row = state["in_a_row"]

    def watch(
        self, place: str, keys: Sequence[Key], values: dict[str, Tensor], skipped: Tensor
    ) -> None:
        """Start to copy a step's values to the host, and check the steps that have arrived.

        Args:
            place: "epoch 3, step 12".
            keys: samples of the whole batch.
            values: losses and gradient norm, scalars on the device.
            skipped: whether the step was skipped, a bool on the device.
        """
        row, copied = torch.stack([skipped.float(), *(v.float() for v in values.values())]), None
        if row.is_cuda:
            on_host = torch.empty(row.shape, pin_memory=True)
            row = on_host.copy_(row.detach(), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.waiting.append(_Step(place, keys, tuple(values), row, copied))
        self.check()

    def check(self, wait: bool = False) -> None:
        """Report skipped steps among those that have arrived; with `wait`, among all.

        Raises UserError after too many skipped steps in a row."""
        while self.waiting and self.waiting[0].has_arrived(wait):
            step = self.waiting.popleft()
            skipped, *values = step.values.tolist()
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._report(step, dict(zip(step.names, values, strict=True)))

    def _report(self, step: _Step, values: dict[str, float]) -> None:
        nonfinite = [name for name, value in values.items() if not abs(value) < float("inf")]
        losses = [name for name in nonfinite if name not in ("total", "grad_norm")]
        name = (losses or nonfinite)[0]
        what = "the gradient's norm" if name == "grad_norm" else f"loss {name}"
        samples = [self._describe_sample(key) for key in step.keys]
        text = f"{what} is {values[name]} in {step.place}"
        if self.folder is not None and self.files < MAX_FILES:
            self.files += 1
            stem = step.place.replace(", ", "_").replace(" ", "")
            file = self.folder / "nonfinite" / f"{stem}.json"
            for_json = {k: v if abs(v) < float("inf") else str(v) for k, v in values.items()}
            content = {"place": step.place, "values": for_json, "samples": samples}
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
            # A run that is resumed after this error starts a new count.
            count, self.in_a_row = self.in_a_row, 0
            precision = "" if self.args.precision in ("fp32", "fp64") else ", --precision fp32"
            raise UserError(
                f"{text}. {count} in a row, --max_nonfinite {self.args.max_nonfinite}: try a lower "
                f"--lr, more --warmup_epochs, --grad_clip 1{precision}"
            )
        self.log.info(f"skipped: {text}")

    def _describe_sample(self, key: Key) -> dict[str, Any]:
        sample = self.dataset.samples[key.index]
        description = {
            "entry": sample.entry,
            "pid": sample.pid,
            "image": sample.image.path,
            "pair": sample.pair.path if sample.pair else None,
            "caption": sample.caption,
            "seed": key.seed,
        }
        if self.dataset.skip:  # the log says whether the image was broken
            description["or if broken"] = [self.dataset.samples[i].entry for i in key.spares]
        return description
