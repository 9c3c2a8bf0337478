"""Which weights there are, where they come from, and how they fit a backbone."""

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

from utils.errors import UserError, suggest
from utils.files import expand

OPENAI_MODELS = {
    name: name.replace("/", "-").replace("@", "-")
    for name in (
        "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64",
        "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
    )
}  # fmt: skip
OPENAI_MODELS["ViT-L/14@336px"] = "ViT-L-14-336"  # open_clip's name of it
WEIGHTS_CACHE = Path("~/.cache/clip")  # where OpenAI's CLIP, IRRA and open_clip keep them too


@dataclass(frozen=True)
class BackboneConfig:
    """A CLIP's architecture and input. The defaults are those of all of OpenAI's models."""

    embed_dim: int
    vision_layers: int | tuple[int, ...]  # four numbers: a ResNet
    vision_width: int
    vision_patch_size: int | None
    text_width: int
    text_layers: int
    vocab_size: int = 49408
    context_length: int = 77
    head_width: int = 64  # of the image encoder
    mlp_ratio: float = 4.0  # of the image encoder
    text_heads: int | None = None  # None: 64 channels each
    quick_gelu: bool = True
    image_mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    image_std: tuple[float, ...] = OPENAI_DATASET_STD

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.vision_layers, tuple)


# What shapes do not tell.
UNSEEN = ("head_width", "text_heads", "quick_gelu", "image_mean", "image_std")


class Choice(NamedTuple):
    """What a `--pretrain_choice` names; "" where it does not say."""

    model: str = ""  # of open_clip
    tag: str = ""  # of open_clip's weights of that model
    file: str = ""  # has the weights, instead of the tag's own


def parse_choice(choice: str) -> Choice:
    """The parts of a `--pretrain_choice`: NAME of OpenAI's, MODEL/TAG of open_clip, each of them or
    MODEL with @FILE behind it, or FILE.

    Raises UserError for a model without such a tag.
    """
    named = _named(choice)
    if named and named.tag:
        return named
    for at in reversed([i for i, letter in enumerate(choice) if letter == "@"]):
        named, file = _named(choice[:at]), choice[at + 1 :]
        if named and not file:
            raise UserError(f"--pretrain_choice {choice}: no file behind the @")
        if named:
            return named._replace(file=file)
    return Choice(file=choice)


def _named(name: str) -> Choice | None:
    """The model and tag of this name, the tag "" if it names a model alone."""
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


def find_weights(choice: str) -> Path:
    """The file of a `--pretrain_choice`, downloaded if need be. Raises UserError."""
    named = parse_choice(choice)
    if not named.file:
        return _fetch(choice, named.model, named.tag)
    path = Path(expand(named.file))
    if path.is_file():
        return path
    if named.model:
        raise UserError(f"--pretrain_choice {choice}: {path}: no such file")
    model = choice.partition("@")[0]
    raise UserError(
        f"--pretrain_choice {choice}: neither a file nor one of {', '.join(OPENAI_MODELS)}, "
        "scratch, MODEL/TAG of open_clip, or MODEL@FILE."
        + (
            f" '{model}' is a model of open_clip: which weights of it?"
            if model in open_clip.list_models()
            else suggest(model, [*OPENAI_MODELS, *open_clip.list_models()])
        )
    )


def named_config(choice: str) -> BackboneConfig | None:
    """Architecture and input that a `--pretrain_choice` names; None if it names a file alone."""
    named = parse_choice(choice)
    return config_of_name(named.model, named.tag) if named.model else None


