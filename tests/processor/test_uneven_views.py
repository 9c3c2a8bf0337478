"""A data set whose views have galleries of different lengths, through all that reads a split."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import test as test_entry
import tools.check_dataset as check_tool
import tools.report as report_tool
from datasets.records import Data, Gallery, Split
from model.backbone import load_backbone
from model.build import build_training_model
from processor.evaluator import Evaluator
from tests.helpers import options, read, run
from utils.metrics import rank
from utils.options import write_config

CPU = torch.device("cpu")


def uneven(root) -> Data:
    """Of mini-TBAGPR's splits all aerial images, and of the ground images every third."""
    data = read("AGDataAttr", root)
    for split in data.splits.values():
        ground = Gallery()
        for i, row in enumerate(zip(*vars(split.galleries["ground"]).values(), strict=True)):
            if i % 3 == 0:
                ground.add(*row)
        split.galleries["ground"] = ground
    data.warnings = ["said twice: 1 samples of train"]
    return data


def test_every_gallery_is_ranked_with_its_own_identities(mini_root, clip_file):
    data, args = uneven(mini_root), options(pretrain_choice=str(clip_file), test_batch_size=5)
    model = build_training_model(args, ["itc"], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    features, split = evaluator.encode(model), data.splits["test"]
    sizes = {view: len(images) for view, images in features.views.items()}
    assert sizes == {"aerial": 12, "ground": 4}
    found = {name: ranked.summary() for name, ranked in evaluator.galleries(features).items()}
    assert {name: r.gallery for name, r in found.items()} == {
        "aerial": 12, "ground": 4, "aerial + ground": 16, "aerial, AG-ReID": 6, "aerial, G2APS-AG": 6
    }  # fmt: skip
    captions, pids = features.captions, torch.tensor(split.caption_pids)
    ground = torch.tensor(split.galleries["ground"].pids)
    assert found["ground"] == rank(captions, features.views["ground"], pids, ground).summary()
    assert found["ground"].unmatched == int((~torch.isin(pids, ground)).sum())
    whole = torch.cat(list(features.views.values()))
    assert found["aerial + ground"] == rank(captions, whole, pids, torch.tensor(split.image_pids)).summary()  # fmt: skip


@pytest.fixture
def evaluated(mini_root, clip_file, tmp_path, monkeypatch, capsys):
    """A run's folder with weights and, by test.py, its results on the uneven data set."""
    monkeypatch.setattr(test_entry, "read_dataset", lambda args: uneven(mini_root))
    weights = load_backbone(str(clip_file), (96, 32)).state_dict()
    state = {"model": {f"base_model.{n}": v for n, v in weights.items()}, "epoch": 1}
    torch.save(state, tmp_path / "best.pth")
    args = options(dataset_name="AGDataAttr", root_dir=str(mini_root), device="cpu")
    write_config(tmp_path / "configs.yaml", args)
    run(test_entry.main, monkeypatch, "--config_file", tmp_path / "configs.yaml")
    assert capsys.readouterr().out.count("warning: said twice: 1 samples of train") == 1
    return tmp_path


def test_results_and_report_show_every_gallery_as_long_as_it_is(evaluated, mini_root, monkeypatch):
    results = json.loads((evaluated / "test_results.json").read_text())
    galleries = results["splits"]["test"]["galleries"]
    assert [galleries[name]["gallery"] for name in ("aerial", "ground", "aerial + ground")] == [12, 4, 16]  # fmt: skip
    with np.load(evaluated / "test_queries.npz") as queries:
        captions = galleries["aerial"]["queries"] + galleries["aerial"]["unmatched"]
        assert len(queries["test/ground/first"]) == captions
    monkeypatch.setattr(report_tool, "read_dataset", lambda args: uneven(mini_root))
    given = Namespace(device="cpu", root_dir="", queries=2)
    page = report_tool.sheets(report_tool.read_run(evaluated, "#000"), given)
    # Worst and random, two captions each: ten images of 12, all 4, ten of 16.
    assert page.count("<img") == 2 * 2 * (10 + 4 + 10)
    assert " of 12)" in page and " of 4)" in page and " of 16)" in page


def test_the_check_counts_and_reads_every_view(mini_root, monkeypatch, capsys):
    monkeypatch.setattr(check_tool, "read_dataset", lambda args: uneven(mini_root))
    with pytest.raises(SystemExit) as stopped:
        run(check_tool.main, monkeypatch, "--dataset_name", "AGDataAttr", "--root_dir", mini_root, "--num_workers", 0)  # fmt: skip
    assert stopped.value.code == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| test"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["6", "12", "4"]


def test_a_view_without_any_image_of_a_split_is_no_accident_of_the_other(mini_root, clip_file):
    """One view empty: its gallery has no match and is left out."""
    data, args = uneven(mini_root), options(pretrain_choice=str(clip_file))
    data.splits["test"] = Split(
        ["here"],
        {"aerial": data.splits["test"].galleries["aerial"], "ground": Gallery()},
        data.splits["test"].captions,
        data.splits["test"].caption_pids,
        [0] * len(data.splits["test"].captions),
    )
    evaluator = Evaluator(data, "test", args, CPU)
    features = evaluator.encode(build_training_model(args, ["itc"], num_classes=0))
    assert list(evaluator.galleries(features)) == ["aerial", "aerial + ground"]
