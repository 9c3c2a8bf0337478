"""AEAFIRM: the features of a batch once, then each named loss.

model = build_model(args, loss_names, num_classes)
losses = model(batch)                # {"supkl": ..., "match2": ...}, weighted
image_BD = model.encode_image(images)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from easydict import EasyDict
from prettytable import PrettyTable
from torch import Tensor, nn

from model.aea import FeatureQueue
from model.backbone import Backbone, load_backbone
from model.firm import SentenceTable, match_logits, predict_attributes
from model.losses import LOSSES, Step
from model.mlm import cross_modal_parts, masked_token_logits
from model.weights import (
    UNSEEN,
    BackboneSizes,
    described,
    fit_positions,
    named_sizes,
    parse_choice,
    recorded_input,
    sizes_of,
)
from utils.attributes import read_attributes
from utils.checkpoint import refuse_dead
from utils.devices import full
from utils.distributed import ALONE, World
from utils.errors import UserError, suggest

PREFIX = "base_model."  # of the backbone's weights in a checkpoint


class AEAFIRM(nn.Module):
    """A CLIP backbone with the heads that its losses need.

    Args:
        backbone: gives features and tokens of images and captions.
        loss_names: rows of `losses.LOSSES`.
        num_classes: training identities, for `id`.
        temperature: of all similarities; fixed.
        slack: AEA's extra target weight of the direct pair.
        queue_size: slots of AEA's queue; used if `queue` is named.
        sentences: FIRM's sentence table; needed if `match2` is named.
        weights: factor of a loss by name; 1 where absent.
        cmt_depth: layers of the cross-modal transformer of `mlm`.
        seed: of FIRM's draws.
        world: the processes that encode a batch's shares; the losses are those of all of it.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss_names: Sequence[str] = (),
        *,
        num_classes: int = 0,
        temperature: float = 0.02,
        slack: float = 0.15,
        queue_size: int = 0,
        sentences: SentenceTable | None = None,
        weights: dict[str, float] | None = None,
        cmt_depth: int = 4,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.world = world
        self.base_model = backbone
        self.loss_names = tuple(loss_names)
        self.scale = 1 / temperature
        self.slack = slack
        self.weights = weights or {}
        self.generator = torch.Generator().manual_seed(seed)  # FIRM's draws; saved in checkpoints
        dim = backbone.sizes.embed_dim
        self.queue = FeatureQueue(queue_size, dim) if "queue" in loss_names else None
        if "match2" in loss_names:
            self.sentences = sentences
            self.fusion = "dot" if "dot" in loss_names else "cat"
            self.atr_matching_head = nn.Linear(dim if self.fusion == "dot" else 2 * dim, 2)
        if "id" in loss_names:
            self.classifier = nn.Linear(dim, num_classes)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)
        if "mlm" in loss_names:
            for name, part in cross_modal_parts(dim, cmt_depth, backbone.sizes.vocab_size).items():
                self.add_module(name, part)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Unnormalised image features [B, D], float32."""
        return full(self.base_model.encode_images(images_BCHW)[0])

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Unnormalised text features [B, D], float32."""
        return full(self.base_model.encode_captions(ids_BL)[0])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses of a training batch, by name.

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
        count, masked = len(batch["caption_ids"]), "mlm" in self.loss_names
        images = batch["images"]
        if "pair_images" in batch:  # one encoder call for both views
            images = torch.cat([images, batch["pair_images"]])
        image_VD, tokens_VND = self.base_model.encode_images(images)
        encoded = dict(zip(("image", "pair"), image_VD.split(count), strict=False))
        if masked:
            encoded["tokens"] = torch.cat(tokens_VND.split(count), dim=1)
        ids = {"text": batch["caption_ids"]}
        if masked and "masked_ids" in batch:
            ids["masked"] = batch["masked_ids"]
        if sentences and "match2" in self.loss_names:
            ids["sentences"] = self.sentences.ids
        for name, rows in zip(ids, self.base_model.embed_tokens(*ids.values()), strict=True):
            pooled, tokens = self.base_model.encode_captions(ids[name], rows)
            encoded[name] = tokens if name == "masked" else pooled
            if masked and name == "text" and "masked" not in ids:  # one encoding for all losses
                encoded["masked"] = tokens
        return encoded

    def encode_sentences(self) -> dict[str, Tensor]:
        """FIRM's `sentences` [S, D], or nothing without `match2`."""
        if "match2" not in self.loss_names:
            return {}
        return {"sentences": self.base_model.encode_captions(self.sentences.ids)[0]}

    def losses(self, encoded: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses by name, of what `encode` returned for the whole batch.

        Of several processes each gives what it encoded of its share, `batch["counts"]` says how
        many samples each has, and all get the same losses of all shares.
        """
        world, count = self.world, len(batch["pids"])
        counts = batch.get("counts", [count])
        masked_2 = None
        if "mlm" in self.loss_names:
            at_X = batch["masked_at"]
            logits_XT = masked_token_logits(self, encoded["masked"], encoded["tokens"], at_X)
            labels_X = batch["masked_labels"].flatten()[at_X]
            with torch.autocast(logits_XT.device.type, enabled=False):
                loss_X = F.cross_entropy(full(logits_XT), labels_X, reduction="none")
            # Sum and number, since shares have different numbers of masked tokens; those of a
            # stand-in for an empty share do not count.
            masked_2 = torch.stack([loss_X.sum(), torch.full_like(loss_X[:1].sum(), len(loss_X))])
            masked_2 = masked_2 * (counts[world.rank] > 0)
            masked_2 = world.gather({"masked": masked_2[None]}, [1] * world.size)["masked"].sum(0)
        with torch.autocast(encoded["text"].device.type, enabled=False):  # mathematics in float32
            features = self._whole(encoded, ("text", "image", "pair"), counts)
            labels = self._whole(batch, ("pids", "attributes", "pair_attributes"), counts)
            step = Step(
                text_BD=features["text"],
                image_BD=features["image"],
                pair_BD=features.get("pair"),
                pids_B=labels["pids"],
                scale=self.scale,
                heads=self,
                labels=labels,
                sentence_SD=full(encoded["sentences"]) if "match2" in self.loss_names else None,
                masked_loss=None if masked_2 is None else masked_2[0] / masked_2[1],
                queue=self.queue,
                slack=self.slack,
            )
            losses = {
                name: self.weights.get(name, 1.0) * LOSSES[name].compute(step)
                for name in self.loss_names
                if LOSSES[name].compute
            }
        if self.queue is not None:
            self.queue.push(step.unit["text"], step.unit["image"], step.pids_B)
        return losses

    def _whole(
        self, parts: dict[str, Tensor], names: Sequence[str], counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """The named tensors [b, ...] that are there, of all processes, [B, ...]."""
        own = counts[self.world.rank]
        found = {name: parts[name][:own] for name in names if name in parts}
        found = {n: full(v) if v.is_floating_point() else v for n, v in found.items()}
        return self.world.gather(found, counts)

    def classify(self, feature_BD: Tensor) -> Tensor:
        """Identity logits [B, C], float32."""
        head = self.classifier
        return F.linear(feature_BD, full(head.weight), full(head.bias))

    def match(self, sentence_SD: Tensor, image_VD: Tensor) -> Tensor:
        """The matching head's two outputs for every image and sentence, [V, S, 2], float32."""
        head = self.atr_matching_head
        weight, bias = full(head.weight), full(head.bias)
        return match_logits(sentence_SD, image_VD, weight, bias, self.fusion)

    def predict_attributes(self, image_VD: Tensor) -> Tensor:
        """FIRM's class of each attribute, [V, A]: whose sentences match the image best."""
        sentence_SD = self.encode_text(self.sentences.ids)
        return predict_attributes(self.match(sentence_SD, image_VD), self.sentences)


def build_sentences(args: EasyDict) -> SentenceTable:
    """FIRM's sentence table from `--attributes_file`, tokenized and cut to the longest."""
    attributes = read_attributes(args.attributes_file)
    names = [a.name for a in attributes]
    for name in args.firm_attributes:
        if name not in names:
            raise UserError(
                f"--firm_attributes {name}: {args.attributes_file} has {', '.join(names)}."
                f"{suggest(name, names)}"
            )
    columns = [names.index(name) for name in args.firm_attributes or names]
    attributes = [attributes[column] for column in columns]
    texts = [text for a in attributes for group in a.sentences for text in group]
    ids_SL = open_clip.tokenize(texts, context_length=args.text_length)
    ids_SL = ids_SL[:, : int((ids_SL != 0).sum(dim=1).max())]
    counts = [[len(group) for group in a.sentences] for a in attributes]
    return SentenceTable(counts, ids_SL, args.negatives, columns)


def build_backbone(args: EasyDict, weights: dict[str, Tensor] | None = None) -> Backbone:
    """The backbone that the options describe.

    Args:
        weights: a state dict in OpenAI's naming whose shapes give the architecture instead of
            `--pretrain_choice`, as for a checkpoint; the values are not loaded here.
    """
    image_size, half = tuple(args.img_size), args.precision == "half"
    if weights is not None:
        sizes = sizes_of(weights, "checkpoint")
        if parse_choice(args.pretrain_choice).tag != "openai":
            named = named_sizes(args.pretrain_choice) or sizes
            sizes = replace(sizes, **{name: getattr(named, name) for name in UNSEEN})
            if replace(sizes, mlp_ratio=named.mlp_ratio) != named:
                raise UserError(
                    f"--pretrain_choice {args.pretrain_choice}: the checkpoint is of another "
                    "architecture; configs.yaml and checkpoint must be of one run"
                )
        backbone = Backbone(sizes, image_size, args.stride_size, half)
    else:
        scratch = BackboneSizes(
            embed_dim=args.embed_dim,
            vision_layers=args.vision_layers,
            vision_width=args.vision_width,
            vision_patch_size=args.vision_patch_size,
            text_width=args.text_width,
            text_layers=args.text_layers,
            vocab_size=args.vocab_size,
        )
        backbone = load_backbone(args.pretrain_choice, image_size, args.stride_size, scratch, half)
    sizes = backbone.sizes
    if sizes.vocab_size != args.vocab_size:
        raise UserError(f"--vocab_size {args.vocab_size}: the weights have {sizes.vocab_size}")
    if sizes.context_length < args.text_length:
        raise UserError(
            f"--text_length {args.text_length}: the weights have positions for "
            f"{sizes.context_length} tokens"
        )
    return backbone


def build_model(
    args: EasyDict,
    loss_names: Sequence[str],
    num_classes: int,
    weights: dict[str, Tensor] | None = None,
    world: World = ALONE,
) -> AEAFIRM:
    """The model that the options describe, on the CPU.

    Args:
        loss_names: checked names (`losses.parse_loss_names`).
        num_classes: training identities.
        weights: see `build_backbone`.
    """
    torch.manual_seed(args.seed)
    model = AEAFIRM(
        build_backbone(args, weights),
        loss_names,
        num_classes=num_classes,
        temperature=args.temperature,
        slack=args.slack,
        queue_size=args.queue_batches * args.batch_size,
        sentences=build_sentences(args) if "match2" in loss_names else None,
        weights={
            "match2": args.match_loss_weight,
            "id": args.id_loss_weight,
            "mlm": args.mlm_loss_weight,
        },
        cmt_depth=args.cmt_depth,
        seed=args.seed,
        world=world,
    )
    if args.precision == "half":
        open_clip.model.convert_weights_to_fp16(model)
    return model.double() if args.precision == "fp64" else model


def build_training_model(
    args: EasyDict, loss_names: Sequence[str], num_classes: int, world: World = ALONE
) -> AEAFIRM:
    """`build_model`, with what only training needs: checkpointed gradients, compiled encoders."""
    model = build_model(args, loss_names, num_classes, world=world)
    if model.base_model.sizes.is_resnet and (args.accum_steps > 1 or world.size > 1):
        flag = "--accum_steps" if args.accum_steps > 1 else "torchrun with several processes"
        raise UserError(
            f"{flag}: a ResNet normalises by the statistics of what is encoded together, so "
            "parts would not give the numbers of the whole batch"
        )
    if args.grad_checkpointing:
        model.base_model.checkpoint_gradients()
    if args.compile:
        model.base_model.compile_encoders()
    return model


def check_batch_norm(model: AEAFIRM, args: EasyDict, images: int) -> None:
    """Raise UserError if the smallest batch of a training, of so many images, leaves a ResNet's
    last layers a single value of each channel: it has no variance to normalise by."""
    rows, columns = model.base_model.grid
    if model.base_model.sizes.is_resnet and images * rows * columns == 1:
        height, width = args.img_size
        raise UserError(
            f"--batch_size {args.batch_size}: an epoch's last batch is a single image, of which a "
            f"ResNet has a map of 1x1 at --img_size {height} {width}, and batch normalisation "
            "needs two values; give another batch size, or larger images"
        )


def build_evaluation_model(args: EasyDict, checkpoint: dict[str, Any], where: str) -> AEAFIRM:
    """The model of a checkpoint: backbone, and FIRM's head if it was trained.

    The architecture is read off the weights, so no pretrained file is needed. Raises UserError if
    the weights do not fit the options, or are not finite.
    """
    weights = checkpoint["model"]
    clip = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    names = ("match2", "dot", "cat") if "atr_matching_head.weight" in weights else ()
    names = [name for name in args.loss_names.split("+") if name in names]
    if not clip:
        raise UserError(
            f"{where}: no weights named {PREFIX}*; is this a checkpoint of this family?"
        )
    model = build_model(args, names, num_classes=0, weights=clip)
    check_input(model.base_model, checkpoint, where)
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in weights:
            raise UserError(f"{where}: {name} is missing")
        if weights[name].shape != value.shape:
            raise UserError(
                f"{where}: {name} has the shape {tuple(weights[name].shape)}, the options of the "
                f"run make it {tuple(value.shape)}; configs.yaml and checkpoint must be of one run"
            )
    weights = {name: weights[name] for name in wanted}
    refuse_dead(weights, where)
    model.load_state_dict(weights)
    if "assumed" in checkpoint:
        model.base_model.notes.append(checkpoint["assumed"])
    return model


def check_input(backbone: Backbone, checkpoint: dict[str, Any], where: str) -> None:
    """Raises UserError if a checkpoint says that it is of another image size or stride."""
    its = recorded_input(checkpoint)
    if its and its != backbone.input:
        raise UserError(
            f"{where}: is of images of {described(its)}, the options say "
            f"{described(backbone.input)}; configs.yaml and checkpoint must be of one run "
            "(--finetune resizes)"
        )


def load_fitting(model: AEAFIRM, checkpoint: dict[str, Any], where: str) -> str:
    """Load every weight whose name and shape fit (`--finetune`); returns a report to log.

    Position embeddings of another image size or stride are resized. Raises UserError if no weight
    of the backbone fits, or one is not finite.
    """
    own, weights, backbone = model.state_dict(), checkpoint["model"], model.base_model
    clip = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    clip, told = fit_positions(clip, backbone.sizes, backbone.grid, checkpoint, where, same=True)
    source = {**weights, **{PREFIX + n: v for n, v in clip.items()}}
    resized = [n for n, v in source.items() if v is not weights[n]]
    fitting = {n: v for n, v in source.items() if n in own and v.shape == own[n].shape}
    if not any(n.startswith(PREFIX) for n in fitting):
        raise UserError(
            f"--finetune {where}: nothing fits: none of its {len(weights)} weights has the name "
            f"and shape of one of the backbone's (found {', '.join(sorted(weights)[:3])}, ...)"
        )
    refuse_dead(fitting, where)
    model.load_state_dict(fitting, strict=False)
    other = [n for n in source if n in own and n not in fitting]
    groups = {
        "loaded": [n for n in fitting if n not in resized],
        "resized": [n for n in resized if n in fitting],
        "skipped, other shape": other,
        "skipped, unknown here": [n for n in source if n not in own],
        "left as initialised": [n for n in own if n not in fitting],
    }
    table = PrettyTable(["finetune", "weights", "such as"])
    table.align = "l"
    for what, names in groups.items():
        table.add_row([what, len(names), names[0] if names else ""])
    notes = [note for note in (checkpoint.get("assumed"), told) if note]
    return "\n".join([*notes, where, table.get_string()])
