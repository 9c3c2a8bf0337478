"""AEAFIRM: the features of a batch once, then each named loss.

losses = model(batch)                # {"supkl": ..., "match2": ..., "total": ...}, weighted
image_BD = model.encode_image(images)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from model.backbone import Backbone
from model.losses.firm import MatchingHead, SentenceTable, predict_attributes
from model.losses.inputs import Inputs, Mean, Setting
from model.losses.registry import LOSSES
from utils.devices import at_least_float32
from utils.distributed import SINGLE_PROCESS, Processes


class AEAFIRM(nn.Module):
    """A CLIP backbone with the modules that its losses need.

    Args:
        backbone: gives features and tokens of images and captions.
        loss_names: rows of `losses.registry.LOSSES`.
        options: all options; each loss reads its own.
        num_classes: training identities, for `id`.
        sentences: FIRM's sentence table; needed if `match2` is named.
        processes: the processes that encode a batch's shards; the losses are those of all of it.
    """

    atr_matching_head: MatchingHead  # if `match2` is named

    def __init__(
        self,
        backbone: Backbone,
        loss_names: Sequence[str],
        options: EasyDict,
        *,
        num_classes: int = 0,
        sentences: SentenceTable | None = None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.processes = processes
        self.base_model = backbone
        self.loss_names = tuple(loss_names)
        self.options = options
        self.rows = {name: row for name, row in LOSSES.items() if name in loss_names}
        self.masked = any(row.masked for row in self.rows.values())
        self.generator = torch.Generator().manual_seed(options.seed)  # saved in checkpoints
        dim, vocab_size = backbone.config.embed_dim, backbone.config.vocab_size
        setting = Setting(dim, vocab_size, num_classes, self.loss_names, options, sentences)
        self.sentences: SentenceTable | None = None
        self.module_names: list[str] = []
        for row in self.rows.values():
            for name, module in row.modules(setting).items() if row.modules else ():
                setattr(self, name, module)
                self.module_names.append(name)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Unnormalised image features [B, D], float32."""
        return at_least_float32(self.base_model.encode_images(images_BCHW)[0])

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Unnormalised text features [B, D], float32."""
        return at_least_float32(self.base_model.encode_captions(ids_BL)[0])

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a training batch; see `losses`.

        batch: `images` [B, 3, H, W] and `caption_ids` [B, L], `pids` [B]; with two views
        `pair_images`; for `match2` `attributes` and `pair_attributes` [B, A]; for `mlm`
        `masked_labels` [B, L] and `masked_at` [X], where labels are in B * L, and `masked_ids`
        [B, L], unless `caption_ids` are the masked ones.
        """
        return self.losses(self.encode(batch, sentences=True), batch)

    def encode(self, batch: dict[str, Tensor], sentences: bool = False) -> dict[str, Tensor]:
        """All that the losses need of the encoders, each row from its own sample alone.

        `image`, `pair` and `text` [B, D]; for `mlm` `tokens` [B, N, D] of all views and `masked`
        [B, L, D]. `sentences` adds what `encode_sentences` gives, which belongs to no sample.
        """
        count, images = len(batch["caption_ids"]), batch["images"]
        if "pair_images" in batch:  # one encoder call for both views
            images = torch.cat([images, batch["pair_images"]])
        image_VD, tokens_VND = self.base_model.encode_images(images)
        encoded = dict(zip(("image", "pair"), image_VD.split(count), strict=False))
        if self.masked:
            encoded["tokens"] = torch.cat(tokens_VND.split(count), dim=1)
        ids = {"text": batch["caption_ids"]}
        if self.masked and "masked_ids" in batch:
            ids["masked"] = batch["masked_ids"]
        if sentences and self.sentences is not None:
            ids["sentences"] = self.sentences.ids
        for name, rows in zip(ids, self.base_model.embed_tokens(*ids.values()), strict=True):
            pooled, tokens = self.base_model.encode_captions(ids[name], rows)
            encoded[name] = tokens if name == "masked" else pooled
            if self.masked and name == "text" and "masked" not in ids:  # one encoding for all
                encoded["masked"] = tokens
        return encoded

    def encode_sentences(self) -> dict[str, Tensor]:
        """FIRM's `sentences` [S, D], or nothing without `match2`."""
        if self.sentences is None:
            return {}
        return {"sentences": self.base_model.encode_captions(self.sentences.ids)[0]}

    def losses(self, encoded: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted losses by name, their sum `total`, and what losses log (`Inputs.log`).

        Of several processes each gives what it `encode`d of its shard, `batch["counts"]` says how
        many samples each has, and all get the same losses of all shards.
        """
        device = encoded["text"].device.type
        in_float32 = torch.autocast(device, enabled=False)
        with in_float32:
            inputs = self._inputs(encoded, batch)
        losses = {}
        for name in self.loss_names:
            row = self.rows[name]
            if row.compute is None:
                continue
            with nullcontext() if row.autocast else in_float32:
                loss = row.compute(inputs)
            if isinstance(loss, Mean):
                loss = self._mean(loss, batch)
            losses[name] = (self.options[row.weight] if row.weight else 1.0) * loss
        for row in self.rows.values():
            if row.after:
                row.after(inputs)
        return {**losses, "total": reduce(add, losses.values()), **inputs.logged}

    def _inputs(self, encoded: dict[str, Tensor], batch: dict[str, Any]) -> Inputs:
        """What the losses see: the rows of all processes' samples, and of the own the tokens."""
        features = self._gathered(encoded, ("text", "image", "pair"), batch)
        labels = self._gathered(batch, ("pids", "attributes", "pair_attributes"), batch)
        sentence_SD = encoded.get("sentences")
        return Inputs(
            text_BD=features["text"],
            image_BD=features["image"],
            pair_BD=features.get("pair"),
            pids_B=labels["pids"],
            labels=labels,
            sentence_SD=None if sentence_SD is None else at_least_float32(sentence_SD),
            own={**batch, **encoded},
            modules={name: getattr(self, name) for name in self.module_names},
            options=self.options,
            generator=self.generator,
        )

    def _gathered(
        self, parts: dict[str, Tensor], names: Sequence[str], batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The named tensors [b, ...] that are there, of all processes, [B, ...]."""
        counts = self._counts(batch)
        own = counts[self.processes.rank]
        found = {name: parts[name][:own] for name in names if name in parts}
        found = {n: at_least_float32(v) if v.is_floating_point() else v for n, v in found.items()}
        return self.processes.all_gather(found, counts)

    def _mean(self, mean: Mean, batch: dict[str, Any]) -> Tensor:
        """The sums of all processes over their counts. A process without a sample of its own has
        encoded a stand-in, which does not count."""
        both_2 = torch.stack([mean.sum, torch.full_like(mean.sum, mean.count)])
        both_2 = both_2 * (self._counts(batch)[self.processes.rank] > 0)
        gathered = self.processes.all_gather({"mean": both_2[None]}, [1] * self.processes.size)
        total, count = gathered["mean"].sum(0)
        return total / count

    def _counts(self, batch: dict[str, Any]) -> list[int]:
        """Samples of each process."""
        return batch.get("counts", [len(batch["pids"])])

    def predict_attributes(self, image_VD: Tensor) -> Tensor:
        """FIRM's class of each attribute, [V, A]: whose sentences match the image best."""
        assert self.sentences is not None, "only a model with match2 names attributes"
        sentence_SD = self.encode_text(self.sentences.ids)
        return predict_attributes(self.atr_matching_head(sentence_SD, image_VD), self.sentences)
