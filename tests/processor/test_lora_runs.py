"""Runs with LoRA: small checkpoints, whose base weights are found, checked and merged everywhere."""

import json
import shutil
import sys

import pytest
import torch
import yaml

import test as test_entry
import tools.export as export
import train as train_entry
from model.lora import BASE
from processor.inference import load_run
from tests.helpers import SCRATCH, golden_clip, run
from tests.reliability.runs import flags, folder_of, write_start
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.metrics import METRICS
from utils.options import OPTIONS

LORA = {"lora_rank": 4, "lr": 3e-3}
CAPTIONS = ["a man in a red shirt", "a woman with a blue bag"]


def trained(root, out, **overrides):
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(train_entry.main, monkeypatch, *flags(root, out, **{**LORA, **overrides}))
    return folder_of(out)


@pytest.fixture(scope="module")
def folder(mini_root, tmp_path_factory):
    return trained(mini_root, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def moved(folder, tmp_path):
    """A copy of the run whose base weights are gone."""
    copy = shutil.copytree(folder, tmp_path / "moved")
    config = yaml.safe_load((copy / "configs.yaml").read_text())
    config["finetune"] = str(tmp_path / "gone.pth")
    (copy / "configs.yaml").write_text(yaml.safe_dump(config))
    return copy


def test_checkpoints_have_the_updates_and_heads_without_the_base_weights(folder, mini_root):
    log = (folder / "train_log.txt").read_text()
    assert "LoRA of rank 4: " in log and "weights are trained in the encoders" in log
    start = write_start(mini_root.parent / "start.pth")
    for name in ("best", "last"):
        state = load_checkpoint(folder / f"{name}.pth")
        backbone = [n for n in state["model"] if n.startswith("base_model.")]
        assert len(backbone) == 16 and all(".lora_" in n for n in backbone)
        assert "atr_matching_head.weight" in state["model"]
        assert state["lora"]["rank"] == 4 and state["lora"]["base"]["file"] == str(start)
        assert (folder / f"{name}.pth").stat().st_size < start.stat().st_size / 20
    updates = load_checkpoint(folder / "last.pth")["model"]
    assert all(updates[n].any() for n in updates if ".lora_B." in n)


def test_the_evaluation_has_the_metrics_of_training_without_peft(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    shown = capsys.readouterr().out
    assert ": equal" in shown and "DIFFERENT" not in shown
    results = json.loads((folder / "test_results.json").read_text())
    best = load_checkpoint(folder / "best.pth")["best"]
    aerial = results["splits"]["test"]["galleries"]["aerial"]
    assert [aerial[name] for name in METRICS] == [best[name] for name in METRICS]


def test_base_weights_that_have_moved_are_found_next_to_the_checkpoint(folder, moved, mini_root):
    expected = load_run(folder, device="cpu").encode_text(CAPTIONS)
    message = (
        "best.pth: its base weights are missing: .*gone.pth: No such file or directory; copy "
        ".*start.pth next to the checkpoint as base.pth"
    )
    with pytest.raises(UserError, match=message):
        load_run(moved, device="cpu")
    start = write_start(mini_root.parent / "start.pth")
    shutil.copy(start, moved / BASE)
    assert load_run(moved, device="cpu").encode_text(CAPTIONS).equal(expected)
    with open(moved / BASE, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="base.pth: other content than the base weights of .*best"):
        load_run(moved, device="cpu")


def test_a_checkpoint_whose_updates_do_not_fit_is_refused(folder, moved, mini_root):
    shutil.copy(write_start(mini_root.parent / "start.pth"), moved / BASE)
    state = load_checkpoint(folder / "best.pth")
    name = next(n for n in state["model"] if ".lora_A." in n)
    entry = state["lora"]
    for changed, message in (
        ({"model": {**state["model"], name: torch.ones(4, 3)}}, f"{name} does not fit the base"),
        ({"model": {**state["model"], name: torch.ones(4)}}, f"{name} does not fit the base"),
        ({"model": {n: v for n, v in state["model"].items() if ".lora_B." not in n}}, "not fit"),
        ({"lora": {**entry, "rank": 0}}, "its entry 'lora' does not name its base weights"),
        ({"lora": {**entry, "base": None}}, "its entry 'lora' does not name its base weights"),
        ({"lora": None}, "its entry 'lora' does not name its base weights"),
    ):
        save_checkpoint(moved / "best.pth", {**state, **changed})
        with pytest.raises(UserError, match=message):
            load_run(moved, device="cpu")


def test_an_export_has_plain_merged_weights(folder, tmp_path, monkeypatch, capsys):
    run(export.main, monkeypatch, "--config_file", folder / "configs.yaml",
        "--output", tmp_path / "plain", "--hub", tmp_path / "hub")  # fmt: skip
    expected = load_run(folder, device="cpu").encode_text(CAPTIONS)
    plain = load_checkpoint(tmp_path / "plain/best.pth")
    assert not [n for n in plain["model"] if ".lora_" in n] and "lora" not in plain
    assert "base_model.transformer.resblocks.0.attn.in_proj_weight" in plain["model"]
    for exported in ("plain", "hub"):
        loaded = load_run(tmp_path / exported, device="cpu", precision="fp32")
        assert loaded.encode_text(CAPTIONS).equal(expected)


def test_a_run_starts_from_merged_weights_and_not_from_updates_alone(
    folder, mini_root, tmp_path, monkeypatch
):
    with pytest.raises(
        UserError, match="has LoRA's updates without their base weights; write both"
    ):
        trained(mini_root, tmp_path / "a", finetune=folder / "best.pth")
    run(export.main, monkeypatch, "--config_file", folder / "configs.yaml", "--output", tmp_path)
    few = {"num_epoch": 1, "warmup_epochs": 0, "lr": 1e-12}
    again = trained(mini_root, tmp_path / "b", finetune=tmp_path / "best.pth", **few)
    encoded = [load_run(f, device="cpu").encode_text(CAPTIONS) for f in (folder, again)]
    torch.testing.assert_close(*encoded, rtol=1e-4, atol=1e-5)


def test_a_base_must_be_complete(mini_root, tmp_path):
    state = load_checkpoint(write_start(mini_root.parent / "start.pth"))
    del state["model"]["base_model.ln_final.bias"]
    save_checkpoint(tmp_path / "part.pth", state)
    message = "part.pth: base_model.ln_final.bias is missing or has another shape, but LoRA needs"
    with pytest.raises(UserError, match=message):
        trained(mini_root, tmp_path / "a", finetune=tmp_path / "part.pth")
    with pytest.raises(UserError, match="random weights are no base to update; give a checkpoint"):
        trained(mini_root, tmp_path / "a", finetune="")


def test_pretrained_weights_of_another_grid_and_half_precision_are_a_base(
    mini_root, tmp_path, monkeypatch, capsys
):
    torch.save({name: value.half() for name, value in golden_clip().items()}, tmp_path / "clip.pt")
    sizes = {name: OPTIONS[name].default for name in SCRATCH}  # those of the file
    folder = trained(mini_root, tmp_path / "logs", finetune="", img_size=(64, 32), num_epoch=2,
                     **{**sizes, "pretrain_choice": tmp_path / "clip.pt"})  # fmt: skip
    capsys.readouterr()
    for precision in ("fp32", "half", "fp64"):
        run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml",
            "--precision", precision)  # fmt: skip
        assert "training at epoch" in (shown := capsys.readouterr().out)
        assert precision == "half" or ": equal" in shown


def test_a_run_is_not_resumed_with_another_base(folder, mini_root, tmp_path, monkeypatch):
    start = write_start(tmp_path / "start.pth")
    shutil.copy(start, tmp_path / "kept.pth")
    mine = trained(mini_root, tmp_path / "logs", finetune=start, num_epoch=1, warmup_epochs=0)
    argv = ["--resume", "--resume_ckpt_file", mine / "last.pth", "--num_epoch", 2]
    with pytest.raises(UserError, match="last.pth: a run with --lora_rank; only a new run can"):
        run(train_entry.main, monkeypatch, *argv, "--lora_rank", 0, "--lora_alpha", 16)
    save_checkpoint(start, {**load_checkpoint(start), "epoch": 3})
    with pytest.raises(UserError, match="start.pth: other content than the base weights of .*last"):
        run(train_entry.main, monkeypatch, *argv)
    shutil.copy(tmp_path / "kept.pth", start)
    run(train_entry.main, monkeypatch, *argv)
    assert load_checkpoint(mine / "last.pth")["epoch"] == 2
