"""Build an index with compressed vectors, for galleries of more than a million people.

    python search.py compress --gallery galleries/campus --memory 1GiB

`find` then uses it. People who are indexed later are compared one by one until it is built again.
"""

from __future__ import annotations

import argparse
import re

from gallery.index import INDEX, build
from gallery.store import Gallery
from utils.console import say
from utils.files import path_option

UNITS = {"MiB": 2**20, "GiB": 2**30}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--gallery", required=True, type=path_option, metavar="FOLDER", help="the gallery")
    add("--memory", type=_bytes, default="1GiB", metavar="SIZE",
        help="size of the index, such as 800MiB (default: 1GiB); it is mapped, so that what a "
        "search needs of it is in memory")  # fmt: skip
    add("--seed", type=int, default=0, metavar="INT", help="seed of the clusters (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Build the index, and print its recall. Raises UserError."""
    gallery = Gallery.open(args.gallery)
    folder = gallery.folder / INDEX
    about = build(gallery.items, gallery.features, folder, args.memory, args.seed)
    say(
        f"{folder}: {about['factory']}, {about['bytes'] / 2**20:.0f} MiB for {about['rows']:,} "
        f"people; a search opens {about['nprobe']} clusters and finds "
        f"{about['recall@50']:.1%} of the 50 nearest"
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: a number and MiB or GiB, such as 800MiB"
        )
    return int(float(match[1]) * UNITS[match[2]])
