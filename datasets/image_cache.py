"""Resized images of a list of files, kept in one file on disk (`--image_cache FOLDER`).

Decoding costs more than all else that a loader does. The cache is a NumPy file [N, 3, H, W] uint8
whose name holds a hash of what it was made from: the images' paths, file sizes and times of change,
and the size. So a cache of other or changed images has another name and is never read. Processes
may share one, and of several that want it made one makes it. Images that cannot be read end its
making, or with `--on_bad_image skip` are named in a JSON file beside it.

A cache may be another user's, as in a folder that a laboratory shares. So it is not taken on trust:
some of its images are decoded anew and compared, and whoever else could have written it is named.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pwd
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from datasets.transforms import BrokenImage, load_image
from utils.documents import load_json
from utils.errors import UserError, rank
from utils.files import open_file, read_file, umask, write_atomically
from utils.interrupt import init_worker_signals
from utils.logger import LOGGER_NAME

MAX_WORKERS = 256
COMPARED = 8  # images of a cache that are decoded anew when it is opened; a tenth of a second
OWN = os.O_NOFOLLOW | os.O_NONBLOCK  # through no link, and no pipe that waits for a reader
ALIKE = 3  # levels, on average; decoders of another version or machine differ by less than one
VERSION = 3  # raise it when the bytes made from the same image change


class ImageFiles(Dataset[Tensor]):
    """Images [3, H, W] uint8 of a list of files, by position: read anew, or from a cache.

    Args:
        paths: image files.
        size: height and width.
        entries: where each file is named, for messages; empty strings if absent.
    """

    def __init__(
        self, paths: Sequence[str], size: tuple[int, int], entries: Sequence[str] = ()
    ) -> None:
        self.paths, self.size = list(paths), size
        self.entries = list(entries) or [""] * len(self.paths)
        self.cache: _Cache | None = None
        # A picture with several captions comes several times; the cache holds it once.
        rows = {path: row for row, path in enumerate(dict.fromkeys(self.paths))}
        self.rows = [rows[path] for path in self.paths]
        # What each loader process reads: its process id and the position, seen by all processes.
        self.reading = torch.full((MAX_WORKERS, 2), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        worker = get_worker_info()
        if worker is not None and worker.id < MAX_WORKERS:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        if self.cache is None:
            return load_image(self.paths[index], self.size, self.entries[index])
        return self.cache[self.rows[index]]

    def last_read(self, pids: Sequence[int]) -> list[str]:
        """The images that loader processes were reading, or had read last."""
        found = [index for pid, index in self.reading.tolist() if pid in pids]
        return [f"{self.paths[i]} ({self.entries[i]})".removesuffix(" ()") for i in found]

    def use_cache(self, folder: str | Path, num_workers: int = 0, skip: bool = False) -> None:
        """Read from the cache in `folder` from now on; make it first if it is not there.

        Raises UserError if an image is missing or broken, or the cache cannot be written; with
        `skip` a broken image raises when it is read from the cache.
        """
        path = Path(folder) / f"images-{self.size[0]}x{self.size[1]}-{self._hash()}.npy"
        if not path.exists():
            with _alone(path) as alone:
                if alone:
                    _remove_unfinished(path)
                if not path.exists():  # nobody has made it meanwhile
                    self._write(path, num_workers, skip)
        self.cache = cache = _Cache(path, (1 + max(self.rows), 3, *self.size))
        self._compare(cache)
        if cache.broken and not skip:
            raise BrokenImage(next(iter(cache.broken.values())))

    def _compare(self, cache: _Cache) -> None:
        """Raise UserError unless the cache holds the images that it is named after: the first, the
        last and some that nobody could foresee. BrokenImage if one cannot be read any more."""
        paths, entries = self._distinct()
        last, others = len(paths) - 1, cache.others()
        inner = range(1, last)
        drawn = random.SystemRandom().sample(inner, min(COMPARED - 2, len(inner)))
        rows = sorted({0, last, *drawn})
        for row in rows:
            broken = str(row) in cache.broken
            try:
                anew = load_image(paths[row], self.size, entries[row])
            except BrokenImage:
                if not broken:
                    raise
                continue
            if broken or (cache[row].float() - anew.float()).abs().mean() > ALIKE:
                raise UserError(
                    f"{cache.path}: the cache holds for {paths[row]} something else than that file"
                    + (f", and {others}" if others else "")
                    + "; delete it"
                )
        if others and rank() == 0:
            logging.getLogger(LOGGER_NAME).warning(
                f"{cache.path}: this cache {others}; {len(rows)} of its {last + 1} images were "
                "compared with their files and are alike, the others are taken on trust"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{VERSION} {self.size}".encode())
        for path, entry in zip(*self._distinct(), strict=True):
            try:
                found = os.stat(path)
            except OSError as error:
                where = f"{path} ({entry})".removesuffix(" ()")
                raise UserError(f"{where}: {error.strerror}") from None
            absolute = os.path.abspath(path)
            digest.update(b"\n" + os.fsencode(absolute))
            digest.update(f"\0{found.st_size}\0{found.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def _distinct(self) -> tuple[list[str], list[str]]:
        entries = dict(zip(reversed(self.paths), reversed(self.entries), strict=True))
        return list(dict.fromkeys(self.paths)), [entries[p] for p in dict.fromkeys(self.paths)]

    def _write(self, path: Path, num_workers: int, skip: bool) -> None:
        paths, entries = self._distinct()
        files = _Lenient(ImageFiles(paths, self.size, entries), skip)
        bar = tqdm(total=len(paths), desc=f"resize into {path.parent}", unit="image", disable=None)
        broken: dict[int, str] = {}

        def write(file: IO[bytes]) -> None:
            shape = (len(paths), 3, *self.size)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            done = 0
            serve = functools.partial(init_worker_signals, os.getpid())
            loader = DataLoader(files, 64, num_workers=num_workers, worker_init_fn=serve)
            for images, messages in loader:
                file.write(images.numpy())  # not mapped: a full disk is then an error, not a crash
                broken.update({done + i: text for i, text in enumerate(messages) if text})
                done += len(images)
                bar.update(len(images))

        def note() -> None:
            text = json.dumps(broken, indent=1).encode()
            write_atomically(_beside(path), lambda file: file.write(text))

        with bar:
            write_atomically(path, write, before=note)


class _Lenient(Dataset[tuple[Tensor, str]]):
    """Images with an empty message; if `skip`, a broken one as a black image with its message."""

    def __init__(self, files: ImageFiles, skip: bool) -> None:
        self.files, self.skip = files, skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.files[index], ""
        except BrokenImage as error:
            if not self.skip:
                raise
            return torch.zeros((3, *self.files.size), dtype=torch.uint8), str(error)


class _Cache:
    """The images of a cache file [N, 3, H, W] uint8, by row.

    They are read, not mapped: a file that is cut meanwhile is then an error, and not the end of the
    process (SIGBUS). Raises UserError if the file is not such a cache; BrokenImage for the row of
    an image that could not be read.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.length = int(np.prod(shape[1:]))
        try:
            self.file = open_file(path)
            if np.lib.format.read_magic(self.file) != (1, 0):
                raise ValueError("it is of another version of NumPy's format")
            found, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
            if (found, fortran, dtype) != (shape, False, np.dtype(np.uint8)):
                order = " by columns" if fortran else ""
                raise ValueError(f"it holds {dtype}{found}{order} instead of uint8{shape}")
            self.start = self.file.tell()
            length = os.fstat(self.file.fileno()).st_size
            if length != (whole := self.start + shape[0] * self.length):
                raise ValueError(f"it has {length} bytes instead of {whole}")
            self.broken = load_json(read_file(_beside(path)))
            if not isinstance(self.broken, dict) or not all(
                isinstance(text, str) for text in self.broken.values()
            ):
                raise ValueError(f"{_beside(path).name} is no list of broken images")
        except Exception as error:  # what parses a header raises nearly anything
            self._refuse(error)

    def __getitem__(self, row: int) -> Tensor:
        if str(row) in self.broken:
            raise BrokenImage(self.broken[str(row)])
        content, done = np.empty(self.length, np.uint8), 0
        start = self.start + row * self.length
        try:
            while done < self.length:
                rest = content.data[done:]
                got = os.preadv(self.file.fileno(), [rest], start + done)
                if not got:
                    raise ValueError("it ends before its images do; another program has cut it")
                done += got
        except (OSError, ValueError) as error:
            self._refuse(error)
        return torch.from_numpy(content.reshape(self.shape[1:]))

    def _refuse(self, error: Exception) -> NoReturn:
        raise UserError(f"{self.path}: the cache cannot be read: {error}; delete it") from None

    def others(self) -> str:
        """Who else than this user may have written it, to stand behind "the cache"; or nothing."""
        for path in (self.path, _beside(self.path)):
            found = os.stat(path)
            if found.st_uid != os.geteuid():
                return f"belongs to {_name(found.st_uid)}"
            if found.st_mode & 0o022 & umask():
                return "may be changed by other users"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are not forked."""
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.file = open_file(self.path)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While one process makes a cache, others wait here. Gives whether this one is known to be
    alone: not where the file system has no locks, or another user's lock may not be opened.

    The lock is the process's own, so that loader processes that outlive it do not keep it.
    """
    lock, file = path.with_name(f".{path.name}.lock"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while file is None or not _is_at(file, lock):  # who had it has removed it
            file = open(lock, "ab", opener=lambda name, flags: os.open(name, flags | OWN, 0o666))  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                text = f"{path}: another process is making it; waiting for that"
                logging.getLogger(LOGGER_NAME).warning(text)
                fcntl.lockf(file, fcntl.LOCK_EX)
        alone = True
    except OSError:  # a folder that cannot be written to is told of by what writes there
        alone = False
    try:
        yield alone
    finally:
        if alone:
            with suppress(OSError):
                lock.unlink()
        if file is not None:
            file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_unfinished(path: Path) -> None:
    """Delete what killed processes have left of a cache; for one that is alone."""
    for whole in (path, _beside(path)):
        for left in path.parent.glob(f".{whole.name}.*"):
            if left.suffix != ".lock":
                with suppress(OSError):  # another user's, or a folder
                    left.unlink()


def _name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:  # of another machine
        return f"user {uid}"


def _beside(path: Path) -> Path:
    return path.with_suffix(".broken.json")
