"""Averages of a model's weights: over the steps (`--ema`), and over epochs (`--average_last`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_swa_multi_avg_fn

from model.aeafirm import AEAFIRM
from utils.devices import at_least_float32


def averaged_tensors(model: AEAFIRM) -> dict[str, Tensor]:
    """What is averaged, by name: the trained weights, and the statistics of batch normalisation,
    which belong to them."""
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            tensors |= {f"{prefix}.{n}": b for n, b in module.named_buffers() if b.dim()}
    return tensors


def mean_of(epochs: list[int]) -> str:
    """What a mean of weights is, in words."""
    which = f"epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"
    return f"the mean of the weights after {which}"


class Average:
    """An average of a model's weights, in float32 (float64 for an fp64 model).

    Attributes:
        values: by the names of `averaged_tensors`.
    """

    def __init__(self, model: AEAFIRM) -> None:
        self.model = model
        self.values = {
            name: at_least_float32(tensor.detach()).clone()
            for name, tensor in averaged_tensors(model).items()
        }

    def load_values(self, values: dict[str, Tensor]) -> None:
        """Copy saved values. Raises ValueError for other names or shapes, and for NaN."""
        if values.keys() != self.values.keys():
            raise ValueError("its averages are of other weights")
        for name, value in values.items():
            if value.shape != self.values[name].shape or not value.isfinite().all():
                raise ValueError(f"its average of {name} has another shape, or is not finite")
            self.values[name].copy_(value)


class MovingAverage(Average):
    """The exponential moving average of the weights over the steps of a training.

    It starts with the weights at the start. torch's AveragedModel would wait for the device in
    every update, and does not know that a step was skipped.

    Args:
        decay: what the average keeps of itself in a step.
    """

    def __init__(self, model: AEAFIRM, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Add the weights after a step, unless it was `skipped` (a bool on the device). Never waits
        for the device."""
        weight = torch.where(skipped, 0.0, 1 - self.decay)
        for name, tensor in averaged_tensors(self.model).items():
            value = self.values[name]
            value.lerp_(tensor.to(value.dtype), weight.to(value.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        self.load_values(state["values"])


class EpochAverage(Average):
    """The mean of the weights after each of the last epochs of a training, on the CPU.

    Attributes:
        epochs: those in the mean so far.

    Args:
        last: how many.
        num_epoch: of the training.
    """

    def __init__(self, model: AEAFIRM, last: int, num_epoch: int) -> None:
        super().__init__(model)
        self.values = {name: value.cpu() for name, value in self.values.items()}
        self.first = num_epoch - last + 1
        self.epochs: list[int] = []

    def add(self, epoch: int) -> None:
        """Add the weights after an epoch, if it is one of the last."""
        if self.epochs and self.epochs[0] < self.first:
            self.epochs = []  # a resumed run may have more epochs than before
        if epoch >= self.first:
            tensors = averaged_tensors(self.model)
            current = [tensors[n].detach().to(v) for n, v in self.values.items()]
            get_swa_multi_avg_fn()(list(self.values.values()), current, len(self.epochs))
            self.epochs.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values if self.epochs else {}, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        if not all(type(epoch) is int for epoch in state["epochs"]):
            raise ValueError("the epochs of its average are not numbers")
        self.epochs = list(state["epochs"])
        if self.epochs:
            self.load_values(state["values"])
