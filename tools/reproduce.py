"""Train and evaluate the rows of a table, each with several seeds, and print the table.

    python tools/reproduce.py --table main --root_dir path_to_dataset/TBAGPR --seeds 1 2 3
    python tools/reproduce.py --table mini --root_dir data/mini-TBAGPR --seeds 1 2

A table is a file in configs/tables/ (or any path): rows of options over a base preset, with the
published metrics. Each row and seed is a job with a folder of its own under --output_dir, whose
name has a hash of the data and of all options that change a metric. So what is done is skipped,
what was cut off goes on from its last checkpoint, and a change of either makes a new job. The code
that a job ran with is noted beside it; where that is another than the present one this is told, and
--strict trains the job again. A job that fails is reported, and the others go on. The table is
printed and written as Markdown, LaTeX and CSV.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import queue
import re
import reprlib
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import yaml
from easydict import EasyDict
from tqdm import tqdm

from datasets.registry import read_dataset
from processor.history import HISTORY, read_history
from processor.queries import CHECKPOINTS, check_metrics, read_results, stem
from processor.summary import epoch_and_best
from tools.bench import measured_step
from utils.attributes import read_attributes
from utils.checkpoint import load_checkpoint
from utils.command_line import command_line_only_arguments, parse_given
from utils.config import read_preset, read_yaml, resolve, write_config
from utils.documents import load_json, load_yaml
from utils.errors import UserError, run_main, suggest
from utils.files import append, expand, lock, open_file, read_file, write_atomically
from utils.logger import say
from utils.metrics import METRICS
from utils.options import MAY_DIFFER, OPTIONS, SAME_RESULTS
from utils.runs import differences
from utils.tables import as_csv, console, in_latex, in_markdown, latex, markdown
from utils.text import HIDDEN, visible

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "configs/tables"
CODE = ("train.py", "test.py", "datasets", "model", "processor", "solver", "utils")
TABLE_KEYS = {"title": str, "base": str, "rows": list, "options": dict}
ROW_KEYS = {
    "name": str, "base": str, "options": dict, "published": dict, "needs": str, "ablation": bool,
}  # fmt: skip
KINDS = {str: "text", list: "a list", dict: "a mapping", bool: "true or false"}
PROTOCOLS = {
    "paper": "best epoch chosen on test (the paper's protocol)",
    "clean": "best epoch chosen on held-out training identities",
    "val": "best epoch chosen on val",
    "last": "last epoch, none chosen",
}
# Options of train.py that may be given here. The first make other jobs; the rest change no metric.
# Those that say what is trained and where it lies are not among them.
OTHER_JOBS = ("num_epoch", "precision", "val_dataset")
SAME_JOBS = tuple(
    name
    for name in (*MAY_DIFFER, *SAME_RESULTS)
    if name not in ("name", "output_dir", "root_dir", "finetune", "attributes_file", "resume",
                    "resume_ckpt_file")
)  # fmt: skip

MOST_ROWS = 500
# What this tool sets itself, so that a table would do it in vain.
NOT_IN_TABLES = ("name", "output_dir", "root_dir", "seed", "resume", "resume_ckpt_file")


@dataclass
class Job:
    """One row with one seed."""

    row: str
    seed: int
    args: EasyDict
    folder: Path
    error: str = ""
    again: bool = False  # what the folder holds does not count
    found: dict[str, Any] | None = None  # its results, if this process has made them

    @property
    def results(self) -> dict[str, Any] | None:
        """What a finished job left, or None. Raises UserError if it is corrupted."""
        path = self.folder / "done.json"
        if self.found:
            return self.found
        if self.again or not path.is_file():
            return None
        found = _read(path, dict)
        for protocol in (name for name in PROTOCOLS if name in found):
            try:
                overlap = (found[protocol].get("protocol") or {}).get("overlap") or {}
                numbers = [overlap.get(name, 0) for name in ("images", "people")]
                numbers += [found[protocol][name] for name in METRICS]
            except (AttributeError, KeyError):
                raise _corrupted(path) from None
            if not all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers):
                raise _corrupted(path)
        if set(CHECKPOINTS.get(self.args.val_dataset, ())) - set(found):
            raise _corrupted(path)
        return found

    @property
    def code(self) -> list[dict[str, str]]:
        """The versions of the code that worked on it, as `code_version` gives them."""
        path = self.folder / "code.json"
        found = _read(path, list) if path.is_file() else []
        for version in found:
            if not isinstance(version, dict) or not all(
                isinstance(version.get(key), str) for key in ("commit", "sources")
            ):
                raise _corrupted(path)
        return found

    @property
    def last(self) -> Path | None:
        """The checkpoint to go on from, if there is one."""
        if self.again:
            return None
        found = sorted(self.folder.glob("logs/*/*/last.pth"), key=lambda p: p.stat().st_mtime_ns)
        return found[-1] if found else None


def _read(path: Path, kind: type) -> Any:
    """What this tool has noted of a job, a `kind`. Raises UserError."""
    try:
        found = load_json(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise _corrupted(path)
    return found


def _corrupted(path: Path) -> UserError:
    return UserError(f"{path}: corrupted; delete it, and the job goes on from its last checkpoint")


@dataclass
class Table:
    """A table file, read and checked."""

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)


def read_table(name: str) -> Table:
    """`configs/tables/NAME.yaml`, or a path. Raises UserError naming what is wrong in it."""
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    known = sorted(p.stem for p in TABLES.glob("*.yaml"))
    if not path.is_file():
        raise UserError(
            f"--table {name}: no such table.{suggest(name, known)} Known: {', '.join(known)}"
        )
    try:
        content = load_yaml(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not {"title", "base", "rows"} <= set(content):
        raise UserError(f"{path}: expected the keys title, base, rows and perhaps options")
    _check_fields(content, TABLE_KEYS, str(path))
    if not 0 < len(content["rows"]) <= MOST_ROWS:
        raise UserError(f"{path}: it has {len(content['rows'])} rows; a table has 1 to {MOST_ROWS}")
    rows = []
    slugs: dict[str, str] = {}
    for number, row in enumerate(content["rows"], 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or "name" not in row:
            raise UserError(f"{where}: a row needs a name, and may have {', '.join(ROW_KEYS)}")
        row = {**row, "name": str(row["name"])} if type(row["name"]) in (int, float) else row
        _check_fields(row, ROW_KEYS, where)
        name = row["name"]
        where = f"{path}, row {name}"
        if not name.strip() or len(name) > 100 or HIDDEN.search(name):
            raise UserError(f"{where}: its name must be a line of 1 to 100 characters")
        if name_of := slugs.get(slug(name)):  # jobs of both would have one folder, or be one row
            alike = " already" if name_of == name else ", but for case and signs"
            raise UserError(f"{where}: row {name_of} has this name{alike}")
        slugs[slug(name)] = name
        if row.get("needs", "finetune") != "finetune":
            raise UserError(f"{where}: needs is '{row['needs']}'; it can only be finetune")
        for metric, value in row.get("published", {}).items():
            if metric not in METRICS or type(value) not in (int, float) or not 0 <= value <= 100:
                raise UserError(
                    f"{where}: published {metric}: {reprlib.repr(value)}; expected "
                    f"{', '.join(METRICS)} in percent"
                )
        base = row["base"] if "base" in row else content["base"]
        if HIDDEN.search(base):
            raise UserError(f"{where}: base: {base!r:.60} is no name of a file")
        values = read_preset(path.parent / expand(base))
        for key, value in {**content.get("options", {}), **row.get("options", {})}.items():
            if key not in OPTIONS:
                raise UserError(f"{where}: unknown option '{key}'")
            if key in NOT_IN_TABLES:
                raise UserError(f"{where}: {key} is no option of a row: this tool sets it")
            values[key] = OPTIONS[key].coerce(value, where)
        rows.append({**row, "values": values})
    return Table(path.stem, content["title"], rows)


def _check_fields(found: dict[Any, Any], known: Mapping[str, type], where: str) -> None:
    """Raise UserError unless all keys are known and their values of the right type."""
    for key, value in found.items():
        if key not in known:
            raise UserError(f"{where}: '{key}': unknown.{suggest(str(key), known)}")
        if not isinstance(value, known[key]):
            kind = KINDS[known[key]]
            raise UserError(f"{where}: {key} must be {kind}, got {reprlib.repr(value)}")


def slug(name: str) -> str:
    """A row's name as a part of a folder's."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain or hashlib.sha256(name.encode()).hexdigest()[:8]  # of letters of another script


