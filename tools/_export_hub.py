"""export.py --hub: a run in Hugging Face's habit, with a model card.

`FOLDER/` receives

    model.safetensors   the backbone (`base_model.*`) and FIRM's head, as the checkpoint has them
    config.json         the run's options without paths, and the architecture
    attributes.yaml     with FIRM's head: the sentences that it was trained with
    README.md           the model card; README.new.md if there is another one, which may be edited

`--pretrain_choice FOLDER` trains from it, and `load_run(FOLDER)` and test.py evaluate it. It holds
no captions, no features and no classifier of identities.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from easydict import EasyDict
from torch import Tensor

from model.aeafirm import AEAFIRM
from model.weights import parse_choice
from processor.results import check_metrics, read_results, stem
from tools._report_runs import percentages
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import PROJECT, read_file, write_atomically
from utils.metrics import SHOWN
from utils.options import MAY_DIFFER, OPTIONS
from utils.runs import HUB_CONFIG, HUB_WEIGHTS
from utils.tables import in_markdown, markdown

ATTRIBUTES, CARD, NEW_CARD = "attributes.yaml", "README.md", "README.new.md"
MODEL_TYPE = "aea-firm"  # in config.json
PAPER = (
    'AEA-FIRM ("Adaptive Elastic Alignment with Fine-grained Representation Mining", IEEE TCSVT '
    "2025, [doi 10.1109/tcsvt.2025.3586601](https://doi.org/10.1109/tcsvt.2025.3586601))"
)
HEADER = """\
---
license: other
pipeline_tag: zero-shot-image-classification
tags:
- person-search
- text-to-image-retrieval
- aerial-ground
---"""
LIMITS = """\
- It ranks pictures by similarity to a sentence. A high rank is a hint to look, never proof that two
  pictures show one person, or who that is.
- It knows the people, places, clothes and cameras of its training data. On others it is worse, and
  nothing above says by how much: measure it on your own pictures first.
- Guesses of gender, age, weight or height are guesses from clothes and outlines, with the errors of
  their labels. Decide nothing about a person by them.
