"""One or several runs as one HTML file that needs nothing else: curves, tables, ranked pictures.

    python tools/report.py logs/AGDataAttr/<run> [more runs] --output report.html

Runs must have been evaluated (test.py). For each: its figures, curves of losses and metrics, recall
against rank, FIRM's accuracy per attribute, all options, and for each gallery of the test split
sheets of captions with their ten best images, hits framed green and misses red: the worst failures
and random ones. --root_dir says where the data set lies if it has moved.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from datasets.registry import read_for_test
from datasets.transforms import read_image
from model.build import build_evaluation_model
from processor.evaluator import Evaluator
from processor.queries import check_figures, read_queries, read_results
from utils.checkpoint import load_checkpoint
from utils.command_line import parse_test_options
from utils.devices import choose_device, choose_precision
from utils.errors import UserError, run_main
from utils.files import expand, path_option, write_atomically
from utils.logger import say
from utils.metrics import FIGURES
from utils.options import OPTIONS
from utils.runs import EVENTS
from utils.text import visible

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
THUMBNAIL = 120  # pixels high
DIGITS = len(EVENTS.format(0)) - 1  # of the number at the end of a file of curves
STYLE = """
:root { color-scheme: light dark; --line: #8884; --hit: #16a34a; --miss: #dc2626; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
figure { margin: 0; } figcaption { font-weight: 600; }
.query { border-bottom: 1px solid var(--line); padding: .6rem 0; }
.row { display: flex; gap: .3rem; overflow-x: auto; padding-bottom: .3rem; }
.row img { height: 120px; border: 4px dashed var(--miss); border-radius: 4px; }
.row img.hit { border: 4px solid var(--hit); }
details > summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
"""


@dataclass
class Run:
    """What a run's folder says."""

    folder: Path
    name: str
    results: dict
    scalars: dict[str, list[tuple[int, float]]]
    colour: str


def read_run(folder: Path, colour: str) -> Run:
    """Raises UserError if the folder is no evaluated run."""
    path = folder / "test_results.json"
    results = read_results(path, folder / "test_queries.npz")
    check_figures(results, path)
    return Run(folder, folder.name, results, read_scalars(folder), colour)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of every curve that TensorBoard has of a run, by epoch.

    A run that went on has a file of each start. TensorBoard orders them by the clock, which may
    have been put back; here by the number at the end of their names, which the trainer counts up.
    From the first epoch of a file on, what older ones say does not count; files of older versions
    have no number, and of theirs all epochs count.
    """
    files = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if not path.is_file():
            continue
        events = EventAccumulator(
            str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False
        )
        try:
            events.Reload()
            found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        except Exception as error:  # what reads a stranger's file may raise anything
            raise UserError(f"{path}: no events of TensorBoard: {error}") from None
        first = min((event.step for curve in found.values() for event in curve), default=math.inf)
        number = path.suffix.removeprefix(".")
        number = int(number) if number.isdecimal() and len(number) == DIGITS else 0
        files.append((number, first, found))
    files.sort(key=lambda file: file[0])
    older = [file for file in files if not file[0]]
    # A run begins with its first epoch. If another's file has the earlier time, a clock went back.
    if any(first < older[0][1] for _, first, _ in older):
        files.sort(key=lambda file: (file[0], 0 if file[0] else file[1]))
    curves: dict[str, dict[int, float]] = {}
    for number, first, found in files:
        for tag in (*curves, *found):
            before = {s: v for s, v in curves.get(tag, {}).items() if s < first or not number}
            curves[tag] = before | {e.step: e.value for e in found.get(tag, ())}
    return {tag: sorted(points.items()) for tag, points in curves.items()}


def escaped(text: object) -> str:
    """For HTML, with control characters and halves of characters shown by their numbers."""
    return html.escape(visible(text))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table whose cells are escaped."""

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{escaped(v)}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def round_values(low: float, high: float) -> list[float]:
    """Three to six values of 1, 2 or 5 times a power of ten between two others."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = next((s * power for s in (5, 2) if s * power <= (high - low) / 3), power)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(title: str, lines: dict[str, tuple[str, list[tuple[float, float]]]], xlabel: str) -> str:
    """An SVG line chart. lines: name -> (colour, points); empty if there is nothing to draw. Points
    that are NaN or infinite leave a gap."""
    if not any(line for _, line in lines.values()):
        return ""
    points = [p for _, line in lines.values() for p in line if math.isfinite(p[1])]
    if not points:
        text = f"{escaped(title)}</figcaption>no finite value"
        return f"<figure><figcaption>{text}</figure>"
    width, height, left, bottom, top = 320, 200, 46, 30, 8
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = (v1 if v1 > v0 else v0 + max(1, abs(v0) / 1000) for v0, v1 in ((x0, x1), (y0, y1)))

    def place(x: float, y: float) -> str:
        u = left + (x - x0) / (x1 - x0) * (width - left - 8)
        return f"{u:.1f},{height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top):.1f}"

    parts = []
    for value in round_values(y0, y1):
        _, v = place(x0, value).split(",")
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{v}" y2="{v}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 4}" y="{v}" dy="4" text-anchor="end">{value:.4g}</text>')
    for value, anchor in ((x0, "start"), (x1, "end")):
        u, _ = place(value, y0).split(",")
        parts.append(f'<text x="{u}" y="{height - 14}" text-anchor="{anchor}">{value:g}</text>')
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 2}" text-anchor="middle">{xlabel}</text>'
    )
    for name, (colour, line) in lines.items():
        label = escaped(name)
        gaps = itertools.groupby(line, key=lambda point: math.isfinite(point[1]))
        for stretch in [list(found) for finite, found in gaps if finite]:
            path = " ".join(place(x, y) for x, y in stretch)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2">'
                f"<title>{label}</title></polyline>"
            )
            for x, y in stretch if len(line) <= 60 or len(stretch) == 1 else ():
                u, v = place(x, y).split(",")
                parts.append(
                    f'<circle cx="{u}" cy="{v}" r="2.5" fill="{colour}">'
                    f"<title>{label}: {y:.4g} at {x:g}</title></circle>"
                )
    keys = " ".join(
        f'<span class="key" style="background:{colour}"></span>{escaped(name)}{_not_finite(line)}'
        for name, (colour, line) in lines.items()
    )
    return (
        f"<figure><figcaption>{escaped(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>{keys}</figure>'
    )


def _not_finite(line: Sequence[tuple[float, float]]) -> str:
    """How many of a line's points are not drawn, or nothing."""
    count = sum(not math.isfinite(y) for _, y in line)
    return f" ({count} of {len(line)} points are not finite)" if count else ""


def curves(runs: Sequence[Run]) -> str:
    """Every scalar that TensorBoard has, the runs side by side."""
    tags = list(dict.fromkeys(tag for run in runs for tag in run.scalars))
    charts = [
        plot(tag, {r.name: (r.colour, r.scalars[tag]) for r in runs if tag in r.scalars}, "epoch")
        for tag in tags
    ]
    return f'<div class="plots">{"".join(charts)}</div>'


def recall_curves(runs: Sequence[Run], most: int = 50) -> str:
    """Share of captions with a match among the first k images, by gallery."""
    charts = []
    for gallery in runs[0].results["splits"]["test"]["galleries"]:
        lines = {}
        for run in runs:
            if gallery in run.results["splits"]["test"]["galleries"]:
                ranked = read_queries(run.folder / "test_queries.npz", "test", gallery)
                first = ranked.rows_Q3[:, 0]
                first = first[~first.isnan()]
                share = [(k, 100 * (first <= k).double().mean().item()) for k in range(1, most + 1)]
                lines[run.name] = (run.colour, share)
        charts.append(plot(f"recall, {gallery}, %", lines, "images looked at"))
    return f'<div class="plots">{"".join(charts)}</div>'


def protocols(runs: Sequence[Run]) -> str:
    """How each run's checkpoint was chosen, and whether its data is what it was."""
    lines = []
    for run in runs:
        text = run.results.get("protocol", {}).get("text", "How it was chosen was not recorded.")
        changed = run.results.get("data", {}).get("changed") or {}
        told = [f"{split} is not what it was in training: {how}." for split, how in changed.items()]
        lines.append(f"<li>{escaped(' '.join([f'{run.name}: {text}', *told]))}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def figures_table(runs: Sequence[Run]) -> str:
    """Every run, split and gallery."""
    rows = []
    for run in runs:
        for split, content in run.results["splits"].items():
            for gallery, r in content["galleries"].items():
                values = [f"{r[k]:.2f}" for k in ("r1", "r5", "r10", "mAP", "mINP")]
                rows.append(
                    [run.name, run.results.get("epoch"), split, gallery, r["queries"], r["gallery"]]
                    + values
                )
    head = ["run", "epoch", "split", "gallery", "captions", "images", *FIGURES]
    return table(head, rows)


def attributes_table(run: Run) -> str:
    accuracy = run.results["splits"]["test"].get("attribute_accuracy")
    if not accuracy:
        return ""
    views = list(next(iter(accuracy.values())))
    rows = [[name, *(f"{row[v]:.1f}" for v in views)] for name, row in accuracy.items()]
    return "<h3>FIRM's accuracy per attribute, %</h3>" + table(["attribute", *views], rows)


def thumbnail(path: str) -> str:
    """A small JPEG as a data address."""
    image = read_image(path)
    image.thumbnail((THUMBNAIL * 2, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def best_images(
    caption_CD: Tensor, image_GD: Tensor, most: int = 10
) -> tuple[list[list[float]], list[list[int]]]:
    """Of every caption the cosines of its best images, best first, and their positions."""
    similarity_CG = F.normalize(caption_CD, dim=1) @ F.normalize(image_GD, dim=1).T
    found = similarity_CG.topk(min(most, len(image_GD)), dim=1)
    return found.values.tolist(), found.indices.tolist()


@torch.no_grad()
def sheets(run: Run, given: argparse.Namespace) -> str:
    """For each view: captions with their ten best images, the worst failures and random ones."""
    words = ["--config_file", str(run.folder / "configs.yaml"), "--device", given.device]
    words += ["--root_dir", given.root_dir] if given.root_dir else []
    words += ["--attributes_file", given.attributes_file] if given.attributes_file else []
    args, path, _ = parse_test_options([*words, "--num_workers", "0"])
    device = choose_device(args.device)
    args.precision = choose_precision(args.precision, device)
    model = build_evaluation_model(args, load_checkpoint(path), str(path)).to(device)
    evaluator = Evaluator(read_for_test(args)[0], "test", args, device)
    features, split = evaluator.encode(model), evaluator.split
    views = {
        view: (features.views[view], gallery.images, gallery.pids)
        for view, gallery in evaluator.views.items()
    }
    if len(views) > 1:
        every, images, pids = zip(*views.values(), strict=True)
        views[" + ".join(views)] = (torch.cat(every), sum(images, []), sum(pids, []))
    caption_pids = torch.tensor(split.caption_pids)
    parts = []
    for name, (image_GD, images, gallery_pids) in views.items():
        if name not in run.results["splits"]["test"]["galleries"]:
            continue  # no caption has a match there
        ranked = read_queries(run.folder / "test_queries.npz", "test", name)
        if ranked.pids_Q.tolist() != split.caption_pids or ranked.gallery not in (0, len(images)):
            raise UserError(
                f"{run.folder}: {name} has other captions or images in test_queries.npz than in "
                f"{args.root_dir}; evaluate the run again (test.py), or give its own --root_dir"
            )
        first = ranked.rows_Q3[:, 0].nan_to_num(0)
        worst = first.argsort(descending=True)[: given.queries].tolist()
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0)).tolist()
        for title, chosen in (("worst", worst), ("random", order[: given.queries])):
            rows = []
            # Only those that are shown are compared: memory grows with them, not with the test set.
            found_CK = best_images(features.captions[chosen], image_GD)
            for q, *best_K in zip(chosen, *found_CK, strict=True):
                shown = "".join(
                    f'<img class="{"hit" if gallery_pids[g] == caption_pids[q] else "miss"}" '
                    f'alt="rank {k}" title="rank {k}, similarity {similarity:.3f}" '
                    f'src="{thumbnail(images[g].path)}">'
                    for k, (similarity, g) in enumerate(zip(*best_K, strict=True), 1)
                )
                rank = f"first match at rank {int(first[q])}" if first[q] else "no match in gallery"
                rows.append(
                    f'<div class="query">{escaped(split.captions[q])} <small>({rank} of '
                    f'{len(images)})</small><div class="row">{shown}</div></div>'
                )
            opened = " open" if not parts else ""
            parts.append(
                f"<details{opened}><summary>{escaped(name)}: {len(rows)} {title} captions"
                f"</summary>{''.join(rows)}</details>"
            )
    return "".join(parts)


def options_table(run: Run) -> str:
    args, _, _ = parse_test_options(["--config_file", str(run.folder / "configs.yaml")])
    rows = [[name, getattr(args, name), "" if getattr(args, name) == o.default else "changed"]
            for name, o in OPTIONS.items()]  # fmt: skip
    return (
        f"<details><summary>All options</summary>{table(['option', 'value', ''], rows)}</details>"
    )


def report(runs: Sequence[Run], given: argparse.Namespace) -> str:
    """The whole page."""
    parts = [
        "<h2>Figures</h2>", protocols(runs), figures_table(runs),
        "<h2>Recall against rank, test</h2>", recall_curves(runs),
        "<h2>Training</h2>", curves(runs),
    ]  # fmt: skip
    for run in runs:
        parts += [f"<h2>{escaped(run.name)}</h2>", attributes_table(run), options_table(run)]
        if given.queries:
            parts += ["<h3>Captions and their ten best images</h3>", sheets(run, given)]
    title = " and ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escaped(title)}</h1>{''.join(parts)}</body></html>"
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
    parser.add_argument("--device", default="auto", choices=OPTIONS["device"].choices)
    given = parser.parse_args()
    if given.queries < 0:
        raise UserError(f"--queries {given.queries}: must be 0 or more")
    runs = [read_run(f, COLOURS[i % len(COLOURS)]) for i, f in enumerate(given.runs)]
    page = report(runs, given)
    write_atomically(given.output, lambda file: file.write(page.encode()))
    say(visible(f"wrote {given.output}, {len(page) / 2**20:.1f} MiB"))


if __name__ == "__main__":
    run_main(main)
