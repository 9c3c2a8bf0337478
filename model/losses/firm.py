"""FIRM, fine-grained representation mining: do an image and an attribute sentence match?

Shapes: V images (both views of a batch), A attributes, S sentences of all attributes, D joint
space. `labels_VA` holds the class of every attribute of every image.

For each image and attribute one sentence of its true class is the positive and one sentence of
another class the negative; a linear head with two outputs decides match or no match.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.inputs import Inputs, Setting, reduced
from utils.devices import at_least_float32


class SentenceTable(nn.Module):
    """The sentences' tokens and where each class's sentences lie among them.

    Args:
        classes: for each attribute, for each class, how many sentences it has.
        ids_SL: token ids of all sentences, attribute by attribute and class by class.
        negatives: the negative's class, "next" ((class + 1) mod n) or "random" (any other).
        columns: which columns of the labels the attributes are; left out: all, in order.
    """

    ids: Tensor  # [S, L]
    first: Tensor  # [A, classes]: the first of each class's sentences
    count: Tensor  # [A, classes]: how many there are
    classes: Tensor  # [A]: number of classes
    columns: Tensor  # [A]

    def __init__(
        self,
        classes: Sequence[Sequence[int]],
        ids_SL: Tensor,
        negatives: str = "next",
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        total = sum(map(sum, classes))
        if total != len(ids_SL):
            raise ValueError(f"{total} sentences are counted, {len(ids_SL)} given")
        self.negatives = negatives
        most = max(map(len, classes))
        first, count, start = [], [], 0
        for counts in classes:
            starts = []
            for n in counts:
                starts.append(start)
                start += n
            padding = [0] * (most - len(counts))
            first.append(starts + padding)
            count.append([*counts, *padding])
        # Not persistent: the sentences come from configs/, not from a checkpoint.
        columns = range(len(classes)) if columns is None else columns
        sizes = [len(c) for c in classes]
        for name, value in (
            ("ids", ids_SL), ("first", first), ("count", count), ("classes", sizes),
            ("columns", list(columns)),
        ):  # fmt: skip
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def sample(self, labels_VA: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices [V, A] of a positive and of a negative sentence, uniform within their class.

        Labels are those of the data set, of which the table's `columns` are taken.
        """
        labels_VA = labels_VA[:, self.columns]
        shape, cuda = (3, *labels_VA.shape), labels_VA.is_cuda and generator.device.type == "cpu"
        u = torch.rand(shape, generator=generator, device=generator.device, pin_memory=cuda)
        u = u.to(labels_VA.device, non_blocking=True)  # from other memory, this would wait
        step_VA = torch.ones_like(labels_VA)
        if self.negatives == "random":  # 1 to n-1 steps: any class but the own, equally likely
            step_VA += (u[2] * (self.classes - 1)).long()
        other_VA = (labels_VA + step_VA) % self.classes
        return self._pick(labels_VA, u[0]), self._pick(other_VA, u[1])

    def _pick(self, class_VA: Tensor, u_VA: Tensor) -> Tensor:
        columns = torch.arange(len(self.classes), device=class_VA.device)
        first_VA, count_VA = self.first[columns, class_VA], self.count[columns, class_VA]
        return first_VA + (u_VA * count_VA).long()

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


class MatchingHead(nn.Linear):
    """The linear head with two outputs, no match and match.

    Args:
        dim: D.
        fusion: of sentence and image: "dot", their product, or "cat", their concatenation.
    """

    def __init__(self, dim: int, fusion: str) -> None:
        super().__init__(dim if fusion == "dot" else 2 * dim, 2)
        self.fusion = fusion

    # A Linear for its weights alone: their names, shapes and initial values.
    def forward(self, sentence_SD: Tensor, image_VD: Tensor) -> Tensor:  # type: ignore[override]
        """Both outputs for every image and sentence, [V, S, 2], at least float32."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return match_logits(sentence_SD, image_VD, weight, bias, self.fusion)


def match_logits(
    sentence_SD: Tensor, image_VD: Tensor, weight: Tensor, bias: Tensor, fusion: str
) -> Tensor:
    """The head's two outputs for every image with every sentence, [V, S, 2], without fused pairs.

    Features are unnormalised. The head is linear, so the elementwise product (`dot`, weight
    [2, D]) needs one matrix product with the sentences scaled by the weights, and the
    concatenation sentence-image (`cat`, weight [2, 2D]) one product for each half.
    """
    if fusion == "dot":
        scaled_SKD = sentence_SD[:, None] * weight
        flat = image_VD @ scaled_SKD.flatten(0, 1).T
        return flat.view(len(image_VD), len(sentence_SD), 2) + bias
    for_sentence, for_image = weight.chunk(2, dim=1)
    return (image_VD @ for_image.T)[:, None] + (sentence_SD @ for_sentence.T)[None] + bias


def match_loss(
    logits_VS2: Tensor, positive_VA: Tensor, negative_VA: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of positives to 1 plus of negatives to 0, each a mean over [V, A].

    Returns a scalar, or [V, A] with `reduction="none"`.
    """

    def cross_entropy(index_VA: Tensor, label: int) -> Tensor:
        chosen = logits_VS2.gather(1, index_VA[..., None].expand(-1, -1, 2))
        return reduced(-chosen.log_softmax(dim=-1)[..., label], reduction)

    return cross_entropy(positive_VA, 1) + cross_entropy(negative_VA, 0)


def predict_attributes(logits_VS2: Tensor, table: SentenceTable) -> Tensor:
    """Class of each attribute, [V, A]: the one whose sentences match best on average."""
    match_VS = F.log_softmax(logits_VS2, dim=-1)[..., 1]
    return torch.stack([s.argmax(dim=1) for s in table.class_scores(match_VS)], dim=1)


def match2(inputs: Inputs) -> Tensor:
    """FIRM: the matching loss of the images of both views."""
    image_VD, labels_VA = inputs.image_BD, inputs.labels["attributes"]
    if inputs.pair_BD is not None:
        image_VD = torch.cat([image_VD, inputs.pair_BD])
        labels_VA = torch.cat([labels_VA, inputs.labels["pair_attributes"]])
    logits_VS2 = inputs.modules["atr_matching_head"](inputs.sentence_SD, image_VD)
    sampled = inputs.modules["sentences"].sample(labels_VA, inputs.generator)
    return match_loss(logits_VS2, *sampled)


def match2_modules(setting: Setting) -> dict[str, nn.Module]:
    """The sentence table and the matching head."""
    if setting.sentences is None:
        raise ValueError("match2 needs a sentence table")
    fusion = "dot" if "dot" in setting.loss_names else "cat"
    head = MatchingHead(setting.dim, fusion)
    return {"sentences": setting.sentences, "atr_matching_head": head}
