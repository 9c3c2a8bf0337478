"""Is one run better than another, or is it chance? Paired, over the identities of a test set.

    python tools/compare_runs.py logs/AGDataAttr/<run a> logs/AGDataAttr/<run b>

Both need test_queries.npz, which test.py writes. Prints each figure of both, the difference b - a,
its 95 % interval (bootstrap over identities) and a two-sided p-value (paired permutation over
identities). The same captions in the same order are needed; no retraining, so it says nothing about
other seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

from prettytable import PrettyTable

from processor.queries import read_queries
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.metrics import FIGURES
from utils.uncertainty import bootstrap, permutation_p


def compare(paths: list[Path], split: str, gallery: str, draws: int) -> str:
    """The table. Raises UserError unless both runs ranked the same captions."""
    a, b = (read_queries(path / "test_queries.npz", split, gallery) for path in paths)
    if a.pids_Q.tolist() != b.pids_Q.tolist():
        raise UserError(
            f"{paths[0]} and {paths[1]} were not evaluated on the same captions of {split}"
        )
    difference_QM = b.percentages() - a.percentages()
    low, high = bootstrap(difference_QM, a.pids_Q, draws).tolist()
    p = permutation_p(difference_QM, a.pids_Q, draws).tolist()
    means = [ranked.summary().percentages() for ranked in (a, b)]
    table = PrettyTable(["figure", "a", "b", "b - a", "95 % interval", "p"])
    table.align = "r"
    for i, name in enumerate(FIGURES):
        one, two = means[0][name], means[1][name]
        table.add_row(
            [name, f"{one:.2f}", f"{two:.2f}", f"{two - one:+.2f}",
             f"{low[i]:+.2f} to {high[i]:+.2f}", f"{p[i]:.4f}"]
        )  # fmt: skip
    people = len(a.pids_Q.unique())
    return (
        f"a: {paths[0]}\nb: {paths[1]}\n{split}, gallery {gallery}: {len(a.pids_Q)} captions of "
        f"{people} identities, {draws} draws\n{table.get_string()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs=2, type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument("--split", default="test", help="val or test (default: test)")
    parser.add_argument("--gallery", default="aerial", help="as test.py names it (default: aerial)")
    parser.add_argument(
        "--draws", type=int, default=10_000, help="of bootstrap and permutation (default: 10000)"
    )
    args = parser.parse_args()
    print(compare(args.runs, args.split, args.gallery, args.draws))


if __name__ == "__main__":
    run_main(main)
