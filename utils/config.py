"""Presets, configs.yaml, and the checks of options against each other.

Precedence: the command line, then the preset (`--config_file x.yaml`), then the defaults in
utils/options.py. A run writes all its options to `configs.yaml`. This file is itself a preset:
`--config_file` starts the same run from it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from utils.documents import read_yaml_file
from utils.errors import UserError, suggest
from utils.files import expand, write_atomically
from utils.options import OPTIONS, SCRATCH_ONLY

MAX_ENCODER_WEIGHTS = 5e9  # twice as many as CLIP's largest encoder has


def resolve(values: dict[str, Any]) -> EasyDict:
    """Fill in the defaults and check the options against each other. Raises UserError.

    Everywhere, `args` is the result of this function. It has every option of utils/options.py by
    name, with the type of its row (a list if the option takes several values); `Option.coerce` has
    checked the values. A type checker sees the entries of an EasyDict as Any.
    """
    args = EasyDict({o.name: values.get(o.name, o.default) for o in OPTIONS.values()})
    args.loss_names = "".join(args.loss_names.split())
    _check_sizes(args)
    check(
        args.warmup_epochs < args.num_epoch,
        f"--warmup_epochs {args.warmup_epochs} must be less than --num_epoch {args.num_epoch}; "
        "give --warmup_epochs 0, or more epochs",
    )
    check(
        args.milestones == sorted(set(args.milestones)),
        f"--milestones must increase, got {args.milestones}",
    )
    check(
        args.masked_token_rate + args.masked_token_unchanged_rate <= 1,
        f"--masked_token_rate {args.masked_token_rate} and --masked_token_unchanged_rate "
        f"{args.masked_token_unchanged_rate} add up to more than 1; lower one of them",
    )
    check(
        not args.MLM or args.txt_aug in ("auto", "mask") or "mlm" in args.loss_names.split("+"),
        f"--MLM --txt_aug {args.txt_aug}: only the loss mlm uses masked captions; leave --MLM out, "
        "or add mlm to --loss_names",
    )
    check(
        not (args.img_pool and args.img_aug),
        f"--img_pool {args.img_pool} takes the place of --img_aug; leave one of them out",
    )
    if args.sampler == "identity":
        check(
            args.batch_size % args.num_instance == 0,
            f"--batch_size {args.batch_size} must be a multiple of --num_instance "
            f"{args.num_instance} for --sampler identity",
        )
    check(
        args.accum_steps <= args.batch_size,
        f"--accum_steps {args.accum_steps} exceeds --batch_size {args.batch_size}",
    )
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        check(
            args.lora_rank > 0 or args[name] == OPTIONS[name].default,
            f"--{name} {args[name]} is for LoRA; give --lora_rank too, such as 8",
        )
    check(
        args.average_last <= args.num_epoch,
        f"--average_last {args.average_last} exceeds --num_epoch {args.num_epoch}",
    )
    for name in ("heldout", "heldout_seed"):
        check(
            args.val_dataset in ("heldout", "both") or args[name] == OPTIONS[name].default,
            f"--{name} {args[name]} is for --val_dataset heldout and both; "
            f"--val_dataset {args.val_dataset} holds no identities out",
        )
    check(
        args.noise_rate > 0 or args.noise_seed == OPTIONS["noise_seed"].default,
        f"--noise_seed {args.noise_seed} is for --noise_rate; without it no captions are exchanged",
    )
    check(
        args.resume != "no" or not args.resume_ckpt_file,
        "--resume_ckpt_file PATH needs --resume",
    )
    return args


def check_training(args: EasyDict) -> None:
    """Check options that matter only in training. Raises UserError."""
    check(
        not args.lora_rank or args.pretrain_choice != "scratch" or bool(args.finetune),
        f"--lora_rank {args.lora_rank} --pretrain_choice scratch: random weights are no base to "
        "update; give a checkpoint with --finetune",
    )
    check(
        not args.learn_temperature or args.min_temperature <= args.temperature,
        f"--min_temperature {args.min_temperature:g} is above --temperature {args.temperature:g}, "
        "from which --learn_temperature starts; lower it, or raise the temperature",
    )
    if args.precision == "half" and args.optimizer != "SGD":
        # Below fp16's smallest number Adam's second moment is 0. The update is then
        # lr * gradient / eps instead of about lr: a hundred times lr at this limit.
        underflow = (2.0**-25 / max(1 - args.beta, 2.0**-24)) ** 0.5
        digit = 10.0 ** math.floor(math.log10(underflow / 100))
        least = math.ceil(underflow / 100 / digit) * digit
        check(
            args.adam_eps >= underflow / 100,
            f"--adam_eps {args.adam_eps:g} is too small for --precision half: in fp16 the squares "
            f"of gradients below {underflow:.1g} become 0 and only eps divides the update; the "
            f"weights would jump or become NaN. Give {least:.0e} or more (the original has 1e-3), "
            "or --precision bf16 or fp32",
        )


def read_preset(path: str | Path) -> dict[str, Any]:
    """The options that a preset sets, checked and with their types.

    The entry `base: other.yaml` names a preset whose options it inherits; a relative path starts at
    the preset's folder. Raises UserError for an unknown key, and if a preset is its own base.
    """
    return _read_preset(Path(path), ())


def write_config(path: Path, args: EasyDict) -> None:
    """Write all options to a YAML file that `--config_file` reads back."""
    not_resumed = {"resume": "no", "resume_ckpt_file": ""}  # the file describes a new run
    text = yaml.safe_dump({**args, **not_resumed}, sort_keys=False, default_flow_style=None)
    write_atomically(path, lambda file: file.write(text.encode()))


def check(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; no code of the file runs. Raises UserError."""
    try:
        values = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --config_file names a YAML file") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected lines of 'option: value'")
    return values


def _check_sizes(args: EasyDict) -> None:
    """Only a model from scratch takes sizes, and they must fit together. Raises UserError."""
    if args.pretrain_choice != "scratch":
        for name in SCRATCH_ONLY:
            check(
                args[name] == OPTIONS[name].default,
                f"--{name} {args[name]} is for --pretrain_choice scratch; '{args.pretrain_choice}' "
                "has its own sizes (if a preset sets it, use another preset)",
            )
        return
    for encoder in ("vision", "text"):
        name, width, layers = (
            f"--{encoder}_width",
            args[f"{encoder}_width"],
            args[f"{encoder}_layers"],
        )
        check(
            width % 64 == 0, f"{name} {width} must be a multiple of 64 (one head per 64 channels)"
        )
        weights = 12 * layers * width**2
        check(
            weights <= MAX_ENCODER_WEIGHTS,
            f"{name} {width} and {layers} layers make {weights:.1e} weights; "
            f"{MAX_ENCODER_WEIGHTS:.0e} is the limit",
        )


def _read_preset(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in derived:
        raise UserError(f"{path}: is its own base, through {derived[-1]}; remove one `base:` line")
    values = read_yaml(path)
    base = values.pop("base", None)
    inherited = {}
    if base is not None:
        inherited = _read_preset(path.parent / expand(str(base)), (*derived, path.resolve()))
    for key in values:
        if key not in OPTIONS:
            raise UserError(f"{path}: unknown option '{key}'.{suggest(str(key), OPTIONS)}")
    return inherited | {key: OPTIONS[key].coerce(v, str(path)) for key, v in values.items()}
