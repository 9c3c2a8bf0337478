"""What training and evaluation cost with more data and more GPUs, from measured parts.

    python tools/scale.py        # prints the tables of docs/scale.md; `make docs` writes them there

AEA-FIRM with ViT-B/16 on 384x128, 64 pairs per GPU in bf16. Nothing is measured here: MEASURED
comes from docs/performance.md, ASSUMED from data sheets.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

from utils.console import say

# MEASURED, on two cores
TFLOP_PER_PAIR = 14.0 / 64  # forward and backward, and the step's share of FIRM's sentences
WEIGHTS = 150e6
FIRST_START, LATER_START = 54e-6, 1.2e-6  # seconds per caption
SAMPLE_BYTES = 300  # in memory, with its caption
RANKING = 6.0 / (3_200 * 100_000)  # seconds per similarity with one thread
# ASSUMED
TFLOPS = 312 * 0.30  # an A100 in bf16, at 30 % of its peak
TFLOPS_FLOAT32 = 19.5 * 0.5  # the losses
BYTES_PER_SECOND = 1.5e12 * 0.5  # of the card's memory
LINK, NETWORK = 200e9, 25e9  # bytes per second between GPUs of a machine of 8, and between machines
# By definition
PER_GPU, DIM, QUEUE_BATCHES = 64, 512, 3
IMAGE_BYTES = 3 * 384 * 128
BACKWARD = 0.65  # of a step, during which gradients are exchanged
PASSES = 12  # over a matrix of logits, forward and backward
KEPT = 6  # matrices of logits that live at once

PAIRS = (31_340, 1_000_000, 100_000_000)
GPUS = (1, 8, 64)


def step_seconds() -> float:
    """The encoders' part of a step."""
    return PER_GPU * TFLOP_PER_PAIR / TFLOPS


def exchange_seconds(gpus: int) -> float:
    """Averaging the gradients over all GPUs, by a ring."""
    speed = LINK if gpus <= 8 else NETWORK
    return 2 * (gpus - 1) / gpus * 4 * WEIGHTS / speed


def logits(gpus: int) -> int:
    """Entries of AEA's two matrices: every GPU computes those of the complete batch."""
    batch = PER_GPU * gpus
    return 2 * batch * (2 + QUEUE_BATCHES) * batch


def losses_seconds(gpus: int) -> float:
    """AEA, forward and backward."""
    products = 3 * 2 * DIM * logits(gpus) / (TFLOPS_FLOAT32 * 1e12)
    return products + PASSES * 4 * logits(gpus) / BYTES_PER_SECOND


def epoch_seconds(pairs: int, gpus: int) -> float:
    """One epoch, without loading and evaluation. Gradients are exchanged during the backward
    pass."""
    step = step_seconds()
    waiting = max(0.0, exchange_seconds(gpus) - BACKWARD * step)
    return math.ceil(pairs / (PER_GPU * gpus)) * (step + waiting + losses_seconds(gpus))


def two_digits(value: float, units: dict[str, float]) -> str:
    """A value in the largest unit that is not above it, with two digits: "3.4 h"."""
    unit = next((name for name, size in units.items() if value >= size), list(units)[-1])
    return f"{float(f'{value / units[unit]:.2g}'):,g} {unit}"


def time_text(seconds: float) -> str:
    return two_digits(seconds, {"days": 86_400, "h": 3_600, "min": 60, "s": 1, "ms": 1e-3})


def bytes_text(count: float) -> str:
    return two_digits(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3})


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def step_table() -> str:
    """A step by the number of GPUs."""
    rows = [
        [
            str(gpus), str(PER_GPU * gpus), time_text(step_seconds()),
            time_text(exchange_seconds(gpus)) if gpus > 1 else "none",
            time_text(losses_seconds(gpus)), bytes_text(4 * KEPT * logits(gpus) / 2),
            f"{PER_GPU * gpus / (epoch_seconds(PER_GPU * gpus, gpus)):,.0f}",
        ]
        for gpus in GPUS
    ]  # fmt: skip
    head = [
        "GPUs",
        "batch",
        "encoders",
        "exchange of gradients",
        "AEA",
        "AEA's matrices",
        "pairs/s",
    ]
    return table(head, rows)


def data_table() -> str:
    """A data set by the number of pairs."""
    rows = [
        [
            f"{pairs:,}",
            *(time_text(epoch_seconds(pairs, gpus)) for gpus in GPUS),
            time_text(FIRST_START * pairs), time_text(LATER_START * pairs),
            bytes_text(SAMPLE_BYTES * pairs), bytes_text(2 * IMAGE_BYTES * pairs),
        ]
        for pairs in PAIRS
    ]  # fmt: skip
    epochs = [f"epoch, {gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    head = ["pairs", *epochs, "first start", "later start", "samples in memory", "image cache"]
    return table(head, rows)


def evaluation_table() -> str:
    """An evaluation of 3,200 captions by the number of gallery images."""
    per_image = TFLOP_PER_PAIR / 3 / 2 / TFLOPS  # forward, one of two views
    rows = [
        [
            f"{images:,}", *(time_text(images * per_image / gpus) for gpus in GPUS),
            time_text(3_200 * images * RANKING), bytes_text(4 * DIM * images),
        ]
        for images in PAIRS
    ]  # fmt: skip
    encoding = [f"encoding, {gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    return table(["gallery", *encoding, "ranking, one core", "features"], rows)


def main() -> None:
    say("\n\n".join([step_table(), data_table(), evaluation_table()]))


if __name__ == "__main__":
    main()
