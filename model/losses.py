"""The table of losses: what each computes, what it needs, and what `--loss_names` may combine.

To add a loss: write it as a pure function (`objectives.py`), add one row to LOSSES, add one test.
Validation, error messages and the README's table read the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import objectives
from model.aea import FeatureQueue, aea_loss, elastic_kl, soft_cross_entropy
from model.firm import match_loss
from utils.errors import UserError, suggest


@dataclass
class Step:
    """What one training step offers to the losses. Features are float32 and unnormalised.

    Shapes: B samples, D joint space, S sentences, A attributes.
    The first view is the aerial one (or the only one), the pair is the ground one.
    """

    text_BD: Tensor
    image_BD: Tensor
    pair_BD: Tensor | None  # None: one view
    pids_B: Tensor
    scale: float  # 1 / temperature
    heads: nn.Module  # the model, for its classifier and its matching head
    labels: dict[str, Tensor]  # `attributes` and `pair_attributes` [B, A], where there are any
    sentence_SD: Tensor | None = None  # FIRM's sentences
    masked_loss: Tensor | None = None  # cross-entropy of the masked tokens
    queue: FeatureQueue | None = None
    slack: float = 0.15
    unit: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        views = {"text": self.text_BD, "image": self.image_BD, "pair": self.pair_BD}
        self.unit = {k: F.normalize(v, dim=-1) for k, v in views.items() if v is not None}

    def over_pairs(self, loss: Callable[[Tensor, Tensor], Tensor], all_pairs: bool) -> Tensor:
        """Mean of a loss of two normalised features over the pairs of views.

        Text-image alone with one view; with two views also text-pair and, if `all_pairs`,
        image-pair.
        """
        names = [("text", "image")]
        if self.pair_BD is not None:
            names += [("text", "pair")] + [("image", "pair")] * all_pairs
        values = [loss(self.unit[a], self.unit[b]) for a, b in names]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Loss:
    """A row of the table. Words that only modify another loss compute nothing themselves."""

    meaning: str
    compute: Callable[[Step], Tensor] | None = None
    pairs: bool = False  # needs an aerial and a ground image per sample
    attributes: bool = False  # needs attribute labels
    masked: bool = False  # needs --MLM
    any_of: tuple[str, ...] = ()  # needs at least one of these
    one_of: tuple[str, ...] = ()  # needs exactly one of these


def _sdm(step: Step, all_pairs: bool) -> Tensor:
    return step.over_pairs(lambda a, b: objectives.sdm(a, b, step.pids_B, step.scale), all_pairs)


def _itc(step: Step, all_pairs: bool) -> Tensor:
    return step.over_pairs(lambda a, b: objectives.itc(a, b, step.scale), all_pairs)


def _cmpm(step: Step) -> Tensor:
    views = [v for v in (step.image_BD, step.pair_BD) if v is not None]
    return sum(objectives.cmpm(v, step.text_BD, step.pids_B) for v in views) / len(views)


def _aea(step: Step, form: Callable[..., Tensor]) -> Tensor:
    features = (step.unit["text"], step.unit["image"], step.unit["pair"])
    return aea_loss(form, *features, step.pids_B, step.scale, step.queue, step.slack)


def _id(step: Step) -> Tensor:
    """Halved cross-entropies of image and text (IRRA); with two views also of ground and text."""
    views = [v for v in (step.image_BD, step.pair_BD) if v is not None]
    text, *images = (
        F.cross_entropy(step.heads.classify(v), step.pids_B) for v in (step.text_BD, *views)
    )
    return sum(text + image for image in images) / 2


def _mlm(step: Step) -> Tensor:
    """Cross-entropy of the masked words. With two views they attend to the tokens of both images,
    one sequence after the other, since either may show what the word says."""
    return step.masked_loss


def _match(step: Step) -> Tensor:
    images_VD, labels_VA = step.image_BD, step.labels["attributes"]
    if step.pair_BD is not None:
        images_VD = torch.cat([images_VD, step.pair_BD])
        labels_VA = torch.cat([labels_VA, step.labels["pair_attributes"]])
    logits_VS2 = step.heads.match(step.sentence_SD, images_VD)
    return match_loss(logits_VS2, *step.heads.sentences.draw(labels_VA, step.heads.generator))


LOSSES: dict[str, Loss] = {
    "supkl": Loss("AEA, the paper's alignment over both views", lambda s: _aea(s, elastic_kl), pairs=True),  # noqa: E501
    "supitc": Loss("AEA's targets with cross-entropy instead of KL", lambda s: _aea(s, soft_cross_entropy) / 2, pairs=True),  # noqa: E501
    "queue": Loss("adds past features to AEA's keys", any_of=("supkl", "supitc")),
    "match2": Loss("FIRM, attribute sentence-image matching", _match, attributes=True, one_of=("dot", "cat")),  # noqa: E501
    "dot": Loss("match2 on the product of sentence and image", any_of=("match2",)),
    "cat": Loss("match2 on their concatenation", any_of=("match2",)),
    "sdm": Loss("similarity distribution matching; mean of all pairs of views", lambda s: _sdm(s, True)),  # noqa: E501
    "bisdm": Loss("sdm of text-aerial and text-ground", lambda s: _sdm(s, False), pairs=True),
    "itc": Loss("InfoNCE; mean of all pairs of views", lambda s: _itc(s, True)),
    "biitc": Loss("itc of text-aerial and text-ground", lambda s: _itc(s, False), pairs=True),
    "cmpm": Loss("cross-modal projection matching", _cmpm),
    "id": Loss("identity classification of every feature", _id),
    "mlm": Loss("masked language modelling from the image tokens of all views", _mlm, masked=True),
}  # fmt: skip


def parse_loss_names(text: str, masked: bool) -> list[str]:
    """Split `--loss_names` and check it against the table.

    Args:
        masked: whether masked captions are made (`--MLM`).

    Raises UserError with the reason for anything that could not work.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in LOSSES:
            raise UserError(
                f"--loss_names {text}: unknown loss '{name}'.{suggest(name, LOSSES)} "
                f"Known: {', '.join(LOSSES)}"
            )
        if names.count(name) > 1:
            raise UserError(f"--loss_names {text}: '{name}' stands there twice")
    for name in names:
        row = LOSSES[name]
        if row.any_of and not set(row.any_of) & set(names):
            raise UserError(
                f"--loss_names {text}: '{name}' needs {' or '.join(row.any_of)} beside it"
            )
        if row.one_of and len(set(row.one_of) & set(names)) != 1:
            raise UserError(
                f"--loss_names {text}: '{name}' needs exactly one of {', '.join(row.one_of)}"
            )
        if row.masked and not masked:
            raise UserError(f"--loss_names {text}: '{name}' needs masked captions: add --MLM")
    return names


