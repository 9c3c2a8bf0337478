"""Rendering the whole data set into a folder, in TBAGPR's layout or another that is read here."""

import io
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.pedes import CUSTOM, PEDES
from utils.attributes import Attribute, read_attributes
from utils.documents import load_json
from utils.errors import UserError
from utils.files import read_file

from .captions import caption
from .people import Person, sample_person
from .view import SOURCES, View, paint, sample_view

VERSION = 1  # raise it whenever the same parameters give other files
SPLITS = ("train", "val", "test")
MARKER = "mini.json"
JSON_NAME = {"AG-ReID": "agtext_{}.json", "G2APS-AG": "g2aps_{}.json"}
_QUALITY = (85, 92)  # JPEG
LAYOUTS = ("TBAGPR", *PEDES, "custom")
VALS = ("disjoint", "like_real")


def cast(seed: int, split: int, count: int) -> list[tuple[int, int, Person]]:
    """The identities of a split as (source, number in the source, person), no two looking alike.

    The first source gets the odd one.
    """
    people, looks = [], set()
    for source, share in enumerate(((count + 1) // 2, count // 2)):
        for identity in range(share):
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

    Training uses one caption; val and test use none to two of a pair.
    """
    rng = np.random.default_rng([seed, split, source, identity, k, 1])
    views = sample_view(rng, person, source, True), sample_view(rng, person, source, False)
    captions = [caption(person, views, rng) for _ in range(3)]
    return views, captions, int(rng.integers(*_QUALITY, endpoint=True))


def _path(source: int, pid: int, k: int, aerial: bool) -> list[str]:
    """[folder, file] of an image relative to the source's folder; names fit each source's keys."""
    if source == 0:
        return [f"p{pid:04d}", f"{'A' if aerial else 'G'}_C{1 + aerial:02d}_{k:04d}.jpg"]
    view = "aerial" if aerial else "ground"
    return [view, f"{pid:04d}_{view}_c{1 + aerial}_{k:03d}.jpg"]  # 22 characters


def _real_path(split: int, source: int, identity: int, pid: int, k: int, aerial: bool) -> list[str]:
    """The same as in the real data, whose AG-ReID names tell person, session, altitude and camera.

    The first person of AG-ReID's test walks in training too, in another session.
    """
    if source:
        return ["img", f"{'D' if aerial else 'S'}1_20_{pid:06d}_{k:05d}.jpg"]
    person = 1 + (pid if split == 0 or identity else 0)
    session, camera, frame = (4041 if split == 0 else 4051), 0 if aerial else 3, 100 * split + k
    folder = "bounding_box_train" if split == 0 else "bounding_box_test_all"
    return [folder, f"P{person:04d}T{session:05d}A0C{camera}F{frame}.jpg"]


def _key(source: int, path: list[str]) -> str:
    """Key of an image in attrs.json."""
    return f"{path[0]}_{path[1][:-4]}" if source == 0 else path[1]


def _labels(person: Person, view: View) -> list[int]:
    """Gender, age, light, weight, height, angle and altitude of one image."""
    p = person
    return [p.gender, p.age, view.dim, p.weight, p.height, view.angle, int(view.aerial)]


def _file(layout: str, source: int, pid: int, k: int, aerial: bool, path: list[str]) -> Path | None:
    """Where an image lies below the data set's folder; None if the layout has no such image."""
    if layout == "TBAGPR":
        return Path(SOURCES[source], *path)
    name = f"{'AG'[source]}{pid:04d}_{k:03d}.jpg"
    if layout == "custom":
        return Path("aerial" if aerial else "ground", name)
    return None if aerial else Path("imgs", name)


def _render_identity(
    job: tuple[int, int, int, int, Person],
    root: Path,
    seed: int,
    pairs: int,
    layout: str,
    real: bool,
) -> list[dict[str, Any]]:
    """Write the images of one identity; returns what the JSON files need to know of each pair."""
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
            if file is not None:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                jpeg = io.BytesIO()  # PIL's own writer does not say why the disk refused
                paint(person, view).save(jpeg, "JPEG", quality=quality)
                (root / file).write_bytes(jpeg.getvalue())
        labels = [_labels(person, view) for view in views]
        records.append(
            {"pid": pid, "paths": paths, "files": files, "captions": captions, "labels": labels}
        )
    return records


class Pair(NamedTuple):
    """An aerial and a ground image of one person. Paths are relative to the folder of all."""

    identity: int
    aerial: str
    ground: str
    captions: list[str]  # three
    attributes: dict[str, str]  # of the aerial image, such as {"gender": "male", ...}
    pair_attributes: dict[str, str]  # of the ground image


def render_people(
    folder: str | Path, identities: int = 8, pairs: int = 2, seed: int = 0
) -> list[Pair]:
    """Render a few people into a folder, for the test of a reader.

    The test writes the pairs down as its reader's files have them. Identities are 0, 1, ...
    """
    root, found = Path(folder), []
    attributes = read_attributes("configs/attributes.yaml")
    for pid, (source, identity, person) in enumerate(cast(seed, 0, identities)):
        job = (0, source, identity, pid, person)
        for record in _render_identity(job, root, seed, pairs, "custom", real=False):
            aerial, ground = (file.as_posix() for file in record["files"])
            named = _named(attributes, record["labels"])
            found.append(Pair(pid, aerial, ground, record["captions"], *named))
    return found


def _named(attributes: list[Attribute], labels: list[list[int]]) -> list[dict[str, str]]:
    """The class of every attribute by its name, of each image."""
    return [
        {a.name: a.classes[value] for a, value in zip(attributes, values, strict=True)}
        for values in labels
    ]


def _entries(layout: str, records: list[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The JSON list of the other layouts; records come with split and identity."""
    attributes = read_attributes("configs/attributes.yaml")
    _, image_key = PEDES.get(layout, ("", "image"))
    entries = []
    for split, identity, record in records:
        if layout == "ICFG-PEDES" and SPLITS[split] == "val":
            continue  # it is published without one
        aerial, ground = record["files"]
        entry = {"split": SPLITS[split], "id": identity, "captions": record["captions"][:2]}
        if layout == "custom":
            named = _named(attributes, record["labels"])
            entry |= {
                "image": aerial.as_posix(),
                "pair_image": ground.as_posix(),
                "attributes": named[0],
                "pair_attributes": named[1],
            }
        else:
            entry[image_key] = ground.relative_to("imgs").as_posix()
        entries.append(entry)
    return entries


def _train_json(records: list[dict[str, Any]]) -> list[list[Any]]:
    return [[r["pid"], i, *r["paths"], r["captions"][0]] for i, r in enumerate(records)]


def _eval_json(records: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, list[Any]]:
    """Parallel lists of images and of captions; identities have a varying number of captions."""
    counts = rng.choice(3, size=len(records), p=(0.1, 0.65, 0.25))
    for i, record in enumerate(records):
        if record["pid"] not in {r["pid"] for r in records[:i]}:
            counts[i] = max(counts[i], 1)  # nobody goes without a caption
    if len(records) and counts.sum() == len(records):
        counts[-1] += 1  # as many captions as images would hide mistakes in evaluation
    return {
        "image_pids": [r["pid"] for r in records],
        "img_paths": [r["paths"][0] for r in records],
        "pair_img_paths": [r["paths"][1] for r in records],
        "caption_pids": [r["pid"] for r, n in zip(records, counts, strict=True) for _ in range(n)],
        "captions": [c for r, n in zip(records, counts, strict=True) for c in r["captions"][:n]],
    }


def _jobs(parameters: dict[str, Any], real: bool) -> list[tuple[int, int, int, int, Person]]:
    """(split, source, number in the source, pid, person) of all whose images are rendered."""
    jobs, next_pid = [], [0, 0]
    for split, name in enumerate(SPLITS):
        for source, identity, person in cast(parameters["seed"], split, parameters[f"{name}_ids"]):
            jobs.append((split, source, identity, next_pid[source], person))
            next_pid[source] += 1
    if not real:
        return jobs
    train, test = ([job for job in jobs if job[0] == split] for split in (0, 2))
    test[0] = (*test[0][:4], train[0][4])
    return train + [(1, *job[1:]) for job in test if job[1] == 0] + test


def _render_all(root: Path, parameters: dict[str, Any], workers: int, progress: bool) -> None:
    seed, pairs, layout = parameters["seed"], parameters["pairs"], parameters["layout"]
    real = parameters.get("val") == "like_real"
    jobs = _jobs(parameters, real)
    work = partial(_render_identity, root=root, seed=seed, pairs=pairs, layout=layout, real=real)
    # Spawned workers do not inherit the threads and the memory of a program that trains.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
    with pool as executor:
        done = executor.map(work, jobs, chunksize=4) if executor else map(work, jobs)
        bar = tqdm(done, total=len(jobs), unit="person", disable=None if progress else True)
        results = list(zip(jobs, bar, strict=True))
    if layout != "TBAGPR":
        first = 1 if layout == "CUHK-PEDES" else 0  # its identities count from 1
        listed = [(j[0], first + i, r) for i, (j, found) in enumerate(results) for r in found]
        file = PEDES[layout][0] if layout in PEDES else CUSTOM
        _write_json(root / file, _entries(layout, listed))
        return
    for source, source_name in enumerate(SOURCES):
        folder = root / source_name
        folder.mkdir(parents=True, exist_ok=True)
        for split, name in enumerate(SPLITS):
            if real and (name, source_name) == ("val", "G2APS-AG"):
                split = 2  # its val list is its test list
            records = [r for j, found in results if j[:2] == (split, source) for r in found]
            rng = np.random.default_rng([seed, split, source, 2])
            content = _eval_json(records, rng) if split else _train_json(records)
            _write_json(folder / JSON_NAME[source_name].format(name), content)
    attrs = [
        {_key(job[1], path): labels}
        for job, found in results
        for record in found
        for path, labels in zip(record["paths"], record["labels"], strict=True)
    ]
    _write_json(root / "attrs.json", attrs)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


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

    The numbers of identities are per split over both sources; each has `pairs` pairs of an aerial
    and a ground image. The layouts of ground-only benchmarks leave the aerial images out.
    `val="like_real"` gives TBAGPR's file names and the faults of its splits: G2APS-AG's val is its
    test, AG-ReID's val shows the people of its test in other images, and one of them is in training
    too. The files depend on these parameters only, not on `workers`. A complete set of the same
    parameters is left alone, and False returned; anything else at `root` raises FileExistsError
    unless `force`, which replaces a folder, but no link and no file. The set appears at `root` only
    when complete. Raises UserError if it cannot be written; then nothing stays.
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
    for name, value, known in (("layout", layout, LAYOUTS), ("val", val, VALS)):
        if value not in known:
            raise ValueError(f"{name} {value} is none of {', '.join(known)}")
    if val != "disjoint":
        parameters["val"] = val
        if layout != "TBAGPR":
            raise ValueError(f"val {val} is of the layout TBAGPR")
        if val_ids != test_ids:
            raise ValueError(f"val {val}: its people are those of test, so val_ids is test_ids")
    if pairs < 1 or min(train_ids, val_ids, test_ids) < 1:
        raise ValueError("pairs and every number of identities have to be at least 1")
    there = root.exists() or root.is_symlink()
    if there and (root.is_symlink() or not root.is_dir()) and force:
        raise FileExistsError(f"{root} is a link or no folder; remove it, or choose another folder")
    if there and not force:
        if _is_complete(root, parameters):
            return False
        raise FileExistsError(
            f"{root} exists and is not the complete set of these parameters; "
            "remove it, choose another folder, or replace it with --force"
        )
    unfinished, replaced = (root.with_name(root.name + end) for end in (".unfinished", ".replaced"))
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _render_all(unfinished, parameters, workers, progress)
        _write_json(unfinished / MARKER, parameters)
        if there:  # moved first: half deleted, it could still pass for a complete set
            shutil.rmtree(replaced, ignore_errors=True)
            root.rename(replaced)
        unfinished.rename(root)
    except OSError as error:
        raise UserError(
            f"{root}: could not be rendered: {error.filename or unfinished}: "
            f"{error.strerror or error}; make room there, or choose another folder"
        ) from None
    except BrokenProcessPool:
        raise UserError(
            f"{root}: could not be rendered: a process was killed; memory may have run out: give "
            "fewer --workers"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return True


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether the set of these parameters stands there, by its marker, which is written last."""
    try:
        return load_json(read_file(root / MARKER)) == parameters
    except (OSError, ValueError, RecursionError):
        return False
