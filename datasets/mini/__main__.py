"""Command line of the renderer: python -m datasets.mini --help."""

import argparse
from pathlib import Path

from utils.console import say
from utils.devices import cores
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.text import visible

from .build import LAYOUTS, VALS, render
from .figure import draw_figure


def main() -> None:
    """Render the data set, or draw a figure with people of an existing one."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.mini",
        description="Render mini-TBAGPR, a synthetic set of aerial and ground pictures of "
        "pedestrians with captions and attributes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, default="TBAGPR", help="write the files of this data set")
    add("--out", type=path_option, default=Path("data/mini-LAYOUT"), help="folder of the data set")
    add("--seed", type=int, default=0, help="another seed gives other people")
    add("--train_ids", type=int, default=2400, help="identities to train on, over both sources")
    add("--val_ids", type=int, default=60, help="identities to validate on, over both sources")
    add("--test_ids", type=int, default=60, help="identities to test on, over both sources")
    add("--val", choices=VALS, default=VALS[0], help="val has its own people, or, as in "
        "TBAGPR, those of test (with its file names; --val_ids must equal --test_ids)")  # fmt: skip
    add("--pairs", type=int, default=2, help="aerial-ground pairs of images per identity")
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
    try:
        written = render(args.out, progress=True, **options)
    except (FileExistsError, ValueError) as error:
        raise UserError(str(error)) from None
    count = sum(1 for _ in args.out.rglob("*.jpg"))
    people = args.train_ids + args.test_ids + (args.val_ids if args.val == VALS[0] else 0)
    state = "wrote" if written else "already complete:"
    say(f"{state} {visible(args.out)}, {count} images of {people} identities, seed {args.seed}")


if __name__ == "__main__":
    run_main(main)
