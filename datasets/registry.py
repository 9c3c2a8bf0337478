"""The registry of data sets: one row each, and what reads a data set by its name.

data = read_dataset(args)        # a `records.Data`, checked

To add one: one file here with a reader that returns `records.Data`, one row in DATASETS, one test;
docs/extending.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from easydict import EasyDict

from datasets.files import exists
from datasets.heldout import HELDOUT, hold_out
from datasets.pedes import PEDES, read_custom, read_pedes
from datasets.records import Data
from datasets.tbagpr import SOURCES, one_view, read_tbagpr
from utils.attributes import read_attributes
from utils.errors import UserError, suggest


@dataclass(frozen=True)
class DatasetSpec:
    """A row of the registry: how to read it, and what docs/data.md says of it."""

    read: Callable[[EasyDict], Data]
    meaning: str
    has: str  # images per sample, attributes


def _source(name: str, index: int) -> DatasetSpec:
    """One of TBAGPR's sources; its attributes are read where there is an attrs.json."""
    source = SOURCES[index]

    def read(args: EasyDict) -> Data:
        labelled = exists(Path(args.root_dir) / "attrs.json")
        return read_tbagpr(args.root_dir, name, labelled, [source])

    return DatasetSpec(
        read, f"TBAGPR's source {source.folder} alone", "both views; attributes if `attrs.json`"
    )


def _pedes(name: str) -> DatasetSpec:
    file, _ = PEDES[name]
    return DatasetSpec(
        lambda args: read_pedes(args.root_dir, name), f"`{name}/{file}`, `{name}/imgs/`", "one view"
    )


DATASETS: dict[str, DatasetSpec] = {
    "AGDataAttr": DatasetSpec(
        lambda args: read_tbagpr(args.root_dir, "AGDataAttr"), "TBAGPR", "both views, attributes"
    ),
    "AGData": DatasetSpec(
        lambda args: read_tbagpr(args.root_dir, "AGData", attributes=False),
        "TBAGPR without its attributes",
        "both views",
    ),
    "AGSGData": DatasetSpec(
        lambda args: one_view(read_tbagpr(args.root_dir, "AGSGData", attributes=False), args.views),
        "TBAGPR, each image a sample of its own; `--views a`, `g` or `ag`",
        "one view",
    ),
    "AGTBPR": _source("AGTBPR", 0),
    "G2APS": _source("G2APS", 1),
    **{name: _pedes(name) for name in PEDES},
    "custom": DatasetSpec(
        lambda args: read_custom(args.root_dir, read_attributes(args.attributes_file)),
        "your own: `dataset.json`, see [custom.md](custom.md)",
        "one view or both; attributes if given",
    ),
}


def read_dataset(args: EasyDict) -> Data:
    """Read and check `--dataset_name` in `--root_dir`, with the splits that `--val_dataset` chooses
    on. Raises UserError."""
    data = read_whole(args)
    wanted = selecting_splits(args.val_dataset)
    if HELDOUT in wanted:
        data = hold_out(data, args.heldout, args.heldout_seed)
    if not set(wanted) <= set(data.splits):
        raise UserError(
            f"--val_dataset {args.val_dataset}: {data.name} has only {', '.join(data.splits)}; "
            "--val_dataset heldout takes some identities out of training to choose on"
        )
    return data


def read_for_test(args: EasyDict) -> tuple[Data, list[str]]:
    """The same for a run that is over: where the split that chose cannot be had any more, since the
    data has changed, the data set without it, and what to tell."""
    try:
        return read_dataset(args), []
    except UserError as error:
        return read_whole(args), [f"the split that chose is left out: {error}"]


def read_whole(args: EasyDict) -> Data:
    """Read and check the data set with the splits that it has on disk. Raises UserError."""
    name = args.dataset_name
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"--dataset_name {name}: unknown.{suggest(name, DATASETS)} Known: {known}")
    if args.views != "ag" and name != "AGSGData":
        raise UserError(f"--views {args.views}: --dataset_name {name} has its own; for AGSGData")
    return DATASETS[name].read(args)


def selecting_splits(val_dataset: str) -> tuple[str, ...]:
    """The splits that choose a checkpoint; the first one's is best.pth. None if the last epoch is
    taken."""
    return {"both": (HELDOUT, "test"), "last": ()}.get(val_dataset, (val_dataset,))


def datasets_table() -> str:
    """The registry in Markdown, for docs/data.md."""
    lines = ["| `--dataset_name` | what it is | a sample has |", "|---|---|---|"]
    lines += [f"| `{name}` | {row.meaning} | {row.has} |" for name, row in DATASETS.items()]
    return "\n".join(lines)
