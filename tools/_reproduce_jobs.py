"""The jobs of reproduce.py: one per row and seed, each with a folder named by a hash.

The hash covers the data, and all options that change a metric. The folder keeps the job's options,
console output, run, metrics (done.json) and the versions of the code that it ran with (code.json).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easydict import EasyDict

from datasets.registry import read_stored
from processor.best import epoch_and_best
from processor.history import HISTORY, read_history
from processor.results import CHECKPOINTS
from tools._reproduce_table import WEIGHTS, Table, slug
from utils.attributes import read_attributes
from utils.checkpoint import load_checkpoint
from utils.config import read_yaml, resolve
from utils.documents import load_json
from utils.errors import UserError, suggest
from utils.files import PROJECT, add_to_hash, read_file
from utils.metrics import METRICS
from utils.options import MAY_DIFFER, OPTIONS, SAME_RESULTS
from utils.runs import differing_options

CODE = ("train.py", "test.py", "datasets", "model", "processor", "solver", "utils")
PROTOCOLS = {
    "paper": "best epoch chosen on test (the paper's protocol)",
    "clean": "best epoch chosen on held-out training identities",
    "val": "best epoch chosen on val",
    "last": "last epoch, none chosen",
}


@dataclass
class Job:
    """One row with one seed."""

    row: str
    seed: int
    args: EasyDict
    folder: Path
    error: str = ""
    retrain: bool = False  # ignore what the folder holds
    new_results: dict[str, Any] | None = None  # if this process has run the job

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.row}, seed {self.seed}"

    @property
    def results(self) -> dict[str, Any] | None:
        """The metrics of a finished job, else None. Raises UserError if they are corrupted."""
        path = self.folder / "done.json"
        if self.new_results:
            return self.new_results
        if self.retrain or not path.is_file():
            return None
        results = read_record(path, dict)
        for protocol in (name for name in PROTOCOLS if name in results):
            try:
                overlap = (results[protocol].get("protocol") or {}).get("overlap") or {}
                numbers = [overlap.get(name, 0) for name in ("images", "people")]
                numbers += [results[protocol][name] for name in METRICS]
            except (AttributeError, KeyError):
                raise _corrupted(path) from None
            if not all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers):
                raise _corrupted(path)
        if set(CHECKPOINTS.get(self.args.val_dataset, ())) - set(results):
            raise _corrupted(path)
        return results

    @property
    def code(self) -> list[dict[str, str]]:
        """The versions of the code that the job ran with, as `code_version` gives them."""
        path = self.folder / "code.json"
        versions = read_record(path, list) if path.is_file() else []
        for version in versions:
            if not isinstance(version, dict) or not all(
                isinstance(version.get(key), str) for key in ("commit", "sources")
            ):
                raise _corrupted(path)
        return versions

    @property
    def last(self) -> Path | None:
        """The checkpoint to resume from, if there is one."""
        if self.retrain:
            return None
        paths = sorted(self.folder.glob("logs/*/*/last.pth"), key=lambda p: p.stat().st_mtime_ns)
        return paths[-1] if paths else None


def read_record(path: Path, kind: type) -> Any:
    """The content of a JSON file of a job's folder, a `kind`. Raises UserError."""
    try:
        content = load_json(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, kind):
        raise _corrupted(path)
    return content


def _corrupted(path: Path) -> UserError:
    return UserError(f"{path}: corrupted; delete it, and the job resumes from its last checkpoint")


