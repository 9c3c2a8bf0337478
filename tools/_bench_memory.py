"""bench.py --what memory: the peak memory of a training step, and the cards that it fits on."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Iterator
from typing import Any

import torch
from easydict import EasyDict
from tqdm import tqdm

from datasets.loaders import to_device
from datasets.synthetic import synthetic_batch
from model.aeafirm import AEAFIRM
from model.build import build_training_model
from model.losses.registry import parse_loss_names
from processor.memory import GIB, estimate_memory, on_a_card
from processor.step import TrainStep
from solver.build import build_optimizer
from utils.tables import console

CARDS = (8, 12, 16, 24, 40, 80)  # GiB
PRECISIONS = ("bf16", "fp32", "half")
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "--accum_steps 4": {"accum_steps": 4},
    "--grad_checkpointing": {"grad_checkpointing": True},
    "both": {"accum_steps": 4, "grad_checkpointing": True},
}
MEASURED = 16  # samples of the step that is measured, at most: a CPU takes 16 s for them
NUM_CLASSES = 11003  # identities of CUHK-PEDES, the most of the data sets here


def bench_memory(args: EasyDict, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure a step on this device and estimate it; then estimate steps on CUDA for batches of
    half, once and twice `--batch_size`. Memory in GiB."""
    names = parse_loss_names(args.loss_names)
    size = min(args.batch_size, MEASURED)
    yield {
        "what": "measured", "batch_size": size,
        **measured_peak(EasyDict(args, batch_size=size), device),
    }  # fmt: skip

    @functools.cache
    def model(half: bool, grad_checkpointing: bool) -> AEAFIRM:
        options = EasyDict(
            args,
            precision="half" if half else "fp32",
            grad_checkpointing=grad_checkpointing,
            compile=False,
        )
        return build_training_model(options, names, NUM_CLASSES)

    sizes = sorted({max(1, args.batch_size // 2), args.batch_size, 2 * args.batch_size})
    cases = [(p, s, b) for p in PRECISIONS for s in SETTINGS for b in sizes]
    for precision, setting, size in tqdm(cases, desc="estimate", leave=False, disable=None):
        options = {"accum_steps": 1, "grad_checkpointing": False, **SETTINGS[setting]}
        options = EasyDict(args, precision=precision, batch_size=size, **options)
        built = model(precision == "half", options.grad_checkpointing)
        estimate = estimate_memory(built, options, like_cuda=True)
        yield {
            "what": "estimate", "precision": precision, "setting": setting, "batch_size": size,
            "state_gib": estimate.state / GIB, "peak_gib": estimate.peak / GIB,
            "card_gib": smallest_card(estimate.peak),
        }  # fmt: skip


def measured_peak(args: EasyDict, device: torch.device) -> dict[str, float]:
    """The peak of two steps on this device, and its estimate: tensors of CUDA's allocator, or on a
    CPU the growth of the process. Call it first: a process does not give all memory back."""
    names = parse_loss_names(args.loss_names)
    before = 0 if device.type == "cuda" else resident_bytes()
    model = build_training_model(args, names, NUM_CLASSES).to(device).train()
    train_step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    config = model.base_model.config
    raw = synthetic_batch(args, model.needs_masked, model.more_images, pad=True)
    for _ in range(2):
        train_step(to_device(raw, device, config.image_mean, config.image_std))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    estimate = estimate_memory(model, args, like_cuda=device.type == "cuda").peak
    return {"measured_gib": peak / GIB, "peak_gib": estimate / GIB, "ratio": peak / estimate}


def resident_bytes() -> int:
    """Memory of this process that is in use now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def smallest_card(peak: int) -> int | None:
    """GiB of the smallest card that a peak fits on; None if it fits on none."""
    return next((card for card in CARDS if on_a_card(peak) <= card * GIB), None)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """The estimates: a row for each precision and setting, a column for each batch size."""
    measured, *estimates = rows
    sizes = list(dict.fromkeys(row["batch_size"] for row in estimates))
    cells: dict[tuple[str, str], list[str]] = {}
    for row in estimates:
        card = f"{row['card_gib']} GiB" if row["card_gib"] else "none"
        cell = f"{row['peak_gib']:.1f} ({card})"
        cells.setdefault((row["precision"], row["setting"]), []).append(cell)
    table = console(
        ["precision", "options", *(f"batch {size}" for size in sizes)],
        [[*name, *row] for name, row in cells.items()],
        left=2,
    )
    return (
        f"batch {measured['batch_size']} here: {measured['measured_gib']:.2f} GiB measured, "
        f"{measured['peak_gib']:.2f} GiB estimated ({measured['ratio']:.2f} times the estimate)\n"
        f"estimated peak of a step on CUDA, GiB (the smallest card that it fits on)\n{table}"
    )