def make_jobs(
    table: Table, given: EasyDict, options: dict[str, Any]
) -> tuple[list[Job], dict[str, str]]:
    """All jobs of a table, and the rows that cannot run with the reason. `options`: of all rows.
    Raises UserError for a row whose options contradict each other."""
    jobs, left_out = [], {}
    data = fingerprint(Path(given.root_dir))
    for row in table.rows:
        if row.get("needs") == "finetune" and not given.mllm4text:
            left_out[row["name"]] = "needs --mllm4text, a checkpoint of MLLM4Text-ReID"
            continue
        values = {**row["values"], **options, "root_dir": given.root_dir}
        weights = ""
        if row.get("needs") == "finetune":
            values["finetune"], weights = given.mllm4text, file_hash(Path(given.mllm4text))
        for seed in given.seeds:
            name = f"{slug(row['name'])}-seed{seed}"
            try:
                args = resolve({**values, "seed": seed, "name": name})
            except UserError as error:
                raise UserError(f"table {table.name}, row {row['name']}: {error}") from None
            sentences = [list(vars(a).values()) for a in read_attributes(args.attributes_file)]
            place = Path(given.output_dir, table.name, name)
            folder = job_folder(place, args, [data, weights, sentences])
            jobs.append(Job(row["name"], seed, args, folder))
    return jobs, left_out