def make_jobs(
    table: Table, given: EasyDict, options: dict[str, Any]
) -> tuple[list[Job], dict[str, str]]:
    """All jobs of a table, and the reason for each row that cannot run.

    `options` apply to all rows. Raises UserError for a row whose options contradict each other, and
    for weights that cannot be read.
    """
    jobs, left_out = [], {}
    names = [row["name"] for row in table.rows]
    for name in given.rows:
        if name not in names:
            raise UserError(
                f"--rows: {table.name} has no row '{name}'.{suggest(name, names)} Rows: "
                f"{', '.join(names)}"
            )
    data, hashes = hash_folder(Path(given.root_dir)), _weights(table, given)
    for row in table.rows:
        needed = row.get("needs", "")
        if row.get("published_only"):
            continue
        if needed and not getattr(given, needed):
            left_out[row["name"]] = f"needs --{needed}, a checkpoint of {WEIGHTS[needed]}"
            continue
        values = {**row["values"], **options, "root_dir": given.root_dir}
        weights = ""
        if needed:
            values["finetune"] = getattr(given, needed)
            weights = hashes[needed]
        of_row = []
        for seed in given.seeds:
            name = f"{slug(row['name'])}-seed{seed}"
            try:
                args = resolve({**values, "seed": seed, "name": name})
            except UserError as error:
                raise UserError(f"table {table.name}, row {row['name']}: {error}") from None
            sentences = [list(vars(a).values()) for a in read_attributes(args.attributes_file)]
            prefix = Path(given.output_dir, table.name, name)
            folder = job_folder(prefix, args, [data, weights, sentences])
            of_row.append(Job(row["name"], seed, args, folder))
        if given.rows and row["name"] not in given.rows:
            of_row = [job for job in of_row if job.results]
            left_out |= {} if of_row else {row["name"]: "not in --rows"}
        jobs += of_row
    return jobs, left_out


