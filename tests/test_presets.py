"""Every preset in configs/ trains, on a rendered data set of its layout and with a small model."""

import json
import re

import pytest

import train
from model.losses.registry import LOSSES
from solver.build import lr_at, settings_of
from tests.helpers import ROOT, SCRATCH, run
from utils.config import read_preset, resolve

PRESETS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.name != "attributes.yaml")
SMALL = {
    **SCRATCH, "batch_size": 8, "num_epoch": 1, "warmup_epochs": 0, "val_dataset": "last",
    "num_workers": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains(path, mini_root, rendered, tmp_path, monkeypatch):
    preset = read_preset(path)
    name = preset["dataset_name"]
    root = mini_root if name in ("AGDataAttr", "AGData", "AGSGData") else rendered(name)
    words = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    run(train.main, monkeypatch, "--config_file", path, *words, "--img_size", 32, 16,
        "--root_dir", root, "--output_dir", tmp_path, "--image_cache", tmp_path / "cache")  # fmt: skip
    (folder,) = (tmp_path / name).iterdir()
    (epoch,) = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    computed = {f"loss/{n}" for n in preset["loss_names"].split("+") if LOSSES[n].compute}
    assert epoch["loss/total"] > 0 and computed <= {*epoch}
    assert (folder / "best.pth").is_file()


@pytest.mark.parametrize(
    ("preset", "backbone", "new_layers"),
    [
        ("rde", (1e-5, 2e-5), ("head_tse_image.out.weight", 1e-3)),
        ("tbps_clip", (1e-4, 1e-4), ("head_simclr.0.weight", 1e-4)),
        ("cfan", (5e-6, 1e-5), ("head_fta.cross_queries.weight", 5e-5)),
        ("irra_aeri_ham", (5e-6, 1e-5), ("classifier.weight", 2.5e-5)),
    ],
)
def test_a_recipe_trains_its_layers_at_the_published_learning_rates(preset, backbone, new_layers):
    args = resolve(read_preset(ROOT / f"configs/{preset}.yaml"))
    names = [f"base_model.visual.conv1.{kind}" for kind in ("weight", "bias")] + [new_layers[0]]
    rates = [settings_of(name, args)[0] for name in names]
    assert rates == pytest.approx([*backbone, new_layers[1]])


def test_tbps_clips_schedule_is_its_published_one_in_steps_of_an_epoch():
    args = resolve(read_preset(ROOT / "configs/tbps_clip.yaml"))
    rates = [lr_at(epoch, args.lr, args) for epoch in range(args.num_epoch + 1)]
    # 1e-6 to 1e-4 in the first epoch, then along half a cosine to 5e-6
    assert rates == pytest.approx([5e-5, 1e-4, 8.61e-5, 5.25e-5, 1.89e-5, 5e-6], rel=1e-2)


def test_the_documentation_names_every_preset():
    page = (ROOT / "docs/training.md").read_text()
    assert {path.stem for path in PRESETS} <= {*re.findall(r"`(?:configs/)?(\w+)\.yaml`", page)}
