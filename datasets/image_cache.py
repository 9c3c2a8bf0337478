"""Image files, read one by one or from a cache of resized images on disk (`--image_cache FOLDER`).

Decoding takes more time than all other work of a loader. The cache is a NumPy file [N, 3, H, W]
uint8. Its name contains a hash of its content: the images' paths, file sizes and modification
times, and the height and width. So a cache of other or changed images has another name and is never
read. Processes may share a cache; one of them makes it while the others wait. An image that cannot
be read is an error; with `--on_bad_image skip` it is listed in a JSON file next to the cache.

A cache may belong to another user, for example in the shared folder of a laboratory. So it is
checked: some of its images are decoded again and compared, and a warning names the other users who
could have written it.
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
from itertools import repeat
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from datasets.images import BrokenImage
from datasets.shards import image_status
from datasets.transforms import load_image
from utils.console import LOGGER_NAME, process_rank
from utils.documents import load_json
from utils.errors import UserError
from utils.files import open_file, read_file, umask, write_atomically
from utils.interrupt import init_worker_signals

MAX_WORKERS = 256
COMPARED = 8  # images that are decoded again when a cache is opened, in a tenth of a second
TOLERANCE = 3  # mean difference in grey levels; other versions of a decoder differ by less than 1
VERSION = 3  # increase it when the same image gives other bytes
SAFE = (
    os.O_NOFOLLOW | os.O_NONBLOCK
)  # does not follow links, and does not wait for the reader of a pipe


class ImageFiles(Dataset[Tensor]):
    """Images [3, H, W] uint8 of a list of files, by position, decoded or read from a cache.

    Args:
        paths: image files.
        size: height and width.
        entries: the annotation entry that names each file, for messages; optional.
    """

    def __init__(
        self, paths: Sequence[str], size: tuple[int, int], entries: Sequence[str] = ()
    ) -> None:
        self.paths, self.size, self.entries = paths, size, entries
        self.cache: _Cache | None = None
        self.rows = np.zeros(0, np.int64)  # by position, the row in the cache
        # Of each loader process: its process id and the position it reads. All processes see it.
        self.reading = torch.full((MAX_WORKERS, 2), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        worker = get_worker_info()
        if worker is not None and worker.id < MAX_WORKERS:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        if self.cache is None:
            entry = self.entries[index] if self.entries else ""
            return load_image(self.paths[index], self.size, entry)
        return self.cache[int(self.rows[index])]

    def last_read(self, pids: Sequence[int]) -> list[str]:
        """The images that the loader processes with these process ids read last."""
        positions = [index for pid, index in self.reading.tolist() if pid in pids]
        entries = self.entries or [""] * len(self.paths)
        return [f"{self.paths[i]} ({entries[i]})".removesuffix(" ()") for i in positions]

    def use_cache(self, folder: str | Path, num_workers: int = 0, skip: bool = False) -> None:
        """Read from the cache in `folder` from now on. If there is none, make it first.

        Raises UserError if an image is missing or broken, or if the cache cannot be written. With
        `skip`, a broken image raises BrokenImage only when it is read from the cache.
        """
        # An image with several captions is several times in the list, but once in the cache.
        rows: dict[str, int] = {}
        self.rows = np.fromiter(
            (rows.setdefault(p, len(rows)) for p in self.paths), np.int64, len(self.paths)
        )
        path = Path(folder) / f"images-{self.size[0]}x{self.size[1]}-{self._hash()}.npy"
        if not path.exists():
            with locked(path) as alone:
                if alone:
                    _remove_unfinished(path)
                if not path.exists():  # another process may have made it meanwhile
                    self._write(path, num_workers, skip)
        self.cache = cache = _Cache(path, (len(rows), 3, *self.size))
        self._compare(cache)
        if cache.broken and not skip:
            raise BrokenImage(next(iter(cache.broken.values())))

    def _compare(self, cache: _Cache) -> None:
        """Compare the first, the last and some random images of the cache with their files. Raises
        UserError if they differ, BrokenImage if a file can no longer be read."""
        paths, entries = self._distinct()
        last, others = len(paths) - 1, cache.other_writers()
        inner = range(1, last)
        # From the system's generator: whoever forges a cache cannot predict which are compared.
        random_rows = random.SystemRandom().sample(inner, min(COMPARED - 2, len(inner)))
        rows = sorted({0, last, *random_rows})
        for row in rows:
            broken = str(row) in cache.broken
            try:
                image = load_image(paths[row], self.size, entries[row])
            except BrokenImage:
                if not broken:
                    raise
                continue
            if broken or (cache[row].float() - image.float()).abs().mean() > TOLERANCE:
                writers = f" (the cache {others})" if others else ""
                raise UserError(
                    f"{cache.path}: the cache holds another image than {paths[row]}{writers}; "
                    "delete the cache"
                )
        if others and process_rank() == 0:
            logging.getLogger(LOGGER_NAME).warning(
                f"{cache.path}: this cache {others}; {len(rows)} of its {last + 1} images were "
                "compared with their files and agree, the others were not checked"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{VERSION} {self.size}".encode())
        for path, entry in zip(*self._distinct(), strict=True):
            try:
                status = image_status(path)
            except OSError as error:
                where = f"{path} ({entry})".removesuffix(" ()")
                raise UserError(f"{where}: {error.strerror}") from None
            absolute = os.path.abspath(path)
            digest.update(b"\n" + os.fsencode(absolute))
            digest.update(f"\0{status.size}\0{status.mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def _distinct(self) -> tuple[list[str], list[str]]:
        """Each path once, and the first entry of each."""
        entries: dict[str, str] = {}
        for path, entry in zip(self.paths, self.entries or repeat(""), strict=False):
            entries.setdefault(path, entry)
        return list(entries), list(entries.values())

    def _write(self, path: Path, num_workers: int, skip: bool) -> None:
        paths, entries = self._distinct()
        files = _WithMessages(ImageFiles(paths, self.size, entries), skip)
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
                # Not through a memory map, where a full disk would kill the process (SIGBUS).
                file.write(images.numpy())
                broken.update({done + i: text for i, text in enumerate(messages) if text})
                done += len(images)
                bar.update(len(images))

        def write_broken() -> None:
            text = json.dumps(broken, indent=1).encode()
            write_atomically(_broken_list(path), lambda file: file.write(text))

        with bar:
            write_atomically(path, write, before=write_broken)


class _WithMessages(Dataset[tuple[Tensor, str]]):
    """(image, "") by position. With `skip`, a broken image is (a black image, error message)."""

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

    The file is read, not memory-mapped: if another program truncates it, that is an error and does
    not kill the process (SIGBUS). Raises UserError if the file is not such a cache, and BrokenImage
    for the row of an image that could not be read.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.length = int(np.prod(shape[1:]))
        try:
            self.file = open_file(path)
            if np.lib.format.read_magic(self.file) != (1, 0):
                raise ValueError("it has another version of NumPy's format")
            actual, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
            if (actual, fortran, dtype) != (shape, False, np.dtype(np.uint8)):
                order = " in Fortran order" if fortran else ""
                raise ValueError(f"it holds {dtype}{actual}{order} instead of uint8{shape}")
            self.start = self.file.tell()
            length = os.fstat(self.file.fileno()).st_size
            if length != (expected := self.start + shape[0] * self.length):
                raise ValueError(f"it has {length} bytes instead of {expected}")
            self.broken = load_json(read_file(_broken_list(path)))
            if not isinstance(self.broken, dict) or not all(
                isinstance(text, str) for text in self.broken.values()
            ):
                raise ValueError(f"{_broken_list(path).name} is not a list of broken images")
        except Exception as error:  # NumPy's parser raises many kinds on a corrupted header
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
                    raise ValueError("another program has truncated it")
                done += got
        except (OSError, ValueError) as error:
            self._refuse(error)
        return torch.from_numpy(content.reshape(self.shape[1:]))

    def _refuse(self, error: Exception) -> NoReturn:
        raise UserError(f"{self.path}: the cache cannot be read: {error}; delete it") from None

    def other_writers(self) -> str:
        """Which other users may have written it, to follow "the cache" in a message; or ""."""
        for path in (self.path, _broken_list(self.path)):
            status = os.stat(path)
            if status.st_uid != os.geteuid():
                return f"belongs to {_user_name(status.st_uid)}"
            if status.st_mode & 0o022 & umask():
                return "may be changed by other users"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are not forked: without the open file."""
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.file = open_file(self.path)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock on making a cache; other processes wait. Yields False if there is no lock: the
    file system has none, or this user may not open another user's lock.

    fcntl's lock belongs to this process only, so loader processes that outlive it do not keep it.
    """
    lock, file = path.with_name(f".{path.name}.lock"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while file is None or not _is_at(file, lock):  # the last holder has removed this file
            file = open(lock, "ab", opener=lambda name, flags: os.open(name, flags | SAFE, 0o666))  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                text = f"{path}: another process is making this cache; waiting for it"
                logging.getLogger(LOGGER_NAME).warning(text)
                fcntl.lockf(file, fcntl.LOCK_EX)
        alone = True
    except OSError:  # if the folder is not writable, writing the cache will report it
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
    """Delete the temporary files of killed processes. The caller must hold the lock."""
    for target in (path, _broken_list(path)):
        for temporary in path.parent.glob(f".{target.name}.*"):
            if temporary.suffix != ".lock":
                with suppress(OSError):  # another user's file, or a folder
                    temporary.unlink()


def _user_name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:  # a user of another machine
        return f"user {uid}"


def _broken_list(path: Path) -> Path:
    """The JSON file next to a cache: by row, the error message of each broken image."""
    return path.with_suffix(".broken.json")
