"""Writing the data set: pictures, annotations, records of every decision, and a manifest.

    <output>/AG-ReID/agtext_train.json, ...   attrs.json           the layout TBAGPR
    <output>/dataset.jsonl                                         the layout `custom`
    <output>/construction/recipe.yaml, prompts/, removed.csv, labels.csv, captions.csv
    <output>/manifest.sha256                                       check with sha256sum -c

The same recipe, pictures and answers of models give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from construction.recipe import Recipe
from construction.records import SPLITS, VIEWS, Candidate, Caption, Pair
from construction.table import Table
from datasets.tbagpr import SOURCES
from utils.attributes import Attribute
from utils.errors import UserError

MANIFEST = "manifest.sha256"
FOLDER = "construction"


class Writer:
    """Writes a data set into a new folder. Raises OSError.

    Args:
        folder: where; it does not exist.
        attributes: those of `attributes_file`.
        prompts: by name, what models were asked.
    """

    def __init__(
        self,
        folder: Path,
        table: Table,
        recipe: Recipe,
        attributes: list[Attribute],
        prompts: dict[str, str],
    ) -> None:
        self.folder, self.table, self.recipe, self.prompts = folder, table, recipe, prompts
        self.attributes = attributes if recipe.attributes else []  # in the order of the labels
        self.hashes: dict[str, str] = {}  # by path in the folder

    def pictures(self) -> Iterator[Candidate]:
        """Copy or link each picture of a pair once, and give it."""
        for candidate in self.table.written():
            picture, measure = candidate.picture, candidate.measure
            path = self.folder / picture.source / picture.name
            path.parent.mkdir(parents=True, exist_ok=True)
            # A crop lies in the work folder, which the user may delete.
            if self.recipe.output.files == "link" and picture.box is None:
                os.symlink(os.path.abspath(measure.file), path)
            else:
                shutil.copyfile(measure.file, path)
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            if digest != measure.sha256:
                raise UserError(
                    f"{measure.file}: has changed since it was measured; run the command again"
                )
            self.hashes[f"{picture.source}/{picture.name}"] = digest
            yield candidate

    def annotations(self) -> None:
        """Write the annotations and the records, after the pictures."""
        if self.recipe.output.layout == "TBAGPR":
            self._tbagpr()
        else:
            self._custom()
        self._records()

    def manifest(self) -> None:
        """Write the hash of every file, at the end."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in self.hashes:
                self.hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        with self._open(MANIFEST, listed=False) as file:
            for name in sorted(self.hashes):
                file.write(f"{self.hashes[name]}  {name}\n")

    def _tbagpr(self) -> None:
        for source in (s for s in SOURCES if s.folder in {r.name for r in self.recipe.sources}):
            for split in SPLITS:
                rows = self._pairs(source.folder, split)
                with self._open(f"{source.folder}/{source.json.format(split)}") as file:
                    if split == "train":
                        _dump_list(file, (_train_row(i, *row) for i, row in enumerate(rows)))
                    else:
                        _dump_lists(file, [_test_row(*row) for row in rows])
        if not self.attributes:
            return
        keys = {source.folder: source.keys for source in SOURCES}

        def labels() -> Iterator[dict[str, list[int]]]:
            for candidate in self.table.written():
                folder, file = os.path.split(candidate.picture.name)
                yield {keys[candidate.picture.source](folder, file)[0]: self._classes(candidate)}

        with self._open("attrs.json") as file:
            _dump_list(file, labels())

    def _custom(self) -> None:
        with self._open("dataset.jsonl") as file:
            for split in SPLITS:
                for source in self.recipe.sources:
                    for pair, caption in self._pairs(source.name, split):
                        row: dict[str, Any] = {
                            "split": split,
                            "id": f"{source.name}/{pair.aerial.picture.identity}",
                            "captions": [caption.text],
                        }
                        both = (("", pair.aerial), ("pair_", pair.ground))
                        for prefix, candidate in both:
                            picture = candidate.picture
                            row[f"{prefix}image"] = f"{picture.source}/{picture.name}"
                            if self.attributes:
                                labels = self.table.labels(candidate.number)
                                values = {a.name: labels[a.name].value for a in self.attributes}
                                row[f"{prefix}attributes"] = values
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _records(self) -> None:
        with self._open(f"{FOLDER}/recipe.yaml") as file:
            content = self.recipe.model_dump(mode="json")
            yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)
        for name, prompt in self.prompts.items():
            with self._open(f"{FOLDER}/prompts/{name}.txt") as file:
                file.write(prompt + "\n")
        self._csv(
            "removed", ("source", "picture", "identity", "view", "stage", "reason", "detail"),
            "SELECT source, name, identity, view, stage, reason, detail FROM pictures "
            "JOIN removed USING (number) ORDER BY number",
        )  # fmt: skip
        self._csv(
            "labels", ("source", "picture", "attribute", "class", "confidence", "origin"),
            "SELECT source, name, attribute, value, confidence, origin FROM labels "
            "JOIN pictures USING (number) ORDER BY number, attribute",
        )  # fmt: skip
        self._csv(
            "captions",
            (
                "source", "split", "aerial", "ground",
                "caption", "origin", "score", "tries", "problem",
            ),
            "SELECT a.source, pairs.split, a.name, g.name, text, origin, score, tries, problem "
            "FROM pairs JOIN captions USING (number) JOIN pictures a ON a.number = aerial "
            "JOIN pictures g ON g.number = ground ORDER BY pairs.number",
        )  # fmt: skip

    def _pairs(self, source: str, split: str) -> Iterator[tuple[Pair, Caption]]:
        for pair in self.table.pairs(source, split):
            caption = self.table.caption(pair.number)
            assert caption is not None, "a pair without a caption has been removed"
            yield pair, caption

    def _classes(self, candidate: Candidate) -> list[int]:
        labels = self.table.labels(candidate.number)
        return [a.classes.index(labels[a.name].value) for a in self.attributes]

    def _csv(self, name: str, head: Iterable[str], query: str) -> None:
        with self._open(f"{FOLDER}/{name}.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(self.table.query(query))

    @contextmanager
    def _open(self, name: str, listed: bool = True) -> Iterator[IO[str]]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield file
        if listed:
            self.hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()


def _train_row(number: int, pair: Pair, caption: Caption) -> list[Any]:
    return [pair.pid, number, *(_path(pair.candidate(v)) for v in VIEWS), caption.text]


def _test_row(pair: Pair, caption: Caption) -> dict[str, Any]:
    return {
        "image_pids": pair.pid,
        "img_paths": _path(pair.aerial),
        "pair_img_paths": _path(pair.ground),
        "caption_pids": pair.pid,
        "captions": caption.text,
    }


def _path(candidate: Candidate) -> list[str]:
    return list(os.path.split(candidate.picture.name))


def _dump_list(file: IO[str], rows: Iterable[Any]) -> None:
    """A JSON list with a row on each line, which is never in memory as a whole."""
    file.write("[")
    for number, row in enumerate(rows):
        file.write(("," if number else "") + "\n" + json.dumps(row, ensure_ascii=False))
    file.write("\n]\n")


def _dump_lists(file: IO[str], rows: list[dict[str, Any]]) -> None:
    """Rows as an object of parallel lists."""
    keys = ("image_pids", "img_paths", "pair_img_paths", "caption_pids", "captions")
    lists = {key: [row[key] for row in rows] for key in keys}
    file.write(json.dumps(lists, ensure_ascii=False, indent=0) + "\n")
