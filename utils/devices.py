"""Device and precision."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UserError


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