def _weights(table: Table, given: EasyDict) -> dict[str, str]:
    """The hashes of the given files of WEIGHTS that rows need. Raises UserError that names all
    files that cannot be read."""
    hashes, problems = {}, []
    for name in dict.fromkeys(row["needs"] for row in table.rows if "needs" in row):
        try:
            if path := getattr(given, name):
                hashes[name] = file_hash(Path(path), f"--{name}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return hashes


def check_data(jobs: list[Job], all_needed: bool) -> str:
    """One line about the data sets of unfinished jobs that are missing or malformed, or "".

    Raises UserError with this line if none of these jobs has its data, or with `all_needed` if one
    of them does not.
    """
    problems: dict[str, str] = {}  # by data set; "" if there is none
    for job in jobs:
        if job.results or job.args.dataset_name in problems:
            continue
        try:
            read_stored(job.args)
            problems[job.args.dataset_name] = ""
        except UserError as error:
            problems[job.args.dataset_name] = str(error)
    # Several names of a data set, such as AGData and AGSGData, may have the same problem.
    line = "; ".join(dict.fromkeys(filter(None, problems.values())))
    if line and (all_needed or all(problems.values())):
        raise UserError(line)
    return line


def job_folder(prefix: Path, args: EasyDict, content: list[Any]) -> Path:
    """`prefix` and a hash of the options and `content`, on which the job's metrics depend.

    The hash leaves out options at their defaults, so that a job survives new options. If a default
    has changed since, the options in that folder differ, and the job gets a folder named by a hash
    of all options.
    """
    every = {k: v for k, v in args.items() if k not in (*MAY_DIFFER, *SAME_RESULTS)}
    changed = {k: v for k, v in every.items() if v != OPTIONS[k].default}
    for options in (changed, every):
        text = json.dumps([options, *content], sort_keys=True)
        folder = Path(f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
        config = folder / "options.yaml"
        if not (config.is_file() and differing_options(every, read_yaml(config), ())):
            break
    return folder


def hash_folder(root: Path) -> str:
    """A hash of a data set: the contents of its JSON files, names and sizes of all other files.

    Follows links, as the readers of data sets do; counts each folder of a circle once. Raises
    UserError.
    """
    if not root.is_dir():
        raise UserError(f"--root_dir {root}: no such folder")
    digest = hashlib.sha256()
    for parts, about in sorted(_entries(root)):
        digest.update(b"\n" + b"/".join(parts) + b"\0" + about)
        path = Path(root, *map(os.fsdecode, parts))
        if path.suffix == ".json" and about.isdigit():
            _feed(digest, path, "--root_dir")
    return digest.hexdigest()


def _entries(root: Path) -> Iterator[tuple[list[bytes], bytes]]:
    """The regular files below a folder, also behind links, as (parts of the name, size).

    A folder that comes up again (by a second link, or in a circle) is (parts, "->" and its first
    name). The same goes for links to a folder that contains `root`: jobs may write there.
    """
    top, real = os.fsencode(root), os.path.realpath(os.fsencode(root))
    seen = {real: b"."}
    waiting: list[list[bytes]] = [[]]
    for folder in waiting:
        try:
            names = sorted(os.listdir(os.path.join(top, *folder)))
        except OSError:  # unreadable for this user, so training cannot read it either
            continue
        for name in names:
            parts = [*folder, name]
            path = os.path.join(top, *parts)
            try:
                status = os.stat(path)
            except OSError:  # a broken link
                continue
            if stat.S_ISDIR(status.st_mode):
                target = os.path.realpath(path)
                if target in seen or os.path.commonpath([target, real]) == target:
                    yield parts, b"->" + seen.get(target, b"..")
                else:
                    seen[target] = b"/".join(parts)
                    waiting.append(parts)
            elif stat.S_ISREG(status.st_mode):
                yield parts, str(status.st_size).encode()


def file_hash(path: Path, option: str) -> str:
    digest = hashlib.sha256()
    _feed(digest, path, option)
    return digest.hexdigest()


def _feed(digest: Any, path: Path, option: str) -> None:
    """Add a file to a hash. Raises UserError if it cannot be read."""
    try:
        add_to_hash(digest, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} ({option})") from None


def code_version() -> dict[str, str]:
    """The version of the code that trains and evaluates.

    `sources` is a hash of its files. `commit` is for people: with -dirty if files are modified;
    without git, the start of the hash.
    """
    parts = [PROJECT / name for name in CODE]
    files = [path for part in parts for path in (part, *part.rglob("*.py")) if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(PROJECT)}\0".encode() + path.read_bytes())
    sources = digest.hexdigest()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "train.py")  # a clone, not a copy in another repository
        commit = git("rev-parse", "HEAD")
        commit += "-dirty" if git("status", "--porcelain", "--", *CODE) else ""
    except (OSError, subprocess.CalledProcessError):
        commit = f"sources {sources[:12]}"
    return {"commit": commit, "sources": sources}


def mark_other_code(jobs: list[Job], now: dict[str, str], strict: bool) -> str:
    """One line on jobs that ran with other code than `now`, or ""; `strict` has them retrained."""
    others = [job for job in jobs if any(v["sources"] != now["sources"] for v in job.code)]
    if not others:
        return ""
    commits = sorted({v["commit"] for job in others for v in job.code} - {now["commit"]})
    for job in others:
        job.retrain = strict
    then = "they are trained again" if strict else "--strict trains them again"
    versions = f"{', '.join(commits) or 'modified'}; now {now['commit']}"
    versions = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}", r"\1", versions)  # as git shortens them
    count = f"{len(others)} of {len(jobs)}"
    return f"{count} jobs ran, at least in part, with other code ({versions}): {then}"


def epochs_logged(job: Job) -> int:
    """Finished epochs in the history of a job's newest run; the last may not be saved yet."""
    runs = sorted(job.folder.glob(f"logs/*/*/{HISTORY}"), key=lambda path: path.stat().st_mtime_ns)
    return max((row["epoch"] for row in read_history(runs[-1].parent)), default=0) if runs else 0


def epochs_done(job: Job) -> int:
    """Finished epochs in a job's last checkpoint."""
    try:
        return (epoch_and_best(load_checkpoint(job.last))[0] or 0) if job.last else 0
    except UserError:
        return 0
