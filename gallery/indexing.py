"""Indexing: compare what there is with what the gallery has, then read and encode the difference.

Rank 0 compares and writes the manifest; every process reads and encodes its share of the files and
writes parts of its own. A part is committed when it is full, or after a minute, so that a kill
loses little.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from datasets.shards import image_status, split_member
from gallery.frames import Chunk, Done, Job, digest_of
from gallery.ingest import File, Found
from gallery.records import SCHEMA, SURE, Guesses, column_of, id_of, schema_with
from gallery.store import FILES, ROWS, Part, Store, below, is_unicode, write_part
from utils.errors import UserError
from utils.interrupt import StopRequest

if TYPE_CHECKING:
    from utils.distributed import Processes

LINE_SECONDS = 15.0  # between lines about the progress
SECONDS = 60.0  # after which a part is committed that is not full
THREADS = 16  # that ask the file system for sizes and times
BOXES = " boxes "  # in the request of a file whose people are known by boxes
FILE_COLUMNS = ("size", "mtime_ns", "digest", "request", "facts")

Result = tuple[Chunk, np.ndarray, Guesses]  # with the features [n, D] float16 of its people


@dataclass
class Plan:
    """What a run has to do.

    Attributes:
        jobs: files to read and encode.
        replaced: paths whose old rows leave the gallery as soon as their new ones come.
        gone: paths whose rows leave it at once.
        known: files whose features stay, but of whose people or file something else has changed;
            with the file's digest.
        unchanged: number of files with nothing to do.
    """

    jobs: list[Job] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    known: list[Done] = field(default_factory=list)
    unchanged: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What a process has done since its last report; picklable.

    Attributes:
        part: that it has written, or None.
        touched: paths of the files in the part, and of those without anybody.
    """

    part: Part | None
    touched: set[str]
    broken: list[tuple[str, str]]
    finished: bool
    stopped: str
    people: int


def stored_path(path: str, root: str) -> str:
    """How the gallery keeps a path: relative to its root if it is below."""
    return os.path.relpath(path, root) if path.startswith(f"{root.rstrip('/')}/") else path


def make_plan(found: Found, store: Store, how: Mapping[bool, str]) -> Plan:
    """Compare files with the gallery.

    Args:
        how: what is asked of pictures (False) and of videos (True), such as the detector.
    """
    root, plan = store.manifest["root"], Plan(broken=list(found.broken))
    jobs = []
    with ThreadPoolExecutor(THREADS) as threads:
        for file, status in zip(
            found.files.values(), threads.map(_status, found.files.values()), strict=True
        ):
            path = stored_path(file.file, root)
            if isinstance(status, str):
                plan.broken.append((path, status))
            else:
                jobs.append(_job(file, path, *status, how[file.is_video]))
        known = _known_files(store, _stored_roots(found.roots, root))
        listed = {job.path for job in jobs}
        absent = [path for path in known if path not in listed]
        places = [os.path.join(root, path) for path in absent]
        column = pa.chunked_array([pa.array(absent, pa.string())])
        boxed = below(column, _stored_roots(found.boxed, root))
        for path, gone, in_boxed in zip(absent, threads.map(_is_gone, places), boxed, strict=True):
            request = known[path][FILE_COLUMNS.index("request")] if known[path] else ""
            if gone or (in_boxed and BOXES in request):
                plan.gone.add(path)
        digests = threads.map(lambda job: _digest_if_needed(job, known.get(job.path)), jobs)
        for job, digest in zip(jobs, digests, strict=True):
            _compare(plan, job, known.get(job.path), digest)
    return plan


