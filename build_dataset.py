"""Build a text-based aerial-ground person data set from raw pictures.

    python build_dataset.py --recipe configs/construction/tbagpr.yaml \\
        --ag_reid path/AG-ReID --g2aps path/G2APS --output data/TBAGPR
    python build_dataset.py --recipe configs/construction/own.yaml \\
        --images crops.csv --output data/campus

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

import argparse
import re
from functools import partial

from utils.errors import UserError, run_main
from utils.files import path_option
from utils.interrupt import exit_on_signals
from utils.machine import cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    path = partial(parser.add_argument, metavar="PATH", type=path_option)
    path("--recipe", required=True, help="a YAML file with every decision")
    path("--output", required=True, help="folder of the data set, which is made")
    path("--ag_reid", help="folder of AG-ReID, v1 or v2")
    path("--g2aps", help="folder of G2APS, or of its crops")
    path("--images", help="CSV or Parquet with a row for each picture of one's own")
    add(
        "--workers",
        type=int,
        default=cores(),
        help="processes that measure pictures (default: one per core)",
    )
    add("--shard", type=_shard, metavar="K/N",
        help="do share K of N, from 1, of the stage that --until names")  # fmt: skip
    add("--until", choices=("measure", "labels", "captions"), help="stop after this stage")
    add("--force", action="store_true", help="replace the folder if it is such a data set")
    args = parser.parse_args()
    if args.shard and not args.until:
        raise UserError(
            "--shard: name the stage with --until; the last run, which writes, has no --shard"
        )
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    try:
        from construction.build import Build
        from construction.recipe import read_recipe
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install -r requirements-construction.txt"
        ) from None
    given = {"ag_reid": args.ag_reid, "g2aps": args.g2aps, "table": args.images}
    sources = {reader: path for reader, path in given.items() if path}
    recipe, folder = read_recipe(args.recipe), args.recipe.parent
    build = Build(recipe, sources, args.output, args.shard or (1, 1), args.workers, folder)
    build.run(args.until or "", args.force)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 3/16")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    exit_on_signals("the same command goes on from here")
    run_main(main)
