"""A collection of items with their features in Milvus, a server of vectors, or in a file of Milvus
Lite.

    store = Milvus("http://localhost:19530")  # or "milvus.db", a file
    store.create(items.schema, features.shape[1])
    store.put(items, features)
    scores_QK, ids_QK = store.search(queries_QD, 50, parse("view = 'aerial'", items.schema))

Its fields are `feature`, `part` (where an item comes from), and for each column of the items one
that is called c_ and the column's name (`field_of`). Timestamps are seconds, and numbers have
double precision. A search sees what was put before it (consistency "Strong"), and compares every
feature (index "FLAT").

`gallery/copies.py` keeps such a collection equal to a gallery.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from gallery.where import Filter, to_milvus
from utils.errors import UserError
from utils.files import expand

PREFIX = "milvus:"  # of --store
FORM = f"{PREFIX}URI[#NAME]"
TOKEN = "MILVUS_TOKEN"  # environment variable: a command line can be read by other users
STORE_HELP = (
    "URI is the address of a server of Milvus, such as http://localhost:19530, or a file of Milvus "
    "Lite, such as campus.db; NAME is the collection (default: gallery), one for each gallery. The "
    f"password of a server, as user:password, or its key is in the environment variable {TOKEN}"
)
COLLECTION = "gallery"
BATCH = 1_000  # items of a request
FEATURE, PART = "feature", "part"
TIMEOUT = 20.0  # seconds, to reach a server
MAX_HITS = 16_384  # of a search; a limit of Milvus
MAX_TEXT = 65_535  # bytes of a text; a limit of Milvus


class MilvusError(UserError):
    """Milvus cannot be reached, or refuses something."""


def store_option(text: str) -> str:
    """The address of an argument as `milvus:URI#NAME`, with the full path of a file; a type for
    argparse. Raises UserError."""
    uri, name = split_store(text)
    if not text.startswith(PREFIX) or not uri:
        raise UserError(f"--store {text}: not of the form {FORM}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", name):
        raise UserError(f"--store {text}: {name} is not a NAME: letters, digits and _")
    if "://" in uri:
        parts = urlsplit(uri)
        if "@" in parts.netloc or parts.query:  # the address is kept and shown
            raise UserError(
                f"--store {PREFIX}{parts.scheme}://...: an address has no password; put "
                f"user:password into the environment variable {TOKEN}"
            )
        return f"{PREFIX}{uri.rstrip('/')}#{name}"
    if not uri.endswith(".db"):
        raise UserError(
            f"--store {text}: neither a server, such as {PREFIX}http://localhost:19530, nor a file "
            "that ends in .db"
        )
    return f"{PREFIX}{os.path.abspath(expand(uri))}#{name}"


def check_installed() -> None:
    """Raise UserError if pymilvus is not installed. Does not load it: its threads do not survive a
    fork, and loader processes are forked."""
    if find_spec("pymilvus") is None:
        raise UserError("pymilvus is not installed: pip install -r requirements-search.txt")


def split_store(text: str) -> tuple[str, str]:
    """URI and collection of --store."""
    address = text.removeprefix(PREFIX)
    uri, found, name = address.rpartition("#")
    return (uri, name) if found else (address, COLLECTION)


class Milvus:
    """A collection of Milvus. Raises UserError if the server cannot be used.

    Args:
        uri: of a server, or the path of a file that ends in `.db`. A server that asks for a
            password, as "user:password", or for a key gets that of the environment's MILVUS_TOKEN.
    """

    def __init__(self, uri: str, collection: str = COLLECTION) -> None:
        check_installed()
        from pymilvus import MilvusClient

        for library in ("pymilvus", "milvus_lite"):  # errors are raised as well
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self.uri, self.collection = uri, collection
        with self._errors():
            self.client = MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT)
            if self.client.has_collection(collection):
                self.client.load_collection(collection)

    def create(self, schema: pa.Schema, width: int, about: Mapping[str, str] | None = None) -> None:
        """Make the collection.

        Args:
            schema: of the items.
            width: of the features.
            about: properties of the collection, which `about` returns.
        """
        from pymilvus import DataType, MilvusClient

        fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        fields.add_field(FEATURE, DataType.FLOAT_VECTOR, dim=width)
        fields.add_field(PART, DataType.VARCHAR, max_length=64)
        for column in schema:
            options: dict[str, Any] = {"is_primary" if column.name == "id" else "nullable": True}
            if pa.types.is_string(column.type):
                kind, options["max_length"] = DataType.VARCHAR, MAX_TEXT
            else:
                kind = DataType.DOUBLE if pa.types.is_floating(column.type) else DataType.INT64
            fields.add_field(field_of(column.name), kind, **options)
        index = MilvusClient.prepare_index_params()
        index.add_index(FEATURE, index_type="FLAT", metric_type="IP")
        with self._errors():
            self.client.create_collection(
                self.collection, schema=fields, index_params=index, consistency_level="Strong",
                properties=dict(about or {}),
            )  # fmt: skip

    def remove(self) -> None:
        """Delete the collection."""
        with self._errors():
            self.client.drop_collection(self.collection)

    def about(self) -> dict[str, str] | None:
        """The properties of the collection, or None if there is none."""
        with self._errors():
            if not self.client.has_collection(self.collection):
                return None
            return dict(self.client.describe_collection(self.collection)["properties"])

    def fields(self) -> set[str]:
        """The fields of the collection that are columns of items."""
        with self._errors():
            described = self.client.describe_collection(self.collection)["fields"]
        return {field["name"] for field in described} - {FEATURE, PART}

    def put(self, items: pa.Table, features: np.ndarray, part: str = "") -> None:
        """Add items with their features [N, D], or replace those of the same id.

        Args:
            part: where they come from.
        """
        with self._errors():
            for start in range(0, len(items), BATCH):
                rows = _plain(items.slice(start, BATCH)).to_pylist()
                some = features[start : start + BATCH].astype(np.float32).tolist()
                data = [{**row, FEATURE: x, PART: part} for row, x in zip(rows, some, strict=True)]
                self.client.upsert(self.collection, data)

    def count(self, parts: Sequence[str]) -> int:
        """How many items come from these parts."""
        query = f"{PART} in {json.dumps(list(parts))}"
        with self._errors():
            (found,) = self.client.query(self.collection, query, output_fields=["count(*)"])
        return int(found["count(*)"])

    def others(self, parts: Sequence[str]) -> np.ndarray:
        """The ids of the items that come from none of these parts, int64."""
        query = f"{PART} not in {json.dumps(list(parts))}"
        ids: list[int] = []
        with self._errors():
            pages = self.client.query_iterator(
                self.collection, batch_size=MAX_HITS, filter=query if parts else "",
                output_fields=[field_of("id")],
            )  # fmt: skip
            while page := pages.next():
                ids += [item[field_of("id")] for item in page]
            pages.close()
        return np.array(ids, np.int64)

    def drop(self, ids: Sequence[int]) -> None:
        """Remove the items of these ids; ids that it lacks are ignored."""
        with self._errors():
            for start in range(0, len(ids), BATCH):
                part = [int(item) for item in ids[start : start + BATCH]]
                self.client.delete(self.collection, ids=part)

    def search(
        self, queries_QD: np.ndarray, k: int, where: Filter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [Q, K] and ids [Q, K] of the k best items, best first, and of equal ones the
        lower id first. Where there are fewer, ids are -1 and scores -inf."""
        if k > MAX_HITS:
            raise UserError(f"{k} hits: Milvus finds at most {MAX_HITS} at once")
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        ids_QK = np.full((len(queries_QD), k), -1, np.int64)
        with self._errors():
            found = self.client.search(
                self.collection,
                data=np.asarray(queries_QD, np.float32).tolist(),
                limit=k,
                filter="" if where is None else to_milvus(where, field_of),
                search_params={"metric_type": "IP"},
            )
        for hits, scores_K, ids_K in zip(found, scores_QK, ids_QK, strict=True):
            pairs = sorted((-hit["distance"], hit[field_of("id")]) for hit in hits)
            scores_K[: len(pairs)] = [-score for score, _ in pairs]
            ids_K[: len(pairs)] = [item for _, item in pairs]
        return scores_QK, ids_QK

    def close(self) -> None:
        self.client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            reason = str(error.message or error)
            if reason == "Open local milvus failed":  # it does not say why
                reason += "; another process may be using it"
            raise MilvusError(f"{self.uri}: Milvus: {reason}") from None


def field_of(column: str) -> str:
    """The field of a column: Milvus allows only letters, digits and _ of ASCII, so other characters
    are written as their number: "hair colour" is c_hair_u20_colour."""
    return "c_" + re.sub(r"[^A-Za-z0-9_]", lambda match: f"_u{ord(match.group()):x}_", column)


def _plain(items: pa.Table) -> pa.Table:
    """Items as Milvus takes them: the names of its fields, and timestamps as seconds."""
    for number, column in enumerate(items.schema):
        if pa.types.is_timestamp(column.type):
            items = items.set_column(number, column.name, items[column.name].cast(pa.int64()))
    return items.rename_columns([field_of(name) for name in items.column_names])
