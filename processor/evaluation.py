"""Evaluation of a checkpoint on a split: its tables in the log, and its part of the results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from processor.failures import explain_failures
from processor.inference import Run
from processor.result_tables import attribute_table, gallery_table, interval_table
from processor.results import intervals, per_query
from processor.summary import Protocol, compare_metrics
from utils.distributed import Processes
from utils.metrics import Ranked
from utils.text import Multiline, visible


def evaluate_split(
    name: str,
    run: Run,
    checkpoint: Path,
    best: dict[str, Any],
    protocol: Protocol,
    processes: Processes,
    log: logging.Logger,
    rank_again: Callable[..., Ranked] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluate a run on a split, by the options of test.py.

    Args:
        name: of the split.
        checkpoint: the file of the run's model.
        best: the metrics of training at the checkpoint's epoch, and their split.
        rank_again: ranks every gallery a second time, for metrics of their own.

    Returns:
        The split's entry in test_results.json.
        Its arrays in test_queries.npz.
    """
    args, data, model = run.args, run.data(), run.model
    evaluator = run.evaluator(name, processes)
    with explain_failures(args, run.device, evaluator.files, "evaluation"):
        if args.features:
            features = evaluator.encode_into(args.features, model, checkpoint)
        else:
            features = evaluator.encode(model)
        galleries = evaluator.galleries(features)
    metrics = {k: ranked.summary() for k, ranked in galleries.items()}
    results: dict[str, Any] = {"galleries": {k: r.results() for k, r in metrics.items()}}
    if rank_again:
        again = evaluator.galleries(features, rank_again)
        reranked = {k: ranked.summary() for k, ranked in again.items()}
        results["reranked"] = {k: r.results() for k, r in reranked.items()}
        metrics = {
            f"{k}{suffix}": rows[k]
            for k in metrics
            for suffix, rows in (("", metrics), (", re-ranked", reranked))
        }
    heading = visible(f"{name} split, which {protocol.role(name)}")
    log.info(Multiline(f"\n{heading}\n{gallery_table(metrics)}"))
    if args.bootstrap:
        bounds = {k: intervals(r, args.bootstrap, args.seed) for k, r in galleries.items()}
        results["intervals"] = bounds
        heading = f"95 % confidence intervals, {args.bootstrap} bootstrap samples of identities"
        log.info(Multiline(f"\n{heading}\n{interval_table(bounds)}"))
    if best.get("split") == name:
        log.info(compare_metrics(best, next(iter(metrics.values()))))
    if data.attribute_names and hasattr(model, "atr_matching_head"):
        accuracy = evaluator.attribute_accuracy(model, features)
        results["attribute_accuracy"] = accuracy
        log.info(Multiline(f"\nFIRM's accuracy per attribute, %\n{attribute_table(accuracy)}"))
    return results, per_query(name, galleries)
