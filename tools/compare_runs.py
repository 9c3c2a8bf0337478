"""Compare runs caption by caption: is one side better, or is the difference chance?

    python tools/compare_runs.py logs/AGDataAttr/<run a> logs/AGDataAttr/<run b>
    python tools/compare_runs.py --a <seed 1 of a> <seed 2 of a> --b <seed 1 of b> <seed 2 of b>

Reads the results of test.py: test_queries.npz, or best_test_queries.npz of a run with both
protocols (`--protocol paper`, or the file in place of the run's folder). Prints the options, data,
epochs and protocol in which the runs differ, and refuses runs with other captions, identities or
galleries. Then prints each metric of both sides (means over their seeds) and the difference b - a,
with

- a 95 % interval (bootstrap). It covers other people. It covers other seeds too if a side has
  several seeds. With one seed per side it says nothing about other seeds.
- a two-sided p-value (paired permutation over identities). It covers only other people: it tests
  whether exactly these seeds differ, not whether other seeds would.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import torch

from processor.results import CHECKPOINTS, read_queries, read_results, stem
from utils.config import read_yaml
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.metrics import SHOWN, Ranked, with_rsum
from utils.options import MAY_DIFFER, OPTIONS, SAME_RESULTS
from utils.runs import CONFIG
from utils.tables import console, mean_and_deviation
from utils.text import visible
from utils.uncertainty import bootstrap_difference, permutation_p

# Options that make another experiment. `seed` is not one: a side may have several seeds.
COMPARED = [
    name
    for name in OPTIONS
    if name not in (*MAY_DIFFER, *SAME_RESULTS, "seed") or name in ("finetune", "attributes_file")
]
UNKNOWN = "unknown"


@dataclass
class ComparedRun:
    """An evaluated run; options and results are empty if their files are missing."""

    path: Path
    ranked: Ranked
    options: dict[str, Any]
    results: dict[str, Any]

    def result(self, *keys: str) -> Any:
        """An entry of the results, or "unknown"."""
        value: Any = self.results
        for key in keys:
            value = value.get(key, UNKNOWN) if isinstance(value, dict) else UNKNOWN
        return value

    @property
    def seed(self) -> Any:
        return self.options.get("seed", UNKNOWN)

    def facts(self) -> dict[str, str]:
        """What may differ between runs, by name."""
        splits = self.result("data", "fingerprint")
        splits = splits if isinstance(splits, dict) else {}
        return {
            **{f"--{n}": str(self.options.get(n, UNKNOWN)) for n in COMPARED if self.options},
            "data": str(self.result("data", "name")),
            **{f"data, {split}": str(value)[:12] for split, value in splits.items()},
            "epoch evaluated": str(self.result("epoch")),
            "epoch chosen on": str(self.result("protocol", "chosen_on")),
        }


def read_run(path: Path, split: str, gallery: str, protocol: str) -> ComparedRun:
    """A run by its folder or by its archive of queries. Raises UserError."""
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    options = read_yaml(config) if config.is_file() else {}
    archive = path
    if path.is_dir():
        checkpoint = "best.pth"
        if protocol:
            kind = options.get("val_dataset", UNKNOWN)
            by_protocol = CHECKPOINTS.get(kind, {}) if isinstance(kind, str) else {}
            if protocol not in by_protocol:
                raise UserError(
                    f"{path}: no checkpoint of --protocol {protocol}; the run's --val_dataset is "
                    f"{kind}, which has: {', '.join(by_protocol) or UNKNOWN}"
                )
            checkpoint = by_protocol[protocol]
        archive = path / f"{stem(checkpoint)}_queries.npz"
        if not os.path.lexists(archive):
            raise UserError(
                f"{archive}: no such file; evaluate the run first: python test.py --config_file "
                f"{config} --checkpoint {path / checkpoint}"
            )
    ranked = read_queries(archive, split, gallery)
    results = archive.with_name(archive.name.replace("_queries.npz", "_results.json"))
    exists = results.suffix == ".json" and os.path.lexists(results)
    run = ComparedRun(path, ranked, options, read_results(results, archive) if exists else {})
    images = run.result("splits", split, "galleries", gallery, "gallery")
    if not ranked.gallery and isinstance(images, int):  # an archive of an older version
        run.ranked = Ranked(ranked.rows_Q3, ranked.pids_Q, images)
    return run


def check_same(one: ComparedRun, other: ComparedRun, split: str) -> None:
    """Raises UserError unless two runs ranked the same gallery for the same captions."""
    a, b = one.ranked, other.ranked
    fingerprints = [run.result("data", "fingerprint", split) for run in (one, other)]
    if len(a.pids_Q) != len(b.pids_Q):
        differ = f"other captions: {len(a.pids_Q)} and {len(b.pids_Q)}"
    elif not torch.equal(a.pids_Q, b.pids_Q):
        differ = "captions of other identities, or in another order"
    elif a.gallery and b.gallery and a.gallery != b.gallery:
        differ = f"other galleries: {a.gallery} and {b.gallery} images"
    elif not torch.equal(a.rows_Q3.isnan(), b.rows_Q3.isnan()):
        differ = "other galleries: a caption has a match in one and none in the other"
    elif UNKNOWN not in fingerprints and fingerprints[0] != fingerprints[1]:
        a_print, b_print = (str(fingerprint)[:12] for fingerprint in fingerprints)
        differ = f"other captions or images (fingerprints {a_print}, {b_print})"
    else:
        return
    raise UserError(f"{one.path} and {other.path} cannot be compared: {split} has {differ}")


def facts_table(sides: dict[str, list[ComparedRun]]) -> str:
    """A table of the facts that are not the same in all runs."""
    rows = []
    facts = {side: [run.facts() for run in runs] for side, runs in sides.items()}
    for name in dict.fromkeys(name for runs in facts.values() for one in runs for name in one):
        cells = {side: distinct(one.get(name) for one in runs) for side, runs in facts.items()}
        if len({value for values in cells.values() for value in values}) > 1:
            rows.append([name, *(", ".join(values) for values in cells.values())])
    if not rows:
        return "nothing known differs between the runs"
    return console(["what differs", *sides], rows, left=1 + len(sides))


def distinct(values: Iterable[str | None]) -> list[str]:
    """Each value that is not None, once, in order."""
    return list(dict.fromkeys(value for value in values if value is not None))


def warnings(sides: dict[str, list[ComparedRun]], split: str) -> list[str]:
    """Reasons to distrust the comparison, one per line."""
    lines = []
    for side, runs in sides.items():
        facts = [run.facts() for run in runs]
        mixed = [
            name
            for name in facts[0]
            if name != "epoch evaluated" and len(distinct(one.get(name) for one in facts)) > 1
        ]
        if mixed:
            lines.append(
                f"{side}: not one recipe with several seeds: its runs differ in {', '.join(mixed)}"
            )
        seeds = [run.seed for run in runs if run.seed != UNKNOWN]
        if len(set(map(str, seeds))) < len(seeds):
            lines.append(f"{side}: a seed occurs twice; a repeat says little about other seeds")
        if any(run.result("protocol", "chosen_on") == split for run in runs):
            lines.append(f"{side}: {split} itself chose the epoch; its metrics are optimistic")
        if any(run.result("protocol", "chosen_on") == UNKNOWN for run in runs):
            lines.append(f"{side}: what chose the epoch is unknown (results of an older version)")
        for run in runs:
            chooser = run.result("protocol", "chosen_on")
            counts = [run.result("protocol", "overlap", kind) for kind in ("images", "people")]
            if any(isinstance(count, int) and count for count in counts):
                lines.append(
                    f"{side}: {counts[0]} images and {counts[1]} people of {chooser}, which chose "
                    f"the epoch of {run.path}, are in test too"
                )
            if not run.options:
                lines.append(f"{side}: the options of {run.path} are unknown ({CONFIG} is missing)")
    every = [run for runs in sides.values() for run in runs]
    if len({str(run.result("protocol", "chosen_on")) for run in every} - {UNKNOWN}) > 1:
        lines.append("the epochs were chosen in different ways, which adds to the difference")
    if any(run.result("data", "fingerprint", split) == UNKNOWN for run in every):
        lines.append(
            f"captions and images of {split} were compared only by their number and identities "
            "(results of older versions)"
        )
    return lines


def compare(
    sides: dict[str, list[Path]], split: str, gallery: str, resamples: int, protocol: str = ""
) -> str:
    """The report. Raises UserError unless all runs ranked the same gallery and captions."""
    for name, paths in sides.items():
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"--{name}: a run is given twice")
    runs = {
        name: [read_run(path, split, gallery, protocol) for path in paths]
        for name, paths in sides.items()
    }
    every = [run for side in runs.values() for run in side]
    for run in every[1:]:
        check_same(every[0], run, split)
    pids_Q = every[0].ranked.pids_Q
    a_RQM, b_RQM = (
        torch.stack([run.ranked.percentages() for run in side]) for side in runs.values()
    )
    low, high = bootstrap_difference(a_RQM, b_RQM, pids_Q, resamples).tolist()
    p = permutation_p(b_RQM.mean(dim=0) - a_RQM.mean(dim=0), pids_Q, resamples).tolist()
    covered = "people and seeds" if max(len(a_RQM), len(b_RQM)) > 1 else "people"
    metrics = [[with_rsum(r.ranked.summary().metrics) for r in side] for side in runs.values()]
    rows = []
    for i, metric in enumerate(SHOWN):
        values = [[run[metric] for run in side] for side in metrics]
        one, two = map(statistics.mean, values)
        rows.append(
            [metric, *map(mean_and_deviation, values), f"{two - one:+.2f}",
             f"{low[i]:+.2f} to {high[i]:+.2f}", f"{p[i]:.4f}"]
        )  # fmt: skip
    lines = [
        visible(f"{n}: {run.path} (seed {run.seed})") for n, side in runs.items() for run in side
    ]
    images = f"{every[0].ranked.gallery} images, " if every[0].ranked.gallery else ""
    lines += [
        facts_table(runs),
        visible(f"{split}, gallery {gallery}: ")
        + f"{len(pids_Q)} captions of {len(pids_Q.unique())} identities, "
        f"{images}{resamples} resamples",
        console(["metric", "a", "b", "b - a", f"95 % ({covered})", "p (people)"], rows, left=0),
        *map(visible, warnings(runs, split)),
    ]
    for name, side in runs.items():
        if len(side) == 1:
            lines.append(f"{name}: one seed, so this says nothing about other seeds")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", type=path_option, metavar="RUN", help="folders of two runs, a and b")
    for side in ("a", "b"):
        add(
            f"--{side}",
            nargs="+",
            type=path_option,
            metavar="RUN",
            help=f"runs of side {side}, one per seed",
        )
    add("--split", default="test", help="as test.py names it (default: test)")
    add("--gallery", default="aerial", help="as test.py names it (default: aerial)")
    add(
        "--protocol",
        default="",
        choices=sorted({name for checkpoints in CHECKPOINTS.values() for name in checkpoints}),
        help="which checkpoint, for runs with both protocols (default: best.pth)",
    )
    add("--resamples", type=int, default=10_000, metavar="INT",
        help="of bootstrap and permutation (default: 10000)")  # fmt: skip
    args = parser.parse_args()
    if args.resamples < 1:
        raise UserError(f"--resamples {args.resamples}: must be 1 or more")
    if len(args.runs) == 2 and not (args.a or args.b):
        args.a, args.b = ([path] for path in args.runs)
    elif args.runs or not (args.a and args.b):
        raise UserError("give two runs, or --a RUN [RUN ...] --b RUN [RUN ...]")
    sides = {"a": args.a, "b": args.b}
    say(compare(sides, args.split, args.gallery, args.resamples, args.protocol))


if __name__ == "__main__":
    run_main(main)
