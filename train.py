"""Train a text-based aerial-ground pedestrian retrieval model.

    python train.py --config_file configs/mini.yaml --root_dir data/mini-TBAGPR
    python train.py --name irra --batch_size 64 --MLM --loss_names 'supkl+queue+match2+dot' \\
        --dataset_name AGDataAttr --root_dir path_to_dataset/TBAGPR --num_epoch 60
    torchrun --standalone --nproc_per_node 4 train.py ...   # the same on four GPUs
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

from utils.command_line import changed_options, parse_options
from utils.errors import run_main

DESCRIPTION = __doc__.split("\n")[0]
if __name__ == "__main__":  # --help and wrong options end here: to import torch takes seconds
    run_main(lambda: parse_options(description=DESCRIPTION))

# isort: split

from datasets.fingerprint import fingerprint
from datasets.loaders import train_loader
from datasets.registry import read_dataset, selecting_splits
from model.build import build_training_model, check_architecture, check_batch_norm
from model.losses.registry import check_losses, more_images, needs_masked, parse_loss_names
from processor.evaluator import Evaluator
from processor.memory import memory_notes
from processor.resume import read_state, resume
from processor.step import TrainStep
from processor.summary import closing_lines, describe
from processor.trainer import Trainer
from solver.build import build_optimizer
from utils import distributed
from utils.attributes import check_labels, read_attributes
from utils.config import write_config
from utils.devices import choose_precision
from utils.interrupt import exit_on_signals
from utils.machine import allow_open_files
from utils.run_log import setup_logger
from utils.runs import CONFIG, open_run
from utils.text import Multiline


def main() -> None:
    args = parse_options(description=DESCRIPTION)
    # Check the input before the model is built and the run's folder is made.
    allow_open_files(args.num_workers)
    processes, device = distributed.start(args.device)
    args = processes.from_rank_0(args)  # each may have found another run to resume
    args.precision = choose_precision(args.precision, device)
    losses = parse_loss_names(args.loss_names)
    check_architecture(args, losses, processes)
    data = read_dataset(args)
    check_losses(losses, data.name, data.has_pairs, bool(data.attribute_classes))
    if "match2" in losses:
        attributes = read_attributes(args.attributes_file)
        check_labels(attributes, data.attribute_classes, data.name, args.attributes_file)
    loader = train_loader(data, args, device, processes, needs_masked(losses), more_images(losses))
    evaluators = [
        Evaluator(data, split, args, device, data.views[:1], processes)
        for split in selecting_splits(args.val_dataset)
    ]
    if args.on_bad_image == "skip":
        for evaluator in evaluators:
            evaluator.check_images()
    with processes.rank_0_first():  # it downloads weights, and the others read them
        model = build_training_model(args, losses, data.num_identities, processes).to(device)
    last_batch = sum(loader.batch_sampler.counts(len(loader) - 1))
    check_batch_norm(model, args, last_batch * len(data.views))
    run_dir, resumed = open_run(args, processes), args.resume_ckpt_file
    saved = read_state(resumed, args.keep_last) if resumed else None
    log = setup_logger(run_dir / "train_log.txt", processes.rank)
    log.info(f"run folder: {run_dir}")
    describe(log, data, loader, evaluators, args, device, processes)
    memory = memory_notes(model, args, data.has_pairs, device, processes)
    for note in (*memory, *model.base_model.notes):
        log.info(note)
    optimizer = build_optimizer(model.named_parameters(), args)
    train_step = TrainStep(model, optimizer, args)
    trainer = Trainer(args, train_step, loader, evaluators, run_dir, log, fingerprint(data))
    if saved:
        notes = changed_options(args, run_dir / CONFIG)
        for note in (*notes, *resume(trainer, saved)):
            log.info(note)
        del saved  # frees its tensors
    if processes.is_rank_0:
        write_config(run_dir / CONFIG, args)
    best = trainer.train()
    log.info(Multiline(closing_lines(best, run_dir, args)))
    distributed.finish()


if __name__ == "__main__":
    exit_on_signals()
    run_main(main)
