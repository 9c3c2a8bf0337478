"""What a run of `index` has to do: the files that there are, compared with what the gallery has."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datasets.shards import image_status, split_member
from gallery.frames import Done, Job, digest_of
from gallery.ingest import File, Found
from gallery.parts import Part, files_table
from gallery.paths import below, is_unicode, stored_path
from gallery.records import SCHEMA, SURE, column_of, id_of
from gallery.store import Store
from utils.errors import UserError

THREADS = 16  # that ask the file system for sizes and times
BOXES = " boxes "  # in the request of a file whose people are known by boxes
FILE_COLUMNS = ("size", "mtime_ns", "digest", "request", "facts")


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
        away: people who stay, by the folder that has no files now.
        moved: (new path, old path) of new files with the content of files that are gone, but are
            not below what was given; the people of both are in the gallery.
    """

    jobs: list[Job] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    known: list[Done] = field(default_factory=list)
    unchanged: int = 0
    away: Counter[str] = field(default_factory=Counter)
    moved: list[tuple[str, str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)


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
        roots = _stored_roots(found.roots, root)
        known = _known_files(store, roots)
        listed = {job.path for job in jobs}
        named = {stored_path(file, root) for file in found.files}
        absent = [path for path in known if path not in listed]
        places = [os.path.join(root, path) for path in absent]
        column = pa.chunked_array([pa.array(absent, pa.string())])
        boxed = below(column, _stored_roots(found.boxed, root))
        there = [job.file for job in jobs]
        missing: dict[str, str] = {}  # by path, the place
        for path, gone, in_boxed in zip(absent, threads.map(_is_gone, places), boxed, strict=True):
            request = known[path][FILE_COLUMNS.index("request")] if known[path] else ""
            if in_boxed and BOXES in request and path not in named:
                plan.gone.add(path)
            elif gone:
                missing[path] = os.path.join(root, path)
            if not gone:
                there.append(os.path.join(root, path))
        away = _away(missing, there, found.roots)
        new = [job for job in jobs if job.path not in known]
        for job, path in _moved(store, new, roots, set(away), threads):
            if path in away:
                del away[path]
            else:
                plan.moved.append((job.file, os.path.join(root, path)))
        plan.gone |= set(missing) - set(away)
        for part in store.parts if away else ():
            paths = store.read(part, "items", ["path"])["path"].to_pylist()
            plan.away.update(away[path] for path in paths if path in away)
        digests = threads.map(lambda job: _digest_if_needed(job, known.get(job.path)), jobs)
        for job, digest in zip(jobs, digests, strict=True):
            _compare(plan, job, known.get(job.path), digest)
    return plan


def apply_plan(plan: Plan, store: Store) -> dict[str, set[str]]:
    """Commit what needs no encoding: drop what is gone, change what is known of files. Returns, for
    each part, the paths in it that will be replaced."""
    changed = {done.job.path: done for done in plan.known}
    every = pa.array(sorted({*plan.gone, *changed, *plan.replaced}), pa.string())
    replaced: dict[str, set[str]] = {}
    parts: list[Part | None] = []
    for part in store.parts if len(every) else ():
        columns = [store.read(part, kind, ["path"])["path"] for kind in ("items", "files")]
        here = [column.filter(pc.is_in(column, value_set=every)) for column in columns]
        paths = {path for column in here for path in column.to_pylist()}
        if paths & plan.replaced:
            replaced[part["name"]] = paths & plan.replaced
        if not paths & (plan.gone | set(changed)):
            parts.append(part)
            continue
        tables = _with_facts(store.read(part, "items"), store.read(part, "files"), changed)
        new = store.without(part, plan.gone, *tables)
        parts.append(new)
        if part["name"] in replaced and new is not None:
            replaced[new["name"]] = replaced.pop(part["name"])
    if len(every):
        store.commit(parts)
    return replaced


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
    return _digest(job)


def _digest(job: Job) -> str:
    """The digest of a file; "" if it cannot be read."""
    try:
        return digest_of(job.file, job.is_video)
    except (OSError, UserError):
        return ""  # reading it reports why


def _away(missing: Mapping[str, str], there: Iterable[str], roots: Sequence[str]) -> dict[str, str]:
    """For each missing file (path: place) in a folder that has no files now, also not below it,
    that folder: the uppermost such one, but none above the roots. Its disk may be away."""
    alive = {"/"}
    for file in there:
        folder = _folder(file)
        while folder not in alive:
            alive.add(folder)
            folder = os.path.dirname(folder)
    away = {}
    for path, place in missing.items():
        folder = _folder(place)
        if folder not in alive:
            while folder not in roots and (above := os.path.dirname(folder)) not in alive:
                folder = above
            away[path] = folder
    return away


def _folder(path: str) -> str:
    """The folder of a file, or of the tar that it is in."""
    member = split_member(path)
    return os.path.dirname(path if member is None else member.tar)


def _moved(
    store: Store,
    new: Sequence[Job],
    roots: Sequence[str],
    away: set[str],
    threads: ThreadPoolExecutor,
) -> list[tuple[Job, str]]:
    """New files with the content of files that are gone, with the paths of these: of those in
    `away`, and of those that are not below the roots. Only files of equal size are read."""
    sizes = pa.array(sorted({job.size for job in new}), pa.int64())
    old: list[tuple[str, int, str]] = []  # path, size, digest
    for part in store.parts if new else ():
        files = store.read(part, "files")
        files = files.filter(pc.is_in(files["size"], value_set=sizes))
        inside = below(files["path"], roots)
        columns = (files[name].to_pylist() for name in ("path", "size", "digest"))
        for row, is_inside in zip(zip(*columns, strict=True), inside, strict=True):
            if row[0] in away or not is_inside:
                old.append(row)
    places = (os.path.join(store.manifest["root"], path) for path, _, _ in old)
    old = [row for row, gone in zip(old, threads.map(_is_gone, places), strict=True) if gone]
    paths = defaultdict(list)
    for path, _, digest in old:
        paths[digest].append(path)
    old_sizes = {size for _, size, _ in old}
    read = [job for job in new if job.size in old_sizes]
    return [
        (job, path)
        for job, digest in zip(read, threads.map(_digest, read), strict=True)
        for path in paths.pop(digest, ())
    ]


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
    ended = [changed[path] for path in files["path"].to_pylist() if path in changed]
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
