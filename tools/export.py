"""Write a run's best checkpoint for other programs: the original's code, ONNX Runtime, a model hub.

    python tools/export.py --config_file logs/AGDataAttr/<run>/configs.yaml --output exported
    python tools/export.py --config_file logs/AGDataAttr/<run>/configs.yaml --onnx exported
    python tools/export.py --config_file logs/AGDataAttr/<run>/configs.yaml --hub exported

With --output, in the naming of IRRA and the original AEA-FIRM: `exported/` receives best.pth
(`model` with `base_model.*` and the heads, `epoch`) and configs.yaml in the format of that code,
with tuple tags. Its train.py takes best.pth for --finetune. Its test.py takes the folder, and so
does test.py here. That code builds its model from CLIP weights before it loads the checkpoint. If
these are not OpenAI's by name, clip.pt contains them. Notes list what that code cannot express.

With --onnx, both encoders for ONNX Runtime (tools/_export_onnx.py), which gallery/onnx.py reads
without torch. With --hub, model.safetensors, config.json and a model card (tools/_export_hub.py),
which --pretrain_choice and load_run read.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import yaml
from easydict import EasyDict

from model.backbone import Backbone
from model.build import build_evaluation_model
from model.lora import with_base
from model.weights import OPENAI_MODELS, PREFIX, BackboneConfig
from processor.best import epoch_and_best
from tools._export_hub import export_hub, model_name
from tools._export_onnx import export_onnx
from utils.attributes import read_attributes
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.command_line import parse_test_options
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import expand, file_hash, write_atomically
from utils.options import MAY_DIFFER, OPTIONS, SCRATCH_ONLY
from utils.text import visible

# The weights in a model of that family. It keeps the rest (AEA's queue) outside the model.
FAMILY = re.compile(
    r"base_model\.|atr_matching_head\.|classifier\.|cross_attn\.|cross_modal_transformer\."
    r"|ln_pre_[ti]\.|ln_post\.|mlm_head\.(dense|ln|fc)\."
)
FAMILY_LOSSES = {
    "supkl", "supitc", "queue", "match2", "dot", "cat", "sdm", "bisdm", "itc", "biitc", "cmpm",
    "id", "mlm",
}  # fmt: skip
# The options that the family's code has.
FAMILY_OPTIONS = (
    "name", "output_dir", "log_period", "eval_period", "val_dataset", "resume_ckpt_file",
    "pretrain_choice", "temperature", "img_aug", "cmt_depth", "masked_token_rate",
    "masked_token_unchanged_rate", "lr_factor", "MLM", "loss_names", "mlm_loss_weight",
    "id_loss_weight", "match_loss_weight", "vocab_size", "text_length", "optimizer", "lr",
    "bias_lr_factor", "momentum", "weight_decay", "weight_decay_bias", "alpha", "beta", "num_epoch",
    "gamma", "warmup_factor", "warmup_epochs", "warmup_method", "lrscheduler", "target_lr", "power",
    "dataset_name", "sampler", "num_instance", "root_dir", "batch_size", "test_batch_size",
    "num_workers",
)  # fmt: skip
# Options that it has in another form, or that change no metric.
ELSEWHERE = {
    "img_size", "milestones", "stride_size", "seed", "precision", "compile", "grad_checkpointing",
    "accum_steps", *SCRATCH_ONLY, *MAY_DIFFER,
}  # fmt: skip
DATASETS = {
    "AGDataAttr", "AGData", "AGSGData", "AGTBPR", "CUHK-PEDES", "ICFG-PEDES", "RSTPReid"
}  # fmt: skip
CLASSES = 11003  # of the original's classifier, for every data set


class _TupleDumper(yaml.SafeDumper):
    """YAML with `!!python/tuple` for tuples, as the family's configs.yaml has them."""


_TupleDumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", value)
)


def main() -> None:
    def extra(parser: argparse.ArgumentParser) -> None:
        def folder(name: str, text: str) -> None:
            parser.add_argument(name, default="", metavar="FOLDER", type=expand, help=text)

        folder("--output", "receives best.pth and configs.yaml for the original's code")
        folder("--onnx", "receives both encoders for ONNX Runtime")
        folder("--hub", "receives safetensors and a model card")
        parser.add_argument(
            "--half",
            action="store_true",
            default=False,
            help="write half-precision weights (--output)",
        )

    args, path, notes = parse_test_options(None, __doc__.split("\n")[0], extra, images=False)
    if not (args.output or args.onnx or args.hub):
        raise UserError("nothing to write: give --output FOLDER, --onnx FOLDER or --hub FOLDER")
    if args.half and not args.output:
        raise UserError("--half is for --output alone; leave it out")
    checkpoint = with_base(args, load_checkpoint(path), str(path))
    # Building the model checks that the checkpoint is complete.
    model = build_evaluation_model(args, checkpoint, str(path)).eval()
    epoch, _ = epoch_and_best(checkpoint)
    if args.output:
        notes += export_family(args, checkpoint, path, model.base_model)
    if args.hub:
        say(visible(export_hub(model, args, checkpoint["model"], path, Path(args.hub), epoch)))
    if args.onnx:
        full = EasyDict(args, precision="fp32")
        model = build_evaluation_model(full, checkpoint, str(path)).eval()
        known = read_attributes(args.attributes_file) if model.sentences else []
        columns = model.sentences.columns.tolist() if model.sentences else []
        about = {
            "name": path.absolute().parent.name, "checkpoint": path.name, "epoch": epoch,
            "sha256": file_hash(path), "pretrain_choice": model_name(args),
            "stride_size": args.stride_size,
        }  # fmt: skip
        attributes = [known[column] for column in columns]
        line = export_onnx(model, Path(args.onnx), args.text_length, attributes, about)
        say(visible(line))
    for note in notes:
        say(visible(note))


