"""The sentences that refuse a configuration: a misspelt key, a missing setting, a value that is not allowed."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from orchestrator.config import yaml_dialect
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.config.setting_list import Schema, Setting, general_key, section, settings

COMMAND_LINE = "command line"
"""Where a sentence says that a setting comes from, if not from the recipe."""


def unknown_key(schema: Schema, key: str) -> str:
    """The sentence that refuses a misspelt key: it is not a setting, and which setting is nearest."""
    parts = key.split(".")
    for other, command in ((Config, "train"), (SFTConfig, "sft")):
        if other is not schema and parts[0] in other.model_fields and parts[0] not in schema.model_fields:
            return f"{key} is not a setting here. Leave it out, or use `counterpoint {command}`, which has it."
    known = {setting.key for setting in settings(schema)}
    known |= {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
    folder, _, name = general_key(parts).rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == folder}
    namesakes = [k for k in known if k.rpartition(".")[2] == name]
    near = (
        [siblings[each] for each in difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)]
        or difflib.get_close_matches(general_key(parts), namesakes, n=1, cutoff=0.0)
        or [siblings[each] for each in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
        or difflib.get_close_matches(general_key(parts), known, n=1, cutoff=0.7)
    )
    if near:
        return f"{key} is not a setting. Did you mean {_with_indices(near[0], parts)}?"
    return f"{key} is not a setting. `counterpoint config` lists them all."


def _with_indices(general: str, parts: list[str]) -> str:
    """``general`` with the indices of the key that was meant, where both have one in the same place."""
    names = general.split(".")
    kept = [
        parts[place] if name == "*" and place < len(parts) and parts[place].isdigit() else name
        for place, name in enumerate(names)
    ]
    return ".".join(kept)


@dataclass(frozen=True)
class Refusals:
    """Makes sentences of what pydantic found in a recipe: where, what, why, what to do.

    Attributes:
        schema: what the recipe was checked against.
        tree: the recipe's keys and values, overrides applied.
        recipe: the file, as the user named it.
        overridden: the dotted keys that the command line set.
    """

    schema: Schema
    tree: dict[str, Any]
    recipe: str
    overridden: frozenset[str]

    def of(self, error: ErrorDetails) -> list[str]:
        """The sentences about one of pydantic's errors; none where other errors say it already."""
        location: tuple[str | int, ...] = error["loc"]
        key = ".".join(str(part) for part in location)
        if error["type"] == "extra_forbidden":
            return [f"{self._source(key)}: {unknown_key(self.schema, key)}"]
        setting = self._setting(location)
        if error["type"] == "too_short" and error["ctx"]["min_length"] <= len(error["input"]):
            return []  # entries that are wrong themselves don't count, and have a refusal of their own
        if error["type"] == "missing" and (setting is None or setting.key == general_key(location)):
            return self._missing(key)
        if setting is None:
            return [self._section(key, error)]
        place = ".".join(str(part) for part in location[: setting.key.count(".") + 1])
        value = _value_at(self.tree, location[: setting.key.count(".") + 1])
        near = self._near_value(setting, value)
        return [f"{self._source(place)}: {place} = {_shown(value)} is not allowed: it must be {setting.allowed}.{near}"]

    def of_numbers(self) -> list[str]:
        """A sentence about each number that is infinite or not a number, which JSON can't carry to pydantic."""
        return [
            f"{self._source(key)}: {key} = {value} is not a finite number. Give one."
            for key, value in _leaves(self.tree, "")
            if isinstance(value, float) and not math.isfinite(value)
        ]

    def _source(self, key: str) -> str:
        given = any(key == known or key.startswith(f"{known}.") for known in self.overridden)
        return COMMAND_LINE if given else self.recipe

    def _setting(self, location: Sequence[str | int]) -> Setting | None:
        known = {setting.key: setting for setting in settings(self.schema)}
        for length in range(len(location), 0, -1):
            if (setting := known.get(general_key(location[:length]))) is not None:
                return setting
        return None

    def _missing(self, key: str) -> list[str]:
        general = general_key(key.split("."))
        exact = [setting for setting in settings(self.schema) if setting.key == general]
        inside = [s for s in settings(self.schema) if s.key.startswith(f"{general}.") and s.is_required]
        found = exact or [setting for setting in inside if "*" not in setting.key] or inside
        if not found:
            return [f"{self.recipe}: {key} is missing. Add that section, with {_section_names(self.schema, key)}."]
        names = [key if setting.key == general else setting.key for setting in found]
        return [
            f"{self.recipe}: {name} is missing ({setting.description.rstrip('.')}). Set it to {setting.allowed}."
            for name, setting in zip(names, found, strict=True)
        ]

    def _section(self, key: str, error: ErrorDetails) -> str:
        names = _section_names(self.schema, key)
        return f"{self._source(key)}: {key} = {_shown(error['input'])} must be a section with the settings {names}."

    def _near_value(self, setting: Setting, value: Any) -> str:
        if not setting.allowed.startswith("one of ") or not isinstance(value, str):
            return ""
        choices = setting.allowed.removeprefix("one of ").removesuffix(", or null").split(", ")
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        return f" Did you mean {near[0]}?" if near else ""


def _section_names(schema: Schema, key: str) -> str:
    current: Schema | None = schema
    for part in key.split("."):
        if current is None or part not in current.model_fields:
            return "of its description"
        current = section(current.model_fields[part].annotation)
    return ", ".join(current.model_fields) if current is not None else "of its description"


def _value_at(tree: Any, location: Sequence[str | int]) -> Any:
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _leaves(tree: Any, prefix: str, depth: int = 0) -> Iterable[tuple[str, Any]]:
    if depth > 50:
        return
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if pairs is None:
        yield prefix, tree
        return
    for key, value in pairs:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _shown(value: Any) -> str:
    """A value as the recipe would hold it: text in quotes only where it would be read as something else without."""
    plain = isinstance(value, str) and yaml_dialect.is_plain(value)
    text = value if plain else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
