"""`--finetune`: other projects' checkpoints, whatever their grid, precision, prefix and heads."""

import re

import pytest
import torch

from model.build import build_evaluation_model, build_model, load_fitting
from model.weights import _possible_grids
from tests.helpers import golden_clip, options
from tests.model.test_backbone import fitted
from utils.checkpoint import load_checkpoint, save_checkpoint
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
    found = rows(load_fitting(target, load_checkpoint(path), path))
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
    for rows, columns in ((24, 8), grid):  # of 384x128, and of its own images
        assert _possible_grids(grid[0] * grid[1], rows / columns)[0] == grid


def test_a_ramp_over_the_rows_survives_the_way_to_a_finer_grid_and_back(clip_file):
    coarse, fine = (model_of(clip_file, s, size=(384, 128)).base_model for s in (16, 8))
    name = "visual.positional_embedding"
    ramp = torch.arange(24.0)[:, None].expand(24, 8).reshape(-1, 1).expand(-1, 128)
    start = {**golden_clip(), name: torch.cat([torch.zeros(1, 128), ramp])}
    there = fitted(start, fine)
    assert there[name].shape[0] == 1 + 47 * 15
    back = fitted(there, coarse)[name]
    assert torch.equal(back[0], torch.zeros(128))
    # Bilinear sampling blurs by less than half a step; the ends, beyond the samples, are clamped.
    torch.testing.assert_close(back[1:], ramp, rtol=0, atol=0.3)


def test_a_number_of_patches_that_is_no_grid_is_refused(clip_file):
    target = model_of(clip_file, 16).base_model
    odd = {**golden_clip(), "visual.positional_embedding": torch.zeros(1 + 97, 128)}
    with pytest.raises(UserError, match="97 patches form no grid of about 3:1"):
        fitted(odd, target)


POSITION = "visual.positional_embedding"


def ramp(rows, columns):
    """Positions that say their row, of the class token 0."""
    grid = torch.arange(1.0, rows + 1)[:, None].expand(rows, columns)
    return torch.cat([torch.zeros(1), grid.flatten()])[:, None].expand(-1, 128)


def resized(old, new):
    grid = ramp(*old)[1:, 0].view(1, 1, *old)
    return torch.nn.functional.interpolate(grid, size=new, mode="bilinear")[0, 0]


def rows_of(model):
    return model.base_model.visual.positional_embedding.detach()[1:, 0].view(*model.base_model.grid)


@pytest.mark.parametrize(
    ("old", "new"),
    [((256, 128), (128, 256)), ((256, 64), (384, 128)), ((256, 64), (128, 128)), ((128, 128), (256, 64)),
     ((224, 224), (448, 112)), ((448, 112), (224, 224))],
)  # fmt: skip
def test_a_checkpoint_says_its_grid_and_is_resized_from_it(old, new, clip_file, tmp_path):
    """The numbers of patches are those of other grids, too."""
    source = model_of(clip_file, 16, size=old)
    grid = source.base_model.grid
    with torch.no_grad():
        source.base_model.visual.positional_embedding.copy_(ramp(*grid))
    content = {"model": source.state_dict(), "input": source.base_model.input}
    save_checkpoint(tmp_path / "best.pth", content)
    target = model_of(clip_file, None, size=new)
    report = load_fitting(target, load_checkpoint(tmp_path / "best.pth"), "best.pth")
    torch.testing.assert_close(rows_of(target), resized(grid, target.base_model.grid))
    assert rows(report)["resized"] == 1 and "taken as" not in report
    evaluated = options(img_size=list(new), pretrain_choice=str(clip_file))
    with pytest.raises(UserError, match=f"of images of {old[0]}x{old[1]} at stride 16, the options say {new[0]}x{new[1]}"):  # fmt: skip
        build_evaluation_model(evaluated, load_checkpoint(tmp_path / "best.pth"), "best.pth")


def test_square_pretraining_weights_are_resized_for_a_grid_of_as_many_patches(tmp_path):
    torch.save({**golden_clip(), POSITION: ramp(14, 14)}, tmp_path / "clip.pt")
    model = model_of(tmp_path / "clip.pt", None, size=(448, 112))
    torch.testing.assert_close(rows_of(model), resized((14, 14), (28, 7)))
    (told,) = [note for note in model.base_model.notes if "patches" in note]
    assert (
        "its 196 patches are taken as 14 rows of 14 (it could be 28x7); here they are 28x7" in told
    )


@pytest.mark.parametrize(
    ("count", "size", "grid", "others"),
    [(196, (448, 112), (28, 7), "14x14"), (64, (384, 128), (8, 8), "16x4"), (192, (384, 128), (24, 8), "")],
)  # fmt: skip
def test_what_is_assumed_of_a_checkpoint_of_others_is_told(count, size, grid, others, clip_file):
    weights = {f"base_model.{name}": value for name, value in golden_clip().items()}
    weights[f"base_model.{POSITION}"] = ramp(*grid)
    target = model_of(clip_file, None, size=size)
    report = load_fitting(target, {"model": weights}, "irra.pth")
    torch.testing.assert_close(rows_of(target), resized(grid, target.base_model.grid))
    told = f"taken as {grid[0]} rows of {grid[1]} (it could be {others})"
    assert (told in report) if others else ("taken as" not in report)


@pytest.mark.parametrize(
    "odd", [{"img_size": [64, 64], "stride_size": 16}, {"img_size": [1, 1], "stride_size": 1}]
)
def test_a_grid_that_is_not_of_the_checkpoints_positions_is_refused(odd, clip_file):
    model = model_of(clip_file, 16)
    content = {"model": model.state_dict(), "input": odd}
    with pytest.raises(UserError, match="has 12 patches, not those of "):
        load_fitting(model, content, "x.pth")
    for other in (3, {"img_size": 64}, {"img_size": [0, 1]}, {"img_size": ["a", "b"]}, {}):
        load_fitting(model, {**content, "input": other}, "x.pth")  # of others; nothing of ours
