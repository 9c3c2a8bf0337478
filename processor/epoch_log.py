"""What is said of an epoch: its mean losses and its speed, in the log, on the bar, in TensorBoard
and in history.jsonl."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from processor.history import write_epoch
from utils.distributed import Processes
from utils.errors import UserError
from utils.logger import log_to_file
from utils.runs import EVENTS


class EpochLog:
    """Sums of an epoch's losses, kept on the device, and where their means are shown.

    Args:
        args: `num_epoch` and `batch_size` are read.
        steps, samples: of an epoch.
        run_dir: receives TensorBoard's files and history.jsonl, from rank 0.
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
        # Of the losses and gradient norms of this epoch, and of finite `steps` and `norms`.
        self.sums: dict[str, Tensor] = {}
        self.skipped_images = 0  # in this epoch, at this process
        self.reported: dict[str, None] = {}  # messages on them
        self.bar = tqdm(disable=True)
        self.writer: SummaryWriter | None = None

    def state_dict(self) -> dict[str, Any]:
        """What survives a run that is cut off. All processes must call it."""
        skipped = sum(self.processes.all_gather_objects(self.skipped_images))
        return {"sums": self.sums, "skipped_images": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `state_dict` does not give."""
        sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        if sums and not {"total", "grad_norm", "steps", "norms"} <= set(sums):
            raise ValueError("its sums of losses are others")
        self.sums = sums
        self.skipped_images = state["skipped_images"] if self.processes.is_rank_0 else 0

    def open(self, epoch: int, step: int) -> None:
        """Show a bar, and open a file of TensorBoard, from this step of this epoch (from 0) on."""
        if not self.processes.is_rank_0:
            return
        self.bar = tqdm(
            total=self.args.num_epoch * self.steps,
            initial=epoch * self.steps + step,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # no bar where stderr is no terminal; the log has every value
        )
        threading.excepthook = _excepthook
        start = EVENTS.format(1 + sum(1 for _ in self.run_dir.glob("events.out.*")))
        try:
            self.writer = SummaryWriter(self.run_dir, purge_step=epoch + 1, filename_suffix=start)
        except UnicodeEncodeError:
            self.log.warning(f"{self.run_dir}: no curves: TensorBoard wants a name in UTF-8")

    def close(self) -> None:
        """Close the bar and the file of TensorBoard. A full disk ends the curves, not the run."""
        # PyTorch raises the death of a loader process wherever the main process is, so also here.
        with suppress(RuntimeError):
            self.bar.close()
        with suppress(OSError, RuntimeError):
            if self.writer:
                self.writer.close()

    def begin(self, epoch: int, step: int, lr: float) -> None:
        """Begin an epoch (from 0), or what remains of it from a step on."""
        self.epoch, self.lr = epoch, lr
        self.step = self.first = self.shown = step
        self.begun = self.shown_at = time.perf_counter()
        self.scalars: dict[str, float] = {}
        self.bar.set_description(f"epoch {epoch + 1}/{self.args.num_epoch}")

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Add a step's values, unless it was skipped. A norm that fp16's scaler made overflow is
        left out. Nothing waits for the device."""
        norm = values["grad_norm"]
        counts = {"steps": torch.ones_like(norm), "norms": norm.isfinite().to(norm.dtype)}
        for name, value in {**values, **counts}.items():
            left_out = skipped | ~norm.isfinite() if name == "grad_norm" else skipped
            self.sums[name] = self.sums.get(name, 0) + value.masked_fill(left_out, 0)
        self.step += 1
        self.bar.update()

    def add_skipped_images(self, messages: list[str]) -> None:
        """Count training images that could not be read, and warn of each once."""
        self.skipped_images += len(messages)
        for text in messages:
            if text not in self.reported:
                self.log.warning(f"skipped in epoch {self.epoch + 1}: {text}")
        self.reported |= dict.fromkeys(messages)

    def show_step(self) -> None:
        """Log the means over the epoch so far, and the speed since the last time."""
        line = self._line(self.shown, self.shown_at)
        self.shown, self.shown_at = self.step, time.perf_counter()
        epoch = f"epoch {self.epoch + 1}/{self.args.num_epoch}"
        self.log.info(f"{epoch} step {self.step}/{self.steps}  {line}")

    def end_steps(self) -> str:
        """The same over the whole epoch, for the line of `end`. All processes must call it."""
        line = self._line(self.first, self.begun)
        skipped = sum(self.processes.all_gather_objects(self.skipped_images))
        if not skipped:
            return line
        lists = self.processes.all_gather_objects(list(self.reported))
        for text in (t for texts in lists for t in texts) if self.processes.is_rank_0 else ():
            if text not in self.reported:  # another process has told it, on the console alone
                log_to_file(f"skipped in epoch {self.epoch + 1}: {text}")
                self.reported[text] = None
        return f"{line}  broken images skipped: {skipped}"

    def end(self, line: str, metrics: dict[str, dict[str, float]]) -> None:
        """Log the epoch's `line`, and write its scalars and its `metrics` by split. The sums are
        then those of the next epoch: none."""
        self.sums, self.skipped_images = {}, 0
        seconds = time.perf_counter() - self.begun
        done = self.epoch + 1
        self.log.info(f"epoch {done}/{self.args.num_epoch}  {line}  {seconds:.1f} s")
        if self.processes.is_rank_0:
            self._write_curves(metrics)
            row = {"epoch": done, "seconds": seconds, **self.scalars, **metrics}
            try:
                write_epoch(self.run_dir, row)
            except UserError as error:  # a full disk costs the history, not the run
                self.log.warning(str(error))

    def _line(self, first: int, since: float) -> str:
        """Means over the epoch so far, and the speed from a step and a time on; they also become
        the epoch's `scalars`."""
        means, batch = self._means(), self.args.batch_size
        samples = min(self.step * batch, self.samples) - first * batch
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
        return f"{_shown(means)}  lr {self.lr:.2e}  {speed:.0f} samples/s"

    def _means(self) -> dict[str, float]:
        """Means over the steps of the epoch so far that were not skipped."""
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
        scalars = {f"{s}/{name}": v for s, found in metrics.items() for name, v in found.items()}
        try:
            for name, value in (self.scalars | scalars).items():
                self.writer.add_scalar(name, value, self.epoch + 1)
            self.writer.flush()
        except OSError as error:
            self.log.warning(f"{self.run_dir}: no more curves for TensorBoard: {error}")
            self.writer = None


def _shown(means: dict[str, float]) -> str:
    if math.isnan(means["total"]):
        return "loss: no finite step yet"
    parts = {k: v for k, v in means.items() if k not in ("total", "grad_norm")}
    inner = f" ({', '.join(f'{k} {v:.3f}' for k, v in parts.items())})" if len(parts) > 1 else ""
    return f"loss {means['total']:.3f}{inner}"


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error on to `_write_curves`, which reports it."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)
