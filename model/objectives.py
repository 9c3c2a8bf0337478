"""The alignment and classification losses of IRRA and its variants, as pure functions.

Shapes: B samples, D joint space. `scale` is 1 / temperature.
Features are normalised unless a docstring says otherwise. AEA's own losses are in `aea.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sdm(a_BD: Tensor, b_BD: Tensor, pids_B: Tensor, scale: float, eps: float = 1e-8) -> Tensor:
    """Similarity distribution matching (IRRA, eq. 6), both directions added.

    KL of softmax(scale * cos) to the same-identity matrix with rows of sum 1.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).float()
    log_target_BB = (same_BB / same_BB.sum(dim=1, keepdim=True) + eps).log()

    def one_way(logits_BB: Tensor) -> Tensor:
        log_p_BB = logits_BB.log_softmax(dim=1)
        return (log_p_BB.exp() * (log_p_BB - log_target_BB)).sum(dim=1).mean()

    logits_BB = scale * a_BD @ b_BD.T
    return one_way(logits_BB) + one_way(logits_BB.T)


def itc(a_BD: Tensor, b_BD: Tensor, scale: float) -> Tensor:
    """InfoNCE (CLIP): cross-entropy to the own pair, the mean of both directions."""
    logits_BB = scale * a_BD @ b_BD.T
    labels_B = torch.arange(len(a_BD), device=a_BD.device)
    return (F.cross_entropy(logits_BB, labels_B) + F.cross_entropy(logits_BB.T, labels_B)) / 2


def cmpm(a_BD: Tensor, b_BD: Tensor, pids_B: Tensor, eps: float = 1e-8) -> Tensor:
    """Cross-modal projection matching (Zhang & Lu, ECCV 2018), both directions added.

    As `sdm`, but of unnormalised anchors projected on normalised features, without temperature,
    and with targets whose rows are divided by their L2 norm. Takes unnormalised features.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).float()
    log_target_BB = (F.normalize(same_BB, dim=1) + eps).log()

    def one_way(anchor_BD: Tensor, other_BD: Tensor) -> Tensor:
        log_p_BB = (anchor_BD @ F.normalize(other_BD, dim=1).T).log_softmax(dim=1)
        return (log_p_BB.exp() * (log_p_BB - log_target_BB)).sum(dim=1).mean()

    return one_way(a_BD, b_BD) + one_way(b_BD, a_BD)
