"""FIRM, fine-grained representation mining: do an image and an attribute sentence match?

Shapes: V images (both views of a batch), A attributes, C classes of the attribute that has most,
S sentences of all attributes, D joint space. `labels_VA` has the class of each attribute of each
image.

For each image and attribute, the positive is a sentence of the true class, and the negative is a
sentence of another class. A linear head with two outputs decides between match and no match.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, ModuleConfig, apply_reduction
from utils.devices import at_least_float32

AT_TEST = "atr_matching_head.weight"  # a checkpoint with FIRM's head has it


class SentenceTable(nn.Module):
    """The tokens of all sentences, and which sentences belong to each class.

    Args:
        counts: the number of sentences of each class, for each attribute.
        ids_SL: token ids of all sentences, attribute by attribute and class by class.
        negatives: the class of the negative, "next" ((class + 1) mod n) or "random" (any other).
        columns: the label column of each attribute; None: column i for attribute i.
    """

    ids: Tensor  # [S, L]
    first: Tensor  # [A, C]: index of each class's first sentence
    count: Tensor  # [A, C]: number of each class's sentences
    classes: Tensor  # [A]: number of classes
    columns: Tensor  # [A]

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        ids_SL: Tensor,
        negatives: str = "next",
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        total = sum(map(sum, counts))
        if total != len(ids_SL):
            raise ValueError(f"`counts` has {total} sentences, `ids_SL` has {len(ids_SL)}")
        self.negatives = negatives
        classes = [len(class_counts) for class_counts in counts]
        first, count, start = [], [], 0
        for class_counts in counts:
            starts = []
            for n in class_counts:
                starts.append(start)
                start += n
            padding = [0] * (max(classes) - len(class_counts))
            first.append(starts + padding)
            count.append([*class_counts, *padding])
        columns = range(len(counts)) if columns is None else columns
        # Not persistent: the sentences come from configs/, not from a checkpoint.
        for name, value in (
            ("ids", ids_SL), ("first", first), ("count", count), ("classes", classes),
            ("columns", list(columns)),
        ):  # fmt: skip
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def sample(self, labels_VA: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices [V, A] of a positive and of a negative sentence, uniform within their class.

        `labels_VA` has all label columns of the data set; the table selects its `columns`.
        """
        labels_VA = labels_VA[:, self.columns]
        # Pinned memory: a copy to the GPU from other memory would block.
        pin = labels_VA.is_cuda and generator.device.type == "cpu"
        shape = (3, *labels_VA.shape)
        u = torch.rand(shape, generator=generator, device=generator.device, pin_memory=pin)
        u = u.to(labels_VA.device, non_blocking=True)
        offset_VA = torch.ones_like(labels_VA)
        if self.negatives == "random":  # 1 to n - 1: each other class is equally likely
            offset_VA += (u[2] * (self.classes - 1)).long()
        other_VA = (labels_VA + offset_VA) % self.classes
        return self._pick_sentences(labels_VA, u[0]), self._pick_sentences(other_VA, u[1])

    def class_scores(self, scores_VS: Tensor) -> list[Tensor]:
        """Mean score of each class's sentences: for each attribute a tensor [V, classes]."""
        return [
            torch.stack(
                [
                    scores_VS[:, f : f + c].mean(dim=1)
                    for f, c in zip(first[:n], count[:n], strict=True)
                ],
                dim=1,
            )
            for first, count, n in zip(
                self.first.tolist(), self.count.tolist(), self.classes.tolist(), strict=True
            )
        ]

    def _pick_sentences(self, class_VA: Tensor, u_VA: Tensor) -> Tensor:
        """The sentence [V, A] of each class that a number from [0, 1) selects."""
        attributes_A = torch.arange(len(self.classes), device=class_VA.device)
        first_VA, count_VA = self.first[attributes_A, class_VA], self.count[attributes_A, class_VA]
        return first_VA + (u_VA * count_VA).long()


class MatchingHead(nn.Linear):
    """The linear head with two outputs, no match and match.

    Args:
        dim: D.
        fusion: the head's input: "dot", the product of sentence and image, or "cat", their
            concatenation.
    """

    def __init__(self, dim: int, fusion: str) -> None:
        super().__init__(dim if fusion == "dot" else 2 * dim, 2)
        self.fusion = fusion

    # A Linear only for its weights: their names, shapes and initial values.
    def forward(self, sentence_SD: Tensor, image_VD: Tensor) -> Tensor:  # type: ignore[override]
        """Both outputs for each image and sentence, [V, S, 2], at least float32."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return match_logits(sentence_SD, image_VD, weight, bias, self.fusion)


def match_logits(
    sentence_SD: Tensor, image_VD: Tensor, weight: Tensor, bias: Tensor, fusion: str
) -> Tensor:
    """The head's two outputs for each image and sentence, [V, S, 2], from unnormalised features.

    The head is linear, so it needs no tensor of all fused pairs. For the product (`dot`, weight
    [2, D]), one matrix product with the sentences scaled by the weights is enough. For the
    concatenation of sentence and image (`cat`, weight [2, 2D]), each half has its own product.
    """
    if fusion == "dot":
        scaled_SKD = sentence_SD[:, None] * weight
        flat = image_VD @ scaled_SKD.flatten(0, 1).T
        return flat.unflatten(1, (len(sentence_SD), 2)) + bias
    for_sentence, for_image = weight.chunk(2, dim=1)
    return (image_VD @ for_image.T)[:, None] + (sentence_SD @ for_sentence.T)[None] + bias


def match_loss(
    logits_VS2: Tensor, positive_VA: Tensor, negative_VA: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the positives with label 1 plus that of the negatives with label 0.

    Returns the sum of their means over [V, A], or values [V, A] with `reduction="none"`.
    """

    def cross_entropy(index_VA: Tensor, label: int) -> Tensor:
        chosen = logits_VS2.gather(1, index_VA[..., None].expand(-1, -1, 2))
        return apply_reduction(-chosen.log_softmax(dim=-1)[..., label], reduction)

    return cross_entropy(positive_VA, 1) + cross_entropy(negative_VA, 0)


def predict_attributes(logits_VS2: Tensor, table: SentenceTable) -> Tensor:
    """The class of each attribute, [V, A], whose sentences match best on average."""
    match_VS = F.log_softmax(logits_VS2, dim=-1)[..., 1]
    return torch.stack([s.argmax(dim=1) for s in table.class_scores(match_VS)], dim=1)


def match2(inputs: Inputs) -> Tensor:
    """FIRM: the matching loss over the images of both views."""
    image_VD, labels_VA = inputs.image_BD, inputs.labels["attributes"]
    if inputs.pair_BD is not None:
        image_VD = torch.cat([image_VD, inputs.pair_BD])
        labels_VA = torch.cat([labels_VA, inputs.labels["pair_attributes"]])
    logits_VS2 = inputs.modules["atr_matching_head"](inputs.sentence_SD, image_VD)
    sampled = inputs.modules["sentences"].sample(labels_VA, inputs.generator)
    return match_loss(logits_VS2, *sampled)


def match2_modules(config: ModuleConfig) -> dict[str, nn.Module]:
    """The sentence table and the matching head."""
    if config.sentences is None:
        raise ValueError("match2 needs a sentence table")
    fusion = "dot" if "dot" in config.loss_names else "cat"
    head = MatchingHead(config.dim, fusion)
    return {"sentences": config.sentences, "atr_matching_head": head}
