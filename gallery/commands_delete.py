"""Remove people from a gallery: their rows and features are then gone from the disk.

Its copies are named with --store, and people leave them first: after a kill they are still in the
gallery, and the same command finds them again. Without --store a gallery with copies is refused:
nobody stays in a forgotten one, and no password goes to an address that the user did not name.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gallery import where
from gallery.copies import Copy, delete_copy, stores
from gallery.index import INDEX, remove_index
from gallery.manifest import MANIFEST, NEXT, read_manifest
from gallery.milvus import FORM, STORE_HELP, store_option
from gallery.parts import Part
from gallery.paths import below, is_unicode, stored_path
from gallery.store import Store, writing
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
    which.add_argument("--copy", type=store_option, metavar=FORM,
        help="nobody, but the gallery's whole copy there, which is then forgotten")  # fmt: skip
    add("--store", nargs="+", default=[], type=store_option, metavar=FORM,
        help=f"the copies of the gallery, which people leave too. {STORE_HELP}")  # fmt: skip
    add("--dry_run", action="store_true", help="only say how many would be deleted")


def run(args: argparse.Namespace) -> None:
    """Delete. Raises UserError, also if nobody is found."""
    read_manifest(args.gallery)  # before a folder is made
    if args.copy and args.dry_run:
        raise UserError("--dry_run: of people alone; leave it out with --copy")
    with writing(args.gallery) as folder:
        if args.copy:
            found = delete_copy(folder, args.copy)
            say(visible(f"{args.copy}: {'deleted' if found else 'there was no copy'}; forgotten"))
            return
        others = [address for address in stores(folder) if address not in args.store]
        if others and not args.dry_run:
            raise UserError(
                f"--gallery {folder}: has copies, which people shall leave too: give --store "
                f"{' '.join([*args.store, *others])}; delete --copy forgets one that is not used"
            )
        store = Store(folder, read_manifest(folder), MANIFEST)
        if (folder / NEXT).exists():
            raise UserError(
                f"{folder}: index --reencode has not finished, and would bring people back; "
                "finish it first"
            )
        copies = [Copy(folder, address) for address in args.store]
        store.clean()
        parts: list[Part | None] = []
        ids: list[int] = []
        matched: set[str] = set()
        for part in store.parts:
            items = store.read(part, "items")
            masks = _masks(items, args, store.manifest["root"])
            matched |= {name for name, mask in masks.items() if mask.any()}
            chosen = np.logical_or.reduce([np.zeros(len(items), bool), *masks.values()])
            ids += items["id"].filter(pa.array(chosen)).to_pylist()
            kept = args.dry_run or not chosen.any()
            parts.append(part if kept else store.rewritten(part, ~chosen, items))
        for name in map(str, args.identity or args.path or args.id or ()):
            if ids and name not in matched:
                say(visible(f"{folder}: has nobody of {name}"))
        for copy in () if args.dry_run else copies:
            if count := copy.drop(store, ids):
                say(visible(f"{copy.address}: {count} people left it who were in it alone"))
        if not ids:
            raise UserError(f"--gallery {folder}: has nobody of these; nothing is deleted")
        if args.dry_run:
            total = sum(part["rows"] for part in store.parts)
            say(visible(f"{folder}: {len(ids)} of {total} people would be deleted"))
            return
        # First, because it has the features too, in short codes.
        indexed = remove_index(folder / INDEX)
        store.commit(parts)
        total = sum(part["rows"] for part in store.parts)
        say(visible(f"{folder}: {len(ids)} people deleted, {total} are left"))
        if indexed:
            say(visible(f"{folder}: its index is deleted too; make it anew: search.py compress"))
        for copy in copies:
            copy.update(store)


def _masks(items: pa.Table, args: argparse.Namespace, root: str) -> Mapping[str, np.ndarray]:
    """Which rows to delete: a mask for each thing that the options name."""
    if args.path:
        masks = {}
        for path in args.path:
            # As on disk, or as the gallery keeps them.
            absolute = os.path.abspath(expand(path))
            kept = "" if absolute == root else stored_path(absolute, root)
            masks[path] = below(items["path"], [kept, path.rstrip("/") or "/"])
        return masks
    if args.where:
        return {args.where: where.to_mask(where.parse(args.where, items.schema), items)}
    name, values = ("identity", args.identity) if args.identity else ("id", args.id)
    kind = items.schema.field(name).type
    known = [value for value in values if is_unicode(str(value))]
    return {
        str(value): pc.is_in(items[name], value_set=pa.array([value], kind)).to_numpy(
            zero_copy_only=False
        )
        for value in known
    }
