"""What was typed becomes the options of a training, an evaluation, a tool, a run that goes on."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict

from utils.config import check, check_training, read_preset, read_yaml, resolve
from utils.errors import UserError, rank
from utils.files import expand
from utils.option_type import Option
from utils.options import GROUPS, MAY_DIFFER, OPTIONS
from utils.runs import CONFIG, LAST, differences, folders, is_named, refuse_if_at_work

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What test.py may be given; it takes the rest from the run's configs.yaml.
TEST_OPTIONS = (
    "root_dir", "device", "precision", "test_batch_size", "num_workers", "image_cache",
    "attributes_file",
)  # fmt: skip
# Of those the ones that it never takes from there: a run may come from another machine, where they
# mean other places, or from a stranger.
TYPED_ONLY = ("image_cache", "attributes_file")
_CHECKPOINT_OPTIONS = ("config_file", "checkpoint")
# What other code of this family keeps in its configs.yaml besides options.
_BOOKKEEPING = {
    "training", "test", "distributed", "local_rank", "cont_queue_size", "queue_size", "queue_epoch",
    "crops_for_assign",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse prints a page of usage; one line is kinder
        message = re.sub(r"^argument --\w+: command line: ", "--", message)  # each says it once
        raise UserError(f"{message} (--help lists all options)")


def parse_options(
    argv: Sequence[str] | None = None,
    description: str = "",
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> EasyDict:
    """All options of a training, from the command line, a preset and the defaults.

    `extra` adds a tool's own options, which come back with the others.

    Raises UserError for an unknown key, a value of the wrong type or out of its range, and for
    options that contradict each other.
    """
    parser = _build_parser(OPTIONS.values(), description)
    parser.add_argument(
        "--config_file", metavar="YAML", type=expand, help="preset; the command line overrides it"
    )
    extra(parser)
    given = vars(parser.parse_args(argv))
    preset_file = given.pop("config_file", None)
    own = {name: given.pop(name) for name in list(given) if name not in OPTIONS}
    values = {**(read_preset(preset_file) if preset_file else {}), **given}
    if values.get("resume", "no") != "no":
        args = _resumed(values, given, Path(preset_file) if preset_file else None)
    else:
        args = resolve(values)
    check_training(args)
    return EasyDict(args, **own)


def _resumed(values: dict[str, Any], given: dict[str, Any], preset: Path | None) -> EasyDict:
    """The options of a run that goes on; without `resume_ckpt_file` if `auto` finds none.

    Without a preset they are the run's own, which the command line overrides.
    """

    def value(name: str) -> Any:
        return values.get(name, OPTIONS[name].default)

    named, mode = value("resume_ckpt_file"), value("resume")
    own = preset and preset.name == CONFIG and (preset.parent / LAST).is_file()
    if (named or own) and "output_dir" in given:
        says = "--resume_ckpt_file" if named else f"--config_file {preset}"
        raise UserError(f"{says} says where the run is; leave --output_dir out")
    if named:
        last = Path(named)
        check(not last.is_dir(), f"{last}: a folder; --resume_ckpt_file names a file, its {LAST}")
        check(last.is_file(), f"{last}: no such file (--resume_ckpt_file)")
    elif own:
        last = preset.parent / LAST
    else:
        # Where there must be a run, its own options say of which data set.
        dataset = value("dataset_name") if mode == "auto" else values.get("dataset_name", "*")
        found = folders(value("output_dir"), dataset)
        found = [folder for folder in found if is_named(folder, value("name"))]
        last = next((folder / LAST for folder in found if os.path.isfile(folder / LAST)), None)
        for folder in found if last is None else ():
            check(os.access(folder, os.X_OK), f"{folder}: {os.strerror(errno.EACCES)} (--resume)")
    if last is None:
        where = Path(value("output_dir"), dataset.strip("*"))
        check(mode == "auto", f"--resume: {where}/ has no run '{value('name')}' with a {LAST}")
        if rank() == 0:  # of several processes, one asks
            refuse_if_at_work(found)
        return resolve(values)
    recorded = last.parent / CONFIG
    told = bool(preset) or bool(set(given) - {"resume", "resume_ckpt_file", "num_epoch"})
    check(
        recorded.is_file() or (bool(named) and told),
        f"{recorded}: missing, and with it the run's options; all options and "
        f"--resume --resume_ckpt_file {last} go on, or remove the folder",
    )
    kept = read_preset(recorded) if recorded.is_file() else {}
    kept.pop("image_cache", None)  # see TYPED_ONLY; its attributes must stay what they were
    if own and "image_cache" not in given:
        values.pop("image_cache", None)
    if preset is not None:  # what makes no other experiment stays, unless it is told
        kept = {name: value for name, value in kept.items() if name in MAY_DIFFER}
    values = {**kept, **values}
    args = resolve({**values, "resume": mode, "resume_ckpt_file": str(last)})
    then = resolve(read_preset(recorded)) if recorded.is_file() else {}
    if args.precision == "auto":  # what that meant where the run began
        args.precision = then.get("precision", "auto")
    if mode == "auto" and then:
        free = set(MAY_DIFFER) - {"attributes_file", "finetune"} | {"num_epoch"}
        changed = differences(args, then, free)
        if changed:
            raise UserError(
                f"--resume auto: {last.parent} runs with other options: {', '.join(changed)}. "
                "Give another --name or --output_dir, or --resume to go on with the new options"
            )
    for name in ("seed", "finetune"):
        was = then.get(name, getattr(args, name))
        now = values.get(name, was)
        check(now == was, f"--{name} {now}: only a new run can have another than {was!r}")
        setattr(args, name, was)
    return args


def typed_again(args: EasyDict) -> list[str]:
    """Words for a command that takes this run's configs.yaml: the options in `TYPED_ONLY`."""
    changed = [name for name in TYPED_ONLY if args[name] != OPTIONS[name].default]
    return [word for name in changed for word in (f"--{name}", args[name])]


