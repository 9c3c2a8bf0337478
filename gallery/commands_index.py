"""Make a gallery of people from pictures, videos or a data set, or bring one up to date."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gallery.copies import Copy, stores
from gallery.indexing import ProgressLines, Report, encode_parts
from gallery.ingest import (
    VIEWS,
    Found,
    Missing,
    add_boxes,
    add_dataset,
    add_pictures,
    add_videos,
)
from gallery.manifest import IDENTITY, MANIFEST, NEXT, libraries, new_manifest, read_manifest
from gallery.milvus import FORM, STORE_HELP, MilvusError, check_installed, store_option
from gallery.moved import make_relative
from gallery.onnx import is_export
from gallery.parts import damaged_parts
from gallery.paths import below, stored_path
from gallery.pictures import import_av
from gallery.plan import Plan, apply_plan, make_plan
from gallery.store import Gallery, Store, writing
from utils.console import process_rank
from utils.errors import StoppedBySignal, UserError
from utils.files import expand, path_option, write_atomically
from utils.options import OPTIONS
from utils.run_log import setup_logger

if TYPE_CHECKING:
    from gallery.encode import Encoder
    from gallery.engine_onnx import OnnxEngine
    from gallery.engine_torch import TorchEngine
    from gallery.onnx import OnnxEncoder

BROKEN = "broken.json"  # in the gallery: what could not be read
SHOWN = 5  # broken files, or folders without files, in the log


GONE = "people whose pictures are gone for good leave by search.py delete --path"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--gallery", required=True, type=path_option, metavar="FOLDER",
        help="the gallery, which is made if it does not exist")  # fmt: skip
    add("--store", type=store_option, metavar=FORM,
        help="then make the copy of the gallery there equal to it; without an encoder and anything "
        f"to index, do this alone. {STORE_HELP}")  # fmt: skip
    group = parser.add_argument_group("What to index")
    add = group.add_argument
    add("--images", nargs="+", default=[], metavar="PATH",
        help="folders, pictures, or @FILE: a list of them, one a line")  # fmt: skip
    add("--videos", nargs="+", default=[], metavar="PATH", help="the same for videos")
    add("--every", type=float, default=1.0, metavar="SECONDS",
        help="of a video, take one frame every so many seconds (default: 1)")  # fmt: skip
    add("--dataset_name", default="", help="a data set, with its identities and labels")
    add("--root_dir", type=expand, default="./data", metavar="FOLDER",
        help="folder of the data set (default: ./data)")  # fmt: skip
    add("--split", default="all", help="train, val or test of the data set (default: all)")
    add("--boxes", type=path_option, metavar="FILE",
        help="where the people in the pictures are: a CSV file with the columns path, left, top, "
        "width, height (and view, camera, identity), or a JSON file of COCO's form; without boxes "
        "and detector, each picture is a person")  # fmt: skip
    add("--detect", default="", metavar="NAME|FILE",
        help="find the people with this detector of torchvision, or with a file of its weights "
        "(NAME@FILE if the file's name does not begin with the detector's)")  # fmt: skip
    add("--min_score", type=float, default=0.5, metavar="SCORE",
        help="least score of a box, of --detect or in COCO's JSON (default: 0.5)")  # fmt: skip
    add("--view", choices=VIEWS, help="the view of all pictures and videos")
    add("--root", type=path_option, metavar="FOLDER",
        help="paths in the gallery begin there (default: that of the gallery, or the folder of all "
        "that is indexed first); give it if the pictures have moved")  # fmt: skip
    group = parser.add_argument_group("Encoder")
    add = group.add_argument
    add("--config_file", type=expand, metavar="YAML",
        help="configs.yaml of a run, or its folder; also one of tools/export.py --hub")  # fmt: skip
    add("--checkpoint", default="best.pth", metavar="FILE",
        help="checkpoint next to --config_file (default: best.pth)")  # fmt: skip
    add("--pretrain_choice", default="", metavar="NAME|FILE",
        help="vanilla weights in place of a run, as train.py takes them")  # fmt: skip
    add("--onnx", type=path_option, metavar="FOLDER",
        help="a run's encoders in ONNX (tools/export.py --onnx) in place of the run: this needs no "
        "torch")  # fmt: skip
    add("--img_size", nargs=2, type=int, metavar="INT",
        help="--pretrain_choice: height and width of images (default: those of a folder of "
        "tools/export.py --hub, else 384 128)")  # fmt: skip
    add("--attributes_file", type=expand, metavar="FILE", help=OPTIONS["attributes_file"].help)
    add("--device", choices=OPTIONS["device"].choices, default="auto", help="as for train.py")
    add("--precision", choices=OPTIONS["precision"].choices,
        help="as for train.py (default: that of the gallery, or of the run)")  # fmt: skip
    add("--test_batch_size", type=int, default=128, metavar="INT",
        help="people that are encoded together (default: 128)")  # fmt: skip
    add("--num_workers", type=int, default=8, metavar="INT", help=OPTIONS["num_workers"].help)
    group = parser.add_argument_group("An existing gallery")
    add = group.add_argument
    add("--reencode", action="store_true",
        help="make it anew of what is given now, for example with another encoder; the old one "
        "stays until the new one is complete")  # fmt: skip
    add("--repair", action="store_true",
        help="check all parts, and encode the pictures of damaged ones again")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Index. Raises UserError, and StoppedBySignal after a signal."""
    _check(args)
    log = setup_logger(rank=process_rank())
    if _only_copies(args):
        if process_rank() == 0:
            read_manifest(args.gallery)  # before a folder is made
            with writing(args.gallery):
                _update_copy(args, Store(args.gallery, read_manifest(args.gallery)), log)
        return
    # Before an encoder takes time, and before a folder is made.
    found = _found(args) if process_rank() == 0 else Found()
    engine = _engine(args)
    processes = engine.processes
    with ExitStack() as stack:
        if processes.is_rank_0:
            stack.enter_context(writing(args.gallery))
        processes.barrier()
        name = NEXT if args.reencode else MANIFEST
        there = _manifest_if_any(args.gallery, name) if processes.is_rank_0 else None
        manifest = processes.from_rank_0(there)
        # The precision of the gallery, if none is given.
        known = manifest["encoder"]["precision"] if manifest and not args.reencode else None
        encoder = engine.load(known, log)
        if manifest and (changes := _differences(encoder, manifest)):
            if not args.reencode:
                raise UserError(
                    f"--gallery {args.gallery}: made by another encoder ({'; '.join(changes)}); "
                    "features of two encoders cannot be compared: give that encoder, another "
                    "--gallery, or --reencode"
                )
            manifest = None  # an unfinished gallery of a third encoder
        plan, store = Plan(), None
        replaced: dict[str, set[str]] = {}
        if processes.is_rank_0:
            store, plan, replaced = _planned(args, found, encoder, manifest, name, log)
        jobs, manifest = processes.from_rank_0((plan.jobs, store.manifest if store else None))
        store = store or Store(args.gallery, manifest, name)
        mine = jobs[processes.rank :: processes.size]
        bar: tqdm | ProgressLines = ProgressLines(len(mine), log)
        if sys.stderr.isatty() and processes.is_rank_0:
            bar = tqdm(total=len(mine), unit="file", desc="index", leave=False)
        with bar, engine.results(mine) as results:
            reports = encode_parts(results, store, replaced, processes, bar)
        if processes.is_rank_0:
            _finish(args, store, plan, reports, log)
            if not any(report.stopped for report in reports):
                _update_copy(args, store, log)
    if stopped := [report.stopped for report in reports if report.stopped]:
        raise StoppedBySignal(
            f"{stopped[0]}: stopped; what is encoded is kept: give the same command to go on"
        )


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if args.store:
        check_installed()
    if _only_copies(args):
        return
    if sum(map(bool, (args.config_file, args.pretrain_choice, args.onnx))) != 1:
        raise UserError("give the encoder: one of --config_file, --pretrain_choice and --onnx")
    if not (args.images or args.videos or args.dataset_name or args.boxes):
        raise UserError("give --images, --videos, --boxes or --dataset_name: what to index")
    if args.detect and (args.boxes or args.dataset_name):
        raise UserError("--detect: the people of --boxes and of a data set are known already")
    if args.img_size and not args.pretrain_choice:
        raise UserError("--img_size: a run has its own; only with --pretrain_choice")
    if args.config_file and not os.path.exists(args.config_file):
        raise UserError(f"--config_file {args.config_file}: no such file or folder")
    if args.config_file and is_export(args.config_file):
        raise UserError(
            f"--config_file {args.config_file}: an export in ONNX; give it with --onnx instead"
        )
    if args.checkpoint != "best.pth" and not args.config_file:
        raise UserError(f"--checkpoint {args.checkpoint}: one of a run; only with --config_file")
    if args.onnx and args.detect:
        raise UserError("--detect: detectors need torch; with --onnx give --boxes instead")
    if args.onnx and args.precision:
        raise UserError("--precision: an export has float32 alone; leave it out with --onnx")
    if not 0 <= args.min_score <= 1:
        raise UserError(f"--min_score {args.min_score:g}: must be from 0 to 1")
    if not 0 < args.every <= 1e6:
        raise UserError(f"--every {args.every}: must be a positive number of seconds")
    for name, least in (("test_batch_size", 1), ("num_workers", 0)):
        if not least <= getattr(args, name) <= 10**5:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.root and not args.root.is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    if args.videos:
        import_av()


