"""Indexing with torch: loader processes read, and a run or vanilla weights encode."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gallery.detect import detected, load_detector
from gallery.encode import Encoder, encoded, run_encoder, weights_encoder
from gallery.frames import Chunk, Job, Reader
from gallery.indexing import Result
from processor.failures import explain_failures
from utils import distributed
from utils.interrupt import init_worker_signals
from utils.machine import allow_open_files, cores

AHEAD = 2  # batches that each process prepares ahead
FRAMES = 8  # of full size, that wait for the detector together


class TorchEngine:
    """What `index` reads and encodes with; gallery/engine_onnx.py has the same without torch.

    Attributes:
        processes: all that index together.

    Args:
        args: the options of `index`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        allow_open_files(args.num_workers)
        self.processes, self.device = distributed.start(args.device)

    def load(self, precision: str | None, log: logging.Logger) -> Encoder:
        """The encoder of the options, and the detector. Raises UserError.

        Args:
            precision: if the options have none; None: that of the run.
        """
        args = self.args
        options = {
            "device": self.device.type, "precision": args.precision or precision,
            "batch_size": args.test_batch_size, "num_workers": 0,
        }  # fmt: skip
        if args.pretrain_choice:
            self.encoder = weights_encoder(args.pretrain_choice, args.img_size, **options)
        else:
            options["attributes_file"] = args.attributes_file or None
            self.encoder = run_encoder(args.config_file, args.checkpoint, **options)
        for note in self.encoder.run.notes:
            log.info(note)
        self.detector = None
        if args.detect:
            self.detector = load_detector(args.detect, self.device, args.min_score)
        return self.encoder

    @contextmanager
    def results(self, jobs: Sequence[Job]) -> Iterator[Iterator[Result]]:
        """The people in files, encoded while they are taken."""
        args, (height, width) = self.args, self.encoder.about["img_size"]
        chunks: Iterable[Chunk] = chunk_loader(
            jobs, (height, width), args.test_batch_size, args.every, self.detector is not None,
            args.num_workers, self.device, self.processes.local_size,
        )  # fmt: skip
        if self.detector is not None:
            chunks = detected(chunks, self.detector, (height, width), args.test_batch_size)
        with explain_failures(self.encoder.run.args, self.device, [], "evaluation"):
            yield encoded(chunks, self.encoder)
        distributed.finish()


def chunk_loader(
    jobs: Sequence[Job],
    size: tuple[int, int],
    batch_size: int,
    every: float,
    frames: bool,
    num_workers: int,
    device: torch.device,
    local_size: int = 1,
) -> DataLoader[Chunk]:
    """Chunks of at most `batch_size` people, by loader processes, a bounded number ahead.

    Args:
        size, every, frames: as for `Reader`.
        local_size: processes of this machine that share its cores.
    """
    workers = min(num_workers, cores() // local_size, len(jobs))
    return DataLoader(
        _Chunks(Reader(jobs, size, FRAMES if frames else batch_size, every, frames)),
        batch_size=None,
        collate_fn=_as_tensor,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=functools.partial(init_worker_signals, os.getpid()),
        generator=torch.Generator(),  # the default would advance the global generator
    )


class _Chunks(IterableDataset[Chunk]):
    """A reader's chunks; each loader process reads every n-th file."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        return self.reader.chunks(worker.id, worker.num_workers) if worker else self.reader.chunks()


def _as_tensor(chunk: Any) -> Chunk:
    """Images as a tensor, which passes through shared memory."""
    if isinstance(chunk.images, np.ndarray):
        chunk.images = torch.from_numpy(chunk.images)
    return chunk
