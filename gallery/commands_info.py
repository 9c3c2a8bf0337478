"""Say what is in a gallery."""

from __future__ import annotations

import argparse
from collections import Counter

from gallery.copies import stores
from gallery.index import INDEX
from gallery.index import MANIFEST as INDEX_MANIFEST
from gallery.store import Gallery, size_on_disk
from utils.console import say
from utils.files import path_option
from utils.tables import console
from utils.text import visible


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--gallery", required=True, type=path_option, metavar="FOLDER",
                        help="the gallery")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the description. Raises UserError."""
    gallery = Gallery.open(args.gallery, features=False)
    manifest, items = gallery.manifest, gallery.items
    encoder = manifest["encoder"]
    height, width = encoder["img_size"]
    index = args.gallery / INDEX / INDEX_MANIFEST
    lines = [
        f"{args.gallery}: {len(items)} people in {len(items['path'].unique())} files, "
        f"{len(manifest['parts'])} parts, "
        f"{size_on_disk(args.gallery, manifest) / 2**20:.1f} MiB",
        f"paths begin at {manifest['root']}",
        f"encoder: {encoder['kind']} {encoder['name']}, {height}x{width}, {encoder['precision']}, "
        f"{encoder['embed_dim']} numbers, SHA-256 {encoder['sha256'][:16]}",
        f"attributes: {', '.join(manifest['attributes']) or 'none'}",
        f"columns: {', '.join(items.schema.names)}",
        f"compressed index: {'yes' if index.exists() else 'none'}",
        f"copies: {', '.join(stores(args.gallery)) or 'none'}",
        "written with " + ", ".join(f"{n} {v}" for n, v in manifest["libraries"].items()),
    ]
    say("\n".join(map(visible, lines)))
    pairs = zip(items["source"].to_pylist(), items["view"].to_pylist(), strict=True)
    counts = Counter(pairs)
    rows = [
        [visible(source or "unknown"), view or "unknown", count]
        for (source, view), count in sorted(counts.items(), key=lambda entry: str(entry[0]))
    ]
    say(console(["source", "view", "people"], rows, left=2))