def export_family(
    args: EasyDict, checkpoint: dict[str, Any], path: Path, backbone: Backbone
) -> list[str]:
    """Write `--output`, and return notes on what the original's code cannot express.

    Args:
        checkpoint: the content of `path`.

    Raises UserError for an architecture that it cannot build.
    """
    config, folder = backbone.config, Path(args.output)
    notes = lost_in_original(args, config)
    check_openai(config, f"{path}: {args.pretrain_choice}")
    kept = {name: v for name, v in checkpoint["model"].items() if FAMILY.match(name)}
    rows = len(kept.get("classifier.weight", range(CLASSES)))
    if rows != CLASSES:
        kept = {name: v for name, v in kept.items() if not name.startswith("classifier.")}
        notes.append(
            f"the classifier of {rows} identities is left out: the original's has {CLASSES} for "
            "every data set, and test.py needs none"
        )
    if args.half:
        kept = {n: v.half() if v.is_floating_point() else v for n, v in kept.items()}
    options = {name: getattr(args, name) for name in FAMILY_OPTIONS}
    names = args.loss_names.split("+")
    if lost := [name for name in names if name not in FAMILY_LOSSES]:
        options["loss_names"] = "+".join(n for n in names if n in FAMILY_LOSSES) or "itc"
        notes.append(
            f"the original has no loss {', '.join(lost)}: its scores are the cosines of CLIP's "
            "features alone"
        )
    options |= {
        "img_size": tuple(args.img_size),
        "milestones": tuple(args.milestones),
        "stride_size": args.stride_size or config.vision_patch_size,
        "text_length": config.context_length,
        "val_dataset": "val" if args.val_dataset == "val" else "test",
        "cont_queue_size": args.queue_batches * args.batch_size,
        "output_dir": str(folder),
        "training": False,
        "distributed": False,
        "local_rank": 0,
        "test": False,
        "resume": False,
    }
    if args.pretrain_choice not in OPENAI_MODELS:
        clip = {n.removeprefix(PREFIX): v for n, v in kept.items() if n.startswith(PREFIX)}
        save_checkpoint(folder / "clip.pt", {**clip, "input": backbone.input})
        options["pretrain_choice"] = str((folder / "clip.pt").resolve())
        notes.append(
            f"pretrain_choice is {options['pretrain_choice']}, the weights from which the original "
            "builds its model; change it in configs.yaml if you move the folder"
        )
    # The original reads only the weights; test.py here also reads what chose the epoch.
    epoch, best = epoch_and_best(checkpoint)
    chosen = {"epoch": epoch or 0} | ({"best": best} if best else {})
    content = {"model": kept, "input": backbone.input, **chosen}
    save_checkpoint(folder / "best.pth", content)
    text = yaml.dump(options, Dumper=_TupleDumper, sort_keys=False)
    write_atomically(folder / "configs.yaml", lambda file: file.write(text.encode()))
    say(f"wrote {len(kept)} weights to {folder / 'best.pth'}, options to configs.yaml next to it")
    return notes


def check_openai(config: BackboneConfig, what: str) -> None:
    """Raise UserError for an architecture that code of this family cannot build."""
    heads = config.text_width // 64
    names = ("head_width", "quick_gelu", "image_mean", "image_std", "mlp_ratio")
    if (config.text_heads or heads) != heads or any(
        getattr(config, name) != getattr(BackboneConfig, name) for name in names
    ):
        raise UserError(
            f"{what} has another activation, other heads or another image mean and std than "
            "OpenAI's CLIP; code of this family can build no other"
        )


def lost_in_original(args: EasyDict, config: BackboneConfig) -> list[str]:
    """Notes on what the original does not do as this run does."""
    notes = []
    if args.text_length < config.context_length:
        notes.append(
            f"text_length is {config.context_length}, because the original always encodes this "
            "many columns. Features stay the same, except for captions that "
            f"--text_length {args.text_length} cuts short"
        )
    if args.dataset_name not in DATASETS:
        notes.append(f"the original has no data set {args.dataset_name}")
    if config.is_resnet and args.pretrain_choice not in OPENAI_MODELS:
        notes.append("the original builds a ResNet only from OpenAI's weights, given by name")
    names = set(OPTIONS) - set(FAMILY_OPTIONS) - ELSEWHERE
    other = [f"--{n} {v}" for n, v in args.items() if n in names and v != OPTIONS[n].default]
    if args.val_dataset not in ("test", "val"):
        other.append(f"--val_dataset {args.val_dataset}")
    return notes + ([f"the original has no {', '.join(other)}"] if other else [])


if __name__ == "__main__":
    run_main(main)
