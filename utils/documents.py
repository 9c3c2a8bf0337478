"""Read JSON and YAML. A duplicate key is an error, of which common readers silently take the last.

A byte-order mark at the start is skipped; UTF-16 is read too."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.files import read_file

MAX_YAML = 2**18  # bytes; files of options have some hundreds
MAX_NUMBER = 40  # characters; a long 0x... or 1:59:59 of YAML would take hours to convert
MAX_MERGED = 1000  # keys that << copies


def load_json(content: bytes) -> Any:
    """The value of a JSON document. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r:.60} appears twice in {mapping!r:.200}; keep one")
        return mapping

    return json.loads(content, object_pairs_hook=unique)


def read_json_file(path: str | Path, what: str = "", advice: str = "") -> Any:
    """The value of a JSON file.

    Args:
        what, advice: the start and the end of the message about a file that cannot be read.

    Raises UserError.
    """
    try:
        return load_json(read_file(path))
    except OSError as error:
        reason: object = error.strerror
    except MemoryError:
        reason = "too large for this machine's memory"
    except (ValueError, RecursionError) as error:
        reason = f"malformed JSON: {error}"
    raise UserError(f"{path}: {what}{reason}{advice}")


def read_yaml_file(path: str | Path, source: str | Path | None = None) -> Any:
    """The value of a YAML file.

    Args:
        path: the name in messages.
        source: the file to read, if another.

    Raises OSError if it cannot be read, and UserError if it is not valid.
    """
    try:
        return load_yaml(read_file(source or path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def load_yaml(content: bytes) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError, ValueError or RecursionError."""
    if len(content) > MAX_YAML:
        raise ValueError(f"{len(content)} bytes; the limit is {MAX_YAML}")
    return yaml.load(content, Loader=Loader)


class Loader(yaml.SafeLoader):
    """Safe YAML that also reads `!!python/tuple`, as in configs.yaml of IRRA and its relatives."""

    merged = 0  # keys that << has copied

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or _is_merge(key):
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # `super` refuses it
            if name in lines:
                both = f"lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"the key {name!r:.60} appears twice ({both}); keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Limit the keys that `<<` copies: with nested merges their number may double each time."""
        for key, value in node.value:
            for source in _mappings(value) if _is_merge(key) else ():
                self.merged += len(source.value)
                if self.merged > MAX_MERGED or any(_is_merge(key) for key, _ in source.value):
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(
                        f"line {line}: << merges a mapping that has << itself, or more than "
                        f"{MAX_MERGED} keys; write them out"
                    )
        super().flatten_mapping(node)


def _is_merge(key: yaml.Node) -> bool:
    return key.tag == "tag:yaml.org,2002:merge"


def _mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    """The mappings that `<<` merges: its value is one mapping, or a list of them."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [each for each in nodes if isinstance(each, yaml.MappingNode)]


def _number(kind: str) -> Callable[[Loader, Any], Any]:
    """PyYAML's constructor of `int` or `float`, with a limit on the length."""

    def construct(loader: Loader, node: yaml.Node) -> Any:
        if len(node.value) > MAX_NUMBER:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"line {line}: a number of {len(node.value)} characters; the limit is {MAX_NUMBER}"
            )
        return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)

    return construct


def _tuple(loader: Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node)


Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _number(kind))
