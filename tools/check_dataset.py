"""Read a complete data set, every image and caption, and report what is wrong with it.

    python tools/check_dataset.py --dataset_name AGDataAttr --root_dir path_to_dataset/TBAGPR

Exit status: 0 if it is fit for training and a fair evaluation, 1 if not (an image cannot be read,
a picture or an identity is in two splits), 2 if the data set cannot be read. A finding that may be
intended is a warning; with --strict, warnings fail too.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.images import read_image
from datasets.overlap import overlap
from datasets.records import Data, Image
from datasets.registry import read_dataset
from utils.attributes import check_labels, read_attributes
from utils.command_line import parse_some
from utils.console import say
from utils.errors import UserError, run_main
from utils.machine import allow_open_files, cores
from utils.tables import console
from utils.text import visible
from utils.tokenizer import tokenizer

SHOWN = 5  # examples of each finding
# What descriptions of people do not contain, but captions written by a program sometimes do.
CODE = re.compile(r"[{}<>\\=_`|]|https?:|\b(def|import|lambda|null|nan|undefined)\b")


class Caption(NamedTuple):
    text: str
    pid: int
    where: str


@dataclass
class Part:
    """A split as the checks see it."""

    captions: list[Caption]
    images: list[Image]  # of all views
    pids: set[int]
    views: dict[str, int]


@dataclass
class Report:
    """The findings: (fails, title, examples)."""

    findings: list[tuple[bool, str, list[str]]] = field(default_factory=list)

    def add(self, fails: bool, title: str, examples: Iterable[str]) -> None:
        examples = list(examples)
        if examples:
            self.findings.append((fails, title, examples))

    def failed(self, strict: bool) -> bool:
        return any(fails or strict for fails, _, _ in self.findings)

    def __str__(self) -> str:
        """Lines of text, in which text from the data set's files is escaped: it adds no line."""
        lines = []
        for fails, title, examples in self.findings:
            lines.append(f"{'FAIL' if fails else 'warning'}: {visible(title)}: {len(examples)}")
            lines += [f"    {visible(example)}" for example in examples[:SHOWN]]
            if len(examples) > SHOWN:
                lines.append(f"    ... and {len(examples) - SHOWN} more")
        return "\n".join(lines)


def parts_of(data: Data) -> dict[str, Part]:
    """Train, val and test, by name."""
    samples = data.train
    images: dict[str, list[Image]] = {view: [] for view in data.views}
    for sample in samples:
        for view, image in zip(data.views, sample.images, strict=True):
            images[view].append(image)
    images = {view: list(dict.fromkeys(of_view)) for view, of_view in images.items()}
    parts = {
        "train": Part(
            # An entry gives several samples if its images are paired in several ways.
            list(dict.fromkeys(Caption(s.caption, s.pid, s.entry) for s in samples)),
            [image for of_view in images.values() for image in of_view],
            {s.pid for s in samples},
            {view: len(of_view) for view, of_view in images.items()},
        )
    }
    for name, split in data.splits.items():
        pairs = zip(split.captions, split.caption_pids, strict=True)
        captions = [Caption(t, p, f"{name}, caption {i}") for i, (t, p) in enumerate(pairs)]
        views = {view: gallery.images for view, gallery in split.galleries.items()}
        parts[name] = Part(
            captions,
            [image for images in views.values() for image in images],
            {*split.image_pids, *split.caption_pids},
            {view: len(images) for view, images in views.items()},
        )
    for part in parts.values():
        part.views |= Counter(
            data.image_views[i.path] for i in part.images if i.path in data.image_views
        )
    return parts


