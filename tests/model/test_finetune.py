"""`--finetune`: checkpoints of other projects, with any grid, precision, prefix and heads."""

import re

import pytest
import torch

from model.build import build_evaluation_model, build_model, load_fitting
from model.weights import _possible_grids
from tests.helpers import golden_clip, options
from tests.model.test_backbone import resized
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

POSITION = "visual.positional_embedding"


def model_of(clip_file, stride, names=(), classes=0, size=(96, 32)):
    args = options(pretrain_choice=str(clip_file), stride_size=stride, img_size=list(size))
    return build_model(args, names, num_classes=classes)


def counts_in(report):
    return {name: int(n) for name, n in re.findall(r"\| ([a-z][a-z, ]+?) +\| (\d+) +\|", report)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 16), (16, 8), (8, 16)])
def test_a_checkpoint_loads_and_its_grid_is_resized_in_both_directions(
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
    counts = counts_in(load_fitting(target, load_checkpoint(path), path))
    loaded = target.state_dict()
    position = "base_model.visual.positional_embedding"
    for name, value in state.items():
        if name.startswith("base_model.") and name != position:
            torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
    assert loaded[position].shape[0] == 1 + {16: 6 * 2, 8: 11 * 3}[new]
    torch.testing.assert_close(loaded[position][0], state[position][0], rtol=1e-3, atol=1e-3)
    assert counts["resized"] == (old != new)
    assert counts["skipped, other shape"] == 2  # the classifier of seven identities
    assert counts["left as initialised"] == 4  # the new classifier, and FIRM's head
    clip = sum(n.startswith("base_model.") for n in state)
    assert counts["loaded"] + counts["resized"] == clip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "losses", ["sdm+id+mlm", "cda+fta", "supkl+queue+match2+dot", "tal+tse+ccd"]
)
def test_weights_in_irras_naming_start_every_method(losses, half, prefix, clip_file, tmp_path):
    """As HAM and MLLM4Text-ReID publish them: IRRA's backbone, and heads that few losses have."""
    ones = torch.ones
    heads = {
        "classifier.weight": ones(11003, 64), "classifier.bias": ones(11003),
        "cross_attn.in_proj_weight": ones(192, 64), "cross_attn.in_proj_bias": ones(192),
        "ln_pre_t.weight": 2 * ones(64), "ln_pre_t.bias": ones(64),
        "mlm_head.dense.weight": ones(64, 64), "mlm_head.ln.bias": ones(64),
    }  # fmt: skip
    clip = {f"base_model.{name}": value + 0.25 for name, value in golden_clip().items()}
    saved = {prefix + n: v.half() if half else v for n, v in {**clip, **heads}.items()}
    torch.save({"model": saved, "epoch": 9}, tmp_path / "x.pth")
    target = model_of(clip_file, 16, losses.split("+"), classes=5, size=(64, 64))
    path = str(tmp_path / "x.pth")
    counts = counts_in(load_fitting(target, load_checkpoint(path), path))
    loaded = target.state_dict()
    for name, value in clip.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
    irra = "mlm" in losses
    assert counts["loaded"] == len(clip) + (6 if irra else 0)  # all heads but the classifier
    assert counts["skipped, other shape"] == (2 if irra else 0)
    assert not irra or loaded["ln_pre_t.weight"].eq(2).all()


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((384, 128), 16, 16), ((384, 128), 16, 8), ((384, 128), 16, 12), ((384, 128), 32, 32),
        ((224, 224), 16, 16), ((224, 224), 14, 14), ((256, 128), 16, 16), ((256, 128), 16, 8),
        ((224, 112), 16, 16), ((192, 64), 16, 8),
    ],
)  # fmt: skip
def test_the_number_of_patches_gives_the_grid_of_common_sizes_and_strides(size, patch, stride):
    grid = tuple((side - patch) // stride + 1 for side in size)
    for rows, columns in ((24, 8), grid):  # the shape of 384x128, and that of its own images
        assert _possible_grids(grid[0] * grid[1], rows / columns)[0] == grid


def test_resizing_a_ramp_of_rows_to_a_finer_grid_and_back_keeps_it(clip_file):
    coarse, fine = (model_of(clip_file, s, size=(384, 128)).base_model for s in (16, 8))
    rows = torch.arange(24.0)[:, None].expand(24, 8).reshape(-1, 1).expand(-1, 128)
    start = {**golden_clip(), POSITION: torch.cat([torch.zeros(1, 128), rows])}
    finer = resized(start, fine)
    assert finer[POSITION].shape[0] == 1 + 47 * 15
    back = resized(finer, coarse)[POSITION]
    assert torch.equal(back[0], torch.zeros(128))
    # Bilinear sampling blurs by less than half a row; the ends, outside the samples, are clamped.
    torch.testing.assert_close(back[1:], rows, rtol=0, atol=0.3)


def test_a_number_of_patches_that_forms_no_grid_is_refused(clip_file):
    target = model_of(clip_file, 16).base_model
    weights = {**golden_clip(), POSITION: torch.zeros(1 + 97, 128)}
    with pytest.raises(UserError, match="97 patches form no grid of about 3:1"):
        resized(weights, target)


def ramp(rows, columns):
    """Positions whose value is the number of their row; the class token's value is 0."""
    grid = torch.arange(1.0, rows + 1)[:, None].expand(rows, columns)
    return torch.cat([torch.zeros(1), grid.flatten()])[:, None].expand(-1, 128)


def resized_ramp(old, new):
    grid = ramp(*old)[1:, 0].view(1, 1, *old)
    return torch.nn.functional.interpolate(grid, size=new, mode="bilinear")[0, 0]


def position_grid(model):
    return model.base_model.visual.positional_embedding.detach()[1:, 0].view(*model.base_model.grid)


@pytest.mark.parametrize(
    ("old", "new"),
    [((256, 128), (128, 256)), ((256, 64), (384, 128)), ((256, 64), (128, 128)), ((128, 128), (256, 64)),
     ((224, 224), (448, 112)), ((448, 112), (224, 224))],
)  # fmt: skip
def test_a_checkpoint_records_its_grid_and_is_resized_from_it(old, new, clip_file, tmp_path):
    """The numbers of patches are also possible for other grids."""
    source = model_of(clip_file, 16, size=old)
    grid = source.base_model.grid
    with torch.no_grad():
        source.base_model.visual.positional_embedding.copy_(ramp(*grid))
    content = {"model": source.state_dict(), "input": source.base_model.input}
    save_checkpoint(tmp_path / "best.pth", content)
    target = model_of(clip_file, None, size=new)
    report = load_fitting(target, load_checkpoint(tmp_path / "best.pth"), "best.pth")
    expected = resized_ramp(grid, target.base_model.grid)
    torch.testing.assert_close(position_grid(target), expected)
    assert counts_in(report)["resized"] == 1 and "assumed" not in report
    args = options(img_size=list(new), pretrain_choice=str(clip_file))
    with pytest.raises(UserError, match=f"trained on images of {old[0]}x{old[1]} at stride 16, the options say {new[0]}x{new[1]}"):  # fmt: skip
        build_evaluation_model(args, load_checkpoint(tmp_path / "best.pth"), "best.pth")


def test_square_pretraining_weights_are_resized_for_a_grid_with_the_same_number_of_patches(
    tmp_path,
):
    torch.save({**golden_clip(), POSITION: ramp(14, 14)}, tmp_path / "clip.pt")
    model = model_of(tmp_path / "clip.pt", None, size=(448, 112))
    torch.testing.assert_close(position_grid(model), resized_ramp((14, 14), (28, 7)))
    (note,) = [note for note in model.base_model.notes if "patches" in note]
    assert "its 196 patches are assumed to be 14 rows of 14 (or could be 28x7)" in note
    assert note.endswith("this model has 28x7")


@pytest.mark.parametrize(
    ("count", "size", "grid", "others"),
    [(196, (448, 112), (28, 7), "14x14"), (64, (384, 128), (8, 8), "16x4"), (192, (384, 128), (24, 8), "")],
)  # fmt: skip
def test_the_assumed_grid_of_another_projects_checkpoint_is_reported(
    count, size, grid, others, clip_file
):
    weights = {f"base_model.{name}": value for name, value in golden_clip().items()}
    weights[f"base_model.{POSITION}"] = ramp(*grid)
    target = model_of(clip_file, None, size=size)
    report = load_fitting(target, {"model": weights}, "irra.pth")
    expected = resized_ramp(grid, target.base_model.grid)
    torch.testing.assert_close(position_grid(target), expected)
    note = (
        f"its {count} patches are assumed to be {grid[0]} rows of {grid[1]} (or could be {others})"
    )
    assert (note in report) if others else ("assumed" not in report)


@pytest.mark.parametrize(
    "wrong", [{"img_size": [64, 64], "stride_size": 16}, {"img_size": [1, 1], "stride_size": 1}]
)
def test_a_recorded_grid_that_does_not_fit_the_positions_is_refused(wrong, clip_file):
    model = model_of(clip_file, 16)
    content = {"model": model.state_dict(), "input": wrong}
    with pytest.raises(UserError, match="has 12 patches, not those of "):
        load_fitting(model, content, "x.pth")
    for foreign in (3, {"img_size": 64}, {"img_size": [0, 1]}, {"img_size": ["a", "b"]}, {}):
        load_fitting(model, {**content, "input": foreign}, "x.pth")  # another project's entry
