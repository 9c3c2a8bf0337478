import pytest
import torch

from tests.helpers import golden, noise
from utils.errors import UserError
from utils.metrics import METRICS, SHOWN, Ranked, query_metrics, rank_gallery, summarise, with_rsum


def golden_case(case):
    queries, gallery, n = case["queries"], case["gallery"], case["identities"]
    query_pids = 7 * torch.arange(queries) % n
    gallery_pids = (5 * torch.arange(gallery) + 1) % n
    same = (query_pids[:, None] == gallery_pids).float()
    similarity = noise((queries, gallery), 3, phase=case["phase"]) + 0.8 * same
    return similarity, query_pids, gallery_pids


@pytest.mark.parametrize("case", golden()["metrics"])
def test_metrics_equal_the_original(case):
    similarity, query_pids, gallery_pids = golden_case(case)
    ranking = similarity[0].argsort(descending=True)
    assert ranking.tolist() == case["first_row_ranking"]  # the inputs are the same
    rows = query_metrics(similarity, query_pids, gallery_pids)
    result = summarise(rows, len(gallery_pids))
    expected = [case["cmc"][i] for i in (0, 4, 9)] + [case["mAP"], case["mINP"]]
    assert list(result.metrics.values()) == pytest.approx(expected, abs=1e-3)


def test_rsum_is_the_sum_of_the_recalls_of_all_captions_and_of_each():
    first = torch.tensor([1.0, 3.0, 7.0, 40.0, torch.nan]).double()
    ranked = Ranked(torch.stack([first, 1 / first, 1 / first], 1), torch.arange(5), 50)
    metrics = ranked.summary().metrics
    assert [metrics[name] for name in METRICS[:3]] == [25.0, 50.0, 75.0]
    assert list(metrics) == list(METRICS)  # what checkpoints store does not change
    assert list(with_rsum(metrics)) == list(SHOWN)
    assert with_rsum(metrics)["RSum"] == ranked.summary().results()["RSum"] == 150.0
    of_each = ranked.percentages()[:, SHOWN.index("RSum")]
    assert of_each[:4].tolist() == [300.0, 200.0, 100.0, 0.0] and of_each[4].isnan()


def by_definition(similarity, query_pids, gallery_pids):
    """A plain implementation: sort each query's gallery, matches last among equals, and count."""
    rows = []
    for scores, pid in zip(similarity.tolist(), query_pids.tolist(), strict=True):
        items = [(-s, g == pid) for s, g in zip(scores, gallery_pids.tolist(), strict=True)]
        ranks = [rank for rank, (_, match) in enumerate(sorted(items), 1) if match]
        if not ranks:
            rows.append([float("nan")] * 3)
            continue
        precision = [k / rank for k, rank in enumerate(ranks, 1)]
        rows.append([ranks[0], sum(precision) / len(ranks), len(ranks) / ranks[-1]])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(20))
def test_random_cases_with_ties_equal_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery, pids = (int(torch.randint(1, 30, (), generator=generator)) for _ in range(3))
    levels = (2, 5, 10**6)[seed % 3]  # few levels: many ties
    similarity = torch.randint(levels, (queries, gallery), generator=generator).float()
    query_pids = torch.randint(pids, (queries,), generator=generator)
    gallery_pids = torch.randint(pids, (gallery,), generator=generator)
    torch.testing.assert_close(
        query_metrics(similarity, query_pids, gallery_pids),
        by_definition(similarity, query_pids, gallery_pids),
        equal_nan=True,
    )