def job_folder(place: Path, args: EasyDict, content: list[Any]) -> Path:
    """`place` and a hash of the options and of the rest that a job's metrics depend on.

    Options at their defaults do not count, so that a job survives new ones. Where a default has
    changed since, the folder's options are others, and the job gets a folder by all of them.
    """
    every = {k: v for k, v in args.items() if k not in (*MAY_DIFFER, *SAME_RESULTS)}
    told = {k: v for k, v in every.items() if v != OPTIONS[k].default}
    for options in (told, every):
        text = json.dumps([options, *content], sort_keys=True)
        folder = Path(f"{place}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
        config = folder / "options.yaml"
        if not (config.is_file() and differences(every, read_yaml(config), ())):
            break
    return folder


def fingerprint(root: Path) -> str:
    """A hash of a data set: the contents of its JSON files, names and sizes of all others. Links
    are followed, as its readers follow them; of a circle each folder counts once."""
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
    """The files below a folder as (parts of the name, size), those behind links too; of what is no
    regular file nothing. A folder that is met again (by a second link, or in a circle) comes as
    (parts, "->" and the name that it was first met by); so do links to what holds `root` itself,
    where jobs may be at work."""
    top, real = os.fsencode(root), os.path.realpath(os.fsencode(root))
    seen = {real: b"."}
    waiting: list[list[bytes]] = [[]]
    for place in waiting:
        try:
            names = sorted(os.listdir(os.path.join(top, *place)))
        except OSError:  # not for this user, who cannot train on it either
            continue
        for name in names:
            parts = [*place, name]
            path = os.path.join(top, *parts)
            try:
                found = os.stat(path)
            except OSError:  # a link to nothing
                continue
            if stat.S_ISDIR(found.st_mode):
                target = os.path.realpath(path)
                if target in seen or os.path.commonpath([target, real]) == target:
                    yield parts, b"->" + seen.get(target, b"..")
                else:
                    seen[target] = b"/".join(parts)
                    waiting.append(parts)
            elif stat.S_ISREG(found.st_mode):
                yield parts, str(found.st_size).encode()


def code_version() -> dict[str, str]:
    """The code that takes part in training and evaluation: a hash of its `sources`, and for people
    its `commit`, with -dirty if it is modified; without git that is a part of the hash."""
    files = [p for name in CODE for p in (ROOT / name, *(ROOT / name).rglob("*.py")) if p.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    sources = digest.hexdigest()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "train.py")  # a clone, not a copy in another repository
        commit = git("rev-parse", "HEAD")
        commit += "-dirty" if git("status", "--porcelain", "--", *CODE) else ""
    except (OSError, subprocess.CalledProcessError):
        commit = f"sources {sources[:12]}"
    return {"commit": commit, "sources": sources}


def note_code(jobs: list[Job], now: dict[str, str], strict: bool) -> str:
    """One line on jobs that other code than `now` worked on, or nothing; `strict`: they are to be
    trained again."""
    others = [job for job in jobs if any(v["sources"] != now["sources"] for v in job.code)]
    if not others:
        return ""
    commits = sorted({v["commit"] for job in others for v in job.code} - {now["commit"]})
    for job in others:
        job.again = strict
    then = "they are trained again" if strict else "--strict trains them again"
    versions = f"{', '.join(commits) or 'modified'}; now {now['commit']}"
    versions = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}", r"\1", versions)  # as git shortens them
    return (
        f"{len(others)} of {len(jobs)} jobs were done or begun with other code ({versions}): {then}"
    )


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    _feed(digest, path, "--mllm4text")
    return digest.hexdigest()


