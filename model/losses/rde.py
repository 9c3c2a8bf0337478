"""RDE (Qin et al., CVPR 2024): triplet alignment losses, and features of selected tokens.

Shapes: B samples, L tokens, K selected tokens, D joint space, E features of selected tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import (
    BeforeEpoch,
    Encoded,
    Inputs,
    ModuleConfig,
    add_losses,
    apply_reduction,
)
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
    loss_B = _of_samples(loss, inputs, inputs.unit)
    return (loss_B * inputs.samples.get("clean", torch.ones_like(loss_B))).sum()


def _of_samples(loss: Callable[..., Tensor], inputs: Inputs, unit: Mapping[str, Tensor]) -> Tensor:
    """The loss of each sample [B], the mean of the views.

    Args:
        unit: normalised features of `text`, `image` and, with two views, `pair`.
    """
    text_BD, *views = unit.values()
    options = inputs.options
    losses = [
        loss(text_BD, v, inputs.pids_B, options.tal_temperature, options.tal_margin, "none")
        for v in views
    ]
    return add_losses(losses) / len(losses)


def tse(inputs: Inputs) -> Tensor:
    """`tal` of the features of selected tokens, summed over the clean samples."""
    loss_B = _of_samples(tal, inputs, _unit_of_selected(inputs))
    return (loss_B * inputs.samples.get("clean", torch.ones_like(loss_B))).sum()


def _unit_of_selected(inputs: Inputs) -> dict[str, Tensor]:
    return {
        part: F.normalize(
            inputs.modules["head_tse_text" if part == "text" else "head_tse_image"](
                inputs.outputs[f"{part}/tse"], inputs.outputs[f"{part}/tse_valid"] > 0
            ),
            dim=1,
        )
        for part in inputs.unit
    }


def tse_outputs(encoded: Encoded) -> dict[str, Tensor]:
    """The selected tokens [B, K, D] of captions or images, and which exist [B, K], 1 or 0."""
    assert encoded.attention_BL is not None, "its row asks for it"
    options = encoded.options
    if encoded.ids_BL is None:  # without the class token
        tokens_BND, attention_BN = encoded.tokens_BLD[:, 1:], encoded.attention_BL[:, 1:]
        k = selection_size(tokens_BND.shape[1], options.tse_ratio)
        selected_BKD, valid_BK = select_tokens(tokens_BND, attention_BN, k)
    else:
        k = selection_size(options.text_length - 2, options.tse_ratio)
        words_BL = word_mask(encoded.ids_BL)
        selected_BKD, valid_BK = select_tokens(
            encoded.tokens_BLD, encoded.attention_BL, k, words_BL
        )
    return {"tse": selected_BKD, "tse_valid": valid_BK.to(selected_BKD.dtype)}


def tse_feature(encoded: Encoded) -> Tensor:
    """The features [B, E] of captions or images for the ranking."""
    selected = tse_outputs(encoded)
    head = "head_tse_image" if encoded.ids_BL is None else "head_tse_text"
    return encoded.modules[head](selected["tse"], selected["tse_valid"] > 0)


def tse_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The embeddings of selected words and patches."""
    return {
        name: TokenEmbedding(config.dim, config.options.tse_dim)
        for name in ("head_tse_text", "head_tse_image")
    }


def divide(context: BeforeEpoch) -> dict[str, Tensor]:
    """Confident consensus division (CCD): which training pairs are clean, 1 or 0 for each [N].

    The losses of all samples, those of `tal` and, if it is trained, of `tse`, are each split by a
    mixture of two Gaussians. A sample is clean if both say so, noisy if both say so, and otherwise
    one or the other at random.
    """
    both = "tse" in context.options.loss_names.split("+")

    def losses_of(inputs: Inputs) -> dict[str, Tensor]:
        losses = {"tal": _of_samples(tal, inputs, inputs.unit)}
        if both:
            losses["tse"] = _of_samples(tal, inputs, _unit_of_selected(inputs))
        return losses

    votes = torch.stack(
        [clean_by_mixture(v, context.seed) for v in context.evaluate(losses_of).values()]
    )
    generator = torch.Generator().manual_seed(context.seed)
    chance_N = torch.rand(votes.shape[1], generator=generator) < 0.5
    agree_N = votes.all(dim=0) | ~votes.any(dim=0)
    clean_N = torch.where(agree_N, votes[0], chance_N)
    line = (
        f"ccd: {clean_N.float().mean():.1%} of the training pairs are taken for clean; the losses "
        f"disagree about {(~agree_N).float().mean():.1%}"
    )
    if context.noisy_N is not None:
        found = (~clean_N)[context.noisy_N].float().mean()
        line += f"; {found:.1%} of the pairs that --noise_rate changed are found"
    context.say(line)
    return {"clean": clean_N.float()}


def clean_by_mixture(loss_N: Tensor, seed: int) -> Tensor:
    """Which samples a mixture of two Gaussians of their losses takes for clean, bool [N].

    Clean is where the component of the lower mean has a posterior above 0.5; if that are all, the 1
    % with the lowest posterior are not. A sample without a loss (NaN: its image is broken) is not.
    """
    from sklearn.mixture import GaussianMixture  # type: ignore[import-untyped]

    clean_N, known_N = torch.zeros(len(loss_N), dtype=torch.bool), ~loss_N.isnan()
    if known_N.sum() < 2:
        return known_N
    scaled_K1 = loss_N[known_N, None].double()
    scaled_K1 = scaled_K1 - scaled_K1.min()
    scaled_K1 = scaled_K1 / scaled_K1.max().clamp(min=1e-12)
    mixture = GaussianMixture(2, tol=1e-2, reg_covar=5e-4, max_iter=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten steps may not converge, as in the original
        mixture.fit(scaled_K1.numpy())
    lower = int(mixture.means_.argmin())
    posterior_K = torch.from_numpy(mixture.predict_proba(scaled_K1.numpy())[:, lower])
    clean_K = posterior_K > 0.5
    if clean_K.all():
        clean_K[posterior_K.argsort()[: max(1, len(clean_K) // 100)]] = False
    clean_N[known_N] = clean_K
    return clean_N


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
    at_BKD = at_BK[..., None].expand(-1, -1, tokens_BLD.shape[-1])
    selected_BKD = tokens_BLD.gather(1, at_BKD)
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
