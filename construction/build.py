"""The stages in their order: from the recipe to the data set.

Every run starts from the first stage. Stages that are cheap are computed anew; measures, answers and
scores come from the store as far as they are there. So a run that was killed goes on where it was,
and the result depends on nothing but the recipe, the pictures and the answers.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from construction.attributes import check_recipe, label_identity
from construction.balance import overflow, pair
from construction.captions import write_captions
from construction.card import write_card
from construction.quality import VERSION, judge, limits_of, measure_file, repetitions
from construction.recipe import Recipe
from construction.records import VIEWS, Candidate, Measure, Picture
from construction.sources import READERS
from construction.splits import held_out, split_people
from construction.store import Store, key_of
from construction.table import Table
from construction.writing import MANIFEST, Writer, check_layout
from utils.attributes import read_attributes
from utils.console import say
from utils.errors import UserError
from utils.files import lock

BATCH = 2000  # files that are measured before their measures are kept
UNTIL = ("measure", "captions")


class Build:
    """One construction.

    Args:
        paths: by reader ("ag_reid", "g2aps", "table"), where its source is.
        output: the data set's folder. The work folder is `<output>.work`.
        shard: (k, n): this process does share k of n of the measures and captions, from 1.
        workers: processes that measure.
    """

    def __init__(
        self,
        recipe: Recipe,
        paths: dict[str, Path],
        output: Path,
        shard: tuple[int, int] = (1, 1),
        workers: int = 1,
    ) -> None:
        self.recipe, self.paths, self.output = recipe, paths, output
        self.shard, self.workers = shard, workers
        self.work = output.with_name(f"{output.name}.work")
        self.name = "all" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}"
        self.attributes = read_attributes(recipe.attributes_file)
        self.notes: list[str] = []  # for the data card
        missing = {source.reader for source in recipe.sources} - set(paths)
        if missing:
            option = {"table": "images"}.get(first := min(missing), first)
            raise UserError(f"the recipe has a source of {first}: give its place by --{option}")
        check_recipe(recipe, self.attributes)
        check_layout(recipe, self.attributes)

    def run(self, until: str = "") -> None:
        """All stages, or those up to "measure" or "captions". Raises UserError."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock(self.work, name=f"lock-{self.name}")
        with Store(self.work / "store", self.name) as store:
            table = Table(self.work / f"table-{self.name}.sqlite")
            self._sources(table)
            self._measure(table, store)
            if until == "measure":
                say(f"share {self.name} of the measures is kept in {store.path}")
                return
            self._quality(table)
            self._balance(table)
            self._label(table, store)
            self._captions(table, store)
            if until == "captions":
                say(f"share {self.name} of the captions is kept in {store.path}")
                return
            self._write(table)
            table.close()

    def _sources(self, table: Table) -> None:
        by_split = self.recipe.splits.by == "source"
        for source in self.recipe.sources:
            pictures = READERS[source.reader](self.paths[source.reader], source)
            table.add(tqdm(pictures, desc=f"read {source.name}", unit="picture", disable=None))
        removed = (
            (number, "no identity", "") if not picture.identity else (number, "no split", "")
            for _, group in table.frames()
            for number, picture in group
            if not picture.identity or (by_split and not picture.split)
        )
        table.remove("sources", list(removed))
        kept = table.count("pictures") - table.count("removed")
        say(f"sources: {table.count('pictures')} pictures, {kept} with an identity")
        if not kept:
            raise UserError("none of the sources has a picture with an identity")

    def _measure(self, table: Table, store: Store) -> None:
        """Measure what no earlier run has measured."""
        k, n = self.shard
        crops = self.work / "crops"
        measure = partial(_measure_group, crops=str(crops))
        total = table.count("pictures") - table.count("removed")
        bar = tqdm(total=total, desc="measure", unit="picture", disable=None)
        pool = (
            ProcessPoolExecutor(self.workers, get_context("spawn"))
            if self.workers > 1
            else nullcontext()
        )
        measures: list[tuple[int, Measure]] = []
        frames = table.frames()
        with bar, pool as executor:
            while batch := list(islice(frames, BATCH)):
                todo = []
                for file, group in batch:
                    key = _measure_key(file, [picture for _, picture in group])
                    kept = store.get("measure", key)
                    found = [Measure(*values) for values in kept or ()]
                    # A crop that has been deleted is cut again.
                    if kept is None or not all(m.problem or os.path.exists(m.file) for m in found):
                        if int(key[:8], 16) % n == k - 1:
                            todo.append((key, file, group))
                        continue
                    measures += zip((number for number, _ in group), found, strict=True)
                    bar.update(len(group))
                jobs = [(file, [picture for _, picture in group]) for _, file, group in todo]
                try:
                    run = executor.map(measure, jobs, chunksize=8) if executor else map(measure, jobs)
                    done = []
                    for (key, _, group), result in zip(todo, run, strict=True):
                        done.append((key, result))
                        measures += zip((number for number, _ in group), result, strict=True)
                        bar.update(len(group))
                except BrokenProcessPool:
                    raise UserError(
                        "a process that measures was killed, probably for its memory; give fewer "
                        "--workers, and run the same command again"
                    ) from None
                store.put("measure", done)
        table.set_measures(measures)
        missing = total - len(measures)
        if missing and n == 1:
            raise UserError(f"{missing} pictures were not measured")  # cannot happen

    def _quality(self, table: Table) -> None:
        recipe = self.recipe.quality
        sharpness = {
            (source.name, view): table.column("sharpness", source.name, view)
            for source in self.recipe.sources
            for view in VIEWS
        }
        limits = {
            source.name: limits_of(recipe, {v: sharpness[source.name, v] for v in VIEWS})
            for source in self.recipe.sources
        }
        self.limits = limits
        removed = []
        for candidate in table.candidates():
            least = limits[candidate.picture.source][candidate.picture.view]
            if reason := judge(candidate.measure, least, recipe):
                removed.append((candidate.number, *reason))
        table.remove("quality", removed)
        repeated = []
        if recipe.repeated is not None:
            for group in table.identities(self._by_split):
                for view in VIEWS:
                    pictures = [c for c in group if c.picture.view == view]
                    names = {c.number: c.picture.name for c in pictures}
                    for number, (other, distance) in repetitions(pictures, recipe.repeated).items():
                        detail = f"{distance} of 64 bits from {names[other]}"
                        repeated.append((number, "repeated", detail))
            table.remove("quality", repeated)
        _report("quality", [*removed, *repeated], table)

    def _balance(self, table: Table) -> None:
        """Balance the views of each identity, split the persons, and make pairs."""
        removed: list[tuple[int, str, str]] = []
        for group in table.identities(self._by_split):
            aerial, ground = _by_view(group)
            if not aerial or not ground:
                view = "ground" if aerial else "aerial"
                removed += [(c.number, "one view", f"the identity has no {view} picture") for c in group]
                continue
            extra = overflow(aerial, ground, self.recipe.balance)
            counts = f"{len(aerial)} aerial, {len(ground)} ground pictures"
            removed += [(number, "overflow", counts) for number in sorted(extra)]
        table.remove("balance", removed)
        _report("balance", removed, table)
        split_of = self._split_people(table)
        pairs = []
        for group in table.identities(self._by_split):
            picture = group[0].picture
            part = picture.split if self._by_split else ""
            split = split_of[picture.source, picture.person, part]
            for aerial, ground in pair(*_by_view(group), self.recipe.balance):
                pairs.append((split, aerial.number, ground.number))
        table.add_pairs(pairs)
        counts = Counter(split for split, *_ in pairs)
        say("pairs: " + ", ".join(f"{counts[s]} {s}" for s in ("train", "val", "test")))

    def _split_people(self, table: Table) -> dict[tuple[str, str, str], str]:
        """The split of each (source, person, split of the source)."""
        recipe, seed = self.recipe.splits, self.recipe.seed
        split_of: dict[tuple[str, str, str], str] = {}
        for source, rows in groupby(table.people(), key=lambda row: row[0]):
            people = [(person, split) for _, person, split, _ in rows]
            names = list(dict.fromkeys(person for person, _ in people))
            if recipe.by == "person":
                of = split_people(names, recipe, seed, source)
                split_of |= {(source, person, ""): split for person, split in of.items()}
                continue
            train, test = ([p for p, s in people if s == split] for split in ("train", "test"))
            has_val = any(split == "val" for _, split in people)
            val = set() if has_val else held_out(train, test, recipe, seed, source)
            for person, split in people:
                new = "val" if split == "train" and person in val else split
                split_of[source, person, split] = new
            both = sorted(set(train) & set(test))
            if both:
                self.notes.append(
                    f"{source}: its own splits are used, and {len(both)} of the {len(set(test))} "
                    f"persons of test are in train too, such as {both[0]}"
                )
        return split_of

    def _label(self, table: Table, store: Store) -> None:
        if self.recipe.attributes:
            label_identity  # noqa: B018
            raise NotImplementedError

    def _captions(self, table: Table, store: Store) -> None:
        raise NotImplementedError

    def _write(self, table: Table) -> None:
        table.finish()
        unfinished = self.output.with_name(f"{self.output.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            writer = Writer(unfinished, table, self.recipe, self.attributes)
            total = sum(1 for _ in table.written())
            for _ in tqdm(writer.pictures(), total=total, desc="write", disable=None):
                pass
            writer.annotations()
            write_card(unfinished, table, self.recipe, self.notes)
            writer.manifest()
            os.rename(unfinished, self.output)
        except OSError as error:
            raise UserError(
                f"{self.output}: could not be written: {error.filename or unfinished}: "
                f"{error.strerror or error}; what was paid for is kept in {self.work}"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @property
    def _by_split(self) -> bool:
        return self.recipe.splits.by == "source"
