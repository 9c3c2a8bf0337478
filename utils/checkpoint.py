"""Read and write weights and checkpoints, without running code from a file."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import pickle
import re
import shutil
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import open_file, write_atomically

HASH = "sha256"  # entry of a checkpoint: the hash of all its other entries
# Entries in which other code keeps a model's weights; the first of them in this order is taken.
WEIGHT_ENTRIES = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model",
)  # fmt: skip
MAX_EXPANSION = 4  # largest ratio of a checkpoint's content to its file, plus a small constant
# Parts of weight names that DataParallel, torch.compile and other wrappers of a model add.
WRAPPER_NAMES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CONVERT = (
    "If you trust it, convert it: load it with the code that wrote it, and save only its tensors, "
    "torch.save({'model': model.state_dict()}, 'weights.pth')"
)


class UnusableFile(UserError):
    """A file is missing, corrupted or of another kind; a retry would not help."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint atomically: a crash or a full disk leaves the previous file complete.

    With `keep` above 1, earlier saves stay as `last.1.pth` (the newest of them), `last.2.pth`...
    Raises UserError, and writes nothing, if a weight of `model` holds NaN or infinite values.
    """
    nonfinite = nonfinite_weights(content.get("model", {}))
    if nonfinite:
        kept = "; the save before this one stays" if Path(path).exists() else ""
        raise UserError(
            f"{path}: not written: {_nonfinite_message(nonfinite)}{kept}. A lower --lr, "
            "more --warmup_epochs, --grad_clip 1 or --precision fp32 may prevent it"
        )

    def rotate() -> None:
        for number in range(keep - 1, 0, -1):
            source, target = earlier_save(path, number - 1), earlier_save(path, number)
            if number > 1 and source.exists():
                os.replace(source, target)
            elif source.exists():  # last.pth must exist until the new file replaces it
                temporary = target.with_name(f".{target.name}.new")
                try:
                    _link(source, temporary)
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)

    def before() -> None:
        # A process that was killed between `before` and the renaming has rotated already.
        if not _same(path, earlier_save(path, 1)):
            rotate()

    content = {**content, HASH: digest(content)}
    write_atomically(path, lambda file: torch.save(content, file), before=before)


def earlier_save(path: Path, number: int) -> Path:
    """Path of the checkpoint that was saved as `path` `number` saves ago."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def restore(path: Path, good: Path) -> None:
    """Replace the corrupted checkpoint `path` by the earlier one `good`; the corrupted one stays as
    `last.corrupted.pth`."""
    if path.exists():
        _link(path, path.with_suffix(f".corrupted{path.suffix}"))
    os.replace(good, path)  # not a copy: the next save would keep the same checkpoint twice


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of weights: `model` holds them by name, on the CPU; other entries are kept.

    The content of the file shows its format: safetensors, an OpenAI archive (TorchScript), or a
    file of `torch.save`. There the weights may be at the top level or in an entry of
    `WEIGHT_ENTRIES`, at any depth. If several entries hold weights, `assumed` says which one is
    used. Names that wrappers add (`module.`, `_orig_mod.`) are removed; `model` holds only tensors.

    The file may hold only dense tensors and plain values (`weights_only`), and not much more of
    them than its size allows. If it holds a hash, its content must match. Raises UnusableFile if
    the file is missing, corrupted or has no weights, or another UserError.
    """
    path = Path(path)
    content = _read(path)
    candidates = list(_find_weights(content, set()))
    if not candidates:
        raise UnusableFile(
            f"{path}: not a checkpoint: no weights in it; it holds {_list_entries(content)}"
        )
    (entry, weights), *others = candidates
    rest = {n: v for n, v in content.items() if n != entry.split(".")[0] and not _is_weight(n, v)}
    unused = [f"'{name}'" for name, other in others if name and len(other) >= len(weights) // 2]
    if unused:
        rest["assumed"] = f"{path}: the weights of '{entry}' are used, not {', '.join(unused)}"
    return {**rest, "model": _unwrapped(weights, path)}


def nonfinite_weights(weights: dict[str, Any]) -> list[str]:
    """Names of weights that hold NaN or infinite values. Synchronises with the device once."""
    floats = {
        name: value if value.element_size() > 1 else value.float()
        for name, value in weights.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if not floats:
        return []
    finite = torch.stack([value.isfinite().all() for value in floats.values()]).tolist()
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]


def refuse_nonfinite(weights: dict[str, Any], where: str | Path) -> None:
    """Raise UnusableFile if a weight holds NaN or infinite values."""
    nonfinite = nonfinite_weights(weights)
    if nonfinite:
        raise UnusableFile(f"{where}: {_nonfinite_message(nonfinite)}; use an earlier save")


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


def digest(content: Any) -> str:
    """SHA-256 of tensors and plain values, nested at any depth."""
    sha256 = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha256.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha256.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            sha256.update(f"{len(value)}[".encode())
            for part in value.items() if isinstance(value, dict) else value:
                feed(part)
        else:
            sha256.update(f"{value!r};".encode())

    feed(content)
    return sha256.hexdigest()


def _nonfinite_message(names: list[str]) -> str:
    others = f" and {len(names) - 1} more hold" if len(names) > 1 else " holds"
    return f"{names[0]}{others} NaN or infinite values"


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _same(one: Path, other: Path) -> bool:
    """Whether one file is a link to the other or a copy of it, made by `_link`."""
    try:
        a, b = one.stat(), other.stat()
    except OSError:
        return False
    if os.path.samestat(a, b):
        return True
    same_stat = (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
    return same_stat and filecmp.cmp(one, other, shallow=False)


def _read(path: Path) -> Any:
    """The content of a file, whose first bytes show its format."""
    try:
        with open_file(path) as file:
            start = file.read(9)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise UnusableFile(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size
    if is_safetensors or (path.suffix == ".safetensors" and not _is_pickled(start)):
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise UnusableFile(f"{path}: not readable as safetensors: {error}") from None
    return _read_torchscript(path, size) if _is_torchscript(path) else _load(path, start, size)


def _is_pickled(start: bytes) -> bool:
    return start[:2] == b"PK" or start[:1] == b"\x80"  # torch.save's formats


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _load(path: Path, start: bytes, size: int) -> Any:
    """The content of a file of `torch.save`; its hash, if there is one, is checked and removed."""
    try:
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                _refuse_compressed(archive.infolist(), size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; an error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_oversized(content, size)
        corrupted = False
        if isinstance(content, dict) and HASH in content:  # files of other code have none
            corrupted = content.pop(HASH) != digest(content)
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # corrupted bytes may cause any seek
            raise UnusableFile(
                f"{path}: not readable as a checkpoint, or corrupted ({error})"
            ) from None
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory, or corrupted") from None
    except pickle.UnpicklingError as error:
        if not _is_pickled(start):
            raise UnusableFile(f"{path}: not a checkpoint: not a file of torch.save") from None
        # torch's message advises unsafe loading; only its part that names the type is of use.
        match = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise UnusableFile(
            f"{path}: refused: it holds more than tensors and plain values, and loading it could "
            f"run code, or it is corrupted ({match.group() if match else 'unreadable'}). {CONVERT}"
        ) from None
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # an old format that torch can only read unsafely
            raise UnusableFile(
                f"{path}: refused: torch.load could run code from it. {CONVERT}"
            ) from None
        kind = UserError if "can't allocate memory" in reason else UnusableFile
        raise kind(f"{path}: not readable as a checkpoint, or corrupted ({reason})") from None
    if corrupted:
        raise UnusableFile(f"{path}: corrupted: its content does not match the hash saved in it")
    return content


def _refuse_compressed(records: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError if records of an archive of `size` bytes are compressed, which torch's never
    are, or larger than the archive."""
    records = list(records)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {record.filename} is compressed")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")


