import json

import torch

from processor.results import check_metrics, read_results, write_results
from utils.metrics import SHOWN, Ranked


def test_metrics_of_older_versions_are_read_under_their_current_names(tmp_path):
    result = Ranked(torch.tensor([[2.0, 0.5, 0.4]]).double(), torch.tensor([7]), 40).summary()
    write_results(
        tmp_path / "best.pth", {"splits": {"test": {"galleries": {"aerial": result.results()}}}}, {}
    )
    path, archive = tmp_path / "test_results.json", tmp_path / "test_queries.npz"
    current = read_results(path, archive)
    assert list(current["splits"]["test"]["galleries"]["aerial"]) == [
        *SHOWN,
        "queries",
        "unmatched",
        "gallery",
    ]
    path.write_text(path.read_text().replace("R@", "r"))
    assert {"r1", "r5", "r10"} <= json.loads(path.read_text())["splits"]["test"]["galleries"][
        "aerial"
    ].keys()
    renamed = read_results(path, archive)
    assert renamed == current
    check_metrics(renamed, path)
