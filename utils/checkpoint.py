"""Reading and writing weights and checkpoints, without ever running code from a file."""

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

HASH = "sha256"  # a checkpoint's entry of its own content
# Where the codes of others keep a model's weights; what stands first is taken first.
WRAPPERS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model",
)  # fmt: skip
SWELLING = 4  # times as large as its file may the content of a checkpoint be, and a little more
# Parts of a weight's name that come from what wrapped the model: DataParallel, torch.compile, ...
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CONVERT = (
    "If you trust it, convert it: load it with the code that wrote it, and save its tensors alone, "
    "torch.save({'model': model.state_dict()}, 'weights.pth')"
)


class UnusableFile(UserError):
    """A file that is missing, corrupted or another: to read it again would not help."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint atomically: a crash or a full disk leaves the previous file whole.

    With `keep` above 1, the ones before stay as `last.1.pth` (the newest of them), `last.2.pth`...
    Raises UserError, and writes nothing, if a weight of `model` holds NaN or infinite values.
    """
    found = nonfinite_weights(content.get("model", {}))
    if found:
        kept = "; the save before this one stays" if Path(path).exists() else ""
        raise UserError(
            f"{path}: not written: {_told(found)}{kept}. A lower --lr, more --warmup_epochs, "
            "--grad_clip 1 or --precision fp32 may prevent it"
        )

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

    def before() -> None:
        # A kill between this and the new file's place leaves last.pth kept already.
        if not _same(path, older(path, 1)):
            rotate()

    content = {**content, HASH: digest(content)}
    write_atomically(path, lambda file: torch.save(content, file), before=before)


