"""Write runs as one HTML file without external links: curves, tables, ranked pictures.

    python tools/report.py logs/AGDataAttr/<run> [more runs] --output report.html

Evaluate the runs first (test.py). The page shows for each run its metrics, curves of losses and
metrics, recall against rank, FIRM's accuracy per attribute, and all options. For each gallery of
the test split it shows captions with their ten best images, hits framed green and misses red: the
worst failures and random captions. With --heatmaps it also shows where in an image the caption is
seen. If the data set has moved, give its folder with --root_dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import thumbnails
from datasets.images import read_image
from datasets.records import Image, Split
from gallery.heatmap import heat_maps, overlay
from processor.inference import Run, load_run
from processor.results import read_queries
from tools._report_runs import ReportedRun, percentages, read_run
from utils.command_line import options_of_run
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import expand, path_option, write_atomically
from utils.metrics import SHOWN
from utils.options import OPTIONS
from utils.pages import render
from utils.runs import CONFIG
from utils.text import visible

# Each has a contrast of 3 or more with a white page and with a dark one.
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
THUMBNAIL = 120  # pixels high


# Ranked pictures


Thumbnail = tuple[int, str]  # width in pixels, and a data URL


class RankedPicture(NamedTuple):
    """One of a caption's best images, and its heat map."""

    path: str
    hit: bool
    label: str
    heat: Thumbnail | None = None


class Sheet(NamedTuple):
    """Captions, each with the rank of its first match and its best images."""

    title: str
    captions: list[tuple[str, str, list[RankedPicture]]]


def encode(
    run: ReportedRun, given: argparse.Namespace
) -> tuple[Run, Split, Tensor, dict[str, tuple[Tensor, list[Image], list[int]]]]:
    """Encode the test split with the run's model.

    Returns the loaded run, the split, its captions' features [C, D], and for each gallery the
    images' features [G, D], the images and their identities.
    """
    trained = load_run(
        run.folder,
        device=given.device,
        root_dir=given.root_dir or None,
        attributes_file=given.attributes_file or None,
    )
    evaluator = trained.evaluator("test")
    features = evaluator.encode(trained.model)
    views = {
        view: (features.views[view], gallery.images, gallery.pids)
        for view, gallery in evaluator.views.items()
    }
    if len(views) > 1:
        image_GD, images, pids = zip(*views.values(), strict=True)
        views[" + ".join(views)] = (torch.cat(image_GD), sum(images, []), sum(pids, []))
    return trained, evaluator.split, features.captions, views


@torch.no_grad()
def sheets(run: ReportedRun, given: argparse.Namespace) -> list[Sheet]:
    """Two sheets per gallery, of the worst failures and of random captions. Raises UserError."""
    trained, split, caption_CD, views = encode(run, given)
    made = []
    for name, (image_GD, images, pids) in views.items():
        if name not in run.results["splits"]["test"]["galleries"]:
            continue  # no caption has a match in this gallery
        ranked = read_queries(run.folder / "test_queries.npz", "test", name)
        if ranked.pids_Q.tolist() != split.caption_pids or ranked.gallery not in (0, len(images)):
            raise UserError(
                f"{run.folder}: {name} has other captions or images in test_queries.npz than in "
                f"{trained.args.root_dir}; evaluate the run again (test.py), or give the "
                "--root_dir of its data"
            )
        first = ranked.rows_Q3[:, 0].nan_to_num(0)
        worst = first.argsort(descending=True)[: given.queries].tolist()
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0)).tolist()
        for kind, chosen in (("worst", worst), ("random", order[: given.queries])):
            captions = []
            # Only shown captions are compared, so that memory does not grow with the test set.
            best_CK = best_images(caption_CD[chosen], image_GD)
            for q, similarity_K, best_K in zip(chosen, *best_CK, strict=True):
                rank = f"first match at rank {int(first[q])}" if first[q] else "no match in gallery"
                best, paths = [], [images[g].path for g in best_K]
                maps = heat_maps(trained.model, paths, caption_CD[q]) if given.heatmaps else []
                heat = dict(zip(paths, map(thumbnail, paths, maps), strict=False))
                for k, (similarity, g) in enumerate(zip(similarity_K, best_K, strict=True), 1):
                    hit = pids[g] == split.caption_pids[q]
                    label = f"{'hit' if hit else 'miss'}, identity {pids[g]}"
                    label = f"rank {k}: {label}, similarity {similarity:.3f}"
                    best.append(RankedPicture(images[g].path, hit, label, heat.get(images[g].path)))
                captions.append((split.captions[q], f"{rank} of {len(images)}", best))
            made.append(Sheet(f"{name}: {len(captions)} {kind} captions", captions))
    return made