def test_similarities_that_differ_by_rounding_are_ties_in_any_order_and_chunk():
    """Every image twice, and features that are all equal: an item's position affects the rounding of
    its similarity, which must not decide the ranks."""
    generator = torch.Generator().manual_seed(0)

    def rounded(features):  # by more than the kernels' rounding
        return features + 4e-8 * torch.randn(features.shape, generator=generator)

    query, pids = torch.nn.functional.normalize(torch.randn(24, 64, generator=generator), dim=1), torch.arange(24)  # fmt: skip
    twice = torch.cat([query, query.roll(1, 0)])  # each image with its identity and another one
    gallery_pids = torch.cat([pids, pids])
    collapsed = query[:1].expand(48, 64)
    found = set()
    for _ in range(6):
        order = torch.randperm(48, generator=generator)
        for chunk in (None, 1, 7):
            for gallery, expected in ((twice, 0.0), (collapsed, 0.0)):
                result = rank_gallery(
                    query, rounded(gallery)[order], pids, gallery_pids[order], chunk
                ).summary()
                found.add((expected, *result.metrics.values()))
    assert len(found) == 2 and all(r1 == 0.0 for _, r1, *_ in found)


@pytest.mark.parametrize(("queries", "images"), [(3, 20), (4, 16)])
def test_another_number_of_identities_than_of_features_is_refused(queries, images):
    features = torch.randn(4, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match="expected .N, D. and .N."):
        rank_gallery(*features, torch.zeros(queries), torch.zeros(images))


def test_the_order_of_the_gallery_does_not_matter_even_with_ties():
    generator = torch.Generator().manual_seed(1)
    similarity = torch.randint(3, (10, 20), generator=generator).float()
    query_pids, gallery_pids = torch.arange(10) % 4, torch.arange(20) % 5
    order = torch.randperm(20, generator=generator)
    torch.testing.assert_close(
        query_metrics(similarity, query_pids, gallery_pids),
        query_metrics(similarity[:, order], query_pids, gallery_pids[order]),
        equal_nan=True,
    )


def test_a_collapsed_model_gets_the_worst_metrics_not_the_best():
    result = rank_gallery(
        torch.ones(3, 4), torch.ones(8, 4), torch.zeros(3), torch.tensor([0.0] + [1] * 7)
    ).summary()
    assert result.metrics["R@1"] == 0 and result.metrics["mAP"] == pytest.approx(100 / 8)


def test_queries_without_a_match_are_left_out_and_counted():
    features = torch.eye(3)
    result = rank_gallery(
        features, features[:2], torch.tensor([0, 1, 9]), torch.tensor([0, 1])
    ).summary()
    assert (result.metrics["R@1"], result.queries, result.unmatched, result.gallery) == (
        100.0,
        2,
        1,
        2,
    )
    with pytest.raises(UserError, match="no query has a match"):
        rank_gallery(features, features, torch.tensor([0, 1, 2]), torch.tensor([7, 8, 9])).summary()


def test_the_chunk_size_does_not_change_the_metrics():
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(n, 8, generator=generator) for n in (50, 40)]
    tensors += [torch.randint(9, (n,), generator=generator) for n in (50, 40)]
    whole, chunked = rank_gallery(*tensors).summary(), rank_gallery(*tensors, chunk=7).summary()
    assert list(whole.metrics.values()) == pytest.approx(list(chunked.metrics.values()))


def test_features_that_are_not_finite_are_refused():
    bad = torch.ones(2, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(UserError, match="the gallery features are not finite"):
        rank_gallery(torch.ones(2, 2), bad, torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("seed", range(6))
def test_counting_and_sorting_give_the_same_ranks(seed, monkeypatch):
    """Few matches are counted, many are searched in the sorted row; ties included."""
    import utils.metrics as module

    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(8, (30, 60), generator=generator).float()
    pids = [torch.randint(4, (n,), generator=generator) for n in (30, 60)]
    counted = query_metrics(similarity, *pids)
    monkeypatch.setattr(module, "COUNTED", 0)
    assert torch.equal(counted, query_metrics(similarity, *pids))


def test_a_gallery_larger_than_a_chunk_of_memory_gives_the_same_metrics(monkeypatch):
    import utils.metrics as module

    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 8, generator=generator) for n in (25, 70))
    pids = torch.arange(25) % 10, torch.arange(70) % 10
    whole = rank_gallery(query, gallery, *pids).summary()
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 70 * 3)  # three queries at a time
    assert rank_gallery(query, gallery, *pids).summary() == whole
