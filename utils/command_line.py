"""The command line: options of a training, of a resumed run, of an evaluation, of a tool."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from easydict import EasyDict

from utils.config import check, check_training, read_preset, read_yaml, resolve
from utils.errors import UserError, rank
from utils.files import expand
from utils.option_type import Option
from utils.options import GROUPS, MAY_DIFFER, OPTIONS
from utils.runs import CONFIG, LAST, differences, is_named, refuse_if_in_use, run_folders

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What test.py accepts; it reads the other options from the run's configs.yaml.
TEST_OPTIONS = (
    "root_dir", "device", "precision", "test_batch_size", "num_workers", "image_cache",
    "attributes_file",
)  # fmt: skip
# Those that it never reads from there: a run may come from another machine, where these paths mean
# other files, or from somebody who is not trusted.
COMMAND_LINE_ONLY = ("image_cache", "attributes_file")
_CHECKPOINT_OPTIONS = ("config_file", "checkpoint")
# What the original code and its relatives keep in configs.yaml besides options.
_BOOKKEEPING = {
    "training", "test", "distributed", "local_rank", "cont_queue_size", "queue_size", "queue_epoch",
    "crops_for_assign",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(
        self, message: str
    ) -> NoReturn:  # argparse prints a page of usage; one line is kinder
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
        args = _resume_options(values, given, Path(preset_file) if preset_file else None)
    else:
        args = resolve(values)
    check_training(args)
    return EasyDict(args, **own)


def _resume_options(values: dict[str, Any], given: dict[str, Any], preset: Path | None) -> EasyDict:
    """The options of a run to resume; with `--resume auto` and no such run, those of a new one.

    Args:
        values: what the preset and the command line set.
        given: what the command line sets.
        preset: the preset's file, if there is one.
    """
    last = _checkpoint_to_resume(values, given, preset)
    if last is None:
        return resolve(values)
    recorded = _recorded_options(last, values, given, preset)
    values = _merge(recorded or {}, values, given, preset)
    args = resolve({**values, "resume_ckpt_file": str(last)})
    if recorded is not None:
        then = resolve(recorded)
        if args.precision == "auto":  # what that meant where the run began
            args.precision = then.precision
        _refuse_changes(args, then, values, last.parent)
        args.seed, args.finetune = then.seed, then.finetune
    return args


def _checkpoint_to_resume(
    values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> Path | None:
    """The checkpoint named, that of the run whose configs.yaml is the preset, or the newest one.

    None if `--resume auto` finds no run. Raises UserError if there must be one.
    """
    named = values.get("resume_ckpt_file")
    if (named or _is_of_run(preset)) and "output_dir" in given:
        flag = "--resume_ckpt_file" if named else f"--config_file {preset}"
        raise UserError(f"{flag} says where the run is; leave --output_dir out")
    if named:
        last = Path(named)
        check(not last.is_dir(), f"{last}: a folder; --resume_ckpt_file names a file, its {LAST}")
        check(last.is_file(), f"{last}: no such file (--resume_ckpt_file)")
        return last
    return preset.parent / LAST if _is_of_run(preset) else _newest_checkpoint(values)


def _is_of_run(preset: Path | None) -> TypeGuard[Path]:
    """Whether the preset is the configs.yaml of a run that has saved."""
    return preset is not None and preset.name == CONFIG and (preset.parent / LAST).is_file()


def _newest_checkpoint(values: dict[str, Any]) -> Path | None:
    """The last.pth of the newest run of `--name` in `--output_dir`.

    None if `--resume auto` finds none and no other process works on such a run. Raises UserError.
    """
    output_dir, name = (values.get(o, OPTIONS[o].default) for o in ("output_dir", "name"))
    auto = values["resume"] == "auto"
    # Where there must be a run, its own options say of which data set.
    dataset = values.get("dataset_name", OPTIONS["dataset_name"].default if auto else "*")
    runs = [folder for folder in run_folders(output_dir, dataset) if is_named(folder, name)]
    for folder in runs:
        if os.path.isfile(folder / LAST):
            return folder / LAST
    for folder in runs:
        check(os.access(folder, os.X_OK), f"{folder}: {os.strerror(errno.EACCES)} (--resume)")
    where = Path(output_dir, dataset.strip("*"))
    check(auto, f"--resume: {where}/ has no run '{name}' with a {LAST}")
    if rank() == 0:  # of several processes, one asks
        refuse_if_in_use(runs)
    return None


def _recorded_options(
    last: Path, values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> dict[str, Any] | None:
    """What the run's configs.yaml has; None if it is lost and all options are given again.

    Raises UserError if it is lost and they are not.
    """
    config = last.parent / CONFIG
    if config.is_file():
        return read_preset(config)
    again = preset or set(given) - {"resume", "resume_ckpt_file", "num_epoch"}
    check(
        bool(values.get("resume_ckpt_file") and again),
        f"{config}: missing, and with it the run's options; to resume, give all options and "
        f"--resume --resume_ckpt_file {last}, or remove the folder",
    )
    return None


def _merge(
    recorded: dict[str, Any], values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> dict[str, Any]:
    """The run's recorded options, overridden by those of the preset and of the command line.

    With a preset, only options in MAY_DIFFER are taken from the record. A run's image_cache never
    is, see COMMAND_LINE_ONLY; its attributes_file is, since the attributes must stay the same.
    """
    kept = {n: v for n, v in recorded.items() if preset is None or n in MAY_DIFFER}
    kept.pop("image_cache", None)
    if _is_of_run(preset) and "image_cache" not in given:
        values = {n: v for n, v in values.items() if n != "image_cache"}
    return {**kept, **values}


def _refuse_changes(args: EasyDict, then: EasyDict, values: dict[str, Any], folder: Path) -> None:
    """Raise UserError for what a resumed run may not change of the options that it had (`then`).

    With `--resume auto` that is all that makes another experiment but the number of epochs; else
    the seed and the weights that the run began with, if they are given.
    """
    if args.resume == "auto":
        free = set(MAY_DIFFER) - {"attributes_file", "finetune"} | {"num_epoch"}
        changed = differences(args, then, free)
        check(
            not changed,
            f"--resume auto: {folder} runs with other options: {', '.join(changed)}. Give another "
            "--name or --output_dir, or --resume to resume it with the new options",
        )
    for name in ("seed", "finetune"):
        now, was = values.get(name, then[name]), then[name]
        check(now == was, f"--{name} {now}: only a new run can have another than {was!r}")


def typed_again(args: EasyDict) -> list[str]:
    """The options in `COMMAND_LINE_ONLY` as words, for a command that reads the configs.yaml."""
    changed = [name for name in COMMAND_LINE_ONLY if args[name] != OPTIONS[name].default]
    return [word for name in changed for word in (f"--{name}", args[name])]


def changed_options(args: EasyDict, config: Path) -> list[str]:
    """Lines to log: which options of its configs.yaml a resumed run changes."""
    if not config.is_file():
        return [f"{config}: missing, so nobody can tell which options have changed"]
    then = resolve(read_preset(config))
    ignored = ("resume", "resume_ckpt_file", "output_dir", "image_cache")
    told = [f"changed: {change}" for change in differences(args, then, ignored)]
    if then.image_cache and not args.image_cache:
        told.append(_not_taken(config, "image_cache", then.image_cache))
    return told


def _not_taken(config: Path, name: str, value: str) -> str:
    """The line to log if a run's configs.yaml sets an option in `COMMAND_LINE_ONLY`."""
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

    Returns (options, checkpoint path, notes). Notes are lines to log: which entries of configs.yaml
    are not used, because they are unknown here or in `COMMAND_LINE_ONLY`.
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
    for name in COMMAND_LINE_ONLY:
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
    """For tools: the named options as far as typed, and the tool's own, which `extra` adds.

    defaults: whether --help shows the defaults of the named options.
    """
    parser = _build_parser([OPTIONS[name] for name in names], description, defaults)
    extra(parser)
    given = vars(parser.parse_args())
    own = {name: given.pop(name) for name in list(given) if name not in names}
    return given, own


def _build_parser(
    options: Iterable[Option], description: str, defaults: bool = True
) -> argparse.ArgumentParser:
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
        if not members:
            continue
        section = parser.add_argument_group(title)
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
                const: dict[str, Any] = {"const": o.const} if o.const else {}
                section.add_argument(
                    f"--{o.name}",
                    type=_typed(o),
                    nargs="?" if o.const else o.count,
                    **const,
                    metavar="|".join(o.choices) if o.choices else o.type.__name__.upper(),
                    help=help_text,
                )
    return parser


def _typed(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return option.coerce_one(text, "command line")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
