import pytest
import torch
import torch.nn.functional as F

from model.losses.inputs import Inputs
from model.losses.tbps import (
    citc,
    citc_of_views,
    nitc,
    nitc_of_views,
    projection_head,
    ritc,
    ritc_of_views,
    simclr,
)
from tests.helpers import baseline_features, baselines, noise, options

PIDS = torch.tensor([0, 1, 0, 2, 3, 1])


def features():
    """Normalised captions, aerial and ground images."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(3, 6, 8, generator=generator), dim=2).unbind()


def test_all_losses_equal_the_original():
    golden = baselines()
    text, aerial = baseline_features("text", "aerial")
    pids, scale = torch.tensor(golden["pids"]), golden["nitc"]["scale"]
    for name, value in (
        ("nitc", nitc(text, aerial, pids, scale, golden["nitc"]["alpha"])),
        ("ritc", ritc(text, aerial, pids, scale, eps=golden["ritc"]["eps"])),
        ("citc", citc(text, aerial)),
        ("simclr", simclr(noise((6, 64), 30), noise((6, 64), 31), golden["simclr"]["temperature"])),
    ):
        assert value.item() == pytest.approx(golden[name]["loss"], rel=1e-5), name


def slow(name, text, image, pids, scale):
    """The loss of each sample, one row after the other."""
    values = []
    for i in range(len(pids)):
        value = 0
        for a, b in ((text, image), (image, text)):
            p = torch.stack([(scale * (a[i] @ b[j])).exp() for j in range(len(pids))])
            p = p / p.sum()
            own = torch.tensor([1.0 if pid == pids[i] else 0.0 for pid in pids])
            own = own / own.sum()
            if name == "nitc":
                value -= ((0.3 * p + 0.7 * own) * p.log()).sum() / 2
            if name == "ritc":
                value += (p * (p.log() - (own + 0.01).log())).sum() / 2
        if name == "citc":
            for j in range(len(pids)):
                value += (image[i] @ image[j] - text[i] @ text[j]) ** 2 / 4 / len(pids)
                value += (image[i] @ text[j] - text[i] @ image[j]) ** 2 / 4 / len(pids)
        values.append(value)
    return torch.stack(values)


CASES = {
    "nitc": lambda a, b, pids, **how: nitc(a, b, pids, 5.0, 0.3, **how),
    "ritc": lambda a, b, pids, **how: ritc(a, b, pids, 5.0, **how),
    "citc": lambda a, b, pids, **how: citc(a, b, **how),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_what_their_definition_says_sample_by_sample(name):
    text, image, _ = features()
    expected = slow(name, text, image, PIDS, 5.0)
    torch.testing.assert_close(CASES[name](text, image, PIDS, reduction="none"), expected)
    torch.testing.assert_close(CASES[name](text, image, PIDS), expected.mean())
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = CASES[name](text[order], image[order], PIDS[order], reduction="none")
    torch.testing.assert_close(permuted, expected[order])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one_identity_has_a_finite_loss_and_gradient(name):
    text, image, _ = features()
    text.requires_grad_()
    loss = CASES[name](text, image, torch.zeros(6))
    loss.backward()
    assert loss.isfinite() and text.grad.isfinite().all() and text.grad.any()


def test_soft_labels_get_no_gradient():
    """With alpha 1 the target is the prediction itself: the gradient is 0, the loss an entropy."""
    text, image, _ = features()
    text.requires_grad_()
    loss = nitc(text, image, PIDS, 5.0, alpha=1.0)
    loss.backward()
    assert loss > 0.5
    torch.testing.assert_close(text.grad, torch.zeros(6, 8), atol=1e-6, rtol=0)


def test_simclr_is_what_its_definition_says_image_by_image():
    a, b = noise((3, 8), 0), noise((3, 8), 1)
    everything = [F.normalize(x, dim=0) for x in (*a, *b)]
    values = []
    for i in range(6):
        scores = [(everything[i] @ x / 0.1).exp() for x in everything]
        other = scores[(i + 3) % 6]
        values.append(-(other / sum(s for j, s in enumerate(scores) if j != i)).log())
    expected = (torch.stack(values[:3]) + torch.stack(values[3:])) / 2
    torch.testing.assert_close(simclr(a, b, reduction="none"), expected)
    torch.testing.assert_close(simclr(a, b), expected.mean())


def test_simclr_of_one_image_is_zero_with_a_finite_gradient():
    a = noise((1, 8), 0).requires_grad_()
    loss = simclr(a, noise((1, 8), 1))
    loss.backward()
    assert loss == 0 and not a.grad.any()


def test_the_projection_has_two_layers_and_computes_in_float32():
    head = projection_head(8, hidden=4, out=6)
    x = noise((3, 8), 0)
    expected = head[2].weight @ (head[0].weight @ x.T + head[0].bias[:, None]).clamp(min=0)
    torch.testing.assert_close(head(x), expected.T + head[2].bias)
    assert head.half()(x.half()).dtype == torch.float32


def test_views_are_averaged_over_their_pairs_with_the_text():
    text, aerial, ground = features()
    args = options(nitc_alpha=0.3, temperature=0.2)
    both = Inputs(text, aerial, ground, PIDS, options=args, epochs=1.5)
    one = Inputs(text, aerial, None, PIDS, options=args, epochs=1.5)
    for of_views, name in (
        (nitc_of_views, "nitc"), (ritc_of_views, "ritc"), (citc_of_views, "citc"),
    ):  # fmt: skip
        values = [CASES[name](text, view, PIDS) for view in (aerial, ground)]
        torch.testing.assert_close(of_views(both), sum(values) / 2)
        torch.testing.assert_close(of_views(one), values[0])
