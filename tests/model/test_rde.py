import pytest
import torch
import torch.nn.functional as F

from model.losses.inputs import Inputs
from model.losses.rde import (
    TokenEmbedding,
    select_tokens,
    selection_size,
    tal,
    tal_of_views,
    trl,
    trl_of_views,
    word_mask,
)
from tests.helpers import baseline_features, baselines, filled, noise, options

PIDS = torch.tensor([0, 1, 0, 2, 3, 1])
LOSSES = [tal, trl]


def features(count=6, seed=0):
    """Normalised captions and images."""
    return F.normalize(
        torch.randn(2, count, 8, generator=torch.Generator().manual_seed(seed)), dim=2
    )


@pytest.mark.parametrize(("name", "loss"), [("tal", tal), ("trl", trl)])
def test_both_losses_equal_the_original(name, loss):
    expected = baselines()[name]
    values = loss(
        *baseline_features("text", "aerial"),
        torch.tensor(baselines()["pids"]),
        expected["tau"],
        expected["margin"],
        "none",
    )
    torch.testing.assert_close(values, torch.tensor(expected["per_sample"]), rtol=1e-5, atol=0)


def test_tal_of_pairs_that_are_near_is_zero_as_in_the_original():
    text, aerial = noise((6, 64), 0), noise((6, 64), 1)
    near = F.normalize(text, dim=1), F.normalize(aerial + 2 * text, dim=1)
    assert tal(*near, PIDS, reduction="none").tolist() == baselines()["tal_near"]["per_sample"]


def slow(text, image, pids, temperature, margin, hardest):
    """The loss of each sample, one cosine after the other."""
    values = []
    for i in range(len(pids)):
        value = 0
        for anchor, others in ((text[i], image), (image[i], text)):
            cosines = [F.cosine_similarity(anchor, o, dim=0) for o in others]
            own = torch.stack([c for c, pid in zip(cosines, pids, strict=True) if pid == pids[i]])
            weights = (own / temperature).exp() / (own / temperature).exp().sum()
            negatives = [c for c, pid in zip(cosines, pids, strict=True) if pid != pids[i]]
            if hardest:
                negative = max([torch.tensor(0.0), *negatives])
            else:
                negative = temperature * sum((c / temperature).exp() for c in negatives).log()
            value += max(torch.tensor(0.0), negative - (weights * own).sum() + margin)
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_both_losses_are_what_their_definition_says_sample_by_sample(loss, temperature):
    expected = slow(*features(), PIDS, temperature, 0.3, hardest=loss is trl)
    assert len(expected.unique()) > 3  # not all 0
    values = loss(*features(), PIDS, temperature, 0.3, reduction="none")
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(loss(*features(), PIDS, temperature, 0.3), expected.mean())


