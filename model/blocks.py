"""Transformer blocks that compute what open_clip's compute, with fewer kernels and less memory.

Weights keep their names. Shapes: B samples, L tokens, H heads, E width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip import transformer as clip
from torch import Tensor, nn

from utils.devices import at_least_float32


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

    @torch.no_grad()
    def of_token(self, x_BLE: Tensor, at_B: Tensor, causal: bool = False) -> Tensor:
        """How much one token of each sequence attends to all, [B, L]: the mean over heads.

        It is one row of the matrix of each head; the matrices are never made.

        Args:
            x_BLE: what the attention gets.
            at_B: the places of the tokens.
            causal: a token does not see those after it.
        """
        # Not `len`, which an export would take for a constant.
        each_B = torch.arange(x_BLE.shape[0], device=x_BLE.device)
        q_EE, k_EE, _ = self.in_proj_weight.chunk(3)
        q_E, k_E, _ = self.in_proj_bias.chunk(3)
        heads = (self.num_heads, self.head_dim)
        q_BHE = F.linear(x_BLE[each_B, at_B], q_EE, q_E).unflatten(-1, heads)
        k_BLHE = F.linear(x_BLE, k_EE, k_E).unflatten(-1, heads)
        logits_BHL = at_least_float32(torch.einsum("bhe,blhe->bhl", q_BHE, k_BLHE))
        if causal:
            later_BL = torch.arange(x_BLE.shape[1], device=x_BLE.device) > at_B[:, None]
            logits_BHL = logits_BHL.masked_fill(later_BL[:, None], -torch.inf)
        return (logits_BHL * self.head_dim**-0.5).softmax(dim=-1).mean(dim=1)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of `x` [B, L, E], packed, [B, L, 3 E]."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


def use_lean_blocks(transformer: clip.Transformer) -> None:
    """Replace attention and activation of open_clip's blocks in place; weights stay the same."""
    for block in transformer.resblocks:
        block.attn.__class__ = SelfAttention
        if isinstance(block.mlp.gelu, clip.QuickGELU):
            block.mlp.gelu = QuickGELU()
