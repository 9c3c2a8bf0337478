"""A gallery's features in Milvus, a server of vectors, or in a file of Milvus Lite.

    store = Milvus("http://localhost:19530")  # or "milvus.db", a file
    store.put(items, features)
    scores_QK, ids_QK = store.search(queries_QD, 50, parse("view = 'aerial'", items.schema))

A gallery is a collection. Its fields are `feature`, and for each column of the items one that is
called c_ and the column's name (`field_of`). Timestamps are seconds, and numbers have double
precision. A search sees what was put before it (consistency "Strong"), and compares every feature
(index "FLAT").
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from gallery.where import Filter, to_milvus
from utils.errors import UserError

PREFIX = "milvus:"  # of --store
COLLECTION = "gallery"
BATCH = 1_000  # items of a request
FEATURE = "feature"
TIMEOUT = 20.0  # seconds, to reach a server
MAX_HITS = 16_384  # of a search; a limit of Milvus
MAX_TEXT = 65_535  # bytes of a text; a limit of Milvus


class Milvus:
    """A collection of Milvus. Raises UserError if the server cannot be used.

    Args:
        uri: of a server, or the path of a file that ends in `.db`.
        token: "user:password" or an API key, for servers that ask for one.
    """

    def __init__(self, uri: str, collection: str = COLLECTION, token: str = "") -> None:
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError:
            raise UserError(
                "pymilvus is not installed: pip install -r requirements-search.txt"
            ) from None
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
            raise UserError(f"{collection}: not the name of a collection: letters, digits and _")
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # errors are raised as well
        self.uri, self.collection = uri, collection
        with self._errors():
            self.client = MilvusClient(uri, token=token, timeout=TIMEOUT)
            if self.client.has_collection(collection):
                self.client.load_collection(collection)

    def put(self, items: pa.Table, features: np.ndarray) -> None:
        """Add items with their features [N, D], or replace those of the same id."""
        with self._errors():
            if not self.client.has_collection(self.collection):
                self._create(items.schema, features.shape[1])
            described = self.client.describe_collection(self.collection)["fields"]
            fields = {field["name"] for field in described} - {FEATURE}
            if other := fields ^ set(map(field_of, items.column_names)):
                raise UserError(
                    f"{self.uri}: the collection {self.collection} is of a gallery with other "
                    f"columns ({', '.join(sorted(other))}); drop it there, or name another one"
                )
            for start in range(0, len(items), BATCH):
                rows = _plain(items.slice(start, BATCH)).to_pylist()
                part = features[start : start + BATCH].astype(np.float32).tolist()
                data = [{**row, FEATURE: x} for row, x in zip(rows, part, strict=True)]
                self.client.upsert(self.collection, data)

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

    def _create(self, schema: pa.Schema, width: int) -> None:
        from pymilvus import DataType, MilvusClient

        fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        fields.add_field(FEATURE, DataType.FLOAT_VECTOR, dim=width)
        for column in schema:
            about: dict[str, Any] = {"is_primary" if column.name == "id" else "nullable": True}
            if pa.types.is_string(column.type):
                kind, about["max_length"] = DataType.VARCHAR, MAX_TEXT
            else:
                kind = DataType.DOUBLE if pa.types.is_floating(column.type) else DataType.INT64
            fields.add_field(field_of(column.name), kind, **about)
        index = MilvusClient.prepare_index_params()
        index.add_index(FEATURE, index_type="FLAT", metric_type="IP")
        self.client.create_collection(
            self.collection, schema=fields, index_params=index, consistency_level="Strong"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            raise UserError(f"{self.uri}: Milvus: {error.message or error}") from None


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
