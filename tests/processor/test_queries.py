import json

import torch

from processor.queries import check_metrics, read_results, write_results
from utils.metrics import METRICS, Ranked


def test_results_of_older_versions_are_read_under_the_names_of_today(tmp_path):
    found = Ranked(torch.tensor([[2.0, 0.5, 0.4]]).double(), torch.tensor([7]), 40).summary()
    write_results(
        tmp_path / "best.pth", {"splits": {"test": {"galleries": {"aerial": found.results()}}}}, {}
    )
    path, archive = tmp_path / "test_results.json", tmp_path / "test_queries.npz"
    now = read_results(path, archive)
    assert list(now["splits"]["test"]["galleries"]["aerial"]) == [
        *METRICS,
        "queries",
        "unmatched",
        "gallery",
    ]
    path.write_text(path.read_text().replace("R@", "r"))
    assert {"r1", "r5", "r10"} <= json.loads(path.read_text())["splits"]["test"]["galleries"][
        "aerial"
    ].keys()
    before = read_results(path, archive)
    assert before == now
    check_metrics(before, path)