def _only_copies(args: argparse.Namespace) -> bool:
    """Whether nothing is to be indexed, but an existing gallery to be copied."""
    sources = (args.images, args.videos, args.dataset_name, args.boxes)
    how = (args.config_file, args.pretrain_choice, args.onnx, args.detect, args.view, args.root)
    return bool(args.store) and not any((*sources, *how, args.reencode, args.repair))


def _update_copy(args: argparse.Namespace, store: Store, log: Any) -> None:
    """Make the copy of --store equal to the gallery, and name those that may be behind."""
    if args.store:
        try:
            count = Copy(args.gallery, args.store, new=True).update(store)
        except MilvusError as error:
            raise UserError(
                f"{error}; {args.gallery} is up to date, its copy is not: search.py index "
                f"--gallery {args.gallery} --store {args.store} goes on"
            ) from None
        log.info(f"{args.store}: {count} people put; it is equal to {args.gallery}")
    for other in stores(args.gallery):
        if other != args.store:
            log.info(f"{other}: not brought up to date; --store {other} does so")


def _manifest_if_any(folder: Path, name: str) -> dict[str, Any] | None:
    return read_manifest(folder, name) if os.path.lexists(folder / name) else None


def _engine(args: argparse.Namespace) -> TorchEngine | OnnxEngine:
    """What reads and encodes; torch is imported only if it is needed."""
    if args.onnx:
        from gallery.engine_onnx import OnnxEngine

        return OnnxEngine(args)
    from gallery.engine_torch import TorchEngine

    return TorchEngine(args)


