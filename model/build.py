"""Options to model, and weights of a checkpoint into it.

model = build_training_model(args, loss_names, num_classes)
model = build_evaluation_model(args, load_checkpoint(path), path)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import open_clip
import torch
from easydict import EasyDict
from prettytable import PrettyTable
from torch import Tensor

from model.aeafirm import AEAFIRM
from model.backbone import Backbone, load_backbone
from model.losses.firm import SentenceTable
from model.losses.registry import LOSSES
from model.weights import (
    UNSEEN,
    BackboneConfig,
    config_of,
    described,
    fit_positions,
    named_config,
    parse_choice,
    recorded_input,
)
from utils.attributes import read_attributes
from utils.checkpoint import refuse_nonfinite
from utils.distributed import SINGLE_PROCESS, Processes
from utils.errors import UserError, suggest

PREFIX = "base_model."  # of the backbone's weights in a checkpoint


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
        config = config_of(weights, "checkpoint")
        if parse_choice(args.pretrain_choice).tag != "openai":
            named = named_config(args.pretrain_choice) or config
            config = replace(config, **{name: getattr(named, name) for name in UNSEEN})
            if replace(config, mlp_ratio=named.mlp_ratio) != named:
                raise UserError(
                    f"--pretrain_choice {args.pretrain_choice}: the checkpoint is of another "
                    "architecture; configs.yaml and checkpoint must be of one run"
                )
        backbone = Backbone(config, image_size, args.stride_size, half)
    else:
        scratch = BackboneConfig(
            embed_dim=args.embed_dim,
            vision_layers=args.vision_layers,
            vision_width=args.vision_width,
            vision_patch_size=args.vision_patch_size,
            text_width=args.text_width,
            text_layers=args.text_layers,
            vocab_size=args.vocab_size,
        )
        backbone = load_backbone(args.pretrain_choice, image_size, args.stride_size, scratch, half)
    config = backbone.config
    if config.vocab_size != args.vocab_size:
        raise UserError(f"--vocab_size {args.vocab_size}: the weights have {config.vocab_size}")
    if config.context_length < args.text_length:
        raise UserError(
            f"--text_length {args.text_length}: the weights have positions for "
            f"{config.context_length} tokens"
        )
    return backbone


def build_model(
    args: EasyDict,
    loss_names: Sequence[str],
    num_classes: int,
    weights: dict[str, Tensor] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> AEAFIRM:
    """The model that the options describe, on the CPU.

    Args:
        loss_names: checked names (`losses.parse_loss_names`).
        num_classes: training identities.
        weights: see `build_backbone`.
    """
    torch.manual_seed(args.seed)
    attributes = any(LOSSES[name].attributes for name in loss_names)
    model = AEAFIRM(
        build_backbone(args, weights),
        loss_names,
        args,
        num_classes=num_classes,
        sentences=build_sentences(args) if attributes else None,
        processes=processes,
    )
    if args.precision == "half":
        open_clip.model.convert_weights_to_fp16(model)
    return model.double() if args.precision == "fp64" else model


def build_training_model(
    args: EasyDict,
    loss_names: Sequence[str],
    num_classes: int,
    processes: Processes = SINGLE_PROCESS,
) -> AEAFIRM:
    """`build_model`, with what only training needs: checkpointed gradients, compiled encoders."""
    model = build_model(args, loss_names, num_classes, processes=processes)
    if model.base_model.config.is_resnet and (args.accum_steps > 1 or processes.size > 1):
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
    if model.base_model.config.is_resnet and images * rows * columns == 1:
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
    heads = ("match2", "dot", "cat") if "atr_matching_head.weight" in weights else ()
    names = [name for name in args.loss_names.split("+") if name in heads]
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
    refuse_nonfinite(weights, where)
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
    clip, told = fit_positions(clip, backbone.config, backbone.grid, checkpoint, where, same=True)
    source = {**weights, **{PREFIX + n: v for n, v in clip.items()}}
    resized = [n for n, v in source.items() if v is not weights[n]]
    fitting = {n: v for n, v in source.items() if n in own and v.shape == own[n].shape}
    if not any(n.startswith(PREFIX) for n in fitting):
        raise UserError(
            f"--finetune {where}: nothing fits: none of its {len(weights)} weights has the name "
            f"and shape of one of the backbone's (found {', '.join(sorted(weights)[:3])}, ...)"
        )
    refuse_nonfinite(fitting, where)
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