def _feed(digest: Any, path: Path, option: str) -> None:
    """Add a file to a hash. Raises UserError if it cannot be read."""
    try:
        with open_file(path) as file:
            while part := file.read(2**20):  # hashlib.file_digest is not in Python 3.10
                digest.update(part)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} ({option})") from None


class Runner:
    """Runs jobs, one at a time or one per GPU.

    Args:
        bar: counts epochs over all jobs.
        code: the present `code_version`.
    """

    def __init__(self, bar: tqdm, gpus: list[str], code: dict[str, str]) -> None:
        self.bar, self.code = bar, code
        self.gpus: queue.Queue[str | None] = queue.Queue()
        slots: list[str | None] = [*gpus]
        for gpu in slots or [None]:
            self.gpus.put(gpu)
        self.children: set[subprocess.Popen[str]] = set()
        self.locks: dict[Path, int] = {}
        self.stopping = False

    def run(self, job: Job) -> None:
        """Train (or go on), evaluate every protocol's checkpoint, and note the metrics."""
        if self.stopping:
            return
        gpu = self.gpus.get()
        self.bar.set_postfix_str(f"{job.row}, seed {job.seed}")
        begun = f"goes on from epoch {epochs_done(job)}" if job.last else "starts"
        say(visible(f"{job.row}, seed {job.seed}: {begun}; {job.folder / 'console.txt'}"))
        try:
            started = time.time()
            self._open(job)
            config = job.folder / "options.yaml"
            job.args.output_dir = str(job.folder / "logs")
            write_config(config, job.args)
            more = ["--resume", "--resume_ckpt_file", str(job.last)] if job.last else []
            self._call(job, gpu, "train.py", "--config_file", str(config), *more)
            if job.last is None:
                raise UserError(f"{job.folder}: train.py left no last.pth there; run this again")
            run = job.last.parent
            metrics = {}
            for protocol, file in CHECKPOINTS[job.args.val_dataset].items():
                self._call(
                    job, gpu, "test.py", "--config_file", str(run / "configs.yaml"),
                    "--checkpoint", str(run / file), *command_line_only_arguments(job.args),
                )  # fmt: skip
                found = run / f"{stem(file)}_results.json"
                result = read_results(found, run / f"{stem(file)}_queries.npz")
                check_metrics(result, found)
                first = next(iter(result["splits"]["test"]["galleries"].values()))
                metrics[protocol] = {
                    **{name: first[name] for name in METRICS},
                    **{name: result.get(name) for name in ("epoch", "protocol", "data")},
                    "queries": str(run / f"{stem(file)}_queries.npz"),
                }
            about = {"row": job.row, "seed": job.seed, "code": job.code}
            job.found = {**about, "seconds": time.time() - started, **metrics}
            text = json.dumps(job.found, indent=2)
            write_atomically(job.folder / "done.json", lambda file: file.write(text.encode()))
            scores = ", ".join(f"{p} R@1 {found['R@1']:.2f}" for p, found in metrics.items())
            seconds = job.found["seconds"]
            say(visible(f"{job.row}, seed {job.seed}: done in {seconds:.0f} s, {scores}"))
        except (UserError, OSError) as error:  # a full disk may end this job, and no other
            job.error = str(UserError(str(error)))
            if not self.stopping:
                say(visible(f"FAILED {job.row}, seed {job.seed}: {job.error}"))
        finally:
            if job.folder in self.locks:
                os.close(self.locks.pop(job.folder))
            self.gpus.put(gpu)

    def _open(self, job: Job) -> None:
        """Make and lock the folder, and note the code; what does not count is renamed."""
        job.folder.mkdir(parents=True, exist_ok=True)
        self.locks[job.folder] = lock(job.folder, inherited=True)
        if job.again:
            names = (Path(f"{job.folder}.backup{n}") for n in itertools.count(1))
            job.folder.rename(next(name for name in names if not name.exists()))
            os.close(self.locks.pop(job.folder))
            job.again = False
            self._open(job)
        elif self.code not in job.code:
            text = json.dumps([*job.code, self.code], indent=2)
            write_atomically(job.folder / "code.json", lambda file: file.write(text.encode()))

    def _call(self, job: Job, gpu: str | None, *command: str) -> None:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        console = job.folder / "console.txt"
        line, epochs = "", epochs_done(job)
        log = append(console)
        try:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[self.locks[job.folder]],
            )  # fmt: skip
            self.children.add(child)
            for line in child.stdout or ():
                with suppress(OSError):  # a full disk costs these lines
                    log.write(line)
                    log.flush()
                if (now := epochs_logged(job)) > epochs:
                    self.bar.update(now - epochs)
                    epochs = now
            code = child.wait()
            self.children.discard(child)
        finally:
            with suppress(OSError):
                log.close()
        if code:
            raise UserError(f"{' '.join(line.split()) or f'exit status {code}'} (see {console})")

    def stop(self) -> None:
        """End the children; their last checkpoints stay."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()


def run_jobs(jobs: list[Job], gpus: list[str], code: dict[str, str]) -> None:
    """Run what is not done, with one bar over the epochs of all."""
    waiting = [job for job in jobs if job.results is None]
    say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done already")
    total = sum(job.args.num_epoch for job in waiting)
    already = sum(epochs_done(job) for job in waiting)
    bar = tqdm(total=total, initial=already, unit="epoch", dynamic_ncols=True, disable=None)
    runner = Runner(bar, gpus, code)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    with bar, ThreadPoolExecutor(max(1, len(gpus))) as pool:
        try:
            list(pool.map(runner.run, waiting))
        except KeyboardInterrupt:
            runner.stop()
            raise


def epochs_logged(job: Job) -> int:
    """Epochs that a job's newest run has ended, as its history says; the last may not be saved."""
    runs = sorted(job.folder.glob(f"logs/*/*/{HISTORY}"), key=lambda path: path.stat().st_mtime_ns)
    return max((row["epoch"] for row in read_history(runs[-1].parent)), default=0) if runs else 0


