"""CFAN (CVPR 2026): alignment through the ground view, and of fuzzy tokens.

Shapes: B samples, L tokens, K queries, D joint space. `scale` is 1 / temperature.

A query is a summary of a caption's or an image's tokens. Its membership says how much it belongs to
a global feature, and weights what it adds to the similarity of a caption and an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.losses.aea import elastic_kl
from model.losses.inputs import Encoded, Inputs, ModuleConfig, add_losses, apply_reduction
from model.losses.irra import sdm
from model.losses.layers import Float32Linear
from model.losses.mlm import cross_modal_parts, cross_modal_tokens

BLOCK = 2**20  # numbers of `membership` at a time: 4 MiB


def cda(
    text_BD: Tensor,
    aerial_BD: Tensor,
    ground_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Context-aware dynamic alignment: text to aerial directly, or by way of the ground image.

    w sdm(aerial, text) + (1 - w) (sdm(ground, text) + sdm(aerial, ground)) of normalised features,
    where w = sigmoid(cosine of text and aerial - cosine of text and ground) of each sample. The
    aerial image follows the ground image: that one gets no gradient from their pair. Returns a
    scalar, or [B] with `reduction="none"`.
    """

    def sdm_B(a_BD: Tensor, b_BD: Tensor) -> Tensor:
        return sdm(a_BD, b_BD, pids_B, scale, reduction="none")

    weight_B = (text_BD * (aerial_BD - ground_BD)).sum(dim=1).sigmoid()
    bridge_B = sdm_B(ground_BD, text_BD) + sdm_B(aerial_BD, ground_BD.detach())
    return apply_reduction(
        weight_B * sdm_B(aerial_BD, text_BD) + (1 - weight_B) * bridge_B, reduction
    )


def cda_of_views(inputs: Inputs) -> Tensor:
    """`cda` of the three features of each sample."""
    text_BD, aerial_BD, ground_BD = inputs.unit.values()
    return cda(text_BD, aerial_BD, ground_BD, inputs.pids_B, inputs.scale)


def fta_outputs(encoded: Encoded) -> dict[str, Tensor]:
    """The queries [B, K, D] after they have seen a caption's or an image's tokens."""
    padding_BL = None
    if encoded.ids_BL is not None:
        place_L = torch.arange(encoded.ids_BL.shape[1], device=encoded.ids_BL.device)
        padding_BL = place_L > encoded.ids_BL.argmax(dim=1, keepdim=True)
    return {"fta": fta_queries(encoded.modules["head_fta"], encoded.tokens_BLD, padding_BL)}


def fta_of_views(inputs: Inputs) -> Tensor:
    """`fta` of the text with each view, their mean."""
    losses = [
        fta(
            inputs.outputs["text/fta"],
            inputs.outputs[f"{name}/fta"],
            inputs.text_BD,
            view_BD,
            inputs.pids_B,
            inputs.scale,
            inputs.modules["head_fta"]["cross_membership"],
        )
        for name, view_BD in zip(("image", "pair"), inputs.views, strict=False)
    ]
    return add_losses(losses) / len(losses)


def fta_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The queries, the transformer through which they see tokens, and the membership network."""
    options = config.options
    return {
        "head_fta": nn.ModuleDict(fta_parts(config.dim, options.cmt_depth, options.fta_queries))
    }


def fta_parts(dim: int, depth: int, queries: int = 4) -> dict[str, nn.Module]:
    """What `fta_queries` and `membership` need, by the names in checkpoints."""
    parts = cross_modal_parts(dim, depth, vocab_size=1)
    del parts["mlm_head"]
    return {
        **parts,
        "cross_queries": nn.Embedding(queries, dim),
        "cross_membership": nn.Sequential(
            Float32Linear(dim, 2 * dim), nn.ReLU(), Float32Linear(2 * dim, dim)
        ),
    }


def fta_queries(
    parts: Mapping[str, Any], tokens_BLD: Tensor, padding_BL: Tensor | None = None
) -> Tensor:
    """The learned queries after they have seen the tokens, [B, K, D]; row i sees sample i only.

    Args:
        parts: see `fta_parts`.
        tokens_BLD: projected tokens of images or of captions.
        padding_BL: bool, the tokens not to look at: a caption's padding is as long as the other
            captions of its batch happen to be.
    """
    weight_KD = parts["cross_queries"].weight.to(tokens_BLD.dtype)
    queries_BKD = weight_KD.expand(len(tokens_BLD), *weight_KD.shape)
    return cross_modal_tokens(parts, queries_BKD, tokens_BLD, padding_BL)


def membership(queries_BKD: Tensor, feature_BD: Tensor, network: nn.Module) -> Tensor:
    """How much query k of sample i belongs to the feature of sample j, in [0, 1], [B, B, K].

    The mean over the channels of exp(-(1 - q t)^2 / (2 v^2)), of the normalised query q and feature
    t, where v = exp(network(t)), 1e-6 at least. Of these B * B * K * D numbers, BLOCK (or those of
    one sample's queries) are there at a time, also in the backward pass.
    """
    queries_BKD, feature_BD = (F.normalize(x, dim=-1) for x in (queries_BKD, feature_BD))
    # 1 / v^2 by its logarithm: v itself may overflow, and then its gradient is NaN.
    slope_BD = (-2 * network(feature_BD).clamp(min=math.log(1e-6))).exp() / -2

    def of_block(queries_bKD: Tensor) -> Tensor:
        distance_bBKD = 1 - queries_bKD[:, None] * feature_BD[None, :, None]
        return (distance_bBKD.square() * slope_BD[None, :, None]).exp().mean(dim=-1)

    rows = max(1, BLOCK // (feature_BD.numel() * queries_BKD.shape[1]))
    if rows >= len(queries_BKD):
        return of_block(queries_BKD)
    # The backward pass computes each block again: none of their numbers are kept for it.
    once_more = partial(checkpoint, of_block, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([once_more(block) for block in queries_BKD.split(rows)])


def fta(
    text_queries_BKD: Tensor,
    image_queries_BKD: Tensor,
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    network: nn.Module,
    reduction: str = "mean",
) -> Tensor:
    """Fuzzy token alignment: the KL divergence of `sdm` on both of `fta_scores`, their mean.

    Features and queries need not be normalised. Returns a scalar, or [B] with `reduction="none"`.
    """
    member_BBK = membership(text_queries_BKD, text_BD, network)
    member_BBK = member_BBK * membership(image_queries_BKD, image_BD, network)
    same_BB = (pids_B[:, None] == pids_B[None, :]).to(text_BD.dtype)
    to_image, to_text = (
        elastic_kl(scale * scores_BB, same_BB, reduction=reduction)
        for scores_BB in fta_scores(text_queries_BKD, image_queries_BKD, member_BBK)
    )
    return (to_image + to_text) / 2


def fta_scores(
    text_queries_BKD: Tensor, image_queries_BKD: Tensor, member_BBK: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities [B, B] of text to image and of image to text.

    Each is the mean over k of the cosine of the query k of sample i and that of sample j, times
    the memberships of both queries k of sample i, the text's and the image's, in features j.
    """
    text_BKD, image_BKD = (F.normalize(x, dim=-1) for x in (text_queries_BKD, image_queries_BKD))
    cosine_BBK = torch.einsum("ikd,jkd->ijk", text_BKD, image_BKD)
    to_image_BB = (cosine_BBK * member_BBK).mean(dim=-1)
    return to_image_BB, (cosine_BBK.transpose(0, 1) * member_BBK).mean(dim=-1)
