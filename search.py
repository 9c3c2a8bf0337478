"""Search one's own pictures and videos for a person, by a sentence or a picture.

    python search.py index --config_file logs/AGDataAttr/<run>/configs.yaml \\
        --images path/to/pictures --gallery galleries/campus
    python search.py find "a woman in a yellow dress" --gallery galleries/campus
    python search.py info --gallery galleries/campus
    python search.py delete --gallery galleries/campus --identity 17

`index` makes a gallery of people, or brings one up to date. `python search.py COMMAND --help` lists
the options of a command.
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

import importlib
import sys

from utils.command_line import Parser
from utils.errors import UserError, run_main
from utils.interrupt import exit_on_signals

# By command: its module has `add_options` and `run`, and its docstring's first line says what it
# does. It is imported for this command alone, because torch and others take seconds.
COMMANDS = {
    "index": "gallery.commands_index",
    "find": "gallery.find",
    "info": "gallery.commands_info",
    "delete": "gallery.commands_delete",
}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    for name, module in COMMANDS.items():
        if words[:1] not in ([name], []):
            commands.add_parser(name)  # so that an unknown command is told the known ones
            continue
        try:
            command = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is not installed: pip install -r requirements-search.txt"
            ) from None
        what = (command.__doc__ or "").split("\n")[0]
        one = commands.add_parser(name, description=what, help=what, allow_abbrev=False)
        command.add_options(one)
        one.set_defaults(run=command.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_on_signals()
    run_main(main)
