from dataclasses import replace

import open_clip
import pytest
import torch
import yaml

import test as test_entry
import tools.export as tool
import train as train_entry
from datasets.loaders import image_loader
from datasets.transforms import normalise
from model.backbone import load_backbone
from model.build import build_evaluation_model
from model.weights import BackboneConfig
from tests.helpers import SCRATCH, filled, golden, golden_clip, noise, options, read, run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.command_line import parse_test_options
from utils.config import read_yaml, write_config
from utils.errors import UserError


def small_run(monkeypatch, root, out, **more):
    values = {
        "root_dir": root, "output_dir": out, "batch_size": 6, "num_epoch": 1, "warmup_epochs": 0,
        "num_workers": 0, "device": "cpu", "precision": "fp32", "cmt_depth": 1, **SCRATCH, **more,
    }  # fmt: skip
    words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
    run(train_entry.main, monkeypatch, *words, "--img_size", 32, 16, "--MLM")
    return next(out.glob("*/*/configs.yaml"))


def test_an_export_has_the_familys_names_and_gives_the_same_features(
    mini_root, tmp_path, monkeypatch, capsys
):
    names = "supkl+queue+match2+dot+id+mlm"
    config = small_run(monkeypatch, mini_root, tmp_path / "logs", loss_names=names)
    out = tmp_path / "exported"
    run(tool.main, monkeypatch, "--config_file", config, "--output", out)
    checkpoint, exported = (load_checkpoint(f / "best.pth") for f in (config.parent, out))
    weights = checkpoint["model"]
    assert exported["best"] == checkpoint["best"]  # so test.py still reports what chose the epoch
    left_out = {"queue.text", "queue.aerial", "queue.pids", "classifier.weight", "classifier.bias"}
    assert set(weights) - set(exported["model"]) == left_out
    assert "classifier of 8 identities is left out" in capsys.readouterr().out
    assert all(torch.equal(value, weights[name]) for name, value in exported["model"].items())
    text = (out / "configs.yaml").read_text()
    assert "img_size: !!python/tuple\n- 32\n- 16\n" in text
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(text)  # because of the tag, as in the family's files
    args, _, notes = parse_test_options(["--config_file", str(out / "configs.yaml")])
    assert args.stride_size == 16 and args.output_dir == str(out) and not notes
    # The same features, so the same metrics.
    features = []
    for file in (config, out / "configs.yaml"):
        args, path, _ = parse_test_options(["--config_file", str(file), "--num_workers", "0"])
        model = build_evaluation_model(args, load_checkpoint(path), str(path)).eval()
        images = read("AGData", mini_root).splits["test"].galleries["aerial"].images
        with torch.no_grad():
            features.append(model.encode_image(normalise(next(iter(image_loader(images, args, torch.device("cpu")))))))  # fmt: skip
    assert torch.equal(*features)
    # Here the sizes in SCRATCH are read from the weights.
    run(test_entry.main, monkeypatch, "--config_file", out / "configs.yaml", "--root_dir", mini_root)  # fmt: skip
    assert "aerial, AG-ReID" in capsys.readouterr().out


@pytest.mark.parametrize("head", sorted(golden()["head_state_shapes"]))
def test_exported_heads_have_the_shapes_that_the_original_loads_strictly(
    head, clip_file, tmp_path, monkeypatch
):
    """Weights with the original's names and shapes come out with the same names and shapes."""
    shapes = golden()["head_state_shapes"][head]
    weights = {f"base_model.{n}": v for n, v in filled(golden()["clip_state_shapes"]).items()}
    weights["base_model.visual.positional_embedding"] = torch.zeros(13, 128)
    weights |= filled(shapes)
    save_checkpoint(tmp_path / "best.pth", {"model": weights, "epoch": 7})
    loss = {"dot": "match2+dot", "cat": "match2+cat"}.get(head, "sdm")
    write_config(tmp_path / "configs.yaml", options(loss_names=loss))
    run(tool.main, monkeypatch, "--config_file", tmp_path / "configs.yaml", "--output", tmp_path / "x")  # fmt: skip
    exported = load_checkpoint(tmp_path / "x/best.pth")
    assert exported["epoch"] == 7 and list(exported["model"]) == list(weights)


