"""The registry of data sets, and the loaders that make batches of them.

data = read_dataset(args)
loader = train_loader(data, args, generator, device)
for batch in loader: ...         # a dict of tensors, see TrainDataset
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.files import exists
from datasets.heldout import HELDOUT, hold_out
from datasets.image_cache import ImageFiles
from datasets.pedes import PEDES, read_custom, read_pedes
from datasets.records import Data, Image, TrainSample
from datasets.samplers import IdentitySampler, Key, RandomSampler, evaluation_batches
from datasets.tbagpr import SOURCES, one_view, read_tbagpr
from datasets.text import TextAugmentation, augmentation_of, tokenize, trim
from datasets.transforms import DRAWS_AUGMENTED, DRAWS_PLAIN, BrokenImage, train_transform
from utils.attributes import read_attributes
from utils.devices import cores
from utils.distributed import ALONE, World
from utils.errors import UserError, suggest
from utils.interrupt import serve_training


@dataclass(frozen=True)
class DatasetSpec:
    """A row of the registry: how to read it, and what the README says of it."""

    read: Callable[[EasyDict], Data]
    meaning: str
    has: str  # images per sample, attributes


def _source(name: str, index: int) -> DatasetSpec:
    """One of TBAGPR's sources; its attributes are read where there is an attrs.json."""
    source = SOURCES[index]

    def read(args: EasyDict) -> Data:
        labelled = exists(Path(args.root_dir) / "attrs.json")
        return read_tbagpr(args.root_dir, name, labelled, [source])

    return DatasetSpec(
        read, f"TBAGPR's source {source.folder} alone", "both views; attributes if `attrs.json`"
    )


def _pedes(name: str) -> DatasetSpec:
    file, _ = PEDES[name]
    return DatasetSpec(
        lambda args: read_pedes(args.root_dir, name), f"`{name}/{file}`, `{name}/imgs/`", "one view"
    )


DATASETS: dict[str, DatasetSpec] = {
    "AGDataAttr": DatasetSpec(
        lambda args: read_tbagpr(args.root_dir, "AGDataAttr"), "TBAGPR", "both views, attributes"
    ),
    "AGData": DatasetSpec(
        lambda args: read_tbagpr(args.root_dir, "AGData", attributes=False),
        "TBAGPR without its attributes",
        "both views",
    ),
    "AGSGData": DatasetSpec(
        lambda args: one_view(read_tbagpr(args.root_dir, "AGSGData", attributes=False), args.views),
        "TBAGPR, each image a sample of its own; `--views a`, `g` or `ag`",
        "one view",
    ),
    "AGTBPR": _source("AGTBPR", 0),
    "G2APS": _source("G2APS", 1),
    **{name: _pedes(name) for name in PEDES},
    "custom": DatasetSpec(
        lambda args: read_custom(args.root_dir, read_attributes(args.attributes_file)),
        "your own: `dataset.json`, see [docs/custom.md](docs/custom.md)",
        "one view or both; attributes if given",
    ),
}


def read_dataset(args: EasyDict) -> Data:
    """Read and check `--dataset_name` in `--root_dir`, with the splits that `--val_dataset` chooses
    on. Raises UserError."""
    data = read_whole(args)
    wanted = selecting_splits(args.val_dataset)
    if HELDOUT in wanted:
        data = hold_out(data, args.heldout, args.heldout_seed)
    if not set(wanted) <= set(data.splits):
        raise UserError(
            f"--val_dataset {args.val_dataset}: {data.name} has only {', '.join(data.splits)}; "
            "--val_dataset heldout takes some identities out of training to choose on"
        )
    return data


def read_for_test(args: EasyDict) -> tuple[Data, list[str]]:
    """The same for a run that is over: where the split that chose cannot be had any more, since the
    data has changed, the data set without it, and what to tell."""
    try:
        return read_dataset(args), []
    except UserError as error:
        return read_whole(args), [f"the split that chose is left out: {error}"]


