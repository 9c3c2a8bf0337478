"""Resized images of a list of files, kept in one file on disk (`--image_cache FOLDER`).

Decoding costs more than all else that a loader does. The cache is a NumPy file [N, 3, H, W] uint8
whose name holds a hash of what it was made from: the images' paths, file sizes and times of change,
and the size. So a cache of other or changed images has another name and is never read, processes
may share one or make it at the same time, and memory is mapped, not filled. Images that cannot be
read end its making, or with `--on_bad_image skip` are named in a JSON file beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from datasets.transforms import BrokenImage, load_image
from utils.errors import UserError
from utils.files import write_atomically
from utils.interrupt import serve_training

MAX_WORKERS = 256
ABANDONED = 3600  # seconds after which an unfinished cache that nobody writes to is deleted
VERSION = 3  # raise it when the bytes made from the same image change


class ImageFiles(Dataset):
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
        self.cache: np.ndarray | None = None
        self.broken: dict[str, str] = {}  # of a cache: messages by row
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
        if str(self.rows[index]) in self.broken:
            raise BrokenImage(self.broken[str(self.rows[index])])
        image = self.cache[self.rows[index]]
        return torch.from_numpy(np.array(image))  # a copy, since the map is read-only

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
            self._write(path, num_workers, skip)
        try:
            self.cache = np.load(path, mmap_mode="r")
            self.broken = json.loads(_beside(path).read_text(encoding="utf-8"))
            fitting = self.cache.shape == (1 + max(self.rows), 3, *self.size)
            if not fitting or not isinstance(self.broken, dict):
                raise ValueError("it has another shape than its images")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the cache cannot be read: {error}; delete it") from None
        if self.broken and not skip:
            raise BrokenImage(next(iter(self.broken.values())))

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

        def write(file) -> None:
            shape = (len(paths), 3, *self.size)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            done = 0
            serve = functools.partial(serve_training, os.getpid())
            loader = DataLoader(files, 64, num_workers=num_workers, worker_init_fn=serve)
            for images, messages in loader:
                file.write(images.numpy())  # not mapped: a full disk is then an error, not a crash
                broken.update({done + i: text for i, text in enumerate(messages) if text})
                done += len(images)
                bar.update(len(images))

        def note() -> None:
            text = json.dumps(broken, indent=1).encode()
            write_atomically(_beside(path), lambda file: file.write(text))

        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
            with suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        with bar:
            write_atomically(path, write, before=note)


class _Lenient(Dataset):
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


def _beside(path: Path) -> Path:
    return path.with_suffix(".broken.json")
