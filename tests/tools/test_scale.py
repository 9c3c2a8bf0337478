"""The arithmetic of docs/scale.md."""

import pytest
import torch

from model.losses.aea import FeatureQueue, aea_loss, elastic_kl
from tools import scale


def test_the_counted_logits_are_those_that_aea_compares():
    shapes = []

    def counted(logits_BK, *rest):
        shapes.append(logits_BK.numel())
        return elastic_kl(logits_BK, *rest)

    batch = scale.PER_GPU
    text, aerial, ground = torch.randn(3, batch, 8)
    queue = FeatureQueue(scale.QUEUE_BATCHES * batch, 8)
    aea_loss(counted, text, aerial, ground, torch.arange(batch), 50, queue)
    assert sum(shapes) == scale.logits(1)
    assert scale.logits(8) == 64 * scale.logits(1)


def test_costs_grow_as_they_must():
    assert scale.exchange_seconds(1) == 0 < scale.exchange_seconds(8) < scale.exchange_seconds(64)
    one, eight = (scale.epoch_seconds(64_000_000, gpus) for gpus in (1, 8))
    assert one / 8 < eight < one / 7
    assert scale.epoch_seconds(128_000, 1) == pytest.approx(2 * scale.epoch_seconds(64_000, 1))
    assert scale.epoch_seconds(65, 1) == 2 * scale.epoch_seconds(64, 1)  # the last batch is small


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0123, "12 ms"), (1.71, "1.7 s"), (59.6, "60 s"), (5400, "1.5 h"), (3.33e6, "39 days"), (1e-5, "0.01 ms"),
])  # fmt: skip
def test_values_have_two_digits_and_a_unit(seconds, text):
    assert scale.time_text(seconds) == text
