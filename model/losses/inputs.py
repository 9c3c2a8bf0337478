"""What a loss gets: the features of one training step, and what it builds its modules from.

Shapes: B samples of all processes, D joint space, S sentences, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn

SAMPLES = "sample/"  # before the names of values of `before_epoch`, in a batch


@dataclass(frozen=True)
class PartialMean:
    """One process's part of a mean over all processes, which is the sum of `sum` / sum of `count`.

    A loss that reads `Inputs.local` returns this. Processes may have different numbers of terms,
    so a mean of the processes' means would be wrong.
    """

    sum: Tensor
    count: int


@dataclass(frozen=True)
class Encoded:
    """What an encoder gives for a batch of captions, or of images of one view.

    Row i depends on sample i only. Tokens are projected into the joint space: for images the class
    token and the patches, for captions all tokens up to the longest caption's end.
    """

    pooled_BD: Tensor  # unnormalised features
    tokens_BLD: Tensor
    # How much the pooled token attends to each token in the last block, the mean over heads; only
    # for a loss with `attention`, and without gradient.
    attention_BL: Tensor | None
    ids_BL: Tensor | None  # of captions; None for images
    modules: Mapping[str, Any]  # the losses' modules by their checkpoint names
    options: EasyDict

    def split(self, count: int) -> list[Encoded]:
        """Parts of `count` images each."""
        pooled, tokens = self.pooled_BD.split(count), self.tokens_BLD.split(count)
        attention = [None] * len(pooled) if self.attention_BL is None else (
            self.attention_BL.split(count)
        )  # fmt: skip
        return [
            replace(self, pooled_BD=p, tokens_BLD=t, attention_BL=a)
            for p, t, a in zip(pooled, tokens, attention, strict=True)
        ]


@dataclass
class Inputs:
    """What the losses of one training step read. Features are float32 and unnormalised.

    `image` is the aerial view (or the only view), `pair` is the ground view.
    """

    text_BD: Tensor
    image_BD: Tensor
    pair_BD: Tensor | None  # None: one view
    pids_B: Tensor
    # `attributes` and `pair_attributes` [B, A], if the data set has them
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    sentence_SD: Tensor | None = None  # FIRM's sentences, if a loss needs them
    # features [B, D] of more augmentations by name (`registry.Loss.images`), unnormalised
    images: Mapping[str, Tensor] = field(default_factory=dict)
    # what the losses' `outputs` gave, as "text/NAME", "image/NAME" and "pair/NAME"
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    # values of the samples [B] that a loss's `before_epoch` gave
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    # the batch and all outputs of the encoders, of this process's samples only
    local: Mapping[str, Tensor] = field(default_factory=dict)
    # the losses' modules by their checkpoint names (`registry.Loss.modules`)
    modules: Mapping[str, Any] = field(default_factory=dict)
    options: EasyDict = field(default_factory=EasyDict)  # all options by name
    learned_scale: Tensor | None = None  # 1 / temperature with --learn_temperature
    scale_is_used: bool = False  # whether a loss has asked for `scale`
    epochs: float = 0.0  # that are done: 1.5 in the middle of the second epoch
    # for losses that use random numbers; saved in checkpoints
    generator: torch.Generator = field(default_factory=torch.Generator)
    logged: dict[str, Tensor] = field(default_factory=dict)
    unit: dict[str, Tensor] = field(init=False)  # normalised `text`, `image` and, if any, `pair`

    def __post_init__(self) -> None:
        views = {"text": self.text_BD, "image": self.image_BD, "pair": self.pair_BD}
        self.unit = {k: F.normalize(v, dim=-1) for k, v in views.items() if v is not None}

    @property
    def scale(self) -> float | Tensor:
        """1 / temperature: losses multiply similarities by it."""
        self.scale_is_used = True
        if self.learned_scale is not None:
            return self.learned_scale
        return 1 / self.options.temperature

    @property
    def views(self) -> list[Tensor]:
        """The image features of each view, [B, D]."""
        return [view for view in (self.image_BD, self.pair_BD) if view is not None]

    def mean_over_pairs(self, loss: Callable[[Tensor, Tensor], Tensor], all_pairs: bool) -> Tensor:
        """Mean of `loss(a, b)` over pairs of normalised features [B, D].

        The pairs are text-image; with two views also text-pair and, if `all_pairs`, image-pair.
        """
        pairs = [("text", "image")]
        if self.pair_BD is not None:
            pairs += [("text", "pair")] + [("image", "pair")] * all_pairs
        losses = [loss(self.unit[a], self.unit[b]) for a, b in pairs]
        return add_losses(losses) / len(losses)

    def log(self, name: str, value: Tensor) -> None:
        """Show a scalar next to the losses in the log and in TensorBoard.

        It is not part of the total. Name it after the loss: "match2/accuracy".
        """
        self.logged[name] = checked_scalar(value, name).detach()


@dataclass(frozen=True)
class BeforeEpoch:
    """What a loss's `before_epoch` gets.

    Attributes:
        epoch: that begins, from 0.
        options: all options by name.
        seed: of this epoch, for random numbers: the same in a run that is resumed.
        evaluate: computes values of every training sample. It takes a function of `Inputs` that
            gives values [B] of a batch by name, calls it for batches of `--batch_size` random
            samples, in evaluation mode and without gradients, and returns the values [N] in the
            order of the samples, float32 on the CPU. `Inputs.images` and `sentence_SD` are there
            only if the loss's own row needs them.
        noisy_N: which samples `--noise_rate` gave another caption, bool; for the log alone. None
            without that option.
        say: writes a line to the log.
    """

    epoch: int
    options: EasyDict
    seed: int
    evaluate: Callable[[Callable[[Inputs], dict[str, Tensor]]], dict[str, Tensor]]
    say: Callable[[str], None]
    noisy_N: Tensor | None = None


class ModuleConfig(NamedTuple):
    """What a loss builds its modules from."""

    dim: int  # D
    vocab_size: int
    num_classes: int  # training identities
    loss_names: tuple[str, ...]  # all losses of the run
    options: EasyDict
    sentences: nn.Module | None  # FIRM's `SentenceTable`, if a loss needs it


def checked_scalar(value: Any, name: str) -> Tensor:
    """A loss, or a value to log. Raises TypeError unless it is a tensor without dimensions."""
    if not isinstance(value, Tensor) or value.dim():
        got = (
            f"tensor of shape {list(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise TypeError(f"'{name}' is a {got}; expected a scalar tensor")
    return value


def add_losses(losses: Iterable[Tensor]) -> Tensor:
    """The sum of at least one loss."""
    first, *others = losses
    return sum(others, start=first)  # without `start`, `sum` begins with the integer 0


def apply_reduction(values: Tensor, reduction: str) -> Tensor:
    """PyTorch's `reduction` of a loss: "mean", or "none" for a value per sample."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values.mean() if reduction == "mean" else values