class _ImageCheck(Dataset[tuple[str, int]]):
    """Decodes each image: (problem or "", shorter side in pixels)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        path = self.paths[index]
        try:
            return "", min(read_image(path).size)
        except UserError as error:
            return str(error), 0


def check_images(parts: dict[str, Part], smallest: int, workers: int, report: Report) -> None:
    """Report files that cannot be read, and tiny images."""
    paths = list(dict.fromkeys(image.path for part in parts.values() for image in part.images))
    loader = DataLoader(_ImageCheck(paths), 64, num_workers=workers, collate_fn=list)
    broken, tiny = [], []
    bar = tqdm(total=len(paths), desc="images", unit="image", disable=None)
    with bar:
        position = 0
        for batch in loader:
            for problem, side in batch:
                path = paths[position]
                position += 1
                if problem:
                    broken.append(problem)
                elif side < smallest:
                    tiny.append(f"{path}: {side} pixels")
            bar.update(len(batch))
    report.add(True, "images that cannot be read", broken)
    report.add(False, f"images with a side under {smallest} pixels", tiny)


def check_overlap(data: Data, report: Report) -> None:
    """Report pictures, identities and people in two splits.

    People are a warning, because AG-ReID gives a person a new identity in every session.
    """
    for one, other in combinations(("train", *data.splits), 2):
        measured, both = overlap(data, one, other), f"in both {one} and {other}"
        fix = "; choose by --val_dataset heldout" if one == "val" else ""
        report.add(True, f"pictures {both}{fix}", measured.shared_images)
        common = sorted({*data.ids.get(one, ())} & {*data.ids.get(other, ())}, key=str)
        report.add(True, f"identities {both}", map(str, common))
        people = [name for name in measured.shared_people if name.startswith("person")]
        report.add(False, f"people {both}, by their number in AG-ReID's file names{fix}", people)


def check_identities(data: Data, report: Report) -> None:
    """Report identities of an evaluation split that have only captions or only images."""
    for name, split in data.splits.items():
        missing = sorted(set(split.caption_pids) - set(split.image_pids))
        report.add(False, f"{name}: identities with captions but no image", map(str, missing))
        missing = sorted(set(split.image_pids) - set(split.caption_pids))
        report.add(False, f"{name}: identities with images but no caption", map(str, missing))


def check_captions(parts: dict[str, Part], report: Report) -> None:
    """Report captions that are too long, describe no person, or belong to two identities."""
    long, odd = [], []
    owners: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
    for name, part in parts.items():
        for caption in dict.fromkeys(part.captions):
            tokens = len(tokenizer().encode(caption.text)) + 2
            if tokens > 77:
                long.append(f"{caption.where}: {tokens} tokens: {caption.text:.60}...")
            reason = suspicious(caption.text)
            if reason:
                odd.append(f"{caption.where}: {reason}: {caption.text:.80}")
            owners[" ".join(caption.text.lower().split())][name, caption.pid] = caption.where
    report.add(False, "captions over 77 tokens, which are truncated", long)
    report.add(False, "captions that may not describe a person", odd)
    shared = [
        f"{text:.60} ({', '.join(list(entries.values())[:3])})"
        for text, entries in owners.items()
        if len(entries) > 1
    ]
    report.add(False, "captions with more than one identity", shared)


def suspicious(text: str) -> str:
    """Why a caption does not look like an English description, or ""."""
    code = CODE.search(text)
    if code:
        return f"'{code.group()}' looks like code"
    foreign = {c for c in text if c.isalpha() and not unicodedata.name(c, "").startswith("LATIN")}
    if foreign:
        return f"letters of another script ({''.join(sorted(foreign))[:8]})"
    if len(re.findall(r"[A-Za-z]+", text)) < 3:
        return "fewer than three words"
    return ""


def overview(parts: dict[str, Part]) -> str:
    """Counts per split."""
    views = list(dict.fromkeys(view for part in parts.values() for view in part.views))
    images = [f"{view.removesuffix('image').strip()} images".strip() for view in views]
    head = ["split", "identities", *images, "captions", "captions per identity"]
    rows = []
    for name, part in parts.items():
        words = sum(len(c.text.split()) for c in part.captions) / max(1, len(part.captions))
        rows.append(
            [name, len(part.pids), *(part.views.get(v, "") for v in views), len(part.captions),
             f"{len(part.captions) / len(part.pids):.1f}", f"{words:.1f}"]
        )  # fmt: skip
    return console([*head, "words per caption"], rows)


def label_balance(data: Data, parts: dict[str, Part], path: str, report: Report) -> str:
    """A table of the share of images per class of each attribute, in percent.

    Reports classes that no training image has.
    """
    rows = []
    named = {a.name: a.classes for a in read_attributes(path)}
    for column, (attribute, count) in enumerate(data.attribute_classes.items()):
        counts = {
            name: Counter(image.attributes[column] for image in part.images)
            for name, part in parts.items()
        }
        for value in range(count):
            title = dict(enumerate(named.get(attribute, ()))).get(value, value)
            shares = [100 * c[value] / c.total() for c in counts.values()]
            rows.append(["" if value else attribute, title, *(f"{s:.1f}" for s in shares)])
            if not counts["train"][value]:
                report.add(False, "classes without a training image", [f"{attribute}: {title}"])
    return console(["attribute", "class", *(f"{name}, %" for name in parts)], rows, left=2)


def main() -> None:
    names = ("dataset_name", "root_dir", "views", "attributes_file", "num_workers")

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--min_side", type=int, default=16, metavar="INT",
            help="smaller images are reported; pixels (default: 16)",
        )  # fmt: skip
        parser.add_argument(
            "--strict", action="store_true", default=False, help="warnings fail too"
        )

    args = parse_some(names, __doc__.split("\n")[0], extra)
    allow_open_files(args.num_workers)
    data = read_dataset(args)
    parts, report = parts_of(data), Report()
    say(f"{data.name} in {visible(args.root_dir)}\n{overview(parts)}")
    if data.attribute_classes:
        say(f"\n{label_balance(data, parts, args.attributes_file, report)}")
        try:
            attributes = read_attributes(args.attributes_file)
            check_labels(attributes, data.attribute_classes, data.name, args.attributes_file)
        except UserError as error:
            report.add(False, "not fit for the loss match2", [str(error)])
    if not data.ids:
        say(
            "\nIdentities are numbered per split here. So a person in two splits is found only by "
            "equal pictures, and by AG-ReID's file names."
        )
    report.add(False, "unusual entries in the files", data.warnings)
    check_images(parts, args.min_side, min(args.num_workers, cores()), report)
    check_overlap(data, report)
    check_identities(data, report)
    check_captions(parts, report)
    say(f"\n{report}" if report.findings else "")
    failed = report.failed(args.strict)
    say("FAIL" if failed else "pass" + (", with warnings" if report.findings else ""))
    sys.exit(int(failed))


if __name__ == "__main__":
    run_main(main)
