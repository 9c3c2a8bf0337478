"""Find people in a gallery, by sentences, by pictures, or by both.

    python search.py find "a woman in a yellow dress" --gallery galleries/campus --top 20
    python search.py find "a man in red" "with a dog" --weight 1 0.5 --minus "a backpack" \\
        --gallery galleries/campus --where "view = 'aerial' and frame_time >= 12.5"
    python search.py find --like crop.jpg --gallery galleries/campus --json
    python search.py find --like 8127364519 --other_view --gallery galleries/campus
    python search.py find "a man in red" --gallery galleries/campus --onnx exported
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gallery import where
from gallery.encoders import encoder_of
from gallery.hits_table import hits_table
from gallery.index import INDEX, open_index
from gallery.milvus import FORM, STORE_HELP, store_option
from gallery.onnx import OnnxEncoder
from gallery.query import (
    COLLAPSE,
    LOOKED,
    UNWANTED,
    Hit,
    Search,
    as_json,
    combine,
    find_hits,
    sureness,
)
from gallery.rerank import RERANKED, rerank
from gallery.store import Gallery
from utils.console import say
from utils.errors import UserError
from utils.files import path_option
from utils.text import visible

if TYPE_CHECKING:
    from gallery.encode import Encoder


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help="who is looked for")
    add("--gallery", required=True, type=path_option, metavar="FOLDER", help="the gallery")
    add("--encoder", type=path_option, metavar="PATH",
        help="where the gallery's encoder is now, if it was moved")  # fmt: skip
    add("--onnx", type=path_option, metavar="FOLDER",
        help="ask with the encoder in ONNX (tools/export.py --onnx), without torch (default: the "
        "folder with which the gallery was made, if it was made so)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for train.py")
    group = parser.add_argument_group("Query")
    add = group.add_argument
    add("--minus", nargs="+", default=[], metavar="SENTENCE", help="what is not looked for")
    add("--like", nargs="+", default=[], metavar="PICTURE|ID",
        help="more like these: files of pictures of a person, or people of the gallery by their "
        "ids or paths, who are then no hits themselves")  # fmt: skip
    add("--other_view", action="store_true",
        help="only other views than that of the gallery's person whom --like names")  # fmt: skip
    add("--weight", nargs="+", type=float, default=[], metavar="WEIGHT",
        help="weights of the sentences, of --minus and of --like, in this order (default: 1, "
        f"{UNWANTED} for --minus)")  # fmt: skip
    group = parser.add_argument_group("Hits")
    add = group.add_argument
    add("--where", default="", metavar="FILTER",
        help="only people for whom this holds, such as \"view = 'aerial' and left > 100\"; "
        "operators: = != < <= > >= in like, is null, and, or, not (columns: info)")  # fmt: skip
    add("--top", type=int, default=20, metavar="INT", help="number of hits (default: 20)")
    add("--collapse", type=_cosine, default=COLLAPSE, metavar="COSINE|off",
        help="pictures of one video or folder, and of one view, camera and source, at most two "
        "seconds apart (by the video, by EXIF, or else by the files' times) and at least this near "
        f"each other, are one hit; off: the raw ranking (default: {COLLAPSE})")  # fmt: skip
    add("--rerank", action="store_true",
        help=f"rank the first {RERANKED} hits again by the neighbours that they share, which takes "
        "3 ms on one core, and 3 MB; the scores shown stay the cosines")  # fmt: skip
    add("--json", action="store_true", help="print each hit as a line of JSON")
    add("--sheet", type=path_option, metavar="FILE",
        help="also write the hits with their pictures, into a .png or .html")  # fmt: skip
    add("--heat", action="store_true",
        help="--sheet: also show where in each picture the first sentence is seen")  # fmt: skip
    add("--store", type=store_option, metavar=FORM,
        help=f"search the gallery's copy there, made by index --store. {STORE_HELP}")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the hits. Raises UserError."""
    _check(args)
    gallery = Gallery.open(args.gallery)
    if not len(gallery.items):
        raise UserError(f"--gallery {args.gallery}: nobody is in it yet")
    pictures = [_picture(text, gallery) for text in args.like]
    part = _filter(args, gallery, pictures)
    mask = None if part is None else where.to_mask(part, gallery.items)
    # Before the model is loaded, which takes seconds.
    search = _search(args.store, gallery, part, mask)
    needs_model = args.sentences or args.minus or any(p.row is None for p in pictures)
    encoder = None
    if needs_model:
        encoder = encoder_of(gallery.manifest, args.encoder, args.onnx, args.device)
        if args.heat and isinstance(encoder, OnnxEncoder):
            raise UserError("--heat: heat maps need torch and the run: give --encoder, not --onnx")
    query_D = _query(args, gallery, encoder, pictures)
    hits = find_hits(
        search,
        gallery.items,
        gallery.features,
        query_D,
        max(args.top, LOOKED),
        args.collapse,
        rerank if args.rerank else None,
    )
    for line in _lines(args, gallery, mask, query_D, hits):
        say(line)
    if args.sheet and hits:
        _write_sheet(args, gallery, encoder, hits[: args.top])