def check_losses(names: Sequence[str], dataset: str, pairs: bool, attributes: bool) -> None:
    """Raise UserError with the reason if a loss needs what the data set lacks.

    Args:
        dataset: its name, for messages.
        pairs, attributes: whether its samples have both views, and attribute labels.
    """
    single = [name for name, row in LOSSES.items() if row.compute and not row.pairs]
    for name in names:
        if LOSSES[name].pairs and not pairs:
            raise UserError(
                f"--loss_names: '{name}' needs an aerial and a ground image per caption; "
                f"the samples of {dataset} have one image. For one view: {', '.join(single)}"
            )
        if LOSSES[name].attributes and not attributes:
            raise UserError(
                f"--loss_names: '{name}' needs attribute labels; {dataset} comes without them here "
                "(AGDataAttr has them, and a custom data set may)"
            )


def losses_table() -> str:
    """The table of losses in Markdown, for the README."""
    lines = ["| name | what it is | needs |", "|---|---|---|"]
    for name, row in LOSSES.items():
        needs = (
            ["both views"] * row.pairs + ["attributes"] * row.attributes + ["`--MLM`"] * row.masked
        )
        needs += [" or ".join(f"`{n}`" for n in row.any_of)] if row.any_of else []
        needs += ["one of " + ", ".join(f"`{n}`" for n in row.one_of)] if row.one_of else []
        lines.append(f"| `{name}` | {row.meaning} | {', '.join(needs)} |")
    return "\n".join(lines)
