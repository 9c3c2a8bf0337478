"""docs/options.md from the table of options; `make docs` (tools/docs.py) writes it."""

from __future__ import annotations

from utils.command_line import TEST_OPTIONS
from utils.files import PROJECT
from utils.option_type import Option
from utils.options import GROUPS

PAGE = PROJECT / "docs/options.md"
INTRODUCTION = """# Options

`make docs` writes this page from the table in `utils/options.py`.

The options of `train.py`. The command line overrides a preset (`--config_file configs/mini.yaml`),
and a preset overrides the defaults. A preset is a YAML file of `option: value` lines; its line
`base: other.yaml` names a preset to start from. A run writes all its options to `configs.yaml`,
which is itself a preset. A flag without values is switched off by `--no-` before its name.

`test.py` reads the options of a run from its `configs.yaml` and accepts {accepted}.
"""
TYPES = {str: "text", int: "integer", float: "number", bool: ""}


def page() -> str:
    """The page as Markdown, one table per group of options."""
    accepted = ", ".join(f"`--{name}`" for name in TEST_OPTIONS)
    lines = [INTRODUCTION.format(accepted=accepted)]
    for group, options in GROUPS.items():
        lines += [f"## {group}", "", "| option | values | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `--{o.name}` | {values(o)} | {in_code(default(o))} | {o.help} |" for o in options
        ]
        lines.append("")
    return "\n".join(lines)


def values(option: Option) -> str:
    """The allowed values of an option, such as "2 integers, at least 16"."""
    if option.choices:
        return ", ".join(map(in_code, option.choices))
    kind = TYPES[option.type]
    if option.count is not None:
        kind = (
            f"{option.count} {kind}s" if isinstance(option.count, int) else f"one or more {kind}s"
        )
    return ", ".join(filter(None, (kind, option.bounds)))


def default(option: Option) -> str:
    """The default as on a command line; empty if the help text describes it."""
    if isinstance(option.default, list):
        return " ".join(map(str, option.default))
    if option.type is bool:
        return "on" if option.default else "off"
    return "" if option.default is None else str(option.default)


def in_code(text: str) -> str:
    """The text in backticks, unless it is empty."""
    return f"`{text}`" if text else ""
