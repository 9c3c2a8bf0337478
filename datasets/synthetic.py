"""A training batch of random images and captions, for measurements without a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from easydict import EasyDict
from torch import Tensor

from datasets.augmentation import more_numbers, numbers_of
from datasets.text import augmentation_of, tokenize
from datasets.training_set import TrainDataset
from utils.attributes import read_attributes

TEXT = "a man in grey shirt and blue jeans with black backpack walking woman red coat white shoes"


def captions(count: int) -> list[str]:
    """Random captions of 15 to 60 words, as long as real ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(15, 61, (count,), generator=generator).tolist()
    words = TEXT.split()
    picks = torch.randint(len(words), (count, 60), generator=generator).tolist()
    return [" ".join(words[w] for w in row[:n]) for row, n in zip(picks, lengths, strict=True)]


def synthetic_batch(
    args: EasyDict,
    masked: bool = False,
    more_images: Sequence[str] = (),
    pairs: bool = True,
    pad: bool = False,
) -> dict[str, Tensor]:
    """A batch of `--batch_size` samples as `TrainDataset.collate` makes it, with attributes.

    Args:
        masked: with the masked captions of `mlm`.
        more_images: with further images of the first view.
        pairs: two views.
        pad: all captions have `--text_length` tokens.
    """
    size, generator = args.batch_size, torch.Generator().manual_seed(0)
    ids = tokenize(captions(size), args.text_length)
    augment = augmentation_of(args, masked)
    batch = TrainDataset.collate([augment(row, generator) for row in ids])
    batch["pids"] = torch.arange(size) // 2
    if pad:
        batch["caption_ids"] = ids.long()
    classes = torch.tensor([len(a.classes) for a in read_attributes(args.attributes_file)])
    for view in ("", "pair_") if pairs else ("",):
        shape = (size, 3, *args.img_size)
        batch[f"{view}images"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        batch[f"{view}uniform"] = torch.rand((size, *numbers_of(args)), generator=generator)
        labels = torch.randint(60, (size, len(classes)), generator=generator)
        batch[f"{view}attributes"] = labels % classes
    for name, numbers in more_numbers(args, more_images).items():
        batch[f"{name}_uniform"] = torch.rand((size, *numbers), generator=generator)
    return batch
