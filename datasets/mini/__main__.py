"""Command line of the renderer: python -m datasets.mini --help."""

import argparse
from functools import partial
from pathlib import Path

from utils.console import say
from utils.documents import read_json_file
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.machine import cores
from utils.text import visible

from .build import MARKER, VALS, render
from .figure import draw_figure
from .layouts import LAYOUTS, WITHOUT_VAL
from .raw import RAW_LAYOUTS, render_raw


def main() -> None:
    """Render the data set, or draw a figure with people of an existing one."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.mini",
        description="Render mini-TBAGPR, a synthetic set of aerial and ground pictures of "
        "pedestrians with captions and attributes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layout", choices=(*LAYOUTS, *RAW_LAYOUTS), default="TBAGPR",
        help="write the files of this data set; those in raw are sources of TBAGPR, with planted "
        "faults, as they are published")  # fmt: skip
    add("--out", type=path_option, default=Path("data/mini-LAYOUT"), help="folder of the data set")
    add("--seed", type=int, default=0, help="another seed gives other people")
    # Without a default here, because the raw layouts have others.
    sizes = partial(add, type=int, default=argparse.SUPPRESS)
    sizes("--train_ids", help="identities to train on, over both sources (default: 2400; raw: 200)")
    sizes("--val_ids", help="identities to validate on, over both sources (default: 60; raw, "
          "AERI-PEDES and TAG-PEDES: none)")  # fmt: skip
    sizes("--test_ids", help="identities to test on, over both sources (default: 60)")
    add("--val", choices=VALS, default=VALS[0], help="val has its own people, or, as in "
        "TBAGPR, those of test (with its file names; --val_ids must equal --test_ids)")  # fmt: skip
    sizes("--pairs", help="aerial-ground pairs of images per identity (default: 2; raw: 8)")
    add("--workers", type=int, default=min(8, cores()), help="processes that render")
    add("--force", action="store_true", help="replace the folder if it exists")
    add("--figure", type=path_option, help="only draw a PNG with test people of the set in --out")
    args = parser.parse_args()
    args.out = Path(str(args.out).replace("LAYOUT", args.layout))
    if args.figure:
        try:
            draw_figure(args.out, args.figure)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise UserError(f"{args.out}: no people to draw: {error}") from None
        say(f"wrote {visible(args.figure)}")
        return
    options = {k: v for k, v in vars(args).items() if k not in ("out", "figure")}
    raw = args.layout in RAW_LAYOUTS
    if (raw or args.layout in WITHOUT_VAL) and (args.val != VALS[0] or "val_ids" in options):
        raise UserError(f"--layout {args.layout} has no val split; leave --val and --val_ids out")
    if raw:
        del options["val"]
    try:
        written = (render_raw if raw else render)(args.out, progress=True, **options)
    except (FileExistsError, ValueError) as error:
        raise UserError(str(error)) from None
    count = sum(1 for _ in args.out.rglob("*.jpg"))
    made = read_json_file(args.out / MARKER)
    people = made["train_ids"] + made["test_ids"]
    people += made.get("val_ids", 0) if args.val == VALS[0] else 0
    state = "wrote" if written else "already complete:"
    say(f"{state} {visible(args.out)}, {count} images of {people} identities, seed {args.seed}")


if __name__ == "__main__":
    run_main(main)
