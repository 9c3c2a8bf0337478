"""The stages in their order: from the recipe to the data set.

Every run starts from the first stage. Stages that are cheap are computed anew; measures, answers
and scores come from the store as far as they are there. So a run that was killed goes on where it
was, and the result depends on nothing but the recipe, the pictures and the answers.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from construction.attributes import Labeller, check_recipe
from construction.balance import overflow, pair
from construction.captions import notes, read_prompt, write_captions
from construction.card import write_card
from construction.clip import Encoder, load_encoder
from construction.endpoints import usage
from construction.measuring import measured
from construction.quality import judge, judge_sharpness, least_sharpness, repetitions
from construction.recipe import Captions, Clip, Recipe
from construction.records import SPLITS, VIEWS, Candidate, Pair, Picture, View
from construction.sources import READERS
from construction.splits import held_out, split_people
from construction.store import Store, key_of
from construction.table import Table
from construction.writing import MANIFEST, Writer
from utils.attributes import read_attributes
from utils.console import say
from utils.errors import UserError, suggest
from utils.files import lock

T = TypeVar("T")
ONE_SOURCE = {"AG-ReID": "AGTBPR", "G2APS-AG": "G2APS"}  # --dataset_name of TBAGPR's sources


class Build:
    """One construction.

    Args:
        paths: by reader ("ag_reid", "g2aps", "table"), where its source is.
        output: the data set's folder. The work folder is `<output>.work`.
        shard: (k, n): this process does share k of n of the measures and captions, from 1.
        workers: processes that measure.
        folder: of the recipe, beside which prompts may be.
    """

    def __init__(
        self,
        recipe: Recipe,
        paths: dict[str, Path],
        output: Path,
        shard: tuple[int, int] = (1, 1),
        workers: int = 1,
        folder: Path = Path(),
    ) -> None:
        self.recipe, self.paths, self.output, self.folder = recipe, paths, output, folder
        self.shard, self.workers = shard, workers
        self.output = output = Path(os.path.abspath(output))
        self.work = output.with_name(f"{output.name}.work")
        self.name = "all" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}"
        self.attributes = read_attributes(recipe.attributes_file)
        self.notes: list[str] = []  # for the data card
        self.prompts: dict[str, str] = {}  # by name, what models are asked
        self._encoder: Encoder | None = None
        readers: set[str] = {source.reader for source in recipe.sources}
        option = {"table": "images"}
        for reader in sorted(readers - set(paths)):
            name = option.get(reader, reader)
            raise UserError(f"the recipe has a source of {reader}: give its place by --{name}")
        for reader in sorted(set(paths) - readers):
            raise UserError(f"--{option.get(reader, reader)}: the recipe has no such source")
        check_recipe(recipe, self.attributes)
        rules = recipe.attributes.values()
        self.origins = {origin for rule in rules for origin in rule.origins}

    def run(self, until: str = "", force: bool = False) -> None:
        """All stages. Raises UserError.

        Args:
            until: "measure", "labels" or "captions": stop after this stage, and do only this
                process's share of it.
            force: replace a data set that is there already, when the new one is complete.
        """
        if self.output.exists() and not (force and (self.output / MANIFEST).is_file()):
            advice = "choose another folder, or replace it with --force"
            if not (self.output / MANIFEST).is_file():
                advice = "it is not a data set of this command; choose another folder"
            raise UserError(f"{self.output}: exists; {advice}")
        if until == "captions" and self.recipe.captions.by == "grammar":
            raise UserError("--until captions: a grammar writes them, which asks no model")
        if until == "labels" and not self.origins & {"model", "clip"}:
            raise UserError("--until labels: none of the recipe's origins asks a model")
        try:
            self._run(until)
        except sqlite3.Error as error:
            raise UserError(f"{self.work}: its table cannot be written: {error}") from None

    def _run(self, until: str) -> None:
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.work}: {error.strerror}") from None
        lock(self.work, name=f"lock-{self.name}")
        path = self.work / f"table-{self.name}.sqlite"
        folder, others = self.work / "store", until != "measure"
        with Store(folder, self.name, others) as store, closing(Table(path)) as table:
            if until != "measure":
                self._prepare(until)
            self._sources(table)
            self._measure(table, store)
            if until != "measure":
                self._quality(table)
                self._balance(table)
                self._pair(table)
                if until != "captions" or self.recipe.captions.by == "text":
                    self._label(table, store, self.shard if until == "labels" else (1, 1))
                if until != "labels":
                    self._captions(table, store)
            for model, used in usage(store).items():
                say(f"{model}: {used}, in all runs")
            if until:
                say(f"{self.name} of {until}: kept in {store.path}")
            else:
                self._write(table)
        path.unlink()

    def _prepare(self, until: str) -> None:
        """Read prompts and load encoders before anything that takes time. Raises UserError."""
        by = self.recipe.captions.by
        if by != "grammar":
            self.prompts[by] = read_prompt(by, self.folder, self.recipe.captions.prompt)
        if "model" in self.origins:
            self.prompts["attributes"] = read_prompt("attributes", self.folder)
        if "clip" in self.origins or (self.recipe.clip.filters and self.shard == (1, 1)):
            try:
                self._encoder = load_encoder(self.recipe.clip)
            except UserError as error:
                raise UserError(f"clip in the recipe: {error}") from None

    def _sources(self, table: Table) -> None:
        by_split = self.recipe.splits.by == "source"
        columns: set[str] = set()
        for source in self.recipe.sources:
            pictures = READERS[source.reader](self.paths[source.reader], source)
            bar = tqdm(pictures, desc=f"read {source.name}", unit="picture", disable=None)
            table.add(_noting_columns(bar, columns))
        self._check_columns(columns)
        removed = (
            (number, "no split" if picture.identity else "no identity", "")
            for _, group in table.frames()
            for number, picture in group
            if not picture.identity or (by_split and not picture.split)
        )
        table.remove("sources", removed)
        kept = table.count("pictures") - table.count("removed")
        say(f"sources: {table.count('pictures')} pictures, {kept} with an identity")
        if not kept:
            what = "identity and split (splits.by is source)" if by_split else "identity"
            raise UserError(f"none of the sources has a picture with an {what}")
        several = table.query(
            "SELECT source, identity, group_concat(DISTINCT person) FROM pictures "
            "GROUP BY source, identity HAVING count(DISTINCT person) > 1 LIMIT 1"
        )
        for source, identity, people in several:
            raise UserError(
                f"{source}: the identity {identity} is of several persons: {people}; name one"
            )

    def _check_columns(self, columns: set[str]) -> None:
        """Say which columns of the recipe no source has. Raises UserError if nothing else can give
        the label."""
        for name, rule in self.recipe.attributes.items():
            missing = sorted(rule.columns.keys() - columns)
            if not missing or "annotation" not in rule.origins:
                continue
            known = (
                f"{suggest(missing[0], columns)} Columns: {', '.join(sorted(columns)) or 'none'}"
            )
            text = f"attributes.{name}.columns: no source has the column '{missing[0]}'"
            if len(rule.origins) == 1 and rule.default is None:
                raise UserError(f"{text}.{known}")
            say(f"warning: {text}.{known}")
            self.notes.append(f"{text}; its labels come from what follows in the recipe.")

    def _measure(self, table: Table, store: Store) -> None:
        """Measure what no earlier run has measured; with shards, this process's share of it."""
        total = table.count("pictures") - table.count("removed")
        with tqdm(total=total, desc="measure", unit="picture", disable=None) as bar:
            for measures in measured(
                table.frames(), store, self.work / "crops", self.shard, self.workers
            ):
                table.set_measures(measures)
                bar.update(len(measures))

    def _quality(self, table: Table) -> None:
        recipe = self.recipe.quality
        missing = table.count("pictures") - table.count("removed") - table.count("measures")
        if missing:
            raise UserError(
                f"{missing} pictures are not measured yet; run the other shares first "
                "(--until measure)"
            )
        bad = (
            (candidate.number, *reason)
            for candidate in table.candidates()
            if (reason := judge(candidate.measure, recipe))
        )
        table.remove("quality", bad)
        # A quantile is one of the pictures that are good otherwise.
        least = {
            (source.name, view): least_sharpness(
                recipe.sharpness.get(view), table.column("sharpness", source.name, view)
            )
            for source in self.recipe.sources
            for view in VIEWS
        }
        blurry = (
            (candidate.number, *reason)
            for candidate in table.candidates()
            if (
                reason := judge_sharpness(
                    candidate.measure, least[candidate.picture.source, candidate.picture.view]
                )
            )
        )
        table.remove("quality", blurry)
        if recipe.repeated is not None:
            table.remove("quality", self._repeated(table, recipe.repeated))
        self._report(table, "quality")

    def _repeated(self, table: Table, distance: int) -> Iterator[tuple[int, str, str]]:
        for group in table.identities(self._by_split):
            names = {c.number: c.picture.name for c in group}
            for pictures in _by_view(group):
                for number, (other, bits) in repetitions(pictures, distance).items():
                    yield number, "repeated", f"{bits} of 64 bits from {names[other]}"

    def _balance(self, table: Table) -> None:
        """Balance the views of each identity."""

        def removed() -> Iterator[tuple[int, str, str]]:
            for group in table.identities(self._by_split):
                aerial, ground = _by_view(group)
                if aerial and ground:
                    counts = f"{len(aerial)} aerial, {len(ground)} ground pictures"
                    for number in sorted(overflow(aerial, ground, self.recipe.balance)):
                        yield number, "overflow", counts
                else:
                    view = "ground" if aerial else "aerial"
                    for candidate in group:
                        yield candidate.number, "one view", f"the identity has no {view} picture"

        table.remove("balance", removed())
        self._report(table, "balance")

    def _pair(self, table: Table) -> None:
        """Split the persons, and make pairs."""
        split_of = self._split_people(table)

        def pairs() -> Iterator[tuple[str, int, int]]:
            for group in table.identities(self._by_split):
                picture = group[0].picture
                part = picture.split if self._by_split else ""
                split = split_of[picture.source, picture.person, part]
                for aerial, ground in pair(*_by_view(group), self.recipe.balance):
                    yield split, aerial.number, ground.number

        table.add_pairs(pairs())
        counts = dict(table.query("SELECT split, count(*) FROM pairs GROUP BY split"))
        say("pairs: " + ", ".join(f"{counts.get(split, 0)} {split}" for split in SPLITS))

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

    def _label(self, table: Table, store: Store, shard: tuple[int, int]) -> None:
        """Labels of all pictures, or the models' answers for a share of them."""
        if not self.recipe.attributes:
            return
        prompt = self.prompts.get("attributes", "")
        labeller = Labeller(self.recipe, self.attributes, store, prompt, self._encoder)
        total = table.count("pictures") - table.count("removed")
        labeller.prepare(
            lambda: _share(table.candidates(), shard, lambda c: c.measure.sha256),
            total if shard == (1, 1) else None,
        )
        if shard != (1, 1):
            return
        for group in table.identities(self._by_split):
            table.set_labels(
                (number, attribute, label)
                for number, labels in labeller.label(group).items()
                for attribute, label in labels.items()
            )

    def _captions(self, table: Table, store: Store) -> None:
        """A caption of every pair; with shards, the models' answers for a share of the pairs."""
        recipe, shard = self.recipe, self.shard
        if shard != (1, 1):  # a quantile needs the scores of all pairs
            recipe = recipe.model_copy(update={"clip": Clip()})
        total = table.count("pairs")
        written = write_captions(
            lambda: _share(table.pairs(), shard, partial(_shown, recipe.captions)),
            recipe,
            self.attributes,
            store,
            self.prompts.get(recipe.captions.by, ""),
            self._encoder,
            total if shard == (1, 1) else None,
        )
        with closing(written):
            table.set_captions(written)
        good, asked = table.count("captions WHERE text <> ''"), table.count("captions")
        problems = table.query(
            "SELECT problem, count(*) FROM captions WHERE text = '' GROUP BY problem "
            "ORDER BY count(*) DESC, problem LIMIT 3"
        )
        given_up = "; ".join(f"{count} {problem}" for problem, count in problems)
        say(
            f"captions: {good} pairs of {total} have one; {asked - good} are given up"
            + f", most often: {given_up}" * bool(given_up)
        )
        self.notes += notes(recipe)

    def _write(self, table: Table) -> None:
        table.finish()
        if not any(True for _ in table.written()):
            raise UserError("no pair has a caption that is good enough (most often: see above)")
        unfinished, replaced = (
            self.output.with_name(f"{self.output.name}.{end}") for end in ("unfinished", "replaced")
        )
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            writer = Writer(unfinished, table, self.recipe, self.attributes, self.prompts)
            total = sum(1 for _ in table.written())
            for _ in tqdm(writer.pictures(), total=total, desc="write", disable=None):
                pass
            writer.annotations()
            write_card(unfinished, table, self.recipe, self.notes)
            writer.manifest()
            if self.output.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(self.output, replaced)
            os.rename(unfinished, self.output)
        except OSError as error:
            raise UserError(
                f"{self.output}: could not be written: {error.strerror or error} (at "
                f"{error.filename}); what was paid for is kept in {self.work}"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        custom = self.recipe.output.layout == "custom"
        names = {source.name for source in self.recipe.sources}
        name = "custom" if custom else "AGDataAttr" if len(names) == 2 else ONE_SOURCE[names.pop()]
        say(
            f"wrote {self.output}: look at {self.output}/card.html; check it with\n"
            f"python tools/check_dataset.py --dataset_name {name} --root_dir {self.output}"
        )

    @property
    def _by_split(self) -> bool:
        return self.recipe.splits.by == "source"

    def _report(self, table: Table, stage: str) -> None:
        """Say how many pictures a stage has taken out, and why."""
        rows = table.query(
            "SELECT reason, count(*) FROM removed WHERE stage = ? GROUP BY reason "
            "ORDER BY count(*) DESC, reason",
            (stage,),
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in rows) or "nothing"
        kept = table.count("pictures") - table.count("removed")
        say(f"{stage}: {kept} pictures are in; taken out: {reasons}")
        if not kept:
            query = "SELECT name, detail FROM removed JOIN pictures USING (number) WHERE stage = ?"
            name, detail = next(table.query(query, (stage,)))
            raise UserError(f"{stage}: no picture is left ({reasons}), such as {name}: {detail}")


def _noting_columns(pictures: Iterable[Picture], columns: set[str]) -> Iterator[Picture]:
    """The pictures, while the names of their annotations are added to `columns`."""
    for picture in pictures:
        columns.update(picture.notes)
        yield picture


def _share(
    items: Iterable[T], shard: tuple[int, int], content: Callable[[T], object]
) -> Iterator[T]:
    """Share k of n. Items of the same content are in the same share, because they share answers."""
    k, n = shard
    return (item for item in items if n == 1 or int(key_of(content(item)), 16) % n == k - 1)


def _shown(captions: Captions, pair: Pair) -> object:
    """What a model is shown of a pair: the labels, or the pictures."""
    views: Sequence[View] = VIEWS if captions.view == "both" else (captions.view,)
    if captions.by == "text":
        return [[*label] for view in views for label in pair.labels[view].values()]
    return [pair.candidate(view).measure.sha256 for view in views]


def _by_view(group: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """The aerial and the ground pictures of an identity."""
    aerial = [c for c in group if c.picture.view == "aerial"]
    return aerial, [c for c in group if c.picture.view == "ground"]
