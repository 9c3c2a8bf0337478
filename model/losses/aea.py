"""AEA, adaptive elastic alignment: one distribution over both views, and a queue of past features.

Shapes: B samples, D joint space, Q slots of the queue, K keys = 2B + Q.

AEA does not align a caption with each view separately. The caption's similarities to the batch's
aerial images, ground images and past aerial images form one softmax. The target spreads over all
keys of the caption's identity, and a slack gives those of the first block more weight: the aerial
images. So a caption may align first with the view that is nearer to it. The aerial images are
anchors in the same way, with the captions as the first block of keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, ModuleConfig, apply_reduction


def soft_targets(pids_B: Tensor, queue_pids_Q: Tensor | None = None, slack: float = 0.15) -> Tensor:
    """W [B, K] unscaled: 1 for a key of the anchor's identity, plus `slack` in the first block.

    The blocks of keys are the batch's first view, its second view, and the queue. An empty slot
    has the identity -1 and matches no anchor.
    """
    same_BB = (pids_B[:, None] == pids_B[None, :]).float()
    blocks = [same_BB * (1 + slack), same_BB]
    if queue_pids_Q is not None:
        blocks.append((pids_B[:, None] == queue_pids_Q[None, :]).float())
    return torch.cat(blocks, dim=1)


def elastic_kl(
    logits_BK: Tensor,
    targets_BK: Tensor,
    key_exists_K: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """mean_i sum_j P_ij (log P_ij - log(W_ij + 1e-8)) with W's rows scaled to sum 1 (`supkl`).

    P is the softmax over the keys that exist. Returns a scalar, or a value for each anchor [B]
    with `reduction="none"`.
    """
    if key_exists_K is not None:
        logits_BK = logits_BK.masked_fill(~key_exists_K, -torch.inf)
    log_p_BK = logits_BK.log_softmax(dim=1)
    targets_BK = targets_BK / targets_BK.sum(dim=1, keepdim=True)
    p_BK = log_p_BK.exp()
    if key_exists_K is not None:
        log_p_BK = log_p_BK.masked_fill(~key_exists_K, 0.0)  # their P is 0; 0 * -inf is NaN
    return apply_reduction((p_BK * (log_p_BK - (targets_BK + 1e-8).log())).sum(dim=1), reduction)


def soft_cross_entropy(
    logits_BK: Tensor, targets_BK: Tensor, key_exists_K: Tensor | None = None
) -> Tensor:
    """Cross-entropy to W with rows of L2 norm 1, anchors to keys and keys to anchors (`supitc`).

    Returns the mean of the two directions, a scalar. Each direction is a mean over its rows: the
    anchors, or the keys that exist. So it has no value for each sample.
    """
    if key_exists_K is None:
        key_exists_K = torch.ones(logits_BK.shape[1], dtype=torch.bool, device=logits_BK.device)
    log_p_BK = logits_BK.masked_fill(~key_exists_K, -torch.inf).log_softmax(dim=1)
    log_p_BK = log_p_BK.masked_fill(~key_exists_K, 0.0)  # their target is 0; 0 * -inf is NaN
    to_keys = -(F.normalize(targets_BK, dim=1) * log_p_BK).sum(dim=1).mean()
    log_p_KB = logits_BK.T.log_softmax(dim=1)
    per_key_K = -(F.normalize(targets_BK.T, dim=1) * log_p_KB).sum(dim=1)
    to_anchors = (per_key_K * key_exists_K).sum() / key_exists_K.sum()
    return (to_keys + to_anchors) / 2


class FeatureQueue(nn.Module):
    """The last normalised text and aerial features and their identities, newest first.

    Part of every checkpoint; holds no gradient. Empty slots have the identity -1.

    Args:
        size: slots (the paper: three batches).
        dim: D.
    """

    text: Tensor  # [size, D]
    aerial: Tensor  # [size, D]
    pids: Tensor  # [size]

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("aerial", torch.zeros(size, dim))
        self.register_buffer("pids", torch.full((size,), -1, dtype=torch.long))

    @torch.no_grad()
    def push(self, text_BD: Tensor, aerial_BD: Tensor, pids_B: Tensor) -> None:
        """Put a batch in front; the oldest entries are dropped."""
        # Not in place: the backward pass of this step still reads the old buffers.
        for name, new in (("text", text_BD), ("aerial", aerial_BD), ("pids", pids_B)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([new.detach().to(old.dtype), old])[: len(old)])


def aea_loss(
    distribution_loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    text_BD: Tensor,
    aerial_BD: Tensor,
    ground_BD: Tensor,
    pids_B: Tensor,
    scale: float | Tensor,
    queue: FeatureQueue | None = None,
    slack: float = 0.15,
) -> Tensor:
    """AEA: the loss of the text anchors plus the loss of the aerial anchors, a scalar.

    The keys of text anchors are the aerial, ground and past aerial features. The keys of aerial
    anchors are the text, ground and past text features. Does not change the queue.

    Args:
        distribution_loss: `elastic_kl` or `soft_cross_entropy`.
        text_BD, aerial_BD, ground_BD: normalised features.
        scale: 1 / temperature.
    """
    targets_BK = soft_targets(pids_B, None if queue is None else queue.pids, slack)
    exists_K = None
    text_keys, aerial_keys = [aerial_BD, ground_BD], [text_BD, ground_BD]
    if queue is not None:
        in_batch = torch.ones(2 * len(pids_B), dtype=torch.bool, device=pids_B.device)
        exists_K = torch.cat([in_batch, queue.pids >= 0])
        text_keys.append(queue.aerial)
        aerial_keys.append(queue.text)

    def loss_of(anchor_BD: Tensor, keys: list[Tensor]) -> Tensor:
        # Concatenates the small products, not the keys: that would copy the complete queue.
        logits_BK = scale * torch.cat([anchor_BD @ k.T for k in keys], dim=1)
        return distribution_loss(logits_BK, targets_BK, exists_K)

    return loss_of(text_BD, text_keys) + loss_of(aerial_BD, aerial_keys)


def supkl(inputs: Inputs) -> Tensor:
    """AEA with KL divergence, as in the paper."""
    return _aea_of_inputs(elastic_kl, inputs)


def supitc(inputs: Inputs) -> Tensor:
    """AEA with cross-entropy: the mean of the text anchors' loss and the aerial anchors' loss."""
    return _aea_of_inputs(soft_cross_entropy, inputs) / 2


def queue_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The queue of `--queue_batches` batches."""
    size = config.options.queue_batches * config.options.batch_size
    return {"queue": FeatureQueue(size, config.dim)}


def push_to_queue(inputs: Inputs) -> None:
    """Put the step's features into the queue."""
    inputs.modules["queue"].push(inputs.unit["text"], inputs.unit["image"], inputs.pids_B)


def _aea_of_inputs(distribution_loss: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return aea_loss(
        distribution_loss,
        inputs.unit["text"],
        inputs.unit["image"],
        inputs.unit["pair"],
        inputs.pids_B,
        inputs.scale,
        inputs.modules.get("queue"),
        inputs.options.slack,
    )
