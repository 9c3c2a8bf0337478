"""Check and measure this project on a GPU, and write docs/gpu/<card>.md.

    python tools/gpu.py              # `make gpu`; 20 to 40 minutes

The tests of tests/cuda, the benchmark of ViT-B/16, and the demonstration. Without a GPU it does the
same in small on the CPU, skips what needs one, and prints the page instead of writing it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import torch

from tools._bench_memory import memory_table
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import PROJECT, path_option, write_atomically
from utils.tables import markdown

RECIPE = "supkl+queue+match2+dot"
SMALL = [
    "--pretrain_choice", "scratch", "--embed_dim", "64", "--vision_width", "64",
    "--vision_layers", "1", "--text_width", "64", "--text_layers", "1", "--img_size", "96", "32",
    "--repeat", "2", "--test_batch_size", "8",
]  # fmt: skip
DEMO_RESULT = re.compile(r"^\| aerial +\|.*$", re.MULTILINE)
# What a card should reach: share of the matrix peak, share of the step, GiB.
UTILISATION, LOSSES_AND_OPTIMIZER, PEAK = 0.45, 0.08, 12.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=path_option, default=PROJECT / "docs/gpu", metavar="FOLDER",
        help="receives the page (default: docs/gpu)",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size",
        type=int,
        default=64,
        metavar="INT",
        help="of the measured step (default: 64)",
    )
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        say("no CUDA device: a dry run on the CPU, with small models; nothing is written")
    card = torch.cuda.get_device_name() if gpu else "no card (dry run)"
    with tempfile.TemporaryDirectory() as folder:
        tests, passed = run_tests()
        sections = [
            tests,
            *benchmarks(Path(folder), gpu, args.batch_size),
            demonstration(Path(folder), gpu),
        ]
    page = f"# {card}\n\n{versions(gpu)}\n\n" + "\n\n".join(sections) + "\n"
    if gpu:
        name = re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-").lower()
        path = args.output / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(page.encode()))
        say(f"written: {path}")
    else:
        say(page)
    if not passed:
        raise UserError("tests/cuda failed; the page has their names")


def versions(gpu: bool) -> str:
    if not gpu:
        return f"torch {torch.__version__}."
    properties = torch.cuda.get_device_properties(0)
    return (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability "
        f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} GiB, "
        f"{os.cpu_count()} processor cores. Written by `make gpu`."
    )


def python(*words: object, quiet: bool = False) -> tuple[int, str]:
    """Run a command of this project; returns its exit status and output, which is also shown."""
    command = [sys.executable, *map(str, words)]
    say("$ python " + " ".join(command[1:]))
    # cuBLAS gives equal results bit for bit with this workspace only.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if not quiet:
                print(line, end="", flush=True)
    return process.returncode, "".join(lines)


def run_tests() -> tuple[str, bool]:
    """The section on tests, and whether none failed."""
    status, output = python("-m", "pytest", "tests/cuda", "-rfs", "-v", quiet=True)
    failed = re.findall(r"^FAILED (.*)$", output, re.MULTILINE)
    summary = output.strip().splitlines()[-1].strip("= ")
    say(f"tests/cuda: {summary}")
    lines = [
        "## Tests",
        "Losses and gradients against the CPU in every precision, options of speed and memory,",
        "prefetching, fused optimizers, NCCL, resuming bit for bit, waits for the device, memory:",
        "",
        f"`tests/cuda`: {summary}.",
        *(f"- FAILED {name}" for name in failed),
    ]
    return "\n".join(lines), status == 0


def benchmarks(folder: Path, gpu: bool, batch_size: int) -> list[str]:
    """The sections on the step, memory and the loader."""
    small = [] if gpu else SMALL
    size = batch_size if gpu else 4
    common = ["tools/bench.py", "--loss_names", RECIPE, "--batch_size", size, *small]
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[object]] = {
        "default": ["--what", "step", "encode", "rank", "memory"],
        "plain": ["--what", "step", "--plain"],
        "compiled": ["--what", "step", "--compile"] if gpu else [],
        "data": ["--what", "data", *mini_data(folder, gpu)],
    }
    for name, more in runs.items():
        if not more:
            continue
        file = folder / f"{name}.json"
        status, output = python(*common, *more, "--json", file)
        if status:
            return [f"## Benchmark\n\n`{name}` failed:\n\n```\n{output.strip()[-2000:]}\n```"]
        results[name] = json.loads(file.read_text())
    return sections_of(results)


def mini_data(folder: Path, gpu: bool) -> list[object]:
    """Options of a rendered data set with an image cache."""
    root = folder / "mini"
    ids = (90, 30, 60) if gpu else (6, 2, 2)
    sizes = ["--train_ids", ids[0], "--val_ids", ids[1], "--test_ids", ids[2]]
    status, output = python("-m", "datasets.mini", "--out", root, *sizes, quiet=True)
    if status:
        raise UserError(f"datasets.mini failed: {output.strip()[-500:]}")
    workers = 8 if gpu else 0
    return ["--root_dir", root, "--image_cache", folder / "cache", "--num_workers", workers]


def sections_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The page's sections on measurements.

    Args:
        results: of bench.py, by name: `default`, `plain`, `data` and perhaps `compiled`.
    """
    rows = {k: {r["what"].strip(): r for r in result["rows"]} for k, result in results.items()}
    default, step = rows["default"], rows["default"]["step"]
    parts = [
        [
            "- " * r["what"].startswith(" ") + name,
            f"{r['median_ms']:.1f}",
            f"{r['q1_ms']:.1f} to {r['q3_ms']:.1f}",
            f"{100 * r['share']:.1f} %" if "share" in r else "",
        ]
        for name, r in default.items()
    ]
    others = {name: rows[name]["step"] for name in ("plain", "compiled") if name in rows}
    ratios = [
        [name, f"{r['median_ms']:.1f}", f"{r['median_ms'] / step['median_ms']:.2f}"]
        for name, r in others.items()
    ]
    used, memory, rate = step["utilisation"], step["memory_mib"] / 1024, step["per_second"]
    fastest = max(r["per_second"] for r in rows["data"].values())
    small = sum(default[n]["share"] for n in ("losses, forward", "losses, backward", "optimizer"))
    goals = [
        ["step, share of the measured matrix peak", f"{100 * used:.0f} %",
         f"{100 * UTILISATION:.0f} % or more", used >= UTILISATION],
        ["losses and optimizer, share of the step", f"{100 * small:.1f} %",
         f"under {100 * LOSSES_AND_OPTIMIZER:.0f} %", small < LOSSES_AND_OPTIMIZER],
        ["peak memory, GiB", f"{memory:.1f}", f"under {PEAK:.0f}", memory < PEAK],
        ["loader with cache, pairs per second", f"{fastest:.0f}", f"over {rate:.0f}, the step's",
         fastest > rate],
    ]  # fmt: skip
    goals = [[*words, "yes" if reached else "no"] for *words, reached in goals]
    about = results["default"]["about"]
    return [
        f"## Goals\n\n{about}\n\n{markdown(['', 'measured', 'goal', 'reached'], goals)}",
        f"## Time\n\n{markdown(['part', 'ms', 'quartiles', 'share of the step'], parts)}\n\n"
        f"{markdown(['step', 'ms', 'times the default'], ratios)}",
        f"## Memory\n\n```\n{memory_table(results['default']['memory'])}\n```",
    ]