def apply_plan(plan: Plan, store: Store) -> dict[str, set[str]]:
    """Commit what needs no encoding: drop what is gone, change what is known of files. Returns, for
    each part, the paths in it that will be replaced."""
    gone = pa.array(sorted(plan.gone), pa.string())
    changed = {done.job.path: done for done in plan.known}
    every = pa.array(sorted({*plan.gone, *changed, *plan.replaced}), pa.string())
    replaced: dict[str, set[str]] = {}
    parts: list[Part | None] = []
    for part in store.parts if len(every) else ():
        tables = [store.read(part, kind, ["path"])["path"] for kind in ("items", "files")]
        here = [column.filter(pc.is_in(column, value_set=every)) for column in tables]
        paths = {path for column in here for path in column.to_pylist()}
        if paths & plan.replaced:
            replaced[part["name"]] = paths & plan.replaced
        if not paths & (plan.gone | set(changed)):
            parts.append(part)
            continue
        items, files = store.read(part, "items"), store.read(part, "files")
        items, files = _with_facts(items, files, changed)
        keep = ~pc.is_in(items["path"], value_set=gone).to_numpy(zero_copy_only=False)
        files = files.filter(pc.invert(pc.is_in(files["path"], value_set=gone)))
        new = store.rewritten(part, keep, items, files)
        parts.append(new)
        if part["name"] in replaced and new is not None:
            replaced[new["name"]] = replaced.pop(part["name"])
    if len(every):
        store.commit([part for part in parts if part is not None])
    return replaced


class ProgressLines:
    """In place of a bar where there is no terminal: a line in the log, now and then.

    Args:
        total: files to encode.
    """

    def __init__(self, total: int, log: logging.Logger, seconds: float = LINE_SECONDS) -> None:
        self.total, self.log, self.seconds = total, log, seconds
        self.done, self.told = 0, time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told >= self.seconds:
            self.told = time.monotonic()
            self.log.info(f"{self.done} of {self.total} files encoded")


