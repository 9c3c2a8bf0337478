"""Parse the command line of a training, a resumed run, an evaluation or a tool."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from easydict import EasyDict

from utils.config import check, check_training, read_preset, read_yaml, resolve
from utils.console import process_rank
from utils.errors import UserError, suggest
from utils.files import PROJECT, expand
from utils.option_type import Option
from utils.options import GROUPS, MAY_DIFFER, OPTIONS
from utils.runs import (
    BEST,
    CONFIG,
    HUB_CONFIG,
    HUB_WEIGHTS,
    LAST,
    best_checkpoint,
    differing_options,
    is_named,
    options_file,
    refuse_if_in_use,
    run_folders,
)

# test.py accepts these options, and reads the others from the run's configs.yaml.
TEST_OPTIONS = (
    "root_dir", "device", "precision", "test_batch_size", "num_workers", "image_cache",
    "attributes_file",
)  # fmt: skip
# These options are never read from a run's configs.yaml. The run may come from another machine,
# where the paths are other files, or from an untrusted user.
COMMAND_LINE_ONLY = ("image_cache", "attributes_file")
_CHECKPOINT_OPTIONS = ("config_file", "checkpoint")
# Entries in configs.yaml of the original code and similar code, and in config.json of
# tools/export.py --hub, that are not options.
_BOOKKEEPING = {
    "training", "test", "distributed", "local_rank", "cont_queue_size", "queue_size", "queue_epoch",
    "crops_for_assign", "architecture", "model_type",
}  # fmt: skip


def parse_options(
    argv: Sequence[str] | None = None,
    description: str = "",
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> EasyDict:
    """All options of a training, from the command line, a preset and the defaults.

    `extra` adds options of a tool, which are returned with the others. Raises UserError for an
    unknown key, for a value that its option does not allow, and for options that contradict each
    other.
    """
    parser = _build_parser(OPTIONS.values(), description)
    parser.add_argument(
        "--config_file", metavar="YAML", type=expand, help="preset; the command line overrides it"
    )
    extra(parser)
    given = vars(parser.parse_args(argv))
    preset_file = given.pop("config_file", None)
    tool_options = {name: given.pop(name) for name in list(given) if name not in OPTIONS}
    values = {**(read_preset(preset_file) if preset_file else {}), **given}
    if values.get("resume", "no") != "no":
        args = _resume_options(values, given, Path(preset_file) if preset_file else None)
    else:
        args = resolve(values)
    check_training(args)
    return EasyDict(args, **tool_options)


def parse_test_options(
    argv: Sequence[str] | None = None,
    description: str = "",
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    images: bool = True,
) -> tuple[EasyDict, Path, list[str]]:
    """Options of an evaluation: those in the run's configs.yaml, overridden by TEST_OPTIONS.

    `extra` adds options of a tool, which are returned with the others. Without `images` there is no
    image_cache: the tool reads none.

    Returns (options, checkpoint path, notes); `options_of_run` explains the notes.
    """
    names = [name for name in TEST_OPTIONS if images or name != "image_cache"]
    parser = _build_parser([OPTIONS[name] for name in names], description)
    parser.add_argument(
        "--config_file",
        metavar="RUN",
        type=expand,
        required=True,
        help=f"folder of the run to evaluate or of tools/export.py --hub, or its {CONFIG} or "
        f"{HUB_CONFIG}",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PTH",
        type=expand,
        help=f"checkpoint (default: {BEST}, or {HUB_WEIGHTS}, next to the file of options)",
    )
    extra(parser)
    given = vars(parser.parse_args(argv))
    known = (*TEST_OPTIONS, *_CHECKPOINT_OPTIONS)
    tool_options = {name: given.pop(name) for name in list(given) if name not in known}
    config_file = options_file(Path(given.pop("config_file")))
    check(
        config_file.exists(),
        f"{config_file}: no such file; --config_file takes the folder of a run or of "
        "tools/export.py --hub, or the file of options in it",
    )
    checkpoint = Path(given.pop("checkpoint", None) or best_checkpoint(config_file))
    args, notes = options_of_run(config_file, given if images else {**given, "image_cache": ""})
    return EasyDict(args, **tool_options), checkpoint, notes


def options_of_run(config_file: Path, given: dict[str, Any]) -> tuple[EasyDict, list[str]]:
    """The options in a run's configs.yaml, overridden by `given`, and notes.

    The notes are messages to log about entries that are not used, because they are unknown here or
    in `COMMAND_LINE_ONLY`. Raises UserError.
    """
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
        if value not in ("", default, str(PROJECT / default)) and name not in given:
            notes.append(_not_trusted(config_file, name, value))
    return resolve({**recorded, **given}), notes


def parse_some(
    names: Sequence[str],
    description: str,
    extra: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> EasyDict:
    """For tools: the named options and those that `extra` adds; others have their defaults."""
    given, tool_options = parse_given(names, description, extra)
    return EasyDict(resolve(given), **tool_options)


def parse_given(
    names: Sequence[str],
    description: str,
    extra: Callable[[argparse.ArgumentParser], object],
    defaults: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """For tools: the named options that the command line sets, and those that `extra` adds.

    Args:
        defaults: whether --help shows the defaults of the named options.
    """
    parser = _build_parser([OPTIONS[name] for name in names], description, defaults)
    extra(parser)
    given = vars(parser.parse_args())
    tool_options = {name: given.pop(name) for name in list(given) if name not in names}
    return given, tool_options


def command_line_only_arguments(args: EasyDict) -> list[str]:
    """The arguments that a command with --config_file of this run needs: `COMMAND_LINE_ONLY`."""
    changed = [name for name in COMMAND_LINE_ONLY if args[name] != OPTIONS[name].default]
    return [word for name in changed for word in (f"--{name}", args[name])]


def changed_options(args: EasyDict, config: Path) -> list[str]:
    """Messages to log about the options of its configs.yaml that a resumed run changes."""
    if not config.is_file():
        return [f"{config}: missing, so changes of options are unknown"]
    previous = resolve(read_preset(config))
    ignored = ("resume", "resume_ckpt_file", "output_dir", "image_cache")
    messages = [f"changed: {change}" for change in differing_options(args, previous, ignored)]
    if previous.image_cache and not args.image_cache:
        messages.append(_not_trusted(config, "image_cache", previous.image_cache))
    return messages


def _build_parser(
    options: Iterable[Option], description: str, defaults: bool = True
) -> argparse.ArgumentParser:
    """A parser without defaults: an option that is not given stays absent; a preset may set it."""
    parser = Parser(
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
                    type=_argument_type(o),
                    nargs="?" if o.const else o.count,
                    **const,
                    metavar="|".join(o.choices) if o.choices else o.type.__name__.upper(),
                    help=help_text,
                )
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a UserError."""

    words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse has it; `error` knows the words."""
        self.words = sys.argv[1:] if args is None else [*args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with one line; argparse would print a page of usage."""
        # argparse and `Option.coerce_one` both name the option.
        message = re.sub(r"^argument --\w+: command line: ", "--", message)
        if message.startswith("the following arguments are required: --"):
            for word in self.words:  # a typing error may be why one is missing
                name = word.partition("=")[0]
                if name.startswith("--") and name not in self._option_string_actions:
                    hint = suggest(name, self._option_string_actions)
                    message = f"{name}: no such option.{hint}"
                    break
        raise UserError(f"{message} (--help lists all options)")


