"""Refuse files of weights whose content would be much larger than the file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MAX_EXPANSION = 4  # largest ratio of a checkpoint's content to its file, plus a small constant


def refuse_oversized(content: Any, size: int) -> None:
    """Raise ValueError unless `content` has only plain values and dense tensors, and is not too
    large for a file of `size` bytes.

    A value that occurs several times counts each time, because copying and hashing visit it each
    time. It is measured only once.
    """
    # Number of values and bytes, by id; None while a value is being measured.
    known: dict[int, tuple[int, int] | None] = {}
    visited = 0

    def measure(value: Any, entry: str) -> tuple[int, int]:
        nonlocal visited
        visited += 1
        if isinstance(value, (str, bytes, bytearray)):
            return 1, len(value)
        if not isinstance(value, (Tensor, dict, list, tuple, set, frozenset)):
            return 1, 8
        if id(value) in known:
            if (result := known[id(value)]) is None:
                raise ValueError(f"{entry} holds itself")
            return result
        known[id(value)] = None
        if isinstance(value, Tensor):
            if problem := _not_plain(value):
                raise ValueError(f"{entry or 'it'} is {problem}")
            values, count = 1, value.numel() * value.element_size()
        else:
            values, count = 1, 8
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for name, part in parts:
                inner = entry or f"'{name!s:.60}'"
                for part_values, part_count in (measure(name, inner), measure(part, inner)):
                    values, count = values + part_values, count + part_count
        if values > MAX_EXPANSION * visited + 100_000 or count > MAX_EXPANSION * size + 2**20:
            raise ValueError(
                f"{entry or 'it'} expands to {values} values of {count} bytes, from {visited} in a "
                f"file of {size} bytes"
            )
        known[id(value)] = values, count
        return values, count

    measure(content, "")


def refuse_compressed(records: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError if records of an archive of `size` bytes are compressed, which torch's never
    are, or larger than the archive."""
    records = list(records)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {record.filename} is compressed")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")


def _not_plain(tensor: Tensor) -> str:
    """Why a tensor is not accepted, or nothing."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "a sparse, quantized or nested tensor; save a dense one"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device} without values"
    return ""
