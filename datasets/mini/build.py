"""Rendering a complete data set into a folder, in the layout of TBAGPR or another data set."""

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from datasets.pedes import PEDES
from utils.attributes import read_attributes
from utils.documents import load_json
from utils.errors import UserError
from utils.files import read_file

from .captions import caption
from .layouts import FIRST_ID, LAYOUTS, SPLITS, WITHOUT_VAL, Record, class_names, json_files
from .people import Person, sample_person
from .view import SOURCES, View, paint, sample_view

VERSION = 1  # increase it when the same parameters give other files
MARKER = "mini.json"  # holds the parameters; it is written last, so it marks a complete set
JSON_NAME = {"AG-ReID": "agtext_{}.json", "G2APS-AG": "g2aps_{}.json"}
QUALITY = (85, 92)  # of a JPEG, lowest and highest
VALS = ("disjoint", "like_real")

Job = TypeVar("Job")
Result = TypeVar("Result")


class Pair(NamedTuple):
    """An aerial and a ground image of one person. Paths are relative to the rendered folder."""

    identity: int
    aerial: str
    ground: str
    captions: list[str]  # three
    attributes: dict[str, str]  # of the aerial image, such as {"gender": "male", ...}
    pair_attributes: dict[str, str]  # of the ground image


def render(
    root: str | Path,
    seed: int = 0,
    train_ids: int = 2400,
    val_ids: int = 60,
    test_ids: int = 60,
    pairs: int = 2,
    layout: str = "TBAGPR",
    val: str = "disjoint",
    workers: int = 2,
    force: bool = False,
    progress: bool = False,
) -> bool:
    """Render mini-TBAGPR into `root`.

    `train_ids`, `val_ids` and `test_ids` are numbers of identities in both sources together. Each
    identity has `pairs` pairs of an aerial and a ground image. Layouts of ground-only benchmarks
    have no aerial images; AERI-PEDES and TAG-PEDES have no val, and `val_ids` does nothing.
    `val="like_real"` copies TBAGPR's file names and the overlap of its splits: G2APS-AG's val is
    its test; AG-ReID's val shows the people of its test in other images, and one of them is in
    training too.

    The files depend only on these parameters, not on `workers`. `root` appears when the set is
    complete. Returns False, and changes nothing, if `root` is already a complete set of the same
    parameters. Raises FileExistsError if anything else is there, unless `force`, which replaces a
    folder, but not a link or a file. Raises UserError if the set cannot be written, and leaves
    nothing behind.
    """
    root = Path(root)
    parameters = {
        "version": VERSION,
        "seed": seed,
        "train_ids": train_ids,
        "val_ids": val_ids,
        "test_ids": test_ids,
        "pairs": pairs,
        "layout": layout,
    }
    if layout in WITHOUT_VAL:
        del parameters["val_ids"]
    for name, value, known in (("layout", layout, LAYOUTS), ("val", val, VALS)):
        if value not in known:
            raise ValueError(f"{name} {value} is none of {', '.join(known)}")
    if val != "disjoint":
        parameters["val"] = val
        if layout != "TBAGPR":
            raise ValueError(f"val {val}: only for the layout TBAGPR")
        if val_ids != test_ids:
            raise ValueError(
                f"val {val}: its people are those of test; val_ids must equal test_ids"
            )
    if pairs < 1 or min(train_ids, val_ids, test_ids) < 1:
        raise ValueError("pairs and every number of identities must be at least 1")
    return fill_folder(
        root, parameters, force, partial(_render_all, workers=workers, progress=progress)
    )


