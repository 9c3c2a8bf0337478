import pytest
import torch
import torch.nn.functional as F

from datasets.tbagpr import ATTRIBUTES
from model.build import build_sentences
from model.losses.firm import (
    SentenceTable,
    match_logits,
    match_loss,
    predict_attributes,
)
from tests.helpers import ROOT, golden, options
from utils.attributes import read_attributes
from utils.errors import UserError

COUNTS = [[2, 1], [1, 3, 2]]  # two attributes of two and three classes, 9 sentences


def table(negatives="next"):
    return SentenceTable(COUNTS, torch.zeros(9, 4, dtype=torch.long), negatives)


def class_of(sentence):
    """(attribute, class) of a sentence."""
    classes = [
        (a, c) for a, counts in enumerate(COUNTS) for c, n in enumerate(counts) for _ in range(n)
    ]
    return classes[sentence]


@pytest.mark.parametrize("fusion", ["dot", "cat"])
def test_vectorised_matching_equals_the_loop_over_samples(fusion):
    torch.manual_seed(0)
    sentences, images = torch.randn(9, 6), torch.randn(5, 6)
    weight, bias = torch.randn(2, 6 if fusion == "dot" else 12), torch.randn(2)
    labels = torch.tensor([[0, 2], [1, 0], [1, 1], [0, 0], [1, 2]])
    positive, negative = table().sample(labels, torch.Generator().manual_seed(4))
    total = 0.0
    for index, target in ((positive, 1), (negative, 0)):
        for v in range(5):
            for a in range(2):
                s = sentences[index[v, a]]
                fused = s * images[v] if fusion == "dot" else torch.cat([s, images[v]])
                logits = weight @ fused + bias
                total += F.cross_entropy(logits[None], torch.tensor([target])) / 10
    logits = match_logits(sentences, images, weight, bias, fusion)
    torch.testing.assert_close(match_loss(logits, positive, negative), total)


@pytest.mark.parametrize("negatives", ["next", "random"])
def test_samples_are_of_the_right_class_and_cover_every_sentence(negatives):
    labels = torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat(200, 1)
    positive, negative = table(negatives).sample(labels, torch.Generator().manual_seed(0))
    other_classes = {}
    for v in range(len(labels)):
        for a in range(2):
            label = int(labels[v, a])
            assert class_of(positive[v, a]) == (a, label)
            attribute, other = class_of(negative[v, a])
            assert attribute == a and other != label
            other_classes.setdefault((a, label), set()).add(other)
    assert set(positive.flatten().tolist()) == set(range(9))
    assert other_classes[1, 0] == ({1} if negatives == "next" else {1, 2})
    assert other_classes[1, 2] == ({0} if negatives == "next" else {0, 1})


def test_random_negatives_are_uniform_over_the_other_classes():
    labels = torch.zeros(6000, 2, dtype=torch.long)
    _, negative = table("random").sample(labels, torch.Generator().manual_seed(0))
    other = torch.tensor([class_of(s)[1] for s in negative[:, 1].tolist()])
    assert (other == 1).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_the_generators_state_repeats_the_samples():
    labels = torch.zeros(50, 2, dtype=torch.long)
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    first = table("random").sample(labels, generator)
    again = table("random").sample(labels, generator.set_state(state))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_predicted_class_is_the_one_whose_sentences_match_best():
    logits = torch.zeros(1, 9, 2)
    logits[0, 2, 1] = 3.0  # attribute 0, class 1
    logits[0, 4, 1] = 9.0  # attribute 1, class 1: one of three sentences
    logits[0, 7:, 1] = 8.0  # attribute 1, class 2: both sentences, so the better mean
    assert predict_attributes(logits, table()).tolist() == [[1, 2]]


def test_the_shipped_sentences_are_those_of_the_paper():
    attributes = read_attributes(ROOT / "configs/attributes.yaml")
    expected = golden()["attribute_sentences"]
    assert [a.name for a in attributes] == list(ATTRIBUTES)
    assert [len(a.classes) for a in attributes] == expected["classes_per_attribute"]
    assert [len(a.classes) for a in attributes] == list(ATTRIBUTES.values())
    counts = [[len(s) for s in a.sentences] for a in attributes]
    assert counts == expected["sentences_per_class"]
    ids = build_sentences(options()).ids
    assert ids.shape == (expected["total"], expected["longest_tokens"])


def test_firm_attributes_selects_the_label_columns_of_those_attributes():
    """Two of seven attributes: positives are of the label's class, negatives of the next class."""
    args = options(firm_attributes=["altitude", "age"])
    attributes = {a.name: a for a in read_attributes(args.attributes_file)}
    sentences = build_sentences(args)
    classes = [(n, c) for n in args.firm_attributes
               for c, group in enumerate(attributes[n].sentences) for _ in group]  # fmt: skip
    assert len(classes) == len(sentences.ids)
    labels = torch.tensor([[0, 2, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1, 0]])
    positive, negative = sentences.sample(labels, torch.Generator().manual_seed(0))
    assert [[classes[s] for s in row] for row in positive.tolist()] == [
        [("altitude", 1), ("age", 2)], [("altitude", 0), ("age", 0)]
    ]  # fmt: skip
    assert [[classes[s] for s in row] for row in negative.tolist()] == [
        [("altitude", 0), ("age", 0)], [("altitude", 1), ("age", 1)]
    ]  # fmt: skip


def test_an_unknown_attribute_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="--firm_attributes hight: .* Did you mean 'height'"):
        build_sentences(options(firm_attributes=["hight"]))
