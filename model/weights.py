"""Pretrained weights: their names, where to get them, and how to fit them to a backbone."""

from __future__ import annotations

import math
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import (
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from open_clip.pretrained import (
    download_pretrained,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from torch import Tensor

from utils.checkpoint import load_checkpoint
from utils.documents import read_json_file
from utils.errors import UserError, suggest
from utils.files import expand
from utils.runs import HUB_CONFIG, HUB_WEIGHTS

# By OpenAI's name, the name in open_clip.
OPENAI_MODELS = {name: name for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")} | {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
WEIGHTS_CACHE = Path("~/.cache/clip")  # OpenAI's CLIP, IRRA and open_clip use it too
PREFIX = "base_model."  # of the names of the backbone's weights in a checkpoint


@dataclass(frozen=True)
class BackboneConfig:
    """A CLIP's architecture and input. The defaults are those of all OpenAI models."""

    embed_dim: int
    vision_layers: int | tuple[int, ...]  # four numbers for a ResNet
    vision_width: int
    vision_patch_size: int | None
    text_width: int
    text_layers: int
    vocab_size: int = 49408
    context_length: int = 77
    head_width: int = 64  # of the image encoder
    mlp_ratio: float = 4.0  # of the image encoder
    text_heads: int | None = None  # None: heads of 64 channels
    quick_gelu: bool = True
    image_mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    image_std: tuple[float, ...] = OPENAI_DATASET_STD

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.vision_layers, tuple)


# Fields that the shapes of weights do not show.
NOT_IN_SHAPES = ("head_width", "text_heads", "quick_gelu", "image_mean", "image_std")


class Choice(NamedTuple):
    """The parts of a `--pretrain_choice`; "" for a part that it does not have."""

    model: str = ""  # open_clip's name of the model
    tag: str = ""  # open_clip's name of pretrained weights of the model
    file: str = ""  # a file of weights, used instead of the tag's weights


def parse_choice(choice: str) -> Choice:
    """The parts of a `--pretrain_choice`.

    It has one of these forms: an OpenAI NAME, MODEL/TAG of open_clip, FILE, or @FILE after a NAME,
    a MODEL/TAG or a MODEL. FILE may be a folder of tools/export.py --hub. Raises UserError for a
    model without such a tag.
    """
    parts = _parse_name(choice)
    if parts and parts.tag:
        return parts
    for at in reversed([i for i, letter in enumerate(choice) if letter == "@"]):
        parts, file = _parse_name(choice[:at]), choice[at + 1 :]
        if parts and not file:
            raise UserError(f"--pretrain_choice {choice}: no file after the @")
        if parts:
            return parts._replace(file=file)
    return Choice(file=choice)


def find_weights(choice: str) -> Path:
    """The file of a `--pretrain_choice`; downloads it if necessary. Raises UserError."""
    parts = parse_choice(choice)
    if not parts.file:
        return _fetch_weights(choice, parts.model, parts.tag)
    path = Path(expand(parts.file))
    path = path / HUB_WEIGHTS if path.is_dir() else path
    if path.is_file():
        return path
    if parts.model or path.name == HUB_WEIGHTS:
        raise UserError(f"--pretrain_choice {choice}: {path}: no such file")
    model = choice.partition("@")[0]
    raise UserError(
        f"--pretrain_choice {choice}: neither a file nor one of {', '.join(OPENAI_MODELS)}, "
        "scratch, MODEL/TAG of open_clip, or MODEL@FILE."
        + (
            f" '{model}' is a model of open_clip: add /TAG or @FILE for its weights"
            if model in open_clip.list_models()
            else suggest(model, [*OPENAI_MODELS, *open_clip.list_models()])
        )
    )


def is_hub(choice: str) -> bool:
    """Whether a `--pretrain_choice` names a folder, as tools/export.py --hub writes it."""
    file = parse_choice(choice).file
    return bool(file) and Path(expand(file)).is_dir()


def read_weights(choice: str) -> tuple[Path, dict[str, Any]]:
    """The file of a `--pretrain_choice` and its content: `model` has weights in OpenAI's naming.

    Of a folder that tools/export.py --hub wrote, the backbone is taken. Raises UserError, also for
    a folder whose architecture only a model's name tells.
    """
    path = find_weights(choice)
    checkpoint = load_checkpoint(path)
    if not is_hub(choice):
        return path, checkpoint
    folder = path.parent
    config = read_json_file(folder / HUB_CONFIG, "not of tools/export.py --hub: ")
    if not isinstance(config, dict):
        raise UserError(f"{folder / HUB_CONFIG}: not of tools/export.py --hub: no object")
    named = config.get("pretrain_choice", "")
    if not parse_choice(choice).model and named not in ("", "scratch", *OPENAI_MODELS):
        raise UserError(
            f"--pretrain_choice {choice}: these weights are of {named}, whose activation, heads or "
            f"image mean and std the shapes do not show; give --pretrain_choice {named}@{choice}"
        )
    weights = checkpoint["model"]
    clip = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    return path, {**checkpoint, "model": clip, "input": config}


def config_from_choice(choice: str) -> BackboneConfig | None:
    """Architecture and input of a `--pretrain_choice`; None if it is only a file."""
    parts = parse_choice(choice)
    return config_from_name(parts.model, parts.tag) if parts.model else None


def config_from_name(model: str, tag: str = "") -> BackboneConfig:
    """Architecture and input of an open_clip model, with the weights of a tag.

    Without a tag, the activation is that of the model's configuration, and the mean and std are
    OpenAI's. Raises UserError for a model without open_clip's own image and text encoder.
    """
    config = open_clip.get_model_config(model)
    weights = get_pretrained_cfg(model, tag) if tag else {
        "quick_gelu": config.get("quick_gelu", False),
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
    }  # fmt: skip
    vision, text = config["vision_cfg"], config["text_cfg"]
    supported = (
        {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
        {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
        {"context_length", "vocab_size", "width", "heads", "layers"},
    )
    unsupported = [key for part, keys in zip((config, vision, text), supported, strict=True)
                   for key in part if key not in keys]  # fmt: skip
    if unsupported:
        raise UserError(
            f"--pretrain_choice {model}{tag and '/'}{tag}: this model is not a plain CLIP (it has "
            f"{', '.join(unsupported)}); use a model with open_clip's own image and text encoder"
        )
    layers = vision["layers"]
    return BackboneConfig(
        embed_dim=config["embed_dim"],
        vision_layers=tuple(layers) if isinstance(layers, list) else layers,
        vision_width=vision["width"],
        vision_patch_size=vision.get("patch_size"),
        text_width=text["width"],
        text_layers=text["layers"],
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        head_width=vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        text_heads=text["heads"],
        quick_gelu=weights.get("quick_gelu", False),  # as the weights were trained
        image_mean=tuple(weights["mean"]),
        image_std=tuple(weights["std"]),
    )


def config_from_weights(weights: dict[str, Tensor], where: str) -> BackboneConfig:
    """The architecture that the shapes of a state dict show. Raises UserError if it is not a CLIP.

    Args:
        weights: a state dict in OpenAI's naming.
        where: where it comes from, for messages.
    """

    def count_layers(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return len({n.split(".")[depth] for n in weights if n.startswith(prefix + ".")})

    try:
        resnet = "visual.layer1.0.conv1.weight" in weights
        first = "visual.layer1.0.conv1.weight" if resnet else "visual.conv1.weight"
        dimensions = {first: 4, "text_projection": 2, "ln_final.weight": 1,
                      "token_embedding.weight": 2, "positional_embedding": 2}  # fmt: skip
        dimensions |= {} if resnet else {"visual.transformer.resblocks.0.mlp.c_fc.weight": 2}
        for name, count in dimensions.items():
            shape = weights[name].shape
            if len(shape) != count or 0 in shape:
                raise UserError(f"{where}: {name} has the shape {tuple(shape)}: this is not a CLIP")
        conv1 = weights[first]
        for name in ("ln_final.weight",) if resnet else (first, "ln_final.weight"):
            if weights[name].shape[0] % 64:  # channels of a head
                raise UserError(
                    f"{where}: {name} has {weights[name].shape[0]} channels, not n * 64"
                )
        return BackboneConfig(
            embed_dim=weights["text_projection"].shape[1],
            vision_layers=tuple(count_layers(f"visual.layer{i}") for i in (1, 2, 3, 4))
            if resnet
            else count_layers("visual.transformer.resblocks"),
            vision_width=conv1.shape[0],
            vision_patch_size=None if resnet else conv1.shape[-1],
            text_width=weights["ln_final.weight"].shape[0],
            text_layers=count_layers("transformer.resblocks"),
            vocab_size=weights["token_embedding.weight"].shape[0],
            context_length=weights["positional_embedding"].shape[0],
            mlp_ratio=4.0
            if resnet
            else weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
            / conv1.shape[0],
        )
    except (KeyError, IndexError) as error:
        names = ", ".join(sorted(weights)[:3])
        hint = "; use --finetune for weights named base_model.*" if "base_model." in names else ""
        raise UserError(
            f"{where}: no CLIP weights in OpenAI's naming: {error} is missing (it has {names}, ...)"
            f"{hint}"
        ) from None


def position_name(config: BackboneConfig) -> str:
    """The name of the image position embedding in a state dict."""
    tower = "visual.attnpool" if config.is_resnet else "visual"
    return f"{tower}.positional_embedding"


def patch_grid(
    patch: int | None, image_size: tuple[int, int], stride: int | None
) -> tuple[int, int]:
    """Rows and columns of patches, or of a ResNet's last feature map if `patch` is None."""
    if patch is None:
        return image_size[0] // 32, image_size[1] // 32
    rows, columns = ((side - patch) // (stride or patch) + 1 for side in image_size)
    return rows, columns


def recorded_input(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The `img_size` and `stride_size` that a checkpoint of this project records, else None."""
    entry = checkpoint.get("input")
    if not isinstance(entry, dict) or not isinstance(entry.get("img_size"), list):
        return None
    size, stride = entry["img_size"], entry.get("stride_size")
    numbers = [*size, 1 if stride is None else stride]
    valid = len(size) == 2 and all(type(n) is int and n > 0 for n in numbers)
    return {"img_size": size, "stride_size": stride} if valid else None


def format_input(recorded: dict[str, Any]) -> str:
    """The image size and stride, for messages."""
    height, width = recorded["img_size"]
    stride = recorded["stride_size"]
    return f"{height}x{width}" + (f" at stride {stride}" if stride else "")


def resize_positions(
    weights: dict[str, Tensor],
    config: BackboneConfig,
    grid: tuple[int, int],
    checkpoint: dict[str, Any],
    where: str,
    prefer_same: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Resize the image position embedding of `weights` to a grid.

    Like the reference, it resizes bilinearly with `align_corners=False` and keeps the position of
    the class token.

    Args:
        grid: rows and columns of the result.
        checkpoint: the source of the weights; its entry `input`, if it has one, records their grid.
        where: its path, for messages.
        prefer_same: if the source does not record its grid, and `grid` is possible, assume `grid`.

    Returns the weights, and a note on the assumed grid if the source does not record one and
    several are possible. Raises UserError if the embedding has no possible grid.
    """
    name = position_name(config)
    source = weights.get(name)
    if source is None:
        return weights, ""
    if source.dim() != 2 or len(source) < 2 or not source.is_floating_point():
        raise UserError(
            f"{where}: {name} has the shape {tuple(source.shape)}: no positions of an image"
        )
    count, note = len(source) - 1, ""
    recorded = recorded_input(checkpoint)
    if recorded:
        patch, conv1 = config.vision_patch_size, weights.get("visual.conv1.weight")
        if patch and conv1 is not None and conv1.dim() == 4:  # may be another patch size
            patch = conv1.shape[-1] or patch
        old = patch_grid(patch, recorded["img_size"], recorded["stride_size"])
        if min(old) < 1 or old[0] * old[1] != count:
            raise UserError(
                f"{where}: {name} has {count} patches, not those of {format_input(recorded)}"
            )
    else:
        shape = grid[0] / grid[1]
        grids = _possible_grids(count, shape)
        if not grids:
            raise UserError(
                f"{where}: {name}: {count} patches form no grid of about {shape:.2g}:1, the shape "
                "of --img_size, so they cannot be resized"
            )
        old = grid if prefer_same and grid in grids else grids[0]
        others = [f"{rows}x{columns}" for rows, columns in grids if (rows, columns) != old]
        if others:
            note = (
                f"{where}: does not record its image size: its {count} patches are assumed to be "
                f"{old[0]} rows of {old[1]} (or could be {', '.join(others)}); this model has "
                f"{grid[0]}x{grid[1]}"
            )
    if old == grid:
        return weights, note
    patches = source[1:].float().T.reshape(1, -1, *old)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    resized = torch.cat([source[:1].float(), patches[0].flatten(1).T])
    return {**weights, name: resized.to(source.dtype)}, note


def openai_note(path: Path, config: BackboneConfig) -> str:
    """What is assumed about weights of a file without a model's name."""
    shapes = {n: v for n, v in vars(config).items() if n not in NOT_IN_SHAPES}
    matches = []
    for model in open_clip.list_models():
        try:
            known = vars(config_from_name(model))
        except (UserError, KeyError):
            continue
        if shapes == {name: known[name] for name in shapes}:
            matches.append(model)
    same_shapes = f"; its shapes are those of {', '.join(matches)}" if matches else ""
    return (
        f"{path}: assumed to be an OpenAI CLIP, with heads of 64 channels, QuickGELU, and OpenAI's "
        "image mean and std; a file does not record them. For another model, give its name in "
        f"open_clip: --pretrain_choice MODEL@{path}{same_shapes}"
    )


def _parse_name(name: str) -> Choice | None:
    """The model and tag of a name, without a tag if it is only a model; None for other names."""
    if name in OPENAI_MODELS:
        return Choice(OPENAI_MODELS[name], "openai")
    models = open_clip.list_models()
    if name in models:
        return Choice(name)
    model, _, tag = name.rpartition("/")
    if model not in models or "@" in tag:
        return None
    tags = list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise UserError(
            f"--pretrain_choice {name}: open_clip has no weights '{tag}' of {model}."
            f"{suggest(tag, tags)} Known: {', '.join(tags) or 'none'}"
        )
    return Choice(model, tag)


def _fetch_weights(choice: str, model: str, tag: str) -> Path:
    """The file of the weights, from the cache or downloaded into it."""
    config = get_pretrained_cfg(model, tag)
    cache = Path(expand(str(WEIGHTS_CACHE)))
    for suffix in (".safetensors", ".pt", ".bin"):
        if (cache / f"{model}-{tag}{suffix}").is_file():
            return cache / f"{model}-{tag}{suffix}"
    if tag == "openai":  # OpenAI's own file, by the name that other projects look for too
        config = {**config, "hf_hub": ""}
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    target = cache / (url.rsplit("/", 1)[-1] if tag == "openai" else f"{model}-{tag}.safetensors")
    source = url
    if hub:
        source = (
            "open_clip_model.safetensors (or open_clip_pytorch_model.bin, then as .bin) of "
            f"https://huggingface.co/{hub.rstrip('/')}"
        )
        # A file that was downloaded before needs no network.
        repository, name = hub.rsplit("/", 1)
        for file in (name,) if name else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
            cached = try_to_load_from_cache(repository, file, cache_dir=str(cache))
            if isinstance(cached, str):
                return Path(cached)
    try:
        _check_hub_reachable(config)
        # open_clip verifies the SHA-256 that OpenAI's address contains, also for a cached file.
        # Hugging Face's library verifies its downloads.
        return Path(download_pretrained(config, cache_dir=str(cache)))
    except Exception as error:
        raise UserError(
            f"--pretrain_choice {choice}: the weights are not at {target} and could not be "
            f"downloaded ({error}). Without a network: download {source} elsewhere and put it "
            "there, or give --pretrain_choice the path of a file."
        ) from None


def _check_hub_reachable(config: dict[str, Any]) -> None:
    """Raise OSError at once if the hub is not reachable: its library would retry for a minute."""
    if not config.get("hf_hub") or urllib.request.getproxies():
        return
    address = urllib.parse.urlsplit(hub_constants.ENDPOINT)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    socket.create_connection((address.hostname, port), timeout=10).close()


def _possible_grids(count: int, shape: float) -> list[tuple[int, int]]:
    """Rows and columns that this many patches may have, the most likely first.

    A square number is a square grid first, as in CLIP. Other numbers come from pedestrian images:
    the grid whose shape (rows / columns) is nearest to `shape` is first. The shapes may differ
    slightly because patches may overlap: 384x128 at stride 8 has 47x15.
    """

    def distance(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[0] / grid[1] / shape))

    grids = [(count // n, n) for n in range(1, count + 1) if count % n == 0]
    near = sorted((grid for grid in grids if distance(grid) <= math.log(1.6)), key=distance)
    side = math.isqrt(count)
    square = [(side, side)] * (side * side == count)
    return list(dict.fromkeys(square + near))
