"""JSON and YAML as data. A key that stands twice is an error: readers commonly take the last one in
silence. A byte-order mark in front is passed over; UTF-16 is read as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Any

import yaml

LARGEST_YAML = 2**18  # bytes; the files of options here have some hundreds
LONGEST_NUMBER = 40  # characters; YAML's 0x... and 1:59:59 may be longer than can be computed
MOST_MERGED = 1000  # keys that come by <<


def load_json(content: bytes) -> Any:
    """Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r:.60} stands twice in {found!r:.200}; keep one")
        return found

    return json.loads(content, object_pairs_hook=unique)


class Loader(yaml.SafeLoader):
    """Safe YAML that also reads `!!python/tuple`, which IRRA-family configs.yaml files carry."""

    merged = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or _is_merge(key):
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # refused below
            if name in lines:
                place = f"lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"the key {name!r:.60} stands twice ({place}); keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """PyYAML copies what `<<` names into its place; of merges of merges each copy may be twice
        the one before."""
        for key, value in node.value:
            for source in _mappings(value) if _is_merge(key) else ():
                self.merged += len(source.value)
                if self.merged > MOST_MERGED or any(_is_merge(key) for key, _ in source.value):
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(
                        f"line {line}: << names a mapping that has << itself, or "
                        f"brings more than {MOST_MERGED} keys; write them out"
                    )
        super().flatten_mapping(node)


def _is_merge(key: yaml.Node) -> bool:
    return key.tag == "tag:yaml.org,2002:merge"


def _mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    """What a `<<` names: one mapping, or a list of them."""
    found = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [one for one in found if isinstance(one, yaml.MappingNode)]


def _number(kind: str) -> Callable[[Loader, Any], Any]:
    def construct(loader: Loader, node: yaml.Node) -> Any:
        if len(node.value) > LONGEST_NUMBER:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: a number of {len(node.value)} characters")
        return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)

    return construct


def _tuple(loader: Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node)


Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _number(kind))


def load_yaml(content: bytes) -> Any:
    """Raises yaml.YAMLError, ValueError or RecursionError."""
    if len(content) > LARGEST_YAML:
        raise ValueError(f"{len(content)} bytes; such a file has {LARGEST_YAML} at most")
    return yaml.load(content, Loader=Loader)