def test_tal_with_a_tiny_temperature_does_not_overflow():
    """Here the sum of exponentials is not a float32; the limit is the hardest negative."""
    text, image = features()
    torch.testing.assert_close(
        tal(text, image, PIDS, 1e-4, 0.9), trl(text, image, PIDS, 1e-4, 0.9), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_identity_has_a_finite_loss_and_gradient(loss):
    text, image = features().unbind()
    text = text.requires_grad_()
    value = loss(text, image, torch.zeros(6), margin=0.1)
    value.backward()
    assert value.isfinite() and text.grad.isfinite().all()
    assert loss is trl or value == 0


def test_the_weights_of_the_positives_get_no_gradient():
    text, image = features()
    expected, loss = (text.clone().requires_grad_() for _ in range(2))
    same = PIDS[:, None] == PIDS
    cosine = expected @ image.T
    total = 0
    for c in (cosine, cosine.T):
        weights = (c.detach() / 0.5).masked_fill(~same, -torch.inf).softmax(1)
        negative = 0.5 * (c / 0.5).masked_fill(same, -torch.inf).logsumexp(1)
        total += (2 + negative - (weights * c).sum(1)).mean()
    total.backward()
    tal(loss, image, PIDS, 0.5, 2.0).backward()
    torch.testing.assert_close(loss.grad, expected.grad)


@pytest.mark.parametrize(("of_views", "loss"), [(tal_of_views, tal), (trl_of_views, trl)])
def test_the_loss_of_a_batch_is_the_sum_over_its_clean_samples_and_the_mean_of_the_views(
    of_views, loss
):
    text, image = features()
    pair = features(seed=1)[0]
    clean = torch.tensor([1.0, 0, 1, 1, 0, 1])
    args = options(tal_margin=0.4, tal_temperature=0.1)
    values = torch.stack([loss(text, v, PIDS, 0.1, 0.4, "none") for v in (image, pair)])
    everything = Inputs(text, image, pair, PIDS, options=args)
    torch.testing.assert_close(of_views(everything), values.sum() / 2)
    some = Inputs(text, image, pair, PIDS, samples={"clean": clean}, options=args)
    torch.testing.assert_close(of_views(some), (values * clean).sum() / 2)
    one_view = Inputs(text, image, None, PIDS, samples={"clean": clean}, options=args)
    torch.testing.assert_close(of_views(one_view), (values[0] * clean).sum())


# Token selection embedding

GOLDEN = baselines()["tse"]
IDS = torch.tensor(GOLDEN["caption_ids"])
NAMES = {
    "linear": "linear", "fc": "linear", "mlp.layers.0": "hidden", "mlp.bns.0": "norm",
    "mlp.layers.1": "out",
}  # fmt: skip


def golden_module(kind):
    """With the original's weights. `mlp.bns.1`, and of images `linear`, take no part there."""
    module = TokenEmbedding(64, GOLDEN["embed"])
    for name, value in filled(GOLDEN[f"{kind}_shapes"]).items():
        part, _, parameter = name.rpartition(".")
        if part in NAMES and not (part == "linear" and kind == "image"):
            getattr(getattr(module, NAMES[part]), parameter).data = value
    return module


def golden_image():
    tokens, attention = noise((6, 33, 64), 11)[:, 1:], (noise((6, 33, 33), 13)[:, 0, 1:] + 1) / 2
    selected, valid = select_tokens(tokens, attention, selection_size(32, GOLDEN["ratio"]))
    assert valid.shape == (6, GOLDEN["k_image"]) and valid.all()
    return golden_module("image")(selected, valid)


def golden_text():
    tokens, attention = noise((6, 20, 64), 10), (noise((6, 20, 20), 12) + 1) / 2
    k = selection_size(18, GOLDEN["ratio"])
    assert k == GOLDEN["k_text"]
    selected, valid = select_tokens(tokens, attention[range(6), IDS.argmax(1)], k, word_mask(IDS))
    assert valid.sum(dim=1).tolist() == [3, 5, 5, 5, 5, 5]
    # The original has a slot for each of the k tokens, and those that the first caption does not
    # fill have two tokens of its padding. They are in its batch statistics, so here they are too.
    selected[0, 3:] = tokens[0, [13, 14]]
    embedded = golden_module("text").embed(selected, torch.ones_like(valid))
    return embedded.masked_fill(~valid[..., None], -torch.inf).amax(dim=1)


def test_features_of_selected_tokens_equal_the_original():
    for kind, value in (("image", golden_image()), ("text", golden_text())):
        torch.testing.assert_close(value, torch.tensor(GOLDEN[kind]), rtol=1e-5, atol=1e-6)
    unit = F.normalize(golden_text(), dim=1), F.normalize(golden_image(), dim=1)
    values = tal(*unit, PIDS, baselines()["tal"]["tau"], baselines()["tal"]["margin"], "none")
    torch.testing.assert_close(values, torch.tensor(GOLDEN["tal"]), rtol=1e-4, atol=0)


def test_selected_are_the_words_with_most_attention_sample_by_sample():
    tokens = noise((3, 7, 4), 0)
    attention = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    attention[:, 0] = 9  # the start token, which is no word
    ids = torch.tensor(
        [
            [49406, 7, 8, 9, 10, 11, 49407],
            [49406, 0, 49407, 0, 0, 0, 0],
            [49406, 49407, 0, 0, 0, 0, 0],
        ]  # fmt: skip
    )
    selected, valid = select_tokens(tokens, attention, 3, word_mask(ids))
    best = sorted(range(1, 6), key=lambda i: -attention[0, i])[:3]
    torch.testing.assert_close(selected[0], tokens[0, best])
    torch.testing.assert_close(selected[1, 0], tokens[1, 1])  # id 0 is the word "!"
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert not selected[~valid].any()


def test_a_batch_of_short_captions_has_as_many_slots_as_one_of_long_captions():
    tokens, attention = noise((2, 4, 8), 0), noise((2, 4), 1)
    selected, valid = select_tokens(tokens, attention, 6)
    assert selected.shape == (2, 6, 8) and valid.sum(dim=1).tolist() == [4, 4]
    module = TokenEmbedding(8, 16).eval()
    torch.testing.assert_close(
        module(selected, valid), module(*select_tokens(tokens, attention, 4))
    )


def test_sizes_of_selections():
    assert [selection_size(n, 0.3) for n in (192, 75, 2)] == [57, 22, 1]


def random_selection(count=5, slots=6):
    """Selected tokens, of which sample i has i + 1, and rubbish in the other slots."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(slots) < torch.arange(1, count + 1)[:, None]
    tokens = torch.randn(count, slots, 8, generator=generator)
    return tokens.masked_fill(~valid[..., None], 1e3), valid


def test_empty_slots_change_neither_features_nor_statistics():
    """Compared with nn.BatchNorm1d on the filled slots alone, over several steps."""
    tokens, valid = random_selection()
    module = TokenEmbedding(8, 16)
    reference = torch.nn.BatchNorm1d(8)
    for step in range(3):
        scaled = tokens * (step + 1) + step
        filled_slots = F.normalize(scaled[valid], dim=1)
        hidden = reference(module.hidden(filled_slots)).relu()
        embedded = module.out(hidden) + module.linear(filled_slots)
        expected = torch.stack([e.amax(dim=0) for e in embedded.split([1, 2, 3, 4, 5])])
        torch.testing.assert_close(module(scaled, valid), expected)
    torch.testing.assert_close(module.norm.state_dict(), reference.state_dict())
    module.eval(), reference.eval()
    torch.testing.assert_close(module.norm(tokens, valid)[valid], reference(tokens[valid]))


def test_samples_do_not_depend_on_their_order_or_in_evaluation_on_each_other():
    tokens, valid = random_selection()
    module = TokenEmbedding(8, 16)
    torch.testing.assert_close(module(tokens.flip(0), valid.flip(0)).flip(0), module(tokens, valid))
    module.eval()
    torch.testing.assert_close(module(tokens[1:2], valid[1:2]), module(tokens, valid)[1:2])


def test_captions_without_a_word_are_zeros_with_a_finite_gradient():
    tokens, _ = random_selection()
    tokens = tokens.requires_grad_()
    module = TokenEmbedding(8, 16)
    value = module(*select_tokens(tokens, noise((5, 6), 0), 6, torch.zeros(5, 6, dtype=torch.bool)))
    value.square().sum().backward()
    assert not value.any() and not tokens.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_half_precision_weights_and_tokens_compute_in_float32():
    tokens, valid = random_selection()
    module = TokenEmbedding(8, 16)
    module.linear.half(), module.hidden.half(), module.out.half()
    tokens = tokens.masked_fill(~valid[..., None], 0).half()
    assert module(tokens, valid).equal(module(tokens.float(), valid))
    assert module.double()(tokens.double(), valid).dtype == torch.float64
