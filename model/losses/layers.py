"""Layers that the heads of several losses are made of.

Shapes: B samples, K tokens, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.devices import at_least_float32


class Float32Linear(nn.Linear):
    """A linear layer that computes in at least float32.

    Losses are computed in float32, but `--precision half` keeps the weights in fp16.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            at_least_float32(x), at_least_float32(self.weight), at_least_float32(self.bias)
        )


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens [B, K, D] with the statistics of the valid ones.

    nn.BatchNorm1d would count the empty slots too, and leaving them out would make the host wait
    for the device, which alone knows how many there are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    # The base class has weights, buffers and their initial values; only its input differs.
    def forward(self, x_BKD: Tensor, valid_BK: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised tokens [B, K, D]. In training mode it updates the running statistics."""
        mean_D, var_D = self.running_mean, self.running_var
        if self.training:
            valid_BK1 = valid_BK[..., None].to(x_BKD.dtype)
            count = valid_BK1.sum().clamp(min=1)
            mean_D = (x_BKD * valid_BK1).sum(dim=(0, 1)) / count
            var_D = ((x_BKD - mean_D).square() * valid_BK1).sum(dim=(0, 1)) / count
            with torch.no_grad():
                unbiased_D = var_D * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean_D, self.momentum)
                self.running_var.lerp_(unbiased_D, self.momentum)
                self.num_batches_tracked += 1
        return (x_BKD - mean_D) * (var_D + self.eps).rsqrt() * self.weight + self.bias