def demonstration(folder: Path, gpu: bool) -> str:
    """The section on the demonstration: time and result."""
    data, logs = folder / "demo", folder / "logs"
    sizes = [] if gpu else ["--train_ids", 12, "--val_ids", 4, "--test_ids", 4]
    short = ["--num_epoch", 2, "--val_dataset", "test", "--batch_size", 8, "--num_instance", 2]
    train = ["train.py", "--config_file", "configs/mini.yaml", "--root_dir", data]
    train += ["--output_dir", logs, "--image_cache", folder / "demo-cache"]
    train += [] if gpu else short
    start = time.perf_counter()
    for command in (["-m", "datasets.mini", "--out", data, *sizes], train):
        status, output = python(*command)
        if status:
            return f"## Demonstration\n\nfailed:\n\n```\n{output.strip()[-2000:]}\n```"
    minutes = (time.perf_counter() - start) / 60
    (config,) = logs.glob("*/*/configs.yaml")
    _, output = python("test.py", "--config_file", config, "--root_dir", data)
    table = "\n".join(DEMO_RESULT.findall(output)[-1:])
    return (
        f"## Demonstration\n\nRendering and training took {minutes:.1f} minutes. Test (gallery, "
        "queries, images, R@1, R@5, R@10, mAP, mINP, RSum):\n\n"
        f"```\n{table or output[-1000:]}\n```"
    )


if __name__ == "__main__":
    run_main(main)
