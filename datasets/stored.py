"""A data set that has been read, on disk next to the image cache, for later starts.

Reading and checking millions of entries takes minutes. With `--image_cache FOLDER`, a data set of
`dataset.jsonl` is written to `FOLDER/dataset-<key>/` as arrays. Later starts and all processes map
them into memory. The key is a hash of the annotation file (path, size, time of its last change), of
the attributes and of this file's version. Folders and tars of images are remembered with the time
of their last change: if one has changed, the data set is read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from datasets.compact import Columns, TrainSamples
from datasets.fingerprint import of_train
from datasets.image_cache import locked
from datasets.records import Data, Gallery, Image, Split
from datasets.text import TokenizedCaptions
from utils.console import LOGGER_NAME
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import add_to_hash, write_atomically

VERSION = 1  # increase it when the same files give other records
CONTENT = "content.json"


def key_of(file: Path, content: str) -> str:
    """The key of a data set: its annotation file, and whatever else its reader reads."""
    status = os.stat(file)
    facts = [VERSION, os.path.abspath(file), status.st_size, status.st_mtime_ns, content]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def load_or_read(folder: Path, read: Callable[[], Data]) -> Data:
    """The data set in `folder`, or else that of `read`, which is then written there. Of several
    processes one reads, and the others wait."""
    if (data := _load_if_usable(folder)) is not None:
        return data
    with locked(folder):
        if (data := _load_if_usable(folder)) is not None:  # another process has made it meanwhile
            return data
        data = read()
        try:
            _write(folder, data)
            return _load(folder)  # whose arrays need less memory
        except (UserError, ValueError, OSError) as error:  # later starts take longer, that is all
            text = f"{folder}: the data set could not be stored for later starts: {error}"
            logging.getLogger(LOGGER_NAME).warning(text)
    return data


def _load_if_usable(folder: Path) -> Data | None:
    if not (folder / CONTENT).is_file():
        return None
    try:
        return _load(folder)
    except (UserError, ValueError, KeyError, TypeError, OSError) as error:
        text = f"{folder}: cannot be used ({error}); the data set is read again"
        logging.getLogger(LOGGER_NAME).warning(text)
        return None


def tokenized(data: Data, length: int) -> TokenizedCaptions:
    """The tokens of the training captions, stored next to the data set if that is stored."""
    train = data.train
    captions = getattr(train, "captions", None) or (sample.caption for sample in train)
    folder = getattr(train, "stored", None)
    if folder is None:
        return TokenizedCaptions(captions, length)
    path = folder / f"tokens-{length}.json"
    names = [f"tokens-{length}.{part}" for part in ("flat", "ends")]
    if path.is_file():
        try:
            columns = _load_arrays(folder, read_json_file(path)["arrays"])
            flat, ends = (columns[name] for name in names)
            return TokenizedCaptions.of(flat, ends, length)
        except (UserError, ValueError, KeyError, TypeError, OSError) as error:
            logging.getLogger(LOGGER_NAME).warning(f"{path}: cannot be used ({error}); made again")
    made = TokenizedCaptions(captions, length)
    try:
        arrays = _write_arrays(folder, dict(zip(names, (made.flat, made.ends), strict=True)))
        content = json.dumps({"arrays": arrays}).encode()
        write_atomically(path, lambda file: file.write(content))
    except (UserError, OSError) as error:
        text = f"{path}: the tokens could not be stored for later starts: {error}"
        logging.getLogger(LOGGER_NAME).warning(text)
    return made


def _write(folder: Path, data: Data) -> None:
    """Write the data set to a temporary folder, then rename that."""
    train = data.train
    assert isinstance(train, TrainSamples), "the reader of dataset.jsonl gives columns"
    train.known = of_train(data)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        content = {
            "name": data.name,
            "root": data.root,
            "train": {"root": train.root.removesuffix("/"), "known": train.known},
            "arrays": _write_arrays(temporary, train.columns()),
            "splits": {name: asdict(split) for name, split in data.splits.items()},
            "attribute_classes": data.attribute_classes,
            "views": data.views,
            "ids": {name: list(ids) for name, ids in data.ids.items()},
            "warnings": data.warnings,
            "folders": {f: os.stat(f).st_mtime_ns for f in data.folders},
        }
        text = json.dumps(content).encode()
        write_atomically(temporary / CONTENT, lambda file: file.write(text))
        if folder.exists():  # it could not be used
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> Data:
    """Raises UserError, ValueError, KeyError, TypeError or OSError for a folder that cannot be
    used."""
    content = read_json_file(folder / CONTENT)
    for image_folder, time in content["folders"].items():
        if os.stat(image_folder).st_mtime_ns != time:
            raise ValueError(f"{image_folder} has changed")
    train = TrainSamples.of(_load_arrays(folder, content["arrays"]), content["train"]["root"])
    _check(train)
    train.known, train.stored = tuple(content["train"]["known"]), folder
    splits = {}
    for name, split in content["splits"].items():
        galleries = {
            view: Gallery([Image(p, tuple(a)) for p, a in g["images"]], g["pids"], g["sources"])
            for view, g in split["galleries"].items()
        }
        splits[name] = Split(**{**split, "galleries": galleries})
    names = ("name", "attribute_classes", "ids", "root", "warnings")
    data = Data(
        **{name: content[name] for name in names},
        train=train,
        splits=splits,
        views=tuple(content["views"]),
    )
    data.folders = list(content["folders"])
    return data


def _check(train: TrainSamples) -> None:
    """Raise ValueError if the columns do not fit together."""
    columns, count = train.columns(), len(train)
    images = len(columns["paths.ends"]) - 1
    fit = (
        all(len(columns[n]) == count for n in ("sources", "which", "numbers"))
        and len(columns["captions.ends"]) == count + 1
        and len(columns["images"]) == count * train.views
        and len(columns["labels"]) == images * train.attributes
        and columns["images"].min() >= 0
        and columns["images"].max() < images
    )
    if not fit:
        raise ValueError("its columns do not fit together")


def _write_arrays(folder: Path, columns: Columns) -> dict[str, str]:
    """Write each array to NAME.npy. Returns the SHA-256 of the files, by name."""
    hashes = {}
    for name, column in columns.items():
        path = folder / f"{name}.npy"
        write_atomically(path, lambda file, column=column: np.save(file, column))  # type: ignore[misc]
        hashes[name] = _hash(path)
    return hashes


def _load_arrays(folder: Path, hashes: dict[str, str]) -> Columns:
    columns = {}
    for name, expected in hashes.items():
        path = folder / f"{os.path.basename(name)}.npy"
        if _hash(path) != expected:
            raise ValueError(f"{path.name} is corrupted")
        columns[name] = np.load(path, mmap_mode="r")
    return columns


def _hash(path: Path) -> str:
    sha256: Any = hashlib.sha256()
    add_to_hash(sha256, str(path))
    return sha256.hexdigest()