def epochs_done(job: Job) -> int:
    """Epochs in a job's last checkpoint."""
    try:
        return (epoch_and_best(load_checkpoint(job.last))[0] or 0) if job.last else 0
    except UserError:
        return 0


def tables_of(
    table: Table, jobs: list[Job], left_out: dict[str, str]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(heading, titles, rows) of each protocol: mean and standard deviation over seeds, beside the
    published metrics."""
    titles = ["method", "seeds", *METRICS, "published R@1", "difference"]
    for protocol in PROTOCOLS:
        if not any(protocol in CHECKPOINTS[job.args.val_dataset] for job in jobs):
            continue
        shown = []
        for row in table.rows:
            found = [j.results[protocol] for j in jobs if j.row == row["name"] and j.results
                     and protocol in j.results]  # fmt: skip
            cells = [spread([f[name] for f in found]) for name in METRICS]
            published = row.get("published", {}).get("R@1")
            difference = ""
            if found and published is not None:
                difference = f"{statistics.mean(f['R@1'] for f in found) - published:+.2f}"
            failed = [j for j in jobs if j.row == row["name"] and j.error and not j.results]
            name = row["name"]
            notes = ["ablation"] if row.get("ablation") else []
            if name in left_out:
                notes.append(left_out[name])
            elif failed:
                notes.append(f"{len(failed)} failed")
            name += f" ({'; '.join(notes)})" if notes else ""
            seeds = ", ".join(str(j.seed) for j in jobs if j.row == row["name"] and j.results)
            of_paper = "" if published is None else f"{published:.2f}"
            shown.append([name, seeds, *cells, of_paper, difference])
        yield heading(protocol, jobs), titles, shown


def heading(protocol: str, jobs: list[Job]) -> str:
    """What chose the epochs of a protocol, and whether that was apart from test, as measured."""
    text = PROTOCOLS[protocol]
    shares = {getattr(job.args, "heldout", 0) for job in jobs if job.args.val_dataset == "both"}
    if protocol == "paper" and any(shares):
        apart = ", ".join(f"{100 * share:g} %" for share in sorted(shares))
        text += f", trained without the {apart} of identities that are held out"
    found = [
        j.results[protocol].get("protocol") for j in jobs if j.results and protocol in j.results
    ]
    shared = [said["overlap"] for said in found if said and said.get("overlap")]
    images, people = (max((o.get(k, 0) for o in shared), default=0) for k in ("images", "people"))
    if images or people:
        text += f"; {images} of its images and {people} of its people are in test too"
    elif protocol in ("clean", "val") and found:
        apart = {"clean": " (the clean protocol: test had no part in it)",
                 "val": "; none of its images or people is in test"}[protocol]  # fmt: skip
        text += apart if all(found) else "; whether test has the same people is unknown"
    return text


def spread(values: list[float]) -> str:
    """Mean, and from two values on the standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def write_tables(table: Table, jobs: list[Job], left_out: dict[str, str], folder: Path) -> None:
    """Print the table, then write table.md, table.tex and table.csv. Raises UserError if they
    cannot be written."""
    found = list(tables_of(table, jobs, left_out))
    for about, titles, rows in found:
        say(f"{visible(table.title)}: {about}\n{console(titles, rows)}\n")
    note = "Mean ± standard deviation over seeds, percent. One gallery: the first view's images."
    texts = {
        "md": [
            f"# {in_markdown(table.title)}\n",
            *(f"{about[0].upper()}{about[1:]}:\n\n{markdown(t, r)}\n" for about, t, r in found),
            note,
        ],
        "tex": [f"% {in_latex(about)}\n{latex(t, r)}" for about, t, r in found],
        "csv": [as_csv(t, r) for _, t, r in found],
    }
    for name, lines in texts.items():
        text = "\n".join(lines).rstrip("\n") + "\n"
        write_atomically(folder / f"table.{name}", methodcaller("write", text.encode()))


def plan(jobs: list[Job], left_out: dict[str, str]) -> str:
    """What would run, with hours estimated from measured steps of each row, and their range."""
    rows = []
    per_epoch: dict[str, list[float]] = {}  # hours by the median, the least and the most of a step
    total = [0.0] * 3
    for job in tqdm(jobs, desc="measure steps", leave=False, disable=None):
        left = 0 if job.results else job.args.num_epoch - epochs_done(job)
        state = f"goes on after epoch {epochs_done(job)}" if left and job.last else "to run"
        state = "done" if job.results else "to evaluate" if not left else state
        if left and job.row not in per_epoch:
            data = read_dataset(job.args)
            steps = -(-len(data.train) // job.args.batch_size)
            found = measured_step(job.args, data.has_pairs)
            per_epoch[job.row] = [steps * seconds / 3600 for seconds in found]
        hours = [left * one for one in per_epoch[job.row]] if left else [0.0] * 3
        total = [a + b for a, b in zip(total, hours, strict=True)]
        rows.append([job.row, state, job.seed, left, ranged(hours) if left else ""])
    rows += [[name, reason, "", "", ""] for name, reason in left_out.items()]
    shown = console(["method", "state", "seed", "epochs left", "hours"], rows, left=2)
    return (
        f"{shown}\n{ranged(total)} hours of training on this machine, one job at a time, by the "
        "median step and the range of all that were measured; loading and evaluation come on top"
    )


def ranged(hours: list[float]) -> str:
    """A median with its range: "9.7 (9.1 to 10.4)"."""
    digits = ".1f" if hours[0] >= 1 else ".2g"
    median, least, most = (f"{h:{digits}}" for h in hours)
    return f"{median} ({least} to {most})"


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(sorted(p.stem for p in TABLES.glob("*.yaml")))
    add = parser.add_argument_group("Tables").add_argument
    add("--table", required=True, type=expand, help=f"{names}, or a YAML file")
    add("--root_dir", required=True, type=expand, help="folder that holds the data set")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3],
        help="one job of every row for each (default: 1 2 3)")  # fmt: skip
    add("--output_dir", default="logs/reproduce", type=expand,
        help="receives all jobs (default: logs/reproduce)")  # fmt: skip
    add(
        "--mllm4text",
        default="",
        type=expand,
        help="checkpoint of MLLM4Text-ReID, for the rows from it",
    )
    add("--gpus", nargs="+", default=[], help="spread the jobs over these GPUs, one each")
    add("--strict", action="store_true", default=False,
        help="train again what other code than the present has done")  # fmt: skip
    add("--dry_run", action="store_true", default=False,
        help="only list what would run, with estimated hours")  # fmt: skip