def config_of_name(model: str, tag: str = "") -> BackboneConfig:
    """Architecture and input of an open_clip model, with the weights of a tag.

    Without a tag: activation as the model's own configuration has it, mean and std of OpenAI.
    Raises UserError for a model that is no CLIP with a text encoder and tokenizer of its own.
    """
    config = open_clip.get_model_config(model)
    weights = get_pretrained_cfg(model, tag) if tag else {
        "quick_gelu": config.get("quick_gelu", False),
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
    }  # fmt: skip
    vision, text = config["vision_cfg"], config["text_cfg"]
    known = (
        {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
        {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
        {"context_length", "vocab_size", "width", "heads", "layers"},
    )
    other = [key for part, keys in zip((config, vision, text), known, strict=True)
             for key in part if key not in keys]  # fmt: skip
    if other:
        raise UserError(
            f"--pretrain_choice {model}{tag and '/'}{tag}: this model is no plain CLIP (it has "
            f"{', '.join(other)}); models with open_clip's own image and text encoder work"
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
        quick_gelu=weights.get("quick_gelu", False),  # what the weights were trained with
        image_mean=tuple(weights["mean"]),
        image_std=tuple(weights["std"]),
    )


def config_of(weights: dict[str, Tensor], where: str) -> BackboneConfig:
    """Read the architecture off the shapes of a state dict. Raises UserError if it is no CLIP."""

    def layers(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return len({n.split(".")[depth] for n in weights if n.startswith(prefix + ".")})

    try:
        resnet = "visual.layer1.0.conv1.weight" in weights
        first = "visual.layer1.0.conv1.weight" if resnet else "visual.conv1.weight"
        wanted = {first: 4, "text_projection": 2, "ln_final.weight": 1, "token_embedding.weight": 2,
                  "positional_embedding": 2}  # fmt: skip
        wanted |= {} if resnet else {"visual.transformer.resblocks.0.mlp.c_fc.weight": 2}
        for name, dimensions in wanted.items():
            shape = weights[name].shape
            if len(shape) != dimensions or 0 in shape:
                raise UserError(f"{where}: {name} has the shape {tuple(shape)}: this is no CLIP")
        conv1 = weights[first]
        for name in ("ln_final.weight",) if resnet else (first, "ln_final.weight"):
            if weights[name].shape[0] % 64:  # of one head
                raise UserError(
                    f"{where}: {name} has {weights[name].shape[0]} channels, not n * 64"
                )
        return BackboneConfig(
            embed_dim=weights["text_projection"].shape[1],
            vision_layers=tuple(layers(f"visual.layer{i}") for i in (1, 2, 3, 4))
            if resnet
            else layers("visual.transformer.resblocks"),
            vision_width=conv1.shape[0],
            vision_patch_size=None if resnet else conv1.shape[-1],
            text_width=weights["ln_final.weight"].shape[0],
            text_layers=layers("transformer.resblocks"),
            vocab_size=weights["token_embedding.weight"].shape[0],
            context_length=weights["positional_embedding"].shape[0],
            mlp_ratio=4.0
            if resnet
            else weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
            / conv1.shape[0],
        )
    except (KeyError, IndexError) as error:
        found = ", ".join(sorted(weights)[:3])
        family = "; weights named base_model.* go to --finetune" if "base_model." in found else ""
        raise UserError(
            f"{where}: no CLIP weights in OpenAI's naming: {error} is missing (found: {found}, ...)"
            f"{family}"
        ) from None


def position_name(config: BackboneConfig) -> str:
    """Name of the image position embedding in a state dict."""
    tower = "visual.attnpool" if config.is_resnet else "visual"
    return f"{tower}.positional_embedding"


def patch_grid(
    patch: int | None, image_size: tuple[int, int], stride: int | None
) -> tuple[int, int]:
    """Rows and columns of patches; `patch` None: of a ResNet's last map."""
    if patch is None:
        return image_size[0] // 32, image_size[1] // 32
    rows, columns = ((side - patch) // (stride or patch) + 1 for side in image_size)
    return rows, columns


def recorded_input(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """`img_size` and `stride_size` that a checkpoint of this project says it is of."""
    found = checkpoint.get("input")
    if not isinstance(found, dict) or not isinstance(found.get("img_size"), list):
        return None
    size, stride = found["img_size"], found.get("stride_size")
    numbers = [*size, 1 if stride is None else stride]
    whole = len(size) == 2 and all(type(n) is int and n > 0 for n in numbers)
    return {"img_size": size, "stride_size": stride} if whole else None


def described(recorded: dict[str, Any]) -> str:
    """Image size and stride in words."""
    height, width = recorded["img_size"]
    stride = recorded["stride_size"]
    return f"{height}x{width}" + (f" at stride {stride}" if stride else "")


def fit_positions(
    weights: dict[str, Tensor],
    config: BackboneConfig,
    grid: tuple[int, int],
    checkpoint: dict[str, Any],
    where: str,
    same: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Resize the image position embedding of `weights` to a grid.

    Bilinear with `align_corners=False`, the class token's kept, as the reference does.

    Args:
        grid: rows and columns wanted.
        checkpoint: what the weights come from; its entry `input`, if it has one, tells their grid.
        same: of several grids that the weights may come from, take the wanted one first.

    Returns the weights, and what was assumed of the grid that they come from, if the file does not
    say it and it is not certain.
    """
    name = position_name(config)
    source = weights.get(name)
    if source is None:
        return weights, ""
    if source.dim() != 2 or len(source) < 2 or not source.is_floating_point():
        raise UserError(
            f"{where}: {name} has the shape {tuple(source.shape)}: no positions of an image"
        )
    count, told = len(source) - 1, ""
    recorded = recorded_input(checkpoint)
    if recorded:
        patch, conv1 = config.vision_patch_size, weights.get("visual.conv1.weight")
        if patch and conv1 is not None and conv1.dim() == 4:  # it may be of another model
            patch = conv1.shape[-1] or patch
        old = patch_grid(patch, recorded["img_size"], recorded["stride_size"])
        if min(old) < 1 or old[0] * old[1] != count:
            raise UserError(
                f"{where}: {name} has {count} patches, not those of {described(recorded)}"
            )
    else:
        shape = grid[0] / grid[1]
        grids = _possible_grids(count, shape)
        if not grids:
            raise UserError(
                f"{where}: {name}: {count} patches form no grid of about {shape:.2g}:1, the shape "
                "of --img_size; cannot be resized"
            )
        old = grid if same and grid in grids else grids[0]
        others = [f"{rows}x{columns}" for rows, columns in grids if (rows, columns) != old]
        if others:
            told = (
                f"{where}: does not say what images it is of: its {count} patches are taken as "
                f"{old[0]} rows of {old[1]} (it could be {', '.join(others)}); here they are "
                f"{grid[0]}x{grid[1]}"
            )
    if old == grid:
        return weights, told
    patches = source[1:].float().T.reshape(1, -1, *old)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    resized = torch.cat([source[:1].float(), patches[0].flatten(1).T])
    return {**weights, name: resized.to(source.dtype)}, told


def _possible_grids(count: int, shape: float) -> list[tuple[int, int]]:
    """Rows and columns that so many patches may have, the likeliest first.

    A square number is a square grid, as CLIP's; others come from pedestrian images, so the grid is
    the one whose shape is nearest to the wanted one's (rows / columns). With overlapping patches it
    is not quite the same: 384x128 at stride 8 has 47x15.
    """

    def off(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[0] / grid[1] / shape))

    grids = [(count // n, n) for n in range(1, count + 1) if count % n == 0]
    near = sorted((grid for grid in grids if off(grid) <= math.log(1.6)), key=off)
    side = math.isqrt(count)
    square = [(side, side)] * (side * side == count)
    return list(dict.fromkeys(square + near))


def openai_assumed(path: Path, config: BackboneConfig) -> str:
    """What is taken for granted of weights that come as a file alone."""
    shapes = {n: v for n, v in vars(config).items() if n not in UNSEEN}
    fitting = []
    for model in open_clip.list_models():
        try:
            found = vars(config_of_name(model))
        except (UserError, KeyError):
            continue
        if shapes == {name: found[name] for name in shapes}:
            fitting.append(model)
    which = f"; its shapes are those of {', '.join(fitting)}" if fitting else ""
    return (
        f"{path}: taken as a CLIP of OpenAI's: heads of 64 channels, QuickGELU, its image mean and "
        "std; a file does not tell them. Weights of another kind need their model's name in "
        f"open_clip: --pretrain_choice MODEL@{path}{which}"
    )


def _reach(config: dict[str, Any]) -> None:
    """Raise OSError at once where the hub is out of reach: its own library tries for a minute."""
    if not config.get("hf_hub") or urllib.request.getproxies():
        return
    address = urllib.parse.urlsplit(hub_constants.ENDPOINT)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    socket.create_connection((address.hostname, port), timeout=10).close()


def _fetch(choice: str, model: str, tag: str) -> Path:
    """The weights' file: from the cache if it was put there, else downloaded to it."""
    config = get_pretrained_cfg(model, tag)
    cache = Path(expand(str(WEIGHTS_CACHE)))
    for suffix in (".safetensors", ".pt", ".bin"):
        if (cache / f"{model}-{tag}{suffix}").is_file():
            return cache / f"{model}-{tag}{suffix}"
    if tag == "openai":  # OpenAI's own file, under the name that other projects look for too
        config = {**config, "hf_hub": ""}
    url, hub = config.get("url", ""), config.get("hf_hub", "")
    target = cache / (url.rsplit("/", 1)[-1] if tag == "openai" else f"{model}-{tag}.safetensors")
    source = url
    if hub:
        source = (
            "open_clip_model.safetensors (or open_clip_pytorch_model.bin, then as .bin) of "
            f"https://huggingface.co/{hub.rstrip('/')}"
        )
        # What was downloaded before needs no network.
        repository, name = hub.rsplit("/", 1)
        for file in (name,) if name else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
            found = try_to_load_from_cache(repository, file, cache_dir=str(cache))
            if isinstance(found, str):
                return Path(found)
    try:
        _reach(config)
        # open_clip verifies the SHA-256 that stands in OpenAI's address, also of a file already
        # there; Hugging Face's library verifies its own.
        return Path(download_pretrained(config, cache_dir=str(cache)))
    except Exception as error:
        raise UserError(
            f"--pretrain_choice {choice}: the weights are not at {target} and could not be "
            f"downloaded ({error}). Without a network: fetch {source} elsewhere and put it there, "
            "or give --pretrain_choice the path of a file."
        ) from None
