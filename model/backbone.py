"""CLIP as the backbone: open_clip builds it, and this file loads it and adapts it to pedestrians.

Shapes: B images or captions, L tokens of the longest caption, N image patches, D joint space.

    backbone = load_backbone("ViT-B/16", image_size=(384, 128))
    image_BD, image_tokens = backbone.encode_images(images)      # images [B, 3, 384, 128]
    text_BD, text_tokens = backbone.encode_captions(caption_ids)  # ids [B, L], padded with zeros

Weights keep OpenAI's names, so checkpoints of this project, IRRA and CLIP have the same names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.blocks import SelfAttention, use_lean_blocks
from model.weights import (
    BackboneConfig,
    config_from_choice,
    config_from_weights,
    is_hub,
    openai_note,
    parse_choice,
    patch_grid,
    read_weights,
    resize_positions,
)
from utils.checkpoint import refuse_nonfinite
from utils.errors import UserError

PLAIN_ATTENTION_BELOW = 128  # tokens


class Backbone(open_clip.CLIP):
    """CLIP for images of any height and width and any patch stride.

    The image feature is the projected class token (for a ResNet, the attention-pooled feature).
    The text feature is the projected end-of-text token, which has the largest id.

    Args:
        config: the architecture.
        image_size: height and width, pixels.
        stride: distance between patches, pixels; None: the patch size. A ResNet has no stride.
        half: keep the weights of linear, convolution and attention layers in half precision.

    Raises UserError for an image size or stride that the architecture cannot have.
    """

    def __init__(
        self,
        config: BackboneConfig,
        image_size: tuple[int, int],
        stride: int | None = None,
        half: bool = False,
    ) -> None:
        vision = CLIPVisionCfg(
            layers=config.vision_layers,
            width=config.vision_width,
            patch_size=config.vision_patch_size,
            # open_clip's ResNet takes squares only; `_adapt_vision` sets its position embedding.
            image_size=224 if config.is_resnet else image_size,
            head_width=config.head_width,
            mlp_ratio=config.mlp_ratio,
        )
        text = CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads or config.text_width // 64,
            layers=config.text_layers,
        )
        cast = torch.float16 if half else None
        super().__init__(
            config.embed_dim, vision, text, quick_gelu=config.quick_gelu, cast_dtype=cast
        )
        self.config = config
        self.image_size = image_size
        self._kept: dict[str, Tensor] = {}  # inputs of the last blocks' attention
        self.notes: list[str] = []  # assumptions about its weights, for the log
        # The temperature is fixed (0.02 in the paper) and belongs to the losses.
        self.logit_scale = None
        self._adapt_vision(stride)
        use_lean_blocks(self.transformer)
        if not config.is_resnet:
            use_lean_blocks(self.visual.transformer)
        if half:
            open_clip.model.convert_weights_to_fp16(self)

    @property
    def input(self) -> dict[str, Any]:
        """The `img_size` and `stride_size` of its position embedding; checkpoints record it."""
        stride = None if self.config.is_resnet else self.visual.conv1.stride[0]
        return {"img_size": list(self.image_size), "stride_size": stride}

    def reset_from_scratch(self) -> None:
        """CLIP's initial values for training from scratch. open_clip sets them in the text encoder
        only."""
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
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)

    def compile_encoders(self) -> None:
        """Compile both encoders in place; names and values of the weights stay the same."""
        self.visual.compile()
        self.transformer.compile(dynamic=True)  # one compilation for captions of any length

    def keep_attention(self) -> None:
        """Let `pooled_attention` know the last blocks; those of a ViT."""
        for name in ("image", "text"):
            self._last_attention(name).register_forward_pre_hook(partial(self._keep, name))

    def pooled_attention(self, name: str, ids_BL: Tensor | None = None) -> Tensor:
        """How much the pooled token of the last encoded batch attends to each token, [B, L]: the
        mean over heads in the last block, without gradient.

        Args:
            name: "image" or "text".
            ids_BL: of captions; their pooled token is the end token.
        """
        x_BLE, attention = self._kept.pop(name), self._last_attention(name)
        if ids_BL is None:
            return attention.of_token(x_BLE, torch.zeros_like(x_BLE[:, 0, 0], dtype=torch.long))
        return attention.of_token(x_BLE, ids_BL.argmax(dim=-1), causal=True)

    def _last_attention(self, name: str) -> SelfAttention:
        encoder = self if name == "text" else self.visual
        last: Any = encoder.transformer.resblocks[-1]
        return last.attn

    def _keep(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept[name] = inputs[0].detach()

    def encode_images(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Image features [B, D] and projected tokens [B, 1 + N, D], the class token first.

        For a ResNet the only token is the pooled feature, [B, 1, D].
        """
        images = images_BCHW.to(self.visual.conv1.weight.dtype)
        if self.config.is_resnet:
            pooled_BD = self.visual(images)
            return pooled_BD, pooled_BD[:, None]
        with self._attention_kernel(1 + self.grid[0] * self.grid[1], images.device):
            pooled_BD, patches = self.visual(images)  # patches are normalised, not projected
        tokens_BND = torch.cat([pooled_BD[:, None], patches @ self.visual.proj], dim=1)
        return pooled_BD, tokens_BND

    def embed_tokens(self, *ids_BL: Tensor) -> list[Tensor]:
        """Token embeddings [B, L, width] of several batches, from one lookup.

        Each lookup has a dense gradient of the complete vocabulary (100 MB for ViT-B/16), so
        captions and sentences of a step share one lookup.
        """
        flat = self.token_embedding(torch.cat([ids.flatten() for ids in ids_BL]))
        parts = flat.split([ids.numel() for ids in ids_BL])
        return [part.view(*ids.shape, -1) for part, ids in zip(parts, ids_BL, strict=True)]

    def encode_captions(
        self, ids_BL: Tensor, embedded_BLE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text features [B, D] and projected tokens [B, L, D].

        Attention is causal, so tokens after the end-of-text token change nothing: L may be the
        length of the batch's longest caption instead of the full context length.

        Args:
            embedded_BLE: the token embeddings of `ids_BL` from `embed_tokens`, if known already.
        """
        if embedded_BLE is None:
            (embedded_BLE,) = self.embed_tokens(ids_BL)
        length = ids_BL.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = embedded_BLE.to(dtype) + self.positional_embedding[:length].to(dtype)
        with self._attention_kernel(length, x.device):
            x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        tokens_BLD = self.ln_final(x) @ self.text_projection
        rows = torch.arange(ids_BL.shape[0], device=ids_BL.device)
        return tokens_BLD[rows, ids_BL.argmax(dim=-1)], tokens_BLD

    def _adapt_vision(self, stride: int | None) -> None:
        """Set the patch grid for the image size and stride, and create its position embedding."""
        height, width = self.image_size
        if self.config.is_resnet:
            if stride is not None:
                raise UserError("--stride_size: a ResNet has no patches; leave it out")
            if height % 32 or width % 32:
                raise UserError(f"--img_size {height} {width}: a ResNet needs multiples of 32")
            self.grid = patch_grid(None, self.image_size, None)
            pool = self.visual.attnpool
            pool.positional_embedding = _position_embedding(self.grid, pool.q_proj.in_features)
            return
        patch = self.config.vision_patch_size
        assert patch is not None, "a ViT has a patch size"
        stride = stride or patch
        if stride > patch:
            raise UserError(
                f"--stride_size {stride} exceeds the patch size {patch} and would leave out pixels"
            )
        if min(height, width) < patch:
            raise UserError(f"--img_size {height} {width} is smaller than a patch of {patch}")
        self.grid = patch_grid(patch, self.image_size, stride)
        self.visual.conv1.stride = (stride, stride)
        self.visual.grid_size = self.grid
        self.visual.positional_embedding = _position_embedding(self.grid, self.config.vision_width)
        self.visual.output_tokens = True

    def _attention_kernel(self, tokens: int, device: torch.device) -> AbstractContextManager[None]:
        """The faster attention kernel: on a CPU, plain matrix products for short sequences.

        Forward and backward in bfloat16 on two cores take 14 ms, and 22 ms with the fused kernel,
        at 25 tokens; 4 and 11 ms at 43 tokens; 109 and 95 ms at 193 tokens. Gradient checkpointing
        computes activations again outside of this context and needs the same kernel there, so it
        always uses the fused one.
        """
        short = device.type == "cpu" and tokens < PLAIN_ATTENTION_BELOW
        if short and not self.transformer.grad_checkpointing:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()


def load_backbone(
    choice: str,
    image_size: tuple[int, int],
    stride: int | None = None,
    scratch: BackboneConfig | None = None,
    half: bool = False,
) -> Backbone:
    """A backbone with pretrained weights, or from scratch.

    Args:
        choice: an OpenAI name ("ViT-B/16"), a model and pretrained tag of open_clip
            ("ViT-B-16/laion2b_s34b_b88k"), the path of a file (OpenAI archive, state dict or
            safetensors) with an OpenAI architecture or of a folder of tools/export.py --hub, a
            model and such a path ("ViT-B-16@weights/x.pt"), or "scratch".
        image_size, stride, half: see `Backbone`.
        scratch: the architecture for "scratch".

    Raises UserError for an unknown name, for weights that cannot be downloaded or read, for
    weights with NaN or infinite values, and for a state dict that does not fit the architecture.
    """
    if choice == "scratch":
        if scratch is None:
            raise ValueError("a backbone from scratch needs a BackboneConfig")
        backbone = Backbone(scratch, image_size, stride, half)
        backbone.reset_from_scratch()
        return backbone
    path, checkpoint = read_weights(choice)
    weights, named = checkpoint["model"], config_from_choice(choice)
    config = named or config_from_weights(weights, str(path))
    backbone = Backbone(config, image_size, stride, half)
    weights, note = resize_positions(weights, config, backbone.grid, checkpoint, str(path))
    if parse_choice(choice).file:
        known = named or is_hub(choice)
        notes = ["" if known else openai_note(path, config), checkpoint.get("assumed", ""), note]
        backbone.notes = [note for note in notes if note]
    expected = backbone.state_dict()
    counters = {n for n in expected if n.endswith("num_batches_tracked")}  # not in old archives
    missing = sorted(set(expected) - set(weights) - counters)
    wrong = [n for n in expected if n in weights and expected[n].shape != weights[n].shape]
    if missing or wrong:
        reasons = [f"{len(missing)} entries missing (first: {missing[0]})"] if missing else []
        reasons += [f"{wrong[0]} has the shape {tuple(weights[wrong[0]].shape)}"] if wrong else []
        raise UserError(
            f"{path}: not a complete {parse_choice(choice).model or 'CLIP'}: {'; '.join(reasons)}"
        )
    weights = {n: weights[n] for n in expected if n in weights}
    refuse_nonfinite(weights, path)
    backbone.load_state_dict(weights, strict=False)
    return backbone


def _position_embedding(grid: tuple[int, int], width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(1 + grid[0] * grid[1], width))
