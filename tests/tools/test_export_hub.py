"""A run as a folder in Hugging Face's habit: loaded again, with the same features bit for bit."""

import json
import shutil

import pytest
import torch
from PIL import Image as PILImage

import test as test_entry
import tools.export as tool
import train as train_entry
from gallery.encode import load_encoder, run_encoder, weights_encoder
from model.backbone import load_backbone
from processor.inference import load_run
from tests.helpers import SCRATCH, golden_clip, noise, options, run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import write_config
from utils.errors import UserError

CAPTIONS = ["A man in a grey shirt with a black backpack.", "a woman"]


@pytest.fixture(scope="module")
def trained(mini_root, tmp_path_factory):
    """A short run with FIRM's head, evaluated."""
    out = tmp_path_factory.mktemp("runs")
    values = {
        "root_dir": mini_root, "output_dir": out, "batch_size": 6, "num_epoch": 1,
        "warmup_epochs": 0, "num_workers": 0, "device": "cpu", "precision": "fp32",
        "loss_names": "supkl+queue+match2+dot+id", "name": "a_run", **SCRATCH,
    }  # fmt: skip
    words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(train_entry.main, monkeypatch, *words, "--img_size", 32, 16)
        folder = next(out.glob("*/*"))
        run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
        run(tool.main, monkeypatch, "--config_file", folder / "configs.yaml", "--hub", out / "hub")
    return folder, out / "hub"


def features(loaded, root):
    images = sorted(map(str, root.rglob("*.jpg")))[:6]
    return loaded.encode_text(CAPTIONS), loaded.encode_image(images)


def test_the_exported_run_gives_the_same_features_and_attributes(trained, mini_root):
    loaded = [load_run(folder, device="cpu") for folder in trained]
    before, after = (features(one, mini_root) for one in loaded)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    guesses = [one.model.predict_attributes(f[1]) for one, f in zip(loaded, (before, after), strict=True)]  # fmt: skip
    assert torch.equal(*guesses)
    assert not loaded[1].notes


