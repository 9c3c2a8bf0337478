"""Build a model from options, and load the weights of a checkpoint into it.

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.aeafirm import AEAFIRM
from model.backbone import Backbone, load_backbone
from model.lora import add_lora, with_base
from model.losses.firm import SentenceTable
from model.losses.registry import LOSSES, check_backbone
from model.weights import (
    NOT_IN_SHAPES,
    PREFIX,
    BackboneConfig,
    config_from_choice,
    config_from_weights,
    format_input,
    parse_choice,
    recorded_input,
    resize_positions,
)
from utils.attributes import read_attributes
from utils.checkpoint import load_checkpoint, refuse_nonfinite
from utils.distributed import SINGLE_PROCESS, Processes
from utils.errors import UserError, suggest
from utils.tables import console
from utils.text import Multiline, visible


def build_sentences(args: EasyDict) -> SentenceTable:
    """FIRM's sentence table from `--attributes_file`, tokenized and cut to the longest sentence.

    Raises UserError for a name in `--firm_attributes` that the file does not have.
    """
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
    ids_SL = ids_SL[:, : int(ids_SL.argmax(dim=1).max()) + 1].clone()
    counts = [[len(group) for group in a.sentences] for a in attributes]
    return SentenceTable(counts, ids_SL, args.negatives, columns)


def build_backbone(args: EasyDict, weights: dict[str, Tensor] | None = None) -> Backbone:
    """The backbone that the options describe.

    Args:
        weights: a checkpoint's state dict in OpenAI's naming. Its shapes give the architecture
            instead of `--pretrain_choice`. Its values are not loaded here.

    Raises UserError if options and weights do not fit together.
    """
    image_size, half = tuple(args.img_size), args.precision == "half"
    if weights is not None:
        config = config_from_weights(weights, "checkpoint")
        if parse_choice(args.pretrain_choice).tag != "openai":
            named = config_from_choice(args.pretrain_choice) or config
            config = replace(config, **{name: getattr(named, name) for name in NOT_IN_SHAPES})
            if replace(config, mlp_ratio=named.mlp_ratio) != named:
                raise UserError(
                    f"--pretrain_choice {args.pretrain_choice}: the checkpoint has another "
                    "architecture; use the configs.yaml and the checkpoint of the same run"
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
    """The model that the options describe, on the CPU. `--seed` gives its initial weights.

    Args:
        loss_names: checked names (`losses.registry.parse_loss_names`).
        num_classes: training identities.
        weights: see `build_backbone`.
        processes: see `AEAFIRM`.
    """
    attributes = any(LOSSES[name].attributes for name in loss_names)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(args.seed)
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


def check_architecture(
    args: EasyDict, loss_names: Sequence[str], processes: Processes = SINGLE_PROCESS
) -> None:
    """Raise UserError if the architecture that `--pretrain_choice` names cannot have these losses
    or options. It looks for no weights: those in a file without a model's name are refused by
    `build_training_model`."""
    config = config_from_choice(args.pretrain_choice)
    if config and config.is_resnet:
        check_backbone(loss_names, args.pretrain_choice, is_resnet=True)
        refuse_for_resnet(args, processes)


def build_training_model(
    args: EasyDict,
    loss_names: Sequence[str],
    num_classes: int,
    processes: Processes = SINGLE_PROCESS,
) -> AEAFIRM:
    """`build_model` with what only training needs: the weights of `--finetune` (a resumed run has
    its own, but LoRA's base weights are not in its checkpoint), LoRA, gradient checkpointing,
    compiled encoders.

    Raises UserError, also for an option that a ResNet cannot have.
    """
    model = build_model(args, loss_names, num_classes, processes=processes)
    if model.base_model.config.is_resnet:
        refuse_for_resnet(args, processes)
    if args.finetune and (args.lora_rank or not args.resume_ckpt_file):
        report = load_fitting(model, load_checkpoint(args.finetune), args.finetune)
        model.base_model.notes.append(report)
    if args.lora_rank:
        add_lora(model.base_model, args)
    if args.grad_checkpointing:
        model.base_model.set_grad_checkpointing(True)
    if args.compile:
        model.base_model.compile_encoders()
    return model


def refuse_for_resnet(args: EasyDict, processes: Processes) -> None:
    """Raise UserError for an option of the training that a ResNet cannot have."""
    parts = (
        "a ResNet normalises by the statistics of the images of one encoder call, so parts would "
        "not give the features of the complete batch"
    )
    for given, flag, reason in (
        (args.accum_steps > 1, "--accum_steps", parts),
        (processes.size > 1, "torchrun with several processes", parts),
        (
            args.average_last > 0,
            "--average_last",
            "a ResNet's statistics of batch normalisation do "
            "not belong to a mean of weights; --ema averages both",
        ),
        (args.layer_decay < 1, "--layer_decay", "it counts blocks of a ViT; leave it out"),
        (
            args.grad_checkpointing,
            "--grad_checkpointing",
            "open_clip's ResNets do not support it; leave it out",
        ),
        (
            args.lora_rank > 0,
            "--lora_rank",
            "a ResNet has no attention and MLP blocks to adapt; use a ViT",
        ),
    ):
        if given:
            raise UserError(f"{flag}: {reason}")


def check_batch_norm(model: AEAFIRM, args: EasyDict, images: int) -> None:
    """Raise UserError if the smallest batch of the training is too small for a ResNet.

    Its last layers need two values of each channel, because one value has no variance.

    Args:
        images: images of that batch.
    """
    rows, columns = model.base_model.grid
    if model.base_model.config.is_resnet and images * rows * columns == 1:
        height, width = args.img_size
        raise UserError(
            f"--batch_size {args.batch_size}: an epoch's last batch is a single image, for which a "
            f"ResNet has a 1x1 feature map at --img_size {height} {width}, but batch normalisation "
            "needs two values; use another batch size, or larger images"
        )


def build_evaluation_model(args: EasyDict, checkpoint: dict[str, Any], where: str) -> AEAFIRM:
    """The model of a checkpoint: the backbone, and FIRM's head if the checkpoint has it.

    The weights' shapes give the architecture, so no pretrained file is needed, except for LoRA,
    whose updates are added to the weights of the file that it started from. Raises UserError if
    the weights do not fit the options, or are not finite.

    Args:
        where: the checkpoint's path, for messages.
    """
    checkpoint = with_base(args, checkpoint, where)
    weights = checkpoint["model"]
    clip = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    names = [name for name in args.loss_names.split("+") if name in LOSSES]
    names = [name for name in names if _at_test(name, weights, where)]
    if not clip:
        raise UserError(
            f"{where}: no weights named {PREFIX}*; use a checkpoint of this project or of IRRA"
        )
    with _NoInitialValues():  # type: ignore[no-untyped-call]
        model = build_model(args, names, num_classes=0, weights=clip)
    check_input(model.base_model, checkpoint, where)
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise UserError(f"{where}: {name} is missing")
        if weights[name].shape != value.shape:
            raise UserError(
                f"{where}: {name} has the shape {tuple(weights[name].shape)}, but the options need "
                f"{tuple(value.shape)}; use the configs.yaml and the checkpoint of the same run"
            )
    weights = {name: weights[name] for name in expected}
    refuse_nonfinite(weights, where)
    model.load_state_dict(weights)
    if "assumed" in checkpoint:
        model.base_model.notes.append(checkpoint["assumed"])
    return model


def _at_test(name: str, weights: dict[str, Any], where: str) -> bool:
    """Whether the evaluation needs a loss. Raises UserError if it needs one for the scores, of
    which the checkpoint has no weights."""
    row = LOSSES[name]
    if row.feature and row.at_test not in weights:
        raise UserError(
            f"{where}: {row.at_test} is missing, but the scores of a run with the loss {name} need "
            "it; use a checkpoint of the run, or another --loss_names"
        )
    return row.at_test in weights


class _NoInitialValues(TorchDispatchMode):
    """Leaves weights as they were allocated, for a model that then gets every one of a checkpoint:
    150 million random numbers take a second."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


def check_input(backbone: Backbone, checkpoint: dict[str, Any], where: str) -> None:
    """Raise UserError if a checkpoint records another image size or stride than the backbone's."""
    recorded = recorded_input(checkpoint)
    if recorded and recorded != backbone.input:
        raise UserError(
            f"{where}: trained on images of {format_input(recorded)}, the options say "
            f"{format_input(backbone.input)}; use the configs.yaml and the checkpoint of the same "
            "run (--finetune resizes)"
        )


def load_fitting(model: AEAFIRM, checkpoint: dict[str, Any], where: str) -> str:
    """Load every weight whose name and shape fit (`--finetune`), and return a report to log.

    Resizes position embeddings of another image size or stride. Raises UserError if no weight of
    the backbone fits, or not every one for LoRA, or if a weight is not finite.

    Args:
        where: the checkpoint's path, for messages.
    """
    if "lora" in checkpoint:
        raise UserError(
            f"--finetune {where}: has LoRA's updates without their base weights; write both with "
            "tools/export.py --output FOLDER, and take FOLDER/best.pth"
        )
    initial, weights, backbone = model.state_dict(), checkpoint["model"], model.base_model
    clip = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    clip, note = resize_positions(
        clip, backbone.config, backbone.grid, checkpoint, where, prefer_same=True
    )
    source = {**weights, **{PREFIX + n: v for n, v in clip.items()}}
    resized = [n for n, v in source.items() if v is not weights[n]]
    fitting = {n: v for n, v in source.items() if n in initial and v.shape == initial[n].shape}
    if not any(n.startswith(PREFIX) for n in fitting):
        raise UserError(
            f"--finetune {where}: nothing fits: none of its {len(weights)} weights has the name "
            f"and shape of one of the backbone's (it has {', '.join(sorted(weights)[:3])}, ...)"
        )
    left = [n for n in initial if n.startswith(PREFIX) and n not in fitting]
    if left and model.options.lora_rank:
        raise UserError(
            f"--finetune {where}: {left[0]} is missing or has another shape, but LoRA needs all "
            "base weights from one file; finetune without --lora_rank first"
        )
    refuse_nonfinite(fitting, where)
    model.load_state_dict(fitting, strict=False)
    groups = {
        "loaded": [n for n in fitting if n not in resized],
        "resized": [n for n in resized if n in fitting],
        "skipped, other shape": [n for n in source if n in initial and n not in fitting],
        "skipped, unknown here": [n for n in source if n not in initial],
        "left as initialised": [n for n in initial if n not in fitting],
    }
    rows = [[group, len(names), names[0] if names else ""] for group, names in groups.items()]
    table = console(["finetune", "weights", "such as"], rows, left=3)
    notes = [note for note in (checkpoint.get("assumed"), note) if note]
    return Multiline(visible("\n".join([*notes, where, table]), lines=True))
