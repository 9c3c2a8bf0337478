"""Every option, its default and its meaning; presets, and the file that records a run.

Order of precedence: the command line, then the preset (`--config_file x.yaml`), then the defaults
below. The resolved options of a run are written to `configs.yaml`, which is itself a preset: given
back as `--config_file` it gives the same run.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from utils.documents import load_yaml
from utils.errors import UserError, suggest
from utils.files import expand, read_file, write_atomically

LARGEST = 2**31 - 1  # no option needs a larger number
LARGEST_MODEL = 5e9  # weights of an encoder; CLIP's largest has half of that


@dataclass(frozen=True)
class Option:
    """One flag. `count` is None for a single value, a number for so many, "+" for one or more."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    count: int | str | None = None
    least: float | None = None  # smallest value allowed
    above: float | None = None  # value must be greater than this
    below: float | None = None  # value must be less than this
    most: float | None = None  # largest value allowed
    pattern: str = ""  # what a text must match as a whole
    alone: str = ""  # value of the flag without one

    def coerce(self, value: Any, where: str) -> Any:
        """Check a value from a preset or the command line and give it its type.

        YAML reads `1e-5` as text, so numbers are also taken from strings. Raises UserError.
        """
        if value is None and self.default is None:
            return None
        if self.count is not None:
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            if isinstance(self.count, int) and len(values) != self.count:
                found = reprlib.repr(values)
                raise UserError(f"{where}: {self.name} takes {self.count} values, got {found}")
            return [self.coerce_one(v, where) for v in values]
        return self.coerce_one(value, where)

    def coerce_one(self, value: Any, where: str) -> Any:
        """The same for one value of a list, or the only one."""
        wrong = UserError(
            f"{where}: {self.name} takes a value of type {self.type.__name__}, "
            f"got {reprlib.repr(value)}"
        )
        if self.alone and isinstance(value, bool):
            value = self.alone if value else self.default
        if self.type is bool:
            if not isinstance(value, bool):
                raise wrong
            return value
        if isinstance(value, (bool, list, dict)) or value is None:
            raise wrong
        try:
            typed = self.type(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if self.name in PATHS:
            typed = expand(typed)
        if self.pattern and not re.fullmatch(self.pattern, typed):
            raise UserError(f"{where}: {self.name} cannot be {typed!r}; {self.help}")
        if self.type is int and isinstance(value, float) and value != typed:
            raise wrong
        if self.choices and typed not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise UserError(f"{where}: {self.name} is {typed!r}; choose one of: {known}")
        if (
            (self.least is not None and not typed >= self.least)
            or (self.above is not None and not typed > self.above)
            or (self.below is not None and not typed < self.below)
            or (self.most is not None and not typed <= self.most)
        ):
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (
                    ("at least", self.least),
                    ("more than", self.above),
                    ("less than", self.below),
                    ("at most", self.most),
                )
                if bound is not None
            ]
            raise UserError(f"{where}: {self.name} must be {' and '.join(bounds)}, got {typed}")
        if self.type is not str and not -LARGEST <= typed <= LARGEST:  # nor NaN
            raise UserError(f"{where}: {self.name} is out of range, got {typed}")
        return typed


def _o(name: str, type: type, default: Any, help: str, **more: Any) -> Option:
    return Option(name, type, default, help, **more)


