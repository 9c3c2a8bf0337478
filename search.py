"""Search one's own pictures and videos for a person, by a sentence or a picture.

python search.py find "a woman in a yellow dress with a black bag" --gallery galleries/campus
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

from gallery import find
from utils.command_line import Parser
from utils.errors import run_main
from utils.interrupt import exit_on_signals


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = (find.__doc__ or "").split("\n")[0]
    one = commands.add_parser("find", description=what, help=what, allow_abbrev=False)
    find.add_options(one)
    one.set_defaults(run=find.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_on_signals()
    run_main(main)
