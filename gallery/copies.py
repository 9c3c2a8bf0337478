"""Copies of a gallery in Milvus: where they are, and how each is made equal to the gallery.

    copy = Copy(folder, "milvus:http://localhost:19530#campus", new=True)
    copy.update(store)

The gallery's folder is the truth, and a copy may be behind. An item in Milvus has the name of the
part of the gallery that it comes from, and a part never changes. So a copy is equal to the gallery
if it has as many items of each part as the part has rows, and no others. That holds whatever was
killed before, and is asked with a few counts.

stores.json in the gallery's folder has an id of the gallery, which its collections have too, and
the addresses of all copies, so that nobody who is deleted stays in one of them. It has no password.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gallery.milvus import MAX_HITS, Milvus, MilvusError, field_of, split_store
from gallery.parts import Part, features_of
from gallery.records import schema_with
from gallery.store import Gallery, Store
from gallery.where import Filter
from utils.console import say
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import write_atomically
from utils.text import visible

STORES = "stores.json"
GALLERY, ENCODER = "aea-firm.gallery", "aea-firm.encoder"  # properties of a collection


def stores(folder: Path) -> list[str]:
    """The addresses of a gallery's copies. Raises UserError."""
    return list(_read(folder)["stores"])


class Copy:
    """The copy of a gallery at an address of `store_option`.

    Args:
        folder: of the gallery.
        new: whether it may have to be made; then the gallery's folder remembers it.

    Raises UserError if it cannot be reached, if there is none, or if it is of another gallery.
    """

    def __init__(self, folder: Path, address: str, new: bool = False) -> None:
        known = _read(folder)
        self.address, self.gallery = address, known["gallery"] or uuid.uuid4().hex
        self.about = None
        if new or not _is_gone(address):
            self.milvus = Milvus(*split_store(address))
            self.about = self.milvus.about()
        if self.about is None and not new:
            forget = f", search.py delete --copy {address} forgets it" * (
                address in known["stores"]
            )
            raise UserError(
                f"--store {address}: has no copy of {folder}; search.py index --gallery "
                f"{folder} --store {address} makes one{forget}"
            )
        if self.about is not None and self.about.get(GALLERY) != self.gallery:
            raise UserError(
                f"--store {address}: the collection there is not of {folder}; give another name "
                "after #, or delete it there"
            )
        if new and address not in known["stores"]:  # before anybody is put there
            _write(folder, self.gallery, [*known["stores"], address])

    def update(self, store: Store) -> int:
        """Make the copy equal to the gallery. People who are gone leave it first. Returns how many
        were put.

        Args:
            store: of the gallery, which the caller has locked.
        """
        about = {GALLERY: self.gallery, ENCODER: store.manifest["encoder"]["sha256"]}
        schema = schema_with(store.attributes())
        fields = {field_of(name) for name in schema.names}
        if self.about is not None and (
            self.about.get(ENCODER) != about[ENCODER] or self.milvus.fields() != fields
        ):
            self.milvus.remove()
            self.about = None
        if self.about is None:
            self.milvus.create(schema, store.manifest["encoder"]["embed_dim"], about)
            self.about = about
        self.drop(store)
        lacking = self._lacking(store.parts)
        with tqdm(
            total=_rows(lacking), unit="person", desc="put", leave=False, disable=None
        ) as bar:
            for part in lacking:
                features = features_of(store.read(part, "features"))
                self.milvus.put(store.read(part, "items"), features, part["name"])
                bar.update(part["rows"])
        return _rows(lacking)

    def drop(self, store: Store, ids: Sequence[int] = ()) -> int:
        """Remove people from the copy: those with these ids, and all whom the gallery no longer
        has. Returns how many the latter were."""
        gone = self.milvus.others(_names(store.parts))
        if len(gone):  # or people of a part that was written anew
            known = [store.read(part, "items", ["id"])["id"].to_numpy() for part in store.parts]
            gone = np.setdiff1d(gone, np.concatenate([np.zeros(0, np.int64), *known]))
        self.milvus.drop([*gone.tolist(), *ids])
        return len(gone)

    def is_behind(self, parts: Sequence[Part]) -> bool:
        """Whether it lacks people of the gallery, or has an older state of them."""
        return bool(parts) and self.milvus.count(_names(parts)) != _rows(parts)

    def _lacking(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of which it has not every row, by halves, as most often none lacks any."""
        if not self.is_behind(parts):
            return []
        half = len(parts) // 2
        return [*self._lacking(parts[:half]), *self._lacking(parts[half:])] if half else [*parts]


class CopyIndex:
    """Searches a copy of a gallery, as `index.Exact` searches the gallery itself.

    Says if the copy is behind. Raises UserError as `Copy` does, and if another encoder made it.
    """

    def __init__(self, gallery: Gallery, address: str) -> None:
        copy = Copy(gallery.folder, address)
        again = f"search.py index --gallery {gallery.folder} --store {address} brings it up to date"
        if (copy.about or {}).get(ENCODER) != gallery.manifest["encoder"]["sha256"]:
            raise UserError(f"--store {address}: made with another encoder; {again}")
        if copy.is_behind(gallery.manifest["parts"]):
            text = f"{address}: is behind the gallery, and people may be missing: {again}"
            say(visible(text), sys.stderr)
        self.milvus, self.ids_N = copy.milvus, gallery.items["id"].to_numpy()
        self.order_N = np.argsort(self.ids_N)

    def search(
        self, queries_QD: np.ndarray, k: int, where: Filter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [Q, K] and rows [Q, K] of the k best items, best first. Rows are -1, and scores
        -inf, where there are fewer, and for people whom the gallery no longer has."""
        scores_QK, ids_QK = self.milvus.search(queries_QD, min(k, MAX_HITS), where)
        at_QK = np.searchsorted(self.ids_N, ids_QK, sorter=self.order_N)
        rows_QK = self.order_N[at_QK.clip(max=len(self.ids_N) - 1)]
        known_QK = self.ids_N[rows_QK] == ids_QK
        return np.where(known_QK, scores_QK, -np.inf), np.where(known_QK, rows_QK, -1)


def delete_copy(folder: Path, address: str) -> bool:
    """Delete a whole copy, and forget it. Returns whether there was one. Raises UserError if it
    cannot be reached, or if the gallery has never had it."""
    known = _read(folder)
    if address not in known["stores"]:
        raise UserError(
            f"--copy {address}: not among the copies of {folder}: "
            f"{', '.join(known['stores']) or 'it has none'}"
        )
    found = False
    if not _is_gone(address):
        try:
            milvus = Milvus(*split_store(address))
            found = (milvus.about() or {}).get(GALLERY) == known["gallery"]
            if found:
                milvus.remove()
        except MilvusError as error:
            raise UserError(
                f"{error}; if it does not exist any longer, take it out of {folder / STORES}"
            ) from None
    _write(folder, known["gallery"], [other for other in known["stores"] if other != address])
    return found


def _is_gone(address: str) -> bool:
    """Whether it is a file that does not exist. Opening it would make it."""
    uri = split_store(address)[0]
    return "://" not in uri and not os.path.exists(uri)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STORES
    if not os.path.lexists(path):
        return {"gallery": "", "stores": []}
    content = read_json_file(path)
    try:
        ours = re.fullmatch("[0-9a-f]{32}", content["gallery"]) and type(content["stores"]) is list
        if ours and all(type(address) is str for address in content["stores"]):
            return content
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path}: not a list of the copies of a gallery")


def _write(folder: Path, gallery: str, addresses: Sequence[str]) -> None:
    text = json.dumps({"gallery": gallery, "stores": list(addresses)}, indent=1).encode()
    write_atomically(folder / STORES, methodcaller("write", text))


def _names(parts: Sequence[Part]) -> list[str]:
    return [part["name"] for part in parts]


def _rows(parts: Sequence[Part]) -> int:
    return sum(part["rows"] for part in parts)
