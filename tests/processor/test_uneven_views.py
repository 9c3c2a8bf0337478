"""A data set whose views have galleries of different lengths, through all that reads a split."""

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
from utils.metrics import rank

CPU = torch.device("cpu")


def uneven(root, kept: slice = slice(None, None, 3)) -> Data:
    """Of mini-TBAGPR's splits all aerial images, and of the ground images every third."""
    data = read("AGDataAttr", root)
    for split in data.splits.values():
        whole = split.galleries["ground"]
        split.galleries["ground"] = Gallery(
            whole.images[kept], whole.pids[kept], whole.sources[kept]
        )
    data.warnings = ["repeated: 1 samples of train"]
    return data


@pytest.fixture
def uneven_root(request, mini_root, monkeypatch):
    """mini-TBAGPR's folder, which is read as `uneven` from now on."""
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
def evaluated(uneven_root, clip_file, tmp_path, monkeypatch, capsys):
    """A run's folder with weights and, by test.py, its results on the uneven data set."""
    weights = load_backbone(str(clip_file), (96, 32)).state_dict()
    state = {"model": {f"base_model.{n}": v for n, v in weights.items()}, "epoch": 1}
    torch.save(state, tmp_path / "best.pth")
    args = options(dataset_name="AGDataAttr", root_dir=str(uneven_root), device="cpu")
    write_config(tmp_path / "configs.yaml", args)
    run(test_entry.main, monkeypatch, "--config_file", tmp_path / "configs.yaml")
    assert capsys.readouterr().out.count("warning: repeated: 1 samples of train") == 1
    return tmp_path


def test_results_and_report_show_every_gallery_as_long_as_it_is(evaluated):
    results = json.loads((evaluated / "test_results.json").read_text())
    galleries = results["splits"]["test"]["galleries"]
    assert [galleries[name]["gallery"] for name in ("aerial", "ground", "aerial + ground")] == [12, 4, 16]  # fmt: skip
    with np.load(evaluated / "test_queries.npz") as queries:
        captions = galleries["aerial"]["queries"] + galleries["aerial"]["unmatched"]
        assert len(queries["test/ground/first"]) == captions
    given = Namespace(device="cpu", root_dir="", queries=2, attributes_file="")
    sheets = report_tool.sheets(report_tool.read_run(evaluated, "#000"), given)
    # Worst and random, two captions each: ten images of 12, all 4, ten of 16.
    assert [len(best) for sheet in sheets for *_, best in sheet.captions] == [10] * 4 + [4] * 4 + [10] * 4  # fmt: skip
    told = [rank.split()[-1] for sheet in sheets for _, rank, _ in sheet.captions]
    assert told == ["12"] * 4 + ["4"] * 4 + ["16"] * 4


def test_the_check_counts_and_reads_every_view(uneven_root, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(check_tool.main, monkeypatch, "--dataset_name", "AGDataAttr", "--root_dir", uneven_root, "--num_workers", 0)  # fmt: skip
    assert stopped.value.code == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| test"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["6", "12", "4"]


@pytest.mark.parametrize("uneven_root", [[slice(0)]], indirect=True)
def test_a_view_without_images_is_left_out_everywhere(evaluated):
    results = json.loads((evaluated / "test_results.json").read_text())
    assert list(results["splits"]["test"]["galleries"])[:2] == ["aerial", "aerial + ground"]
    given = Namespace(device="cpu", root_dir="", queries=2, attributes_file="")
    sheets = report_tool.sheets(report_tool.read_run(evaluated, "#000"), given)
    assert [len(best) for sheet in sheets for *_, best in sheet.captions] == [10] * 8


def test_attributes_are_judged_in_the_views_that_have_images(mini_root, clip_file):
    data = uneven(mini_root, slice(0))
    args = options(pretrain_choice=str(clip_file), loss_names="match2+dot")
    model = build_training_model(args, ["match2", "dot"], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    found = evaluator.attribute_accuracy(model, evaluator.encode(model))
    assert list(found) == list(data.attribute_names) and all(list(x) == ["aerial"] for x in found.values())  # fmt: skip
