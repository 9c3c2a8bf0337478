"""Atomic writes, and locks on folders.

Files in a folder may come from an untrusted user. So only regular files are read (a pipe blocks its
reader forever), and nothing is written through a link.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, BinaryIO

from utils.console import LOGGER_NAME, say
from utils.errors import UserError
from utils.text import visible

PROJECT = Path(os.path.abspath(__file__)).parent.parent  # the folder of train.py
# Seconds. A killed process holds its locks until the system has freed its memory.
PATIENCE = 3.0
# Errors of file systems that cannot sync a folder, or change the mode of a file.
UNSUPPORTED = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM,
    errno.EACCES,
}  # fmt: skip


def expand(path: str) -> str:
    """Replace `~` and `~user` by the home folder; shells do not do so in `--root_dir=~/data`.

    Raises UserError if the home folder is unknown.
    """
    expanded = os.path.expanduser(path)
    if expanded.split(os.sep)[0] == "~":
        raise UserError(f"{path}: no home folder is known here; set HOME, or write the path out")
    return expanded


def path_option(text: str) -> Path:
    """The path of an argument; a type for argparse."""
    return Path(expand(text))


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for a pipe, a device or a folder."""
    file = open(  # noqa: SIM115  the caller closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def add_to_hash(digest: Any, path: str | Path) -> None:
    """Add the bytes of a regular file to a hash of hashlib. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        while block := file.read(2**20):  # hashlib.file_digest is not in Python 3.10
            digest.update(block)


def file_hash(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises UserError."""
    digest = hashlib.sha256()
    try:
        add_to_hash(digest, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def append(path: Path) -> TextIOWrapper:
    """Open a text file for appending, and make it if it does not exist. A file with hard links in
    other folders (`cp -al`) is copied first, so that these do not change. Raises UserError if it
    cannot be opened, or is a link or not a regular file."""
    descriptor = _open_nofollow(path, os.O_WRONLY | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        with open_file(path) as old:
            write_atomically(path, lambda new: shutil.copyfileobj(old, new))
        descriptor = _open_nofollow(path, os.O_WRONLY | os.O_APPEND)
    return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], before: Callable[[], object] = lambda: None
) -> None:
    """Write a temporary file, sync it to disk, then rename it to `path`.

    Readers see the complete old file or the complete new one.

    `before` runs when the new file is complete and the old one still in place. Raises UserError on
    an error of the disk (full, read-only); the old file is then unchanged.
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
            _if_supported(path.parent, "synced to disk", lambda: os.fsync(file.fileno()))
            mode = 0o666 & ~umask()  # NamedTemporaryFile makes private files
            _if_supported(path.parent, "given permissions", lambda: os.fchmod(file.fileno(), mode))
        before()
        os.replace(temporary, path)
        _if_supported(path.parent, "synced to disk", lambda: _sync_folder(path.parent))
    except BaseException as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        # torch's writer hides the system's error behind its own.
        for reason in (error, error.__context__):
            if isinstance(reason, OSError):
                text = reason.strerror or reason
                raise UserError(f"{path}: could not be written: {text}") from error
        raise


def check_writable(folder: Path) -> None:
    """Raise UserError if results cannot be written into a folder, before they are computed."""
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {os.strerror(errno.EACCES)}; results are written into it")


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files of killed processes. The caller has locked the folder."""
    for pattern in (".*.pth.*", ".*.yaml.*", ".*.jsonl.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def lock(folder: Path, inherited: bool = False, name: str = "lock", wait: bool = False) -> int:
    """Lock a folder until the process ends. Returns the file descriptor that holds the lock.

    Logs a warning if the file system has no locks. Raises UserError if another process holds the
    lock for longer than PATIENCE, or if the folder is not writable.

    Args:
        inherited: hold the lock until all child processes have ended too.
        name: of the file that is locked; each name is a lock of its own.
        wait: wait for the process that holds the lock, instead of raising.
    """
    descriptor = _open_nofollow(folder / name, os.O_RDWR)
    try:
        take = fcntl.flock if inherited else fcntl.lockf
        deadline = time.monotonic() + PATIENCE
        while not wait and time.monotonic() < deadline:
            with suppress(BlockingIOError, PermissionError):
                take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.05)
        take(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _warn_once(f"{folder}: cannot be locked ({error.strerror}): start no second run in it")
            return descriptor
        linked = os.fstat(descriptor).st_nlink > 1
        os.close(descriptor)
        what = "a copy of it that shares its files (cp -al)" if linked else "this folder"
        raise UserError(f"{folder}: another process is using {what}; try again later") from None
    return descriptor


def umask() -> int:
    """The user's mask for the modes of new files. Reading it requires setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _open_nofollow(path: Path, flags: int) -> int:
    """A descriptor of a regular file, which is made if it does not exist. Raises UserError."""
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path}: {error.strerror}; a run writes into it") from None
    raise UserError(
        f"{path}: a link, a folder or a pipe; a run writes only into regular files: remove it"
    )


def _if_supported(folder: Path, what: str, action: Callable[[], object]) -> None:
    """Run an action; if the file system does not support it, warn once and continue."""
    try:
        action()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(f"{folder}: files there cannot be {what} ({error.strerror}); continuing without")


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning, the same one only once."""
    log = logging.getLogger(LOGGER_NAME)
    if log.handlers:
        log.warning(text)
    else:  # the log is not set up yet
        say(visible(text), sys.stderr)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries, so that the new name survives a loss of power too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
