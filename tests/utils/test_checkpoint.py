"""Files of weights, whoever wrote them and however they are named."""

import argparse
import io
import tarfile

import pytest
import safetensors.torch
import torch

from model.build import build_evaluation_model, build_model, load_fitting
from tests.helpers import golden_clip, options
from tests.model.test_backbone import Archive
from utils.checkpoint import UnusableFile, load_checkpoint, save_checkpoint
from utils.errors import UserError

WEIGHTS = {"a.weight": torch.ones(2), "b.module_list.0": torch.zeros(1)}


def same(found, expected=WEIGHTS):
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved(path, content):
    torch.save(content, path)
    return load_checkpoint(path)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda w: w,
        lambda w: {"model": w},
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"module": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}},
        lambda w: {"model_state_dict": w, "config": {"model": "ViT"}, "model": {"name": "ViT"}},
        lambda w: {"state_dict_ema": w},
        lambda w: {"net": w, "acc": torch.tensor(0.5)},
        lambda w: {"checkpoint": 1, "model_ema": {"module": {"state_dict": w}}},
        lambda w: {"model": {"module": w}, "args": {"lr": 1.0}},
    ],
)
def test_weights_are_found_in_what_they_are_wrapped_in(wrapped, tmp_path):
    same(saved(tmp_path / "x.pth", wrapped(WEIGHTS))["model"])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module.module."]
)
def test_what_a_wrapper_adds_to_names_is_cut(prefix, tmp_path):
    same(saved(tmp_path / "x.pth", {"model": {prefix + n: v for n, v in WEIGHTS.items()}})["model"])
    inside = {
        "a._orig_mod.weight": WEIGHTS["a.weight"],
        "b._orig_mod.module_list.0": torch.zeros(1),
    }
    same(saved(tmp_path / "y.pth", inside)["model"])


def test_what_stands_beside_the_weights_is_kept(tmp_path):
    found = saved(tmp_path / "x.pth", {"state_dict": WEIGHTS, "epoch": 3, "best": {"R@1": 4.0}})
    assert found["epoch"] == 3 and found["best"] == {"R@1": 4.0} and "assumed" not in found


def test_of_several_the_one_taken_is_told(tmp_path):
    ema = {name: value + 1 for name, value in WEIGHTS.items()}
    found = saved(tmp_path / "x.pth", {"state_dict_ema": ema, "state_dict": WEIGHTS})
    same(found["model"])
    assert found["assumed"].endswith("the weights of 'state_dict' are used, not 'state_dict_ema'")
    model = build_model(options(pretrain_choice="scratch"), [], 0)
    states = {name: dict(model.state_dict()) for name in ("model", "model_ema")}
    report = load_fitting(model, saved(tmp_path / "y.pth", states), "y.pth")
    assert "the weights of 'model' are used, not 'model_ema'" in report


def test_two_weights_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="weights for 'a.weight' twice, once as 'module.a.weight'"):
        saved(tmp_path / "x.pth", {**WEIGHTS, "module.a.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"epoch": 3, "my_net": WEIGHTS}, r"epoch \(int\), my_net \(dict\)"),
        ({"model": {"name": "ViT"}}, r"model \(dict\)"),
        ([1, 2], "a list"),
        ({}, "nothing"),
        ({str(n): n for n in range(50)}, r"0 \(int\), .*11 \(int\), \.\.\."),
    ],
)
def test_without_weights_the_entries_of_the_file_are_told(content, held, tmp_path):
    with pytest.raises(
        UnusableFile, match=f"x.pth: not a checkpoint: no weights in it; it holds {held}$"
    ):
        saved(tmp_path / "x.pth", content)


def test_a_file_that_holds_itself_is_no_endless_search(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    with pytest.raises(UnusableFile, match="'model' holds itself"):
        saved(tmp_path / "x.pth", content)


def test_a_format_is_told_by_the_content_and_not_by_the_name(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "s.pth")
    torch.save(WEIGHTS, tmp_path / "t.safetensors")
    torch.save(WEIGHTS, tmp_path / "o.safetensors", _use_new_zipfile_serialization=False)
    for name in ("s.pth", "t.safetensors", "o.safetensors"):
        found = load_checkpoint(tmp_path / name)["model"]
        same(found, {name: WEIGHTS[name] for name in found})
    torch.jit.save(torch.jit.script(Archive(golden_clip())), tmp_path / "jit.safetensors")
    found = load_checkpoint(tmp_path / "jit.safetensors")["model"]
    assert torch.equal(found["visual.proj"], golden_clip()["visual.proj"])
    for name, what in (("x.safetensors", "as safetensors"), ("x.pth", "not a file of torch.save")):
        (tmp_path / name).write_bytes(b"neither of them")
        with pytest.raises(UnusableFile, match=what):
            load_checkpoint(tmp_path / name)


def test_a_refusal_says_how_to_convert_and_never_to_load_unsafely(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(UnusableFile) as first:
        load_checkpoint(path)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:  # torch.save of 2016
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UnusableFile) as second:
        load_checkpoint(path)
    assert "Unsupported global: GLOBAL argparse.Namespace" in str(first.value)
    for error in (first, second):
        assert str(error.value).startswith(f"{path}: refused")
        assert "convert it: load it with the code that wrote it, and save" in str(error.value)
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_written(value, tmp_path):
    path = tmp_path / "last.pth"
    with pytest.raises(UserError, match="b holds NaN or infinite values. A lower --lr"):
        save_checkpoint(path, {"model": {"a": torch.ones(2), "b": torch.tensor([0, value])}})
    assert not list(tmp_path.iterdir())
    save_checkpoint(path, {"model": {"a": torch.ones(2)}, "optimizer": {"inf": value}}, keep=2)
    content = path.read_bytes()
    dead = {"n": torch.tensor(3), "a": torch.full((2,), value).half(), "b": torch.tensor(value)}
    with pytest.raises(UserError, match="a and 1 more hold NaN .* the save before this one stays"):
        save_checkpoint(path, {"model": dead}, keep=2)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]
    assert path.read_bytes() == content


def test_weights_that_are_not_finite_are_refused_by_name_wherever_they_are_read(tmp_path):
    dead = {**golden_clip(), "visual.proj": golden_clip()["visual.proj"].clone()}
    dead["visual.proj"][3, 5] = float("nan")
    path = tmp_path / "dead.pt"
    torch.save(dead, path)
    says = "visual.proj holds NaN or infinite values"
    with pytest.raises(UserError, match=f"{path}: {says}"):
        build_model(options(pretrain_choice=str(path)), [], 0)
    family = {f"base_model.{name}": value for name, value in dead.items()}
    family["base_model.visual.positional_embedding"] = torch.zeros(13, 128)
    with pytest.raises(UserError, match=f"best.pth: base_model.{says}"):
        build_evaluation_model(options(), {"model": family}, "best.pth")
    torch.save(golden_clip(), path)
    model = build_model(options(pretrain_choice=str(path)), [], 0)
    with pytest.raises(UserError, match=f"best.pth: base_model.{says}"):
        load_fitting(model, {"model": family}, "best.pth")


def test_infinite_masks_that_are_no_weights_of_ours_do_no_harm(tmp_path):
    """OpenAI's own archives have the text encoder's."""
    mask = {"transformer.resblocks.0.attn_mask": torch.full((77, 77), -float("inf")).triu(1)}
    torch.save({**golden_clip(), **mask}, tmp_path / "x.pt")
    build_model(options(pretrain_choice=str(tmp_path / "x.pt")), [], 0)