def _read_torchscript(path: Path, size: int) -> dict[str, Tensor]:
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
            _refuse_compressed(records, size)
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


def _find_weights(
    content: Any, seen: set[int], entry: str = ""
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (entry, weights) for every entry that holds weights, such as "model.state_dict", the
    preferred one first. `seen`: ids of visited dicts, because a dict may contain itself."""
    if not isinstance(content, dict) or entry.count(".") > 3 or id(content) in seen:
        return
    seen.add(id(content))
    for name in WEIGHT_ENTRIES:
        yield from _find_weights(content.get(name), seen, f"{entry}.{name}".lstrip("."))
    sizes = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's archives
    tensors = {n: v for n, v in content.items() if _is_weight(n, v) and n not in sizes}
    if tensors:
        yield entry, tensors


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _list_entries(content: Any) -> str:
    """Names and types of the first entries, for a message."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    entries = [f"{name!s:.60} ({type(value).__name__})" for name, value in content.items()]
    return ", ".join(entries[:12] + ["..."] * (len(entries) > 12)) or "nothing"


def _unwrapped(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights by the names of the model, without those of wrappers."""
    unwrapped: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)
        if short in unwrapped:
            raise UserError(f"{path}: has weights for '{short}' twice, once as '{name}'")
        unwrapped[short] = value
    return unwrapped


def _not_plain(tensor: Tensor) -> str:
    """Why a tensor is not accepted, or nothing."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "a sparse, quantized or nested tensor; save a dense one"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device} without values"
    return ""
