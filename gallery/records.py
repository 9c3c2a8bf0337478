"""What is known of each person in a gallery: one row of a table, and one row of its features.

Items are an Arrow table with the columns of SCHEMA, and for each attribute a column of its class
and one of the class's score (`gender`, `gender_score`; see `column_of`). Features are
[N, D] float16 of unit length; row n belongs to item n.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

VERSION = 1  # of what is stored; increase it when old galleries can no longer be read
SURE = 1.0  # the score of a label; that of a guess is lower

Guesses = dict[str, tuple[list[str], list[float]]]  # by attribute: class and score of each image

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # `id_of`; stays the same when the gallery changes
        ("path", pa.string()),  # of the file, relative to the manifest's `root` if below it
        ("frame_time", pa.float64()),  # seconds in a video; null for a picture
        ("left", pa.int32()),  # the person's box in pixels; null if the whole picture is the person
        ("top", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size", pa.int64()),  # of the file, in bytes
        ("mtime_ns", pa.int64()),  # of the file
        ("digest", pa.string()),  # of the file: 16 hexadecimal digits of SHA-256
        ("taken", pa.timestamp("s")),  # when the picture was taken (EXIF), or null
        ("view", pa.string()),  # "aerial", "ground", or null
        ("camera", pa.string()),  # or null
        ("source", pa.string()),  # the data set's source, or the folder that was indexed
        ("identity", pa.string()),  # the data set's id of the person, or null
    ]
)


def id_of(path: str, frame_time: float | None, box: Sequence[int] | None) -> int:
    """The id of an item: 63 bits of a hash of what it shows."""
    shown = f"{path}\0{frame_time}\0{None if box is None else list(box)}"
    digest = hashlib.sha256(shown.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def clock(frame_time: float) -> str:
    """A time in a video as minutes and seconds, such as 1:02.5."""
    minutes, seconds = divmod(round(frame_time, 1), 60)
    return f"{minutes:.0f}:{seconds:04.1f}"


def column_of(attribute: str) -> str:
    """The column of an attribute: its name, or `person_height` if SCHEMA has that name itself."""
    taken = attribute in SCHEMA.names or attribute.removesuffix("_score") in SCHEMA.names
    return f"person_{attribute}" if taken else attribute


def schema_with(attributes: Sequence[str]) -> pa.Schema:
    """SCHEMA, with two more columns for each attribute."""
    fields = list(SCHEMA)
    for name in map(column_of, attributes):
        fields += [pa.field(name, pa.string()), pa.field(f"{name}_score", pa.float32())]
    return pa.schema(fields)