def test_it_holds_no_classifier_no_queue_and_no_paths(trained, mini_root):
    folder, hub = trained
    names = set(load_checkpoint(hub / "model.safetensors")["model"])
    left_out = set(load_checkpoint(folder / "best.pth")["model"]) - names
    assert {n.split(".")[0] for n in left_out} == {"queue", "classifier"}
    for file in hub.iterdir():
        assert str(mini_root).encode() not in file.read_bytes(), file
        assert str(folder.parent).encode() not in file.read_bytes(), file
    assert sorted(f.name for f in hub.iterdir()) == ["README.md", "attributes.yaml", "config.json", "model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("place", ["hub", "hub/config.json"])
def test_test_py_evaluates_it_with_the_same_metrics(
    place, trained, mini_root, tmp_path, monkeypatch, capsys
):
    folder, hub = trained
    shutil.copytree(hub, tmp_path / "hub")
    words = ("--config_file", tmp_path / place, "--root_dir", mini_root, "--num_workers", 0)
    run(test_entry.main, monkeypatch, *words)
    printed = capsys.readouterr()
    assert "model.safetensors: cpu" in printed.out + printed.err  # and not "epoch None"
    written = [json.loads(p.read_text())["splits"] for p in (folder / "test_results.json", tmp_path / "hub/model_results.json")]  # fmt: skip
    assert written[0]["test"] == written[1]["test"]


def test_training_starts_from_it_bit_for_bit(trained, mini_root, tmp_path, monkeypatch):
    folder, hub = trained
    backbone = load_backbone(str(hub), (32, 16))
    assert not backbone.notes
    weights = load_checkpoint(folder / "best.pth")["model"]
    assert all(torch.equal(v, weights[f"base_model.{n}"]) for n, v in backbone.state_dict().items())
    # Another image size resizes its positions, whose grid config.json records.
    assert load_backbone(str(hub), (64, 32)).visual.positional_embedding.shape[0] == 1 + 4 * 2
    values = {"root_dir": mini_root, "output_dir": tmp_path, "pretrain_choice": hub, "num_epoch": 1,
              "warmup_epochs": 0, "batch_size": 6, "num_workers": 0, "device": "cpu", "precision": "fp32",
              "loss_names": "itc", "lr": "1e-20"}  # fmt: skip
    words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
    run(train_entry.main, monkeypatch, *words, "--img_size", 32, 16)
    (path,) = tmp_path.glob("*/*/best.pth")
    again = load_checkpoint(path)["model"]
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(again[f"base_model.{name}"], value, rtol=0, atol=1e-15)


def test_the_card_has_the_runs_own_results_and_what_a_reader_must_know(trained):
    folder, hub = trained
    card = (hub / "README.md").read_text()
    results = json.loads((folder / "test_results.json").read_text())["splits"]["test"]
    for name, values in results["galleries"].items():
        rows = [[cell.strip() for cell in line.split("|")] for line in card.splitlines()]
        (cells,) = (row[2:-1] for row in rows if row[1:2] == [name])
        assert cells == [str(values["queries"]), str(values["gallery"]), *(f"{values[m]:.2f}" for m in ("R@1", "R@5", "R@10", "mAP", "mINP", "RSum"))]  # fmt: skip
    for text in ("license: other", "## Limits", "## Responsible use", "random weights", "# a_run", "8 identities"):  # fmt: skip
        assert text in card, text


def checkpoint_of(folder, choice, **more):
    """A run of the golden CLIP's weights in a folder; returns its configs.yaml."""
    weights = {f"base_model.{n}": v for n, v in golden_clip().items()}
    weights["base_model.visual.positional_embedding"] = noise((13, 128), 3)
    content = {"model": weights, "input": {"img_size": [96, 32], "stride_size": 16}, **more}
    save_checkpoint(folder / "best.pth", content)
    write_config(folder / "configs.yaml", options(pretrain_choice=choice))
    return folder / "configs.yaml"


def test_a_run_that_was_not_evaluated_says_so_and_a_path_is_left_out(tmp_path, monkeypatch):
    config = checkpoint_of(tmp_path, "ViT-B/16@/home/somebody/clip.pt")
    run(tool.main, monkeypatch, "--config_file", config, "--hub", tmp_path / "hub")
    card, written = ((tmp_path / "hub" / n).read_text() for n in ("README.md", "config.json"))
    assert "was not evaluated" in card and "ViT-B/16" in card and "/home" not in card + written
    assert json.loads(written)["pretrain_choice"] == "ViT-B/16"
    assert not (tmp_path / "hub/attributes.yaml").exists()


def test_a_card_of_others_is_never_replaced(tmp_path, monkeypatch):
    config, hub = checkpoint_of(tmp_path, "ViT-B/16"), tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("a project of mine")
    words = ("--config_file", config, "--hub", hub)
    with pytest.raises(UserError, match="--hub .*hub: its README.md is not of an export"):
        run(tool.main, monkeypatch, *words)
    assert [path.name for path in hub.iterdir()] == ["README.md"]
    (hub / "README.md").unlink()
    run(tool.main, monkeypatch, *words)
    card = (hub / "README.md").read_text()
    run(tool.main, monkeypatch, *words)
    assert not (hub / "README.new.md").exists()
    (hub / "README.md").write_text("edited")
    run(tool.main, monkeypatch, *words)
    assert (hub / "README.md").read_text() == "edited"
    assert (hub / "README.new.md").read_text() == card


def test_a_gallery_is_made_with_it_by_its_folder_its_file_and_its_image_size(trained, tmp_path):
    _, hub = trained
    pictures = [PILImage.new("RGB", (20, 40), colour) for colour in ("red", "blue")]
    expected = load_run(trained[0], device="cpu").encode_image(pictures)
    for place in (hub, hub / "config.json"):
        encoder = run_encoder(place, device="cpu")
        assert torch.equal(encoder.encode_image(pictures), expected)
        again = load_encoder({"encoder": encoder.about}, device="cpu")  # as find does
        assert torch.equal(again.encode_image(pictures), expected)
    vanilla = weights_encoder(str(hub), device="cpu", precision="fp32")
    assert vanilla.about["img_size"] == [32, 16]
    assert torch.equal(vanilla.encode_image(pictures), expected)
    with pytest.raises(UserError, match="other.yaml: not the configs.yaml of a run"):
        (tmp_path / "other.yaml").write_text("")
        run_encoder(tmp_path / "other.yaml")


def test_results_of_another_epoch_are_refused(trained, tmp_path, monkeypatch):
    config = checkpoint_of(tmp_path, "ViT-B/16", epoch=7)
    shutil.copy(trained[0] / "test_results.json", tmp_path)
    with pytest.raises(UserError, match="of epoch 1, but best.pth is of epoch 7; evaluate the run"):
        run(tool.main, monkeypatch, "--config_file", config, "--hub", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_model_whose_shapes_do_not_tell_its_architecture_needs_its_name(trained, tmp_path):
    hub = shutil.copytree(trained[1], tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "pretrain_choice": "ViT-B-16/laion2b_s34b_b88k"}))  # fmt: skip
    with pytest.raises(UserError, match=r"give --pretrain_choice ViT-B-16/laion2b_s34b_b88k@.*hub"):
        load_backbone(str(hub), (32, 16))


def test_a_folder_that_is_no_export_is_named(trained, tmp_path):
    with pytest.raises(UserError, match=r"--pretrain_choice .*/model.safetensors: no such file"):
        load_backbone(str(tmp_path), (32, 16))
    hub = shutil.copytree(trained[1], tmp_path / "hub")
    (hub / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: not of tools/export.py --hub"):
        load_backbone(str(hub), (32, 16))


def test_something_to_write_must_be_named(tmp_path, monkeypatch):
    config = checkpoint_of(tmp_path, "ViT-B/16")
    for words, message in (((), "nothing to write"), (("--hub", tmp_path / "x", "--half"), "--half is for --output")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(tool.main, monkeypatch, "--config_file", config, *words)