def _argument_type(option: Option) -> Callable[[str], Any]:
    """A type for argparse that checks and converts a value of an option."""

    def convert(text: str) -> Any:
        try:
            return option.coerce_one(text, "command line")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _resume_options(values: dict[str, Any], given: dict[str, Any], preset: Path | None) -> EasyDict:
    """The options of a run to resume, or of a new run if `--resume auto` finds none.

    Args:
        values: options from the preset and the command line.
        given: options from the command line.
        preset: file of the preset, if there is one.
    """
    last = _checkpoint_to_resume(values, given, preset)
    if last is None:
        return resolve(values)
    recorded = _recorded_options(last, values, given, preset)
    values = _merge(recorded or {}, values, given, preset)
    args = resolve({**values, "resume_ckpt_file": str(last)})
    if recorded is not None:
        previous = resolve(recorded)
        if args.precision == "auto":  # the precision must stay the same on another machine
            args.precision = previous.precision
        _refuse_changes(args, previous, values, last.parent)
        args.seed, args.finetune = previous.seed, previous.finetune
    return args


def _checkpoint_to_resume(
    values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> Path | None:
    """The checkpoint of `--resume_ckpt_file`, that next to the preset, or the newest one.

    None if `--resume auto` finds no run. With `--resume`, raises UserError instead.
    """
    named = values.get("resume_ckpt_file")
    if (named or _is_of_run(preset)) and "output_dir" in given:
        option = "--resume_ckpt_file" if named else f"--config_file {preset}"
        raise UserError(f"{option} says where the run is; leave --output_dir out")
    if named:
        last = Path(named)
        check(
            not last.is_dir(),
            f"{last}: a folder; --resume_ckpt_file needs a file, such as its {LAST}",
        )
        check(last.is_file(), f"{last}: no such file (--resume_ckpt_file)")
        return last
    return preset.parent / LAST if _is_of_run(preset) else _newest_checkpoint(values)


def _is_of_run(preset: Path | None) -> TypeGuard[Path]:
    """Whether the preset is the configs.yaml of a run with a checkpoint."""
    return preset is not None and preset.name == CONFIG and (preset.parent / LAST).is_file()


def _newest_checkpoint(values: dict[str, Any]) -> Path | None:
    """The last.pth of the newest run of `--name` in `--output_dir`.

    None if `--resume auto` finds none. Raises UserError if `--resume` finds none, or if another
    process uses such a run.
    """
    output_dir, name = (values.get(o, OPTIONS[o].default) for o in ("output_dir", "name"))
    auto = values["resume"] == "auto"
    # --resume without --dataset_name looks for the run on every data set.
    dataset = values.get("dataset_name", OPTIONS["dataset_name"].default if auto else "*")
    runs = [folder for folder in run_folders(output_dir, dataset) if is_named(folder, name)]
    for folder in runs:
        if os.path.isfile(folder / LAST):
            return folder / LAST
    for folder in runs:
        check(os.access(folder, os.X_OK), f"{folder}: {os.strerror(errno.EACCES)} (--resume)")
    where = Path(output_dir, dataset.strip("*"))
    check(auto, f"--resume: {where}/ has no run '{name}' with a {LAST}")
    if process_rank() == 0:  # the other ranks would find the lock of rank 0
        refuse_if_in_use(runs)
    return None


def _recorded_options(
    last: Path, values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> dict[str, Any] | None:
    """The options in the run's configs.yaml; None if it is missing and options are given instead.

    Raises UserError if it is missing and no options are given.
    """
    config = last.parent / CONFIG
    if config.is_file():
        return read_preset(config)
    given_again = preset or set(given) - {"resume", "resume_ckpt_file", "num_epoch"}
    check(
        bool(values.get("resume_ckpt_file") and given_again),
        f"{config}: missing, and with it the run's options; to resume, give all options and "
        f"--resume --resume_ckpt_file {last}, or remove the folder",
    )
    return None


def _merge(
    recorded: dict[str, Any], values: dict[str, Any], given: dict[str, Any], preset: Path | None
) -> dict[str, Any]:
    """The run's recorded options, overridden by those of the preset and of the command line.

    With a preset, only recorded options in MAY_DIFFER are used. The recorded image_cache is never
    used, see COMMAND_LINE_ONLY; the recorded attributes_file is, because the attributes must stay
    the same.
    """
    kept = {n: v for n, v in recorded.items() if preset is None or n in MAY_DIFFER}
    kept.pop("image_cache", None)
    if _is_of_run(preset) and "image_cache" not in given:
        values = {n: v for n, v in values.items() if n != "image_cache"}
    return {**kept, **values}


def _refuse_changes(
    args: EasyDict, previous: EasyDict, values: dict[str, Any], folder: Path
) -> None:
    """Raise UserError if a resumed run changes options that it must keep.

    With `--resume auto` these are all options that change the experiment, except the number of
    epochs; else only the seed and the initial weights.
    """
    if args.resume == "auto":
        free = set(MAY_DIFFER) - {"attributes_file", "finetune"} | {"num_epoch"}
        changed = differing_options(args, previous, free)
        check(
            not changed,
            f"--resume auto: {folder} runs with other options: {', '.join(changed)}. Give another "
            "--name or --output_dir, or --resume to resume it with the new options",
        )
    for name in ("seed", "finetune"):
        now, was = values.get(name, previous[name]), previous[name]
        check(now == was, f"--{name} {now}: the run has {was!r}; only a new run can change it")


def _not_trusted(config: Path, name: str, value: str) -> str:
    """The message to log if a run's configs.yaml sets an option in `COMMAND_LINE_ONLY`."""
    return (
        f"{config}: its {name} is not trusted, since a run may come from another machine; "
        f"to use it: --{name} {shlex.quote(value)}"
    )
