"""Files of weights from any code, in any format."""

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


def assert_same(found, expected=WEIGHTS):
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def save_and_load(path, content):
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
def test_weights_are_found_in_every_entry_that_other_code_uses(wrapped, tmp_path):
    assert_same(save_and_load(tmp_path / "x.pth", wrapped(WEIGHTS))["model"])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module.module."]
)
def test_names_that_wrappers_add_are_removed(prefix, tmp_path):
    assert_same(
        save_and_load(tmp_path / "x.pth", {"model": {prefix + n: v for n, v in WEIGHTS.items()}})[
            "model"
        ]
    )
    inside = {
        "a._orig_mod.weight": WEIGHTS["a.weight"],
        "b._orig_mod.module_list.0": torch.zeros(1),
    }
    assert_same(save_and_load(tmp_path / "y.pth", inside)["model"])


def test_entries_other_than_the_weights_are_kept(tmp_path):
    found = save_and_load(
        tmp_path / "x.pth", {"state_dict": WEIGHTS, "epoch": 3, "best": {"R@1": 4.0}}
    )
    assert found["epoch"] == 3 and found["best"] == {"R@1": 4.0} and "assumed" not in found


def test_the_used_weights_are_reported_if_several_entries_have_some(tmp_path):
    ema = {name: value + 1 for name, value in WEIGHTS.items()}
    found = save_and_load(tmp_path / "x.pth", {"state_dict_ema": ema, "state_dict": WEIGHTS})
    assert_same(found["model"])
    assert found["assumed"].endswith("the weights of 'state_dict' are used, not 'state_dict_ema'")
    model = build_model(options(pretrain_choice="scratch"), [], 0)
    states = {name: dict(model.state_dict()) for name in ("model", "model_ema")}
    report = load_fitting(model, save_and_load(tmp_path / "y.pth", states), "y.pth")
    assert "the weights of 'model' are used, not 'model_ema'" in report


def test_two_weights_with_the_same_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="weights for 'a.weight' twice, once as 'module.a.weight'"):
        save_and_load(tmp_path / "x.pth", {**WEIGHTS, "module.a.weight": torch.zeros(2)})


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
def test_a_file_without_weights_is_refused_with_its_entries(content, held, tmp_path):
    with pytest.raises(
        UnusableFile, match=f"x.pth: not a checkpoint: no weights in it; it holds {held}$"
    ):
        save_and_load(tmp_path / "x.pth", content)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    with pytest.raises(UnusableFile, match="'model' holds itself"):
        save_and_load(tmp_path / "x.pth", content)


def test_the_content_shows_the_format_and_not_the_name(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "s.pth")
    torch.save(WEIGHTS, tmp_path / "t.safetensors")
    torch.save(WEIGHTS, tmp_path / "o.safetensors", _use_new_zipfile_serialization=False)
    for name in ("s.pth", "t.safetensors", "o.safetensors"):
        found = load_checkpoint(tmp_path / name)["model"]
        assert_same(found, {name: WEIGHTS[name] for name in found})
    torch.jit.save(torch.jit.script(Archive(golden_clip())), tmp_path / "jit.safetensors")
    found = load_checkpoint(tmp_path / "jit.safetensors")["model"]
    assert torch.equal(found["visual.proj"], golden_clip()["visual.proj"])
    for name, message in (
        ("x.safetensors", "as safetensors"),
        ("x.pth", "not a file of torch.save"),
    ):
        (tmp_path / name).write_bytes(b"neither of the formats")
        with pytest.raises(UnusableFile, match=message):
            load_checkpoint(tmp_path / name)


def test_a_refusal_says_how_to_convert_and_not_how_to_load_unsafely(tmp_path):
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
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    path = tmp_path / "last.pth"
    with pytest.raises(UserError, match="b holds NaN or infinite values. A lower --lr"):
        save_checkpoint(path, {"model": {"a": torch.ones(2), "b": torch.tensor([0, value])}})
    assert not list(tmp_path.iterdir())
    save_checkpoint(path, {"model": {"a": torch.ones(2)}, "optimizer": {"inf": value}}, keep=2)
    content = path.read_bytes()
    bad = {"n": torch.tensor(3), "a": torch.full((2,), value).half(), "b": torch.tensor(value)}
    with pytest.raises(UserError, match="a and 1 more hold NaN .* the save before this one stays"):
        save_checkpoint(path, {"model": bad}, keep=2)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]
    assert path.read_bytes() == content


def test_weights_that_are_not_finite_are_refused_by_name_by_every_reader(tmp_path):
    bad = {**golden_clip(), "visual.proj": golden_clip()["visual.proj"].clone()}
    bad["visual.proj"][3, 5] = float("nan")
    path = tmp_path / "bad.pt"
    torch.save(bad, path)
    message = "visual.proj holds NaN or infinite values"
    with pytest.raises(UserError, match=f"{path}: {message}"):
        build_model(options(pretrain_choice=str(path)), [], 0)
    finetuned = {f"base_model.{name}": value for name, value in bad.items()}
    finetuned["base_model.visual.positional_embedding"] = torch.zeros(13, 128)
    with pytest.raises(UserError, match=f"best.pth: base_model.{message}"):
        build_evaluation_model(options(), {"model": finetuned}, "best.pth")
    torch.save(golden_clip(), path)
    model = build_model(options(pretrain_choice=str(path)), [], 0)
    with pytest.raises(UserError, match=f"best.pth: base_model.{message}"):
        load_fitting(model, {"model": finetuned}, "best.pth")


def test_an_infinite_attention_mask_is_accepted(tmp_path):
    """OpenAI's archives hold that of the text encoder."""
    mask = {"transformer.resblocks.0.attn_mask": torch.full((77, 77), -float("inf")).triu(1)}
    torch.save({**golden_clip(), **mask}, tmp_path / "x.pt")
    build_model(options(pretrain_choice=str(tmp_path / "x.pt")), [], 0)
