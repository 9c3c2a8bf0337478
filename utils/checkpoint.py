"""Read and write weights and checkpoints, without running code from a file."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from utils.errors import UserError
from utils.expansion import refuse_compressed, refuse_oversized
from utils.files import open_file, write_atomically
from utils.torchscript import is_torchscript, read_torchscript

HASH = "sha256"  # entry of a checkpoint: the hash of all its other entries
# Entries in which other code keeps a model's weights; the first of them in this order is taken.
WEIGHT_ENTRIES = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model",
)  # fmt: skip
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
    return read_torchscript(path, size) if is_torchscript(path) else _load(path, start, size)


def _is_pickled(start: bytes) -> bool:
    return start[:2] == b"PK" or start[:1] == b"\x80"  # torch.save's formats


def _load(path: Path, start: bytes, size: int) -> Any:
    """The content of a file of `torch.save`; its hash, if there is one, is checked and removed."""
    try:
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                refuse_compressed(archive.infolist(), size)
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