- How its errors are spread over skin colours, ages or bodies was not measured."""
USE = """\
Searching for people in pictures is subject to law in most places (in the EU, the GDPR and the AI
Act). Use it only on pictures that you may search for this purpose, tell the people concerned where
the law asks for it, keep a human in every decision, and delete pictures and features that are no
longer needed. It is made for research on retrieval. It must not be used to track or identify people
in secret, or to decide about a person by itself."""


def export_hub(
    model: AEAFIRM, args: EasyDict, weights: dict[str, Tensor], checkpoint: Path, folder: Path,
    epoch: int | None,
) -> str:  # fmt: skip
    """Write the folder, and return a line about it. Raises UserError.

    Args:
        model: of the checkpoint, for evaluation.
        weights: the checkpoint's.
        epoch: the checkpoint's, or None if it does not say.
    """
    check_folder(folder)
    kept = {name: weights[name].contiguous().clone() for name in model.state_dict()}
    config = hub_config(args, model)
    card = model_card(args, model, results_of(checkpoint, epoch), epoch)
    files: dict[str, bytes] = {}
    if model.sentences is not None:
        path = Path(args.attributes_file)
        files[ATTRIBUTES] = read_file(path if path.exists() else PROJECT / path)
    files[HUB_WEIGHTS] = safetensors.torch.save(kept, {"format": "pt"})
    files[HUB_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    path, note = folder / CARD, ""
    if path.exists() and read_file(path) != card.encode():
        path, note = folder / NEW_CARD, f"; {CARD} is kept, as it may have been edited"
    files[path.name] = card.encode()
    for name, content in files.items():
        _write(folder / name, content)
    return f"wrote {', '.join(files)} into {folder}: {len(kept)} weights{note}"


def check_folder(folder: Path) -> None:
    """Raise UserError if an export would replace files that are not of one."""
    there = [name for name in (CARD, HUB_CONFIG, HUB_WEIGHTS) if (folder / name).exists()]
    with suppress(UserError, AttributeError):
        if not there or read_json_file(folder / HUB_CONFIG).get("model_type") == MODEL_TYPE:
            return
    raise UserError(
        f"--hub {folder}: its {there[0]} is not of an export; name an empty or a new folder"
    )


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def hub_config(args: EasyDict, model: AEAFIRM) -> dict[str, Any]:
    """The content of config.json: the options that describe the model and how it was trained,
    without paths of this machine."""
    backbone = model.base_model
    options = {name: args[name] for name in OPTIONS if name == "name" or name not in MAY_DIFFER}
    options["pretrain_choice"] = model_name(args)
    if not options["pretrain_choice"]:  # the shapes of its weights say all
        del options["pretrain_choice"]
    architecture = {**asdict(backbone.config), "grid": backbone.grid}
    return {"model_type": MODEL_TYPE, "architecture": architecture, **options, **backbone.input}


def model_name(args: EasyDict) -> str:
    """The `--pretrain_choice` without the path of a file; "" if it is only that."""
    choice = parse_choice(args.pretrain_choice)
    if args.pretrain_choice == "scratch" or not choice.file:
        return args.pretrain_choice
    return args.pretrain_choice.removesuffix(f"@{choice.file}") if choice.model else ""


def results_of(checkpoint: Path, epoch: int | None) -> dict[str, Any] | None:
    """The checkpoint's test_results.json, or None if it was not evaluated. Raises UserError if they
    are of another epoch, or not by test.py."""
    path = checkpoint.with_name(f"{stem(checkpoint.name)}_results.json")
    if not path.is_file():
        return None
    results = read_results(path, checkpoint.with_name(f"{stem(checkpoint.name)}_queries.npz"))
    check_metrics(results, path)
    if epoch is not None and results.get("epoch") not in (None, epoch):
        raise UserError(
            f"{path}: of epoch {results['epoch']}, but {checkpoint.name} is of epoch {epoch}; "
            "evaluate the run again (test.py)"
        )
    return results


def model_card(
    args: EasyDict, model: AEAFIRM, results: dict[str, Any] | None, epoch: int | None
) -> str:
    """README.md. Names that come from files are escaped."""
    named = model_name(args)
    start = f"CLIP weights {named}" if named else "CLIP weights of a file"
    start = "random weights" if named == "scratch" else start
    height, width = args.img_size
    losses = ", ".join(args.loss_names.split("+"))
    trained = [
        ("data set", args.dataset_name),
        ("trained on", _counts(results)),
        ("started from", start + (", and a checkpoint (--finetune)" if args.finetune else "")),
        ("losses", losses),
        ("images", f"{height}x{width} pixels, views {args.views}"),
        ("captions", f"up to {args.text_length} tokens"),
        ("features", f"{model.feature_dim} numbers"),
        ("epochs", f"{args.num_epoch}; these weights are of epoch {epoch or 'unknown'}"),
        ("batch", f"{args.batch_size}, sampler {args.sampler}"),
        ("optimizer", f"{args.optimizer}, learning rate {args.lr:g}"),
        ("precision, seed", f"{args.precision}, {args.seed}"),
    ]
    parts = [
        HEADER,
        f"# {in_markdown(args.name)}",
        'Finds a pedestrian in drone and street-camera images from a sentence: *"a man in a grey '
        f'shirt with a black backpack"*. Trained with the code of {PAPER}.',
        "## Results",
        *_results(results),
        "## Training",
        markdown(("what", "value"), trained, left=2),
        "`config.json` has all options.",
        "## Use",
        "```python\nfrom processor.inference import load_run  # this project's code\n\n"
        'run = load_run("path/to/this/folder")\n'
        'text_QD = run.encode_text(["a man in a grey shirt with a black backpack"])\n'
        'image_GD = run.encode_image(["0001.jpg", "0002.jpg"])  # features have unit length\n'
        "scores_QG = text_QD @ image_GD.T\n```",
        "`python train.py --pretrain_choice path/to/this/folder` trains from it. (Another "
        "image size or patch stride is possible: the positions are resized.)",
        "## Limits",
        LIMITS,
        "## Responsible use",
        USE,
        "## Licence",
        "The code is under the MIT licence. The weights are made from "
        f"{in_markdown(args.dataset_name)} and {in_markdown(start)}: their terms apply. Before you "
        "publish this folder, check them, and set `license:` at the top.",
    ]
    return "\n\n".join(parts) + "\n"


def _counts(results: dict[str, Any] | None) -> str:
    """How large the training set is."""
    counts = (results or {}).get("data", {}).get("counts")
    train = counts.get("train") if isinstance(counts, dict) else None
    if not isinstance(train, dict):
        return "unknown"
    return ", ".join(f"{count} {what}" for what, count in train.items())


def _results(results: dict[str, Any] | None) -> list[str]:
    if results is None:
        return ["The run was not evaluated when this card was written."]
    content = results["splits"]["test"]
    rows = [
        (name, values["queries"], values["gallery"], *(f"{v:.2f}" for v in percentages(values)))
        for name, values in content["galleries"].items()
    ]
    parts = [
        "Test split, in percent. " + in_markdown(results.get("protocol", {}).get("text", "")),
        markdown(("gallery", "captions", "images", *SHOWN), rows),
    ]
    if accuracy := content.get("attribute_accuracy"):
        views = list(next(iter(accuracy.values())))
        table = [(name, *(f"{row[view]:.1f}" for view in views)) for name, row in accuracy.items()]
        parts += ["Accuracy of the guessed attributes, in percent:"]
        parts += [markdown(("attribute", *views), table)]
    return parts
