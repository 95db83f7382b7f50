"""Parses a dotted override of the command line (`trainer.learning_rate=3e-4`) and puts it into a recipe's tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml

from orchestrator.config import yaml_dialect
from orchestrator.config.refusals import unknown_key
from orchestrator.config.setting_list import Schema, entry, is_output, section, without_none


class OverrideError(Exception):
    """An override that can't be applied; says which, why and what to write instead."""


@dataclass(frozen=True, slots=True)
class Override:
    """One parsed override.

    Attributes:
        key: dotted, as given.
        annotation: type of the setting, for paths in the value.
        value: parsed.
        is_output: whether the run writes to the path it holds.
    """

    key: str
    annotation: Any
    value: Any
    is_output: bool

    @property
    def path(self) -> tuple[str, ...]:
        """The key's parts."""
        return tuple(self.key.split("."))


def parse_override(schema: Schema, text: str) -> Override:
    """An override from ``key=value``; leading dashes are ignored, the value is YAML.

    Raises:
        OverrideError: it has no ``=``, its key is not a setting, or its value is not YAML.
    """
    key, equals, raw = text.partition("=")
    key = key.strip().lstrip("-")
    if not equals:
        if text.startswith("-"):
            raise OverrideError(f"{text} is not an option. Settings are given as key=value (trainer.steps=10).")
        raise OverrideError(f"{text} is not an override. Write key=value without spaces (trainer.steps=10).")
    if not key:
        raise OverrideError(f"{text} names no setting before the =. Write key=value (trainer.steps=10).")
    annotation, output = _find(schema, key)
    return Override(key, annotation, _value(annotation, key, raw), output)


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set ``value`` at ``path`` in a recipe's tree, making sections that are absent.

    Raises:
        OverrideError: the path leads through a list that has no such entry, or through a plain value.
    """
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        node = _child(node, part, ".".join(path[: depth + 1]))
    last = path[-1]
    if isinstance(node, list):
        node[_index(node, last, ".".join(path[:-1]))] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise OverrideError(f"{'.'.join(path)} can't be set: {'.'.join(path[:-1])} is {node!r}, not a section.")


def _find(schema: Schema, key: str) -> tuple[Any, bool]:
    """Annotation of the setting or section at ``key``, and whether it is an output path."""
    annotation: Any = schema
    output = False
    parts = key.split(".")
    for depth, part in enumerate(parts):
        inner, each = section(annotation), entry(annotation)
        if inner is not None:
            if part not in inner.model_fields:
                raise OverrideError(unknown_key(schema, key))
            annotation, output = inner.model_fields[part].annotation, is_output(inner.model_fields[part])
        elif each is not None:
            if not part.isdigit():
                whole = ".".join(parts[:depth])
                raise OverrideError(f"{key}: {whole} is a list; write an index ({whole}.0) instead of {part}.")
            annotation = each
        elif annotation is Any or get_origin(without_none(annotation)) is dict:
            annotation = Any
        else:
            whole = ".".join(parts[:depth])
            raise OverrideError(f"{key} is not a setting: {whole} is a single value. Write {whole}=...")
    return annotation, output


def _value(annotation: Any, key: str, raw: str) -> Any:
    is_text = without_none(annotation) in (str, Path)
    if is_text and not raw.strip().startswith(('"', "'")) and raw.strip() not in ("", "null", "~"):
        return raw
    try:
        value = yaml_dialect.load(raw)
    except yaml.YAMLError as error:
        raise OverrideError(f"{key}={raw} is not YAML: {yaml_dialect.where(error)}") from None
    return "" if value is None and annotation is str and not raw.strip() else value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key.rpartition(".")[0])]
    if not isinstance(node, dict):
        raise OverrideError(f"{key} can't be reached: {key.rpartition('.')[0]} is {node!r}, not a section.")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(entries: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    held = f"holds {', '.join(f'{key}.{index}' for index in range(len(entries)))}" if entries else "is empty"
    raise OverrideError(f"{key}.{part} is not there: {key} {held}. Give the whole list with {key}=[...].")
