"""Evaluate the best checkpoint of a run on every gallery of its data set.

    python test.py --config_file logs/AGDataAttr/<run>/configs.yaml --root_dir data/mini-TBAGPR

The metrics are printed and written to test_results.json in the checkpoint's folder. torchrun
distributes the encoding over GPUs, as for train.py. --features keeps the features in files, and
--rerank adds the metrics with k-reciprocal re-ranking.
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

import argparse
from pathlib import Path
from typing import Any

from easydict import EasyDict

from gallery.rerank import RERANKED, rank_reranked
from utils.command_line import parse_test_options
from utils.config import check
from utils.errors import run_main
from utils.files import check_writable, path_option


def options() -> tuple[EasyDict, Path, list[str]]:
    """The options, the checkpoint and notes."""
    args, path, notes = parse_test_options(None, __doc__.split("\n")[0], add_options)
    check(args.bootstrap >= 0, f"--bootstrap {args.bootstrap}: must be 0 or more")
    return args, path, notes


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bootstrap", type=int, default=0, metavar="INT",
        help="bootstrap samples of identities for 95 %% confidence intervals, for example 2000 "
        "(default: none)")  # fmt: skip
    add("--features", type=path_option, default=None, metavar="FOLDER",
        help="keep the features there, and encode only those that it lacks")  # fmt: skip
    add("--rerank", action="store_true", default=False,
        help=f"further rows: metrics after k-reciprocal re-ranking of the first {RERANKED} images "
        "of each caption; takes 3 ms per caption and gallery on one core, and 3 MB")  # fmt: skip


if __name__ == "__main__":  # --help and wrong options end here: to import torch takes seconds
    run_main(options)

# isort: split

from processor.best import epoch_and_best
from processor.evaluation import evaluate_split
from processor.inference import Run
from processor.results import write_results
from processor.summary import compare_data, protocol_of, warn
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.machine import allow_open_files
from utils.run_log import setup_logger


def main() -> None:
    args, path, notes = options()
    allow_open_files(args.num_workers)
    check_writable(path.parent)
    processes, device = distributed.start(args.device)
    log = setup_logger(rank=processes.rank)
    for note in notes:
        log.info(note)
    checkpoint = load_checkpoint(path)
    run = Run(args, checkpoint, path, device)
    data = run.data()
    protocol = protocol_of(checkpoint, args, data, processes)
    data_entry, data_notes = compare_data(checkpoint, data)
    warn(log, data)
    epoch, best = epoch_and_best(checkpoint)
    of_epoch = "" if epoch is None else f"epoch {epoch}; "  # exports have none
    log.info(f"{path}: {of_epoch}{device.type}, {args.precision}")
    for note in (*run.notes, f"this checkpoint is {protocol}", *data_notes):
        log.info(note)

    queries: dict[str, Any] = {}
    results: dict[str, Any] = {"checkpoint": str(path), "epoch": epoch, "splits": {}}
    results |= {"protocol": protocol.results(), "data": data_entry}
    # The selecting split too, to compare its metrics with those of training.
    for name in [n for n in dict.fromkeys((protocol.chosen_on, "test")) if n in data.splits]:
        results["splits"][name], arrays = evaluate_split(
            name, run, path, best, protocol, processes, log, rank_reranked if args.rerank else None
        )
        queries |= arrays
    distributed.finish()
    if processes.is_rank_0:
        log.info(write_results(path, results, queries))


if __name__ == "__main__":
    run_main(main)