def read_whole(args: EasyDict) -> Data:
    """Read and check the data set with the splits that it has on disk. Raises UserError."""
    name = args.dataset_name
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"--dataset_name {name}: unknown.{suggest(name, DATASETS)} Known: {known}")
    if args.views != "ag" and name != "AGSGData":
        raise UserError(f"--views {args.views}: --dataset_name {name} has its own; for AGSGData")
    return DATASETS[name].read(args)


def selecting_splits(val_dataset: str) -> tuple[str, ...]:
    """The splits that choose a checkpoint; the first one's is best.pth. None if the last epoch is
    taken."""
    return {"both": (HELDOUT, "test"), "last": ()}.get(val_dataset, (val_dataset,))


def datasets_table() -> str:
    """The registry in Markdown, for the README."""
    lines = ["| `--dataset_name` | what it is | a sample has |", "|---|---|---|"]
    lines += [f"| `{name}` | {row.meaning} | {row.has} |" for name, row in DATASETS.items()]
    return "\n".join(lines)


class TrainDataset(Dataset):
    """Samples by `Key`; a batch of them is a dict of tensors:

    `images` (and with two views `pair_images`) [B, 3, H, W] uint8, `draws` (and `pair_draws`)
    [B, K] uniform numbers for their augmentation, `pids` [B], `index` [B] of the samples,
    `caption_ids` [B, L], augmented; with attributes `attributes` and `pair_attributes` [B, A]; for
    the loss `mlm` `masked_labels` [B, L], `masked_at` [X], where the X labels stand in the
    flattened captions, and `masked_ids` [B, L], unless `caption_ids` are the masked ones. L is the
    longest caption of the batch, of masked ones for `mlm` `text_length`. `skipped`, if there, is a
    list of messages on samples that were replaced.

    Args:
        images: the samples' images; with two views those of all pairs follow.
        draws: uniform numbers per image.
        augment: what captions go through; None leaves them whole.
        skip: replace a sample whose image is broken by the next of the epoch.
    """

    def __init__(
        self,
        samples: Sequence[TrainSample],
        images: ImageFiles,
        draws: int = DRAWS_PLAIN,
        text_length: int = 77,
        augment: TextAugmentation | None = None,
        skip: bool = False,
    ) -> None:
        self.samples, self.images, self.draws = samples, images, draws
        self.augment = augment or TextAugmentation()
        self.skip = skip
        self.caption_ids = tokenize(
            [s.caption for s in samples], text_length
        )  # once for all epochs

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        skipped: list[str] = []
        for index in (key.index, *key.spares):
            try:
                return self._item(index, key.seed) | ({"skipped": skipped} if skipped else {})
            except BrokenImage as error:
                if not self.skip:
                    raise BrokenImage(f"{error} Or give --on_bad_image skip.") from None
                skipped.append(str(error))
        raise UserError(
            f"{len(skipped)} broken images in a row (python tools/check_dataset.py finds all), the "
            f"last: {skipped[-1]}"
        )

    def _item(self, index: int, seed: int) -> dict[str, Tensor | int]:
        sample, ids = self.samples[index], self.caption_ids[index]
        generator = torch.Generator().manual_seed(seed)
        item = {"index": index, "pids": sample.pid}
        item["images"] = self.images[index]
        item["draws"] = torch.rand(self.draws, generator=generator)
        if sample.pair is not None:
            item["pair_images"] = self.images[len(self.samples) + index]
            item["pair_draws"] = torch.rand(self.draws, generator=generator)
        if sample.image.attributes is not None:
            item["attributes"] = torch.tensor(sample.image.attributes)
            if sample.pair is not None:
                item["pair_attributes"] = torch.tensor(sample.pair.attributes)
        return item | self.augment(ids, generator)

    @staticmethod
    def collate(items: list[dict]) -> dict[str, Tensor]:
        """Stack the samples and cut the captions to the longest.

        Those of `mlm` keep their padding: in the original's cross-modal transformer words attend
        to it, so without it a sample's loss would depend on the other captions of its batch.
        """
        skipped = [message for item in items for message in item.pop("skipped", ())]
        batch = default_collate(items)
        if skipped:
            batch["skipped"] = skipped
        shared = "masked_labels" in batch and "masked_ids" not in batch
        if not shared:
            batch["caption_ids"] = trim(batch["caption_ids"])
        for name in ("caption_ids", "masked_ids", "masked_labels"):
            if name in batch:
                batch[name] = batch[name].long()
        if "masked_labels" in batch:  # here, because finding them on a GPU would wait for it
            batch["masked_at"] = batch["masked_labels"].flatten().nonzero()[:, 0]
        return batch