def _write_sheet(
    args: argparse.Namespace,
    gallery: Gallery,
    encoder: Encoder | OnnxEncoder | None,
    hits: list[Hit],
) -> None:
    from gallery.sheet import sheet

    heat = None
    if args.heat and encoder and not isinstance(encoder, OnnxEncoder):
        from gallery.heatmap import heat_maps

        (text_D,) = encoder.encode_text(args.sentences[:1])
        heat = partial(heat_maps, encoder.run.model, text_D=text_D.to(encoder.run.device))
    query = " + ".join(args.sentences) or f"more like {', '.join(args.like)}"
    root = gallery.manifest["root"]
    missing = sheet(hits, args.sheet, root, query=query, heat=heat, whole=True)
    say(f"wrote {visible(args.sheet)}", sys.stderr)  # with --json, stdout has lines of JSON alone
    if missing:
        text = (
            f"{len(missing)} of {len(hits)} hits have no picture there: "
            f"{missing[0].removesuffix(' Replace the file.').removesuffix('.')}; if the pictures "
            "were moved, give --root at the next index"
        )
        say(visible(text), sys.stderr)


@dataclass(frozen=True)
class _Picture:
    """What --like names: an item of the gallery by its row, or a file."""

    row: int | None
    path: str


def _check(args: argparse.Namespace) -> None:
    parts = [*args.sentences, *args.minus, *args.like]
    if args.minus and not args.sentences and not args.like:
        raise UserError(
            "nobody is looked for: put sentences before --minus, which takes all that follow it"
        )
    if not args.sentences and not args.like:
        raise UserError("nobody is looked for: give a sentence, or --like with a picture or an id")
    if args.onnx and args.encoder:
        raise UserError("--onnx and --encoder: two encoders; give one of them")
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1")
    if args.weight and len(args.weight) != len(parts):
        raise UserError(
            f"--weight: {len(args.weight)} weights, but the query has {len(parts)} sentences and "
            "pictures; give one for each"
        )
    for weight in args.weight:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"--weight {weight:g}: must be above 0; what is not wanted goes to --minus"
            )
    if any(not text.strip() for text in (*args.sentences, *args.minus)):
        raise UserError("a sentence is empty")
    for option, texts in (("", args.sentences), ("--minus ", args.minus)):
        if len(texts) > 1 and all(len(text.split()) == 1 for text in texts):
            words = " ".join(texts)
            raise UserError(
                f"{option}{words}: {len(texts)} sentences of one word each; put quotes around a "
                f'sentence: {option}"{words}"'
            )
    if args.sheet and args.sheet.suffix.lower() not in (".png", ".html"):
        raise UserError(f"--sheet {args.sheet}: give a name that ends in .png or .html")
    if args.sheet and not args.sheet.parent.is_dir():
        raise UserError(f"--sheet {args.sheet}: no such folder: {args.sheet.parent}; make it first")
    if args.heat and not (args.sheet and args.sentences):
        raise UserError("--heat: needs --sheet and a sentence")


