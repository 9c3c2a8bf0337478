"""Train a text-based aerial-ground pedestrian retrieval model.

    python train.py --config_file configs/mini.yaml --root_dir data/mini-TBAGPR
    python train.py --name irra --batch_size 64 --MLM --loss_names 'supkl+queue+match2+dot' \\
        --dataset_name AGDataAttr --root_dir path_to_dataset/TBAGPR --num_epoch 60
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from prettytable import PrettyTable

from datasets.build import read_dataset, selecting_splits, train_loader
from model.build import build_training_model, load_fitting
from model.losses import check_losses, parse_loss_names
from processor.evaluator import Evaluator
from processor.trainer import Trainer, read_state
from solver.build import build_optimizer, build_scheduler
from utils.attributes import check_labels, read_attributes
from utils.checkpoint import read_weights
from utils.devices import choose_device, choose_precision
from utils.errors import run_main
from utils.logger import new_run_dir, setup_logger
from utils.metrics import FIGURES
from utils.options import parse_options, write_config


def main() -> None:
    args = parse_options(description=__doc__.split("\n")[0])
    # All that can be wrong is checked before anything is built, and before a folder is made.
    device = choose_device(args.device)
    args.precision = choose_precision(args.precision, device)
    losses = parse_loss_names(args.loss_names, args.MLM)
    data = read_dataset(args)
    check_losses(losses, data.name, data.has_pairs, bool(data.attribute_classes))
    if "match2" in losses:
        attributes = read_attributes(args.attributes_file)
        check_labels(attributes, data.attribute_classes, data.name, args.attributes_file)
    generator = torch.Generator().manual_seed(args.seed)
    loader = train_loader(data, args, generator, device)
    splits = selecting_splits(args.val_dataset)
    evaluators = [Evaluator(data, split, args, device, data.views[:1]) for split in splits]
    model = build_training_model(args, losses, data.num_identities)
    fitted = (
        load_fitting(model, read_weights(args.finetune), args.finetune) if args.finetune else ""
    )

    if args.resume:
        state = read_state(args.resume_ckpt_file)
        run_dir = Path(args.resume_ckpt_file).parent
    else:
        run_dir = new_run_dir(args.output_dir, args.dataset_name, args.name)
    log = setup_logger(run_dir / "train_log.txt")
    log.info(f"run folder: {run_dir}")
    describe(log, data, evaluators, args, device)
    if fitted:
        log.info(fitted)
    optimizer = build_optimizer(model.to(device).named_parameters(), args)
    scheduler = build_scheduler(optimizer, args)
    trainer = Trainer(args, model, loader, evaluators, optimizer, scheduler, device, run_dir, log)
    if args.resume:
        trainer.resume(state, args.resume_ckpt_file)
        log.info(f"resumed after epoch {trainer.epoch}")
    write_config(run_dir / "configs.yaml", args)
    best = trainer.train()

    table = PrettyTable(["best epoch", "chosen on", "figures of", *FIGURES])
    table.float_format = ".2"
    for chosen_on, found in best.items():
        for split, figures in found["figures"].items():
            table.add_row([found["epoch"], chosen_on, split, *figures.values()])
    log.info(table.get_string())
    log.info(f"evaluate it with: python test.py --config_file {run_dir / 'configs.yaml'}")


def describe(log: logging.Logger, data, evaluators, args, device) -> None:
    sizes = "; ".join(
        f"{e.name}: {len(e.split.captions)} captions, {len(e.split.images)} images"
        for e in evaluators
    )
    log.info(f"{data.name}: {data.num_identities} identities, {len(data.train)} samples; {sizes}")
    chosen = {
        "test": "best.pth is chosen by R@1 on the test split: this is the paper's protocol",
        "val": "best.pth is chosen by R@1 on the val split: test stays unseen",
        "both": "best.pth is chosen by R@1 on the val split, best_test.pth on the test split",
    }
    log.info(chosen[args.val_dataset])
    log.info(f"losses {args.loss_names}; {device.type}, {args.precision}, seed {args.seed}")


if __name__ == "__main__":
    run_main(main)