def best_images(
    caption_CD: Tensor, image_GD: Tensor, most: int = 10
) -> tuple[list[list[float]], list[list[int]]]:
    """For each caption, the cosines and the positions of its best images, best first."""
    similarity_CG = F.normalize(caption_CD, dim=1) @ F.normalize(image_GD, dim=1).T
    best = similarity_CG.topk(min(most, len(image_GD)), dim=1)
    return best.values.tolist(), best.indices.tolist()


def thumbnail(path: str, map_HW: np.ndarray | None = None) -> Thumbnail:
    """A small JPEG of an image, under its heat map if given; `THUMBNAIL` pixels high."""
    image = read_image(path)
    image = image if map_HW is None else overlay(image, map_HW)
    image, address = thumbnails.thumbnail(image, (THUMBNAIL * 2, THUMBNAIL))
    return max(1, round(THUMBNAIL * image.width / image.height)), address


# The page


def metrics(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """A row per split, gallery and run, in this order; "best" marks the values that no other run
    exceeds on that split and gallery."""
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for split, content in run.results["splits"].items():
            for gallery, values in content["galleries"].items():
                row = {
                    "run": run.name, "epoch": run.results.get("epoch"), "split": split,
                    "gallery": gallery, "captions": values["queries"], "images": values["gallery"],
                    "values": [f"{value:.2f}" for value in percentages(values)],
                }  # fmt: skip
                places.setdefault((split, gallery), []).append(row)
    for rows in places.values():
        best = [max(column, key=float) for column in zip(*(r["values"] for r in rows), strict=True)]
        for row in rows:
            row["best"] = [
                len(rows) > 1 and a == b for a, b in zip(row["values"], best, strict=True)
            ]
    return [row for rows in places.values() for row in rows]


def options_table(run: ReportedRun) -> list[tuple[str, object, str]]:
    """Every option, its value, and "changed" unless that is the default."""
    args, _ = options_of_run(run.folder / CONFIG, {})
    values = [(name, args[name], option.default) for name, option in OPTIONS.items()]
    return [(name, value, "changed" if value != default else "") for name, value, default in values]


def report(runs: Sequence[ReportedRun], given: argparse.Namespace) -> str:
    """The page. The template escapes all inserted text, and shows control characters and unpaired
    surrogates by their numbers.

    Raises UserError if Matplotlib or jinja2 is not installed.
    """
    try:  # Matplotlib takes a second to load, so `--help` and errors come before it
        from tools import _report_charts as charts
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements.txt") from None
    recall, training = charts.recall(runs), charts.training(runs)
    by_run = [sheets(run, given) if given.queries else [] for run in runs]
    every = [sheet for of_run in by_run for sheet in of_run]
    pictures = [picture for s in every for *_, best in s.captions for picture in best]
    shown = {path: thumbnail(path) for path in sorted({picture.path for picture in pictures})}
    heat = [picture.heat for picture in pictures if picture.heat]
    longest = max((len(points) for run in runs for points in run.scalars.values()), default=0)
    return render(
        Path(__file__).parent / "templates/report.html.jinja",
        runs=runs,
        metrics=metrics(runs),
        names=SHOWN,
        recall=recall,
        training=training,
        thinned=charts.MOST if longest > charts.MOST else 0,
        options=[options_table(run) for run in runs],
        sheets=by_run,
        thumbnails=shown,
        # The page holds each picture once, even if several files have it or several sheets show it.
        numbers={thumb: n for n, thumb in enumerate(dict.fromkeys([*shown.values(), *heat]))},
        height=THUMBNAIL,
        heatmaps=bool(heat),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", default="report.html", type=path_option, help="the HTML file")
    parser.add_argument(
        "--root_dir", default="", type=expand, help="the data set's folder, if it has moved"
    )
    parser.add_argument(
        "--attributes_file", default="", type=expand, help=OPTIONS["attributes_file"].help
    )
    parser.add_argument("--queries", default=8, type=int, help="captions per sheet; 0 for none")
    parser.add_argument(
        "--heatmaps",
        action="store_true",
        default=False,
        help="add a heat map to each ranked image: where the caption is seen",
    )
    parser.add_argument("--device", default="auto", choices=OPTIONS["device"].choices)
    given = parser.parse_args()
    if given.queries < 0:
        raise UserError(f"--queries {given.queries}: must be 0 or more")
    runs = [read_run(f, COLOURS[i % len(COLOURS)]) for i, f in enumerate(given.runs)]
    page = report(runs, given).encode()
    write_atomically(given.output, lambda file: file.write(page))
    say(visible(f"wrote {given.output}, {len(page) / 2**20:.1f} MiB"))


if __name__ == "__main__":
    run_main(main)
