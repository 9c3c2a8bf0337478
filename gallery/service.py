"""A gallery as the search page asks it: always the newest, with limits, for many visitors at once.

    service = Service("galleries/campus")
    answer = service.answer(Question("a woman in a yellow dress"), page=0)
    person = service.person(answer.hits[0].id)

What comes from a visitor is a `Question`, an item's id or the number of a phrase, and each is
checked here. A path is never among them: pictures are found by their id in the gallery's table.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.thumbnails import cropped, thumbnail
from gallery import where
from gallery.copies import CopyIndex
from gallery.encoders import encoder_of
from gallery.index import INDEX, open_index
from gallery.index import MANIFEST as INDEX_MANIFEST
from gallery.manifest import MANIFEST
from gallery.onnx import OnnxEncoder
from gallery.page_question import MAX_HITS, Question, check, title
from gallery.pictures import box_of, picture_of, whole_picture
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
from gallery.records import column_of
from gallery.sent import Sent, decoded
from gallery.sheet import sheet
from gallery.store import Gallery
from utils.console import say
from utils.errors import UserError
from utils.machine import cores

if TYPE_CHECKING:
    from gallery.encode import Encoder

MAX_CHOICES = 100  # values of a column that the page offers
CACHED = 4096  # thumbnails in memory, 5 kB each
CARD, CROP, WHOLE = (240, 320), (480, 640), (1280, 960)  # pixels, width and height at most
COLUMNS = ("view", "source", "camera")  # that the page offers besides attributes
NO_PICTURE = "There is no picture: its file was moved, deleted or damaged."


@dataclass(frozen=True)
class Answer:
    """The hits of a page of a question.

    Attributes:
        page: from 0.
        more: whether there is a next page.
        sure: on the first page, how much the first hit stands out.
        unknown: if there are no hits, texts that a filter asks for and nobody has.
    """

    hits: list[Hit]
    page: int
    more: bool
    sure: str
    unknown: list[str]


@dataclass(frozen=True)
class Person:
    """An item, to be looked at.

    Attributes:
        picture: of the person, as a data URL; "" if it cannot be read.
        whole: the whole picture if the person is a part of it, or "".
        box: left, top, width, height in percent of the whole picture.
        attributes: name, class and score in percent.
        problem: why there is no picture.
    """

    item: dict[str, Any]
    picture: str
    whole: str
    box: tuple[float, ...]
    attributes: list[tuple[str, str, float]]
    problem: str


class Snapshot:
    """A gallery of one moment.

    Args:
        store: address of a copy to search in.
    """

    def __init__(
        self,
        gallery: Gallery,
        encoder: Encoder | OnnxEncoder,
        signature: object,
        store: str | None = None,
    ) -> None:
        self.gallery, self.encoder, self.signature = gallery, encoder, signature
        if store:
            self._copy: CopyIndex | None = CopyIndex(gallery, store)
        else:
            self._copy = None
            self._index = open_index(gallery.items, gallery.features, gallery.folder / INDEX)
        self.root = gallery.manifest["root"]
        self._ids = gallery.items["id"].to_numpy()
        # Without a reference to self: features are large, and a cycle would keep them for a while.
        self.card = lru_cache(CACHED)(partial(_card, gallery.items, self.root))

    def __len__(self) -> int:
        return len(self.gallery.items)

    def search(self, part: where.Filter | None, mask: np.ndarray | None) -> Search:
        """The search of `find_hits`, with a filter, which is given as a mask too."""
        if self._copy:
            return partial(self._copy.search, where=part)
        return partial(self._index.search, mask=mask)

    def row(self, identifier: int) -> int:
        """The row of an item. Raises UserError if it is not, or no longer, in the gallery."""
        rows = np.flatnonzero(self._ids == identifier)
        if not len(rows):
            raise UserError("this person is no longer in the gallery: ask again")
        return int(rows[0])

    def item(self, row: int) -> dict[str, Any]:
        return _item(self.gallery.items, row)

    def choices(self) -> dict[str, list[str]]:
        """By column, the values that it has, for columns with more than one."""
        attributes = [column_of(name) for name in self.gallery.manifest["attributes"]]
        values = {}
        for name in (*COLUMNS, *attributes):
            found = pc.unique(self.gallery.items[name]).drop_null().to_pylist()
            if 1 < len(found) <= MAX_CHOICES:
                values[name] = sorted(found)
        return values


class Service:
    """See the module.

    Args:
        run, onnx: where the gallery's encoder is, see `encoders.encoder_of`.
        store: address of a copy of the gallery, to search there.

    Raises UserError if the gallery or its encoder cannot be read.
    """

    def __init__(
        self, folder: str | Path, run: str | Path | None = None, device: str = "auto",
        store: str | None = None, onnx: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.folder, self._place, self._store = Path(folder), (run, onnx, device), store
        self._lock = threading.Lock()
        # One at a time: heat maps record what the model's layers get, whoever calls them.
        self._model = threading.Lock()
        self._readers = ThreadPoolExecutor(cores())
        self._snapshot: Snapshot | None = None
        self._encoder: Encoder | OnnxEncoder | None = None
        self._made_with: object = None  # what the manifest says of the encoder
        self._read()

    def now(self) -> Snapshot:
        """The gallery, read again if it has changed: people who were deleted are found no more.
        Raises UserError, for a visitor to read, if it cannot be read."""
        with _without_paths("The gallery cannot be read now. Ask again later."):
            return self._read()

    def _read(self) -> Snapshot:
        with self._lock:
            signature = [_signature(self.folder / MANIFEST)]
            signature.append(_signature(self.folder / INDEX / INDEX_MANIFEST))
            if self._snapshot is None or self._snapshot.signature != signature:
                self._snapshot = None  # two galleries may not fit into memory
                gallery = Gallery.open(self.folder)
                about = gallery.manifest["encoder"]
                with self._model:
                    if self._encoder is None or self._made_with != about:
                        self._encoder = encoder_of(gallery.manifest, *self._place)
                        self._made_with = about
                    self._snapshot = Snapshot(gallery, self._encoder, signature, self._store)
            return self._snapshot

    def answer(self, question: Question, page: int = 0) -> Answer:
        """A page of hits. Raises UserError, for a visitor to read."""
        now = self.now()
        check(question, page)
        part = _filter(question, now)
        query_D = self._query(question, now)
        mask = None if part is None else where.to_mask(part, now.gallery.items)
        first, last = page * question.count, min((page + 1) * question.count, MAX_HITS)
        hits = []
        if len(now) and (mask is None or mask.any()):
            with _without_paths("The search has failed. Ask again later."):
                hits = find_hits(
                    now.search(part, mask), now.gallery.items, now.gallery.features, query_D,
                    max(last + 1, LOOKED),
                    COLLAPSE if question.collapse else None,
                )  # fmt: skip
        sure = ""
        if hits and page == 0:
            sure = str(sureness(now.gallery.features, query_D, hits, mask))
        more = len(hits) > last and last < MAX_HITS
        unknown = where.unknown_values(part, now.gallery.items) if part and not hits else []
        return Answer(hits[first:last], page, more, sure, unknown)

    def cards(self, identifiers: Sequence[int]) -> list[str]:
        """A thumbnail of each item as a data URL; "" for pictures that cannot be read."""
        now = self.now()

        def card(identifier: int) -> str:
            try:
                return now.card(now.row(identifier))
            except UserError:
                return ""

        return list(self._readers.map(card, identifiers))

    def take(self, address: object) -> Sent:
        """A picture to ask with, of a data URL. Raises UserError, for a visitor to read."""
        encoder, image = self.now().encoder, decoded(address)
        with self._model:
            (feature_D,) = np.asarray(encoder.encode_image([image]))
        return Sent(feature_D, encoder.about["sha256"], thumbnail(image, CARD)[1])

    def person(self, identifier: int) -> Person:
        """An item and its pictures. Raises UserError if it is not in the gallery."""
        now = self.now()
        item = now.item(now.row(identifier))
        attributes: list[tuple[str, str, float]] = []
        for name in now.gallery.manifest["attributes"]:
            column = column_of(name)
            if item[column] is not None:
                attributes.append((name, item[column], 100.0 * (item[f"{column}_score"] or 0)))
        percent: tuple[float, ...] = ()
        box, whole = box_of(item), ""
        try:
            with _without_paths(NO_PICTURE, (UserError, ValueError)):
                image = person = whole_picture(item, now.root)
                if box is not None:
                    person = cropped(image, box)
                    width, height = image.size
                    percent = tuple(
                        100 * v / of for v, of in zip(box, (width, height) * 2, strict=True)
                    )
                    whole = thumbnail(image, WHOLE)[1]
                picture = thumbnail(person, CROP)[1]
        except UserError as error:
            return Person(item, "", "", (), attributes, f"{error}")
        return Person(item, picture, whole, percent, attributes, "")

    def words(self, question: Question) -> list[str]:
        """What heat maps can be asked for: the whole sentence, and the things that it names. An
        encoder in ONNX has none."""
        if not question.sentence or isinstance(self.now().encoder, OnnxEncoder):
            return []
        from gallery.heatmap import phrases  # not above: it needs torch

        return [question.sentence, *phrases(question.sentence)]

    def heat(self, question: Question, identifier: int, number: int) -> str:
        """The heat map over a person as a data URL, for one of `words`. Raises UserError."""
        now, words = self.now(), self.words(question)
        if isinstance(now.encoder, OnnxEncoder) or not 0 <= number < len(words):
            raise UserError("no such words: choose one of those that are shown")
        from gallery.heatmap import about, heat_maps, overlay

        sentence = words[0] if number == 0 else about(words[0], words[number])
        item = now.item(now.row(identifier))
        with _without_paths(NO_PICTURE):
            person = picture_of(item, now.root)
        person.thumbnail(CROP)
        with self._model:
            text_D = now.encoder.encode_text([sentence])[0]
            (map_HW,) = heat_maps(now.encoder.run.model, [person], text_D)
        return thumbnail(overlay(person, map_HW), CROP)[1]

    def as_file(self, question: Question, page: int, kind: str) -> tuple[str, str, int]:
        """The hits of a page as a file to save: its name, a data URL, and its bytes.

        Args:
            kind: "json" or "html", which is a sheet with pictures.
        """
        answer, root = self.answer(question, page), self.now().root
        if kind == "json":
            asked = asdict(replace(question, sent=None, before=())) | {
                "picture": question.sent is not None
            }
            asked = {k: v for k, v in asked.items() if v not in ("", (), None, False)}
            content = {"question": asked, "hits": [as_json(hit) for hit in answer.hits]}
            data = json.dumps(content, indent=1).encode()
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "hits.html"
                sheet(answer.hits, path, root, query=title(question))
                data = path.read_bytes()
        media = {"json": "application/json", "html": "text/html"}[kind]
        address = f"data:{media};base64,{base64.b64encode(data).decode()}"
        return f"hits-{page + 1}.{kind}", address, len(data)

    def _query(self, question: Question, now: Snapshot) -> np.ndarray:
        """The query's feature [D]."""
        if question.like is not None:
            return now.gallery.features[now.row(question.like)].astype(np.float32)
        parts, sent = [(question.sentence, 1.0), (question.minus, -UNWANTED)], question.sent
        sentences = [text for text, _ in parts if text]
        weights = [weight for text, weight in parts if text]
        features: list[np.ndarray] = []
        if sentences:
            with self._model:
                features = list(np.asarray(now.encoder.encode_text(sentences)))
        if sent is None:
            return combine(np.stack(features), weights)
        if sent.encoder != now.encoder.about["sha256"]:
            raise UserError("The gallery has another encoder now: choose the picture again.")
        return combine(np.stack([*features, sent.feature_D]), [*weights, 1.0])