def older(path: Path, number: int) -> Path:
    """Where the checkpoint is kept that was `path` so many saves ago."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def restore(path: Path, good: Path) -> None:
    """Put a kept checkpoint in a corrupted one's place, which is kept as `last.corrupted.pth`."""
    if path.exists():
        _link(path, path.with_suffix(f".corrupted{path.suffix}"))
    os.replace(good, path)  # moved: the next save keeps it once, as the one before


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read weights and what was saved with them; `model` holds the weights by name, on the CPU.

    The file is told by its content: safetensors, an OpenAI archive (TorchScript), or a file of
    `torch.save`, where weights may stand at the top or in an entry of `WRAPPERS`, however nested.
    If several have some, `assumed` says which was taken. What a wrapper added to the names
    (`module.`, `_orig_mod.`) is cut; what is no tensor is left out of `model`.

    Only dense tensors and plain values are accepted (`weights_only`), no more of them than the file
    has room for, and a hash in the file must be that of its content. Raises UnusableFile if the
    file is missing, corrupted or without weights, or another UserError.
    """
    path = Path(path)
    content = _read(path)
    found = list(_weights_in(content, set()))
    if not found:
        raise UnusableFile(
            f"{path}: no checkpoint: no weights in it; it holds {_described(content)}"
        )
    (place, weights), *others = found
    rest = {n: v for n, v in content.items() if n != place.split(".")[0] and not _is_weight(n, v)}
    also = [f"'{other}'" for other, its in others if other and len(its) >= len(weights) // 2]
    if also:
        rest["assumed"] = f"{path}: the weights of '{place}' are taken, not {', '.join(also)}"
    return {**rest, "model": _unwrapped(weights, path)}


def _read(path: Path) -> Any:
    """A file's content, by the format that its first bytes show."""
    try:
        with open_file(path) as file:
            start = file.read(9)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise UnusableFile(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    tensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size
    if tensors or (path.suffix == ".safetensors" and not _is_pickled(start)):
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise UnusableFile(f"{path}: not readable as safetensors: {error}") from None
    return _read_torchscript(path, size) if _is_torchscript(path) else _load(path, start, size)


def _is_pickled(start: bytes) -> bool:
    return start[:2] == b"PK" or start[:1] == b"\x80"  # torch.save's formats


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _weights_in(
    content: Any, seen: set[int], place: str = ""
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Where weights stand in a file, as "model.state_dict", and the weights; the first is meant.
    `seen`: ids of the dicts that were met, since a file may hold itself."""
    if not isinstance(content, dict) or place.count(".") > 3 or id(content) in seen:
        return
    seen.add(id(content))
    for name in WRAPPERS:
        yield from _weights_in(content.get(name), seen, f"{place}.{name}".lstrip("."))
    sizes = {"input_resolution", "context_length", "vocab_size"}  # records of OpenAI's archives
    tensors = {n: v for n, v in content.items() if _is_weight(n, v) and n not in sizes}
    if tensors:
        yield place, tensors


def _unwrapped(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights under the names that the model itself gives them."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        own = ".".join(part for part in name.split(".") if part not in WRAPPED)
        if own in found:
            raise UserError(f"{path}: has weights for '{own}' twice, once as '{name}'")
        found[own] = value
    return found


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    entries = [f"{name!s:.60} ({type(value).__name__})" for name, value in content.items()]
    return ", ".join(entries[:12] + ["..."] * (len(entries) > 12)) or "nothing"


def nonfinite_weights(weights: dict[str, Any]) -> list[str]:
    """Names of weights that hold NaN or infinite values. Waits for the device, once."""
    floats = {
        name: value if value.element_size() > 1 else value.float()
        for name, value in weights.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if not floats:
        return []
    alive = torch.stack([value.isfinite().all() for value in floats.values()]).tolist()
    return [name for name, good in zip(floats, alive, strict=True) if not good]


def refuse_nonfinite(weights: dict[str, Any], where: str | Path) -> None:
    """Raise UnusableFile if a weight holds NaN or infinite values."""
    found = nonfinite_weights(weights)
    if found:
        raise UnusableFile(f"{where}: {_told(found)}; take an earlier save")


def _told(names: list[str]) -> str:
    more = f" and {len(names) - 1} more hold" if len(names) > 1 else " holds"
    return f"{names[0]}{more} NaN or infinite values"


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
        shutil.copy2(source, target)


def _same(one: Path, other: Path) -> bool:
    """Whether `_link` has made one of the other."""
    try:
        a, b = one.stat(), other.stat()
    except OSError:
        return False
    if os.path.samestat(a, b):
        return True
    alike = (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
    return alike and filecmp.cmp(one, other, shallow=False)


def refuse_oversized(content: Any, size: int) -> None:
    """Raise ValueError unless `content` is of plain values and dense tensors, and as large as a
    file of `size` bytes can be.

    What stands in several places counts in each, as copying and hashing meet it; but it is looked
    at once.
    """
    known: dict[int, tuple[int, int] | None] = {}  # by id: values and bytes; None: under way
    looked = 0

    def measure(value: Any, place: str) -> tuple[int, int]:
        nonlocal looked
        looked += 1
        if isinstance(value, (str, bytes, bytearray)):
            return 1, len(value)
        if not isinstance(value, (Tensor, dict, list, tuple, set, frozenset)):
            return 1, 8
        if id(value) in known:
            if (found := known[id(value)]) is None:
                raise ValueError(f"{place} holds itself")
            return found
        known[id(value)] = None
        if isinstance(value, Tensor):
            if wrong := _not_plain(value):
                raise ValueError(f"{place or 'it'} is {wrong}")
            values, count = 1, value.numel() * value.element_size()
        else:
            values, count = 1, 8
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for name, part in parts:
                inner = place or f"'{name!s:.60}'"
                for found in (measure(name, inner), measure(part, inner)):
                    values, count = values + found[0], count + found[1]
        if values > SWELLING * looked + 100_000 or count > SWELLING * size + 2**20:
            raise ValueError(
                f"{place or 'it'} swells to {values} values of {count} bytes, from {looked} in a "
                f"file of {size} bytes"
            )
        known[id(value)] = values, count
        return values, count

    measure(content, "")


def _not_plain(tensor: Tensor) -> str:
    """What is odd about a tensor, or nothing."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "a sparse, quantized or nested tensor; save a dense one"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device} without values"
    return ""


def _load(path: Path, start: bytes, size: int) -> Any:
    """A file of `torch.save`, whose hash, if it has one, is that of its content."""
    try:
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                _refuse_compressed(archive.infolist(), size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's other protocols; an error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_oversized(content, size)
        corrupted = False
        if isinstance(content, dict) and HASH in content:  # other code's have none
            corrupted = content.pop(HASH) != digest(content)
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # corrupted bytes may send the reader anywhere
            raise UnusableFile(
                f"{path}: not readable as a checkpoint, or corrupted ({error})"
            ) from None
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory, or corrupted") from None
    except pickle.UnpicklingError as error:
        if not _is_pickled(start):
            raise UnusableFile(f"{path}: no checkpoint: not a file of torch.save") from None
        # torch's own words advise to load it unsafely; of them only the culprit is of use.
        found = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise UnusableFile(
            f"{path}: refused: it holds more than tensors and plain values, and loading it could "
            f"run code, or it is corrupted ({found.group() if found else 'unreadable'}). {CONVERT}"
        ) from None
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # a format of old that torch only reads unsafely
            raise UnusableFile(
                f"{path}: refused: torch.load could run code of it. {CONVERT}"
            ) from None
        kind = UserError if "can't allocate memory" in reason else UnusableFile
        raise kind(f"{path}: not readable as a checkpoint, or corrupted ({reason})") from None
    if corrupted:
        raise UnusableFile(
            f"{path}: corrupted: its content does not have the hash that it was saved with"
        )
    return content


def _refuse_compressed(records: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError if records of an archive of `size` bytes are more than it has bytes of. What
    torch saves is not compressed."""
    records = list(records)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {record.filename} is compressed")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_torchscript(path: Path, size: int) -> dict[str, Tensor]:
    """The parameters of a TorchScript archive, read as data.

    `torch.jit.load` would build the archive's program; only its tensors are wanted. The pickle
    inside is read by an unpickler that knows tensors and replaces every module of the program by
    an empty object, so no code of the file can run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            folder = record.removesuffix("data.pkl")  # the code beside it may be compressed
            used = [
                r for r in archive.infolist() if r.filename.startswith((record, f"{folder}data/"))
            ]
            _refuse_compressed(used, size)
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
    """The tensors of a TorchScript module and of those in it, each module once, by their names."""
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
        raise ValueError(f"at its root is a {type(root).__name__}, no module")
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
