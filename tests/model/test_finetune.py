"""`--finetune`: other projects' checkpoints, whatever their grid, precision, prefix and heads."""

import re

import pytest
import torch

from model.backbone import _grid_of, resize_positions
from model.build import build_model, load_fitting
from tests.helpers import golden_clip, options
from utils.checkpoint import read_weights
from utils.errors import UserError


def model_of(clip_file, stride, names=(), classes=0, size=(96, 32)):
    args = options(pretrain_choice=str(clip_file), stride_size=stride, img_size=list(size))
    return build_model(args, names, num_classes=classes)


def rows(report):
    return {name: int(n) for name, n in re.findall(r"\| ([a-z][a-z, ]+?) +\| (\d+) +\|", report)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 16), (16, 8), (8, 16)])
def test_a_checkpoint_loads_with_its_grid_resized_in_both_directions(
    old, new, half, prefix, clip_file, tmp_path
):
    source = model_of(clip_file, old, ["id"], classes=7)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.uniform_(-1, 1)
    state = source.state_dict()
    saved = {prefix + n: v.half() if half else v for n, v in state.items()}
    torch.save({"model": saved, "optimizer": {"state": {}}, "epoch": 9}, tmp_path / "x.pth")

    target = model_of(clip_file, new, ["id", "match2", "dot"], classes=5)
    path = str(tmp_path / "x.pth")
    found = rows(load_fitting(target, read_weights(path), path))
    loaded = target.state_dict()
    position = "base_model.visual.positional_embedding"
    for name, value in state.items():
        if name.startswith("base_model.") and name != position:
            torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
    assert loaded[position].shape[0] == 1 + {16: 6 * 2, 8: 11 * 3}[new]
    torch.testing.assert_close(loaded[position][0], state[position][0], rtol=1e-3, atol=1e-3)
    assert found["resized"] == (old != new)
    assert found["skipped, other shape"] == 2  # the classifier of seven identities
    assert found["left as initialised"] == 4  # it, and FIRM's head
    clip = sum(n.startswith("base_model.") for n in state)
    assert found["loaded"] + found["resized"] == clip


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((384, 128), 16, 16), ((384, 128), 16, 8), ((384, 128), 16, 12), ((384, 128), 32, 32),
        ((224, 224), 16, 16), ((224, 224), 14, 14), ((256, 128), 16, 16), ((256, 128), 16, 8),
        ((224, 112), 16, 16), ((192, 64), 16, 8),
    ],
)  # fmt: skip
def test_the_grid_of_usual_sizes_and_strides_is_found_from_the_number_of_patches(
    size, patch, stride
):
    grid = tuple((side - patch) // stride + 1 for side in size)
    assert _grid_of(grid[0] * grid[1], (384, 128), "x") == grid
    assert _grid_of(grid[0] * grid[1], size, "x") == grid


def test_a_ramp_over_the_rows_survives_the_way_to_a_finer_grid_and_back(clip_file):
    coarse, fine = (model_of(clip_file, s, size=(384, 128)).base_model for s in (16, 8))
    name = "visual.positional_embedding"
    ramp = torch.arange(24.0)[:, None].expand(24, 8).reshape(-1, 1).expand(-1, 128)
    start = {**golden_clip(), name: torch.cat([torch.zeros(1, 128), ramp])}
    there = resize_positions(start, fine)
    assert there[name].shape[0] == 1 + 47 * 15
    back = resize_positions(there, coarse)[name]
    assert torch.equal(back[0], torch.zeros(128))
    # Bilinear sampling blurs by less than half a step; the ends, beyond the samples, are clamped.
    torch.testing.assert_close(back[1:], ramp, rtol=0, atol=0.3)


def test_a_number_of_patches_that_is_no_grid_is_refused(clip_file):
    target = model_of(clip_file, 16).base_model
    odd = {**golden_clip(), "visual.positional_embedding": torch.zeros(1 + 97, 128)}
    with pytest.raises(UserError, match="97 patches form no grid of about 3:1"):
        resize_positions(odd, target)
