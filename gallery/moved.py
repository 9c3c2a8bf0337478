"""Paths of a gallery whose root has changed: those below the new root become relative.

They are absolute if their pictures were indexed while the root was another one.
"""

from __future__ import annotations

import pyarrow as pa

from gallery.parts import Part
from gallery.paths import below, stored_path
from gallery.pictures import box_of
from gallery.records import id_of
from gallery.store import Store


def make_relative(store: Store) -> None:
    """Make the absolute paths below the gallery's root relative, and change the ids with them.
    People whom the gallery has there already by a relative path leave it."""
    root = store.manifest["root"]
    columns = [store.read(part, kind, ["path"])["path"] for part in store.parts
               for kind in ("items", "files")]  # fmt: skip
    if not any(below(column, [root]).any() for column in columns):
        return
    relative = {path for column in columns for path in column.unique().to_pylist()
                if not path.startswith("/")}  # fmt: skip
    parts: list[Part | None] = []
    for part in store.parts:
        tables = []
        for kind in ("items", "files"):
            table = store.read(part, kind)
            rows = table.to_pylist()
            for row, inside in zip(rows, below(table["path"], [root]), strict=True):
                if inside and (path := stored_path(row["path"], root)) not in relative:
                    row["path"] = path
                    if kind == "items":
                        row["id"] = id_of(path, row["frame_time"], box_of(row))
            tables.append(pa.Table.from_pylist(rows, schema=table.schema))
        items, files = tables
        files = files.filter(pa.array(~below(files["path"], [root])))
        parts.append(store.rewritten(part, ~below(items["path"], [root]), items, files))
    store.commit(parts)
