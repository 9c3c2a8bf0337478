"""A data set whose views have galleries of different lengths, in all code that reads a split."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import test as test_entry
import tools.check_dataset as check_tool
import tools.report as report_tool
from datasets.records import Data, Gallery
from datasets.registry import DATASETS
from model.backbone import load_backbone
from model.build import build_training_model
from processor.evaluator import Evaluator
from tests.helpers import options, read, run
from utils.config import write_config
from utils.metrics import rank_gallery

CPU = torch.device("cpu")


def uneven(root, kept: slice = slice(None, None, 3)) -> Data:
    """mini-TBAGPR with all aerial images and every third ground image of each gallery."""
    data = read("AGDataAttr", root)
    for split in data.splits.values():
        ground = split.galleries["ground"]
        split.galleries["ground"] = Gallery(
            ground.images[kept], ground.pids[kept], ground.sources[kept]
        )
    data.warnings = ["repeated: 1 samples of train"]
    return data


@pytest.fixture
def uneven_root(request, mini_root, monkeypatch):
    """mini-TBAGPR's folder, whose reader returns `uneven` during the test."""
    data = uneven(mini_root, *getattr(request, "param", ()))
    spec = replace(DATASETS["AGDataAttr"], read=lambda args: data)
    monkeypatch.setitem(DATASETS, "AGDataAttr", spec)
    return mini_root


def test_every_gallery_is_ranked_with_its_own_identities(mini_root, clip_file):
    data, args = uneven(mini_root), options(pretrain_choice=str(clip_file), test_batch_size=5)
    model = build_training_model(args, ["itc"], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    features, split = evaluator.encode(model), data.splits["test"]
    sizes = {view: len(images) for view, images in features.views.items()}
    assert sizes == {"aerial": 12, "ground": 4}
    results = {name: ranked.summary() for name, ranked in evaluator.galleries(features).items()}
    assert {name: r.gallery for name, r in results.items()} == {
        "aerial": 12, "ground": 4, "aerial + ground": 16, "aerial, AG-ReID": 6, "aerial, G2APS-AG": 6
    }  # fmt: skip
    captions, pids = features.captions, torch.tensor(split.caption_pids)
    ground = torch.tensor(split.galleries["ground"].pids)
    assert (
        results["ground"]
        == rank_gallery(captions, features.views["ground"], pids, ground).summary()
    )
    assert results["ground"].unmatched == int((~torch.isin(pids, ground)).sum())
    images = torch.cat(list(features.views.values()))
    assert results["aerial + ground"] == rank_gallery(captions, images, pids, torch.tensor(split.image_pids)).summary()  # fmt: skip


@pytest.fixture
def evaluated(uneven_root, clip_file, tmp_path, monkeypatch, capsys):
    """A run's folder with weights and test.py's results on the uneven data set."""
    weights = load_backbone(str(clip_file), (96, 32)).state_dict()
    state = {"model": {f"base_model.{n}": v for n, v in weights.items()}, "epoch": 1}
    torch.save(state, tmp_path / "best.pth")
    args = options(dataset_name="AGDataAttr", root_dir=str(uneven_root), device="cpu")
    write_config(tmp_path / "configs.yaml", args)
    run(test_entry.main, monkeypatch, "--config_file", tmp_path / "configs.yaml")
    assert capsys.readouterr().out.count("warning: repeated: 1 samples of train") == 1
    return tmp_path


def test_results_and_report_show_every_gallery_at_its_own_length(evaluated):
    results = json.loads((evaluated / "test_results.json").read_text())
    galleries = results["splits"]["test"]["galleries"]
    assert [galleries[name]["gallery"] for name in ("aerial", "ground", "aerial + ground")] == [12, 4, 16]  # fmt: skip
    with np.load(evaluated / "test_queries.npz") as queries:
        captions = galleries["aerial"]["queries"] + galleries["aerial"]["unmatched"]
        assert len(queries["test/ground/first"]) == captions
    args = Namespace(device="cpu", root_dir="", queries=2, attributes_file="", heatmaps=False)
    sheets = report_tool.sheets(report_tool.read_run(evaluated, "#000"), args)
    # Two worst and two random captions each, with ten images of 12, all 4, and ten of 16.
    assert [len(best) for sheet in sheets for *_, best in sheet.captions] == [10] * 4 + [4] * 4 + [10] * 4  # fmt: skip
    sizes = [rank.split()[-1] for sheet in sheets for _, rank, _ in sheet.captions]
    assert sizes == ["12"] * 4 + ["4"] * 4 + ["16"] * 4


def test_the_check_counts_and_reads_every_view(uneven_root, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(check_tool.main, monkeypatch, "--dataset_name", "AGDataAttr", "--root_dir", uneven_root, "--num_workers", 0)  # fmt: skip
    assert exit_.value.code == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| test"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["6", "12", "4"]


@pytest.mark.parametrize("uneven_root", [[slice(0)]], indirect=True)
def test_a_view_without_images_is_left_out_everywhere(evaluated):
    results = json.loads((evaluated / "test_results.json").read_text())
    assert list(results["splits"]["test"]["galleries"])[:2] == ["aerial", "aerial + ground"]
    args = Namespace(device="cpu", root_dir="", queries=2, attributes_file="", heatmaps=False)
    sheets = report_tool.sheets(report_tool.read_run(evaluated, "#000"), args)
    assert [len(best) for sheet in sheets for *_, best in sheet.captions] == [10] * 8


def test_attribute_accuracy_covers_only_views_that_have_images(mini_root, clip_file):
    data = uneven(mini_root, slice(0))
    args = options(pretrain_choice=str(clip_file), loss_names="match2+dot")
    model = build_training_model(args, ["match2", "dot"], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    accuracy = evaluator.attribute_accuracy(model, evaluator.encode(model))
    assert list(accuracy) == list(data.attribute_names)
    assert all(list(row) == ["aerial"] for row in accuracy.values())
