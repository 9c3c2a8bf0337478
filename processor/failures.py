"""One-line errors for memory that runs out and loader processes that die, with what to try."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from easydict import EasyDict

from datasets.image_cache import ImageFiles
from utils.errors import UserError


@contextmanager
def explain_failures(
    args: EasyDict, device: torch.device, images: Sequence[ImageFiles], what: str
) -> Iterator[None]:
    """Turn errors of memory and of loader processes into a UserError that says what to try.

    Args:
        images: the files that loader processes read.
        what: "training" or "evaluation".
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(memory_advice(args, device, what)) from None
    except (RuntimeError, OSError, EOFError) as error:
        message = str(error)
        # A worker's death raises an error anywhere; while a file is written, inside another error.
        if "DataLoader worker" in str(error.__context__):
            message = str(error.__context__)
        elif not isinstance(error, RuntimeError):  # a worker may have died while it sent a batch
            message = _wait_for_worker_error()
        if "can't allocate memory" in message:  # from the CPU's allocator
            raise UserError(memory_advice(args, device, what)) from None
        if re.search(r"shared memory|\bshm\b", message):
            raise UserError(
                "loader processes pass batches through shared memory, and /dev/shm is full: make "
                "it larger (docker run --shm-size 8g), or give --num_workers 0"
            ) from None
        # "DataLoader worker (pid 12) is killed by signal: Killed. " or "(pid(s) 12, 13) exited ..."
        match = re.match(r"DataLoader worker \(pid[^\d]* ([\d, ]+)\) (.*?)\.? *$", message)
        if match is None:
            raise
        process_ids = [int(number) for number in match[1].split(",")]
        reading = [image for files in images for image in files.last_read(process_ids)]
        raise UserError(
            f"a loader process died ({match[2]}) "
            + (f"while it read {', '.join(reading)}" if reading else "before it read an image")
            + ". If it was killed, the machine's memory may have run out: give fewer --num_workers"
        ) from None


def memory_advice(args: EasyDict, device: torch.device, what: str) -> str:
    """A message with the options in use, the measured peak, and what to try."""
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
            f"({measured}): give a smaller one; the metrics stay the same"
        )
    options = ", ".join(
        f"{name} {getattr(args, name)}"
        for name in ("accum_steps", "grad_checkpointing", "precision", "img_size", "stride_size")
    )
    parts = min(2 * args.accum_steps, args.batch_size)
    advice = [f"--accum_steps {parts} (the same losses, more time)"]
    advice += ["--grad_checkpointing"] * (not args.grad_checkpointing)
    advice += ["--precision bf16"] * (args.precision in ("fp32", "fp64"))
    advice += [f"--batch_size {max(2, args.batch_size // 2)} (another experiment)"]
    return (
        f"out of memory in training at --batch_size {args.batch_size} ({options}; {measured}). "
        f"Try {', or '.join(advice)}"
    )


def _wait_for_worker_error(seconds: float = 2) -> str:
    """PyTorch's message about a loader process that died, or "" if none is known in time."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            torch._C._error_if_any_worker_fails()  # as PyTorch does when a child process has ended
            time.sleep(0.05)
    except RuntimeError as error:
        return str(error)
    return ""
