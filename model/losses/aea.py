"""AEA, adaptive elastic alignment: one distribution over both views, and a queue of past features.

Shapes: B samples, D joint space, K keys = 2B + the queue's slots.

A caption is not forced onto each view separately: its similarities to the batch's aerial images,
ground images and past aerial images form one softmax, and the target spreads over all keys of its
identity, with some slack that favours the direct pair. The nearer view may so pull first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, Setting, reduced


def soft_targets(pids_B: Tensor, queue_pids_Q: Tensor | None = None, slack: float = 0.15) -> Tensor:
    """W [B, K] unscaled: 1 for a key of the anchor's identity, plus slack in the first block.

    Keys are the batch's first view, its second view, then the queue; an identity of -1 is an
    empty slot and matches nobody.
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

    P is the softmax over keys. Keys that do not exist take no part in it. Returns a scalar, or a
    value for each anchor [B] with `reduction="none"`.
    """
    if key_exists_K is not None:
        logits_BK = logits_BK.masked_fill(~key_exists_K, -torch.inf)
    log_p_BK = logits_BK.log_softmax(dim=1)
    targets_BK = targets_BK / targets_BK.sum(dim=1, keepdim=True)
    p_BK = log_p_BK.exp()
    if key_exists_K is not None:
        log_p_BK = log_p_BK.masked_fill(~key_exists_K, 0.0)  # their P is 0; 0 * -inf is NaN
    return reduced((p_BK * (log_p_BK - (targets_BK + 1e-8).log())).sum(dim=1), reduction)


def soft_cross_entropy(
    logits_BK: Tensor, targets_BK: Tensor, key_exists_K: Tensor | None = None
) -> Tensor:
    """Cross-entropy to W with rows of L2 norm 1, anchors to keys and keys to anchors (`supitc`).

    The mean of the two directions, each a mean over its rows. Keys that do not exist take no part.
    There is no value for each sample: the second direction is a mean over keys.
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
        """Put a batch in front; the oldest entries fall out at the end."""
        # New buffers, not changed ones: this step's gradient still reads the old.
        for name, new in (("text", text_BD), ("aerial", aerial_BD), ("pids", pids_B)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([new.detach().to(old.dtype), old])[: len(old)])


def aea_loss(
    form: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    text_BD: Tensor,
    aerial_BD: Tensor,
    ground_BD: Tensor,
    pids_B: Tensor,
    scale: float,
    queue: FeatureQueue | None = None,
    slack: float = 0.15,
) -> Tensor:
    """AEA: `form` (`elastic_kl` or `soft_cross_entropy`) of text anchors plus of aerial anchors.

    Features must be normalised. Keys of text anchors are the aerial, ground and past aerial
    features; keys of aerial anchors the text, ground and past text features. The queue is read,
    not changed.
    """
    targets_BK = soft_targets(pids_B, None if queue is None else queue.pids, slack)
    exists_K = None
    text_keys, aerial_keys = [aerial_BD, ground_BD], [text_BD, ground_BD]
    if queue is not None:
        in_batch = torch.ones(2 * len(pids_B), dtype=torch.bool, device=pids_B.device)
        exists_K = torch.cat([in_batch, queue.pids >= 0])
        text_keys.append(queue.aerial)
        aerial_keys.append(queue.text)

    def of_anchors(anchor_BD: Tensor, keys: list[Tensor]) -> Tensor:
        # Products side by side, so that the queue is never copied next to the batch's features.
        logits_BK = scale * torch.cat([anchor_BD @ k.T for k in keys], dim=1)
        return form(logits_BK, targets_BK, exists_K)

    return of_anchors(text_BD, text_keys) + of_anchors(aerial_BD, aerial_keys)


def supkl(inputs: Inputs) -> Tensor:
    """AEA by KL divergence, the paper's."""
    return _of_inputs(elastic_kl, inputs)


def supitc(inputs: Inputs) -> Tensor:
    """AEA by cross-entropy; half of the sum over the two anchors."""
    return _of_inputs(soft_cross_entropy, inputs) / 2


def _of_inputs(form: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    features = (inputs.unit["text"], inputs.unit["image"], inputs.unit["pair"])
    queue = inputs.modules.get("queue")
    return aea_loss(form, *features, inputs.pids_B, inputs.scale, queue, inputs.options.slack)


def queue_modules(setting: Setting) -> dict[str, nn.Module]:
    """The queue of `--queue_batches` batches."""
    size = setting.options.queue_batches * setting.options.batch_size
    return {"queue": FeatureQueue(size, setting.dim)}


def push_to_queue(inputs: Inputs) -> None:
    """Put the step's features into the queue."""
    inputs.modules["queue"].push(inputs.unit["text"], inputs.unit["image"], inputs.pids_B)