def changed_options(args: EasyDict, config: Path) -> list[str]:
    """What a resumed run changes of the options that its configs.yaml has, as lines to log."""
    if not config.is_file():
        return [f"{config}: missing, so nobody can tell which options have changed"]
    then = resolve(read_preset(config))
    ignored = ("resume", "resume_ckpt_file", "output_dir", "image_cache")
    told = [f"changed: {change}" for change in differences(args, then, ignored)]
    if then.image_cache and not args.image_cache:
        told.append(_not_taken(config, "image_cache", then.image_cache))
    return told


def _not_taken(config: Path, name: str, value: str) -> str:
    """What to tell of an option in `TYPED_ONLY` that a run's configs.yaml has."""
    return (
        f"{config}: its {name} is not taken on trust, since a run may come from another machine; "
        f"to use it: --{name} {shlex.quote(value)}"
    )


def parse_test_options(
    argv: Sequence[str] | None = None,
    description: str = "",
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> tuple[EasyDict, Path, list[str]]:
    """Options of an evaluation: the run's configs.yaml, a few of them overridden.

    `extra` adds a tool's own options, which come back with the others.

    Returns (options, checkpoint path, notes): notes are lines to log about what of configs.yaml is
    not used: keys that other code of this family wrote and that mean nothing here, and the options
    in `TYPED_ONLY`.
    """
    parser = _build_parser([OPTIONS[name] for name in TEST_OPTIONS], description)
    parser.add_argument(
        "--config_file",
        metavar="YAML",
        type=expand,
        required=True,
        help="configs.yaml of the run to evaluate",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PTH",
        type=expand,
        help="checkpoint (default: best.pth beside --config_file)",
    )
    extra(parser)
    given = vars(parser.parse_args(argv))
    own = {n: given.pop(n) for n in list(given) if n not in (*TEST_OPTIONS, *_CHECKPOINT_OPTIONS)}
    config_file = Path(given.pop("config_file"))
    checkpoint = Path(given.pop("checkpoint", None) or config_file.parent / "best.pth")
    recorded = read_yaml(config_file)
    unknown = sorted(set(recorded) - set(OPTIONS) - _BOOKKEEPING)
    notes = [f"{config_file}: ignored, unknown here: {', '.join(unknown)}"] if unknown else []
    recorded = {
        name: OPTIONS[name].coerce(value, str(config_file))
        for name, value in recorded.items()
        if name in OPTIONS
    }
    for name in TYPED_ONLY:
        value, default = recorded.pop(name, ""), OPTIONS[name].default
        if value not in ("", default, os.path.join(PROJECT, default)) and name not in given:
            notes.append(_not_taken(config_file, name, value))
    args = EasyDict(resolve({**recorded, **given}), **own)
    return args, checkpoint, notes


def parse_some(
    names: Sequence[str],
    description: str,
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> EasyDict:
    """For tools: the named options and those that `extra` adds; all others at their defaults."""
    given, own = parse_given(names, description, extra)
    return EasyDict(resolve(given), **own)


def parse_given(
    names: Sequence[str],
    description: str,
    extra: Callable[[argparse.ArgumentParser], object],
    defaults: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """For tools: what was typed of the named options, and the tool's own, which `extra` adds.

    defaults: whether --help shows those of the named options.
    """
    parser = _build_parser([OPTIONS[name] for name in names], description, defaults)
    extra(parser)
    given = vars(parser.parse_args())
    own = {name: given.pop(name) for name in list(given) if name not in names}
    return given, own


def _build_parser(options, description: str, defaults: bool = True) -> argparse.ArgumentParser:
    """Flags without defaults: what was not typed stays absent, so that a preset can fill it."""
    parser = _Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    options = list(options)
    for title, group in GROUPS.items():
        members = [o for o in group if o in options]
        section = parser.add_argument_group(title) if members else None
        for o in members:
            shown = " ".join(map(str, o.default)) if isinstance(o.default, list) else o.default
            help_text = o.help.replace("%", "%%")
            if defaults and shown not in (None, "") and shown is not False:
                help_text += f" (default: {shown})"
            if o.type is bool:
                section.add_argument(
                    f"--{o.name}", action=argparse.BooleanOptionalAction, help=help_text
                )
            else:
                section.add_argument(
                    f"--{o.name}",
                    type=_typed(o),
                    nargs="?" if o.const else o.count,
                    **({"const": o.const} if o.const else {}),
                    metavar="|".join(o.choices) if o.choices else o.type.__name__.upper(),
                    help=help_text,
                )
    return parser


def _typed(option: Option):
    def convert(text: str) -> Any:
        try:
            return option.coerce_one(text, "command line")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
