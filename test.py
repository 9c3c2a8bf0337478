"""Evaluate the best checkpoint of a run on every gallery that its data set has.

    python test.py --config_file logs/AGDataAttr/<run>/configs.yaml --root_dir data/mini-TBAGPR

The figures are printed and written to test_results.json beside the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from datasets.build import read_dataset
from model.build import build_evaluation_model
from processor.evaluator import Evaluator, attribute_table, gallery_table
from utils.checkpoint import load_checkpoint
from utils.devices import choose_device, choose_precision
from utils.errors import run_main
from utils.files import write_atomically
from utils.logger import setup_logger
from utils.options import parse_test_options


def main() -> None:
    args, path, notes = parse_test_options(description=__doc__.split("\n")[0])
    log = setup_logger()
    for note in notes:
        log.info(note)
    device = choose_device(args.device)
    args.precision = choose_precision(args.precision, device)
    checkpoint = load_checkpoint(path)
    model = build_evaluation_model(args, checkpoint["model"], str(path)).to(device)
    data = read_dataset(args)
    best = checkpoint.get("best", {})
    log.info(f"{path}: epoch {checkpoint.get('epoch')}; {device.type}, {args.precision}")

    results = {"checkpoint": str(path), "epoch": checkpoint.get("epoch"), "splits": {}}
    # The split that chose the checkpoint comes too, so that its figures can be compared.
    for name in dict.fromkeys((args.val_dataset, "test")):
        evaluator = Evaluator(data, name, args, device)
        features = evaluator.encode(model)
        galleries = evaluator.galleries(features)
        results["splits"][name] = {"galleries": {k: asdict(r) for k, r in galleries.items()}}
        chose = name == args.val_dataset
        role = "chose this checkpoint" if chose else "had no part in choosing this checkpoint"
        log.info(f"\n{name} split, which {role}\n{gallery_table(galleries)}")
        if best.get("split") == name:
            now = next(iter(galleries.values())).percentages()
            same = all(f"{best[k]:.2f}" == f"{value:.2f}" for k, value in now.items())
            then = " ".join(f"{k} {best[k]:.2f}" for k in now)
            log.info(
                f"training at epoch {best['epoch']}: {then}: {'equal' if same else 'DIFFERENT'}"
            )
        if data.attribute_names and hasattr(model, "atr_matching_head"):
            accuracy = evaluator.attribute_accuracy(model, features)
            results["splits"][name]["attribute_accuracy"] = accuracy
            log.info(f"\nFIRM's accuracy per attribute, %\n{attribute_table(accuracy)}")
    target = path.parent / "test_results.json"
    write_atomically(target, lambda file: file.write(json.dumps(results, indent=2).encode()))
    log.info(f"\nwritten to {target}")


if __name__ == "__main__":
    run_main(main)
