"""FIRM's attributes, their classes and sentences, as `configs/attributes.yaml` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.documents import load_yaml
from utils.errors import UserError
from utils.files import read_file
from utils.text import READ, WORD, fault, is_cut

TOO_LONG = f"has more than {READ} characters, or a word of more than {WORD}"


@dataclass(frozen=True)
class Attribute:
    """A name and, in label order, the classes with their sentences."""

    name: str
    classes: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]


def read_attributes(path: str | Path) -> list[Attribute]:
    """Read `configs/attributes.yaml`. Raises UserError naming the entry that is wrong.

    A relative path that is not there is looked for in the project's own folder, so that commands
    work from anywhere.
    """
    own = Path(__file__).parent.parent / path
    try:
        found = path if Path(path).exists() or not own.exists() else own
        entries = load_yaml(read_file(found))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (--attributes_file)") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of attributes")
    attributes: list[Attribute] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: attribute {number}"
        if not isinstance(entry, dict) or set(entry) != {"attribute", "classes"}:
            raise UserError(f"{where}: expected the keys 'attribute' and 'classes'")
        if not isinstance(entry["attribute"], str):
            raise UserError(f"{where}: its name must be text")
        where, classes = f"{where} ({entry['attribute']})", entry["classes"]
        if not isinstance(classes, dict) or len(classes) < 2:
            raise UserError(f"{where}: needs two classes or more")
        if len(set(map(str, classes))) < len(classes):
            raise UserError(f"{where}: two classes of one name, {', '.join(map(repr, classes))}")
        owners: dict[str, object] = {}
        for name, sentences in classes.items():
            if not isinstance(sentences, list) or not sentences:
                raise UserError(f"{where}: class {name} has no sentences")
            for sentence in sentences:
                if wrong := fault(sentence) or (TOO_LONG if is_cut(sentence) else ""):
                    raise UserError(f"{where}: class {name}: the sentence {wrong}")
                if owners.setdefault(sentence, name) != name:
                    raise UserError(
                        f"{where}: classes {owners[sentence]} and {name} have the same sentence "
                        f"'{sentence:.60}'; it can speak for one of them"
                    )
        if entry["attribute"] in {a.name for a in attributes}:
            raise UserError(f"{where}: an attribute before it has the same name")
        attributes.append(
            Attribute(
                entry["attribute"],
                tuple(map(str, classes)),
                tuple(map(tuple, classes.values())),
            )
        )
    return attributes


def check_labels(
    attributes: Sequence[Attribute], classes: Mapping[str, int], data: str, path: str | Path
) -> None:
    """Raise UserError unless a data set's labels are those that the file has sentences for.

    Args:
        classes: number of classes by attribute, in the order of the labels.
        data: name of the data set.
    """
    described = {a.name: len(a.classes) for a in attributes}
    if list(described.items()) != list(classes.items()):
        raise UserError(
            f"{path}: has sentences for {_shown(described)}; the labels of {data} are "
            f"{_shown(classes)} (--attributes_file)"
        )


def _shown(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} classes)" for name, count in classes.items())
