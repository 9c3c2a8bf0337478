"""FIRM's attributes, their classes and sentences, as `configs/attributes.yaml` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.documents import read_yaml_file
from utils.errors import UserError
from utils.files import PROJECT
from utils.tokenizer import MAX_TEXT, MAX_WORD, is_cut, text_problem

TOO_LONG = f"has more than {MAX_TEXT} characters, or a word of more than {MAX_WORD}"


@dataclass(frozen=True)
class Attribute:
    """The name of an attribute, its classes in the order of the labels, and their sentences."""

    name: str
    classes: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]


def read_attributes(path: str | Path) -> list[Attribute]:
    """Read `configs/attributes.yaml`. Raises UserError naming the entry that is wrong.

    If a relative path does not exist, it is tried in the project's folder, so that commands work
    from any folder.
    """
    shipped = PROJECT / path
    try:
        use_shipped = shipped.exists() and not Path(path).exists()
        entries = read_yaml_file(path, shipped if use_shipped else path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (--attributes_file)") from None
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
            raise UserError(f"{where}: two classes have one name: {', '.join(map(repr, classes))}")
        class_of: dict[str, object] = {}
        for name, sentences in classes.items():
            if not isinstance(sentences, list) or not sentences:
                raise UserError(f"{where}: class {name} has no sentences")
            for sentence in sentences:
                if problem := text_problem(sentence) or (TOO_LONG if is_cut(sentence) else ""):
                    raise UserError(f"{where}: class {name}: the sentence {problem}")
                if class_of.setdefault(sentence, name) != name:
                    raise UserError(
                        f"{where}: classes {class_of[sentence]} and {name} have the same sentence "
                        f"'{sentence:.60}'; keep it in one of them"
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
    """Raise UserError unless the file has sentences for a data set's labels, in the same order.

    Args:
        classes: number of classes by attribute, in the order of the labels.
        data: name of the data set.
        path: the file of `attributes`, for the message.
    """
    with_sentences = {a.name: len(a.classes) for a in attributes}
    if list(with_sentences.items()) != list(classes.items()):
        raise UserError(
            f"{path}: has sentences for {_listed(with_sentences)}; the labels of {data} are "
            f"{_listed(classes)}; give --attributes_file a file with these, in this order"
        )


def _listed(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} classes)" for name, count in classes.items())
