"""CLIP as the backbone: built, loaded and adapted to pedestrian images through open_clip.

Shapes: B images or captions, L tokens of the longest caption, N image patches, D joint space.

    backbone = load_backbone("ViT-B/16", image_size=(384, 128))
    image_BD, image_tokens = backbone.encode_images(images)      # images [B, 3, 384, 128]
    text_BD, text_tokens = backbone.encode_captions(caption_ids)  # ids [B, L], zeros behind the end

Weights keep OpenAI's names, so a checkpoint of this project, of IRRA and of CLIP look alike.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.weights import (
    BackboneConfig,
    config_of,
    find_weights,
    fit_positions,
    named_config,
    openai_assumed,
    parse_choice,
    patch_grid,
)
from utils.checkpoint import load_checkpoint, refuse_nonfinite
from utils.errors import UserError

PLAIN_ATTENTION_BELOW = 128  # tokens


class Backbone(open_clip.CLIP):
    """CLIP for images of any height and width and any patch stride.

    The image feature is the projected class token (ResNet: the attention-pooled one), the text
    feature the projected token at the end-of-text position, which has the largest id.

    Args:
        config: the architecture.
        image_size: height and width, pixels.
        stride: step between patches, pixels; None means the patch size. ResNets have none.
        half: keep the weights of linear, convolution and attention layers in half precision.
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
            # open_clip's ResNet takes squares only; its position embedding is remade below.
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
        self.notes: list[str] = []  # what was assumed of its weights; for the log
        # The temperature is fixed (0.02 in the paper) and belongs to the losses.
        self.logit_scale = None
        self._adapt_vision(stride)
        if half:
            open_clip.model.convert_weights_to_fp16(self)

    def _adapt_vision(self, stride: int | None) -> None:
        """Set the patch grid for the image size and stride, and its position embedding's shape."""
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
        assert patch is not None, "of a ViT"
        stride = stride or patch
        if stride > patch:
            raise UserError(f"--stride_size {stride} exceeds the patch size {patch}: pixels lost")
        if min(height, width) < patch:
            raise UserError(f"--img_size {height} {width} is smaller than a patch of {patch}")
        self.grid = patch_grid(patch, self.image_size, stride)
        self.visual.conv1.stride = (stride, stride)
        self.visual.grid_size = self.grid
        self.visual.positional_embedding = _position_embedding(self.grid, self.config.vision_width)
        self.visual.output_tokens = True

    @property
    def input(self) -> dict[str, Any]:
        """What its position embedding belongs to, for checkpoints: `img_size` and `stride_size`."""
        stride = None if self.config.is_resnet else self.visual.conv1.stride[0]
        return {"img_size": list(self.image_size), "stride_size": stride}

    def reset_from_scratch(self) -> None:
        """Initial values for training from scratch: open_clip's, and CLIP's for the text tower."""
        width, layers = self.config.text_width, self.config.text_layers
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

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside the blocks; the backward pass computes them again."""
        if self.config.is_resnet:
            raise UserError("--grad_checkpointing: open_clip's ResNets have none; leave it out")
        self.set_grad_checkpointing(True)

    def compile_encoders(self) -> None:
        """Compile both encoders in place; names and values of the weights stay."""
        self.visual.compile()
        self.transformer.compile(dynamic=True)  # captions of any length without a new compilation

    def _attention(self, tokens: int, device: torch.device) -> AbstractContextManager[None]:
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
        if self.config.is_resnet:
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
    scratch: BackboneConfig | None = None,
    half: bool = False,
) -> Backbone:
    """A backbone with pretrained weights, or from scratch.

    Args:
        choice: an OpenAI name ("ViT-B/16"), a model and pretrained tag of open_clip
            ("ViT-B-16/laion2b_s34b_b88k"), the path of a file (OpenAI archive, state dict or
            safetensors) of an OpenAI architecture or behind the name of its own
            ("ViT-B-16@weights/x.pt"), or "scratch".
        scratch: the sizes for "scratch".

    Raises UserError for an unknown name, weights that cannot be fetched or read, and state dicts
    that are no CLIP.
    """
    if choice == "scratch":
        if scratch is None:
            raise ValueError("a backbone from scratch needs its sizes")
        backbone = Backbone(scratch, image_size, stride, half)
        backbone.reset_from_scratch()
        return backbone
    path = find_weights(choice)
    checkpoint = load_checkpoint(path)
    weights, named = checkpoint["model"], named_config(choice)
    config = named or config_of(weights, str(path))
    backbone = Backbone(config, image_size, stride, half)
    weights, told = fit_positions(weights, config, backbone.grid, checkpoint, str(path))
    if parse_choice(choice).file:
        notes = ["" if named else openai_assumed(path, config), checkpoint.get("assumed", ""), told]
        backbone.notes = [note for note in notes if note]
    own = backbone.state_dict()
    counters = {n for n in own if n.endswith("num_batches_tracked")}  # old archives lack them
    missing = sorted(set(own) - set(weights) - counters)
    wrong = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if missing or wrong:
        raise UserError(
            f"{path}: not a whole {parse_choice(choice).model or 'CLIP'}: "
            + (f"{len(missing)} entries missing (first: {missing[0]})" if missing else "")
            + (f" shape of {wrong[0]} is {tuple(weights[wrong[0]].shape)}" if wrong else "")
        )
    weights = {n: weights[n] for n in own if n in weights}
    refuse_nonfinite(weights, path)
    backbone.load_state_dict(weights, strict=False)
    return backbone


def _position_embedding(grid: tuple[int, int], width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(1 + grid[0] * grid[1], width))
