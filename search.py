"""Search one's own pictures and videos for a person, by a sentence or a picture.

    python search.py index --config_file logs/AGDataAttr/<run>/configs.yaml \\
        --images path/to/pictures --gallery galleries/campus
    python search.py find "a woman in a yellow dress" --gallery galleries/campus
    python search.py serve --gallery galleries/campus
    python search.py compress --gallery galleries/campus --memory 1GiB
    python search.py info --gallery galleries/campus
    python search.py delete --gallery galleries/campus --identity 17

`index` makes a gallery of people, or brings one up to date. `python search.py COMMAND --help` lists
the options of a command. With an encoder in ONNX (`--onnx FOLDER`) they need no torch.
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

import sys
from importlib import import_module

from utils.command_line import Parser
from utils.errors import UserError, run_main
from utils.interrupt import exit_on_signals

# A command's module has `add_options` and `run`, and its docstring's first line says what it does.
# It is imported for this command alone, because the libraries of some take seconds.
COMMANDS = {
    "index": "commands_index", "find": "find", "serve": "commands_serve",
    "compress": "commands_compress", "info": "commands_info", "delete": "commands_delete",
}  # fmt: skip


def main() -> None:
    try:
        _main()
    except ModuleNotFoundError as error:  # also of what only some options need
        raise UserError(
            f"{error.name} is not installed: pip install -r requirements-search.txt"
        ) from None


def _main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    for name, module in COMMANDS.items():
        if words[:1] not in ([name], []):
            commands.add_parser(name)  # so that an unknown command is told the known ones
            continue
        command = import_module(f"gallery.{module}")
        what = (command.__doc__ or "").split("\n")[0]
        one = commands.add_parser(name, description=what, help=what, allow_abbrev=False)
        command.add_options(one)
        one.set_defaults(start=command.run)
    args = parser.parse_args()
    args.start(args)


if __name__ == "__main__":
    exit_on_signals()
    run_main(main)
