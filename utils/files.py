"""Files that are never half written, and folders that one process works in at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


def expand(path: str) -> str:
    """A path that was typed or stands in a preset, with `~` and `~user` as a shell has them: shells
    leave them alone in `--root_dir=~/data`. Raises UserError if nobody says where home is."""
    found = os.path.expanduser(path)
    if found.split(os.sep)[0] == "~":
        raise UserError(f"{path}: no home folder is known here; set HOME, or write the path out")
    return found


def path_option(text: str) -> Path:
    """For argparse: the path that was typed."""
    return Path(expand(text))


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], before: Callable[[], object] = lambda: None
) -> None:
    """Write beside `path`, sync to disk, then rename: readers see the old file or the new one.

    `before` runs when the new file is whole and the old one still in place. Raises UserError when
    the disk refuses (full, read-only); the old file is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # NamedTemporaryFile makes files private
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        # torch's writer covers the system's error with one of its own.
        for reason in (error, error.__context__):
            if isinstance(reason, OSError):
                text = reason.strerror or reason
                raise UserError(f"{path}: could not be written: {text}") from error
        raise


def check_writable(folder: Path) -> None:
    """Before hours are spent on what is to be written there. Raises UserError."""
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {os.strerror(errno.EACCES)}; results are written into it")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half written; for a folder that is locked."""
    for pattern in (".*.pth.*", ".*.yaml.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def lock(folder: Path, inherited: bool = False) -> int:
    """A lock on a folder, as a file descriptor, until the process ends; if `inherited`, until all
    its children have ended too. A file system that has no locks is warned of. Raises UserError if
    another process has it, or if the folder is not writable."""
    try:
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; a run writes into it") from None
    try:
        take = fcntl.flock if inherited else fcntl.lockf
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            text = f"{folder}: cannot be locked ({error.strerror}): start no second run in it"
            print(text, file=sys.stderr)
            return descriptor
        os.close(descriptor)
        raise UserError(f"{folder}: another process is at work here; run it again later") from None
    return descriptor


def _umask() -> int:
    """The rights that the user's new files do not get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """So that the new name, too, survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
