"""On a real GPU: the numbers of the CPU, the same numbers when options change how they are computed,
resuming bit for bit, and no wait for the device."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

import train as train_entry
from datasets.loaders import on_device, to_device, train_loader
from datasets.synthetic import synthetic_batch
from model.build import build_training_model
from processor.memory import estimate_memory, on_a_card
from processor.step import TrainStep
from solver.build import build_optimizer
from tests.cuda.test_fake_cuda import RECIPES
from tests.helpers import SCRATCH, golden_batch, options, read, run
from tests.reliability.runs import assert_same_end, flags, folder_of
from tests.reliability.test_resume import send_signal_at_step
from utils.distributed import Processes, _Gather
from utils.errors import StoppedBySignal
from utils.metrics import query_metrics

pytestmark = pytest.mark.cuda
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# The largest error of a gradient, relative to its norm, against float32 on the CPU.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1, "half": 5e-2, "fp64": 1e-3}


@pytest.fixture(autouse=True)
def exact_float32():
    """No TensorFloat-32, which has 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def step_on(device, clip_file, names, batches=2, optimizer_step=False, **values):
    """Losses, gradients, weights and buffers after some steps on a device."""
    args = options(pretrain_choice=str(clip_file), loss_names=names, cmt_depth=1, **values)
    net = build_training_model(args, names.split("+"), num_classes=11003).to(device).train()
    train_step = TrainStep(net, build_optimizer(net.named_parameters(), args), args)
    if train_step.scaler.is_enabled():  # its first scale, 65,536, overflows and halves itself
        train_step.scaler = GradScaler(device.type, init_scale=128)
    for step in range(batches):
        batch = {k: v.to(device) for k, v in golden_batch(step).items()}
        if optimizer_step:
            losses = train_step(batch).values
        else:
            net.zero_grad()
            losses = train_step.backward(batch)
    scale = train_step.scaler.get_scale()
    gradients = {
        n: p.grad.double().cpu() / scale for n, p in net.named_parameters() if p.grad is not None
    }
    state = {n: v.double().cpu() for n, v in net.state_dict().items()}
    return {n: v.detach().double().cpu() for n, v in losses.items()}, gradients, state


def assert_near(expected, actual, tolerance):
    """Each tensor, relative to its norm, or to a hundredth of the largest norm if it is smaller."""
    assert expected.keys() == actual.keys()
    least = 1e-2 * max(value.norm() for value in expected.values())
    for name, value in expected.items():
        error = (actual[name] - value).norm() / max(value.norm(), least)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("names", "precision"), itertools.product(RECIPES, TOLERANCE))
def test_losses_and_gradients_are_those_of_the_cpu(names, precision, clip_file):
    expected = step_on(CPU, clip_file, names)
    actual = step_on(CUDA, clip_file, names, precision=precision)
    for before, now in zip(expected[:2], actual[:2], strict=True):
        assert_near(before, now, TOLERANCE[precision])


@pytest.mark.parametrize(
    "values", [{"accum_steps": 2}, {"grad_checkpointing": True}, {"compile": True}], ids=str
)
def test_options_of_speed_and_memory_give_the_same_numbers(values, clip_file):
    names = RECIPES[0]
    expected = step_on(CUDA, clip_file, names)
    for before, now in zip(
        expected[:2], step_on(CUDA, clip_file, names, **values)[:2], strict=True
    ):
        assert_near(before, now, 1e-3)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_the_fused_optimizer_updates_as_the_plain_one(optimizer, clip_file, monkeypatch):
    names, values = RECIPES[0], {"optimizer": optimizer, "lr": 1e-3, "optimizer_step": True}
    expected = step_on(CUDA, clip_file, names, **values)
    kind = getattr(torch.optim, optimizer)
    monkeypatch.setattr(torch.optim, optimizer, lambda *a, **k: kind(*a, **{**k, "fused": None}))
    assert_near(expected[2], step_on(CUDA, clip_file, names, **values)[2], 1e-5)


def test_prefetched_batches_are_those_of_a_plain_loop(mini_root):
    args = options(dataset_name="AGDataAttr", root_dir=str(mini_root), img_aug=True, num_workers=2)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    batches = []
    for ahead in (True, False):
        loader = train_loader(read("AGDataAttr", mini_root), args, CUDA)
        loader.batch_sampler.set_epoch(0)
        moved = (
            on_device(loader, CUDA, mean, std)
            if ahead
            else (to_device(b, CUDA, mean, std) for b in loader)
        )
        batches.append([{k: v.cpu() for k, v in batch.items()} for batch in moved])
    assert len(batches[0]) == len(batches[1]) > 2
    for first, second in zip(*batches, strict=True):
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)


