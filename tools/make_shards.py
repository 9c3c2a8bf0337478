"""Write a data set as tar files for `--dataset_name custom`, or index those that others wrote.

    python tools/make_shards.py --config_file configs/irra.yaml --root_dir data/CUHK-PEDES --output data/cuhk-shards
    python tools/make_shards.py --index data/shards --split train

The first writes any data set that this project reads: train-000000.tar, ..., in the form of
WebDataset, and dataset.jsonl, which tells where in them each image is. The second writes only
dataset.jsonl, for all tars in a folder and its subfolders (docs/custom.md).
"""  # noqa: E501  a command

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import numpy as np
from easydict import EasyDict
from tqdm import tqdm

from datasets.pedes import CUSTOM, CUSTOM_FILES, SPLITS
from datasets.records import Data, Image, Split
from datasets.registry import read_dataset
from datasets.shards import BLOCK, Member, open_image
from tools._shard_index import IMAGES, Indexed, index_shard
from utils.attributes import Attribute, check_labels, read_attributes
from utils.command_line import parse_given
from utils.config import read_preset, resolve
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import expand, lock, path_option, write_atomically
from utils.machine import cores
from utils.text import visible

INDEX = CUSTOM_FILES[1]
LOCK = "lock"  # of a folder that is being written
CHECK = "python tools/check_dataset.py --dataset_name custom --root_dir"
NAMES = ("dataset_name", "root_dir", "views", "attributes_file")
FOR_OUTPUT, FOR_INDEX = (*NAMES, "config_file", "shard_size", "seed"), ("split", "workers")


class Entry(NamedTuple):
    """A sample of a shard: the image or images of an identity, and their captions."""

    split: str
    given: int | str | None  # the identity; None for one of its own
    images: tuple[Image, ...]
    captions: list[str]


# Writing


def entries_of(data: Data) -> tuple[list[Entry], list[str]]:
    """The entries of all splits, in the order in which `custom` then reads the same data set; and
    messages about what they leave out.

    A caption of val or test belongs to an identity. It goes to one of its images: the captions of
    an identity are spread over its images, in order.
    """
    captions: dict[tuple[int, tuple[Image, ...]], list[str]] = {}
    for sample in data.train:
        captions.setdefault((sample.pid, sample.images), []).append(sample.caption)
    given = _ids(data, "train", data.num_identities)
    if "train" not in data.ids and len(captions) == data.num_identities:
        given = [None] * len(captions)  # each image is an identity of its own
    entries = [Entry("train", given[pid], images, c) for (pid, images), c in captions.items()]
    messages = []
    for name, split in data.splits.items():
        of_split, lost = _entries_of_split(name, split, data)
        entries += of_split
        if lost:
            messages.append(f"{name}: {lost} captions of identities without an image are left out")
    return entries, messages


def _ids(data: Data, split: str, count: int) -> list[Any]:
    """By identity: the data set's own id, else one that names the split too, because numbers mean
    other people in other splits. They sort like the numbers."""
    return list(data.ids.get(split, ())) or [f"{split}-{pid:08}" for pid in range(count)]


