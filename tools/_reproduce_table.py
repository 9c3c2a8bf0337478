"""Reads a table of reproduce.py: rows of options over a base preset, with the published metrics."""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config import read_preset
from utils.documents import read_yaml_file
from utils.errors import UserError, suggest
from utils.files import PROJECT, expand
from utils.metrics import METRICS
from utils.options import OPTIONS
from utils.text import HIDDEN

TABLES = PROJECT / "configs/tables"
TABLE_KEYS = {
    "title": str, "base": str, "rows": list, "options": dict, "paired": bool, "against": str,
}  # fmt: skip
PUBLISHED_KEYS = {"name": str, "encoder": str, "published": dict, "published_only": bool}
ROW_KEYS = {
    **PUBLISHED_KEYS, "base": str, "options": dict, "needs": str, "ablation": bool,
}  # fmt: skip
# What a row may need: weights of another project, by the option of reproduce.py that names a file.
WEIGHTS = {"mllm4text": "MLLM4Text-ReID", "ham": "HAM"}
KINDS = {str: "text", list: "a list", dict: "a mapping", bool: "true or false"}
MOST_ROWS = 500
# reproduce.py sets these itself, so a table's values would have no effect.
NOT_IN_TABLES = ("name", "output_dir", "root_dir", "seed", "resume", "resume_ckpt_file")


@dataclass
class Table:
    """A table file, read and checked.

    `against` is the row that the others are compared with, "" if the table does not ask for it.
    """

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    against: str = ""


def read_table(name: str) -> Table:
    """`configs/tables/NAME.yaml`, or a path. Raises UserError that names the faulty entry."""
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    known = sorted(p.stem for p in TABLES.glob("*.yaml"))
    if not path.is_file():
        raise UserError(
            f"--table {name}: no such table.{suggest(name, known)} Known: {', '.join(known)}"
        )
    try:
        content = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(content, dict) or not {"title", "base", "rows"} <= set(content):
        raise UserError(
            f"{path}: a table needs title, base and rows; it may have options, paired, against"
        )
    _check_fields(content, TABLE_KEYS, str(path))
    if not 0 < len(content["rows"]) <= MOST_ROWS:
        raise UserError(f"{path}: it has {len(content['rows'])} rows; a table has 1 to {MOST_ROWS}")
    rows = []
    slugs: dict[str, str] = {}
    for number, row in enumerate(content["rows"], 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or "name" not in row:
            raise UserError(f"{where}: a row needs a name, and may have {', '.join(ROW_KEYS)}")
        row = {**row, "name": str(row["name"])} if type(row["name"]) in (int, float) else row
        _check_fields(row, ROW_KEYS, where)
        name = row["name"]
        where = f"{path}, row {name}"
        if not name.strip() or len(name) > 100 or HIDDEN.search(name):
            raise UserError(f"{where}: its name must be a line of 1 to 100 characters")
        if same := slugs.get(slug(name)):  # their jobs would share a folder, or be one row
            alike = " already" if same == name else ", apart from case and punctuation"
            raise UserError(f"{where}: row {same} has this name{alike}")
        slugs[slug(name)] = name
        if row.get("published_only"):
            if other := [key for key in row if key not in PUBLISHED_KEYS]:
                raise UserError(f"{where}: published_only: it is not trained; remove {other[0]}")
            if not row.get("published"):
                raise UserError(f"{where}: published_only: it has no published metrics; add them")
        if row.get("needs", "ham") not in WEIGHTS:
            raise UserError(f"{where}: needs is '{row['needs']}'; known: {', '.join(WEIGHTS)}")
        for metric, value in row.get("published", {}).items():
            if metric not in METRICS or type(value) not in (int, float) or not 0 <= value <= 100:
                raise UserError(
                    f"{where}: published {metric}: {reprlib.repr(value)}; expected "
                    f"{', '.join(METRICS)} in percent"
                )
        base = row["base"] if "base" in row else content["base"]
        if HIDDEN.search(base):
            raise UserError(f"{where}: base: {base!r:.60} is not the name of a file")
        values = read_preset(path.parent / expand(base))
        for key, value in {**content.get("options", {}), **row.get("options", {})}.items():
            if key not in OPTIONS:
                raise UserError(f"{where}: unknown option '{key}'")
            if key in NOT_IN_TABLES:
                raise UserError(f"{where}: {key} is not an option of a row: this tool sets it")
            values[key] = OPTIONS[key].coerce(value, where)
        rows.append({**row, "values": values})
    return Table(path.stem, content["title"], rows, _reference(content, rows, path))


def _reference(content: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> str:
    """The row that the others are compared with: that of `against`, or the first one; "" without
    `paired`. Raises UserError."""
    trained = [row["name"] for row in rows if not row.get("published_only")]
    if not trained:
        raise UserError(f"{path}: all rows are published_only; one at least must be trained")
    if not content.get("paired"):
        if "against" in content:
            raise UserError(f"{path}: against is for tables with paired: true")
        return ""
    against = content.get("against", trained[0])
    if against not in trained:
        raise UserError(
            f"{path}: against: no row '{against}' is trained.{suggest(against, trained)}"
        )
    return against


def _check_fields(fields: dict[Any, Any], known: Mapping[str, type], where: str) -> None:
    """Raise UserError unless all keys are known and their values have the right type."""
    for key, value in fields.items():
        if key not in known:
            raise UserError(f"{where}: '{key}': unknown.{suggest(str(key), known)}")
        if not isinstance(value, known[key]):
            kind = KINDS[known[key]]
            raise UserError(f"{where}: {key} must be {kind}, got {reprlib.repr(value)}")


def slug(name: str) -> str:
    """A row's name as part of a folder name."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain or hashlib.sha256(name.encode()).hexdigest()[:8]  # for names in another script