GROUPS: dict[str, list[Option]] = {
    "Run": [
        _o(
            "name",
            str,
            "baseline",
            "name of the run, 1 to 100 characters without a slash or control characters; its "
            "folder is TIME_NAME",
            pattern=r"[^/\0-\x1f\x7f-\x9f]{1,100}",
        ),
        _o("output_dir", str, "logs", "folder that receives all runs"),
        _o("seed", int, 1, "seed of weights, batches, augmentation and draws", least=0),
        _o(
            "device",
            str,
            "auto",
            "auto takes CUDA where there is one",
            choices=("auto", "cpu", "cuda"),
        ),
        _o(
            "precision",
            str,
            "auto",
            "fp32; bf16 or fp16 autocast; half = half-precision weights, as the original trains; "
            "fp64 for exact comparisons; auto = bf16 where the device computes it natively, else "
            "fp32, and for a run that goes on what it was",
            choices=("auto", "fp32", "bf16", "fp16", "half", "fp64"),
        ),
        _o("compile", bool, False, "compile the encoders with torch.compile; the first steps wait"),
        _o(
            "grad_checkpointing",
            bool,
            False,
            "recompute each block in the backward pass: less memory, a third more time",
        ),
        _o(
            "accum_steps",
            int,
            1,
            "parts that a batch is encoded in, twice; the losses still see it whole. For batches "
            "that do not fit into memory",
            least=1,
        ),
        _o("num_workers", int, 8, "processes that load images; one per core at most", least=0),
        _o("log_period", int, 100, "steps between log lines", least=1),
        _o("eval_period", int, 1, "epochs between evaluations", least=1),
        _o(
            "save_period",
            str,
            "1",
            "time between saves of last.pth: whole epochs as 2, or minutes as 30min",
            pattern=r"[1-9]\d{0,8}|(?!0+(\.0*)?min)\d{1,8}(\.\d+)?min",
        ),
        _o(
            "keep_last",
            int,
            1,
            "saves kept: last.pth, last.1.pth before it, ...",
            least=1,
            most=1000,
        ),
        _o(
            "val_dataset",
            str,
            "test",
            "split whose R@1 chooses best.pth: test is the paper's protocol; val is the data set's "
            "own; heldout takes identities out of training; last: none, the last epoch counts; "
            "both: heldout chooses best.pth, test best_test.pth",
            choices=("test", "val", "heldout", "last", "both"),
        ),
        _o(
            "heldout",
            float,
            0.1,
            "share of each source's training identities that leaves training, for --val_dataset "
            "heldout and both",
            above=0,
            below=1,
        ),
        _o(
            "heldout_seed",
            int,
            0,
            "seed of their draw; --seed has no part in it, so runs of several seeds share them",
            least=0,
        ),
        _o(
            "resume",
            str,
            "no",
            "go on with a run, in its folder: that of --resume_ckpt_file, or the newest of --name "
            "in --output_dir; auto: if there is one, else start",
            choices=("no", "yes", "auto"),
            alone="yes",
        ),
        _o("resume_ckpt_file", str, "", "checkpoint to go on from; left out: the run's last.pth"),
        _o(
            "max_nonfinite",
            int,
            5,
            "steps in a row that are skipped if a loss or gradient is not finite; one more stops",
            least=0,
        ),
        _o("finetune", str, "", "checkpoint whose weights are loaded where names and shapes fit"),
    ],
    "Data": [
        _o("dataset_name", str, "AGDataAttr", "data set; see the README's list"),
        _o("root_dir", str, "./data", "folder that holds the data set"),
        _o(
            "views",
            str,
            "ag",
            "AGSGData: aerial images (a), ground images (g), or both",
            choices=("a", "g", "ag"),
        ),
        _o("image_cache", str, "", "folder for resized images, made once; left out: decode anew"),
        _o(
            "on_bad_image",
            str,
            "fail",
            "a training image cannot be read: fail, or skip = take the next sample of the epoch",
            choices=("fail", "skip"),
        ),
        _o("img_aug", bool, False, "pad 10 and random crop, random erasing; the flip is always on"),
        _o(
            "sampler",
            str,
            "random",
            "random, or identity: --num_instance samples per identity in a batch",
            choices=("random", "identity"),
        ),
        _o("num_instance", int, 4, "samples per identity for --sampler identity", least=1),
        _o("batch_size", int, 128, "samples per training step, of all GPUs together", least=2),
        _o("test_batch_size", int, 512, "images or captions per evaluation step", least=1),
        _o(
            "MLM",
            bool,
            False,
            "mask words of the captions, as the paper's command does: every loss sees them masked, "
            "and the loss mlm can guess them",
        ),
        _o(
            "txt_aug",
            str,
            "auto",
            "what captions go through in training: none; mask 15 % of the words; rde = mask, "
            "replace or remove 20 % (RDE); delete 5 % (TBPS-CLIP); auto = mask with --MLM, else "
            "none",
            choices=("auto", "none", "mask", "rde", "delete"),
        ),
        _o(
            "masked_token_rate",
            float,
            0.8,
            "share of chosen tokens that become the mask token",
            least=0,
            most=1,
        ),
        _o(
            "masked_token_unchanged_rate",
            float,
            0.1,
            "share of chosen tokens that stay as they are; the rest become random",
            least=0,
            most=1,
        ),
    ],
    "Model": [
        _o(
            "pretrain_choice",
            str,
            "ViT-B/16",
            "CLIP weights: an OpenAI name (ViT-B/16, RN50, ...), MODEL/TAG of open_clip, a file of "
            "OpenAI's kind (archive, state dict or safetensors), MODEL@FILE for one of another "
            "model of open_clip, or scratch",
        ),
        _o(
            "img_size",
            int,
            [384, 128],
            "height and width of the input, pixels",
            count=2,
            least=16,
            most=4096,
        ),
        _o(
            "stride_size",
            int,
            None,
            "step between patches, pixels; left out: the patch size",
            least=1,
            most=4096,
        ),
        _o("text_length", int, 77, "longest caption, tokens, with start and end", least=3, most=77),
        _o(
            "vocab_size",
            int,
            49408,
            "token ids of the text encoder; checked against the weights",
            least=49408,
            most=10**6,
        ),
        _o("temperature", float, 0.02, "softmax temperature of all similarities; fixed", above=0),
        _o("cmt_depth", int, 4, "layers of the cross-modal transformer of mlm", least=1, most=64),
        _o(
            "embed_dim",
            int,
            512,
            "width of the joint space, for --pretrain_choice scratch",
            least=1,
            most=2**14,
        ),
        _o("vision_width", int, 768, "ViT width (64 per head), for scratch", least=64, most=2**14),
        _o("vision_layers", int, 12, "ViT layers, for scratch", least=1, most=256),
        _o("vision_patch_size", int, 16, "patch side, pixels, for scratch", least=1, most=4096),
        _o(
            "text_width",
            int,
            512,
            "text encoder width (64 per head), for scratch",
            least=64,
            most=2**14,
        ),
        _o("text_layers", int, 12, "text encoder layers, for scratch", least=1, most=256),
    ],
    "Losses": [
        _o("loss_names", str, "sdm+id+mlm", "losses joined by +; see the README's table"),
        _o("slack", float, 0.15, "AEA: extra target weight of the caption's own view", least=0),
        _o("queue_batches", int, 3, "AEA: past batches that the queue holds", least=1, most=1000),
        _o(
            "negatives",
            str,
            "next",
            "FIRM: class of the negative sentence, next (class + 1, the original) or random "
            "(the paper)",
            choices=("next", "random"),
        ),
        _o(
            "attributes_file",
            str,
            "configs/attributes.yaml",
            "FIRM: attributes and their sentences",
        ),
        _o(
            "firm_attributes",
            str,
            [],
            "FIRM: only these attributes, by name; left out: all of --attributes_file",
            count="+",
        ),
        _o("match_loss_weight", float, 1.0, "weight of match2", least=0),
        _o("id_loss_weight", float, 1.0, "weight of id", least=0),
        _o("mlm_loss_weight", float, 1.0, "weight of mlm", least=0),
    ],
    "Optimizer": [
        _o("optimizer", str, "Adam", "Adam, AdamW or SGD", choices=("Adam", "AdamW", "SGD")),
        _o("lr", float, 1e-5, "learning rate of the backbone", above=0),
        _o(
            "lr_factor",
            float,
            5.0,
            "times lr for new heads (cross*, classifier, mlm_head)",
            above=0,
        ),
        _o("bias_lr_factor", float, 2.0, "times lr for biases", above=0),
        _o("weight_decay", float, 4e-5, "weight decay (L2)", least=0),
        _o("weight_decay_bias", float, 0.0, "weight decay of biases", least=0),
        _o("alpha", float, 0.9, "Adam's first beta", least=0, most=1),
        _o("beta", float, 0.999, "Adam's second beta", least=0, most=1),
        _o(
            "adam_eps",
            float,
            1e-3,
            "Adam's epsilon; half needs about as large a value as the original's",
            above=0,
        ),
        _o("grad_clip", float, 0.0, "largest L2 norm of all gradients together; 0: any", least=0),
        _o("momentum", float, 0.9, "SGD's momentum", least=0, most=1),
        _o("num_epoch", int, 60, "epochs", least=1),
        _o(
            "lrscheduler",
            str,
            "cosine",
            "step, exp, poly, cosine or linear",
            choices=("step", "exp", "poly", "cosine", "linear"),
        ),
        _o(
            "milestones",
            int,
            [20, 50],
            "step: epochs at which lr is multiplied by gamma",
            count="+",
            least=1,
        ),
        _o("gamma", float, 0.1, "step: factor at each milestone", above=0),
        _o("warmup_factor", float, 0.1, "share of lr at the first epoch", above=0, most=1),
        _o("warmup_epochs", int, 5, "epochs of warm-up", least=0),
        _o("warmup_method", str, "linear", "linear or constant", choices=("linear", "constant")),
        _o("target_lr", float, 0.0, "cosine and poly: last learning rate", least=0),
        _o("power", float, 0.9, "exp and poly: base of the decay", above=0),
    ],
}
OPTIONS: dict[str, Option] = {o.name: o for group in GROUPS.values() for o in group}
SCRATCH_ONLY = (
    "embed_dim", "vision_width", "vision_layers", "vision_patch_size", "text_width", "text_layers",
)  # fmt: skip
# What may differ between two machines, or a run and its continuation, without making another
# experiment of it.
INDIFFERENT = (
    "name", "output_dir", "root_dir", "device", "num_workers", "image_cache", "log_period",
    "finetune", "attributes_file", "resume", "resume_ckpt_file", "test_batch_size", "save_period",
    "keep_last", "max_nonfinite", "on_bad_image",
)  # fmt: skip
# What may name a place on this machine.
PATHS = (
    "output_dir", "resume_ckpt_file", "finetune", "root_dir", "image_cache", "pretrain_choice",
    "attributes_file",
)  # fmt: skip

