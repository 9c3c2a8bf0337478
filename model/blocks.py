"""Transformer blocks that compute what open_clip's compute, with fewer kernels and less memory.

Weights keep their names. Shapes: B samples, L tokens, H heads, E width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip import transformer as clip
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP.

    Its backward pass needs `x` only. open_clip's form keeps two tensors for it, and these are the
    largest of a block.
    """

    def forward(self, x: Tensor) -> Tensor:
        # torch does not type `apply`; it returns what `forward` returns.
        return _QuickGELU.apply(x)  # type: ignore[no-untyped-call]


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # The function is silu(y) / 1.702 with y = 1.702 x, so its derivative is that of silu at y.
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


class SelfAttention(nn.MultiheadAttention):
    """Multi-head attention of a sequence to itself.

    torch's class copies queries, keys and values apart, and its backward pass makes a zero tensor
    of all three for each of them. Here they stay parts of one tensor.
    """

    def forward(  # type: ignore[override]  # the arguments that open_clip's block gives
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of `query` [B, L, E] to itself, [B, L, E]. `key` and `value` are not used."""
        parts = (
            self.project(query)
            .unflatten(-1, (3, self.num_heads, self.head_dim))
            .permute(2, 0, 3, 1, 4)
        )
        q_BHLE, k_BHLE, v_BHLE = parts.unbind(0)
        mixed_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask)
        return self.out_proj(mixed_BHLE.transpose(1, 2).flatten(2)), None

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of `x` [B, L, E], packed, [B, L, 3 E]."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


def use_lean_blocks(transformer: clip.Transformer) -> None:
    """Replace attention and activation of open_clip's blocks in place; weights stay the same."""
    for block in transformer.resblocks:
        block.attn.__class__ = SelfAttention
        if isinstance(block.mlp.gelu, clip.QuickGELU):
            block.mlp.gelu = QuickGELU()