def fill_folder(
    root: Path,
    parameters: dict[str, Any],
    force: bool,
    fill: Callable[[Path, dict[str, Any]], object],
) -> bool:
    """Let `fill(folder, parameters)` write a rendered set, and rename the folder to `root` when it
    is complete. Returns and raises what `render` does."""
    present = root.exists() or root.is_symlink()
    if present and (root.is_symlink() or not root.is_dir()) and force:
        raise FileExistsError(f"{root} is a link or no folder; remove it, or choose another folder")
    if present and not force:
        if _is_complete(root, parameters):
            return False
        raise FileExistsError(
            f"{root} exists and is not a complete set of these parameters; "
            "remove it, choose another folder, or replace it with --force"
        )
    unfinished, replaced = (root.with_name(root.name + end) for end in (".unfinished", ".replaced"))
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        fill(unfinished, parameters)
        write_json(unfinished / MARKER, parameters)
        if present:  # renamed first, because a half deleted set could look complete
            shutil.rmtree(replaced, ignore_errors=True)
            root.rename(replaced)
        unfinished.rename(root)
    except OSError as error:
        raise UserError(
            f"{root}: could not be rendered: {error.filename or unfinished}: "
            f"{error.strerror or error}; free disk space, or choose another folder"
        ) from None
    except BrokenProcessPool:
        raise UserError(
            f"{root}: could not be rendered: a process was killed, probably for its memory; give "
            "fewer --workers"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return True


def render_people(
    folder: str | Path, identities: int = 8, pairs: int = 2, seed: int = 0
) -> list[Pair]:
    """Render images of a few people into a folder, for the test of a reader.

    The test then writes the returned pairs in the format of its reader. Identities are 0, 1, ...
    """
    root, rendered = Path(folder), []
    attributes = read_attributes("configs/attributes.yaml")
    for pid, (source, identity, person) in enumerate(sample_people(seed, 0, identities)):
        job = (0, source, identity, pid, person)
        for record in _render_identity(job, root, seed, pairs, "custom", real=False):
            aerial, ground = record["files"]
            classes = class_names(attributes, record["labels"])
            rendered.append(Pair(pid, aerial, ground, record["captions"], *classes))
    return rendered


def sample_people(seed: int, split: int, count: int) -> list[tuple[int, int, Person]]:
    """The identities of a split as (source, number in the source, person). No two look the same.

    If `count` is odd, the first source has one more.
    """
    people, looks = [], set()
    for source, size in enumerate(((count + 1) // 2, count // 2)):
        for identity in range(size):
            attempt = 0
            while True:
                rng = np.random.default_rng([seed, split, source, identity, attempt, 0])
                person = sample_person(rng)
                if person.look not in looks:
                    break
                attempt += 1
            looks.add(person.look)
            people.append((source, identity, person))
    return people


def sample_pair(
    seed: int, split: int, source: int, identity: int, k: int, person: Person
) -> tuple[tuple[View, View], list[str], int]:
    """Views (aerial, ground), three captions and the JPEG quality of pair k of an identity.

    Training uses one of the captions, val and test up to two.
    """
    rng = np.random.default_rng([seed, split, source, identity, k, 1])
    views = sample_view(rng, person, source, True), sample_view(rng, person, source, False)
    captions = [caption(person, views, rng) for _ in range(3)]
    return views, captions, int(rng.integers(*QUALITY, endpoint=True))


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether `root` is a complete set of these parameters."""
    try:
        return load_json(read_file(root / MARKER)) == parameters
    except (OSError, ValueError, RecursionError):
        return False


def _render_all(root: Path, parameters: dict[str, Any], workers: int, progress: bool) -> None:
    seed, pairs, layout = parameters["seed"], parameters["pairs"], parameters["layout"]
    real = parameters.get("val") == "like_real"
    jobs = _jobs(parameters, real)
    work = partial(_render_identity, root=root, seed=seed, pairs=pairs, layout=layout, real=real)
    results = list(zip(jobs, run_jobs(work, jobs, workers, progress, "person"), strict=True))
    if layout != "TBAGPR":
        first = FIRST_ID.get(layout, 0)
        rendered = [
            Record(SPLITS[job[0]], pid, row["files"], row["captions"], row["labels"])
            for pid, (job, rows) in enumerate(results, first)
            for row in rows
        ]
        for file, entries in json_files(layout, rendered).items():
            write_json(root / file, entries)
        return
    for source, source_name in enumerate(SOURCES):
        folder = root / source_name
        folder.mkdir(parents=True, exist_ok=True)
        for split, name in enumerate(SPLITS):
            if real and (name, source_name) == ("val", "G2APS-AG"):
                split = 2  # its val file is a copy of its test file
            records = [r for job, rows in results if job[:2] == (split, source) for r in rows]
            rng = np.random.default_rng([seed, split, source, 2])
            content = _eval_json(records, rng) if split else _train_json(records)
            write_json(folder / JSON_NAME[source_name].format(name), content)
    attrs = [
        {_key(job[1], path): labels}
        for job, rows in results
        for record in rows
        for path, labels in zip(record["paths"], record["labels"], strict=True)
    ]
    write_json(root / "attrs.json", attrs)


def run_jobs(
    work: Callable[[Job], Result], jobs: list[Job], workers: int, progress: bool, unit: str
) -> list[Result]:
    """The results of `work` for each job, in order, from `workers` processes."""
    # Spawned, because forked workers would inherit the threads and memory of a training program.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
    with pool as executor:
        done = executor.map(work, jobs, chunksize=4) if executor else map(work, jobs)
        return list(tqdm(done, total=len(jobs), unit=unit, disable=None if progress else True))


def _jobs(parameters: dict[str, Any], real: bool) -> list[tuple[int, int, int, int, Person]]:
    """(split, source, number in the source, pid, person) of each identity to render."""
    jobs, next_pid = [], [0, 0]
    for split, name in enumerate(SPLITS):
        people = sample_people(parameters["seed"], split, parameters.get(f"{name}_ids", 0))
        for source, identity, person in people:
            jobs.append((split, source, identity, next_pid[source], person))
            next_pid[source] += 1
    if not real:
        return jobs
    train, test = ([job for job in jobs if job[0] == split] for split in (0, 2))
    test[0] = (*test[0][:4], train[0][4])
    return train + [(1, *job[1:]) for job in test if job[1] == 0] + test


def _render_identity(
    job: tuple[int, int, int, int, Person],
    root: Path,
    seed: int,
    pairs: int,
    layout: str,
    real: bool,
) -> list[dict[str, Any]]:
    """Write the images of one identity. Returns the data of each pair for the JSON files."""
    split, source, identity, pid, person = job
    records = []
    for k in range(pairs):
        views, captions, quality = sample_pair(seed, split, source, identity, k, person)
        paths = [
            _real_path(split, source, identity, pid, k, view.aerial)
            if real
            else _path(source, pid, k, view.aerial)
            for view in views
        ]
        files = [
            _file(layout, source, pid, k, view.aerial, path)
            for view, path in zip(views, paths, strict=True)
        ]
        for view, file in zip(views, files, strict=True):
            if file:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                jpeg = io.BytesIO()  # PIL's writer loses the system's error message
                paint(person, view).save(jpeg, "JPEG", quality=quality)
                (root / file).write_bytes(jpeg.getvalue())
        shown = [labels(person, view) for view in views]
        records.append(
            {"pid": pid, "paths": paths, "files": files, "captions": captions, "labels": shown}
        )
    return records


def _path(source: int, pid: int, k: int, aerial: bool) -> list[str]:
    """[folder, file] of an image in the source's folder, fit for the source's image keys."""
    if source == 0:
        return [f"p{pid:04d}", f"{'A' if aerial else 'G'}_C{1 + aerial:02d}_{k:04d}.jpg"]
    view = "aerial" if aerial else "ground"
    return [view, f"{pid:04d}_{view}_c{1 + aerial}_{k:03d}.jpg"]  # a key of 22 characters


def _real_path(split: int, source: int, identity: int, pid: int, k: int, aerial: bool) -> list[str]:
    """The same, with names like the real data's. AG-ReID's contain person, session, altitude and
    camera. The first person of its test is also in training, in another session.
    """
    if source:
        return ["img", f"{'D' if aerial else 'S'}1_20_{pid:06d}_{k:05d}.jpg"]
    person = 1 + (pid if split == 0 or identity else 0)
    session, camera, frame = (4041 if split == 0 else 4051), 0 if aerial else 3, 100 * split + k
    folder = "bounding_box_train" if split == 0 else "bounding_box_test_all"
    return [folder, f"P{person:04d}T{session:05d}A0C{camera}F{frame}.jpg"]


def _file(layout: str, source: int, pid: int, k: int, aerial: bool, path: list[str]) -> str:
    """Path of an image in the data set's folder; "" if the layout has no such image."""
    if layout == "TBAGPR":
        return "/".join((SOURCES[source], *path))
    name = f"{'AG'[source]}{pid:04d}_{k:03d}.jpg"
    if layout in PEDES:
        return "" if aerial else f"imgs/{name}"
    return f"{'aerial' if aerial else 'ground'}/{name}"


def labels(person: Person, view: View) -> list[int]:
    """Gender, age, light, weight, height, angle and altitude of one image."""
    p = person
    return [p.gender, p.age, view.dim, p.weight, p.height, view.angle, int(view.aerial)]


def _train_json(records: list[dict[str, Any]]) -> list[list[Any]]:
    return [[r["pid"], i, *r["paths"], r["captions"][0]] for i, r in enumerate(records)]


def _eval_json(records: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, list[Any]]:
    """Parallel lists of images and of captions, with a random number of captions for each pair."""
    counts = rng.choice(3, size=len(records), p=(0.1, 0.65, 0.25))
    for i, record in enumerate(records):
        if record["pid"] not in {r["pid"] for r in records[:i]}:
            counts[i] = max(counts[i], 1)  # every identity has a caption
    if len(records) and counts.sum() == len(records):
        counts[-1] += 1  # equal numbers of captions and images would hide mistakes in evaluation
    return {
        "image_pids": [r["pid"] for r in records],
        "img_paths": [r["paths"][0] for r in records],
        "pair_img_paths": [r["paths"][1] for r in records],
        "caption_pids": [r["pid"] for r, n in zip(records, counts, strict=True) for _ in range(n)],
        "captions": [c for r, n in zip(records, counts, strict=True) for c in r["captions"][:n]],
    }


def _key(source: int, path: list[str]) -> str:
    """Key of an image in attrs.json. `path`: [folder, file]."""
    return f"{path[0]}_{path[1][:-4]}" if source == 0 else path[1]


def write_json(path: Path, content: object) -> None:
    """Write a new JSON file into a folder that is not complete yet."""
    path.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
