"""k-reciprocal re-ranking equals a direct version, and ranks people that stand together higher."""

import json
import math

import numpy as np
import pytest
import torch

import test as test_entry
from gallery.index import unit
from gallery.rerank import RERANKED, distances, rank_reranked, rerank
from tests.gallery.made import made_features
from tests.helpers import run
from tests.reliability.runs import train_small_run
from utils.metrics import rank_gallery


def slow_distances(query, hits, k1, k2, weight):
    """Zhong et al., equations 1 to 12, with sets and loops; the query is nobody's neighbour."""
    every = [query, *hits]
    count = len(every)
    d = [[max(0.0, 1 - float(np.dot(a, b))) for b in every] for a in every]
    for i in range(count):
        d[i][i] = 0.0
        largest = max(d[i])
        d[i] = [x / largest for x in d[i]]

    def nearest(i, k):
        """The k + 1 nearest: itself, and k others."""
        others = [j for j in range(1, count) if j != i]
        return [i, *sorted(others, key=lambda j: d[i][j])][: k + 1]

    def reciprocal(i, k):
        return {j for j in nearest(i, k) if i == 0 or i in nearest(j, k)}

    weights = []
    for i in range(count):
        neighbours = reciprocal(i, k1)
        expanded = set(neighbours)
        for j in neighbours:
            half = reciprocal(j, (k1 + 1) // 2)
            if len(half & neighbours) > 2 / 3 * len(half):
                expanded |= half
        expanded.discard(0)
        v = [math.exp(-d[i][j]) if j in expanded else 0.0 for j in range(count)]
        weights.append([x / sum(v) for x in v])
    smooth = []
    for i in range(count):
        near = nearest(i, count)[: min(max(1, k2), len(hits))]
        smooth.append([sum(weights[j][c] for j in near) / len(near) for c in range(count)])
    result = []
    for i in range(1, count):
        common = sum(min(a, b) for a, b in zip(smooth[0], smooth[i], strict=True))
        jaccard = 1 - common / (2 - common)
        result.append((1 - weight) * jaccard + weight * d[0][i])
    return result


def hits(count, seed, width=8):
    random = np.random.default_rng(seed)
    features = made_features(count, width, seed).astype(np.float32)
    query = unit(random.standard_normal(width)).astype(np.float32)
    return query, features[np.argsort(-(features @ query))]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (4, 1, 0.0), (7, 3, 0.5)])
def test_distances_are_those_of_a_direct_version(count, k1, k2, weight):
    for seed in range(4):
        query, features = hits(count, seed)
        ours = distances(query, features, k1, k2, weight)
        np.testing.assert_allclose(
            ours, slow_distances(query, features, k1, k2, weight), rtol=1e-4, atol=1e-5
        )


def test_with_the_whole_weight_on_the_query_the_order_stays():
    query, features = hits(30, 0)
    assert rerank(query, features, weight=1.0).tolist() == [*range(30)]


def test_a_picture_of_the_first_hits_person_rises_above_a_lone_one():
    """The lone picture scores a little more than the last picture of the person, but shares no
    neighbours with the first hits."""
    random = np.random.default_rng(0)
    person = np.array([0.5, 0.8, 0, 0, 0.33])
    lone = np.array([0.46, 0, 0.8, 0, 0.33])
    pictures = [unit(person + 0.05 * random.standard_normal(5)) for _ in range(9)]
    features = np.stack([*pictures, unit(lone)]).astype(np.float32)
    query = np.array([1, 0, 0, 0, 0], np.float32)
    order = np.argsort(-(features @ query))
    assert order[-1] != 9  # by the scores, the lone picture is not the last
    assert order[rerank(query, features[order], k1=5, k2=2, weight=0.3)][-1] == 9


def test_no_hits_have_no_order():
    assert rerank(np.ones(4, np.float32), np.zeros((0, 4), np.float32)).tolist() == []


def test_equal_pictures_keep_their_order():
    query, features = hits(6, 1)
    twice = np.repeat(features, 2, axis=0)
    places = rerank(query, twice).tolist()
    assert all(places.index(2 * n) < places.index(2 * n + 1) for n in range(6))


@pytest.fixture
def evaluation():
    images = torch.from_numpy(made_features(60, 16, 3).astype(np.float32))
    pids = torch.arange(60) // 4
    noise = torch.randn(15, 16, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(images[::4] + 0.35 * noise), images, pids[::4], pids


def test_metrics_are_those_of_the_new_order(evaluation, monkeypatch):
    captions, images, caption_pids, pids = evaluation
    monkeypatch.setattr("gallery.rerank.RERANKED", 20)
    ranked = rank_reranked(*evaluation)
    for n, caption in enumerate(captions):
        order = (images @ caption).argsort(descending=True)
        order[:20] = order[:20][rerank(caption.numpy(), images[order[:20]].numpy()).tolist()]
        places = 1 + (pids[order] == caption_pids[n]).nonzero()[:, 0].double()
        precisions = torch.arange(1, 5) / places
        expected = torch.stack([places[0], precisions.mean(), 4 / places[-1]])
        torch.testing.assert_close(ranked.rows_Q3[n], expected)
    assert ranked.gallery == 60
    assert ranked.summary().metrics != rank_gallery(*evaluation).summary().metrics
    assert RERANKED == 200


def test_an_evaluation_reports_both_rankings(mini_root, tmp_path, monkeypatch, capsys):
    folder = train_small_run(mini_root, tmp_path)
    words = ("--config_file", folder / "configs.yaml", "--root_dir", mini_root, "--device", "cpu")
    results, shown = [], []
    for more in ((), ("--rerank",)):
        run(test_entry.main, monkeypatch, *words, *more)
        results.append(json.loads((folder / "test_results.json").read_text())["splits"]["test"])
        shown.append(capsys.readouterr().out)
    plain, both = results
    assert "reranked" not in plain and both["galleries"] == plain["galleries"]
    assert both["reranked"].keys() == plain["galleries"].keys()
    assert "re-ranked" not in shown[0]
    assert "| aerial " in shown[1] and "| aerial, re-ranked " in shown[1]
    for name, row in both["reranked"].items():
        assert f"| {name}, re-ranked " in shown[1] and f" {row['mAP']:.2f} |" in shown[1]
        assert row["gallery"] == plain["galleries"][name]["gallery"]
