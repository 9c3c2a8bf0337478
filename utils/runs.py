"""Folders of runs: make a new one, find the one to resume, compare the options of two runs."""

from __future__ import annotations

import errno
import glob
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from utils.config import read_preset
from utils.errors import UserError
from utils.files import lock, remove_unfinished

if TYPE_CHECKING:
    from utils.distributed import Processes

LAST, AVERAGED, BEST, CONFIG = "last.pth", "averaged.pth", "best.pth", "configs.yaml"
# A run in Hugging Face's habit, as tools/export.py --hub writes it.
HUB_CONFIG, HUB_WEIGHTS = "config.json", "model.safetensors"
# Suffix of a TensorBoard file: 1 for a new run, 2 after its first resume, and so on.
EVENTS = ".{:05d}"
LAST_EPOCH = "last"  # in place of the split that selected a checkpoint, if none did


def new_run_dir(output_dir: str, dataset_name: str, name: str) -> Path:
    """Make `<output_dir>/<dataset_name>/<time>_<name>/`, with a number if it exists already.

    Raises UserError.
    """
    parent = Path(output_dir, dataset_name)
    stem = f"{time.strftime('%Y%m%d_%H%M%S')}_{name}"
    make_folder(parent)
    try:
        for number in range(1, 1000):
            folder = parent / (stem if number == 1 else f"{stem}_{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror} ({parent})") from None
    raise UserError(f"--output_dir {output_dir}: 999 folders {stem} exist; run this again")


def make_folder(folder: Path) -> None:
    """Make the folder of a data set's runs. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder.parent}: {error.strerror} ({folder})") from None


def open_run(args: EasyDict, processes: Processes) -> Path:
    """The folder of a new or resumed run. Rank 0 locks it, and removes temporary files of a killed
    process.

    Raises UserError if another process uses the folder; with `--resume auto` also if another one
    has started a run of this name since this process looked for a run to resume.
    """
    folder = Path(args.resume_ckpt_file).parent if args.resume_ckpt_file else None
    path = (args.output_dir, args.dataset_name, args.name)
    if processes.is_rank_0 and folder is None and args.resume == "auto":
        parent = Path(args.output_dir, args.dataset_name)
        make_folder(parent)
        start_lock = lock(parent, name=f".{args.name}.lock", wait=True)
        for other in (f for f in run_folders(*path[:2]) if is_named(f, args.name)):
            refuse_if_in_use([other])
            if os.path.isfile(other / LAST):  # False in an unreadable folder of another user
                raise UserError(
                    f"{other}: another process has just started this run; run this command again"
                )
        folder = new_run_dir(*path)
        lock(folder)
        os.close(start_lock)
    elif processes.is_rank_0:
        folder = folder or new_run_dir(*path)
        lock(folder)
        remove_unfinished(folder)
    return processes.from_rank_0(folder)


def options_file(place: Path) -> Path:
    """The file of options of a run: `place`, or that in the folder `place` of a run or of
    tools/export.py --hub. It need not exist."""
    if place.is_file() or (place.suffix in (".yaml", ".yml", ".json") and not place.is_dir()):
        return place
    hub = place / HUB_CONFIG
    return hub if hub.is_file() and not (place / CONFIG).is_file() else place / CONFIG


def best_checkpoint(config: Path) -> Path:
    """The best checkpoint of a run, next to its file of options."""
    return config.with_name(HUB_WEIGHTS if config.name == HUB_CONFIG else BEST)


def refuse_if_in_use(runs: Iterable[Path]) -> None:
    """Raise UserError if another process uses one of these folders."""
    for folder in runs:
        os.close(lock(folder))


def is_named(folder: Path, name: str) -> bool:
    """Whether a run has this name; if its options cannot be read, its folder's name decides."""
    try:
        return read_preset(folder / CONFIG).get("name") == name
    except UserError:
        return bool(re.fullmatch(rf"\d{{8}}_\d{{6}}_{re.escape(name)}(_\d+)?", folder.name))


def run_folders(output_dir: str, dataset_name: str) -> list[Path]:
    """Folders of all runs on a data set ("*": on any), the one with the newest checkpoint first.

    Raises UserError if the folder of the runs is not readable.
    """

    def saved(folder: Path) -> int:
        last = folder / LAST
        return last.stat().st_mtime_ns if os.path.isfile(last) else 0  # 0 in an unreadable folder

    for place in (output_dir, os.path.join(output_dir, dataset_name)):
        if os.path.isdir(place) and not os.access(place, os.R_OK | os.X_OK):
            raise UserError(f"{place}: {os.strerror(errno.EACCES)} (--output_dir)")
    name = dataset_name if dataset_name == "*" else glob.escape(dataset_name)
    paths = map(Path, glob.glob(os.path.join(glob.escape(output_dir), name, "*")))
    return sorted((path for path in paths if path.is_dir()), key=saved, reverse=True)


def differing_options(
    now: dict[str, Any], then: dict[str, Any], ignored: Iterable[str]
) -> list[str]:
    """Options that differ between two runs, as "--lr 1e-4 (was 1e-5)"."""
    return [
        f"--{name} {now[name]} (was {then[name]})"
        for name in now
        if name in then and name not in ignored and now[name] != then[name]
    ]
