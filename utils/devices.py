"""Device, precision, processor cores and open files."""

from __future__ import annotations

import os
import resource

import torch
from torch import Tensor

from utils.errors import UserError

WANTED_FILES, MIN_FILES = 4096, 256  # open files of a process


def cores() -> int:
    """Number of processor cores that this process may use: a scheduler may allow it only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(num_workers: int) -> None:
    """Raise this process's limit on open files. Raises UserError if it stays too low for loader
    processes: they pass batches as open files, and would wait forever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        soft = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if num_workers and soft < MIN_FILES:
        raise UserError(
            f"this shell allows {soft} open files at once (ulimit -n), and loader processes need "
            f"{MIN_FILES}: allow more (ulimit -n 4096), or give --num_workers 0"
        )


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises UserError for `cuda` without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no usable GPU here; give --device cpu or auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 if the device multiplies bf16 matrices natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The mixed-precision context in which the encoders run."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32 unless `values` are float64: losses and metrics need that precision."""
    return values if values.dtype == torch.float64 else values.float()
