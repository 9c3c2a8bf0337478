"""The registry of data sets: one row for each, and `read_dataset`, which reads one by its name.

data = read_dataset(args)        # a `records.Data`, checked

To add a data set, write a reader that returns `records.Data` (one file here), a row in DATASETS and
a test; docs/extending.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from easydict import EasyDict

from datasets.aerial_pedes import AERI, TAG, read_aeri_pedes, read_tag_pedes
from datasets.heldout import HELDOUT, hold_out
from datasets.noise import exchange_captions
from datasets.pedes import PEDES, read_custom, read_pedes
from datasets.reading import exists
from datasets.records import Data
from datasets.tbagpr import SOURCES, one_view, read_tbagpr
from utils.attributes import read_attributes
from utils.errors import UserError, suggest


@dataclass(frozen=True)
class DatasetSpec:
    """A row of the registry: the reader, and two cells of the table in docs/data.md."""

    read: Callable[[EasyDict], Data]
    meaning: str
    has: str  # images per sample, attributes


def _source(name: str, index: int) -> DatasetSpec:
    """One of TBAGPR's sources. Attributes are read if there is an attrs.json."""
    source = SOURCES[index]

    def read(args: EasyDict) -> Data:
        labelled = exists(Path(args.root_dir) / "attrs.json")
        return read_tbagpr(args.root_dir, name, labelled, [source])

    return DatasetSpec(
        read, f"only TBAGPR's source {source.folder}", "both views; attributes if `attrs.json`"
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
        "TBAGPR, with single images as samples: `--views a`, `g` or `ag`",
        "one view",
    ),
    "AGTBPR": _source("AGTBPR", 0),
    "G2APS": _source("G2APS", 1),
    AERI: DatasetSpec(
        lambda args: read_aeri_pedes(args.root_dir),
        f"`{AERI}/train_caption.json`, `test_caption.json`, images",
        "both views",
    ),
    TAG: DatasetSpec(
        lambda args: read_tag_pedes(args.root_dir),
        f"`{TAG}/train_reid.json`, `test_reid.json`, images",
        "one image of either view",
    ),
    **{name: _pedes(name) for name in PEDES},
    "custom": DatasetSpec(
        lambda args: read_custom(
            args.root_dir, read_attributes(args.attributes_file), args.image_cache
        ),
        "your own: `dataset.json` or `dataset.jsonl`, see [custom.md](custom.md)",
        "one view or both; attributes if given",
    ),
}


def read_dataset(args: EasyDict) -> Data:
    """Read and check `--dataset_name` in `--root_dir`, with the splits that `--val_dataset` needs
    and the noise of `--noise_rate`. Raises UserError."""
    data = read_stored(args)
    wanted = selecting_splits(args.val_dataset)
    if HELDOUT in wanted:
        data = hold_out(data, args.heldout, args.heldout_seed)
    if not set(wanted) <= set(data.splits):
        raise UserError(
            f"--val_dataset {args.val_dataset}: {data.name} has only {', '.join(data.splits)}; "
            "--val_dataset heldout takes some identities out of training for this"
        )
    return _with_noise(data, args)


def read_for_test(args: EasyDict) -> tuple[Data, list[str]]:
    """The same for a finished run. If the data has changed, so that the split that selected the
    checkpoint no longer exists: the data set without it, and a message."""
    try:
        return read_dataset(args), []
    except UserError as error:
        data = _with_noise(read_stored(args), args)
        return data, [f"the selection split is left out: {error}"]


def _with_noise(data: Data, args: EasyDict) -> Data:
    return exchange_captions(data, args.noise_rate, args.noise_seed) if args.noise_rate else data


def read_stored(args: EasyDict) -> Data:
    """Read and check the data set with the splits that are on disk. Raises UserError."""
    name = args.dataset_name
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"--dataset_name {name}: unknown.{suggest(name, DATASETS)} Known: {known}")
    if args.views != "ag" and name != "AGSGData":
        raise UserError(f"--views {args.views}: only for AGSGData, not for --dataset_name {name}")
    data = DATASETS[name].read(args)
    data.check()
    return data


def selecting_splits(val_dataset: str) -> tuple[str, ...]:
    """The splits on which checkpoints are selected; the first split's is best.pth. Empty if the
    last epoch is taken."""
    return {"both": (HELDOUT, "test"), "last": ()}.get(val_dataset, (val_dataset,))


def datasets_table() -> str:
    """The registry in Markdown, for docs/data.md."""
    lines = ["| `--dataset_name` | what it is | a sample has |", "|---|---|---|"]
    lines += [f"| `{name}` | {row.meaning} | {row.has} |" for name, row in DATASETS.items()]
    return "\n".join(lines)
