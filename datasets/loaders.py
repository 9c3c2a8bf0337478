"""Loaders: they make batches of a data set and move them to the device.

loader = train_loader(data, args, device)
for batch in on_device(loader, device, mean, std): ...     # a dict of tensors, see TrainDataset
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.augmentation import augment, more_numbers, numbers_of
from datasets.compact import ImagePaths
from datasets.image_cache import ImageFiles
from datasets.records import Data, Image
from datasets.samplers import EpochSampler, IdentitySampler, RandomSampler, evaluation_batches
from datasets.stored import tokenized
from datasets.text import augmentation_of, tokenize, trim
from datasets.training_set import TrainDataset
from utils.distributed import SINGLE_PROCESS, Processes
from utils.errors import UserError
from utils.interrupt import init_worker_signals
from utils.machine import cores


class TrainLoader(DataLoader[dict[str, Any]]):
    """Batches of the training set. Call the sampler's `set_epoch` before each epoch."""

    dataset: TrainDataset
    batch_sampler: EpochSampler


class ImageLoader(DataLoader[Tensor]):
    """Batches of images."""

    dataset: ImageFiles


def train_loader(
    data: Data,
    args: EasyDict,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
    masked: bool = False,
    more_images: Sequence[str] = (),
) -> TrainLoader:
    """Batches of the training set. With several processes, each gets its shard of every batch.

    Args:
        masked: add masked captions, for a loss that needs them.
        more_images: further images of the first view, by their names in datasets/augmentation.py.
    """
    views, skip = len(data.views), args.on_bad_image == "skip"
    paths, entries = (ImagePaths(data.train, views, entries) for entries in (False, True))
    files = _image_files(paths, args, processes, entries, skip)
    numbers, more = numbers_of(args), more_numbers(args, more_images)
    of_captions = augmentation_of(args, masked)
    with processes.rank_0_first():
        tokens = tokenized(data, args.text_length)
    dataset = TrainDataset(
        data.train, files, numbers, args.text_length, of_captions, skip, tokens, more, data.noisy
    )
    sampling = (args.batch_size, args.seed, processes)
    sampler: EpochSampler
    if args.sampler == "identity":
        pids = data.train_pids.tolist()
        sampler = IdentitySampler(pids, args.num_instance, *sampling)
        if not len(sampler):
            raise UserError(
                f"--sampler identity: {len(set(pids))} identities are fewer than the "
                f"{sampler.per_batch} that a batch of {args.batch_size} needs; give a smaller "
                "--batch_size, a larger --num_instance or --sampler random"
            )
    else:
        sampler = RandomSampler(len(dataset), *sampling)
    return TrainLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=TrainDataset.collate,
        **_workers(args, device, processes),
    )


def image_loader(
    images: Sequence[Image],
    args: EasyDict,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> ImageLoader:
    """Batches [B, 3, H, W] uint8 of a gallery's images, in order; `normalise` turns them into the
    encoder's input. With several processes, each gets its `evaluation_batches`."""
    batches, _ = evaluation_batches(len(images), args.test_batch_size, processes)
    files = _image_files([image.path for image in images], args, processes)
    return ImageLoader(files, batch_sampler=batches, **_workers(args, device, processes))


def caption_batches(
    captions: Sequence[str], args: EasyDict, processes: Processes = SINGLE_PROCESS
) -> Iterator[Tensor]:
    """Batches [B, L] of token ids, in order, each trimmed to its longest caption. With several
    processes, each gets its `evaluation_batches`."""
    for batch in evaluation_batches(len(captions), args.test_batch_size, processes)[0]:
        yield trim(tokenize([captions[i] for i in batch], args.text_length))


def on_device(
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """Batches through `to_device`, one ahead: on a GPU the next batch is copied and augmented on a
    second stream, while the model computes on the current one. (On a CPU, streams do nothing.)"""
    streams = torch.get_device_module(device)
    copies, ahead = streams.Stream(), None
    for batch in batches:
        with streams.stream(copies):
            moved = to_device(batch, device, mean, std), copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead, streams.current_stream())
        ahead = moved
    if ahead is not None:
        yield _arrived(*ahead, streams.current_stream())


def to_device(
    batch: dict[str, Any], device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Move a training batch to the device, and turn its images into the encoder's input there
    (`augment`). Further images are made of those of the first view."""
    batch = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    raw = {key: value for key, value in batch.items() if key.endswith("images")}
    for key in [key for key in batch if key.endswith("uniform")]:
        prefix = key.removesuffix("uniform")  # "", "pair_" or that of a further image
        images, uniform = raw.get(f"{prefix}images", raw["images"]), batch.pop(key)
        batch[f"{prefix}images"] = augment(prefix.removesuffix("_"), images, uniform, mean, std)
    return batch


def _arrived(batch: dict[str, Any], copied: Any, stream: Any) -> dict[str, Any]:
    """Make the computing stream wait for its batch, and tell the allocator which stream uses it."""
    stream.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(stream)
    return batch


def _image_files(
    paths: Sequence[str],
    args: EasyDict,
    processes: Processes,
    entries: Sequence[str] = (),
    skip: bool = False,
) -> ImageFiles:
    files = ImageFiles(paths, tuple(args.img_size), entries)
    if args.image_cache:
        with processes.rank_0_first():
            files.use_cache(args.image_cache, min(args.num_workers, cores()), skip)
    return files


def _workers(args: EasyDict, device: torch.device, processes: Processes) -> dict[str, Any]:
    workers = min(args.num_workers, cores() // processes.local_size)
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": functools.partial(init_worker_signals, os.getpid()),
        # For the workers' base seed. Nothing uses it, but otherwise the loader would take it from
        # the global generator and change that.
        "generator": torch.Generator(),
    }