class Alone:
    """The only process: `utils.distributed.Processes` for encoders without torch."""

    rank, size, is_rank_0 = 0, 1, True

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def from_rank_0(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def encode_parts(
    results: Iterable[Result],
    store: Store,
    replaced: dict[str, set[str]],
    processes: Processes | Alone,
    bar: tqdm | ProgressLines,
    seconds: float = SECONDS,
) -> list[Report]:
    """Take encoded chunks, and commit parts as they become ready. All processes call it. Returns
    the reports of all processes; one with `stopped` ends it early.

    Args:
        results: encoded while they are taken.
        store: of rank 0 only is written.
        replaced: from `apply_plan`, on rank 0.
    """
    reports: list[Report] = []
    with StopRequest() as stop:
        for report in _filled(results, store, stop, bar, seconds):
            together = processes.all_gather_objects(report)
            if processes.is_rank_0:
                _commit(store, together, replaced)
            reports += together
            if all(r.finished for r in together) or any(r.stopped for r in together):
                break
    return reports


@dataclass
class _Waiting:
    """People that are encoded and not yet in a part."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    files: list[Done] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def add(self, chunk: Chunk, features: np.ndarray) -> None:
        self.rows += chunk.rows
        self.features.append(features)
        self.files += chunk.done
        self.broken += chunk.broken

    def write(self, store: Store, width: int, finished: bool, stopped: str) -> Report:
        """Write them as a part, and report it. Raises UserError if the disk is full."""
        part = None
        if self.rows or self.files:
            items = pa.Table.from_pylist(self.rows, schema=schema_with(store.attributes()))
            features = np.concatenate([np.zeros((0, width), np.float16), *self.features])
            part = write_part(store.folder, items, features, files_table(self.files))
        touched = {row["path"] for row in self.rows} | {path for path, _ in self.broken}
        touched |= {done.job.path for done in self.files}
        return Report(part, touched, self.broken, finished, stopped, len(self.rows))


def _filled(
    results: Iterable[Result],
    store: Store,
    stop: StopRequest,
    bar: tqdm | ProgressLines,
    seconds: float,
) -> Iterator[Report]:
    """Write parts one after the other, each in a thread while the next one is encoded; after the
    last, reports without one, as other processes may have more to do."""
    columns = {name: column_of(name) for name in store.attributes()}
    width = store.manifest["encoder"]["embed_dim"]
    waiting, began = _Waiting(), time.monotonic()
    writing: Future[Report] | None = None
    with ThreadPoolExecutor(1) as thread:
        for chunk, feature_BD, guesses in results:
            full = bool(waiting.rows) and len(waiting.rows) + len(chunk.rows) > ROWS
            late = time.monotonic() - began > seconds
            if writing is not None and (writing.done() or full or late):
                yield writing.result()
                writing = None
            if full or late:
                writing = thread.submit(waiting.write, store, width, False, "")
                waiting, began = _Waiting(), time.monotonic()
            _add_attributes(chunk, guesses, columns)
            waiting.add(chunk, feature_BD)
            bar.update(len(chunk.done))
            if stop.name:
                break
        if writing is not None:
            yield writing.result()
        yield waiting.write(store, width, True, stop.name)
    while True:
        yield _Waiting().write(store, width, True, stop.name)


def _add_attributes(chunk: Chunk, guesses: Guesses, columns: Mapping[str, str]) -> None:
    """Give the rows of a chunk their attributes: what the encoder guesses, or the label."""
    for name, (classes, scores) in guesses.items():
        column, score_column = columns[name], f"{columns[name]}_score"
        for row, label, score in zip(chunk.rows, classes, scores, strict=True):
            row[column], row[score_column] = label, score
    for row in chunk.rows:
        for name, label in row.pop("labels").items():
            row[columns[name]], row[f"{columns[name]}_score"] = label, SURE


def _commit(store: Store, reports: Sequence[Report], replaced: dict[str, set[str]]) -> None:
    """Add the new parts; rows that they replace leave the old ones."""
    touched = set().union(*(report.touched for report in reports))
    parts: list[Part | None] = []
    for part in store.parts:
        paths = replaced.get(part["name"], set()) & touched
        if not paths:
            parts.append(part)
            continue
        value_set = pa.array(sorted(paths), pa.string())
        items, files = store.read(part, "items"), store.read(part, "files")
        keep = ~pc.is_in(items["path"], value_set=value_set).to_numpy(zero_copy_only=False)
        files = files.filter(pc.invert(pc.is_in(files["path"], value_set=value_set)))
        new = store.rewritten(part, keep, items, files)
        rest = replaced.pop(part["name"]) - paths
        if new is not None and rest:
            replaced[new["name"]] = rest
        parts.append(new)
    new_parts = [report.part for report in reports if report.part is not None]
    if new_parts or len(parts) != len(store.parts) or touched:
        store.commit([part for part in parts if part is not None] + new_parts)


def files_table(files: Iterable[Done]) -> pa.Table:
    """The table of files that were read to their end."""
    rows = [
        (f.job.path, f.job.size, f.job.mtime_ns, f.digest, f.job.request, f.job.facts)
        for f in files
    ]
    columns = zip(*rows, strict=True) if rows else [[] for _ in FILES]
    arrays = [pa.array(c, kind.type) for c, kind in zip(columns, FILES, strict=True)]
    return pa.table(arrays, schema=FILES)


def _job(file: File, path: str, size: int, mtime_ns: int, how: str) -> Job:
    """The job of a file. Its request names what its features depend on, beside its content."""
    boxes = [person.box for person in file.people]
    request = f"{'video' if file.is_video else 'picture'} {how}".strip()
    if any(box is not None for box in boxes):
        request += f"{BOXES}{_short_hash(boxes)}"
    facts = _short_hash([person._replace(box=None) for person in file.people])
    return Job(path, file.file, file.people, file.is_video, size, mtime_ns, request, facts)


def _compare(plan: Plan, job: Job, known: tuple[Any, ...] | None, digest: str) -> None:
    """Put a file into the plan.

    Args:
        known: FILE_COLUMNS of the file in the gallery; () if not all of it was read.
        digest: of the file now, or "" if it need not be read.
    """
    if not known:
        plan.jobs.append(job)
        if known is not None:
            plan.replaced.add(job.path)
        return
    size, mtime_ns, old_digest, request, facts = known
    same_file = (size, mtime_ns) == (job.size, job.mtime_ns) or digest == old_digest
    if not same_file or request != job.request:
        plan.jobs.append(job)
        plan.replaced.add(job.path)
    elif mtime_ns != job.mtime_ns or facts != job.facts:
        plan.known.append(Done(job, old_digest))
    else:
        plan.unchanged += 1


def _digest_if_needed(job: Job, known: tuple[Any, ...] | None) -> str:
    """The digest of a file of the same size with another time; "" for others."""
    if not known or known[0] != job.size or known[1] == job.mtime_ns:
        return ""
    try:
        return digest_of(job.file, job.is_video)
    except (OSError, UserError):
        return ""  # reading it reports why


def _known_files(store: Store, roots: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """By path, FILE_COLUMNS of the gallery's files below the roots; () for a file that has people
    in the gallery, but was not read to its end."""
    known: dict[str, tuple[Any, ...]] = {}
    ended: dict[str, tuple[Any, ...]] = {}
    for part in store.parts:
        paths = store.read(part, "items", ["path"])["path"]
        some = paths.filter(pa.array(below(paths, roots))).unique().to_pylist()
        known |= dict.fromkeys(some, ())
        files = store.read(part, "files")
        files = files.filter(pa.array(below(files["path"], roots)))
        columns = [files[name].to_pylist() for name in FILE_COLUMNS]
        ended |= dict(zip(files["path"].to_pylist(), zip(*columns, strict=True), strict=True))
    return known | ended


def _with_facts(
    items: pa.Table, files: pa.Table, changed: dict[str, Done]
) -> tuple[pa.Table, pa.Table]:
    """The tables of a part with what is known now of files whose features stay."""
    rows = []
    for row in items.to_pylist():
        if done := changed.get(row["path"]):
            job = done.job
            row |= {"size": job.size, "mtime_ns": job.mtime_ns}
            people = {id_of(job.path, None, person.box): person for person in job.people}
            person = people.get(row["id"], job.people[0])
            labels = {column_of(name): label for name, label in person.labels}
            row |= {
                name: getattr(person, name) for name in ("view", "camera", "source", "identity")
            }
            for name in items.column_names[len(SCHEMA) :: 2]:
                if name in labels:
                    row |= {name: labels[name], f"{name}_score": SURE}
                elif row[f"{name}_score"] == SURE:  # no longer a label; a guess needs the encoder
                    row |= {name: None, f"{name}_score": None}
        rows.append(row)
    ended = [
        Done(changed[path].job, changed[path].digest) for path in files["path"].to_pylist()
        if path in changed
    ]  # fmt: skip
    others = files.filter(
        pc.invert(pc.is_in(files["path"], value_set=pa.array(sorted(changed), pa.string())))
    )
    new_items = pa.Table.from_pylist(rows, schema=items.schema)
    return new_items, pa.concat_tables([others, files_table(ended)])


def _status(file: File) -> tuple[int, int] | str:
    """Size and time of a file, or why it cannot be read."""
    if not is_unicode(file.file):
        return "its name is not Unicode"
    try:
        status = os.stat(file.file) if file.is_video else image_status(file.file)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    size = status.st_size if isinstance(status, os.stat_result) else status.size
    return size, status.st_mtime_ns if isinstance(status, os.stat_result) else status.mtime_ns


def _is_gone(path: str) -> bool:
    """Whether a file is gone. One in a folder that cannot be listed, or on a disk with errors, is
    not."""
    member = split_member(path)
    try:
        os.lstat(path if member is None else member.tar)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def _stored_roots(roots: Sequence[str], root: str) -> list[str]:
    """Where in the gallery is what was found in these folders and files."""
    # What lies below the gallery's root has relative paths.
    above = any(f"{root}/".startswith(f"{each.rstrip('/')}/") for each in roots)
    return [stored_path(each, root) for each in roots] + [""] * above


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
