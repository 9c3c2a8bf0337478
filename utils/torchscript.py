"""Read the weights of a TorchScript archive, such as OpenAI's, without running its code."""

from __future__ import annotations

import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.expansion import refuse_compressed, refuse_oversized


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_torchscript(path: Path, size: int) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive; no code of the file runs.

    `torch.jit.load` would build the archive's program. Here an unpickler that accepts only tensors
    and plain containers reads the pickle inside, and replaces every module of the program by an
    empty object.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            folder = record.removesuffix("data.pkl")  # records of code may be compressed
            records = [
                r for r in archive.infolist() if r.filename.startswith((record, f"{folder}data/"))
            ]
            refuse_compressed(records, size)
            with archive.open(record) as file:
                root = _ModuleUnpickler(file, archive, f"{folder}data").load()
        weights = _parameters(root)
        refuse_oversized(weights, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: corrupted TorchScript archive ({error})") from None
    return weights


def _parameters(root: Any) -> dict[str, Tensor]:
    """The tensors of a TorchScript module and its submodules, by name; each module once."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(module: types.SimpleNamespace, prefix: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                weights[f"{prefix}{name}"] = value.detach()
            elif isinstance(value, types.SimpleNamespace):
                walk(value, f"{prefix}{name}.")

    if not isinstance(root, types.SimpleNamespace):
        raise ValueError(f"its root is a {type(root).__name__}, not a module")
    walk(root, "")
    return weights


def _as_is(value: Any, *_: Any) -> Any:
    return value


def _strided(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return flat.as_strided(size, stride, offset)


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_HARMLESS = {
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("torch._utils", "_rebuild_parameter"): _as_is,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): _as_is
        for kind in ("int", "double", "bool", "tensor")
    },
    ("torch.jit._pickle", "restore_type_tag"): _as_is,
}


class _ModuleUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._records: dict[str, bytearray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return types.SimpleNamespace
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise UserError(f"refused: the archive asks for {module}.{name}") from None

    def persistent_load(self, saved: tuple[Any, ...]) -> Tensor:
        _, dtype, key, _, _ = saved
        if key not in self._records:
            self._records[key] = bytearray(self._archive.read(f"{self._folder}/{key}"))
        return torch.frombuffer(self._records[key], dtype=dtype)
