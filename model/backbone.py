"""CLIP as the backbone: built, loaded and adapted to pedestrian images through open_clip.

Shapes: B images or captions, L tokens of the longest caption, N image patches, D joint space.

    backbone = load_backbone("ViT-B/16", image_size=(384, 128))
    image_BD, image_tokens = backbone.encode_images(images)      # images [B, 3, 384, 128]
    text_BD, text_tokens = backbone.encode_captions(caption_ids)  # ids [B, L], zeros behind the end

Weights keep OpenAI's names, so a checkpoint of this project, of IRRA and of CLIP look alike.
"""

from __future__ import annotations

import math
import socket
import urllib.parse
import urllib.request
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

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
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.pretrained import (
    download_pretrained,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.checkpoint import read_weights
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

PLAIN_ATTENTION_BELOW = 128  # tokens


@dataclass(frozen=True)
class BackboneSizes:
    """A CLIP's architecture and input.

    The defaults are OpenAI's for every model of theirs. Shapes do not tell heads, activation and
    input statistics, so weights from a file are taken to be of that kind.
    """

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


class Backbone(open_clip.CLIP):
    """CLIP for images of any height and width and any patch stride.

    The image feature is the projected class token (ResNet: the attention-pooled one), the text
    feature the projected token at the end-of-text position, which has the largest id.

    Args:
        sizes: the architecture.
        image_size: height and width, pixels.
        stride: step between patches, pixels; None means the patch size. ResNets have none.
        half: keep the weights of linear, convolution and attention layers in half precision.
    """

    def __init__(
        self,
        sizes: BackboneSizes,
        image_size: tuple[int, int],
        stride: int | None = None,
        half: bool = False,
    ) -> None:
        vision = CLIPVisionCfg(
            layers=sizes.vision_layers,
            width=sizes.vision_width,
            patch_size=sizes.vision_patch_size,
            # open_clip's ResNet takes squares only; its position embedding is remade below.
            image_size=224 if sizes.is_resnet else image_size,
            head_width=sizes.head_width,
            mlp_ratio=sizes.mlp_ratio,
        )
        text = CLIPTextCfg(
            context_length=sizes.context_length,
            vocab_size=sizes.vocab_size,
            width=sizes.text_width,
            heads=sizes.text_heads or sizes.text_width // 64,
            layers=sizes.text_layers,
        )
        cast = torch.float16 if half else None
        super().__init__(
            sizes.embed_dim, vision, text, quick_gelu=sizes.quick_gelu, cast_dtype=cast
        )
        self.sizes = sizes
        self.image_size = image_size
        # The temperature is fixed (0.02 in the paper) and belongs to the losses.
        self.logit_scale = None
        self._adapt_vision(stride)
        if half:
            open_clip.model.convert_weights_to_fp16(self)

    def _adapt_vision(self, stride: int | None) -> None:
        """Set the patch grid for the image size and stride, and its position embedding's shape."""
        height, width = self.image_size
        if self.sizes.is_resnet:
            if stride is not None:
                raise UserError("--stride_size: a ResNet has no patches; leave it out")
            if height % 32 or width % 32:
                raise UserError(f"--img_size {height} {width}: a ResNet needs multiples of 32")
            self.grid = (height // 32, width // 32)
            pool = self.visual.attnpool
            pool.positional_embedding = _position_embedding(self.grid, pool.q_proj.in_features)
            return
        patch = self.sizes.vision_patch_size
        stride = stride or patch
        if stride > patch:
            raise UserError(f"--stride_size {stride} exceeds the patch size {patch}: pixels lost")
        if min(height, width) < patch:
            raise UserError(f"--img_size {height} {width} is smaller than a patch of {patch}")
        self.grid = ((height - patch) // stride + 1, (width - patch) // stride + 1)
        self.visual.conv1.stride = (stride, stride)
        self.visual.grid_size = self.grid
        self.visual.positional_embedding = _position_embedding(self.grid, self.sizes.vision_width)
        self.visual.output_tokens = True

    def reset_from_scratch(self) -> None:
        """Initial values for training from scratch: open_clip's, and CLIP's for the text tower."""
        width, layers = self.sizes.text_width, self.sizes.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for transformer in (self.transformer, getattr(self.visual, "transformer", None)):
            if transformer is None:
                continue
            width, layers = transformer.width, transformer.layers
            for block in transformer.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=self.sizes.text_width**-0.5)

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside the blocks; the backward pass computes them again."""
        if self.sizes.is_resnet:
            raise UserError("--grad_checkpointing: open_clip's ResNets have none; leave it out")
        self.set_grad_checkpointing(True)

    def compile_encoders(self) -> None:
        """Compile both encoders in place; names and values of the weights stay."""
        self.visual.compile()
        self.transformer.compile(dynamic=True)  # captions of any length without a new compilation

    def _attention(self, tokens: int, device: torch.device) -> AbstractContextManager:
        """The faster attention kernel: on a CPU, short sequences go through plain matrix products.

        Forward and backward in bfloat16 on two cores: 14 ms against the fused kernel's 22 ms at 25
        tokens, 4 against 11 at 43, 109 against 95 at 193. Not with checkpointed gradients, which
        are computed again outside of this context and must meet the same kernel.
        """
        short = device.type == "cpu" and tokens < PLAIN_ATTENTION_BELOW
        if short and not self.transformer.grad_checkpointing:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def encode_images(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Image features [B, D] and projected tokens [B, 1 + N, D], the class token first.

        For a ResNet the tokens are the pooled feature alone, [B, 1, D].
        """
        images = images_BCHW.to(self.visual.conv1.weight.dtype)
        if self.sizes.is_resnet:
            pooled_BD = self.visual(images)
            return pooled_BD, pooled_BD[:, None]
        with self._attention(1 + self.grid[0] * self.grid[1], images.device):
            pooled_BD, patches = self.visual(images)  # patches are normalised, not projected
        tokens_BND = torch.cat([pooled_BD[:, None], patches @ self.visual.proj], dim=1)
        return pooled_BD, tokens_BND

    def embed_tokens(self, *ids_BL: Tensor) -> list[Tensor]:
        """Token embeddings [B, L, width] of several batches by one lookup.

        Every lookup has a dense gradient of the whole vocabulary (100 MB for ViT-B/16), so a step
        that encodes captions and sentences looks up once.
        """
        flat = self.token_embedding(torch.cat([ids.flatten() for ids in ids_BL]))
        parts = flat.split([ids.numel() for ids in ids_BL])
        return [part.view(*ids.shape, -1) for part, ids in zip(parts, ids_BL, strict=True)]

    def encode_captions(
        self, ids_BL: Tensor, embedded_BLE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text features [B, D] and projected tokens [B, L, D].

        Attention is causal, so what stands behind the end-of-text token changes nothing: L may be
        the longest caption of the batch instead of the full context.

        Args:
            embedded_BLE: the ids' rows of `embed_tokens`, if they are there already.
        """
        if embedded_BLE is None:
            (embedded_BLE,) = self.embed_tokens(ids_BL)
        length = ids_BL.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = embedded_BLE.to(dtype) + self.positional_embedding[:length].to(dtype)
        with self._attention(length, x.device):
            x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        tokens_BLD = self.ln_final(x) @ self.text_projection
        rows = torch.arange(len(ids_BL), device=ids_BL.device)
        return tokens_BLD[rows, ids_BL.argmax(dim=-1)], tokens_BLD


def load_backbone(
    choice: str,
    image_size: tuple[int, int],
    stride: int | None = None,
    scratch: BackboneSizes | None = None,
    half: bool = False,
) -> Backbone:
    """A backbone with pretrained weights, or from scratch.

    Args:
        choice: an OpenAI name ("ViT-B/16"), a model and pretrained tag of open_clip
            ("ViT-B-16/laion2b_s34b_b88k"), the path of a file (OpenAI archive, state dict or
            safetensors), or "scratch".
        scratch: the sizes for "scratch".

    Raises UserError for an unknown name, weights that cannot be fetched or read, and state dicts
    that are no CLIP.
    """
    if choice == "scratch":
        backbone = Backbone(scratch, image_size, stride, half)
        backbone.reset_from_scratch()
        return backbone
    named = parse_choice(choice)
    path = _fetch(choice, *named) if named else Path(choice)
    if not path.is_file():
        raise UserError(
            f"--pretrain_choice {choice}: neither a file nor one of {', '.join(OPENAI_MODELS)}, "
            f"scratch, or MODEL/TAG of open_clip.{suggest(choice, OPENAI_MODELS)}"
        )
    weights = read_weights(path)
    sizes = sizes_of_name(*named) if named else sizes_of(weights, str(path))
    backbone = Backbone(sizes, image_size, stride, half)
    weights = resize_positions(weights, backbone)
    own = backbone.state_dict()
    counters = {n for n in own if n.endswith("num_batches_tracked")}  # old archives lack them
    missing = sorted(set(own) - set(weights) - counters)
    wrong = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if missing or wrong:
        raise UserError(
            f"{path}: not a whole CLIP: "
            + (f"{len(missing)} entries missing (first: {missing[0]})" if missing else "")
            + (f" shape of {wrong[0]} is {tuple(weights[wrong[0]].shape)}" if wrong else "")
        )
    backbone.load_state_dict({n: weights[n] for n in own if n in weights}, strict=False)
    return backbone


def parse_choice(choice: str) -> tuple[str, str] | None:
    """(model, tag) of open_clip that a `--pretrain_choice` names; None if it names none.

    Raises UserError for a model without such a tag.
    """
    if choice in OPENAI_MODELS:
        return OPENAI_MODELS[choice], "openai"
    model, _, tag = choice.rpartition("/")
    if model not in open_clip.list_models():
        return None
    tags = list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise UserError(
            f"--pretrain_choice {choice}: open_clip has no weights '{tag}' of {model}."
            f"{suggest(tag, tags)} Known: {', '.join(tags) or 'none'}"
        )
    return model, tag


def sizes_of_name(model: str, tag: str) -> BackboneSizes:
    """Architecture and input of an open_clip model with the weights of a tag.

    Raises UserError for a model that is no CLIP with a text encoder and tokenizer of its own.
    """
    config, weights = open_clip.get_model_config(model), get_pretrained_cfg(model, tag)
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
            f"--pretrain_choice {model}/{tag}: this model is no plain CLIP (it has "
            f"{', '.join(other)}); models with open_clip's own image and text encoder work"
        )
    layers = vision["layers"]
    return BackboneSizes(
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


def sizes_of(weights: dict[str, Tensor], where: str) -> BackboneSizes:
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
        return BackboneSizes(
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
        raise UserError(
            f"{where}: no CLIP weights in OpenAI's naming: {error} is missing (found: {found}, ...)"
        ) from None


def position_name(sizes: BackboneSizes) -> str:
    """Name of the image position embedding in a state dict."""
    tower = "visual.attnpool" if sizes.is_resnet else "visual"
    return f"{tower}.positional_embedding"


def resize_positions(weights: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Fit the image position embedding of `weights` to the backbone's grid.

    Bilinear with `align_corners=False`, the class token's kept, as the reference does. The grid
    that the weights come from is square (CLIP), or of about the images' own shape.
    """
    name = position_name(backbone.sizes)
    source = weights.get(name)
    rows, columns = backbone.grid
    if source is None or source.shape[:1] == (1 + rows * columns,):
        return weights
    if source.dim() != 2 or len(source) < 2 or not source.is_floating_point():
        raise UserError(f"{name} has the shape {tuple(source.shape)}: no positions of an image")
    old = _grid_of(source.shape[0] - 1, backbone.image_size, name)
    grid = source[1:].float().T.reshape(1, -1, *old)
    grid = F.interpolate(grid, size=backbone.grid, mode="bilinear", align_corners=False)
    resized = torch.cat([source[:1].float(), grid[0].flatten(1).T])
    return {**weights, name: resized.to(source.dtype)}


def _grid_of(count: int, image_size: tuple[int, int], name: str) -> tuple[int, int]:
    """Rows and columns of a position embedding of so many patches, which does not say them.

    A square number is a square grid, as CLIP's; others come from pedestrian images, so the grid is
    the one whose shape is nearest to the image's. With overlapping patches it is not quite the
    same: 384x128 at stride 8 has 47x15.
    """
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    wanted = image_size[0] / image_size[1]
    grids = [(count // n, n) for n in range(1, count + 1) if count % n == 0]
    off, grid = min((abs(math.log(rows / n / wanted)), (rows, n)) for rows, n in grids)
    if off > math.log(1.6):
        raise UserError(
            f"{name}: {count} patches form no grid of about {wanted:.2g}:1, the shape of "
            f"--img_size {image_size[0]} {image_size[1]}; cannot be resized"
        )
    return grid


def _position_embedding(grid: tuple[int, int], width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(1 + grid[0] * grid[1], width))


def _reach(config: dict) -> None:
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
