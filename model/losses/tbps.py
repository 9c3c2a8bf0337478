"""The losses of TBPS-CLIP (Cao et al., AAAI 2024), as pure functions.

Shapes: B samples, D joint space, P projections. `scale` is 1 / temperature. Features are normalised
unless a docstring says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, ModuleConfig, apply_reduction
from model.losses.irra import sdm
from model.losses.layers import Float32Linear


def nitc(
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    alpha: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """Normalised image-text contrastive loss with soft labels, the mean of both directions.

    Cross-entropy to alpha * the softmax of the own scores, without gradient, + (1 - alpha) * the
    same-identity matrix with rows of sum 1. Returns a scalar, or [B] with `reduction="none"`.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).to(text_BD.dtype)
    identity_BB = same_BB / same_BB.sum(dim=1, keepdim=True)

    def one_way(logits_BB: Tensor) -> Tensor:
        target_BB = alpha * logits_BB.detach().softmax(dim=1) + (1 - alpha) * identity_BB
        return F.cross_entropy(logits_BB, target_BB, reduction="none")

    logits_BB = scale * text_BD @ image_BD.T
    return apply_reduction((one_way(logits_BB) + one_way(logits_BB.T)) / 2, reduction)


def ritc(
    text_BD: Tensor,
    image_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    reduction: str = "mean",
    eps: float = 1e-2,
) -> Tensor:
    """Reverse KL divergence to the identity targets, the mean of both directions.

    It is `sdm`, halved, with a larger `eps`, which limits what a negative can cost. Returns a
    scalar, or [B] with `reduction="none"`.
    """
    return sdm(text_BD, image_BD, pids_B, scale, reduction, eps) / 2


def citc(text_BD: Tensor, image_BD: Tensor, reduction: str = "mean") -> Tensor:
    """Cyclic loss: the geometry of images, of captions and between them should agree.

    0.25 * mean (image-image - text-text cosine)^2 + 0.25 * mean (image-text - text-image cosine)^2,
    over all pairs of samples. Returns a scalar, or the means of each row [B] with
    `reduction="none"`.
    """
    across_BB = image_BD @ text_BD.T
    within = (image_BD @ image_BD.T - text_BD @ text_BD.T).square().mean(dim=1)
    return apply_reduction((within + (across_BB - across_BB.T).square().mean(dim=1)) / 4, reduction)


def simclr(a_BP: Tensor, b_BP: Tensor, temperature: float = 0.1, reduction: str = "mean") -> Tensor:
    """SimCLR of two augmentations of the same images: each is to find its other among all 2B - 1.

    Takes unnormalised projections. Returns a scalar, or [B] with `reduction="none"`.
    """
    unit_2BP = F.normalize(torch.cat([a_BP, b_BP]), dim=1)
    itself = torch.eye(len(unit_2BP), dtype=torch.bool, device=unit_2BP.device)
    logits = (unit_2BP @ unit_2BP.T / temperature).masked_fill(itself, -torch.inf)
    other_2B = torch.arange(len(unit_2BP), device=unit_2BP.device).roll(len(a_BP))
    loss_2B = F.cross_entropy(logits, other_2B, reduction="none")
    return apply_reduction(loss_2B.view(2, -1).mean(dim=0), reduction)


def projection_head(dim: int, hidden: int = 128, out: int = 512) -> nn.Sequential:
    """SimCLR's projection of image features [B, dim] to [B, out]."""
    return nn.Sequential(Float32Linear(dim, hidden), nn.ReLU(), Float32Linear(hidden, out))


def nitc_of_views(inputs: Inputs) -> Tensor:
    """`nitc` of the text with each view, their mean; with `mvs`, the mean of that and of `nitc`
    with another augmentation of the first view.

    The weight of the model's own softmax rises over the first epoch, when it knows little.
    """
    alpha = inputs.options.nitc_alpha * min(1.0, inputs.epochs)

    def one(text_BD: Tensor, image_BD: Tensor) -> Tensor:
        return nitc(text_BD, image_BD, inputs.pids_B, inputs.scale, alpha)

    loss = inputs.mean_over_pairs(one, all_pairs=False)
    if "second" in inputs.images:
        loss = (loss + one(inputs.unit["text"], F.normalize(inputs.images["second"], dim=1))) / 2
    return loss


def ritc_of_views(inputs: Inputs) -> Tensor:
    """`ritc` of the text with each view, their mean."""
    return inputs.mean_over_pairs(
        lambda text, view: ritc(text, view, inputs.pids_B, inputs.scale), all_pairs=False
    )


def citc_of_views(inputs: Inputs) -> Tensor:
    """`citc` of the text with each view, their mean."""
    return inputs.mean_over_pairs(citc, all_pairs=False)


def simclr_of_images(inputs: Inputs) -> Tensor:
    """`simclr` of two strong augmentations of the first view."""
    head = inputs.modules["head_simclr"]
    a_BP, b_BP = (head(inputs.images[name]) for name in ("strong_1", "strong_2"))
    return simclr(a_BP, b_BP, inputs.options.simclr_temperature)


def simclr_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The projection of image features."""
    return {"head_simclr": projection_head(config.dim)}