def to_device(
    batch: dict[str, Tensor], device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """Move a training batch and make its images the encoder's input (`train_transform`)."""
    batch = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    for view in ("", "pair_"):
        if f"{view}images" in batch:
            draws = batch.pop(f"{view}draws")
            batch[f"{view}images"] = train_transform(batch[f"{view}images"], draws, mean, std)
    return batch


def on_device(
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[dict[str, Tensor]]:
    """Batches through `to_device`, one ahead: on a GPU the next batch is copied and augmented, on a
    stream of its own, while the last is computed on. (On a CPU streams are empty shells.)"""
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


def _arrived(batch: dict[str, Tensor], copied: object, stream: object) -> dict[str, Tensor]:
    """Let the computing stream wait for its batch, and the allocator know who uses it."""
    stream.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(stream)
    return batch


def train_loader(
    data: Data,
    args: EasyDict,
    generator: torch.Generator,
    device: torch.device,
    world: World = ALONE,
) -> DataLoader:
    """Batches of the training set, of several processes this one's shares of them; `generator`
    decides their order and all augmentation. Its `batch_sampler` is an `EpochSampler`."""
    shown = [(s.image, s.entry) for s in data.train]
    shown += [(s.pair, s.entry) for s in data.train if s.pair is not None]
    skip = args.on_bad_image == "skip"
    images = _image_files([x for x, _ in shown], args, world, [e for _, e in shown], skip)
    draws = DRAWS_AUGMENTED if args.img_aug else DRAWS_PLAIN
    augment = augmentation_of(args)
    dataset = TrainDataset(data.train, images, draws, args.text_length, augment, skip)
    epochs = (args.batch_size, generator, world)
    if args.sampler == "identity":
        pids = [s.pid for s in data.train]
        sampler = IdentitySampler(pids, args.num_instance, *epochs)
        if not len(sampler):
            raise UserError(
                f"--sampler identity: {len(set(pids))} identities are fewer than the "
                f"{sampler.per_batch} that a batch of {args.batch_size} needs"
            )
    else:
        sampler = RandomSampler(len(dataset), *epochs)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=TrainDataset.collate,
        **_workers(args, device, world),
    )


def image_loader(
    images: Sequence[Image],
    args: EasyDict,
    device: torch.device,
    world: World = ALONE,
) -> DataLoader:
    """Batches [B, 3, H, W] uint8 of a gallery, in its order; `normalise` makes them input. Of
    several processes each gets its `evaluation_batches`."""
    batches, _ = evaluation_batches(len(images), args.test_batch_size, world)
    files = _image_files(images, args, world)
    return DataLoader(files, batch_sampler=batches, **_workers(args, device, world))


def caption_batches(
    captions: Sequence[str], args: EasyDict, world: World = ALONE
) -> Iterator[Tensor]:
    """Batches [B, L] of token ids, each cut to its longest caption; as of `image_loader`."""
    for batch in evaluation_batches(len(captions), args.test_batch_size, world)[0]:
        yield trim(tokenize([captions[i] for i in batch], args.text_length))


def _image_files(
    images: Sequence[Image],
    args: EasyDict,
    world: World,
    entries: Sequence[str] = (),
    skip: bool = False,
) -> ImageFiles:
    files = ImageFiles([image.path for image in images], tuple(args.img_size), entries)
    if args.image_cache:
        with world.leader_first():
            files.use_cache(args.image_cache, min(args.num_workers, cores()), skip)
    return files


def _workers(args: EasyDict, device: torch.device, world: World) -> dict:
    workers = min(args.num_workers, cores() // world.local_size)
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": functools.partial(serve_training, os.getpid()),
        # Of the workers' base seed, which nothing uses: the global generator stays untouched.
        "generator": torch.Generator(),
    }