def test_half_precision_and_other_architectures(tmp_path, clip_file, monkeypatch):
    weights = {f"base_model.{n}": v for n, v in golden_clip().items()}
    weights["base_model.visual.positional_embedding"] = torch.zeros(13, 128)
    save_checkpoint(tmp_path / "best.pth", {"model": weights})
    write_config(tmp_path / "configs.yaml", options())
    arguments = ("--config_file", tmp_path / "configs.yaml", "--output", tmp_path / "x")
    run(tool.main, monkeypatch, *arguments, "--half")
    half = load_checkpoint(tmp_path / "x/best.pth")["model"]
    assert {v.dtype for v in half.values()} == {torch.float16}
    write_config(tmp_path / "configs.yaml", options(pretrain_choice="ViT-B-16/laion2b_s34b_b88k"))
    with pytest.raises(UserError):
        run(tool.main, monkeypatch, *arguments)


def exported(folder, monkeypatch, capsys, model=None, **values):
    """Export a checkpoint of the golden CLIP. Returns the options, the checkpoint and the output."""
    weights = {f"base_model.{n}": v for n, v in golden_clip().items()}
    weights["base_model.visual.positional_embedding"] = noise((13, 128), 3)
    content = {"img_size": [96, 32], "stride_size": 16}
    save_checkpoint(folder / "best.pth", {"model": {**weights, **(model or {})}, "input": content})
    write_config(folder / "configs.yaml", options(**values))
    run(tool.main, monkeypatch, "--config_file", folder / "configs.yaml", "--output", folder / "x")
    written = read_yaml(folder / "x/configs.yaml")
    return written, load_checkpoint(folder / "x/best.pth"), capsys.readouterr().out


@torch.no_grad()
def test_a_run_with_short_text_length_is_exported_with_all_columns_and_the_same_features(
    clip_file, tmp_path, monkeypatch, capsys
):
    """The original adds all 77 positions to a caption; attention is causal, so nothing changes."""
    written, checkpoint, notes = exported(
        tmp_path, monkeypatch, capsys, pretrain_choice=str(clip_file), text_length=12
    )
    positions = checkpoint["model"]["base_model.positional_embedding"]
    assert written["text_length"] == len(positions) == 77
    assert "text_length is 77" in notes and "captions that --text_length 12 cuts short" in notes
    captions, features = ["a man with a bag", "a woman in a red coat and boots"], []
    for folder in (tmp_path, tmp_path / "x"):
        args, path, _ = parse_test_options(["--config_file", str(folder / "configs.yaml")])
        model = build_evaluation_model(args, load_checkpoint(path), str(path)).eval()
        ids = open_clip.tokenize(captions, context_length=args.text_length)
        features.append(model.encode_text(ids))
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-5)


def test_an_export_has_everything_that_the_originals_test_needs(
    clip_file, tmp_path, monkeypatch, capsys
):
    """It builds the model from CLIP weights, sets the size of `queue`, and loads strictly."""
    head = {"classifier.weight": torch.ones(7, 64), "classifier.bias": torch.ones(7)}
    written, checkpoint, notes = exported(
        tmp_path, monkeypatch, capsys, head, pretrain_choice=f"ViT-B/16@{clip_file}",
        loss_names="supkl+queue+id", batch_size=6, slack=0.3, dataset_name="G2APS",
    )  # fmt: skip
    assert written["cont_queue_size"] == 18
    assert not set(head) & set(checkpoint["model"])
    assert "classifier of 7 identities is left out" in notes and "no data set G2APS" in notes
    assert "the original has no --slack 0.3\n" in notes
    assert checkpoint["input"] == {"img_size": [96, 32], "stride_size": 16}
    clip = torch.load(written["pretrain_choice"], weights_only=True)
    for name, value in checkpoint["model"].items():
        assert torch.equal(clip[name.removeprefix("base_model.")], value)
    again = load_backbone(written["pretrain_choice"], (96, 32))
    assert torch.equal(again.state_dict()["visual.proj"], clip["visual.proj"])
    assert not any("patches" in note for note in again.notes)  # its grid is stored in the file


def test_a_run_of_openais_weights_is_exported_without_differences(tmp_path, monkeypatch, capsys):
    written, _, notes = exported(tmp_path, monkeypatch, capsys)
    assert written["pretrain_choice"] == "ViT-B/16" and len(notes.splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["best.pth", "configs.yaml"]


@pytest.mark.parametrize("other", [{"image_mean": (0.5, 0.5, 0.5)}, {"mlp_ratio": 3.0}, {"quick_gelu": False},
                                   {"text_heads": 2}, {"head_width": 80}])  # fmt: skip
def test_an_architecture_that_the_original_cannot_build_is_refused(other):
    config = BackboneConfig(64, 2, 128, 16, 64, 2)
    tool.check_openai(config, "best.pth")
    with pytest.raises(UserError, match="best.pth has another activation, other heads or another"):
        tool.check_openai(replace(config, **other), "best.pth")
