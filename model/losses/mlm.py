"""IRRA's cross-modal head: it predicts masked words from the image.

Shapes: B samples, L caption tokens, N image tokens, X masked tokens, D joint space, T vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from open_clip import transformer as clip
from torch import Tensor, nn

from model.blocks import QuickGELU, use_lean_blocks
from model.losses.inputs import Inputs, ModuleConfig, PartialMean
from utils.devices import at_least_float32


def cross_modal_parts(dim: int, depth: int, vocab_size: int) -> dict[str, nn.Module]:
    """The head's parts by IRRA's names, initialised as in IRRA."""
    heads = max(1, dim // 64)
    transformer = clip.Transformer(dim, depth, heads, act_layer=clip.QuickGELU)
    use_lean_blocks(transformer)
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    dense, ln, fc = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Linear(dim, vocab_size)
    classifier = OrderedDict[str, nn.Module](dense=dense, gelu=QuickGELU(), ln=ln, fc=fc)
    out_std = dim**-0.5 * (2 * depth) ** -0.5
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=out_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=out_std)
    nn.init.normal_(attention.in_proj_weight, std=dim**-0.5)
    nn.init.normal_(attention.out_proj.weight, std=out_std)
    nn.init.normal_(dense.weight, std=(2 * dim) ** -0.5)
    nn.init.normal_(fc.weight, std=out_std)
    return {
        "cross_attn": attention,
        "cross_modal_transformer": transformer,
        "ln_pre_t": nn.LayerNorm(dim),
        "ln_pre_i": nn.LayerNorm(dim),
        "ln_post": nn.LayerNorm(dim),
        "mlm_head": nn.Sequential(classifier),
    }


def cross_modal_tokens(
    parts: Mapping[str, nn.Module],
    queries_BLD: Tensor,
    tokens_BND: Tensor,
    padding_BN: Tensor | None = None,
) -> Tensor:
    """The queries after one cross-attention to the tokens and a transformer, [B, L, D].

    Args:
        padding_BN: bool, the tokens that get no attention.
    """
    tokens_BND = parts["ln_pre_i"](tokens_BND)
    x_BLD = parts["cross_attn"](
        parts["ln_pre_t"](queries_BLD),
        tokens_BND,
        tokens_BND,
        key_padding_mask=padding_BN,
        need_weights=False,
    )[0]
    return parts["ln_post"](parts["cross_modal_transformer"](x_BLD))


def masked_token_logits(
    parts: Mapping[str, nn.Module], text_BLD: Tensor, image_BND: Tensor, at_X: Tensor
) -> Tensor:
    """Vocabulary logits [X, T] of the masked tokens, at the positions `at_X` of the B * L tokens.

    The masked captions' tokens attend to the image tokens through one cross-attention layer and a
    transformer (IRRA, sec. 3.2). A dense-QuickGELU-LayerNorm-linear classifier follows. It runs on
    the masked tokens only, because the others have no loss.
    """
    x_BLD = cross_modal_tokens(parts, text_BLD, image_BND)
    return parts["mlm_head"](x_BLD.flatten(0, 1)[at_X])


def mlm(inputs: Inputs) -> PartialMean:
    """Cross-entropy of the masked words.

    With two views they attend to the concatenated tokens of both images: either image may show
    what the word describes.
    """
    local, at_X = inputs.local, inputs.local["masked_at"]
    logits_XT = masked_token_logits(inputs.modules, local["masked"], local["tokens"], at_X)
    labels_X = local["masked_labels"].flatten()[at_X]
    with torch.autocast(logits_XT.device.type, enabled=False):
        loss_X = F.cross_entropy(at_least_float32(logits_XT), labels_X, reduction="none")
    return PartialMean(loss_X.sum(), len(loss_X))


def mlm_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The cross-modal transformer and the classifier of words."""
    return cross_modal_parts(config.dim, config.options.cmt_depth, config.vocab_size)
