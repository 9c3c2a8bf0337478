"""Files that are never half written, and folders that one process works in at a time.

What stands in a folder may be a stranger's. So only regular files are read (a pipe keeps its reader
waiting for ever), and what is written goes into files of our own: never through a link.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import IO, BinaryIO

from utils.errors import UserError
from utils.logger import LOGGER_NAME, say
from utils.text import visible

# What file systems answer that do not know how to sync a folder, or to change a file's rights.
UNKNOWN_HERE = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM,
    errno.EACCES,
}  # fmt: skip


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


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file to read it. Raises OSError, also for a pipe, a device or a folder."""
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


def append(path: Path) -> TextIOWrapper:
    """A text file to add lines to; it is made if there is none. Raises UserError if it cannot be
    opened, or is a link or no regular file. One that another folder shares (`cp -al`) is parted
    from it first."""
    descriptor = _open_own(path, os.O_WRONLY | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        with open_file(path) as old:
            write_atomically(path, lambda new: shutil.copyfileobj(old, new))
        descriptor = _open_own(path, os.O_WRONLY | os.O_APPEND)
    return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that this program makes, and nobody else."""
    more = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | more, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path}: {error.strerror}; a run writes into it") from None
    raise UserError(
        f"{path}: a link, a folder or a pipe; a run writes only into files of its own: remove it"
    )


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], before: Callable[[], object] = lambda: None
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
            _tolerant(path.parent, "synced to disk", lambda: os.fsync(file.fileno()))
            rights = 0o666 & ~umask()  # NamedTemporaryFile makes files private
            _tolerant(path.parent, "given rights", lambda: os.fchmod(file.fileno(), rights))
        before()
        os.replace(temporary, path)
        _tolerant(path.parent, "synced to disk", lambda: _sync_folder(path.parent))
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
    for pattern in (".*.pth.*", ".*.yaml.*", ".*.jsonl.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def lock(folder: Path, inherited: bool = False, name: str = "lock", wait: bool = False) -> int:
    """A lock on a folder, as a file descriptor, until the process ends; if `inherited`, until all
    its children have ended too. A file system that has no locks is warned of. Raises UserError if
    another process has it, or if the folder is not writable.

    Args:
        name: of the file that is locked; another one is another lock.
        wait: for the process that has it, instead of raising.
    """
    descriptor = _open_own(folder / name, os.O_RDWR)
    try:
        take = fcntl.flock if inherited else fcntl.lockf
        take(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _warn_once(f"{folder}: cannot be locked ({error.strerror}): start no second run in it")
            return descriptor
        shared = os.fstat(descriptor).st_nlink > 1
        os.close(descriptor)
        where = "in a copy of it that shares its files (cp -al)" if shared else "here"
        raise UserError(
            f"{folder}: another process is at work {where}; run it again later"
        ) from None
    return descriptor


def _tolerant(folder: Path, what: str, action: Callable[[], object]) -> None:
    """Do what some file systems cannot: where this one cannot, it is said once."""
    try:
        action()
    except OSError as error:
        if error.errno not in UNKNOWN_HERE:
            raise
        _warn_once(f"{folder}: files there cannot be {what} ({error.strerror}); going on without")


@functools.cache
def _warn_once(text: str) -> None:
    log = logging.getLogger(LOGGER_NAME)
    if log.handlers:
        log.warning(text)
    else:  # there is no log yet
        say(visible(text), sys.stderr)


def umask() -> int:
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
