"""What reproduce.py prints: the table of all jobs, and the plan of --dry_run."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

from datasets.registry import read_dataset
from processor.results import CHECKPOINTS
from tools._reproduce_jobs import PROTOCOLS, Job, epochs_done
from tools._reproduce_pairs import comparison
from tools._reproduce_table import Table
from tools.bench import measured_step
from utils.console import say
from utils.errors import UserError
from utils.files import write_atomically
from utils.metrics import METRICS, SHOWN, with_rsum
from utils.tables import (
    Grey,
    as_csv,
    console,
    in_latex,
    in_markdown,
    latex,
    markdown,
    mean_and_deviation,
)
from utils.text import visible


def write_tables(table: Table, jobs: list[Job], left_out: dict[str, str], folder: Path) -> None:
    """Print the table, then write table.md, table.tex and table.csv. Raises UserError if they
    cannot be written."""
    tables = list(tables_of(table, jobs, left_out))
    left = 2 if any("encoder" in row for row in table.rows) else 1
    for about, titles, rows in tables:
        say(f"{visible(table.title)}: {visible(about)}\n{console(titles, rows, left)}\n")
    note = "Mean ± standard deviation over seeds, percent. One gallery: the data set's first one."
    package = []
    if any(isinstance(cell, Grey) for _, _, rows in tables for row in rows for cell in row):
        note += " Rows in italics were not trained: their metrics are the published ones."
        package = ["% needs \\usepackage{xcolor}"]
    texts = {
        "md": [
            f"# {in_markdown(table.title)}\n",
            *(
                f"{in_markdown(about[0].upper() + about[1:])}:\n\n{markdown(t, r, left)}\n"
                for about, t, r in tables
            ),
            note,
        ],
        "tex": [*package, *(f"% {in_latex(about)}\n{latex(t, r)}" for about, t, r in tables)],
        "csv": [as_csv(t, r) for _, t, r in tables],
    }
    for name, lines in texts.items():
        text = "\n".join(lines).rstrip("\n") + "\n"
        write_atomically(folder / f"table.{name}", methodcaller("write", text.encode()))


def tables_of(
    table: Table, jobs: list[Job], left_out: dict[str, str]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(heading, titles, rows) of each protocol: mean and standard deviation over seeds, and the
    published metrics; then, if the table asks for it, of the comparison of its rows.

    Rows that are only published, or left out, have their published metrics in grey.
    """
    encoders = ["image encoder"] if any("encoder" in row for row in table.rows) else []
    titles = ["method", *encoders, "seeds", *SHOWN, "published R@1", "difference"]
    for protocol in PROTOCOLS:
        if not any(protocol in CHECKPOINTS[job.args.val_dataset] for job in jobs):
            continue
        rows = []
        for row in table.rows:
            name = row["name"]
            of_row = [job for job in jobs if job.row == name]
            metrics = [j.results[protocol] for j in of_row if j.results and protocol in j.results]
            published = row.get("published", {})
            grey = bool(published) and (name in left_out or bool(row.get("published_only")))
            failed = [job for job in of_row if job.error and not job.results]
            notes = [
                *(["ablation"] if row.get("ablation") else []),
                *(["published"] if grey else []),
                *([left_out[name]] if name in left_out else []),
                *([f"{len(failed)} failed"] if failed else []),
            ]
            line = [
                f"{name} ({'; '.join(notes)})" if notes else name,
                *([row.get("encoder", "")] if encoders else []),
                ", ".join(str(job.seed) for job in of_row if job.results),
                *(_published_cells(published) if grey else _measured_cells(metrics)),
                f"{published['R@1']:.2f}" if "R@1" in published else "",
                _difference(metrics, published),
            ]
            rows.append([*map(Grey, line)] if grey else line)
        yield heading(protocol, jobs), titles, rows
        if table.against:
            yield comparison(table, jobs, protocol)


def _measured_cells(metrics: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds, in the order of SHOWN; empty without seeds."""
    values = [with_rsum(of_seed) for of_seed in metrics]
    return [mean_and_deviation([v[name] for v in values]) for name in SHOWN]


def _published_cells(published: dict[str, float]) -> list[str]:
    """Published metrics in the order of SHOWN; empty where there is none."""
    values = with_rsum({name: published.get(name, math.nan) for name in METRICS})
    return ["" if math.isnan(value) else f"{value:.2f}" for value in values.values()]


def _difference(metrics: list[dict[str, Any]], published: dict[str, float]) -> str:
    """The mean R@1 over seeds minus the published one; empty if either is missing."""
    if not metrics or "R@1" not in published:
        return ""
    return f"{statistics.mean(m['R@1'] for m in metrics) - published['R@1']:+.2f}"


def heading(protocol: str, jobs: list[Job]) -> str:
    """Which split chose a protocol's epochs, and whether it shares images or people with test, as
    measured."""
    text = PROTOCOLS[protocol]
    heldout = {getattr(job.args, "heldout", 0) for job in jobs if job.args.val_dataset == "both"}
    if protocol == "paper" and any(heldout):
        percent = ", ".join(f"{100 * share:g} %" for share in sorted(heldout))
        text += f", trained without the {percent} of identities that are held out"
    measured = [
        j.results[protocol].get("protocol") for j in jobs if j.results and protocol in j.results
    ]
    overlaps = [of_job["overlap"] for of_job in measured if of_job and of_job.get("overlap")]
    images, people = (max((o.get(k, 0) for o in overlaps), default=0) for k in ("images", "people"))
    if images or people:
        text += f"; {images} of its images and {people} of its people are in test too"
    elif protocol in ("clean", "val") and measured:
        apart = {"clean": " (the clean protocol: test had no part in it)",
                 "val": "; none of its images or people is in test"}[protocol]  # fmt: skip
        text += apart if all(measured) else "; whether test has the same people is unknown"
    return text


def plan(jobs: list[Job], left_out: dict[str, str]) -> str:
    """The jobs that would run, with estimated hours from measured steps of each row."""
    rows = []
    per_epoch: dict[str, list[float]] = {}  # hours by a step's median, minimum and maximum
    total = [0.0] * 3
    for job in jobs:
        left = 0 if job.results else job.args.num_epoch - epochs_done(job)
        state = f"resumes after epoch {epochs_done(job)}" if left and job.last else "to run"
        state = "done" if job.results else "to evaluate" if not left else state
        if left and job.row not in per_epoch:
            data = read_dataset(job.args)
            steps = -(-len(data.train) // job.args.batch_size)
            say(f"measuring steps of {job.row}: on a CPU this may take minutes", sys.stderr)
            try:
                seconds = measured_step(job.args, data.has_pairs)
            except UserError as error:
                raise UserError(f"row {job.row}: {error}") from None
            per_epoch[job.row] = [steps * one / 3600 for one in seconds]
        hours = [left * one for one in per_epoch[job.row]] if left else [0.0] * 3
        total = [a + b for a, b in zip(total, hours, strict=True)]
        rows.append([job.row, state, job.seed, left, with_range(hours) if left else ""])
    rows += [[name, reason, "", "", ""] for name, reason in left_out.items()]
    text = console(["method", "state", "seed", "epochs left", "hours"], rows, left=2)
    return (
        f"{text}\n{with_range(total)} hours of training on this machine, one job at a time, by the "
        "median step (minimum to maximum in brackets); loading and evaluation are not included"
    )


def with_range(hours: list[float]) -> str:
    """A median with its range: "9.7 (9.1 to 10.4)"."""
    digits = ".1f" if hours[0] >= 1 else ".2g"
    median, least, most = (f"{h:{digits}}" for h in hours)
    return f"{median} ({least} to {most})"
