"""What a loss is given: the features of one training step, and what its modules are built from.

Shapes: B samples of all processes, D joint space, S sentences, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn


@dataclass(frozen=True)
class Mean:
    """A mean whose terms belong to one process's samples: all processes' sums over all counts.

    What a loss of `Inputs.own` returns. Processes may have different numbers of terms, so a mean
    of means would be another value.
    """

    sum: Tensor
    count: int


@dataclass
class Inputs:
    """What one training step offers to the losses. Features are float32 and unnormalised.

    The first view is the aerial one (or the only one), the pair is the ground one.
    """

    text_BD: Tensor
    image_BD: Tensor
    pair_BD: Tensor | None  # None: one view
    pids_B: Tensor
    # `attributes` and `pair_attributes` [B, A], where there are any
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    sentence_SD: Tensor | None = None  # FIRM's sentences, if a loss needs them
    # tokens and masked captions of this process's samples alone
    own: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=dict)  # what the rows' `modules` have built
    options: EasyDict = field(default_factory=EasyDict)  # all options, by their names
    # for a loss that samples; saved in checkpoints
    generator: torch.Generator = field(default_factory=torch.Generator)
    logged: dict[str, Tensor] = field(default_factory=dict)
    unit: dict[str, Tensor] = field(init=False)  # normalised: `text`, `image` and perhaps `pair`

    def __post_init__(self) -> None:
        views = {"text": self.text_BD, "image": self.image_BD, "pair": self.pair_BD}
        self.unit = {k: F.normalize(v, dim=-1) for k, v in views.items() if v is not None}

    @property
    def scale(self) -> float:
        """1 / temperature, the factor of all similarities."""
        return 1 / self.options.temperature

    @property
    def views(self) -> list[Tensor]:
        """The image features of each view, [B, D]."""
        return [view for view in (self.image_BD, self.pair_BD) if view is not None]

    def over_pairs(self, loss: Callable[[Tensor, Tensor], Tensor], all_pairs: bool) -> Tensor:
        """Mean of a loss of two normalised features over the pairs of views.

        Text-image alone with one view; with two views also text-pair and, if `all_pairs`,
        image-pair.
        """
        names = [("text", "image")]
        if self.pair_BD is not None:
            names += [("text", "pair")] + [("image", "pair")] * all_pairs
        values = [loss(self.unit[a], self.unit[b]) for a, b in names]
        return reduce(add, values) / len(values)

    def log(self, name: str, value: Tensor) -> None:
        """Show a scalar beside the losses, in the log and in TensorBoard. It takes no part in the
        total. Name it after the loss: "match2/accuracy"."""
        self.logged[name] = value.detach()


class Setting(NamedTuple):
    """What a loss's modules are built from."""

    dim: int  # D
    vocab_size: int
    num_classes: int  # training identities
    loss_names: tuple[str, ...]  # all that are used
    options: EasyDict
    sentences: nn.Module | None  # FIRM's `SentenceTable`, if a loss needs it


def reduced(values: Tensor, reduction: str) -> Tensor:
    """PyTorch's `reduction` of a loss: "mean", or "none" for a value per sample."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values.mean() if reduction == "mean" else values
