"""Presets, configs.yaml, and the checks of options against each other.

Precedence: the command line, then the preset (`--config_file x.yaml`), then the defaults in
utils/options.py. A run writes all its options to `configs.yaml`, which is itself a preset: given as
`--config_file`, it starts the same run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from utils.documents import load_yaml
from utils.errors import UserError, suggest
from utils.files import expand, read_file, write_atomically
from utils.options import OPTIONS, SCRATCH_ONLY

LARGEST_MODEL = 5e9  # weights of an encoder; CLIP's largest has half of that


def resolve(values: dict[str, Any]) -> EasyDict:
    """Fill in the defaults and check the options against each other. Raises UserError.

    What is called `args` everywhere comes from here: every option of utils/options.py by its name,
    of the type that its row gives (several: a list), which `Option.coerce` has seen to. To a type
    checker an EasyDict's entries are Any.
    """
    args = EasyDict({o.name: values.get(o.name, o.default) for o in OPTIONS.values()})
    args.loss_names = "".join(args.loss_names.split())
    _check_sizes(args)
    check(
        args.warmup_epochs < args.num_epoch,
        f"--warmup_epochs {args.warmup_epochs} leaves nothing of --num_epoch {args.num_epoch}; "
        "give --warmup_epochs 0, or more epochs",
    )
    check(
        args.milestones == sorted(set(args.milestones)),
        f"--milestones must increase, got {args.milestones}",
    )
    check(
        args.masked_token_rate + args.masked_token_unchanged_rate <= 1,
        "--masked_token_rate and --masked_token_unchanged_rate exceed 1 together",
    )
    check(
        not args.MLM or args.txt_aug in ("auto", "mask") or "mlm" in args.loss_names.split("+"),
        f"--MLM --txt_aug {args.txt_aug}: without the loss mlm no masked caption is used; leave "
        "--MLM out",
    )
    if args.sampler == "identity":
        check(
            args.batch_size % args.num_instance == 0,
            f"--batch_size {args.batch_size} is no multiple of --num_instance {args.num_instance}",
        )
    check(
        args.accum_steps <= args.batch_size,
        f"--accum_steps {args.accum_steps} exceeds --batch_size {args.batch_size}",
    )
    for name in ("heldout", "heldout_seed"):
        check(
            args.val_dataset in ("heldout", "both") or args[name] == OPTIONS[name].default,
            f"--{name} {args[name]} is for --val_dataset heldout and both; "
            f"--val_dataset {args.val_dataset} holds nothing out",
        )
    check(
        args.resume != "no" or not args.resume_ckpt_file,
        "--resume_ckpt_file PATH needs --resume",
    )
    return args


def _check_sizes(args: EasyDict) -> None:
    """Sizes are for a model from scratch only, and must make one. Raises UserError."""
    if args.pretrain_choice != "scratch":
        for name in SCRATCH_ONLY:
            check(
                args[name] == OPTIONS[name].default,
                f"--{name} {args[name]} is for --pretrain_choice scratch; '{args.pretrain_choice}' "
                "has its own sizes (if a preset sets it, take another one)",
            )
        return
    for encoder in ("vision", "text"):
        name, width, layers = (
            f"--{encoder}_width",
            args[f"{encoder}_width"],
            args[f"{encoder}_layers"],
        )
        check(width % 64 == 0, f"{name} must be a multiple of 64 (one head per 64 channels)")
        weights = 12 * layers * width**2
        check(
            weights <= LARGEST_MODEL,
            f"{name} {width} and {layers} layers make {weights:.1e} weights; "
            f"{LARGEST_MODEL:.0e} is the limit",
        )


def check_training(args: EasyDict) -> None:
    """Check what matters in training only. Raises UserError."""
    if args.precision == "half" and args.optimizer != "SGD":
        # Where Adam's second moment is below fp16's least number, it is 0, and a step is
        # lr * gradient / eps instead of about lr: at this limit a hundred times lr.
        lost = (2.0**-25 / max(1 - args.beta, 2.0**-24)) ** 0.5
        digit = 10.0 ** math.floor(math.log10(lost / 100))
        least = math.ceil(lost / 100 / digit) * digit
        check(
            args.adam_eps >= lost / 100,
            f"--adam_eps {args.adam_eps:g} is too small for --precision half: fp16 holds nothing "
            f"below 6e-8, so squares of gradients below {lost:.1g} are lost and only eps divides "
            f"the step; the weights would jump or become NaN. Give {least:.0e} or more (the "
            "original has 1e-3), or --precision bf16 or fp32",
        )


def read_preset(path: str | Path) -> dict[str, Any]:
    """The options that a preset sets, typed; `base: other.yaml` beside it is read first.

    Raises UserError for an unknown key, and for a preset that is among its own bases.
    """
    return _read_preset(Path(path), ())


def _read_preset(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in derived:
        raise UserError(f"{path}: is its own base, by way of {derived[-1]}")
    values = read_yaml(path)
    base = values.pop("base", None)
    inherited = {}
    if base is not None:
        inherited = _read_preset(path.parent / expand(str(base)), (*derived, path.resolve()))
    for key in values:
        if key not in OPTIONS:
            raise UserError(f"{path}: unknown option '{key}'.{suggest(str(key), OPTIONS)}")
    return inherited | {key: OPTIONS[key].coerce(v, str(path)) for key, v in values.items()}


def write_config(path: Path, args: EasyDict) -> None:
    """Write all options to a YAML file that `--config_file` reads back."""
    fresh = {"resume": "no", "resume_ckpt_file": ""}  # the file describes the run, not a call
    text = yaml.safe_dump({**args, **fresh}, sort_keys=False, default_flow_style=None)
    write_atomically(path, lambda file: file.write(text.encode()))


def check(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping, read as data. Raises UserError."""
    try:
        values = load_yaml(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --config_file names a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected lines of 'option: value'")
    return values