def _cosine(text: str) -> float | None:
    if text == "off":
        return None
    with suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is neither off nor a cosine above 0 and at most 1")


def _picture(text: str, gallery: Gallery) -> _Picture:
    if text.isascii() and text.isdecimal() and len(text) < 20:
        rows = np.flatnonzero(gallery.items["id"].to_numpy() == int(text))
        if len(rows):
            return _Picture(int(rows[0]), text)
    if Path(text).is_file():
        return _Picture(None, text)
    same = [n for n, path in enumerate(gallery.items["path"].to_pylist()) if path == text]
    if len(same) > 1:
        ids = [str(gallery.items["id"][row]) for row in same]
        raise UserError(
            f"--like {text}: {len(ids)} people are in it; give the id of one: "
            f"{', '.join(ids[:8])}{', ...' * (len(ids) > 8)}"
        )
    if not same:
        raise UserError(
            f"--like {text}: neither a file, nor an id or a path of somebody in {gallery.folder}"
        )
    return _Picture(same[0], text)


def _filter(
    args: argparse.Namespace, gallery: Gallery, pictures: list[_Picture]
) -> where.Filter | None:
    """--where, without the people of --like, and without their views if asked."""
    parts = [where.parse(args.where, gallery.items.schema)] if args.where else []
    for note in where.unknown_values(parts[0], gallery.items) if parts else ():
        say(visible(f"--where: {note}"), sys.stderr)
    rows = [picture.row for picture in pictures if picture.row is not None]
    if args.other_view and not rows:
        raise UserError("--other_view: give --like the id or path of a person of the gallery")
    for row in rows:
        item = gallery.items.slice(row, 1).to_pylist()[0]
        parts.append(where.Comparison("id", "!=", item["id"]))
        if args.other_view:
            if item["view"] is None:
                raise UserError(f"--other_view: the view of {item['id']} is not known")
            parts.append(where.Comparison("view", "!=", item["view"]))
    return where.all_of(parts)


def _query(
    args: argparse.Namespace,
    gallery: Gallery,
    encoder: Encoder | OnnxEncoder | None,
    pictures: list[_Picture],
) -> np.ndarray:
    """The query's feature [D]."""
    sentences, features = [*args.sentences, *args.minus], []
    if encoder and sentences:
        features += list(np.asarray(encoder.encode_text(sentences)))
    for picture in pictures:
        if picture.row is not None:
            features.append(gallery.features[picture.row].astype(np.float32))
        elif encoder:
            features.append(np.asarray(encoder.encode_image([picture.path]))[0])
    signs = [1] * len(args.sentences) + [-1] * len(args.minus) + [1] * len(pictures)
    weights = args.weight or [UNWANTED if sign < 0 else 1.0 for sign in signs]
    signed = [sign * weight for sign, weight in zip(signs, weights, strict=True)]
    return combine(np.stack(features), signed)


def _search(
    store: str | None, gallery: Gallery, part: where.Filter | None, mask: np.ndarray | None
) -> Search:
    """The search of `find_hits` in the gallery itself, or in its copy, with a filter, which is
    given as a mask too."""
    if store:
        from gallery.copies import CopyIndex

        return partial(CopyIndex(gallery, store).search, where=part)
    index = open_index(gallery.items, gallery.features, gallery.folder / INDEX)
    return partial(index.search, mask=mask)


def _lines(
    args: argparse.Namespace,
    gallery: Gallery,
    mask: np.ndarray | None,
    query_D: np.ndarray,
    hits: list[Hit],
) -> list[str]:
    """What is printed: --top hits as a table or as JSON, and how much the first stands out."""
    shown = hits[: args.top]
    if args.json:
        return [json.dumps(as_json(hit)) for hit in shown]
    if not hits:
        return ["no hits: the filter keeps nobody"]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sure = sureness(gallery.features, query_D, hits, mask)
    return [hits_table(shown, args.collapse is not None, width), str(sure)]
