import pytest
import torch
import torch.nn.functional as F

from model.losses import cfan
from model.losses.cfan import (
    cda,
    cda_of_views,
    fta,
    fta_parts,
    fta_queries,
    fta_scores,
    membership,
)
from model.losses.inputs import Inputs
from model.losses.irra import sdm
from processor.memory import PeakMemory
from solver.build import settings_of
from tests.helpers import baseline_features, baselines, filled, noise, options

PIDS = torch.tensor([0, 1, 0, 2, 3, 1])


def features():
    """Normalised captions, aerial and ground images."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(3, 6, 8, generator=generator), dim=2).unbind()


def test_cda_equals_the_original():
    golden = baselines()["cda"]
    text, aerial, ground = baseline_features("text", "aerial", "ground")
    loss = cda(text, aerial, ground, PIDS, golden["scale"])
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    direct = sdm(aerial, text, PIDS, golden["scale"], reduction="none")
    torch.testing.assert_close(direct, torch.tensor(golden["per_sample_direct"]))


def kl(scores, pids, i):
    """KL divergence of the softmax of row i from its same-identity distribution."""
    p = scores[i].exp() / scores[i].exp().sum()
    own = torch.tensor([1.0 if pid == pids[i] else 0.0 for pid in pids])
    return (p * (p.log() - (own / own.sum() + 1e-8).log())).sum()


def slow_cda(text, aerial, ground, scale):
    """The loss of each sample, one after the other."""
    values = []
    for i in range(len(PIDS)):

        def both(a, b, i=i):
            return kl(scale * a @ b.T, PIDS, i) + kl(scale * b @ a.T, PIDS, i)

        w = torch.sigmoid(text[i] @ aerial[i] - text[i] @ ground[i])
        bridge = both(ground, text) + both(aerial, ground)
        values.append(w * both(aerial, text) + (1 - w) * bridge)
    return torch.stack(values)


def test_cda_is_what_its_definition_says_sample_by_sample():
    expected = slow_cda(*features(), scale=5.0)
    torch.testing.assert_close(cda(*features(), PIDS, 5.0, reduction="none"), expected)
    torch.testing.assert_close(cda(*features(), PIDS, 5.0), expected.mean())
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = cda(*(f[order] for f in features()), PIDS[order], 5.0, reduction="none")
    torch.testing.assert_close(permuted, expected[order])
    inputs = Inputs(*features(), PIDS, options=options(temperature=0.2))
    torch.testing.assert_close(cda_of_views(inputs), expected.mean())


def test_the_ground_image_learns_from_the_text_and_the_weight_only():
    """Its gradient is that of the definition whose aerial-ground pair has a constant ground."""
    leaves, expected = ([f.requires_grad_() for f in features()] for _ in range(2))
    text, aerial, ground = expected
    w = ((text * aerial).sum(1) - (text * ground).sum(1)).sigmoid()
    direct, to_ground, bridge = (
        sdm(a, b, PIDS, 5.0, "none")
        for a, b in ((aerial, text), (ground, text), (aerial, ground.detach()))
    )
    (w * direct + (1 - w) * (to_ground + bridge)).mean().backward()
    cda(*leaves, PIDS, 5.0).backward()
    torch.testing.assert_close([f.grad for f in leaves], [f.grad for f in expected])
    plain = [f.requires_grad_() for f in features()]
    slow_cda(*plain, scale=5.0).mean().backward()  # without the constant, ground differs
    assert not torch.allclose(plain[2].grad, leaves[2].grad)
    torch.testing.assert_close(plain[1].grad, leaves[1].grad)


def network(dim=8, weights=None):
    """A membership network, with closed-form weights."""
    module = fta_parts(dim, depth=1)["cross_membership"]
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    module.load_state_dict(weights or filled(shapes))
    return module


def test_fta_equals_the_original():
    golden, scale = baselines()["fta"], baselines()["cda"]["scale"]
    net = network(64, filled(golden["mlp_shapes"]))
    text, aerial = noise((6, 64), 0), noise((6, 64), 1)
    queries = noise((6, 4, 64), 20), noise((6, 4, 64), 21)
    members = membership(queries[0], text, net) * membership(queries[1], aerial, net)
    to_image, to_text = fta_scores(*queries, members)
    for value, name in ((to_image, "text_to_image"), (to_text, "image_to_text")):
        torch.testing.assert_close(value, torch.tensor(golden[name]), rtol=1e-4, atol=1e-7)
    loss = fta(*queries, text, aerial, PIDS, scale, net)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)


def slow_fta(text_queries, image_queries, text, image, scale, net):
    """The loss of each sample, one pair and one query after the other."""

    def member(query, feature):
        q, t = F.normalize(query, dim=0), F.normalize(feature, dim=0)
        v = net(t[None])[0].exp()
        return sum((-((1 - q[d] * t[d]) ** 2) / (2 * v[d] ** 2)).exp() for d in range(8)) / 8

    count, k = text_queries.shape[:2]
    scores = torch.zeros(2, count, count)
    for i in range(count):
        for j in range(count):
            for n in range(k):
                m = member(text_queries[i, n], text[j]) * member(image_queries[i, n], image[j])
                for s, (a, b) in enumerate(
                    ((text_queries, image_queries), (image_queries, text_queries))
                ):
                    scores[s, i, j] += F.cosine_similarity(a[i, n], b[j, n], dim=0) * m / k
    return torch.stack([(kl(scale * scores[0], PIDS, i) + kl(scale * scores[1], PIDS, i)) / 2
                        for i in range(count)])  # fmt: skip


def fta_inputs():
    return noise((6, 3, 8), 0), noise((6, 3, 8), 1), noise((6, 8), 2), noise((6, 8), 3)


def test_fta_is_what_its_definition_says_sample_by_sample():
    net, inputs = network(), fta_inputs()
    with torch.no_grad():
        expected = slow_fta(*inputs, 5.0, net)
        values = fta(*inputs, PIDS, 5.0, net, reduction="none")
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(fta(*inputs, PIDS, 5.0, net), expected.mean())
        order = torch.tensor([4, 2, 0, 5, 1, 3])
        permuted = fta(*(x[order] for x in inputs), PIDS[order], 5.0, net, reduction="none")
        torch.testing.assert_close(permuted, values[order])


@pytest.mark.parametrize("bias", [0.0, 100.0, -100.0])
def test_a_batch_of_one_identity_has_a_finite_loss_and_gradient(bias):
    """Also with a network that says that everything, or nothing, is a member."""
    net = network()
    net[2].bias.data += bias
    inputs = [x.requires_grad_() for x in fta_inputs()]
    losses = fta(*inputs, torch.zeros(6), 50.0, net), cda(*inputs[2:], inputs[3], PIDS * 0, 50.0)
    sum(losses).backward()
    for value in (*losses, *(x.grad for x in inputs), *(p.grad for p in net.parameters())):
        assert value.isfinite().all()


def test_gradients_reach_queries_features_and_the_network():
    net = network()
    inputs = [x.requires_grad_() for x in fta_inputs()]
    fta(*inputs, PIDS, 5.0, net).backward()
    assert all(x.grad.any() for x in (*inputs, *net.parameters()))


def gradients_in_blocks(block, inputs, net, monkeypatch):
    """Memberships and the gradients of `fta`, with this many numbers at a time; and the most bytes
    that are there at once."""
    monkeypatch.setattr(cfan, "BLOCK", block)
    values = [x.detach().requires_grad_() for x in (*inputs, *net.parameters())]
    weights = dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), values[4:], strict=True))

    def of(x):
        return torch.func.functional_call(net, weights, (x,))

    with PeakMemory() as memory:
        pids = torch.arange(len(inputs[0])) // 2
        fta(*values[:4], pids, 5.0, of).backward()
        member = membership(values[0].detach(), values[2].detach(), net)
    return member, [x.grad for x in values], memory.peak


def test_memberships_in_blocks_are_the_same_with_a_fraction_of_the_memory(monkeypatch):
    """Of blocks of one, several and all samples; the last block may be smaller."""
    count, queries, dim = 32, 4, 32
    inputs = [noise((count, queries, dim), j) for j in (0, 1)]
    inputs += [noise((count, dim), j) for j in (2, 3)]
    of_sample = queries * count * dim
    whole = gradients_in_blocks(count * of_sample, inputs, network(dim), monkeypatch)
    assert whole[2] > 3 * 4 * count * of_sample
    for block in (1, 5 * of_sample):
        member, gradients, peak = gradients_in_blocks(block, inputs, network(dim), monkeypatch)
        assert member.equal(whole[0]) and peak < whole[2] / 3
        torch.testing.assert_close(gradients, whole[1], rtol=1e-4, atol=1e-8)


def test_queries_summarise_each_sample_alone_and_not_its_padding():
    parts = {name: part.eval() for name, part in fta_parts(64, depth=2).items()}
    tokens = noise((3, 7, 64), 0)
    padding = torch.arange(7) >= torch.tensor([3, 5, 7])[:, None]
    with torch.no_grad():
        queries = fta_queries(parts, tokens, padding)
        assert queries.shape == (3, 4, 64) and len(queries.flatten(0, 1).unique(dim=0)) == 12
        for i, length in enumerate((3, 5, 7)):
            alone = fta_queries(parts, tokens[i : i + 1, :length])
            torch.testing.assert_close(queries[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_queries_of_half_precision_tokens_have_their_precision():
    parts = fta_parts(64, depth=1)
    for name in ("cross_attn", "cross_modal_transformer"):
        parts[name].bfloat16()
    assert fta_queries(parts, noise((2, 5, 64), 0).bfloat16()).dtype == torch.bfloat16


def test_the_parts_have_no_classifier_of_words_and_their_new_layers_learn_fast():
    parts = fta_parts(64, depth=1, queries=5)
    assert "mlm_head" not in parts and parts["cross_queries"].weight.shape == (5, 64)
    for name in ("cross_queries.weight", "cross_membership.0.weight"):
        assert settings_of(name, options())[0] == options().lr * options().lr_factor
