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

from datasets.build import read_dataset, train_loader
from model.build import build_training_model, load_fitting
from model.losses import check_losses, parse_loss_names
from processor.evaluator import Evaluator
from processor.trainer import Trainer
from solver.build import build_optimizer, build_scheduler
from utils.attributes import check_labels, read_attributes
from utils.checkpoint import read_weights
from utils.devices import choose_device, choose_precision
from utils.errors import run_main
from utils.logger import new_run_dir, setup_logger
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
    evaluator = Evaluator(data, args.val_dataset, args, device, views=data.views[:1])
    model = build_training_model(args, losses, data.num_identities)
    fitted = (
        load_fitting(model, read_weights(args.finetune), args.finetune) if args.finetune else ""
    )

    if args.resume:
        run_dir = Path(args.resume_ckpt_file).parent
    else:
        run_dir = new_run_dir(args.output_dir, args.dataset_name, args.name)
    log = setup_logger(run_dir / "train_log.txt")
    log.info(f"run folder: {run_dir}")
    describe(log, data, evaluator, args, device)
    if fitted:
        log.info(fitted)
    optimizer = build_optimizer(model.to(device).named_parameters(), args)
    scheduler = build_scheduler(optimizer, args)
    trainer = Trainer(args, model, loader, evaluator, optimizer, scheduler, device, run_dir, log)
    if args.resume:
        trainer.resume(args.resume_ckpt_file)
        log.info(f"resumed after epoch {trainer.epoch}")
    else:
        write_config(run_dir / "configs.yaml", args)
    best = trainer.train()

    table = PrettyTable(["best epoch", "split", "R@1", "R@5", "R@10", "mAP", "mINP"])
    table.float_format = ".2"
    table.add_row([best["epoch"], best["split"], *(best[n] for n in table.field_names[2:])])
    log.info(table.get_string())
    log.info(f"evaluate it with: python test.py --config_file {run_dir / 'configs.yaml'}")


def describe(log: logging.Logger, data, evaluator, args, device) -> None:
    split = evaluator.split
    log.info(
        f"{data.name}: {data.num_identities} identities, {len(data.train)} samples; "
        f"{evaluator.name}: {len(split.captions)} captions, {len(split.images)} images"
    )
    chosen = "this is the paper's protocol" if evaluator.name == "test" else "test stays unseen"
    log.info(f"best.pth is chosen by R@1 on the {evaluator.name} split: {chosen}")
    log.info(f"losses {args.loss_names}; {device.type}, {args.precision}, seed {args.seed}")


if __name__ == "__main__":
    run_main(main)
