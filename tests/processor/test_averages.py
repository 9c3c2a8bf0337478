"""Averages of the weights: what they are, and that evaluation and checkpoints have them."""

import json

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import test as test_entry
import train as train_entry
from model.build import build_training_model
from processor.step import TrainStep
from solver.build import build_optimizer
from tests.helpers import golden_batch, options, run
from tests.model.test_backbone import RESNET
from tests.reliability.runs import assert_same, flags, folder_of
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.metrics import METRICS


def train_step(weights, **values):
    """A `TrainStep` with weights from a file, and a learning rate that moves them."""
    values = {"loss_names": "itc", "lr": 1e-2, "adam_eps": 1e-4, "ema": 0.7, **values}
    args = options(pretrain_choice=str(weights), **values)
    model = build_training_model(args, args.loss_names.split("+"), num_classes=0).train()
    return TrainStep(model, build_optimizer(model.named_parameters(), args), args)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_moving_average_is_that_of_torch(precision, clip_file):
    step = train_step(clip_file, precision=precision)
    expected = AveragedModel(step.model.base_model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    expected.update_parameters(step.model.base_model)
    start = {name: value.clone() for name, value in step.average.values.items()}
    for batch in (0, 1, 0):
        step(golden_batch(batch))
        expected.update_parameters(step.model.base_model)
    reference = dict(expected.module.named_parameters(prefix="base_model"))
    assert step.average.values.keys() == reference.keys() == start.keys()
    for name, value in reference.items():
        torch.testing.assert_close(step.average.values[name], value, rtol=1e-5, atol=1e-7)
    assert sum(value.equal(start[name]) for name, value in reference.items()) == 0


def test_weights_in_half_precision_have_an_average_in_float32(clip_file):
    """Its steps of 1 - decay would be too small for half precision."""
    step = train_step(clip_file, precision="half", ema=0.999)
    name = "base_model.transformer.resblocks.0.mlp.c_fc.weight"
    weight = dict(step.model.named_parameters())[name]
    expected = weight.detach().float()
    for batch in (0, 1):
        step(golden_batch(batch))
        expected = 0.999 * expected + 0.001 * weight.detach().float()
    assert weight.dtype == torch.float16 and step.average.values[name].dtype == torch.float32
    torch.testing.assert_close(step.average.values[name], expected, rtol=1e-6, atol=1e-7)


def test_a_skipped_step_leaves_the_average(clip_file):
    step = train_step(clip_file)
    step(golden_batch(0))
    before = {name: value.clone() for name, value in step.average.values.items()}
    batch = golden_batch(1)
    batch["images"] = batch["images"] * float("nan")
    assert step(batch).skipped
    assert_same(step.average.values, before)


def test_the_average_of_a_resnet_has_the_statistics_of_its_batch_normalisation(tmp_path):
    from model.backbone import Backbone

    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    step = train_step(tmp_path / "rn.pt")
    name = "base_model.visual.bn1.running_mean"
    expected = step.model.state_dict()[name].clone()
    for batch in (0, 1):
        step(golden_batch(batch))
        expected = 0.7 * expected + 0.3 * step.model.state_dict()[name]
    torch.testing.assert_close(step.average.values[name], expected)
    assert not any("num_batches_tracked" in name for name in step.average.values)


def test_evaluation_and_best_pth_have_the_moving_average_and_last_pth_has_both(
    mini_root, tmp_path, monkeypatch, capsys
):
    argv = flags(mini_root, tmp_path, ema=0.8, lr=3e-3)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path)
    best, last = (load_checkpoint(folder / f"{name}.pth") for name in ("best", "last"))
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    assert f"training at epoch {best['epoch']}" in (shown := capsys.readouterr().out)
    assert ": equal" in shown
    name = "base_model.text_projection"
    assert not last["model"][name].equal(last["ema"]["values"][name])
    # Resumed at its end, the run writes best.pth again if that epoch was the best.
    argv = ["--val_dataset", "last", "--num_epoch", 4]
    run(train_entry.main, monkeypatch, "--resume", "--resume_ckpt_file", folder / "last.pth", *argv)
    best, last = (load_checkpoint(folder / f"{name}.pth") for name in ("best", "last"))
    assert best["epoch"] == 4
    for name, value in last["ema"]["values"].items():
        assert best["model"][name].equal(value)
    assert best["model"].keys() == last["model"].keys()


def test_a_run_without_a_moving_average_cannot_be_resumed_with_one(
    mini_root, tmp_path, monkeypatch
):
    few = {"num_epoch": 1, "warmup_epochs": 0, "loss_names": "itc"}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few))
    last = folder_of(tmp_path) / "last.pth"
    argv = ["--resume", "--resume_ckpt_file", last, "--num_epoch", 2]
    with pytest.raises(UserError, match="it has no ema, which only a new run can start"):
        run(train_entry.main, monkeypatch, *argv, "--ema", 0.9)


@pytest.mark.parametrize("values", [{}, {"precision": "half"}, {"ema": 0.8}], ids=str)
def test_averaged_pth_is_the_mean_of_the_last_epochs_and_says_so(
    values, mini_root, tmp_path, monkeypatch, capsys
):
    """Of their own weights, also with a moving average."""
    argv = flags(mini_root, tmp_path, average_last=2, keep_last=3, lr=3e-3, **values)
    run(train_entry.main, monkeypatch, *argv)
    folder = folder_of(tmp_path)
    averaged, *last = (load_checkpoint(folder / f"{n}.pth") for n in ("averaged", "last", "last.1"))
    assert [state["epoch"] for state in last] == [3, 2] and averaged["averaged"]["epochs"] == [2, 3]
    for name in (n for n in averaged["model"] if n.startswith("base_model.")):
        mean = (last[0]["model"][name].float() + last[1]["model"][name].float()) / 2
        tolerance = 1e-3 if values.get("precision") else 1e-6
        torch.testing.assert_close(averaged["model"][name].float(), mean, rtol=tolerance, atol=1e-6)
    shown = capsys.readouterr().out
    line = "averaged.pth is the mean of the weights after epochs 2 to 3: no split chooses it  test: R@1"
    assert line in shown and f"--checkpoint {folder / 'averaged.pth'}" in shown
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml",
        "--checkpoint", folder / "averaged.pth")  # fmt: skip
    shown = capsys.readouterr().out
    assert "this checkpoint is the mean of the weights after epochs 2 to 3: no split" in shown
    assert "test split, which had no part in choosing this checkpoint" in shown
    results = json.loads((folder / "averaged_results.json").read_text())
    metrics = averaged["averaged"]["metrics"]["test"]
    aerial = results["splits"]["test"]["galleries"]["aerial"]
    assert [aerial[name] for name in METRICS] == pytest.approx([metrics[n] for n in METRICS])


def test_a_run_that_gets_more_epochs_averages_its_new_last_epochs(mini_root, tmp_path, monkeypatch):
    few = {"loss_names": "itc", "average_last": 2, "num_epoch": 2}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **few))
    folder = folder_of(tmp_path)
    argv = ["--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch"]
    for epochs, expected in ((4, [3, 4]), (5, [5])):
        run(train_entry.main, monkeypatch, *argv, epochs)
        assert load_checkpoint(folder / "averaged.pth")["averaged"]["epochs"] == expected
    with pytest.raises(UserError, match="--average_last 6 exceeds --num_epoch 5"):
        run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, average_last=6, num_epoch=5))