def test_the_pool_and_simclr_give_the_images_of_the_cpu_and_never_wait_for_the_device():
    raw = synthetic_batch(options(img_pool=2, batch_size=32), more_images=["second", "strong_1"])
    norm = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = to_device(raw, CPU, *norm)
    raw = {name: value.to(CUDA) for name, value in raw.items()}
    to_device(raw, CUDA, *norm)  # makes the constants of `normalise`
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(raw, CUDA, *norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("images", "pair_images", "second_images", "strong_1_images"):
        # A pixel at the edge of a rotated image may be black on one device only.
        different = (moved[name].cpu() - expected[name]).abs() > 1e-3
        assert different.float().mean() < 1e-4, name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "half"])
def test_a_step_never_waits_for_the_device(precision, clip_file):
    args = options(pretrain_choice=str(clip_file), loss_names=RECIPES[0], precision=precision)
    net = build_training_model(args, RECIPES[0].split("+"), num_classes=9).to(CUDA).train()
    train_step = TrainStep(net, build_optimizer(net.named_parameters(), args), args)
    batch = {k: v.to(CUDA) for k, v in golden_batch().items()}
    train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_and_resumed_run_ends_the_same_bit_for_bit(
    precision, mini_root, tmp_path, monkeypatch
):
    """With PyTorch's deterministic kernels: some others add in no fixed order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        argv = flags(mini_root, tmp_path / "plain", device="cuda", precision=precision)
        run(train_entry.main, monkeypatch, *argv)
        argv = flags(mini_root, tmp_path / "resumed", device="cuda", precision=precision)
        with monkeypatch.context() as patch, pytest.raises(StoppedBySignal):
            send_signal_at_step(patch, 6, 15)
            run(train_entry.main, patch, *argv)
        run(train_entry.main, monkeypatch, *argv, "--resume", "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_end(folder_of(tmp_path / "plain"), folder_of(tmp_path / "resumed"))


@contextlib.contextmanager
def nccl():
    """A process group of this process alone."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_one_process_under_nccl_gathers_and_averages_what_it_has(clip_file):
    names = RECIPES[0]
    expected = step_on(CUDA, clip_file, names, batches=1)
    args = options(pretrain_choice=str(clip_file), loss_names=names)
    with nccl():
        rows = torch.randn(5, 3, device=CUDA, requires_grad=True)
        gathered = _Gather.apply(rows, (5,), Processes(rank=0, size=1))
        gathered.sum().backward()
        assert gathered.equal(rows) and rows.grad.equal(torch.ones_like(rows))
        net = build_training_model(args, names.split("+"), num_classes=11003).to(CUDA).train()
        parallel = DistributedDataParallel(net, broadcast_buffers=False, static_graph=True)
        losses = parallel({k: v.to(CUDA) for k, v in golden_batch().items()})
        losses["total"].backward()
    gradients = {n: p.grad.double().cpu() for n, p in net.named_parameters() if p.grad is not None}
    assert_near(expected[1], gradients, 1e-4)


def test_metrics_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 500, generator=generator)
    pids = (
        torch.randint(50, (200,), generator=generator),
        torch.randint(50, (500,), generator=generator),
    )
    on_gpu = query_metrics(scores.to(CUDA), *(p.to(CUDA) for p in pids))
    torch.testing.assert_close(on_gpu, query_metrics(scores, *pids), equal_nan=True)


@pytest.mark.parametrize("values", [
    {}, {"precision": "fp32"}, {"precision": "half"}, {"accum_steps": 4}, {"grad_checkpointing": True},
], ids=str)  # fmt: skip
def test_the_estimated_memory_is_within_15_percent_of_the_measured(values):
    sizes = {
        "pretrain_choice": "scratch", "embed_dim": 512, "vision_width": 768, "vision_layers": 12,
        "text_width": 512, "text_layers": 12, "img_size": [384, 128], "batch_size": 16,
    }  # fmt: skip
    args = options(**{**sizes, "precision": "bf16", "loss_names": RECIPES[0], **values})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net = build_training_model(args, RECIPES[0].split("+"), num_classes=9).to(CUDA).train()
    train_step = TrainStep(net, build_optimizer(net.named_parameters(), args), args)
    config = net.base_model.config
    raw = synthetic_batch(args, net.needs_masked, net.more_images, pad=True)
    for _ in range(2):
        train_step(to_device(raw, CUDA, config.image_mean, config.image_std))
    measured = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(net, args, like_cuda=True).peak
    assert measured == pytest.approx(estimate, rel=0.15)
    assert measured < on_a_card(estimate)


def test_training_and_evaluation_say_that_they_ran_on_cuda(
    mini_root, tmp_path, monkeypatch, capsys
):
    small = {**SCRATCH, "num_epoch": 1, "warmup_epochs": 0}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, device="cuda", **small))
    shown = capsys.readouterr().out
    assert "; cuda, fp32, seed 1" in shown and "memory of a step: about" in shown
