"""JSON and YAML as data. A key that stands twice is an error: readers commonly take the last one in
silence. A byte-order mark in front is passed over; UTF-16 is read as well."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # refused below
            if name in lines:
                place = f"lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"the key {name!r:.60} stands twice ({place}); keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)


Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node)
)


def load_yaml(content: bytes) -> Any:
    """Raises yaml.YAMLError, ValueError or RecursionError."""
    return yaml.load(content, Loader=Loader)
