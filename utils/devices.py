"""Device and precision: values chosen once, passed around."""

from __future__ import annotations

import os
import resource

import torch
from torch import Tensor

from utils.errors import UserError

OPEN_FILES, FEWEST_FILES = 4096, 256


def cores() -> int:
    """Processor cores that this process may use, which a scheduler may have made fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(num_workers: int) -> None:
    """Let this process open as many files at once as it may. Raises UserError if that is too few
    for loader processes, which hand over batches as open files: they would wait for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if num_workers and soft < FEWEST_FILES:
        raise UserError(
            f"this shell allows {soft} open files at once (ulimit -n), and loader processes need "
            f"{FEWEST_FILES}: allow more, or give --num_workers 0"
        )


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`. Raises UserError for `cuda` without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no usable GPU here; use --device cpu or auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device multiplies bf16 matrices natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context in which the encoders run."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def at_least_float32(values: Tensor) -> Tensor:
    """At least float32: what losses and metrics are computed in."""
    return values if values.dtype == torch.float64 else values.float()
