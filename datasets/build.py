"""The registry of data sets, and the loaders that make batches of them.

data = read_dataset("AGDataAttr", root)
loader = train_loader(data, args, generator, device)
for batch in loader: ...         # a dict of tensors, see TrainDataset
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.records import Data, Image, TrainSample
from datasets.samplers import IdentitySampler, Key, RandomSampler
from datasets.tbagpr import read_tbagpr
from datasets.transforms import eval_transform, image_tensor, train_transform
from utils.errors import UserError, suggest

MASK_ID = 49405  # stands for the mask; CLIP's vocabulary has the rare word "jekyll" there
MASK_RATE = 0.15


@dataclass(frozen=True)
class DatasetSpec:
    """A row of the registry: how to read it and what its samples have."""

    read: Callable[[str], Data]
    pairs: bool  # an aerial and a ground image per caption
    attributes: bool
    meaning: str


DATASETS: dict[str, DatasetSpec] = {
    "AGDataAttr": DatasetSpec(
        lambda root: read_tbagpr(root, "AGDataAttr"), True, True, "TBAGPR, both views, attributes"
    ),
    "AGData": DatasetSpec(
        lambda root: read_tbagpr(root, "AGData", attributes=False),
        True,
        False,
        "TBAGPR, both views, without attributes",
    ),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The registry's row. Raises UserError for an unknown name."""
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"--dataset_name {name}: unknown.{suggest(name, DATASETS)} Known: {known}")
    return DATASETS[name]


def tokenize(captions: Sequence[str], length: int) -> Tensor:
    """CLIP token ids [captions, length] int32, zeros behind the end; a longer caption keeps its
    first `length - 1` tokens and the end token."""
    return open_clip.tokenize(list(captions), context_length=length).int()


def trim(ids_BL: Tensor) -> Tensor:
    """Cut the columns in which every caption has ended (0 is padding)."""
    return ids_BL[:, : int((ids_BL != 0).any(dim=0).sum())].long()


def mask_tokens(
    ids_L: Tensor, generator: torch.Generator, mask_rate: float = 0.8, keep_rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Masked ids and labels [L] of a caption, BERT's way (IRRA).

    Each word is chosen with probability 0.15, at least one always. Of the chosen, `mask_rate`
    become the mask, `keep_rate` stay, the others become a random id. Labels are the true ids of
    the chosen and 0 elsewhere. Start, end and padding are never chosen.
    """
    word_L = (ids_L > 0) & (ids_L < MASK_ID)
    chance_L, fate_L = torch.rand((2, len(ids_L)), generator=generator)
    chosen_L = word_L & (chance_L < MASK_RATE)
    if not chosen_L.any():
        chosen_L[chance_L.masked_fill(~word_L, 2).argmin()] = True
        chosen_L &= word_L  # a caption without a word has none to mask
    random_L = torch.randint(1, MASK_ID, (len(ids_L),), generator=generator).to(ids_L.dtype)
    masked_L = torch.where(fate_L < mask_rate, MASK_ID, random_L)
    masked_L = torch.where(fate_L >= 1 - keep_rate, ids_L, masked_L)
    return torch.where(chosen_L, masked_L, ids_L), torch.where(chosen_L, ids_L, 0)


class TrainDataset(Dataset):
    """Samples by `Key`; a batch of them is a dict of tensors:

    `images` (and with two views `pair_images`) [B, 3, H, W], `pids` [B], `index` [B] of the
    samples, `caption_ids` [B, L]; with attributes `attributes` and `pair_attributes` [B, A]; with
    masking `masked_ids` and `masked_labels` [B, L]. L is the longest caption of the batch.
    """

    def __init__(
        self,
        samples: Sequence[TrainSample],
        transform: Callable,
        text_length: int = 77,
        masking: tuple[float, float] | None = None,
    ) -> None:
        self.samples, self.transform, self.masking = samples, transform, masking
        self.caption_ids = tokenize(
            [s.caption for s in samples], text_length
        )  # once for all epochs
        wordless = (self.caption_ids != 0).sum(dim=1) <= 2
        if wordless.any():
            sample = samples[int(wordless.nonzero()[0])]
            raise UserError(f"{sample.entry}: the caption {sample.caption!r} has no words")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Tensor | int]:
        sample, ids = self.samples[key.index], self.caption_ids[key.index]
        item = {"index": key.index, "pids": sample.pid, "caption_ids": ids}
        # torchvision draws from the global generator; borrow it, so that the draws are the key's.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key.seed)
            item["images"] = image_tensor(sample.image.path, self.transform, sample.entry)
            if sample.pair is not None:
                item["pair_images"] = image_tensor(sample.pair.path, self.transform, sample.entry)
        if sample.image.attributes is not None:
            item["attributes"] = torch.tensor(sample.image.attributes)
            if sample.pair is not None:
                item["pair_attributes"] = torch.tensor(sample.pair.attributes)
        if self.masking is not None:
            generator = torch.Generator().manual_seed(key.seed)
            item["masked_ids"], item["masked_labels"] = mask_tokens(ids, generator, *self.masking)
        return item

    @staticmethod
    def collate(items: list[dict]) -> dict[str, Tensor]:
        """Stack the samples and cut the captions to the longest."""
        batch = default_collate(items)
        length = trim(batch["caption_ids"]).shape[1]
        for name in ("caption_ids", "masked_ids", "masked_labels"):
            if name in batch:
                batch[name] = batch[name][:, :length].long()
        return batch


class _Images(Dataset):
    def __init__(self, images: Sequence[Image], transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return image_tensor(self.images[index].path, self.transform)


def train_loader(
    data: Data, args: argparse.Namespace, generator: torch.Generator, device: torch.device
) -> DataLoader:
    """Batches of the training set; `generator` decides their order and all augmentation."""
    masking = (args.masked_token_rate, args.masked_token_unchanged_rate) if args.MLM else None
    transform = train_transform(tuple(args.img_size), args.img_aug)
    dataset = TrainDataset(data.train, transform, args.text_length, masking)
    if args.sampler == "identity":
        pids = [s.pid for s in data.train]
        sampler = IdentitySampler(pids, args.batch_size, args.num_instance, generator)
        if not len(sampler):
            raise UserError(
                f"--sampler identity: {len(set(pids))} identities are fewer than the "
                f"{sampler.per_batch} that a batch of {args.batch_size} needs"
            )
    else:
        sampler = RandomSampler(len(dataset), generator)
    return DataLoader(
        dataset,
        args.batch_size,
        sampler=sampler,
        collate_fn=TrainDataset.collate,
        generator=torch.Generator(),  # workers' base seed; unused, and not the global generator's
        **_workers(args, device),
    )


def image_loader(
    images: Sequence[Image], args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """Batches [B, 3, H, W] of a gallery, in its order."""
    dataset = _Images(images, eval_transform(tuple(args.img_size)))
    return DataLoader(dataset, args.test_batch_size, **_workers(args, device))


def caption_batches(captions: Sequence[str], args: argparse.Namespace) -> Iterator[Tensor]:
    """Batches [B, L] of token ids, in order, each cut to its longest caption."""
    for start in range(0, len(captions), args.test_batch_size):
        yield trim(tokenize(captions[start : start + args.test_batch_size], args.text_length))


def _workers(args: argparse.Namespace, device: torch.device) -> dict:
    return {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "pin_memory": device.type == "cuda",
    }
