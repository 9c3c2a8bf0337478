"""Measure time and memory: data loading, a training step, encoding, ranking, indexing.

    python tools/bench.py --batch_size 8 --loss_names supkl+queue+match2+dot --json new.json
    python tools/bench.py --batch_size 8 --loss_names supkl+queue+match2+dot --plain --json old.json
    python tools/bench.py --compare old.json new.json

Takes every option of train.py. The model has the config of ViT-B/16 unless --pretrain_choice names
another, with random weights: their values do not change the time. The step runs on synthetic images
and captions; `data` needs a data set in --root_dir. Each time is a median over repetitions, with
the first and third quartiles. The device is synchronised before and after each repetition.
`methods` compares a step of each method with one of InfoNCE: its share is the ratio. `gallery`
compares the indexing of JPEGs (search.py index) with encoding alone: its share says how much of
that speed is left. `memory` estimates the peak memory of a step on CUDA, for several batch sizes
and options. `search` finds the nearest of a million features, exactly and by an index
(gallery/index.py).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import resource

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.loaders import to_device, train_loader
from datasets.registry import read_dataset
from datasets.synthetic import captions, synthetic_batch
from datasets.text import tokenize, trim
from model.aeafirm import AEAFIRM
from model.build import build_training_model
from model.lora import count_weights
from model.losses.registry import parse_loss_names
from model.weights import config_from_choice
from processor.step import TrainStep
from solver.build import build_optimizer
from tools._bench_gallery import bench_gallery
from tools._bench_memory import bench_memory, memory_table
from tools._bench_methods import bench_methods
from utils.command_line import parse_options
from utils.console import say
from utils.devices import autocast, choose_device, choose_precision
from utils.documents import read_json_file
from utils.errors import UserError, run_main
from utils.files import expand, write_atomically
from utils.metrics import query_metrics, rank_gallery
from utils.tables import console

PARTS = ("data", "step", "methods", "encode", "rank", "gallery", "memory", "search")
GALLERIES = (3_200, 20_000, 100_000)
QUERIES = 3_200

Row = dict[str, Any]  # a line of the table: its name, times and other values


class Clock:
    """Times functions on a device."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device, self.repeat = device, repeat

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def __call__(self, run: Callable[[], object], warm_up: int = 2) -> list[float]:
        """Seconds of each repetition, after the warm-up."""
        for _ in range(warm_up):
            run()
        return [self.once(run) for _ in range(self.repeat)]


class SteadyClock(Clock):
    """Repeats until the times are stable: at least five times, until the quartiles are at most 5 %
    of the median apart, and at most `repeat` times.

    After 20 s, three times are enough. Calls that take over 5 s warm up once.
    """

    def __call__(self, run: Callable[[], object], warm_up: int = 2) -> list[float]:
        for _ in range(warm_up):
            if self.once(run) > 5:
                break
        seconds: list[float] = []
        started = time.perf_counter()
        while len(seconds) < 3 or (
            len(seconds) < self.repeat
            and time.perf_counter() - started < 20
            and not stable(seconds)
        ):
            seconds.append(self.once(run))
        return seconds


def stable(seconds: list[float]) -> bool:
    """Whether there are five or more, with quartiles at most 5 % of the median apart."""
    if len(seconds) < 5:
        return False
    first, median, third = statistics.quantiles(seconds, n=4)
    return third - first <= 0.05 * median


def row(name: str, seconds: list[float], **others: float | str) -> Row:
    """A line of the table: median and quartiles in ms."""
    first, median, third = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    times = {"median_ms": 1e3 * median, "q1_ms": 1e3 * first, "q3_ms": 1e3 * third}
    return {"what": name, **times, **others}


