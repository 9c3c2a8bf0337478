"""bench.py --what gallery: does indexing keep the encoder busy?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image as PILImage
from tqdm import tqdm

from gallery.encode import Encoder, encoded
from gallery.engine_torch import chunk_loader
from gallery.indexing import encode_parts
from gallery.ingest import Found, add_pictures
from gallery.manifest import new_manifest
from gallery.parts import PARTS
from gallery.plan import apply_plan, make_plan
from gallery.store import Store
from processor.inference import Run
from utils.distributed import SINGLE_PROCESS

PICTURE = (192, 512)  # width and height of the JPEGs, pixels: a person near a camera
BATCH_ON_CPU = 16


def bench_gallery(
    args: EasyDict, device: torch.device, clock: Any, row: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Encoding of bytes that are in memory, then indexing of as many JPEGs, with all that belongs
    to it: decoding, features to the CPU, parts to the disk.

    Args:
        clock, row: of tools/bench.py.
    """
    args = EasyDict(args, test_batch_size=_batch(args, device))
    about = {"kind": "weights", "name": "bench", "folder": "", "checkpoint": "", "sha256": "0" * 64}
    encoder = Encoder(Run(args, None, Path("bench"), device), about)
    size, batch = (args.img_size[0], args.img_size[1]), args.test_batch_size
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    count = batch * clock.repeat

    def bare() -> None:
        for _ in range(clock.repeat):
            encoder.encode_bytes(images).features.cpu()

    clock.once(lambda: encoder.encode_bytes(images).features.cpu())  # the warm-up
    alone = count / clock.once(bare)
    yield row(f"encode {count} images", [count / alone], per_second=alone, unit="images")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        write_pictures(pictures, count)
        found = Found()
        add_pictures(found, [str(pictures)], None)
        gallery = Path(folder, "gallery")
        os.makedirs(gallery / PARTS)
        store = Store(gallery, new_manifest(encoder.about, {}, folder))

        def index() -> None:
            plan = make_plan(found, store, {False: "", True: ""})
            chunks = chunk_loader(plan.jobs, size, batch, 1.0, False, args.num_workers, device)
            replaced = apply_plan(plan, store)
            with tqdm(disable=True) as bar:
                results = encoded(chunks, encoder)
                encode_parts(results, store, replaced, SINGLE_PROCESS, bar)

        rate = count / clock.once(index)
    name = f"index {count} JPEGs, {args.num_workers} processes"
    yield row(name, [count / rate], per_second=rate, unit="images", share=rate / alone)


def write_pictures(folder: Path, count: int) -> None:
    """Random JPEGs, smooth as photographs are."""
    folder.mkdir(parents=True)
    rng, (width, height) = np.random.default_rng(0), PICTURE
    for number in range(count):
        pixels = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = PILImage.fromarray(pixels).resize(PICTURE, PILImage.Resampling.BICUBIC)
        image.save(folder / f"{number:06}.jpg", quality=90)


def _batch(args: EasyDict, device: torch.device) -> int:
    return min(args.test_batch_size, BATCH_ON_CPU) if device.type == "cpu" else args.test_batch_size
