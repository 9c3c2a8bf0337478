"""A complete step on fake tensors: any wait for a value raises, and operators are counted.

The autograd engine needs a device that exists, so these are fake CPU tensors."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

import model.backbone
from datasets.synthetic import synthetic_batch
from model.build import build_training_model
from processor import step as step_module
from processor.epoch_log import EpochLog
from processor.memory import PeakMemory, estimate_memory, fake_batch, fake_copy
from processor.nonfinite import NonFiniteGuard
from processor.step import TrainStep
from solver.build import build_optimizer
from tests.helpers import SCRATCH, options

RECIPE = "supkl+queue+match2+dot"
VIT_B_16 = {
    "pretrain_choice": "scratch", "embed_dim": 512, "vision_width": 768, "vision_layers": 12,
    "text_width": 512, "text_layers": 12, "img_size": [384, 128],
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels_of_cuda(monkeypatch):
    """Fused attention, as on CUDA; on a CPU short captions take another kernel."""
    monkeypatch.setattr(model.backbone, "PLAIN_ATTENTION_BELOW", 0)


def fake_step(mode, names=RECIPE, sizes=SCRATCH, pairs=True, **values):
    """A `TrainStep` and a batch without values, after a first step."""
    args = options(**sizes, loss_names=names, cmt_depth=1, **values)
    net = fake_copy(build_training_model(args, names.split("+"), num_classes=9), mode).train()
    batch = fake_batch(synthetic_batch(args, net.needs_masked, net.more_images, pairs), mode)
    with mode:
        optimizer = build_optimizer(net.named_parameters(), args)
        for group in optimizer.param_groups:  # also of half-precision weights, as on CUDA
            group["fused"] = True
        train_step = TrainStep(net, optimizer, args)
        train_step(batch)
    return train_step, batch


@pytest.mark.parametrize("values", [
    {}, {"precision": "bf16"}, {"precision": "fp16"}, {"precision": "half"}, {"precision": "fp64"},
    {"accum_steps": 3}, {"grad_checkpointing": True}, {"grad_clip": 1.0}, {"ema": 0.9}, {"ema": 0.9, "precision": "half"},
    {"lora_rank": 4, "precision": "bf16", "ema": 0.9}, {"lora_rank": 4, "lora_dropout": 0.1, "accum_steps": 3},
    {"lora_rank": 4, "precision": "half", "grad_checkpointing": True}, {"pairs": False, "names": "sdm+id+mlm"},
    {"optimizer": "SGD"}, {"optimizer": "AdamW"}, {"negatives": "random"}, {"MLM": True},
    {"names": "supitc+queue+match2+cat+mlm"}, {"names": "sdm+id+mlm"}, {"names": "itc+cmpm+bisdm+biitc"},
    {"names": "tal+trl+nitc+ritc+citc+cda"},
    {"names": "tse+fta+nitc+mvs+simclr"},
], ids=str)  # fmt: skip
def test_a_step_never_waits_for_a_value(values):
    """Forward, backward, guard, clipping, optimizer and gradient caching."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    train_step, batch = fake_step(mode, **values)
    with mode:
        result = train_step(batch)
    assert result.values["total"].shape == result.skipped.shape == ()


def test_the_sums_of_the_log_and_the_guard_never_wait_for_a_value(tmp_path):
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    train_step, batch = fake_step(mode)
    log = EpochLog.__new__(EpochLog)
    log.sums, log.step, log.bar = {}, 0, collections.Counter()
    guard = NonFiniteGuard(train_step.args, None, None, None)
    guard.check = lambda: None  # it looks at values that have arrived, which fake ones never do
    with mode:
        for _ in range(2):
            result = train_step(batch)
            log.add(*result)
            guard.watch("epoch 1, step 1", [], *result)
    assert log.sums["total"].shape == () and len(guard.waiting) == 2


def planted_item(values):
    return values["total"].item()


def planted_if(values):
    return bool(values["total"] > 0)


def planted_nonzero(values):
    return values["total"][None].nonzero()


@pytest.mark.parametrize("planted", [planted_item, planted_if, planted_nonzero])
def test_a_planted_wait_is_caught(planted, monkeypatch):
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    train_step, batch = fake_step(mode)
    backward = step_module.TrainStep.backward

    def waiting(self, batch):
        values = backward(self, batch)
        planted(values)
        return values

    monkeypatch.setattr(step_module.TrainStep, "backward", waiting)
    kinds = (
        DataDependentOutputException,
        torch._subclasses.fake_tensor.DynamicOutputShapeException,
    )
    with mode, pytest.raises(kinds):
        train_step(batch)


class Operators(TorchDispatchMode):
    """Counts operators that compute: a stand-in for the launches of kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = func.is_view or func in (
            torch.ops.aten.detach.default,
            torch.ops.aten._unsafe_view.default,
        )
        self.count += func.namespace == "aten" and not views
        return func(*args, **(kwargs or {}))


def count_operators(**values):
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    train_step, batch = fake_step(mode, sizes=VIT_B_16, **values)
    with mode, Operators() as operators:
        train_step(batch)
    return operators.count


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1700), ("bf16", 2300)])
def test_a_step_of_vit_b16_is_at_most_so_many_operators_for_any_batch_size(precision, most):
    """Two encoders of 12 layers. (The original's step has 28,740 at batch 64.)"""
    counts = {size: count_operators(precision=precision, batch_size=size) for size in (4, 64)}
    assert counts[4] == counts[64] < most


@pytest.mark.parametrize(
    "values", [{}, {"precision": "bf16", "grad_clip": 1.0}, {"optimizer": "SGD"}]
)
def test_the_estimated_memory_is_that_of_pytorchs_tracker(values):
    """It takes a tenth of its time."""
    args = options(**SCRATCH, loss_names=RECIPE, **values)
    net = build_training_model(args, RECIPE.split("+"), num_classes=9)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake = fake_copy(net, mode).train()
    batch = fake_batch(synthetic_batch(args, pad=True), mode)
    tracker = MemTracker()
    with mode:
        optimizer = build_optimizer(fake.named_parameters(), args)
        train_step = TrainStep(fake, optimizer, args)
        tracker.track_external(fake, optimizer, *batch.values())
        with tracker:
            train_step(batch)  # makes the moments
            tracker.reset_mod_stats()
            train_step(batch)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimate_memory(net, args, like_cuda=False).peak == pytest.approx(peak, rel=0.001)


def test_the_estimated_memory_is_that_of_a_step_with_values():
    args = options(**SCRATCH, loss_names=RECIPE, batch_size=16)
    net = build_training_model(args, RECIPE.split("+"), num_classes=9).train()
    expected = estimate_memory(net, args, like_cuda=False)
    train_step = TrainStep(net, build_optimizer(net.named_parameters(), args), args)
    batch = synthetic_batch(args, pad=True)
    batch = {k: v.float() if k.endswith("images") else v for k, v in batch.items() if not k.endswith("uniform")}  # fmt: skip
    train_step(batch)
    memory = PeakMemory()
    moments = [v for state in train_step.optimizer.state.values() for v in state.values()]
    memory.add(*net.parameters(), *net.buffers(), *moments)
    for parameter in net.parameters():
        parameter.grad = None
    assert memory.now == expected.state
    memory.add(*batch.values())
    with memory:
        train_step(batch)
    assert memory.peak == pytest.approx(expected.peak, rel=0.01)
