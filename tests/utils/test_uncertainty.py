import numpy as np
import pytest
import torch

from utils.uncertainty import bootstrap, bootstrap_difference, by_identity, permutation_p


def sample(identities=40, seed=0):
    """Hits and misses [Q, 2] and identities [Q]: one to four captions per person, alike in hits."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 5, (identities,), generator=generator)
    pids = torch.arange(identities).repeat_interleave(numbers)
    person = torch.rand(identities, generator=generator)[pids]
    hits = (torch.rand(len(pids), generator=generator) < person).double()
    return torch.stack([hits, 1 - hits], dim=1), pids


def test_the_interval_equals_a_plain_loop_over_resamples():
    values, pids = sample()
    interval = bootstrap(values, pids, resamples=500, seed=3)
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(40, (500, 40), generator=generator).tolist()
    rows = {i: values[pids == i] for i in range(40)}
    means = [torch.cat([rows[i] for i in pick]).mean(dim=0).numpy() for pick in picks]
    np.testing.assert_allclose(interval.numpy(), np.quantile(means, [0.025, 0.975], axis=0))


def test_the_interval_contains_the_true_mean_about_as_often_as_its_level_says():
    truth = 0.3
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        pids = torch.arange(60).repeat_interleave(2)
        person = (torch.rand(60, generator=generator) < truth).double()
        low, high = bootstrap(person[pids][:, None], pids, resamples=400, seed=seed)[:, 0]
        covered += bool(low <= truth <= high)
    assert 0.88 <= covered / 200 <= 0.99


def test_captions_of_one_person_widen_the_interval():
    """Repeated captions of the same people add no information about other people."""
    values, pids = sample()
    one, four = (bootstrap(values.repeat(n, 1), pids.repeat(n), 500) for n in (1, 4))
    torch.testing.assert_close(one, four)


def test_captions_without_a_match_are_left_out():
    values, pids = sample()
    unmatched = torch.full((3, 2), torch.nan)
    extended = torch.cat([values, unmatched]), torch.cat([pids, torch.arange(3)])
    for before, after in zip(by_identity(values, pids), by_identity(*extended), strict=True):
        assert torch.equal(before, after)


def test_equal_runs_have_p_one_and_clear_differences_a_small_p():
    _, pids = sample()
    no_difference = torch.zeros(len(pids), 1)
    assert permutation_p(no_difference, pids, 999).item() == 1
    assert permutation_p(torch.ones(len(pids), 1), pids, 999).item() == pytest.approx(0.001)


def test_the_p_value_equals_the_exact_one_for_few_people():
    values = torch.tensor([[0.5], [1.0], [-0.2], [2.0]])
    pids = torch.tensor([0, 1, 2, 2])
    sums = [0.5, 1.0, 1.8]
    flips = [abs(a * sums[0] + b * sums[1] + c * sums[2]) for a in (1, -1) for b in (1, -1) for c in (1, -1)]  # fmt: skip
    exact = sum(f >= sum(sums) - 1e-9 for f in flips) / 8
    assert permutation_p(values, pids, 20_000).item() == pytest.approx(exact, abs=0.01)


def test_p_values_are_uniform_if_there_is_no_difference():
    small = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        differences = torch.randn(50, 1, generator=generator)
        small += permutation_p(differences, torch.arange(50), 300, seed).item() <= 0.1
    assert 0.04 <= small / 200 <= 0.17


def runs(number, seed, spread, people=40):
    """Runs [R, Q, 2] of one recipe on the same captions; a seed shifts all captions together."""
    values, pids = sample(people)
    generator = torch.Generator().manual_seed(seed)
    shifts = spread * torch.randn(number, 1, 2, generator=generator).double()
    return values + shifts + 0.1 * torch.rand(number, *values.shape, generator=generator), pids


def test_the_interval_over_seeds_and_people_equals_a_plain_loop_over_resamples():
    (a, pids), (b, _) = runs(3, 1, 0.2), runs(2, 2, 0.2)
    a[:, 4], b[:, 4] = torch.nan, torch.nan  # a caption without a match
    interval = bootstrap_difference(a, b, pids, resamples=300, seed=5)
    generator = torch.Generator().manual_seed(5)
    people = torch.randint(40, (300, 40), generator=generator).tolist()
    seeds = [torch.randint(n, (300, n - 1), generator=generator).tolist() for n in (3, 2)]
    means = []
    for n in range(300):
        captions = torch.cat([(pids == i).nonzero()[:, 0] for i in people[n]])
        captions = captions[~a[0, captions, 0].isnan()]
        one, two = (
            torch.stack([side[run, captions].mean(dim=0) for run in picks[n]]).mean(dim=0)
            for side, picks in zip((a, b), seeds, strict=True)
        )
        means.append((two - one).numpy())
    np.testing.assert_allclose(interval.numpy(), np.quantile(means, [0.025, 0.975], axis=0))


def test_with_one_seed_per_side_the_interval_covers_only_people():
    (a, pids), (b, _) = runs(1, 1, 0.2), runs(1, 2, 0.2)
    both = bootstrap_difference(a, b, pids, 300), bootstrap(b[0] - a[0], pids, 300)
    torch.testing.assert_close(*both)


def test_seeds_that_differ_widen_the_interval_and_equal_runs_do_not():
    (a, pids), (b, _) = runs(3, 1, 0.5), runs(3, 2, 0.5)
    width = bootstrap_difference(a, b, pids, 300).diff(dim=0)
    people_only = bootstrap((b - a).mean(dim=0), pids, 300).diff(dim=0)
    assert (width > 3 * people_only).all()
    same = bootstrap_difference(a[:1].expand(3, -1, -1), b[:1], pids, 300)
    torch.testing.assert_close(same, bootstrap_difference(a[:1], b[:1], pids, 300))


def test_the_interval_over_three_seeds_contains_the_true_difference_about_as_often_as_documented():
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        people = torch.randn(1, 50, 1, generator=generator)
        a = people + torch.randn(3, 1, 1, generator=generator)
        b = people + torch.randn(3, 1, 1, generator=generator)
        b += 0.3 * torch.randn(1, 50, 1, generator=generator)
        low, high = bootstrap_difference(a, b, torch.arange(50), 200, seed)[:, 0]
        covered += bool(low <= 0 <= high)
    assert 0.80 <= covered / 200 <= 0.95
