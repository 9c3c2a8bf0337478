"""Mean losses and speed of an epoch: in the log, on the progress bar, in TensorBoard and in
history.jsonl."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from processor.history import write_epoch
from utils.console import log_to_file
from utils.distributed import Processes
from utils.errors import UserError
from utils.runs import EVENTS


class EpochLog:
    """Sums an epoch's losses on the device, and reports their means.

    Args:
        args: this class reads `num_epoch` and `batch_size`.
        steps, samples: their numbers in an epoch.
        run_dir: rank 0 writes TensorBoard's files and history.jsonl there.
    """

    def __init__(
        self,
        args: EasyDict,
        steps: int,
        samples: int,
        device: torch.device,
        run_dir: Path,
        log: logging.Logger,
        processes: Processes,
    ) -> None:
        self.args, self.steps, self.samples, self.device = args, steps, samples, device
        self.run_dir, self.log, self.processes = run_dir, log, processes
        # Sums over this epoch: each loss, `grad_norm`, and the numbers of `steps` that were not
        # skipped and of `norms` that were finite.
        self.sums: dict[str, Tensor] = {}
        self.skipped_images = 0  # in this epoch, at this process
        self.reported: dict[str, None] = {}  # messages about skipped images, as an ordered set
        self.bar = tqdm(disable=True)
        self.writer: SummaryWriter | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. All processes must call it."""
        skipped = sum(self.processes.all_gather_objects(self.skipped_images))
        return {"sums": self.sums, "skipped_images": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        if sums and not {"total", "grad_norm", "steps", "norms"} <= set(sums):
            raise ValueError("its sums of losses are incomplete")
        self.sums = sums
        self.skipped_images = state["skipped_images"] if self.processes.is_rank_0 else 0

    def open(self, epoch: int, step: int) -> None:
        """Show a progress bar and open a TensorBoard file, from a step of an epoch (from 0) on."""
        if not self.processes.is_rank_0:
            return
        self.bar = tqdm(
            total=self.args.num_epoch * self.steps,
            initial=epoch * self.steps + step,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # no bar if stderr is not a terminal; the log has every value
        )
        threading.excepthook = _excepthook
        start = EVENTS.format(1 + sum(1 for _ in self.run_dir.glob("events.out.*")))
        try:
            self.writer = SummaryWriter(self.run_dir, purge_step=epoch + 1, filename_suffix=start)
        except UnicodeEncodeError:
            self.log.warning(f"{self.run_dir}: no curves: TensorBoard needs a name in UTF-8")

    def close(self) -> None:
        """Close the bar and the TensorBoard file. A full disk ends the curves, not the run."""
        # PyTorch may raise the error of a dead loader process at any point, so also here.
        with suppress(RuntimeError):
            self.bar.close()
        with suppress(OSError, RuntimeError):
            if self.writer:
                self.writer.close()

    def begin(self, epoch: int, step: int, lr: float) -> None:
        """Begin an epoch (from 0) at a step, which is above 0 after a resume."""
        self.epoch, self.lr = epoch, lr
        self.step = self.first_step = self.logged_step = step
        self.start_time = self.logged_time = time.perf_counter()
        self.scalars: dict[str, float] = {}
        self.bar.set_description(f"epoch {epoch + 1}/{self.args.num_epoch}")

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Add a step's values, unless it was skipped, and its gradient norm, unless the scale of
        fp16 made it overflow. Never waits for the device."""
        norm = values["grad_norm"]
        counts = {"steps": torch.ones_like(norm), "norms": norm.isfinite().to(norm.dtype)}
        for name, value in {**values, **counts}.items():
            omitted = skipped | ~norm.isfinite() if name == "grad_norm" else skipped
            self.sums[name] = self.sums.get(name, 0) + value.masked_fill(omitted, 0)
        self.step += 1
        self.bar.update()

    def add_skipped_images(self, messages: list[str]) -> None:
        """Count training images that could not be read, and warn about each once."""
        self.skipped_images += len(messages)
        for text in messages:
            if text not in self.reported:
                self.log.warning(f"skipped in epoch {self.epoch + 1}: {text}")
        self.reported |= dict.fromkeys(messages)

    def log_step(self) -> None:
        """Log the means over the epoch so far, and the speed since the last call."""
        summary = self._summarise(self.logged_step, self.logged_time)
        self.logged_step, self.logged_time = self.step, time.perf_counter()
        epoch = f"epoch {self.epoch + 1}/{self.args.num_epoch}"
        self.log.info(f"{epoch} step {self.step}/{self.steps}  {summary}")

    def end_steps(self) -> str:
        """The summary of all steps, for `end`. All processes must call it."""
        summary = self._summarise(self.first_step, self.start_time)
        skipped = sum(self.processes.all_gather_objects(self.skipped_images))
        if not skipped:
            return summary
        lists = self.processes.all_gather_objects(list(self.reported))
        for text in (t for texts in lists for t in texts) if self.processes.is_rank_0 else ():
            if text not in self.reported:  # another rank printed it, without the file
                log_to_file(f"skipped in epoch {self.epoch + 1}: {text}")
                self.reported[text] = None
        return f"{summary}  broken images skipped: {skipped}"

    def end(
        self, summary: str, metrics: dict[str, dict[str, float]], improved: Sequence[str]
    ) -> None:
        """Log the epoch, write its scalars, and clear the sums for the next epoch.

        Args:
            summary: of `end_steps`.
            metrics: in percent, by split; empty without an evaluation.
            improved: splits by which this is the best epoch so far.
        """
        self.sums, self.skipped_images = {}, 0
        line = summary
        for split, values in metrics.items():
            text = " ".join(f"{name} {value:.2f}" for name, value in values.items())
            line += f"  {split}: {text}" + "  best" * (split in improved)
        seconds = time.perf_counter() - self.start_time
        epoch = self.epoch + 1
        self.log.info(f"epoch {epoch}/{self.args.num_epoch}  {line}  {seconds:.1f} s")
        if self.processes.is_rank_0:
            self._write_curves(metrics)
            row = {"epoch": epoch, "seconds": seconds, **self.scalars, **metrics}
            try:
                write_epoch(self.run_dir, row)
            except UserError as error:  # a full disk costs the history, not the run
                self.log.warning(str(error))

    def _summarise(self, first_step: int, since: float) -> str:
        """Text of the means over the epoch so far, and of the speed since a step and a time. Both
        also become the epoch's `scalars`."""
        means, batch_size = self._means(), self.args.batch_size
        samples = min(self.step * batch_size, self.samples) - first_step * batch_size
        speed = max(samples, 0) / (time.perf_counter() - since)
        self.bar.set_postfix_str(
            f"loss {means['total']:.3f}, lr {self.lr:.1e}, {speed:.0f} samples/s"
        )
        self.scalars = {f"loss/{k}": v for k, v in means.items() if k != "grad_norm"}
        self.scalars |= {
            "grad_norm": means["grad_norm"],
            "lr": self.lr,
            "samples_per_second": speed,
        }
        return f"{_losses_text(means)}  lr {self.lr:.2e}  {speed:.0f} samples/s"

    def _means(self) -> dict[str, float]:
        """Means over the epoch's steps so far, without skipped ones."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()  # one wait
        sums = dict(zip(names, values, strict=True))
        counts = {"grad_norm": sums.pop("norms")}
        steps = sums.pop("steps")
        return {
            name: value / count if (count := counts.get(name, steps)) else math.nan
            for name, value in sums.items()
        }

    def _write_curves(self, metrics: dict[str, dict[str, float]]) -> None:
        if self.writer is None:
            return
        scalars = dict(self.scalars)
        for split, values in metrics.items():
            scalars |= {f"{split}/{name}": value for name, value in values.items()}
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.epoch + 1)
            self.writer.flush()
        except OSError as error:
            self.log.warning(f"{self.run_dir}: no more curves for TensorBoard: {error}")
            self.writer = None


def _losses_text(means: dict[str, float]) -> str:
    if math.isnan(means["total"]):
        return "loss: no finite step yet"
    shown = {k: f"{k} {v:.3f}" for k, v in means.items() if k not in ("total", "grad_norm")}
    logged = [text for name, text in shown.items() if "/" in name]  # by `Inputs.log`
    losses = [text for name, text in shown.items() if "/" not in name]
    parts = f" ({', '.join(losses)})" if len(losses) > 1 else ""
    return f"loss {means['total']:.3f}{parts}" + "".join(f"  {text}" for text in logged)


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread: `_write_curves` gets its error and reports it."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)
