"""AEAFIRM: computes the features of a batch once, then each named loss.

losses = model(batch)                # {"supkl": ..., "match2": ..., "total": ...}, weighted
image_BD = model.encode_image(images)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn

from model.backbone import Backbone
from model.losses.firm import MatchingHead, SentenceTable, predict_attributes
from model.losses.inputs import (
    SAMPLES,
    Encoded,
    Inputs,
    ModuleConfig,
    PartialMean,
    add_losses,
    checked_scalar,
)
from model.losses.registry import LOSSES, check_backbone, more_images
from utils.devices import at_least_float32
from utils.distributed import SINGLE_PROCESS, Processes
from utils.errors import UserError


class AEAFIRM(nn.Module):
    """A CLIP backbone with the modules that its losses need.

    Args:
        backbone: encodes images and captions.
        loss_names: names in `losses.registry.LOSSES`.
        options: all options; the losses read theirs.
        num_classes: training identities, for `id`.
        sentences: FIRM's sentence table; `match2` needs it.
        processes: each encodes a shard of the batch; the losses are those of the complete batch.

    Raises UserError if a loss needs something that the backbone lacks.
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
        check_backbone(loss_names, options.pretrain_choice, backbone.config.is_resnet)
        self.processes = processes
        self.base_model = backbone
        self.loss_names = tuple(loss_names)
        self.options = options
        self.rows = {name: row for name, row in LOSSES.items() if name in loss_names}
        self.needs_masked = any(row.masked for row in self.rows.values())
        self.needs_attention = any(row.attention for row in self.rows.values())
        if self.needs_attention:
            backbone.keep_attention()
        self.more_images = more_images(loss_names)
        if options.learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(options.temperature)))
        self.generator = torch.Generator().manual_seed(options.seed)  # saved in checkpoints
        dim, vocab_size = backbone.config.embed_dim, backbone.config.vocab_size
        config = ModuleConfig(dim, vocab_size, num_classes, self.loss_names, options, sentences)
        self.sentences: SentenceTable | None = None
        self.module_names: list[str] = []
        for row in self.rows.values():
            for name, module in row.modules(config).items() if row.modules else ():
                setattr(self, name, module)
                self.module_names.append(name)

    @property
    def modules_by_name(self) -> dict[str, nn.Module]:
        """The losses' modules."""
        return {name: getattr(self, name) for name in self.module_names}

    def learned_scale(self) -> Tensor | None:
        """1 / temperature with --learn_temperature, else None. Keeps it in its bounds."""
        if not self.options.learn_temperature:
            return None
        with torch.no_grad():
            self.log_scale.clamp_(max=-math.log(self.options.min_temperature))
        return at_least_float32(self.log_scale).exp()

    @property
    def feature_dim(self) -> int:
        """The width of the features that `encode_image` and `encode_text` give."""
        widths = [self.options[row.feature_width] for row in self.rows.values() if row.feature]
        return self.base_model.config.embed_dim + sum(widths)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Unnormalised image features [B, `feature_dim`], float32, whose cosines are the scores.

        The first D are the backbone's. If losses add features for the ranking, these follow, scaled
        to the same norm: so the cosine is the mean of the cosines of each.
        """
        return self._join_features(self._encode_images(images_BCHW))

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Unnormalised text features [B, `feature_dim`], like those of images."""
        return self._join_features(self._encode_captions(ids_BL))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a training batch; see `losses`.

        Args:
            batch: `images` [B, 3, H, W], `caption_ids` [B, L] and `pids` [B]. Two views need
                `pair_images` [B, 3, H, W]. `match2` needs `attributes` and, with two views,
                `pair_attributes` [B, A]. `mlm` needs `masked_labels` [B, L], `masked_at` [X] (the
                positions of masked tokens among the B * L), and `masked_ids` [B, L] unless
                `caption_ids` are masked already. Losses with `images` need `NAME_images` of the
                shape of `images`. `sample/NAME` [B] are values of a `before_epoch`; `epochs` is
                `Inputs.epochs`.
        """
        return self.losses(self.encode(batch, sentences=True), batch)

    def inputs(self, batch: dict[str, Any]) -> tuple[Inputs, Tensor]:
        """What a loss's `before_epoch` gets of a batch of all processes, and the indices of its
        samples [B]."""
        rows = [row for row in self.rows.values() if row.before_epoch]
        encoded = self.encode(batch, sentences=any(row.attributes for row in rows))
        with torch.autocast(encoded["text"].device.type, enabled=False):
            index_B = self._gather(batch, ("index",), batch)["index"]
            return self._gather_inputs(encoded, batch), index_B

    def encode(self, batch: dict[str, Tensor], sentences: bool = False) -> dict[str, Tensor]:
        """All outputs of the encoders that the losses need; row i depends on sample i only.

        Returns `image`, `pair` and `text` [B, D]; for `mlm` also `tokens` [B, N, D] of all views
        and `masked` [B, L, D]; the features [B, D] of further images by name; and the losses'
        `outputs`, as "text/NAME", "image/NAME" and "pair/NAME".

        Args:
            sentences: add the result of `encode_sentences`, whose rows belong to no sample.
        """
        count, images = len(batch["caption_ids"]), {"image": batch["images"]}
        if "pair_images" in batch:
            images["pair"] = batch["pair_images"]
        views = tuple(images)
        more = [name for name in self.more_images if f"{name}_images" in batch]
        images |= {name: batch[f"{name}_images"] for name in more}
        together = torch.cat(list(images.values())) if len(images) > 1 else batch["images"]
        parts = self._encode_images(together).split(count)  # one encoder call
        by_name = dict(zip(images, parts, strict=True))
        encoded = {name: part.pooled_BD for name, part in by_name.items()}
        if self.needs_masked:
            encoded["tokens"] = torch.cat([by_name[view].tokens_BLD for view in views], dim=1)
        for view in views:
            encoded |= self._outputs(view, by_name[view])
        ids = {"text": batch["caption_ids"]}
        if self.needs_masked and "masked_ids" in batch:
            ids["masked"] = batch["masked_ids"]
        if sentences and self.sentences is not None:
            ids["sentences"] = self.sentences.ids
        for name, embedded in zip(ids, self.base_model.embed_tokens(*ids.values()), strict=True):
            captions = self._encode_captions(ids[name], embedded, name == "text")
            encoded[name] = captions.tokens_BLD if name == "masked" else captions.pooled_BD
            if name == "text":
                encoded |= self._outputs("text", captions)
            if self.needs_masked and name == "text" and "masked" not in ids:
                encoded["masked"] = captions.tokens_BLD  # masked already: no second encoding
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
        Raises UserError if no loss uses the temperature that `--learn_temperature` learns.

        Args:
            encoded: the result of `encode`, with that of `encode_sentences`.
            batch: see `forward`.
        """
        device = encoded["text"].device.type
        in_float32 = torch.autocast(device, enabled=False)
        with in_float32:
            inputs = self._gather_inputs(encoded, batch)
            if inputs.learned_scale is not None:
                inputs.log("temperature/learned", 1 / inputs.learned_scale)
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
        if inputs.learned_scale is not None and not inputs.scale_is_used:
            raise UserError(
                f"--learn_temperature: no loss of {'+'.join(self.loss_names)} has this "
                "temperature; leave the option out"
            )
        for row in self.rows.values():
            if row.after:
                row.after(inputs)
        return {**losses, "total": add_losses(losses.values()), **inputs.logged}

    def match_sentences(self, feature_VD: Tensor, sentence_SD: Tensor | None = None) -> Tensor:
        """FIRM's logits [V, S, 2]: does sentence S match image V?

        Args:
            feature_VD: of `encode_image`.
            sentence_SD: of `encode_text`, if known already.
        """
        assert self.sentences is not None, "only a model with match2 predicts attributes"
        dim = self.base_model.config.embed_dim
        if sentence_SD is None:
            sentence_SD = self.encode_text(self.sentences.ids)
        return self.atr_matching_head(sentence_SD[:, :dim], feature_VD[:, :dim])

    def predict_attributes(self, image_VD: Tensor) -> Tensor:
        """FIRM's class of each attribute, [V, A], whose sentences match the image best."""
        assert self.sentences is not None, "only a model with match2 predicts attributes"
        return predict_attributes(self.match_sentences(image_VD), self.sentences)

    def _encode_images(self, images_BCHW: Tensor) -> Encoded:
        pooled_BD, tokens_BND = self.base_model.encode_images(images_BCHW)
        attention = self.base_model.pooled_attention("image") if self.needs_attention else None
        return Encoded(pooled_BD, tokens_BND, attention, None, self.modules_by_name, self.options)

    def _encode_captions(
        self, ids_BL: Tensor, embedded_BLE: Tensor | None = None, attended: bool = True
    ) -> Encoded:
        pooled_BD, tokens_BLD = self.base_model.encode_captions(ids_BL, embedded_BLE)
        attention = None
        if self.needs_attention and attended:
            attention = self.base_model.pooled_attention("text", ids_BL)
        return Encoded(pooled_BD, tokens_BLD, attention, ids_BL, self.modules_by_name, self.options)

    def _outputs(self, part: str, encoded: Encoded) -> dict[str, Tensor]:
        """What the losses keep of a part ("text", "image" or "pair")."""
        kept: dict[str, Tensor] = {}
        for row in self.rows.values():
            if row.outputs:
                kept |= {f"{part}/{name}": value for name, value in row.outputs(encoded).items()}
        return kept

    def _join_features(self, encoded: Encoded) -> Tensor:
        feature_BD = at_least_float32(encoded.pooled_BD)
        with torch.autocast(feature_BD.device.type, enabled=False):
            more = [row.feature(encoded) for row in self.rows.values() if row.feature]
            norm_B1 = feature_BD.norm(dim=1, keepdim=True)
            scaled = [norm_B1 * F.normalize(other, dim=1) for other in more]
        return torch.cat([feature_BD, *scaled], dim=1) if more else feature_BD

    def _gather_inputs(self, encoded: dict[str, Tensor], batch: dict[str, Any]) -> Inputs:
        """The losses' inputs: features and labels of all processes, tokens of this one."""
        outputs = [name for name in encoded if "/" in name]
        names = ("text", "image", "pair", *self.more_images, *outputs)
        features = self._gather(encoded, names, batch)
        samples = [name for name in batch if name.startswith(SAMPLES)]
        labels = self._gather(batch, ("pids", "attributes", "pair_attributes"), batch)
        values = self._gather(batch, samples, batch)
        sentence_SD = encoded.get("sentences")
        return Inputs(
            text_BD=features["text"],
            image_BD=features["image"],
            pair_BD=features.get("pair"),
            pids_B=labels["pids"],
            labels=labels,
            images={name: features[name] for name in self.more_images if name in features},
            outputs={name: features[name] for name in outputs},
            samples={name.removeprefix(SAMPLES): value for name, value in values.items()},
            sentence_SD=None if sentence_SD is None else at_least_float32(sentence_SD),
            local={**batch, **encoded},
            modules=self.modules_by_name,
            options=self.options,
            learned_scale=self.learned_scale(),
            epochs=batch.get("epochs", 0.0),
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