def _filter(question: Question, now: Snapshot) -> where.Filter | None:
    """The question's filters together. Raises UserError."""
    schema = now.gallery.items.schema
    parts: list[where.Filter] = []
    if question.where:
        parts.append(where.parse(question.where, schema))
    for column, value in question.choices:
        # Parsed, and so checked: the gallery may have lost the column since the page was opened.
        parts.append(where.parse(where.to_text(where.Comparison(column, "=", value)), schema))
    if question.like is not None:
        parts.append(where.Comparison("id", "!=", question.like))
        if question.other_view:
            view = now.item(now.row(question.like))["view"]
            if view is None:
                raise UserError("The view of this person is not known.")
            parts.append(where.Comparison("view", "!=", view))
    return where.all_of(parts)


@contextmanager
def _without_paths(
    message: str, kinds: type[Exception] | tuple[type[Exception], ...] = UserError
) -> Iterator[None]:
    """Errors that are for whoever runs the page, and name paths and addresses, are said on its
    console. Visitors get a UserError with the message."""
    try:
        yield
    except kinds as error:
        say(f"{error}", sys.stderr)
        raise UserError(message) from None


def _item(items: pa.Table, row: int) -> dict[str, Any]:
    return items.slice(row, 1).to_pylist()[0]


def _card(items: pa.Table, root: str, row: int) -> str:
    """The thumbnail of an item as a data URL. Raises UserError if it cannot be read."""
    return thumbnail(picture_of(_item(items, row), root), CARD)[1]


def _signature(path: Path) -> object:
    """What changes when a file is replaced; None if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
