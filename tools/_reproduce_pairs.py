"""Are the rows of reproduce.py different, or is it chance? Intervals, and paired tests of one row.

For each row, over its seeds: the mean of a metric with a 95 % interval (bootstrap over identities
and seeds), the difference from the mean of the row of comparison with the same, and a two-sided
p-value of that difference (paired permutation over identities), as in compare_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from processor.results import check_metrics, read_results
from tools._reproduce_jobs import PROTOCOLS, Job
from tools._reproduce_table import Table
from tools.compare_runs import ComparedRun, check_same, read_run
from utils.errors import UserError
from utils.metrics import METRICS
from utils.uncertainty import bootstrap_difference, permutation_p

SHOWN = ("R@1", "mAP")
RESAMPLES = 10_000


def comparison(
    table: Table, jobs: list[Job], protocol: str
) -> tuple[str, list[str], list[list[str]]]:
    """(heading, titles, rows) of the rows that have finished jobs. If their results of single
    captions cannot be compared, the heading says why, and there are no rows."""
    titles = ["method", "seeds"]
    titles += [f"{m} {what}" for m in SHOWN for what in ("(95 %)", "difference (95 %)", "p")]
    about = f"difference from {table.against}, {PROTOCOLS[protocol]}"
    try:
        runs = _runs_of(jobs, protocol)
        if table.against not in runs:
            return f"{about}: it has no finished job", titles, []
        rows = [
            _row(name, of_row, [] if name == table.against else runs[table.against])
            for name, of_row in runs.items()
        ]
    except UserError as error:
        return f"{about}: not computed: {error}", titles, []
    seeds = " and seeds" if any(len(of_row) > 1 for of_row in runs.values()) else ""
    return f"{about}; intervals cover other people{seeds}, p other people", titles, rows


def _runs_of(jobs: list[Job], protocol: str) -> dict[str, list[ComparedRun]]:
    """The finished jobs' results of every caption, by row. Raises UserError unless all of them
    ranked the same gallery for the same captions."""
    runs: dict[str, list[ComparedRun]] = {}
    first = None
    for job in jobs:
        if not job.results or protocol not in job.results:
            continue
        archive = Path(str(job.results[protocol].get("queries")))
        path = archive.with_name(archive.name.replace("_queries.npz", "_results.json"))
        results = read_results(path, archive)
        check_metrics(results, path)
        gallery = next(iter(results["splits"]["test"]["galleries"]))
        run = read_run(archive, "test", gallery, "")
        first = first or run
        check_same(first, run, "test")
        runs.setdefault(job.row, []).append(run)
    return runs


def _row(name: str, runs: list[ComparedRun], reference: list[ComparedRun]) -> list[str]:
    """The cells of one row; without a reference those of the difference are empty."""
    pids_Q = runs[0].ranked.pids_Q
    own_RQM = torch.stack([run.ranked.percentages() for run in runs])
    own = bootstrap_difference(torch.zeros_like(own_RQM[:1]), own_RQM, pids_Q, RESAMPLES)
    if reference:
        other_RQM = torch.stack([run.ranked.percentages() for run in reference])
        interval = bootstrap_difference(other_RQM, own_RQM, pids_Q, RESAMPLES)
        p_M = permutation_p(own_RQM.mean(dim=0) - other_RQM.mean(dim=0), pids_Q, RESAMPLES)
    cells = [name, ", ".join(str(run.seed) for run in runs)]
    for metric in SHOWN:
        m = METRICS.index(metric)
        mean = _mean(runs, metric)
        low, high = own[:, m].tolist()
        cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
        if reference:
            low, high = interval[:, m].tolist()
            difference = mean - _mean(reference, metric)
            cells += [f"{difference:+.2f} ({low:+.2f} to {high:+.2f})", f"{p_M[m]:.4f}"]
        else:
            cells += ["", ""]
    return cells


def _mean(runs: list[ComparedRun], metric: str) -> float:
    return sum(run.ranked.summary().metrics[metric] for run in runs) / len(runs)
