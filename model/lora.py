"""LoRA: small trained updates of the encoders' frozen weights (Hu et al., ICLR 2022), by peft.

An adapted weight W computes W x + alpha / rank * B A x, with A [rank, in] and B [out, rank]. A
checkpoint has A and B without W, and the hash of the file that W comes from. An evaluation reads
that file and adds the updates to W (`with_base`). So it needs no peft, and everything behind it
sees plain weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from model.backbone import Backbone
from model.blocks import SelfAttention
from model.weights import (
    PREFIX,
    config_from_weights,
    find_weights,
    patch_grid,
    read_weights,
    resize_positions,
)
from utils.checkpoint import load_checkpoint
from utils.devices import at_least_float32
from utils.errors import UserError
from utils.files import file_hash

# The layers of a block that are adapted, by `--lora_targets`.
TARGETS = {"attn": ["attn.in_proj", "attn.out_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"]}
TARGETS["both"] = TARGETS["attn"] + TARGETS["mlp"]
A_NAME = re.compile(r"(.+)\.lora_A\.default\.weight")
BASE = "base.pth"  # a copy of the base weights next to a checkpoint, if their file has moved


class AdaptedAttention(SelfAttention):
    """Attention whose packed projection to queries, keys and values is a layer, for peft."""

    in_proj: Any  # peft's layer

    def project(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The weight with its update."""
        return _updated(self.in_proj)

    @property
    def in_proj_bias(self) -> Tensor:  # type: ignore[override]
        return self.in_proj.bias


def add_lora(backbone: Backbone, args: EasyDict) -> None:
    """Freeze a ViT, and add updates by the options `--lora_*`. They change nothing yet.

    `--seed` gives their initial values. Raises UserError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UserError(
            f"--lora_rank: {error.name} is not installed: pip install -r requirements-methods.txt"
        ) from None
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=TARGETS[args.lora_targets],
    )
    backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        for transformer in (backbone.visual.transformer, backbone.transformer):
            for block in transformer.resblocks if args.lora_targets != "mlp" else ():
                _open(block.attn)
            inject_adapter_in_model(config, transformer)
    for layer in _adapted(backbone).values():
        layer.cast_input_dtype_enabled = False  # to float32, which autocast would undo
    trained, total = count_weights(backbone)
    backbone.notes.append(
        f"LoRA of rank {args.lora_rank}: {trained:,} weights are trained in the encoders, beside "
        f"{total - trained:,} frozen ones"
    )


def count_weights(model: nn.Module) -> tuple[int, int]:
    """The numbers of weights that are trained, and of all."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def merged_weights(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapted weights of a model with their updates added, by the model's names.

    Args:
        values: A and B by name, in place of the model's.
    """
    weights = {}
    for name, layer in _adapted(model).items():
        a, b = (values.get(f"{name}.lora_{x}.default.weight") for x in "AB")
        weights[f"{name}.base_layer.weight"] = _updated(layer, a, b).detach()
    return weights


@contextmanager
def updates_merged(model: nn.Module) -> Iterator[None]:
    """Compute with the weights alone: they have their updates already (`merged_weights`)."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.merged_adapters.append("default")
    try:
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()


def base_names(model: nn.Module) -> set[str]:
    """The names of the weights that a checkpoint leaves out: those of an adapted backbone, without
    the updates."""
    names = model.state_dict() if _adapted(model) else ()
    return {name for name in names if name.startswith(PREFIX) and ".lora_" not in name}


def lora_entry(args: EasyDict) -> dict[str, Any]:
    """The entry `lora` of a run's checkpoints: how updates are added, and to the weights of which
    file. Empty without `--lora_rank`."""
    if not args.lora_rank:
        return {}
    path = _base_file(args)
    base = {"file": str(path), "sha256": file_hash(path)}
    return {"lora": {"rank": args.lora_rank, "alpha": args.lora_alpha, "base": base}}


def check_base(now: dict[str, Any], saved: dict[str, Any], where: Path) -> None:
    """Raise UserError if a run would be resumed with other base weights.

    Args:
        now: the run's `lora_entry`.
        saved: the checkpoint `where`.
    """
    if ("lora" in now) != ("lora" in saved):
        without = "without" if "lora" in now else "with"
        raise UserError(f"{where}: a run {without} --lora_rank; only a new run can change that")
    if "lora" in now and now["lora"]["base"]["sha256"] != _checked(saved["lora"], where)[2]:
        raise UserError(
            f"{now['lora']['base']['file']}: other content than the base weights of {where}; "
            "restore the file that the run started from"
        )


