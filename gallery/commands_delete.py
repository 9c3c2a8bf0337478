"""Remove people from a gallery: their rows and features are then gone from the disk."""

from __future__ import annotations

import argparse
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gallery import where
from gallery.index import INDEX, remove_index
from gallery.indexing import stored_path
from gallery.store import MANIFEST, NEXT, Part, Store, below, read_manifest, writing
from utils.console import say
from utils.errors import UserError
from utils.files import expand, path_option
from utils.text import visible


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--gallery", required=True, type=path_option, metavar="FOLDER", help="the gallery")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--identity", nargs="+", metavar="NAME", help="everyone of these identities")
    which.add_argument("--path", nargs="+", metavar="PATH",
        help="everyone in these pictures, videos and folders")  # fmt: skip
    which.add_argument("--where", metavar="FILTER", help="everyone for whom this holds, as in find")
    which.add_argument("--id", nargs="+", type=int, metavar="INT", help="the rows with these ids")


def run(args: argparse.Namespace) -> None:
    """Delete. Raises UserError, also if nobody is found."""
    read_manifest(args.gallery)  # before a folder is made
    with writing(args.gallery) as folder:
        store = Store(folder, read_manifest(folder), MANIFEST)
        if (folder / NEXT).exists():
            raise UserError(
                f"{folder}: index --reencode has not finished, and would bring people back; "
                "finish it first"
            )
        store.clean()
        deleted, indexed = 0, False
        parts: list[Part | None] = []
        for part in store.parts:
            items = store.read(part, "items")
            chosen = _chosen(items, args, store.manifest["root"])
            deleted += int(chosen.sum())
            parts.append(store.rewritten(part, ~chosen, items) if chosen.any() else part)
        if not deleted:
            raise UserError(f"--gallery {folder}: has nobody of these; nothing is deleted")
        # First, because it has the features too, in short codes.
        indexed = remove_index(folder / INDEX)
        store.commit([part for part in parts if part is not None])
        total = sum(part["rows"] for part in store.parts)
    say(visible(f"{folder}: {deleted} people deleted, {total} are left"))
    if indexed:
        say(visible(f"{folder}: its index is deleted too; make it anew: search.py compress"))


def _chosen(items: pa.Table, args: argparse.Namespace, root: str) -> np.ndarray:
    """Which rows to delete: a mask."""
    if args.path:
        # As on disk, or as the gallery keeps them.
        absolute = [os.path.abspath(expand(path)) for path in args.path]
        kept = ["" if path == root else stored_path(path, root) for path in absolute]
        return below(items["path"], [*kept, *(path.rstrip("/") or "/" for path in args.path)])
    if args.where:
        return where.to_mask(where.parse(args.where, items.schema), items)
    name, values = ("identity", args.identity) if args.identity else ("id", args.id)
    known = pa.array(values, items.schema.field(name).type)
    return pc.is_in(items[name], value_set=known).to_numpy(zero_copy_only=False)