def _differences(encoder: Encoder | OnnxEncoder, manifest: Mapping[str, Any]) -> list[str]:
    """How the encoder differs from that of a gallery."""
    old, new = manifest["encoder"], encoder.about
    different = [name for name in (*IDENTITY, "precision") if old.get(name) != new[name]]
    texts = [f"{name} {old.get(name)}, not {new[name]}" for name in different if name != "sha256"]
    if "sha256" in different:  # the name of the run or of the checkpoint is often the same
        was, now = (
            f"{about['name']} {about['checkpoint']}".strip() + f" ({about['sha256'][:8]})"
            for about in (old, new)
        )
        texts.insert(0, f"weights of {was}, not {now}")
    return texts


def _found(args: argparse.Namespace) -> Found:
    """Everything that the options name. Raises UserError."""
    found = Found()
    try:
        _add_sources(found, args)
    except Missing as error:
        if _has_people_of(args.gallery, error.path):
            raise UserError(f"{error}; {GONE}") from None
        raise
    return found


def _add_sources(found: Found, args: argparse.Namespace) -> None:
    if args.dataset_name:
        attributes = args.attributes_file or OPTIONS["attributes_file"].default
        add_dataset(found, args.dataset_name, args.root_dir, args.split, attributes, args.view)
    if args.boxes:
        add_boxes(found, args.boxes, args.images, args.view, args.min_score)
    else:
        add_pictures(found, args.images, args.view)
    add_videos(found, args.videos, args.view)


def _has_people_of(folder: Path, path: str) -> bool:
    """Whether there is a gallery that has people of a picture, a video or a folder."""
    try:
        gallery = Gallery.open(folder, features=False)
    except UserError:
        return False
    root = gallery.manifest["root"]
    kept = "" if path == root else stored_path(path, root)
    return bool(below(gallery.items["path"], [kept, path]).any())