def with_base(args: EasyDict, checkpoint: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint of LoRA with complete, plain weights; other checkpoints stay as they are.

    The base weights are those of base.pth next to the checkpoint if it exists, else of the file
    that the run started from. Raises UserError if that is not the file of the training.

    Args:
        checkpoint: the content of the file `where`.
    """
    if "lora" not in checkpoint:
        return checkpoint
    scale, file, expected = _checked(checkpoint["lora"], where)
    path, mend = Path(where).parent / BASE, f"copy {file} next to the checkpoint as {BASE}"
    try:
        path = path if path.is_file() else _base_file(args)
        found = file_hash(path)
    except UserError as error:
        raise UserError(f"{where}: its base weights are missing: {error}; {mend}") from None
    if found != expected:
        raise UserError(f"{path}: other content than the base weights of {where}; {mend}")
    saved: dict[str, Tensor] = checkpoint["model"]
    weights = _base_weights(args, path)
    for name, a in saved.items():
        if match := A_NAME.fullmatch(name):
            joint = "_" if match[1].endswith("attn.in_proj") else "."
            target, b = f"{match[1]}{joint}weight", saved.get(name.replace(".lora_A.", ".lora_B."))
            weight = weights.get(target)
            if b is None or weight is None or not _fit(weight, a, b):
                raise UserError(f"{where}: {name} does not fit the base weights, {path}")
            weights[target] = _sum(weight, a, b, scale)
    heads = {name: value for name, value in saved.items() if not name.startswith(PREFIX)}
    rest = {name: value for name, value in checkpoint.items() if name != "lora"}
    return {**rest, "model": {**weights, **heads}}


def _open(attention: Any) -> None:
    """Make the packed projection of an attention a layer."""
    in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
    in_proj.weight, in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
    del attention.in_proj_weight, attention.in_proj_bias
    attention.__class__ = AdaptedAttention
    attention.in_proj = in_proj


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _updated(layer: Any, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The weight of an adapted layer with its update, which may have other values."""
    weight = layer.base_layer.weight
    if layer.merged_adapters:
        return weight
    a = layer.lora_A["default"].weight if a is None else a
    b = layer.lora_B["default"].weight if b is None else b
    return _sum(weight, a.to(weight.device), b.to(weight.device), layer.scaling["default"])


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in float32 (float64 for float64)."""
    return at_least_float32(weight) + scale * (at_least_float32(b) @ at_least_float32(a))


def _fit(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether W + B A can be computed."""
    matrices = all(x.dim() == 2 and x.is_floating_point() for x in (weight, a, b))
    return matrices and weight.shape == (b.shape[0], a.shape[1]) and a.shape[0] == b.shape[1]


def _checked(entry: Any, where: str | Path) -> tuple[float, str, str]:
    """Of an entry `lora`: the scale of updates, and path and hash of the base weights."""
    try:
        rank, alpha, base = entry["rank"], entry["alpha"], entry["base"]
        file, hash_ = base["file"], base["sha256"]
        if type(rank) is int and type(alpha) is float and type(file) is type(hash_) is str:
            return alpha / rank, file, hash_
    except (TypeError, KeyError, ZeroDivisionError):
        pass
    raise UserError(f"{where}: its entry 'lora' does not name its base weights")


def _base_file(args: EasyDict) -> Path:
    """The file of the base weights. Raises UserError if weights by name cannot be had."""
    return Path(args.finetune) if args.finetune else find_weights(args.pretrain_choice)


def _base_weights(args: EasyDict, path: Path) -> dict[str, Tensor]:
    """The backbone's weights in a file, as a training loads them, by their names in a checkpoint.
    Raises UserError."""
    if args.finetune or path.name == BASE:
        content = load_checkpoint(path)
    else:
        content = read_weights(args.pretrain_choice)[1]
    names = [name for name in content["model"] if name.startswith(PREFIX)]
    names = names or list(content["model"])
    weights = {name.removeprefix(PREFIX): content["model"][name] for name in names}
    weights.pop("logit_scale", None)  # the temperature belongs to the losses
    config = config_from_weights(weights, str(path))
    grid = patch_grid(config.vision_patch_size, tuple(args.img_size), args.stride_size)
    weights, _ = resize_positions(
        weights, config, grid, content, str(path), prefer_same=bool(args.finetune)
    )
    return {PREFIX + name: value for name, value in weights.items()}
