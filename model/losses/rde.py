"""RDE (Qin et al., CVPR 2024): triplet alignment losses, and features of selected tokens.

Shapes: B samples, L tokens, K selected tokens, D joint space, E features of selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, apply_reduction
from model.losses.layers import Float32Linear, TokenBatchNorm
from utils.devices import at_least_float32


def tal(
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    temperature: float = 0.015,
    margin: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Triplet alignment loss, the sum of both directions.

    max(0, margin + temperature * log sum exp(negatives / temperature) - positive) of normalised
    features. The positive is the mean cosine of the anchor's identity, weighted by the softmax of
    these cosines, which gets no gradient. Returns a scalar, or [B] with `reduction="none"`.
    """

    def negative(cosine_BB: Tensor, same_BB: Tensor) -> Tensor:
        # The original caps the sum of exponentials at 1e36, so that it does not overflow; logsumexp
        # never overflows. Without negatives it is -inf, and the loss 0.
        logits_BB = (cosine_BB / temperature).masked_fill(same_BB, -torch.inf)
        return temperature * logits_BB.logsumexp(dim=1)

    return _triplets(negative, text_BD, image_BD, pids_B, temperature, margin, reduction)


def trl(
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    temperature: float = 0.015,
    margin: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """`tal` with the hardest negative instead of the logarithm of a sum over all.

    As in the original, that negative's cosine is 0 at least.
    """

    def negative(cosine_BB: Tensor, same_BB: Tensor) -> Tensor:
        return cosine_BB.masked_fill(same_BB, 0.0).amax(dim=1)

    return _triplets(negative, text_BD, image_BD, pids_B, temperature, margin, reduction)


def _triplets(
    negative: Callable[[Tensor, Tensor], Tensor],
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    temperature: float,
    margin: float,
    reduction: str,
) -> Tensor:
    same_BB = pids_B[:, None] == pids_B[None, :]

    def one_way(cosine_BB: Tensor) -> Tensor:
        own_BB = (cosine_BB.detach() / temperature).masked_fill(~same_BB, -torch.inf)
        positive_B = (own_BB.softmax(dim=1) * cosine_BB).sum(dim=1)
        return (margin + negative(cosine_BB, same_BB) - positive_B).clamp(min=0)

    cosine_BB = text_BD @ image_BD.T
    return apply_reduction(one_way(cosine_BB) + one_way(cosine_BB.T), reduction)


def tal_of_views(inputs: Inputs) -> Tensor:
    """`tal` of the text with each view, summed over the clean samples; the mean of the views."""
    return _sum_of_clean_samples(tal, inputs)


def trl_of_views(inputs: Inputs) -> Tensor:
    """`trl` of the text with each view, summed over the clean samples; the mean of the views."""
    return _sum_of_clean_samples(trl, inputs)


def _sum_of_clean_samples(loss: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """A noisy sample has no loss of its own, but stays a negative of the others."""
    clean_B = inputs.labels.get("clean", torch.ones_like(inputs.text_BD[:, 0]))
    temperature, margin = inputs.options.tal_temperature, inputs.options.tal_margin

    def of_view(text_BD: Tensor, view_BD: Tensor) -> Tensor:
        loss_B = loss(text_BD, view_BD, inputs.pids_B, temperature, margin, "none")
        return (loss_B * clean_B).sum()

    return inputs.mean_over_pairs(of_view, all_pairs=False)


def selection_size(tokens: int, ratio: float) -> int:
    """K: how many of so many tokens are selected, one at least.

    RDE counts the patches of an image, and the 75 words that a caption may have.
    """
    return max(1, int(tokens * ratio))


def word_mask(ids_BL: Tensor) -> Tensor:
    """Which tokens of captions are words: those between start and end, bool [B, L]."""
    at_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    return (at_L > 0) & (at_L < ids_BL.argmax(dim=1, keepdim=True))


def select_tokens(
    tokens_BLD: Tensor, attention_BL: Tensor, k: int, selectable_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` tokens of each sample that get most attention; sample i depends on sample i only.

    Args:
        attention_BL: the attention of the sample's class token or end token to each token.
        k: K; a sample with fewer tokens fills the other slots with zeros.
        selectable_BL: bool, the tokens to select from (None: all).

    Returns the tokens [B, K, D], and which of them were selected, bool [B, K].
    """
    if selectable_BL is not None:
        attention_BL = attention_BL.masked_fill(~selectable_BL, -torch.inf)
    most_BK, at_BK = attention_BL.topk(min(k, attention_BL.shape[1]), dim=1)
    valid_BK = most_BK > -torch.inf
    selected_BKD = tokens_BLD.take_along_dim(at_BK[..., None], dim=1)
    selected_BKD = selected_BKD.masked_fill(~valid_BK[..., None], 0.0)
    empty = k - at_BK.shape[1]  # captions are cut to the longest of their batch
    return F.pad(selected_BKD, (0, 0, 0, empty)), F.pad(valid_BK, (0, empty))


class TokenEmbedding(nn.Module):
    """Token selection embedding (TSE): one feature of the selected tokens.

    Each token is normalised and goes through a linear layer and, in parallel, a network of two
    layers; then the maximum over the tokens. Batch normalisation takes its statistics from the
    selected tokens alone. The original also counts padding where a caption has fewer than K words.

    Args:
        dim: D.
        embed_dim: E; the network's hidden layer has half of it.
    """

    def __init__(self, dim: int, embed_dim: int = 1024) -> None:
        super().__init__()
        self.linear = Float32Linear(dim, embed_dim)
        self.hidden = Float32Linear(dim, embed_dim // 2)
        self.norm = TokenBatchNorm(embed_dim // 2)
        self.out = Float32Linear(embed_dim // 2, embed_dim)

    def forward(self, selected_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """Features [B, E] of the results of `select_tokens`; zeros for a sample without tokens."""
        embedded_BKE = self.embed(selected_BKD, valid_BK)
        embedded_BKE = embedded_BKE.masked_fill(~valid_BK[..., None], -torch.inf)
        return embedded_BKE.amax(dim=1).masked_fill(~valid_BK.any(dim=1, keepdim=True), 0.0)

    def embed(self, selected_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """The tokens before the maximum, [B, K, E]."""
        unit_BKD = F.normalize(at_least_float32(selected_BKD), dim=-1)
        hidden = self.norm(self.hidden(unit_BKD), valid_BK).relu()
        return self.out(hidden) + self.linear(unit_BKD)
