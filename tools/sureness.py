"""Measure how often the first hit is right, by how many fit about as well (`Sureness`).

    python -m datasets.mini --out data/mini-many --train_ids 8 --val_ids 8 --test_ids 1200
    python tools/sureness.py logs/AGDataAttr/<run> --root_dir data/mini-many

Galleries of several sizes are drawn from the people of the test split, and searched for by captions
of these people, and of as many others. A cell such as "71 (19)" is of the captions of these people
with so many near: 71 % have a right first hit; they are 19 % of the captions. The rows "not there"
are of the captions of the others, of which no hit is right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import numpy as np
import pyarrow as pa
import torch

from gallery.index import Exact, unit
from gallery.query import LOOKED, find_hits, sureness
from processor.inference import load_run
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import path_option
from utils.options import OPTIONS
from utils.tables import console

LEVELS = (2, 4, 8, 16)  # where the next level begins
HEAD = ["people", "captions", "1", "2-3", "4-7", "8-15", "16 or more"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument("--root_dir", type=path_option, help="of the data set with many people")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100, 300, 1200],
        metavar="INT", help="people in the galleries")  # fmt: skip
    parser.add_argument("--captions", type=int, default=2000, metavar="INT",
        help="captions of people who are there, for each size, at least")  # fmt: skip
    parser.add_argument("--device", default="auto", choices=OPTIONS["device"].choices)
    given = parser.parse_args()
    run = load_run(given.run, root_dir=given.root_dir, device=given.device)
    evaluator = run.evaluator("test")
    features, split = evaluator.encode(run.model), evaluator.split
    captions_QD = unit(features.captions.cpu().numpy())
    caption_pids, people = np.array(split.caption_pids), len(set(split.caption_pids))
    if not 0 < min(given.sizes) <= max(given.sizes) <= people:
        raise UserError(f"--sizes: 1 to {people}, the people of {run.args.root_dir}'s test split")
    pids = np.concatenate([split.galleries[view].pids for view in features.views])
    images = unit(torch.cat(list(features.views.values())).cpu().numpy()).astype(np.float16)
    once = np.unique(pids, return_index=True)[1]
    for heading, rows, known in (
        ("all pictures, identities known", np.arange(len(pids)), True),
        ("all pictures, identities unknown", np.arange(len(pids)), False),
        ("one picture of each", once, False),
    ):
        table: list[list[object]] = []
        for size in given.sizes:
            drawn = galleries(pids[rows], caption_pids, size, given.captions)
            found = [
                of(images[rows][mask], pids[rows][mask], captions_QD[q], caption_pids[q], known)
                for mask, q in drawn
            ]
            near_Q, right_Q, there_Q = np.concatenate(found, axis=1)
            table.append([size, *cells(near_Q, right_Q, there_Q == 1)])
            if not all(there_Q):
                table.append(["not there", *cells(near_Q, right_Q, there_Q == 0)])
        say(f"{heading}\n{console(HEAD, table)}")


def galleries(
    pids_G: np.ndarray, caption_pids_Q: np.ndarray, size: int, captions: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Galleries of random people: which pictures are in it, and captions of these people and of as
    many others; until there are so many captions of people who are there."""
    chance, done = np.random.default_rng(0), 0
    while done < captions:
        people = chance.choice(np.unique(pids_G), size, replace=False)
        there_Q = np.isin(caption_pids_Q, people)
        own, others = np.flatnonzero(there_Q), chance.permutation(np.flatnonzero(~there_Q))
        own = chance.permutation(own)[: captions - done]
        done += len(own)
        yield np.isin(pids_G, people), np.concatenate([own, others[: len(own)]])


def of(
    images_GD: np.ndarray,
    pids_G: np.ndarray,
    captions_QD: np.ndarray,
    pids_Q: np.ndarray,
    known: bool,
) -> np.ndarray:
    """For each caption [3, Q]: how many are near, whether the first hit is right, and whether its
    person is in the gallery."""
    identities = pa.array(map(str, pids_G) if known else [None] * len(pids_G), pa.string())
    items = pa.table({"id": np.arange(len(pids_G)), "identity": identities})
    search, columns = Exact(images_GD).search, []
    for query_D, pid in zip(captions_QD, pids_Q, strict=True):
        hits = find_hits(search, items, images_GD, query_D, LOOKED)
        near = sureness(images_GD, query_D, hits).near
        columns.append((near, pids_G[hits[0].row] == pid, pid in pids_G))
    return np.array(columns).T


def cells(near_Q: np.ndarray, right_Q: np.ndarray, chosen_Q: np.ndarray) -> list[object]:
    """Number of captions, and for each level the percentages of HEAD."""
    level_Q = np.digitize(near_Q, LEVELS)
    row: list[object] = [int(chosen_Q.sum())]
    for level in range(len(LEVELS) + 1):
        these = (level_Q == level) & chosen_Q
        right = f"{100 * right_Q[these].mean():.0f} " if right_Q[these].any() else ""
        row.append(f"{right}({100 * these.sum() / chosen_Q.sum():.0f})")
    return row


if __name__ == "__main__":
    run_main(main)
