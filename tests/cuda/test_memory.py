"""What training says about memory before its first step."""

import pytest
import torch
from easydict import EasyDict

from model.build import build_training_model
from model.lora import count_weights
from model.losses.registry import LOSSES, Loss
from processor.memory import GIB, estimate_memory, memory_note, memory_notes, on_a_card
from tests.helpers import SCRATCH, options
from utils.distributed import Processes

NAMES = ["supkl", "queue", "match2", "dot"]


def model_and_options(**values):
    args = options(**{**SCRATCH, "loss_names": "+".join(NAMES), **values})
    return build_training_model(args, args.loss_names.split("+"), num_classes=9), args


def test_a_step_that_does_not_fit_is_a_warning_with_what_to_try():
    net, args = model_and_options()
    need = on_a_card(estimate_memory(net, args, like_cuda=True).peak)
    note = memory_note(net, args, True, free=int(need) + 1, total=24 * GIB)
    assert note.startswith(
        f"memory of a step: about {need / GIB:.1f} GiB, estimated; the card has 24.0 GiB"
    )
    note = memory_note(net, args, True, free=int(need) - 1, total=24 * GIB)
    assert note.startswith("warning: memory") and "--accum_steps 4, --grad_checkpointing" in note


def test_a_card_has_the_part_of_one_process(monkeypatch):
    net, args = model_and_options(batch_size=9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    part = memory_note(net, EasyDict(args, batch_size=5), True, free=3 * GIB, total=24 * GIB)
    cuda = torch.device("cuda")
    assert memory_notes(net, args, True, cuda, Processes(size=2)) == [part]
    assert memory_notes(net, args, True, cuda, Processes(rank=1, size=2)) == []
    assert memory_notes(net, args, True, torch.device("cpu"), Processes()) == []


def test_less_memory_is_estimated_for_options_that_save_it():
    sizes = {"batch_size": 64, "vision_layers": 4, "img_size": [192, 64]}
    plain = estimate_memory(*model_and_options(**sizes), like_cuda=True)
    for values in ({"accum_steps": 4}, {"grad_checkpointing": True}, {"precision": "bf16"}):
        saving = estimate_memory(*model_and_options(**sizes, **values), like_cuda=True)
        assert saving.state == plain.state and saving.peak < 0.9 * plain.peak, values
    two, one = (
        estimate_memory(*model_and_options(**sizes, loss_names="sdm"), like_cuda=True, pairs=pairs)
        for pairs in (True, False)
    )
    assert one.peak < 0.7 * two.peak


def test_a_moving_average_takes_the_memory_of_the_weights():
    net, args = model_and_options()
    plain = estimate_memory(net, args, like_cuda=True)
    averaged = estimate_memory(net, options(**{**args, "ema": 0.9}), like_cuda=True)
    weights = sum(4 * p.numel() for p in net.parameters())
    assert averaged.state - plain.state == averaged.peak - plain.peak == weights


def test_lora_has_moments_and_gradients_of_its_updates_alone():
    net, args = model_and_options(lora_rank=4)
    plain = estimate_memory(*model_and_options(), like_cuda=True)
    lora = estimate_memory(net, args, like_cuda=True)
    trained, total = count_weights(net)
    # Adam has two moments; the sizes of its counters of steps are left out.
    assert lora.state == pytest.approx(4 * (total + 2 * trained), rel=1e-2)
    assert lora.peak < plain.peak - 8 * (total - trained)


def test_estimating_leaves_the_model_as_it_is():
    net, args = model_and_options()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = net.generator.get_state()
    estimate_memory(net, args, like_cuda=True)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert net.generator.get_state().equal(state)
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())


def test_a_loss_of_ones_own_that_reads_values_costs_the_hint_only(monkeypatch):
    net, args = model_and_options()
    planted = Loss(
        "reads a value", lambda inputs: inputs.text_BD.sum() * inputs.text_BD.sum().item()
    )
    monkeypatch.setitem(net.rows, "supkl", planted)
    assert "supkl" in LOSSES
    note = memory_note(net, args, True, free=GIB, total=GIB)
    assert note.startswith("memory of a step: cannot be estimated (DataDependentOutputException")


@pytest.mark.parametrize(
    "names",
    [
        "sdm+id+mlm",
        "supitc+queue+match2+cat",
        "itc+cmpm+bisdm+biitc",
        "tal+trl+nitc+ritc+citc+cda",
        "tse+fta+nitc+mvs+simclr",
    ],
)
def test_every_recipe_can_be_estimated(names):
    args = options(**SCRATCH, loss_names=names, cmt_depth=1)
    net = build_training_model(args, names.split("+"), num_classes=9)
    estimate = estimate_memory(net, args, like_cuda=True)
    assert estimate.peak > estimate.state > 0
