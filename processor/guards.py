"""What stands between a training and a lost night: steps whose loss or gradient is not finite,
memory that runs out, loader processes that die."""

from __future__ import annotations

import json
import logging
import re
import resource
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from datasets.image_cache import ImageFiles
from datasets.samplers import Key
from datasets.training_set import TrainDataset
from utils.errors import UserError
from utils.files import write_atomically

FILES = 100  # lists of samples that are written at most


@dataclass
class _Step:
    """A step whose figures are on their way from the device."""

    place: str
    keys: Sequence[Key]
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.Event | None

    def here(self, wait: bool) -> bool:
        if self.arrived is not None and wait:
            self.arrived.synchronize()
        return self.arrived is None or self.arrived.query()


class Guard:
    """Finds steps whose loss or gradient is not finite, without a wait for the device.

    Such a step changes nothing: the optimizer skips it on the device, and the model's buffers
    (AEA's queue) are put back. The losses travel to the host behind the computation; when they
    arrive, the step is named, its samples are listed in `nonfinite/`, and too many in a row end the
    run.

    Args:
        dataset: names the samples.
        folder: of the run; None writes nothing.
    """

    def __init__(
        self,
        args: EasyDict,
        model: nn.Module,
        dataset: TrainDataset | None,
        folder: Path | None,
        log: logging.Logger,
    ) -> None:
        self.args, self.dataset, self.folder, self.log = args, dataset, folder, log
        self.buffers = [
            (module, name)
            for module in model.modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        ]
        self.waiting: deque[_Step] = deque()
        self.in_a_row = self.files = 0

    def before(self) -> None:
        """Remember what a step changes besides the weights."""
        self.kept = [getattr(module, name).clone() for module, name in self.buffers]

    def after(self, bad: Tensor) -> None:
        """Undo it if `bad`, a boolean on the device."""
        for (module, name), old in zip(self.buffers, self.kept, strict=True):
            setattr(module, name, torch.where(bad, old, getattr(module, name)))

    def watch(
        self, place: str, keys: Sequence[Key], figures: dict[str, Tensor], bad: Tensor
    ) -> None:
        """Send a step's figures on their way, and look at those that have arrived.

        Args:
            place: "epoch 3, step 12".
            keys: the whole batch's samples.
            figures: losses and gradient norm.
        """
        values, arrived = torch.stack([bad.float(), *(v.float() for v in figures.values())]), None
        if values.is_cuda:
            on_host = torch.empty(values.shape, pin_memory=True)
            values = on_host.copy_(values.detach(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.waiting.append(_Step(place, keys, tuple(figures), values, arrived))
        self.look()

    def look(self, wait: bool = False) -> None:
        """Judge the steps that have arrived, or wait for all. Raises UserError if it is enough."""
        while self.waiting and self.waiting[0].here(wait):
            step = self.waiting.popleft()
            bad, *values = step.values.tolist()
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self._report(step, dict(zip(step.names, values, strict=True)))

    def _report(self, step: _Step, figures: dict[str, float]) -> None:
        wrong = [name for name, value in figures.items() if not abs(value) < float("inf")]
        single = [name for name in wrong if name not in ("total", "grad_norm")]
        name = (single or wrong)[0]
        what = "the gradient's norm" if name == "grad_norm" else f"loss {name}"
        samples = [self._sample(key) for key in step.keys]
        text = f"{what} is {figures[name]} in {step.place}"
        if self.folder is not None and self.files < FILES:
            self.files += 1
            name = step.place.replace(", ", "_").replace(" ", "")
            file = self.folder / "nonfinite" / f"{name}.json"
            shown = {k: v if abs(v) < float("inf") else str(v) for k, v in figures.items()}
            content = {"place": step.place, "figures": shown, "samples": samples}
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
            count, self.in_a_row = self.in_a_row, 0  # who goes on after this begins a new count
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


@contextmanager
def explained(
    args: EasyDict, device: torch.device, images: Sequence[ImageFiles], what: str
) -> Iterator[None]:
    """Turn memory that ran out and loader processes that died into a UserError that helps.

    Args:
        images: what the loader processes read.
        what: "training" or "evaluation".
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(memory_advice(args, device, what)) from None
    except RuntimeError as error:
        # A worker's death is noticed anywhere, also while a file is written: then it comes wrapped.
        if error.__context__ is not None and "DataLoader worker" in str(error.__context__):
            error = error.__context__
        if "can't allocate memory" in str(error):  # what the CPU's allocator says
            raise UserError(memory_advice(args, device, what)) from None
        if re.search(r"shared memory|\bshm\b", str(error)):
            raise UserError(
                "loader processes pass batches through shared memory, and /dev/shm is full: give "
                "it more room (docker run --shm-size 8g), or --num_workers 0"
            ) from None
        # "DataLoader worker (pid 12) is killed by signal: Killed. " or "(pid(s) 12, 13) exited ..."
        died = re.match(r"DataLoader worker \(pid[^\d]* ([\d, ]+)\) (.*?)\.? *$", str(error))
        if died is None:
            raise
        pids = [int(pid) for pid in died[1].split(",")]
        read = [image for files in images for image in files.last_read(pids)]
        raise UserError(
            f"a loader process died ({died[2]}) "
            + (f"while it read {', '.join(read)}" if read else "before it read an image")
            + ". If it was killed, the machine's memory may have run out: give fewer --num_workers"
        ) from None


def memory_advice(args: EasyDict, device: torch.device, what: str) -> str:
    """What was asked for, what was measured, and what to try."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = torch.cuda.max_memory_allocated(device)
        measured = f"peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB on the GPU"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        measured = f"peak {peak / 2**30:.1f} GiB of the machine's memory"
    if what == "evaluation":
        return (
            f"out of memory in the evaluation at --test_batch_size {args.test_batch_size} "
            f"({measured}): give a smaller one, which changes no figure"
        )
    given = ", ".join(
        f"{name} {getattr(args, name)}"
        for name in ("accum_steps", "grad_checkpointing", "precision", "img_size", "stride_size")
    )
    smaller = min(2 * args.accum_steps, args.batch_size)
    advice = [f"--accum_steps {smaller} (the same losses, more time)"]
    advice += ["--grad_checkpointing"] * (not args.grad_checkpointing)
    advice += ["--precision bf16"] * (args.precision in ("fp32", "fp64"))
    advice += [f"--batch_size {max(2, args.batch_size // 2)} (another experiment)"]
    return (
        f"out of memory in training at --batch_size {args.batch_size} ({given}; {measured}). "
        f"Try {', or '.join(advice)}"
    )
