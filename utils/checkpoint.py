"""Reading and writing weights and checkpoints, without ever running code from a file."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import write_atomically

HASH = "sha256"  # a checkpoint's entry of its own content


class Lost(UserError):
    """A file that is missing, damaged or another: to read it again would not help."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint atomically: a crash or a full disk leaves the previous file whole.

    With `keep` above 1, the ones before stay as `last.1.pth` (the newest of them), `last.2.pth`...
    """

    def rotate() -> None:
        for number in range(keep - 1, 0, -1):
            source, target = older(path, number - 1), older(path, number)
            if number > 1 and source.exists():
                os.replace(source, target)
            elif source.exists():  # last.pth stays in its place until the new one takes it
                beside = target.with_name(f".{target.name}.new")
                try:
                    _link(source, beside)
                    os.replace(beside, target)
                finally:
                    beside.unlink(missing_ok=True)

    content = {**content, HASH: digest(content)}
    write_atomically(path, lambda file: torch.save(content, file), before=rotate)


def older(path: Path, number: int) -> Path:
    """Where the checkpoint is kept that was `path` so many saves ago."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def restore(path: Path, good: Path) -> None:
    """Put a kept checkpoint in a damaged one's place, which is kept as `last.damaged.pth`."""
    if path.exists():
        _link(path, path.with_suffix(f".damaged{path.suffix}"))
    os.replace(good, path)  # moved: the next save keeps it once, as the one before


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: a dictionary whose entry `model` holds the weights, on the CPU.

    Only tensors and plain values are accepted (`weights_only`), and a hash in the file must be that
    of its content. Raises Lost if the file is missing or damaged, or another UserError.
    """
    content = _load(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise Lost(f"{path}: no checkpoint: it has no entry 'model' with weights")
    return content


def digest(content: Any) -> str:
    """SHA-256 of tensors and plain values, however deeply nested."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            found.update(f"{len(value)}[".encode())
            for part in value.items() if isinstance(value, dict) else value:
                feed(part)
        else:
            found.update(f"{value!r};".encode())

    feed(content)
    return found.hexdigest()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from safetensors, an OpenAI archive (TorchScript) or a file of `torch.save`.

    Entries `model` or `state_dict` are unwrapped and a `module.` prefix is cut; entries that are
    no tensors, and the three size records of OpenAI's archives, are left out.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            weights = safetensors.torch.load_file(path)
        except Exception as error:
            raise UserError(f"{path}: not readable as safetensors: {error}") from None
    elif _is_torchscript(path):
        weights = _read_torchscript(path)
    else:
        weights = _load(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict):
        raise UserError(f"{path}: no weights: expected names with tensors")
    sizes = {"input_resolution", "context_length", "vocab_size"}
    return {
        name.removeprefix("module."): value
        for name, value in weights.items()
        if isinstance(value, Tensor) and name not in sizes
    }


def _load(path: Path) -> Any:
    """A file of `torch.save`, whose hash, if it has one, is that of its content."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's other protocols; an error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = False
        if isinstance(content, dict) and HASH in content:  # other code's have none
            damaged = content.pop(HASH) != digest(content)
    except FileNotFoundError:
        raise Lost(f"{path}: no such file") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # damaged bytes may send the reader anywhere
            raise Lost(f"{path}: not readable as a checkpoint, or damaged ({error})") from None
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory, or damaged") from None
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # neither of torch.save's formats
            raise Lost(f"{path}: no checkpoint: not a file of torch.save") from None
        # torch's own words advise to load it unsafely; of them only the culprit is of use.
        found = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise Lost(
            f"{path}: refused: it holds more than tensors and plain values, and loading it could "
            f"run code, or it is damaged ({found.group() if found else 'unreadable'})"
        ) from None
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        kind = UserError if "can't allocate memory" in reason else Lost
        raise kind(f"{path}: not readable as a checkpoint, or damaged ({reason})") from None
    if damaged:
        raise Lost(f"{path}: damaged: its content does not have the hash that it was saved with")
    return content


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters of a TorchScript archive, read as data.

    `torch.jit.load` would build the archive's program; only its tensors are wanted. The pickle
    inside is read by an unpickler that knows tensors and replaces every module of the program by
    an empty object, so no code of the file can run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(record) as file:
                root = _ModuleUnpickler(file, archive, record.removesuffix(".pkl")).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: damaged TorchScript archive ({error})") from None
    weights: dict[str, Tensor] = {}

    def walk(module: Any, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                weights[prefix + name] = value.detach()
            elif isinstance(value, types.SimpleNamespace):
                walk(value, f"{prefix}{name}.")

    walk(root, "")
    return weights


def _as_is(value: Any, *_: Any) -> Any:
    return value


def _strided(flat: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
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
    def __init__(self, file, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return types.SimpleNamespace
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise UserError(f"refused: the archive asks for {module}.{name}") from None

    def persistent_load(self, saved: tuple) -> Tensor:
        _, dtype, key, _, _ = saved
        return torch.frombuffer(bytearray(self._archive.read(f"{self._folder}/{key}")), dtype=dtype)
