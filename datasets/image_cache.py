"""Resized images of a list of files, kept in one file on disk (`--image_cache FOLDER`).

Decoding costs more than all else that a loader does. The cache is a NumPy file [N, 3, H, W] uint8
whose name holds a hash of what it was made from: the images' paths, file sizes and times of change,
and the size. So a cache of other or changed images has another name and is never read, processes
may share one or make it at the same time, and memory is mapped, not filled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.transforms import load_image
from utils.errors import UserError
from utils.files import write_atomically

VERSION = 1  # raise it when the bytes made from the same image change


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
        # A picture with several captions comes several times; the cache holds it once.
        rows = {path: row for row, path in enumerate(dict.fromkeys(self.paths))}
        self.rows = [rows[path] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.cache is not None:
            image = self.cache[self.rows[index]]
            return torch.from_numpy(np.array(image))  # a copy, since the map is read-only
        return load_image(self.paths[index], self.size, self.entries[index])

    def use_cache(self, folder: str | Path, num_workers: int = 0) -> None:
        """Read from the cache in `folder` from now on; make it first if it is not there.

        Raises UserError if an image is missing or broken, or the cache cannot be written.
        """
        path = Path(folder) / f"images-{self.size[0]}x{self.size[1]}-{self._hash()}.npy"
        if not path.exists():
            self._write(path, num_workers)
        try:
            self.cache = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the cache cannot be read: {error}; delete it") from None

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{VERSION} {self.size}".encode())
        for path, entry in zip(*self._distinct(), strict=True):
            try:
                found = os.stat(path)
            except OSError as error:
                raise UserError(f"{path} ({entry}): {error.strerror}") from None
            absolute = os.path.abspath(path)
            digest.update(f"\n{absolute}\0{found.st_size}\0{found.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def _distinct(self) -> tuple[list[str], list[str]]:
        entries = dict(zip(reversed(self.paths), reversed(self.entries), strict=True))
        return list(dict.fromkeys(self.paths)), [entries[p] for p in dict.fromkeys(self.paths)]

    def _write(self, path: Path, num_workers: int) -> None:
        paths, entries = self._distinct()
        batches = DataLoader(ImageFiles(paths, self.size, entries), 64, num_workers=num_workers)
        bar = tqdm(total=len(paths), desc=f"resize into {path.parent}", unit="image", disable=None)

        def write(file) -> None:
            shape = (len(paths), 3, *self.size)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:  # written, not mapped: a full disk is then an error, not a crash
                file.write(batch.numpy())
                bar.update(len(batch))

        with bar:
            write_atomically(path, write)
