"""AEAFIRM: computes the features of a batch once, then each named loss.

losses = model(batch)                # {"supkl": ..., "match2": ..., "total": ...}, weighted
image_BD = model.encode_image(images)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from model.backbone import Backbone
from model.losses.firm import MatchingHead, SentenceTable, predict_attributes
from model.losses.inputs import Inputs, ModuleConfig, PartialMean, add_losses, checked_scalar
from model.losses.registry import LOSSES
from utils.devices import at_least_float32
from utils.distributed import SINGLE_PROCESS, Processes


class AEAFIRM(nn.Module):
    """A CLIP backbone with the modules that its losses need.

    Args:
        backbone: encodes images and captions.
        loss_names: names in `losses.registry.LOSSES`.
        options: all options; the losses read theirs.
        num_classes: training identities, for `id`.
        sentences: FIRM's sentence table; `match2` needs it.
        processes: each encodes a shard of the batch; the losses are those of the complete batch.
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
        self.needs_masked = any(row.masked for row in self.rows.values())
        self.generator = torch.Generator().manual_seed(options.seed)  # saved in checkpoints
        dim, vocab_size = backbone.config.embed_dim, backbone.config.vocab_size
        config = ModuleConfig(dim, vocab_size, num_classes, self.loss_names, options, sentences)
        self.sentences: SentenceTable | None = None
        self.module_names: list[str] = []
        for row in self.rows.values():
            for name, module in row.modules(config).items() if row.modules else ():
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

        Args:
            batch: `images` [B, 3, H, W], `caption_ids` [B, L] and `pids` [B]. Two views need
                `pair_images` [B, 3, H, W]. `match2` needs `attributes` and, with two views,
                `pair_attributes` [B, A]. `mlm` needs `masked_labels` [B, L], `masked_at` [X] (the
                positions of masked tokens among the B * L), and `masked_ids` [B, L] unless
                `caption_ids` are masked already.
        """
        return self.losses(self.encode(batch, sentences=True), batch)

    def encode(self, batch: dict[str, Tensor], sentences: bool = False) -> dict[str, Tensor]:
        """All outputs of the encoders that the losses need; row i depends on sample i only.

        Returns `image`, `pair` and `text` [B, D]; for `mlm` also `tokens` [B, N, D] of all views
        and `masked` [B, L, D].

        Args:
            sentences: add the result of `encode_sentences`, whose rows belong to no sample.
        """
        count, images = len(batch["caption_ids"]), batch["images"]
        if "pair_images" in batch:  # one encoder call for both views
            images = torch.cat([images, batch["pair_images"]])
        image_VD, tokens_VND = self.base_model.encode_images(images)
        encoded = dict(zip(("image", "pair"), image_VD.split(count), strict=False))
        if self.needs_masked:
            encoded["tokens"] = torch.cat(tokens_VND.split(count), dim=1)
        ids = {"text": batch["caption_ids"]}
        if self.needs_masked and "masked_ids" in batch:
            ids["masked"] = batch["masked_ids"]
        if sentences and self.sentences is not None:
            ids["sentences"] = self.sentences.ids
        for name, embedded in zip(ids, self.base_model.embed_tokens(*ids.values()), strict=True):
            pooled, tokens = self.base_model.encode_captions(ids[name], embedded)
            encoded[name] = tokens if name == "masked" else pooled
            if self.needs_masked and name == "text" and "masked" not in ids:
                encoded["masked"] = tokens  # `caption_ids` are masked: no second encoding
        return encoded

    def encode_sentences(self) -> dict[str, Tensor]:
        """FIRM's `sentences` [S, D]; empty without `match2`."""
        if self.sentences is None:
            return {}
        return {"sentences": self.base_model.encode_captions(self.sentences.ids)[0]}

    def losses(self, encoded: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Weighted losses by name, their sum `total`, and the scalars of `Inputs.log`.

        With several processes, each calls this with its own shard. `batch["counts"]` has the
        number of samples of each process. All get the same losses, those of the complete batch.

        Args:
            encoded: the result of `encode`, with that of `encode_sentences`.
            batch: see `forward`.
        """
        device = encoded["text"].device.type
        in_float32 = torch.autocast(device, enabled=False)
        with in_float32:
            inputs = self._gather_inputs(encoded, batch)
        losses = {}
        for name in self.loss_names:
            row = self.rows[name]
            if row.compute is None:
                continue
            with nullcontext() if row.autocast else in_float32:
                loss = row.compute(inputs)
            if isinstance(loss, PartialMean):
                loss = self._mean_over_processes(loss, batch)
            weight = self.options[row.weight] if row.weight else 1.0
            losses[name] = weight * checked_scalar(loss, name)
        for row in self.rows.values():
            if row.after:
                row.after(inputs)
        return {**losses, "total": add_losses(losses.values()), **inputs.logged}

    def predict_attributes(self, image_VD: Tensor) -> Tensor:
        """FIRM's class of each attribute, [V, A], whose sentences match the image best."""
        assert self.sentences is not None, "only a model with match2 predicts attributes"
        sentence_SD = self.encode_text(self.sentences.ids)
        return predict_attributes(self.atr_matching_head(sentence_SD, image_VD), self.sentences)

    def _gather_inputs(self, encoded: dict[str, Tensor], batch: dict[str, Any]) -> Inputs:
        """The losses' inputs: features and labels of all processes, tokens of this one."""
        features = self._gather(encoded, ("text", "image", "pair"), batch)
        labels = self._gather(batch, ("pids", "attributes", "pair_attributes"), batch)
        sentence_SD = encoded.get("sentences")
        return Inputs(
            text_BD=features["text"],
            image_BD=features["image"],
            pair_BD=features.get("pair"),
            pids_B=labels["pids"],
            labels=labels,
            sentence_SD=None if sentence_SD is None else at_least_float32(sentence_SD),
            local={**batch, **encoded},
            modules={name: getattr(self, name) for name in self.module_names},
            options=self.options,
            generator=self.generator,
        )

    def _gather(
        self, tensors: dict[str, Tensor], names: Sequence[str], batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Those of the named tensors [b, ...] that exist, from all processes, [B, ...]."""
        counts = self._sample_counts(batch)
        count = counts[self.processes.rank]
        parts = {name: tensors[name][:count] for name in names if name in tensors}
        parts = {n: at_least_float32(v) if v.is_floating_point() else v for n, v in parts.items()}
        return self.processes.all_gather(parts, counts)

    def _mean_over_processes(self, part: PartialMean, batch: dict[str, Any]) -> Tensor:
        """The sum of all processes' sums / the sum of their counts.

        A process without a sample has encoded a placeholder, which does not count.
        """
        part_2 = torch.stack([part.sum, torch.full_like(part.sum, part.count)])
        part_2 = part_2 * (self._sample_counts(batch)[self.processes.rank] > 0)
        parts = self.processes.all_gather({"mean": part_2[None]}, [1] * self.processes.size)
        total, count = parts["mean"].sum(0)
        return total / count

    def _sample_counts(self, batch: dict[str, Any]) -> list[int]:
        """Samples of each process."""
        return batch.get("counts", [len(batch["pids"])])