# Other ways to the same figures, but for rounding, in less memory or time.
SAME_FIGURES = ("accum_steps", "grad_checkpointing", "compile")


def resolve(values: dict[str, Any]) -> EasyDict:
    """Fill in the defaults and check the options against each other. Raises UserError."""
    args = EasyDict({o.name: values.get(o.name, o.default) for o in OPTIONS.values()})
    args.loss_names = "".join(args.loss_names.split())
    if args.pretrain_choice != "scratch":
        for name in SCRATCH_ONLY:
            if getattr(args, name) != OPTIONS[name].default:
                raise UserError(
                    f"--{name} {getattr(args, name)} is for --pretrain_choice scratch; "
                    f"'{args.pretrain_choice}' has its own sizes (if a preset sets it, take "
                    "another one)"
                )
    else:
        for name in ("vision_width", "text_width"):
            if getattr(args, name) % 64:
                raise UserError(f"--{name} must be a multiple of 64 (one head per 64 channels)")
            layers = getattr(args, name.replace("width", "layers"))
            weights = 12 * layers * getattr(args, name) ** 2
            check(
                weights <= LARGEST_MODEL,
                f"--{name} {getattr(args, name)} and {layers} layers make {weights:.1e} weights; "
                f"{LARGEST_MODEL:.0e} is the limit",
            )
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
            args.val_dataset in ("heldout", "both") or getattr(args, name) == OPTIONS[name].default,
            f"--{name} {getattr(args, name)} is for --val_dataset heldout and both; "
            f"--val_dataset {args.val_dataset} holds nothing out",
        )
    check(
        args.resume != "no" or not args.resume_ckpt_file,
        "--resume_ckpt_file PATH needs --resume",
    )
    return args


def check_training(args: EasyDict) -> None:
    """What only a training can get wrong. Raises UserError."""
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

    Raises UserError for an unknown key, and for bases that go round in a circle.
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


def options_table() -> str:
    """All options as Markdown tables, one per group, for the README."""
    lines = []
    for group, options in GROUPS.items():
        lines += [f"**{group}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for o in options:
            default = " ".join(map(str, o.default)) if isinstance(o.default, list) else o.default
            shown = "off" if default is False else "" if default is None else default
            lines.append(f"| `--{o.name}` | {f'`{shown}`' if shown != '' else ''} | {o.help} |")
        lines.append("")
    return "\n".join(lines)


def check(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
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
