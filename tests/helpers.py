"""Closed-form weights and inputs for the golden values, and helpers that many tests need."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

from datasets.registry import read_dataset
from utils.config import resolve

ROOT = Path(__file__).resolve().parent.parent


@cache
def golden() -> dict:
    """The golden values; see tests/golden/README.md."""
    return json.loads((ROOT / "tests/golden/golden.json").read_text())


@cache
def baselines() -> dict:
    """The golden values of RDE, TBPS-CLIP and CFAN; see tests/golden/README.md."""
    return json.loads((ROOT / "tests/golden/baselines.json").read_text())


def baseline_features(*names: str) -> list[torch.Tensor]:
    """Their normalised features `text`, `aerial` and `ground`, [6, 64]."""
    tensor = {"text": 0, "aerial": 1, "ground": 2}
    return [torch.nn.functional.normalize(noise((6, 64), tensor[n]), dim=1) for n in names]


def noise(shape, j, scale=1.0, offset=0.0, phase=0.0) -> torch.Tensor:
    """Tensor j: element i is offset + scale * (2 frac(43758.5453 sin(12.9898 i + 78.233 j + phase)) - 1)."""
    angle = 12.9898 * np.arange(int(np.prod(shape)), dtype=np.float64) + 78.233 * j + phase
    wave = np.sin(angle) * 43758.5453
    values = offset + scale * (2 * (wave - np.floor(wave)) - 1)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def filled(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights for these shapes: normalisation gains around 1, biases small, the rest within 0.15."""
    weights = {}
    for j, name in enumerate(sorted(shapes)):
        last = name.split(".")[-1]
        if last == "weight" and len(shapes[name]) == 1:
            scale, offset = 0.1, 1.0
        else:
            scale, offset = (0.05 if "bias" in last else 0.15), 0.0
        weights[name] = noise(shapes[name], j, scale, offset)
    return weights


@cache
def golden_clip() -> dict[str, torch.Tensor]:
    """The small CLIP's weights."""
    return filled(golden()["clip_state_shapes"])


def golden_batch(step: int = 0, two_views: bool = True) -> dict[str, torch.Tensor]:
    """The batch of a step, with masked captions."""
    saved = golden()["batches"][step]
    ids = torch.tensor(saved["caption_ids"])
    ids = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))  # `mlm` uses the padding too
    masked, labels = ids.clone(), torch.zeros_like(ids)
    labels[:, [2, 4]], masked[:, [2, 4]] = ids[:, [2, 4]], 49405
    batch = {
        "images": noise((4, 3, 96, 32), 2 * step, 1.5),
        "pids": torch.tensor(saved["pids"]),
        "caption_ids": ids,
        "attributes": torch.tensor(saved["attributes_aerial"]),
        "masked_ids": masked,
        "masked_labels": labels,
        "masked_at": labels.flatten().nonzero()[:, 0],
        **{
            f"{name}_images": noise((4, 3, 96, 32), 100 + 10 * step + i, 1.5)
            for i, name in enumerate(("second", "strong_1", "strong_2"))
        },
    }
    if two_views:
        batch["pair_images"] = noise((4, 3, 96, 32), 2 * step + 1, 1.5)
        batch["pair_attributes"] = torch.tensor(saved["attributes_ground"])
    return batch


def options(**values):
    """Resolved options; the defaults are float32, images of 96x32 and batches of four."""
    small = {"img_size": [96, 32], "batch_size": 4, "precision": "fp32", "num_workers": 0}
    small["attributes_file"] = str(ROOT / "configs/attributes.yaml")
    return resolve({**small, **values})


SCRATCH = {
    "pretrain_choice": "scratch", "embed_dim": 64, "vision_width": 64, "vision_layers": 1,
    "text_width": 64, "text_layers": 1,
}  # fmt: skip


def run(main, monkeypatch, *argv) -> None:
    """Call an entry point's main as if typed at the terminal, from the repository's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    main()


def read(name: str, root, **overrides):
    """A data set read by its name."""
    return read_dataset(options(dataset_name=name, root_dir=str(root), **overrides))
