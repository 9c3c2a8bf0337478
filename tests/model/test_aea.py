import pytest
import torch
import torch.nn.functional as F

from model.losses.aea import FeatureQueue, aea_loss, elastic_kl, soft_cross_entropy, soft_targets

SCALE = 50.0


def features(count, seed, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(3)]


def naive_supkl(anchors, keys, weights):
    """The paper's equation, anchor by anchor and key by key."""
    total = 0.0
    for i in range(len(anchors)):
        logits = torch.stack([SCALE * (anchors[i] * k).sum() for k in keys])
        p = logits.softmax(0)
        w = weights[i] / weights[i].sum()
        total += sum(p[j] * (p[j].log() - (w[j] + 1e-8).log()) for j in range(len(keys)))
    return total / len(anchors)


def test_targets_are_the_keys_of_the_same_identity_with_slack_for_the_first_view():
    w = soft_targets(torch.tensor([4, 7, 4]), torch.tensor([7, -1]), slack=0.15)
    expected = [
        [1.15, 0, 1.15, 1, 0, 1, 0, 0],
        [0, 1.15, 0, 0, 1, 0, 1, 0],
        [1.15, 0, 1.15, 1, 0, 1, 0, 0],
    ]
    torch.testing.assert_close(w, torch.tensor(expected))


def test_supkl_equals_the_equation():
    pids = torch.tensor([0, 1, 0, 2])
    text, aerial, ground = features(4, 1)
    w = soft_targets(pids)
    expected = naive_supkl(text, torch.cat([aerial, ground]), w)
    expected += naive_supkl(aerial, torch.cat([text, ground]), w)
    actual = aea_loss(elastic_kl, text, aerial, ground, pids, SCALE)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distribution_loss", [elastic_kl, soft_cross_entropy])
def test_an_empty_slot_is_no_key(distribution_loss):
    """A queue of 9 slots with 3 filled gives the loss and gradient of a queue of 3 slots."""
    pids, past_pids = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 5, 2])
    past_text, past_aerial, _ = features(3, 2)
    results = []
    for size in (3, 9):
        queue = FeatureQueue(size, 16).double()
        queue.push(past_text, past_aerial, past_pids)
        views = [x.double().requires_grad_() for x in features(4, 1)]
        loss = aea_loss(distribution_loss, *views, pids, SCALE, queue)
        results.append((loss, *torch.autograd.grad(loss, views)))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large)
        assert torch.isfinite(large).all()


@pytest.mark.parametrize("distribution_loss", [elastic_kl, soft_cross_entropy])
def test_an_empty_queue_equals_no_queue(distribution_loss):
    pids = torch.tensor([0, 1, 0, 2])  # identity 0 must not match empty slots
    views = features(4, 3)
    with_queue = aea_loss(distribution_loss, *views, pids, SCALE, FeatureQueue(12, 16))
    torch.testing.assert_close(with_queue, aea_loss(distribution_loss, *views, pids, SCALE))


def test_the_queue_is_newest_first_drops_the_oldest_and_takes_a_short_batch():
    queue = FeatureQueue(5, 16)
    newest = []
    for step, count in enumerate((2, 2, 3, 1)):  # the last batch of an epoch is short
        text, aerial, _ = features(count, step)
        pids = torch.arange(count) + 10 * step
        queue.push(text, aerial, pids)
        newest = [*zip(pids.tolist(), text, aerial, strict=True), *newest][:5]
        expected = [pid for pid, *_ in newest] + [-1] * (5 - len(newest))
        assert queue.pids.tolist() == expected
        for slot, (_, t, a) in enumerate(newest):
            assert torch.equal(queue.text[slot], t) and torch.equal(queue.aerial[slot], a)


def test_a_batch_larger_than_the_queue_keeps_its_first_entries():
    queue = FeatureQueue(2, 16)
    text, aerial, _ = features(3, 0)
    queue.push(text, aerial, torch.arange(3))
    assert queue.pids.tolist() == [0, 1] and len(queue.text) == 2


def test_the_queue_holds_no_graph_and_gets_no_gradient():
    queue = FeatureQueue(8, 16)
    for step in range(4):
        views = [x.requires_grad_() for x in features(4, step)]
        loss = aea_loss(elastic_kl, *views, torch.arange(4), SCALE, queue)
        queue.push(views[0], views[1], torch.arange(4))  # before backward, as in training
        loss.backward()
        assert queue.text.grad_fn is None and not queue.text.requires_grad


def test_the_queue_is_part_of_a_checkpoint():
    queue = FeatureQueue(4, 16)
    text, aerial, _ = features(3, 0)
    queue.push(text, aerial, torch.arange(3))
    copy = FeatureQueue(4, 16)
    copy.load_state_dict(queue.state_dict())
    for name in ("text", "aerial", "pids"):
        assert torch.equal(getattr(copy, name), getattr(queue, name))