def _entries_of_split(name: str, split: Split, data: Data) -> tuple[list[Entry], int]:
    """The entries of val or test, and the number of captions that no image can have."""
    galleries = list(split.galleries.values())
    pids = galleries[0].pids
    if any(gallery.pids != pids for gallery in galleries):
        raise UserError(
            f"{data.name}: the views of {name} show other identities in another order, so they are "
            "no pairs of images; shards need pairs, or one view (AGSGData with --views a)"
        )
    given = _ids(data, name, 1 + max([*pids, *split.caption_pids]))
    rows: dict[int, list[int]] = {}
    captions: dict[int, list[str]] = {}
    for row, pid in enumerate(pids):
        rows.setdefault(pid, []).append(row)
    for caption, pid in zip(split.captions, split.caption_pids, strict=True):
        captions.setdefault(pid, []).append(caption)
    images = zip(*(gallery.images for gallery in galleries), strict=True)
    entries = [Entry(name, given[pid], pair, []) for pid, pair in zip(pids, images, strict=True)]
    for pid, of_pid in rows.items():
        texts = captions.get(pid, [])
        for number, text in enumerate(texts):
            entries[of_pid[number * len(of_pid) // len(texts)]].captions.append(text)
    lost = sum(len(texts) for pid, texts in captions.items() if pid not in rows)
    return entries, lost


class Writer:
    """Writes the shards of a data set into a folder, and their index last.

    Args:
        attributes: whose labels the images have; none without labels.
        limit: bytes of a shard; only its last sample may exceed it.
    """

    def __init__(self, folder: Path, attributes: Sequence[Attribute], limit: int) -> None:
        self.folder, self.attributes, self.limit = folder, attributes, limit
        # An image that several entries share is in each of their samples, for readers of whole
        # shards. The index names the first one only, so it is one image here, as it was.
        self.members: dict[tuple[str, Image], Member] = {}
        self.shards: Counter[str] = Counter()

    def write(self, entries: Sequence[Entry], seed: int) -> None:
        """Raises UserError if an image cannot be read or the disk is full."""
        bar = tqdm(total=len(entries), desc="write shards", unit="sample", disable=None)
        with bar:
            for split in SPLITS:
                numbers = [i for i, entry in enumerate(entries) if entry.split == split]
                if split == "train":  # so that each shard is a random sample
                    order = np.random.RandomState(seed).permutation(len(numbers))
                    numbers = [numbers[i] for i in order]
                numbers.reverse()  # `pop` takes the last one
                while numbers:
                    name = f"{split}-{self.shards[split]:06}.tar"
                    fill = partial(
                        self._fill, shard=name, numbers=numbers, entries=entries, bar=bar
                    )
                    write_atomically(self.folder / name, fill)
                    self.shards[split] += 1

        def write_index(file: IO[bytes]) -> None:
            for entry in entries:
                file.write(json.dumps(self._line(entry)).encode() + b"\n")

        write_atomically(self.folder / INDEX, write_index)

    def _fill(
        self, file: IO[bytes], shard: str, numbers: list[int], entries: Sequence[Entry], bar: Any
    ) -> None:
        """Write a shard with the next entries, and remove these from `numbers`."""
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            while numbers and tar.offset < self.limit:
                number = numbers.pop()
                entry = entries[number]
                key = f"{number:08}/{_stem(entry.images[0].path)}"
                for image, view in zip(entry.images, ("", ".pair"), strict=False):
                    name = f"{key}{view}.{_ending(image.path)}"
                    start, size = _add(tar, name, _content(image.path))
                    self.members.setdefault((entry.split, image), Member(shard, start, size, name))
                about = {k: v for k, v in self._line(entry).items() if "image" not in k}
                _add(tar, f"{key}.json", json.dumps(about).encode())
                bar.update()

    def _line(self, entry: Entry) -> dict[str, Any]:
        """The entry as dataset.jsonl has it."""
        line: dict[str, Any] = {"split": entry.split}
        if entry.given is not None:
            line["id"] = entry.given
        line["captions"] = entry.captions
        for prefix, image in zip(("", "pair_"), entry.images, strict=False):
            line[f"{prefix}image"] = str(self.members[entry.split, image])
            if self.attributes:
                named = zip(self.attributes, image.attributes, strict=True)
                line[f"{prefix}attributes"] = {a.name: a.classes[v] for a, v in named}
        return line


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Add a member, the same bytes for the same content. Returns where its content starts, and its
    size."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    start = tar.offset + BLOCK
    tar.addfile(info, BytesIO(content))
    return start, len(content)


def _content(path: str) -> bytes:
    try:
        with open_image(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _stem(path: str) -> str:
    """The image's name without its ending, in characters that any program can read: the name tells
    AG-ReID's person."""
    stem = os.path.basename(path).rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60] or "image"


def _ending(path: str) -> str:
    ending = os.path.basename(path).rpartition(".")[2]
    if ending.lower() not in IMAGES:
        raise UserError(
            f"{path}: its name must end with one of {', '.join(IMAGES)}, by which readers of "
            "shards know an image"
        )
    return ending


def write_shards(args: EasyDict) -> None:
    """Write the data set of the options into `--output`, which appears when it is complete."""
    output = args.output
    if os.path.lexists(output):
        raise UserError(f"--output {output}: exists; give another folder, or remove it")
    data = read_dataset(args)
    attributes = read_attributes(args.attributes_file) if data.attribute_classes else []
    if attributes:
        check_labels(attributes, data.attribute_classes, data.name, args.attributes_file)
    entries, messages = entries_of(data)
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    lock(unfinished, name=LOCK)
    try:
        for old in unfinished.iterdir():  # of a killed process
            if old.name != LOCK:
                old.unlink()
        writer = Writer(unfinished, attributes, args.shard_size * 2**20)
        writer.write(entries, args.seed)
        os.rename(unfinished, output)
        (output / LOCK).unlink()
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or output}: {error.strerror}") from None
        raise
    for message in (*data.warnings, *messages):
        say(f"warning: {visible(message)}")
    counts = Counter(entry.split for entry in entries)
    parts = [f"{s}: {counts[s]} samples in {n} shards" for s, n in writer.shards.items()]
    say(f"wrote {visible(output)}: {'; '.join(parts)}; check it with\n{CHECK} {visible(output)}")


# Indexing


def index_folder(folder: Path, split: str, workers: int) -> None:
    """Write `folder/dataset.jsonl` for the tars in it. Raises UserError."""
    if (folder / CUSTOM).exists():
        raise UserError(f"{folder / CUSTOM}: would be read instead of {INDEX}; remove it")
    found = (path.relative_to(folder) for path in folder.rglob("*.tar"))
    # Hidden ones are unfinished, or macOS's.
    shards = sorted(p.as_posix() for p in found if not any(part[0] == "." for part in p.parts))
    if not shards:
        raise UserError(f"--index {folder}: there is no *.tar in it or its subfolders")
    total, work = Indexed(), partial(index_shard, folder, split=split)
    workers = min(workers, cores(), len(shards))
    # Spawned, because forked workers would inherit the threads of torch.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
    bar = tqdm(total=len(shards), desc="index shards", unit="shard", disable=None)

    def write(file: IO[bytes]) -> None:
        with pool as executor, bar:
            for indexed in executor.map(work, shards) if executor else map(work, shards):
                file.writelines(f"{line}\n".encode() for line in indexed.lines)
                total.add(indexed)
                bar.update()

    try:
        write_atomically(folder / INDEX, write, before=lambda: _check(total, folder))
    except BrokenProcessPool:
        raise UserError(
            f"--index {folder}: a process was killed, probably for its memory; give fewer --workers"
        ) from None
    parts = [f"{name}: {total.counts[name]}" for name in SPLITS if total.counts[name]]
    say(visible(f"wrote {folder / INDEX}, samples in {len(shards)} shards: {', '.join(parts)}"))
    for what, count in sorted(total.left_out.items()):
        say(f"left out: {count} {what}")
    if total.ignored:
        say(visible(f"ignored: {', '.join(sorted(total.ignored))}"))
    for name in {"train", "test"} - set(total.counts):
        say(f"warning: no sample has the split {name}, which --dataset_name custom needs")


def _check(total: Indexed, folder: Path) -> None:
    """Raise UserError if the samples are not all of one form."""
    count = sum(total.counts[split] for split in SPLITS)
    if not count:
        raise UserError(f"--index {folder}: no sample has an image and a caption")
    for key in ("pair_image", "attributes", "pair_attributes"):
        if 0 < (having := total.counts[key]) < count:
            raise UserError(
                f"--index {folder}: {having} of {count} samples have {key.replace('_', ' ')}; all "
                "or none must have it"
            )


def main() -> None:
    def extra(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--config_file", metavar="YAML", type=expand, default=None,
            help="preset that names the data set; the command line overrides it")  # fmt: skip
        add("--output", metavar="FOLDER", type=path_option, default=None,
            help="write the data set there; the folder must not exist")  # fmt: skip
        add("--shard_size", metavar="INT", type=int, default=None,
            help="--output: of a tar, in MiB (default: 1024)")  # fmt: skip
        add("--seed", metavar="INT", type=int, default=None,
            help="--output: seed of the order of training samples in the tars "
            "(default: 1)")  # fmt: skip
        add("--index", metavar="FOLDER", type=path_option, default=None,
            help="only write dataset.jsonl for the tars that are there")  # fmt: skip
        add("--split", choices=SPLITS, default=None,
            help="--index: split of samples whose JSON has none (default: the start of the "
            "tar's name)")  # fmt: skip
        add("--workers", metavar="INT", type=int, default=None,
            help="--index: processes, each for a tar at a time "
            "(default: one per core)")  # fmt: skip

    given, own = parse_given(NAMES, __doc__.split("\n")[0], extra)
    if (own["output"] is None) == (own["index"] is None):
        raise UserError("give either --output, to write shards, or --index, to index them")
    mode, others = ("output", FOR_INDEX) if own["output"] else ("index", FOR_OUTPUT)
    given_own = {name: value for name, value in own.items() if value is not None}
    for name in others:
        if name in {**given, **given_own}:
            raise UserError(f"--{name}: not with --{mode}")
    args = EasyDict({"shard_size": 1024, "seed": 1, "split": "", "workers": cores(), **given_own})
    for name, least, most in (
        ("shard_size", 1, 2**30),
        ("seed", 0, 2**32 - 1),
        ("workers", 1, 512),
    ):
        if not least <= args[name] <= most:
            raise UserError(f"--{name} {args[name]}: must be from {least} to {most}")
    if mode == "index":
        index_folder(args.index, args.split, args.workers)
        return
    preset = read_preset(args.config_file) if "config_file" in args else {}
    values = {name: value for name, value in preset.items() if name in NAMES}
    write_shards(EasyDict(resolve({**values, **given}), **args))


if __name__ == "__main__":
    run_main(main)
