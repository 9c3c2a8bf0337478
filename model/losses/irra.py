"""The alignment and classification losses of IRRA and its variants, as pure functions.

Shapes: B samples, D joint space. `scale` is 1 / temperature.
Features are normalised unless a docstring says otherwise. `reduction="none"` returns a value for
each sample instead of their mean, for example to weight samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, ModuleConfig, add_losses, apply_reduction
from utils.devices import at_least_float32


def sdm(
    a_BD: Tensor,
    b_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    reduction: str = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """Similarity distribution matching (IRRA, eq. 6), the sum of both directions.

    KL divergence of softmax(scale * cosine) from the same-identity matrix with rows of sum 1.
    Returns a scalar, or [B] with `reduction="none"`.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).float()
    log_target_BB = (same_BB / same_BB.sum(dim=1, keepdim=True) + eps).log()

    def one_way(logits_BB: Tensor) -> Tensor:
        log_p_BB = logits_BB.log_softmax(dim=1)
        return apply_reduction((log_p_BB.exp() * (log_p_BB - log_target_BB)).sum(dim=1), reduction)

    logits_BB = scale * a_BD @ b_BD.T
    return one_way(logits_BB) + one_way(logits_BB.T)


def itc(a_BD: Tensor, b_BD: Tensor, scale: float | Tensor, reduction: str = "mean") -> Tensor:
    """InfoNCE (CLIP): cross-entropy with the own pair as the target, the mean of both directions.

    Returns a scalar, or [B] with `reduction="none"`.
    """
    logits_BB = scale * a_BD @ b_BD.T
    labels_B = torch.arange(len(a_BD), device=a_BD.device)
    to_b = F.cross_entropy(logits_BB, labels_B, reduction=reduction)
    return (to_b + F.cross_entropy(logits_BB.T, labels_B, reduction=reduction)) / 2


def cmpm(
    a_BD: Tensor, b_BD: Tensor, pids_B: Tensor, reduction: str = "mean", eps: float = 1e-8
) -> Tensor:
    """Cross-modal projection matching (Zhang & Lu, ECCV 2018), the sum of both directions.

    Takes unnormalised features. Differs from `sdm` in three points: it projects unnormalised
    anchors on normalised features, has no temperature, and divides the rows of the targets by
    their L2 norm. Returns a scalar, or [B] with `reduction="none"`.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).float()
    log_target_BB = (F.normalize(same_BB, dim=1) + eps).log()

    def one_way(anchor_BD: Tensor, other_BD: Tensor) -> Tensor:
        log_p_BB = (anchor_BD @ F.normalize(other_BD, dim=1).T).log_softmax(dim=1)
        return apply_reduction((log_p_BB.exp() * (log_p_BB - log_target_BB)).sum(dim=1), reduction)

    return one_way(a_BD, b_BD) + one_way(b_BD, a_BD)


def sdm_of_views(inputs: Inputs, all_pairs: bool = True) -> Tensor:
    """Mean of `sdm` over the pairs of views; `all_pairs` includes the pair of the two images."""
    return inputs.mean_over_pairs(lambda a, b: sdm(a, b, inputs.pids_B, inputs.scale), all_pairs)


def itc_of_views(inputs: Inputs, all_pairs: bool = True) -> Tensor:
    """Mean of `itc` over the pairs of views; `all_pairs` includes the pair of the two images."""
    return inputs.mean_over_pairs(lambda a, b: itc(a, b, inputs.scale), all_pairs)


def cmpm_of_views(inputs: Inputs) -> Tensor:
    """Mean over views of `cmpm` of the view and the text."""
    losses = [cmpm(view, inputs.text_BD, inputs.pids_B) for view in inputs.views]
    return add_losses(losses) / len(losses)


def identity(inputs: Inputs) -> Tensor:
    """Half of the cross-entropies of image and text (IRRA), summed over views."""
    head = inputs.modules["classifier"]
    weight, bias = at_least_float32(head.weight), at_least_float32(head.bias)
    text, *images = (
        F.cross_entropy(F.linear(feature_BD, weight, bias), inputs.pids_B)
        for feature_BD in (inputs.text_BD, *inputs.views)
    )
    return add_losses(text + image for image in images) / 2


def identity_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The classifier of identities, initialised as in IRRA."""
    classifier = nn.Linear(config.dim, config.num_classes)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return {"classifier": classifier}