def main() -> None:
    options, own = parse_given(
        (*OTHER_JOBS, *SAME_JOBS),
        "Train and evaluate the rows of a table, each with several seeds, and print the table. "
        "Options of train.py that are left out are as the rows have them.",
        add_options,
        defaults=False,
    )
    given = EasyDict(own)
    given.seeds = [OPTIONS["seed"].coerce_one(seed, "--seeds") for seed in given.seeds]
    if len(set(given.seeds)) < len(given.seeds):
        shown = " ".join(map(str, given.seeds))
        raise UserError(f"--seeds {shown}: a seed twice is no second sample; give each once")
    table = read_table(given.table)
    changed = [f"{name} {options[name]}" for name in OTHER_JOBS if name in options]
    if changed:  # the title must not promise what was not run
        table.title += f" (but {', '.join(changed)})"
    jobs, left_out = make_jobs(table, given, options)
    code = code_version()
    if note := note_code(jobs, code, given.strict):
        say(visible(note))
    if given.dry_run:
        say(plan(jobs, left_out))
        return
    run_jobs(jobs, given.gpus, code)
    failed = [job for job in jobs if job.error]
    try:
        write_tables(table, jobs, left_out, Path(given.output_dir, table.name))
    finally:
        for job in failed:
            say(visible(f"FAILED {job.row}, seed {job.seed}: {job.error}"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
