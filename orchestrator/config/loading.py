"""From a recipe and the command line's overrides to a configuration, or to one message that names every problem.

A path is relative to where it is written: in a recipe to the recipe's folder, on the command line to the working
directory. What a run writes (`run.folder`, `sft.export_folder`) is always relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import overrides as command_line
from orchestrator.config import yaml_dialect
from orchestrator.config.schema import Config, ImpossibleCombinationError
from orchestrator.config.setting_list import (
    Schema,
    Setting,
    entry,
    general_key,
    is_output,
    section,
    settings,
    without_none,
)

S = TypeVar("S", bound=BaseModel)

COMMAND_LINE = "command line"


class ConfigError(Exception):
    """The configuration can't be used.

    Attributes:
        problems: every problem, each saying where, what, why and what to do.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_config(path: Path, overrides: Sequence[str] = (), schema: type[S] = Config) -> S:  # type: ignore[assignment]
    """The recipe at ``path`` with dotted overrides applied, checked, with every path absolute.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each; the value is YAML ("trainer.betas=[0.9, 0.99]").
        schema: what to check against: :class:`Config` or :class:`SFTConfig`.
    Raises:
        ConfigError: lists every problem.
    """
    tree = read_recipe(path)
    recipe_folder = Path(os.path.abspath(path)).parent
    tree = _absolute(schema, tree, recipe_folder)
    overridden, problems = _apply(schema, tree, overrides)
    _place_outputs(schema, tree)
    complaints = _Complaints(schema, tree, str(path), frozenset(overridden))
    problems += complaints.about_numbers()
    try:
        config = schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [complaint for each in error.errors() for complaint in complaints.about(each)]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved configuration as a recipe that loads back to an equal one. Replaces ``path`` at once.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(yaml_dialect.dump(config.model_dump(mode="json")), encoding="utf-8")
    temporary.replace(path)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe's own keys and values, unchecked.

    Raises:
        ConfigError: there is no such file, or it isn't a YAML mapping.
    """
    try:
        tree = yaml_dialect.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such recipe.{_near_files(path)}"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a folder; name a recipe in it.{_near_files(path / 'x.yaml')}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not text in UTF-8 (byte {error.start}); a recipe is a YAML file."]) from None
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}."]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: {yaml_dialect.where(error)}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply to be a recipe."]) from None
    if tree is None:
        raise ConfigError([f"{path}: is empty; a recipe gives at least the settings without a default."])
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: is a {type(tree).__name__}; a recipe is a mapping of sections (model: ...)."])
    try:
        return json.loads(json.dumps(tree, default=str))
    except (RecursionError, ValueError, TypeError):
        raise ConfigError([f"{path}: holds an anchor that contains itself, or a key that isn't text."]) from None


def _near_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    known = sorted({*folder.glob("*.yaml"), *folder.glob("*.yml"), *Path("recipes").glob("*.yaml")})
    names = {str(each): each for each in known}
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.6)
    near = near or [name for name, each in names.items() if each.stem == path.stem][:1]
    if near:
        return f" Did you mean {near[0]}?"
    return f" There are: {', '.join(list(names)[:8])}." if names else f" {folder}/ holds no recipes."


def _absolute(annotation: Any, value: Any, folder: Path, output: bool = False) -> Any:
    """``value`` with every path in it absolute: inputs from ``folder``, outputs from the working directory."""
    schema, each = section(annotation), entry(annotation)
    if schema is not None and isinstance(value, dict):
        fields = schema.model_fields
        return {
            key: _absolute(fields[key].annotation, inner, folder, is_output(fields[key])) if key in fields else inner
            for key, inner in value.items()
        }
    if each is not None and isinstance(value, list):
        return [_absolute(each, inner, folder, output) for inner in value]
    if without_none(annotation) is Path and isinstance(value, str) and value:
        return os.path.normpath((Path.cwd() if output else folder) / os.path.expanduser(value))
    return value


def _apply(schema: Schema, tree: dict[str, Any], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets each override in ``tree``; returns the keys that were set, and the problems."""
    keys, problems = [], []
    for text in overrides:
        try:
            override = command_line.parse(schema, text)
            value = _absolute(override.annotation, override.value, Path.cwd(), override.is_output)
            command_line.put(tree, override.path, value)
            keys.append(override.key)
        except command_line.OverrideError as error:
            problems.append(f"{COMMAND_LINE}: {error}")
    return keys, problems


def _place_outputs(schema: Schema, tree: dict[str, Any]) -> None:
    """Gives output paths that the recipe leaves out their defaults, absolute like all others."""
    for setting in settings(schema):
        if setting.path == "output" and isinstance(setting.default, Path):
            name, leaf = setting.key.split(".")
            inner = tree.setdefault(name, {})
            if isinstance(inner, dict):
                inner.setdefault(leaf, str(Path.cwd() / setting.default))


@dataclass(frozen=True)
class _Complaints:
    """Turns what pydantic found into sentences: where, what, why, what to do."""

    schema: Schema
    tree: dict[str, Any]
    recipe: str
    overridden: frozenset[str]

    def about(self, error: Any) -> list[str]:
        location: tuple[str | int, ...] = error["loc"]
        key = ".".join(str(part) for part in location)
        if error["type"] == "value_error" and isinstance(error["ctx"]["error"], ImpossibleCombinationError):
            return [f"{self.recipe}: {problem}" for problem in error["ctx"]["error"].problems]
        if error["type"] == "value_error":
            return [f"{self.recipe}: {error['ctx']['error']}"]
        if error["type"] == "extra_forbidden":
            return [f"{self._source(key)}: {command_line.unknown(self.schema, key)}"]
        setting = self._setting(location)
        if error["type"] == "too_short" and error["ctx"]["min_length"] <= len(error["input"]):
            return []  # entries that are wrong themselves don't count, and have their own complaint
        if error["type"] == "missing" and (setting is None or setting.key == general_key(location)):
            return self._missing(key)
        if setting is None:
            return [self._section(key, error)]
        place = ".".join(str(part) for part in location[: setting.key.count(".") + 1])
        value = _value_at(self.tree, location[: setting.key.count(".") + 1])
        near = self._near_value(setting, value)
        return [f"{self._source(place)}: {place} = {_shown(value)} is not allowed: it must be {setting.allowed}.{near}"]

    def about_numbers(self) -> list[str]:
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

    def _section(self, key: str, error: Any) -> str:
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
