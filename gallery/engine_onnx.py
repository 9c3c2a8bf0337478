"""Indexing without torch: threads read, and a run's encoders in ONNX encode, in one process."""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np

from gallery.frames import Chunk, Job, Reader
from gallery.indexing import Alone, Result
from gallery.onnx import OnnxEncoder
from gallery.records import SURE
from utils.machine import cores


class OnnxEngine:
    """As gallery/engine_torch.py has it."""

    processes = Alone()

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def load(self, precision: str | None, log: logging.Logger) -> OnnxEncoder:
        """The encoder of the options. Raises UserError."""
        self.encoder = OnnxEncoder(self.args.onnx, self.args.device)
        return self.encoder

    def results(self, jobs: Sequence[Job]) -> nullcontext[Iterator[Result]]:
        """The people in files, encoded while they are taken."""
        args = self.args
        reader = Reader(jobs, self.encoder.size, args.test_batch_size, args.every, frames=False)
        threads = max(1, min(args.num_workers, cores(), len(jobs)))
        chunks = in_threads([reader.chunks(n, threads) for n in range(threads)])
        return nullcontext(encoded(chunks, self.encoder))


def in_threads(readers: Sequence[Iterator[Chunk]]) -> Iterator[Chunk]:
    """The chunks of readers in turn; each reads in a thread, one chunk ahead."""
    with ThreadPoolExecutor(len(readers)) as threads:
        ahead = deque((reader, threads.submit(next, reader, None)) for reader in readers)
        while ahead:
            reader, future = ahead.popleft()
            if (chunk := future.result()) is not None:
                ahead.append((reader, threads.submit(next, reader, None)))
                yield chunk


def encoded(chunks: Iterable[Chunk], encoder: OnnxEncoder) -> Iterator[Result]:
    """Each chunk with the features and guesses of its people."""
    below = np.nextafter(np.float32(SURE), np.float32(0))
    for chunk in chunks:
        if not chunk.rows:  # of broken files alone
            yield chunk, np.zeros((0, encoder.about["embed_dim"]), np.float16), {}
            continue
        feature_BD, scores = encoder.encode_bytes(chunk.images)
        guesses = {
            name: (
                [encoder.attributes[name][c] for c in score_BC.argmax(axis=1)],
                score_BC.max(axis=1).clip(max=below).tolist(),
            )
            for name, score_BC in scores.items()
        }
        yield chunk, feature_BD.astype(np.float16), guesses