def plain_losses(model: AEAFIRM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses as the family's code computes them: one encoder call per view, all texts at 77
    tokens, and FIRM's head called for each image, attribute and sentence."""
    encode, table = model.base_model, model.sentences
    assert table is not None, "`main` asks for match2"
    padded = F.pad(table.ids, (0, 77 - table.ids.shape[1]))
    encoded = {
        "image": encode.encode_images(batch["images"])[0],
        "pair": encode.encode_images(batch["pair_images"])[0],
        "text": encode.encode_captions(batch["caption_ids"])[0],
        "sentences": encode.encode_captions(padded)[0],
    }
    head = model.atr_matching_head

    def looped(sentence_SD: Tensor, image_VD: Tensor) -> Tensor:
        labels_VA = torch.cat([batch["attributes"], batch["pair_attributes"]])
        state = model.generator.get_state()
        sampled = table.sample(labels_VA, model.generator)
        model.generator.set_state(state)  # so that the loss samples the same sentences
        logits = image_VD.new_zeros((len(image_VD), len(sentence_SD), 2))
        for index_VA in sampled:
            for v, indices in enumerate(index_VA.tolist()):
                for s in indices:
                    both = sentence_SD[s], image_VD[v]
                    fused = both[0] * both[1] if head.fusion == "dot" else torch.cat(both)
                    logits[v, s] = F.linear(fused, head.weight, head.bias)
        return logits

    with mock.patch.object(head, "forward", looped):
        return model.losses(encoded, batch)


def matrix_peak(device: torch.device, precision: str, clock: Clock) -> float:
    """FLOP/s of one large matrix product in the encoders' precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "half": torch.float16}.get(precision)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    return 2 * n**3 / min(clock(lambda: a @ a))


def memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of CUDA's allocator, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def bench_data(args: EasyDict, device: torch.device) -> Iterator[Row]:
    """Pairs per second of the loader without training, by the number of processes."""
    data = read_dataset(args)
    for workers in sorted({0, 1, 2, 4, args.num_workers}):
        args.num_workers = workers
        batches = train_loader(data, args, device)
        seconds, iterator = [], iter(batches)
        next(iterator)  # starts the processes
        for _ in range(min(args.repeat, len(batches) - 1)):
            start = time.perf_counter()
            next(iterator)
            seconds.append(time.perf_counter() - start)
        rate = args.batch_size / statistics.mean(seconds)
        yield row(f"data, {workers} processes", seconds, per_second=rate, unit="pairs")


def bench_step(
    args: EasyDict,
    device: torch.device,
    clock: Clock,
    quick: bool = False,
    pairs: bool = True,
) -> Iterator[Row]:
    """A complete training step, then its parts one by one; `quick` measures no parts."""
    names = parse_loss_names(args.loss_names)
    model = build_training_model(args, names, num_classes=11003).to(device).train()
    optimizer = build_optimizer(model.named_parameters(), args)
    train_step = TrainStep(model, optimizer, args)
    raw = synthetic_batch(args, model.needs_masked, model.more_images, pairs, pad=args.plain)
    config = model.base_model.config
    context = autocast(args.precision, device)

    def batch() -> dict[str, Tensor]:
        return to_device(raw, device, config.image_mean, config.image_std)

    def step() -> None:
        if not args.plain:
            train_step(batch())
            return
        optimizer.zero_grad(set_to_none=True)
        with context:
            losses = plain_losses(model, batch())
        losses["total"].backward()
        optimizer.step()

    if quick:
        seconds = clock(step)
        yield row("step", seconds, low_ms=1e3 * min(seconds), high_ms=1e3 * max(seconds))
        return
    peak = matrix_peak(device, args.precision, clock)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    flops = counter.get_total_flops()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(step)
    median = statistics.median(seconds)
    trained, total = count_weights(model)
    yield row(
        "step", seconds, per_second=args.batch_size / median, unit="samples",
        tflop=flops / 1e12, utilisation=flops / median / peak, peak_tflops=peak / 1e12,
        memory_mib=memory_mib(device), trained=trained / total,
    )  # fmt: skip
    if args.plain or args.accum_steps > 1:
        return  # these steps have other parts
    ready = batch()
    parts: dict[str, list[float]] = {}
    never = torch.tensor(False, device=device)
    images = torch.cat([ready["images"], ready["pair_images"]])
    ids = [ready["caption_ids"]] + ([model.sentences.ids] if model.sentences else [])

    def timed(name: str, run: Callable[[], object]) -> Any:
        results: list[Any] = []
        parts.setdefault(name, []).append(clock.once(lambda: results.append(run())))
        return results[0]

    def texts() -> list[tuple[Tensor, Tensor]]:
        rows = model.base_model.embed_tokens(*ids)
        return [model.base_model.encode_captions(i, r) for i, r in zip(ids, rows, strict=True)]

    for repetition in range(clock.repeat + 2):
        if repetition == 2:
            parts.clear()  # the first two were the warm-up
        timed("  batch to device, augment", batch)
        with context:
            timed("  image encoder, forward", lambda: model.base_model.encode_images(images))
            timed("  text encoder, forward", texts)
            encoded = model.encode(ready, sentences=True)
            losses = timed("  losses, forward", partial(model.losses, encoded, ready))
        optimizer.zero_grad(set_to_none=True)
        # The losses' part of the backward pass, from the total to the features; then all of it.
        total, features = losses["total"], [v for v in encoded.values() if v.requires_grad]
        timed("  losses, backward", partial(
            torch.autograd.grad, total, features, retain_graph=True, allow_unused=True
        ))  # fmt: skip
        timed("  backward, whole", total.backward)
        timed("  optimizer", optimizer.step)
        if train_step.average:
            timed("  moving average", partial(train_step.average.update, never))
    for name, seconds in parts.items():
        yield row(name, seconds, share=statistics.median(seconds) / median)


def without_weights(args: EasyDict) -> None:
    """Replace a named ViT by random weights of its sizes: their values do not change the time."""
    config = config_from_choice(args.pretrain_choice)
    if config is not None and not config.is_resnet and config.head_width == 64:
        for name in ("embed_dim", "vision_width", "vision_layers", "vision_patch_size",
                     "text_width", "text_layers"):  # fmt: skip
            setattr(args, name, getattr(config, name))
        args.pretrain_choice = "scratch"


def measured_step(args: EasyDict, pairs: bool) -> tuple[float, float, float]:
    """Seconds of one training step: median, minimum and maximum. On a CPU, a larger batch is
    measured with eight samples and scaled up. `pairs`: samples have two views."""
    args = EasyDict(args, plain=False)
    without_weights(args)
    device = choose_device(args.device)
    args.precision = choose_precision(args.precision, device)
    scale = 1.0
    if device.type == "cpu" and args.batch_size > 8:
        scale, args.batch_size = args.batch_size / 8, 8
        # Parts of the same size. At least two if there are several: each part is encoded twice.
        args.accum_steps = max(min(args.accum_steps, 2), -int(-args.accum_steps // scale))
    step = next(bench_step(args, device, SteadyClock(device, 30), quick=True, pairs=pairs))
    median, low, high = (scale * step[f"{which}_ms"] / 1e3 for which in ("median", "low", "high"))
    return median, low, high


@torch.no_grad()
def bench_encode(args: EasyDict, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Encoding for evaluation, without gradients."""
    model = build_training_model(args, [], num_classes=0).to(device).eval()
    count = min(args.test_batch_size, 64 if device.type == "cpu" else args.test_batch_size)
    images = torch.randn(count, 3, *args.img_size, device=device)
    ids = trim(tokenize(captions(count), args.text_length)).to(device)
    for name, run in (
        ("images", lambda: model.encode_image(images)),
        ("captions", lambda: model.encode_text(ids)),
    ):
        with autocast(args.precision, device):
            seconds = clock(run)
        rate = count / statistics.median(seconds)
        yield row(f"encode {count} {name}", seconds, per_second=rate, unit=name)


def ranked_by_loop(
    similarity_QG: Tensor, query_pids_Q: Tensor, gallery_pids_G: Tensor
) -> list[tuple[float, float]]:
    """(AP, INP) of each query by a loop over queries, as evaluation is often written."""
    results = []
    for scores, pid in zip(similarity_QG, query_pids_Q, strict=True):
        hits = gallery_pids_G[scores.argsort(descending=True)] == pid
        ranks = hits.nonzero()[:, 0] + 1
        precision = torch.arange(1, len(ranks) + 1, device=ranks.device) / ranks
        results.append((precision.mean().item(), (len(ranks) / ranks[-1]).item()))
    return results


def bench_rank(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Ranking and metrics, compared with a loop over queries and with sorting only."""
    generator = torch.Generator().manual_seed(0)
    for size in GALLERIES:
        query, gallery = (torch.randn(n, 512, generator=generator).to(device) for n in (QUERIES, size))  # fmt: skip  # noqa: E501
        query_pids = (torch.arange(QUERIES) % min(800, size // 4)).to(device)
        gallery_pids = (torch.arange(size) % (size // 4)).to(device)
        name = f"rank {QUERIES} x {size}"
        once = Clock(device, min(3, clock.repeat))
        before = memory_mib(device)
        seconds = once(partial(rank_gallery, query, gallery, query_pids, gallery_pids), 1)
        yield row(name, seconds, memory_mib=memory_mib(device) - before)
        part = 3_200 if size == GALLERIES[0] else 320  # this many queries; the others take as long
        similarity, pids = query[:part] @ gallery.T, query_pids[:part]
        metrics = once(partial(query_metrics, similarity, pids, gallery_pids), 1)
        yield row(f"  metrics of {part} queries", metrics)
        yield row(f"  sorting {part} queries alone", once(partial(similarity.sort, dim=1), 1))
        if size == GALLERIES[0]:
            loop = partial(ranked_by_loop, similarity, pids, gallery_pids)
            yield row(f"  loop over {part} queries", Clock(device, 1)(loop, 0))


def bench_search(clock: Clock) -> Iterator[Row]:
    """A search among many persons, exact and by an index."""
    try:
        from tools import _bench_search
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install -r requirements-search.txt"
        ) from None

    for name, seconds, notes in _bench_search.bench_search(clock.once, clock.repeat):
        yield row(name, seconds, **notes)


def table_of(rows: list[Row]) -> str:
    """The measurements as a table."""
    cells = []
    for r in rows:
        notes = []
        if "tflop" in r:
            notes.append(
                f"{r['tflop']:.2f} TFLOP, {100 * r['utilisation']:.0f} % of a measured matrix "
                f"peak of {r['peak_tflops']:.2f} TFLOP/s"
            )
        if "memory_mib" in r:
            notes.append(f"{r['memory_mib']:.0f} MiB")
        if r.get("trained", 1) < 1:
            notes.append(f"{100 * r['trained']:.2f} % of the weights are trained")
        if "recall" in r:
            notes.append(f"recall@50 {r['recall']:.3f}")
        cells.append(
            [
                r["what"],
                f"{r['median_ms']:.1f}",
                f"{r['q1_ms']:.1f} to {r['q3_ms']:.1f}",
                f"{r['per_second']:.1f} {r['unit']}" if "per_second" in r else "",
                f"{100 * r['share']:.1f} %" if "share" in r else "",
                "; ".join(notes),
            ]
        )
    return console(["what", "ms", "quartiles", "per second", "share", "notes"], cells)


def compare(paths: list[str]) -> str:
    """The ratios of two files' medians, for rows in both. Raises UserError."""
    files = []
    for path in paths:
        try:
            rows = read_json_file(path, "no result of tools/bench.py: ")["rows"]
            files.append({str(row["what"]): float(row["median_ms"]) for row in rows})
            if not all(0 < value < math.inf for value in files[-1].values()):
                raise ValueError("a median is not a positive time")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path}: no result of tools/bench.py: {error}") from None
    old, new = files
    rows = [
        [name, f"{old[name]:.1f}", f"{new[name]:.1f}", f"{old[name] / new[name]:.2f}"]
        for name in old
        if name in new
    ]
    return console(["what", *(f"{path}, ms" for path in paths), "times faster"], rows)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"  # noqa: E501


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Bench")
    add = group.add_argument
    add("--what", nargs="+", choices=PARTS, default=["step", "encode", "rank"], help="what to measure (default: step encode rank)")  # fmt: skip  # noqa: E501
    add("--repeat", type=int, default=10, metavar="INT", help="repetitions (default: 10)")
    add("--plain", action="store_true", default=False,
        help="measure the step without this project's optimisations: float32, a call per view, "
        "77 tokens everywhere, FIRM in loops")  # fmt: skip
    add(
        "--json",
        default="",
        type=expand,
        metavar="FILE",
        help="also write the measurements to this file",
    )
    add("--compare", nargs=2, default=None, type=expand, metavar="FILE", help="only print the ratios of two such files")  # fmt: skip  # noqa: E501


def main() -> None:
    args = parse_options(None, __doc__.split("\n")[0], add_options)
    if args.compare:
        say(compare(args.compare))
        return
    without_weights(args)
    device = choose_device(args.device)
    args.precision = "fp32" if args.plain else choose_precision(args.precision, device)
    if args.plain and "match2" not in args.loss_names.split("+"):
        raise UserError("--plain measures FIRM's loops: it needs match2 in --loss_names")
    clock = Clock(device, args.repeat)
    about = (
        f"{machine(device)}; {args.precision}{', plain' if args.plain else ''}; "
        f"batch {args.batch_size} pairs of {args.img_size[0]}x{args.img_size[1]}, {args.loss_names}"
    )
    say(about)
    rows: list[Row] = []
    benches: dict[str, Callable[[], Iterator[Row]]] = {
        "data": lambda: bench_data(args, device),
        "step": lambda: bench_step(args, device, clock),
        "methods": lambda: bench_methods(args, device, clock, row),
        "encode": lambda: bench_encode(args, device, clock),
        "rank": lambda: bench_rank(device, clock),
        "gallery": lambda: bench_gallery(args, device, clock, row),
        "search": lambda: bench_search(clock),
    }
    memory: list[Row] = []
    if "memory" in args.what:  # first: a CPU's peak is that of the process
        memory = list(bench_memory(args, device))
        say(memory_table(memory))
    for name in args.what:
        rows += benches[name]() if name in benches else []
    if rows:
        say(table_of(rows))
    if args.json:
        text = json.dumps({"about": about, "rows": rows, "memory": memory}, indent=2)
        write_atomically(Path(args.json), lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run_main(main)
