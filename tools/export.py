"""Write a run's best checkpoint in the naming of IRRA and the original AEA-FIRM.

    python tools/export.py --config_file logs/AGDataAttr/<run>/configs.yaml --output exported

`exported/` receives best.pth (`model` with `base_model.*` and the heads, `epoch`) and configs.yaml
as that code writes it, tuple tags and all. Its train.py takes the file for --finetune, its test.py
takes the folder; so does test.py here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import yaml

from model.build import build_evaluation_model
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.command_line import parse_test_options
from utils.errors import UserError, run_main
from utils.files import expand, write_atomically

# What the family's models are made of; the rest of ours (AEA's queue) it keeps outside the model.
FAMILY = re.compile(
    r"base_model\.|atr_matching_head\.|classifier\.|cross_attn\.|cross_modal_transformer\."
    r"|ln_pre_[ti]\.|ln_post\.|mlm_head\.(dense|ln|fc)\."
)
# The family's flags; others would mean nothing there.
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


class _TupleDumper(yaml.SafeDumper):
    """YAML with `!!python/tuple` for tuples, as the family's configs.yaml has them."""


_TupleDumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", value)
)


def main() -> None:
    def extra(parser) -> None:
        parser.add_argument(
            "--output",
            required=True,
            metavar="FOLDER",
            type=expand,
            help="receives best.pth and configs.yaml",
        )
        parser.add_argument(
            "--half", action="store_true", default=False, help="write half-precision weights"
        )

    args, path, _ = parse_test_options(None, __doc__.split("\n")[0], extra)
    checkpoint = load_checkpoint(path)
    weights = checkpoint["model"]
    # Building it checks that the checkpoint is whole.
    sizes = build_evaluation_model(args, weights, str(path)).base_model.sizes
    if not sizes.quick_gelu or sizes.head_width != 64 or sizes.text_heads not in (
        None, sizes.text_width // 64,
    ):  # fmt: skip
        raise UserError(
            f"{path}: {args.pretrain_choice} has another activation or other heads than OpenAI's "
            "CLIP, which is all that code of this family can build"
        )
    kept = {name: value for name, value in weights.items() if FAMILY.match(name)}
    if args.half:
        kept = {n: v.half() if v.is_floating_point() else v for n, v in kept.items()}
    folder = Path(args.output)
    options = {name: getattr(args, name) for name in FAMILY_OPTIONS}
    options |= {
        "img_size": tuple(args.img_size),
        "milestones": tuple(args.milestones),
        "stride_size": args.stride_size or sizes.vision_patch_size,
        "output_dir": str(folder),
        "training": False,
        "distributed": False,
        "local_rank": 0,
        "test": False,
        "resume": False,
    }
    save_checkpoint(folder / "best.pth", {"model": kept, "epoch": checkpoint.get("epoch", 0)})
    text = yaml.dump(options, Dumper=_TupleDumper, sort_keys=False)
    write_atomically(folder / "configs.yaml", lambda file: file.write(text.encode()))
    print(f"wrote {len(kept)} weights to {folder / 'best.pth'}, options to configs.yaml beside it")


if __name__ == "__main__":
    run_main(main)
