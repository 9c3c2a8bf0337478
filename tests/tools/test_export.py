import pytest
import torch
import yaml

import test as test_entry
import tools.export as tool
import train as train_entry
from datasets.build import image_loader
from datasets.transforms import normalise
from model.build import build_evaluation_model
from tests.helpers import SCRATCH, filled, golden, golden_clip, options, read, run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.command_line import parse_test_options
from utils.errors import UserError
from utils.options import write_config


def small_run(monkeypatch, root, out, **more):
    values = {
        "root_dir": root, "output_dir": out, "batch_size": 6, "num_epoch": 1, "warmup_epochs": 0,
        "num_workers": 0, "device": "cpu", "precision": "fp32", "cmt_depth": 1, **SCRATCH, **more,
    }  # fmt: skip
    words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
    run(train_entry.main, monkeypatch, *words, "--img_size", 32, 16, "--MLM")
    return next(out.glob("*/*/configs.yaml"))


def test_an_export_has_the_familys_names_and_evaluates_the_same(
    mini_root, tmp_path, monkeypatch, capsys
):
    names = "supkl+queue+match2+dot+id+mlm"
    config = small_run(monkeypatch, mini_root, tmp_path / "logs", loss_names=names)
    out = tmp_path / "exported"
    run(tool.main, monkeypatch, "--config_file", config, "--output", out)
    ours = load_checkpoint(config.parent / "best.pth")["model"]
    exported = load_checkpoint(out / "best.pth")
    assert set(ours) - set(exported["model"]) == {"queue.text", "queue.aerial", "queue.pids"}
    assert all(torch.equal(value, ours[name]) for name, value in exported["model"].items())
    text = (out / "configs.yaml").read_text()
    assert "img_size: !!python/tuple\n- 32\n- 16\n" in text
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(text)  # the tag is there, as in the family's own files
    args, _, notes = parse_test_options(["--config_file", str(out / "configs.yaml")])
    assert args.stride_size == 16 and args.output_dir == str(out) and not notes
    # The same features, so the same figures.
    features = []
    for file in (config, out / "configs.yaml"):
        args, path, _ = parse_test_options(["--config_file", str(file), "--num_workers", "0"])
        model = build_evaluation_model(args, load_checkpoint(path)["model"], str(path)).eval()
        images = read("AGData", mini_root).splits["test"].galleries["aerial"].images
        with torch.no_grad():
            features.append(model.encode_image(normalise(next(iter(image_loader(images, args, torch.device("cpu")))))))  # fmt: skip
    assert torch.equal(*features)
    # SCRATCH's sizes are read off the weights here.
    run(test_entry.main, monkeypatch, "--config_file", out / "configs.yaml", "--root_dir", mini_root)  # fmt: skip
    assert "aerial, AG-ReID" in capsys.readouterr().out


@pytest.mark.parametrize("head", sorted(golden()["head_state_shapes"]))
def test_exported_heads_have_the_shapes_that_the_original_loads_strictly(
    head, clip_file, tmp_path, monkeypatch
):
    """The original's own names and shapes, filled, pass through here and come out the same."""
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
