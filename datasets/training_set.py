"""The training set: images, tokens and labels, with the random numbers of the augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from datasets.image_cache import ImageFiles
from datasets.images import BrokenImage
from datasets.records import TrainSample
from datasets.samplers import Key
from datasets.text import TextAugmentation, TokenizedCaptions, trim
from datasets.transforms import UNIFORM_PLAIN
from utils.errors import UserError


class TrainDataset(Dataset[dict[str, Any]]):
    """Training samples by `Key`. `collate` makes a batch of them, a dict with

    - `images` [B, 3, H, W] uint8, and with two views `pair_images`
    - `uniform` [B, ...], random numbers in [0, 1) for the augmentation of `images`, and with two
      views `pair_uniform`
    - `NAME_uniform` [B, ...] for each further image of the first view
    - `pids` [B], and `index` [B], the position of each sample in `samples`
    - `caption_ids` [B, L], augmented
    - with attributes, `attributes` [B, A], and with two views `pair_attributes`
    - for the loss `mlm`, `masked_labels` [B, L]; `masked_at` [X], the positions of the X labels in
      the flattened captions; and `masked_ids` [B, L], unless `caption_ids` are already masked
    - `skipped`, only if samples were replaced: a list of messages

    L is the length of the batch's longest caption; for masked captions of `mlm` it is
    `text_length`.

    Args:
        images: the images of all samples; with two views, those of all pairs follow.
        numbers: the shape of the random numbers for each image.
        augment: augmentation of captions; None for none.
        skip: if an image of a sample is broken, take the next sample of the epoch instead.
        tokens: the captions' tokens, if they are known already.
        more_numbers: the same for further images of the first view, by name.
        noisy: `Data.noisy`, for the log.
    """

    def __init__(
        self,
        samples: Sequence[TrainSample],
        images: ImageFiles,
        numbers: tuple[int, ...] = (UNIFORM_PLAIN,),
        text_length: int = 77,
        augment: TextAugmentation | None = None,
        skip: bool = False,
        tokens: TokenizedCaptions | None = None,
        more_numbers: Mapping[str, tuple[int, ...]] | None = None,
        noisy: np.ndarray | None = None,
    ) -> None:
        self.samples, self.images, self.numbers = samples, images, numbers
        self.augment = augment or TextAugmentation()
        self.skip, self.more_numbers, self.noisy = skip, more_numbers or {}, noisy
        # Once for all epochs.
        captions = (sample.caption for sample in samples)
        self.caption_ids = tokens or TokenizedCaptions(captions, text_length)

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

    def _item(self, index: int, seed: int) -> dict[str, Any]:
        sample, ids = self.samples[index], self.caption_ids[index]
        generator = torch.Generator().manual_seed(seed)
        item: dict[str, Any] = {"index": index, "pids": sample.pid}
        item["images"] = self.images[index]
        item["uniform"] = torch.rand(self.numbers, generator=generator)
        if sample.pair is not None:
            item["pair_images"] = self.images[len(self.samples) + index]
            item["pair_uniform"] = torch.rand(self.numbers, generator=generator)
        if sample.image.attributes:
            item["attributes"] = torch.tensor(sample.image.attributes)
            if sample.pair is not None:
                item["pair_attributes"] = torch.tensor(sample.pair.attributes)
        item |= self.augment(ids, generator)
        for name, numbers in self.more_numbers.items():
            item[f"{name}_uniform"] = torch.rand(numbers, generator=generator)
        return item

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack the samples and trim the captions to the longest one.

        The captions of `mlm` keep their padding. In the original's cross-modal transformer words
        attend to the padding. So if it were trimmed, a sample's loss would depend on the other
        captions of its batch.
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
        if "masked_labels" in batch:  # on the CPU, because nonzero would wait for the GPU
            batch["masked_at"] = batch["masked_labels"].flatten().nonzero()[:, 0]
        return batch