def _planned(
    args: argparse.Namespace,
    found: Found,
    encoder: Encoder | OnnxEncoder,
    manifest: dict[str, Any] | None,
    name: str,
    log: Any,
) -> tuple[Store, Plan, dict[str, set[str]]]:
    """Open the gallery for writing, and commit what needs no encoding; for rank 0."""
    attributes = _joined(found.attributes, encoder.attributes, "the encoder's")
    if manifest is None:
        old = _manifest_if_any(args.gallery, MANIFEST) or {}
        root = os.path.abspath(args.root or old.get("root") or found.base())
        store = Store(args.gallery, new_manifest(encoder.about, attributes, root), name)
        store.clean()
        store.commit([])
    else:
        known = {n: tuple(classes) for n, classes in manifest["attributes"].items()}
        attributes = _joined(known, attributes, "now")
        store = Store(args.gallery, manifest, name)
        store.clean()
        lists = {n: list(classes) for n, classes in attributes.items()}
        root = os.path.abspath(args.root or manifest["root"])
        store.commit(
            store.parts,
            attributes=lists,
            root=root,
            encoder=encoder.about,
            libraries=libraries(encoder.about),
        )
    if args.repair:
        damaged = damaged_parts(args.gallery, store.parts)
        for _, message in damaged:
            log.info(message)
        store.commit([p for p in store.parts if all(p is not bad for bad, _ in damaged)])
    if args.root:
        make_relative(store)
    detect = f"{os.path.basename(args.detect)} {args.min_score:g}" if args.detect else ""
    how = {False: detect, True: f"every {args.every:g} {detect}".strip()}
    plan = make_plan(found, store, how)
    counts = {
        "to encode": len(plan.jobs), "unchanged": plan.unchanged,
        "with new times or facts (view, identity, ...)": len(plan.known), "gone": len(plan.gone),
    }  # fmt: skip
    shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    log.info(f"{args.gallery}: files: {shown or 'none'}")
    if plan.away:
        words = ["--gallery", str(args.gallery), "--path", *sorted(plan.away)[:SHOWN]]
        more = " ..." if len(plan.away) > SHOWN else ""
        log.warning(
            f"{args.gallery}: {sum(plan.away.values())} people stay though their folders have no "
            "files now: a disk may be away; if they are gone for good: python search.py delete "
            f"{shlex.join(words)}{more}"
        )
    if plan.moved:
        now, once = plan.moved[0]
        log.warning(
            f"{args.gallery}: {len(dict(plan.moved))} new files have the content of files that are "
            f"gone, but whose people stay, such as {now}, once {once}: if they have moved, give "
            "--root, where the gallery's paths begin now, or take the old ones out with search.py "
            "delete --path"
        )
    return store, plan, apply_plan(plan, store)


def _joined(
    some: Mapping[str, Sequence[str]], others: Mapping[str, Sequence[str]], whose: str
) -> dict[str, Sequence[str]]:
    """The attributes of both. Raises UserError if one has other classes in both."""
    for name in set(some) & set(others):
        if list(some[name]) != list(others[name]):
            raise UserError(
                f"the attribute {name} has the classes {', '.join(some[name])}, {whose} "
                f"{', '.join(others[name])}; give the same --attributes_file"
            )
    return {**some, **others}


def _finish(
    args: argparse.Namespace, store: Store, plan: Plan, reports: Sequence[Report], log: Any
) -> None:
    """Tidy the gallery, and say what was done."""
    stopped = any(report.stopped for report in reports)
    store.commit(store.compacted())
    if not (stopped and args.reencode):  # an unfinished one waits for its next run
        store.publish()
    people = sum(report.people for report in reports)
    total = sum(part["rows"] for part in store.parts)
    broken = plan.broken + [entry for report in reports for entry in report.broken]
    path = args.gallery / BROKEN
    path.unlink(missing_ok=True)
    if broken:
        text = json.dumps([{"path": p, "reason": reason} for p, reason in broken], indent=1)
        write_atomically(path, methodcaller("write", text.encode("utf-8", "backslashreplace")))
        for broken_path, reason in broken[:SHOWN]:
            place = os.path.join(store.manifest["root"], broken_path)
            log.info(f"skipped {os.fsencode(place).decode(errors='backslashreplace')}: {reason}")
        log.info(f"skipped {len(broken)} that cannot be read; all of them: {path}")
    log.info(f"{args.gallery}: {people} people encoded, {total} in the gallery")
