import numpy as np
import pytest
import torch

from utils.uncertainty import bootstrap, by_identity, permutation_p


def sample(identities=40, seed=0):
    """Captions of people with one to four captions each, whose hits depend on the person."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 5, (identities,), generator=generator)
    pids = torch.arange(identities).repeat_interleave(numbers)
    person = torch.rand(identities, generator=generator)[pids]
    hits = (torch.rand(len(pids), generator=generator) < person).double()
    return torch.stack([hits, 1 - hits], dim=1), pids


def test_the_interval_equals_a_plain_loop_over_draws():
    values, pids = sample()
    found = bootstrap(values, pids, draws=500, seed=3)
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(40, (500, 40), generator=generator).tolist()
    rows = {i: values[pids == i] for i in range(40)}
    means = [torch.cat([rows[i] for i in pick]).mean(dim=0).numpy() for pick in picks]
    np.testing.assert_allclose(found.numpy(), np.quantile(means, [0.025, 0.975], axis=0))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 0.3
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        pids = torch.arange(60).repeat_interleave(2)
        person = (torch.rand(60, generator=generator) < truth).double()
        low, high = bootstrap(person[pids][:, None], pids, draws=400, seed=seed)[:, 0]
        covered += bool(low <= truth <= high)
    assert 0.88 <= covered / 200 <= 0.99


def test_captions_of_one_person_widen_the_interval():
    """Repeating everyone's captions adds no information about other people."""
    values, pids = sample()
    one, four = (bootstrap(values.repeat(n, 1), pids.repeat(n), 500) for n in (1, 4))
    torch.testing.assert_close(one, four)


def test_captions_without_a_match_are_left_out():
    values, pids = sample()
    more = torch.cat([values, torch.full((3, 2), torch.nan)]), torch.cat([pids, torch.arange(3)])
    for mine, theirs in zip(by_identity(values, pids), by_identity(*more), strict=True):
        assert torch.equal(mine, theirs)


def test_equal_runs_have_p_one_and_clear_differences_a_small_p():
    _, pids = sample()
    nothing = torch.zeros(len(pids), 1)
    assert permutation_p(nothing, pids, 999).item() == 1
    assert permutation_p(torch.ones(len(pids), 1), pids, 999).item() == pytest.approx(0.001)


def test_the_p_value_equals_that_of_all_flips_of_few_people():
    values = torch.tensor([[0.5], [1.0], [-0.2], [2.0]])
    pids = torch.tensor([0, 1, 2, 2])
    sums = [0.5, 1.0, 1.8]
    flips = [abs(a * sums[0] + b * sums[1] + c * sums[2]) for a in (1, -1) for b in (1, -1) for c in (1, -1)]  # fmt: skip
    exact = sum(f >= sum(sums) - 1e-9 for f in flips) / 8
    assert permutation_p(values, pids, 20_000).item() == pytest.approx(exact, abs=0.01)


def test_p_values_under_chance_are_spread_evenly():
    small = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        differences = torch.randn(50, 1, generator=generator)
        small += permutation_p(differences, torch.arange(50), 300, seed).item() <= 0.1
    assert 0.04 <= small / 200 <= 0.17
