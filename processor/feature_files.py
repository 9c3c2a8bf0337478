"""Features of a split in files, by shards: a killed evaluation goes on with those that are missing.

A folder holds manifest.json, and for the captions and for each view

- NAME.json: the captions, or the paths of the images (of equal ones the first) below the data set,
- NAME-00000.npy, NAME-00001.npy, ...: their features as the model gives them, [rows, D] of float32
  (float64 for an fp64 model). All shards have the same number of rows, but the last may have fewer.

32 bytes follow the array in a shard: SHA-256 of the manifest's content and the array. So a shard of
another evaluation, or a corrupted one, is noticed. NumPy does not read them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.shards import image_status
from utils.console import LOGGER_NAME
from utils.distributed import Processes
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import lock, open_file, write_atomically

SHARD_ROWS = 8192  # about; it is a multiple of --test_batch_size, since features depend on batches
MANIFEST = "manifest.json"
SEAL = 32  # bytes


class FeatureFiles:
    """The files of one split. All processes open the same folder, which all their nodes share.

    Args:
        folder: is made if it does not exist, and locked.
        about: what the features depend on, apart from captions and images; for the manifest.
        captions: of the split.
        images: by view, the paths of images.
        root: folder of the data set; the names of images in the files are relative to it.
        batch_size: rows that are encoded together.

    Raises UserError if the folder is of another evaluation, is used by another process, or cannot
    be written.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        captions: list[str],
        images: Mapping[str, Sequence[str]],
        root: str,
        batch_size: int,
        processes: Processes,
    ) -> None:
        self.folder, self.processes = folder, processes
        self.rows = max(1, SHARD_ROWS // batch_size) * batch_size
        names = {v: [p.removeprefix(root).lstrip("/") for p in x] for v, x in images.items()}
        self.lists = {"captions": captions, **names}
        manifest = None
        if processes.is_rank_0:
            manifest = {**about, "rows_per_shard": self.rows, **self._describe(images)}
            self._open(manifest)
        self.key = json.dumps(processes.from_rank_0(manifest), sort_keys=True).encode()

    def _describe(self, images: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The manifest's entries for the lists: a replaced image shows by its size."""
        entries = {}
        for name, rows in self.lists.items():
            try:
                sizes = [image_status(path).size for path in images.get(name, ())]
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}") from None
            entries[name] = {
                "rows": len(rows),
                "sha256": hashlib.sha256(json.dumps([rows, sizes]).encode()).hexdigest(),
                "shards": [self._path(name, shard).name for shard in self.shards(name)],
            }
        return entries

    def _open(self, manifest: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--features {self.folder}: {error.strerror}") from None
        self.lock = lock(self.folder)
        path, advice = self.folder / MANIFEST, "give another --features, or delete this folder"
        if os.path.lexists(path):
            old = read_json_file(path, advice=f"; {advice}")
            old = old if isinstance(old, dict) else {}
            if changed := [n for n in {**manifest, **old} if manifest.get(n) != old.get(n)]:
                changes = ", ".join(changed)
                raise UserError(f"{path}: of another evaluation (other {changes}); {advice}")
        for unfinished in self.folder.glob(".*.npy.*"):  # of killed processes
            unfinished.unlink()
        # The manifest last: who finds it finds the lists.
        for name, content in {**self.lists, "manifest": manifest}.items():
            text = json.dumps(content, indent=1).encode()
            write_atomically(self.folder / f"{name}.json", methodcaller("write", text))

    def shards(self, name: str) -> range:
        """The numbers of its shards."""
        return range(-(-len(self.lists[name]) // self.rows))

    def positions(self, name: str, shard: int) -> range:
        """The rows of a shard, by their positions in the list."""
        start = shard * self.rows
        return range(start, min(start + self.rows, len(self.lists[name])))

    def missing(self, name: str) -> list[int]:
        """The shards that have to be encoded. All processes must call it; each checks some."""
        # Not `exists`: a network file system may remember for a while that a file did not exist.
        files = set(os.listdir(self.folder))
        shards = self.shards(name)
        mine = shards[self.processes.rank :: self.processes.size]
        absent = [s for s in shards if self._path(name, s).name not in files]
        my_bad = [s for s in mine if s not in absent and self._load(name, s) is None]
        absent = self.processes.from_rank_0(absent)
        bad = sorted(itertools.chain(*self.processes.all_gather_objects(my_bad)))
        log = logging.getLogger(LOGGER_NAME)
        for shard in bad:
            path = self._path(name, shard)
            log.info(f"{path}: corrupted, or of another evaluation; it is encoded again")
        there = len(shards) - len(absent) - len(bad)
        log.info(f"{self.folder}: {there} of {len(shards)} shards of {name} are there")
        return sorted({*absent, *bad})

    def write(self, name: str, shard: int, features: Tensor) -> None:
        """Write a shard [rows, D] atomically. Raises UserError if the disk is full."""
        buffer = io.BytesIO()
        np.save(buffer, features.cpu().numpy(), allow_pickle=False)
        array = buffer.getvalue()
        write_atomically(self._path(name, shard), methodcaller("write", array + self._seal(array)))

    def read(self, name: str, empty: Tensor) -> Tensor:
        """All features, on the device of `empty` [0, D]. Raises UserError if a shard is missing or
        corrupted."""
        arrays = [empty]
        for shard in self.shards(name):
            array = self._load(name, shard)
            if array is None:
                raise UserError(f"{self._path(name, shard)}: missing or corrupted; run this again")
            arrays.append(torch.from_numpy(array).to(empty.device))
        return torch.cat(arrays)

    def _load(self, name: str, shard: int) -> np.ndarray | None:
        """The array of a shard; None if it cannot be read or has another seal."""
        try:
            with open_file(self._path(name, shard)) as file:
                content = file.read()
        except OSError:
            return None
        array, seal = content[:-SEAL], content[-SEAL:]
        return np.load(io.BytesIO(array)) if seal == self._seal(array) else None

    def _seal(self, array: bytes) -> bytes:
        return hashlib.sha256(self.key + array).digest()

    def _path(self, name: str, shard: int) -> Path:
        return self.folder / f"{name}-{shard:05}.npy"
