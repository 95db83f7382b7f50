"""Reads a recipe, applies the command line's overrides, checks the result; saves a configuration as a recipe.

A path is relative to where it is written: in a recipe to the recipe's folder, on the command line to the working
directory. What a run writes (`run.folder`, `sft.export_folder`) is always relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import cross_checks, yaml_dialect
from orchestrator.config.overrides import OverrideError, parse_override, put
from orchestrator.config.refusals import COMMAND_LINE, Refusals
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.config.setting_list import Schema, entry, is_output, section, settings, without_none

S = TypeVar("S", bound=Config | SFTConfig)


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
    refusals = Refusals(schema, tree, str(path), frozenset(overridden))
    problems += refusals.of_numbers()
    try:
        config = schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [refusal for each in error.errors() for refusal in refusals.of(each)]
        raise ConfigError(dict.fromkeys(problems)) from None
    problems += [f"{path}: {problem}" for problem in cross_checks.problems(config)]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config  # type: ignore[return-value]  # mypy widens S to its bound


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
    """Set each override in ``tree``; returns the keys that were set, and the problems."""
    keys, problems = [], []
    for text in overrides:
        try:
            override = parse_override(schema, text)
            value = _absolute(override.annotation, override.value, Path.cwd(), override.is_output)
            put(tree, override.path, value)
            keys.append(override.key)
        except OverrideError as error:
            problems.append(f"{COMMAND_LINE}: {error}")
    return keys, problems


def _place_outputs(schema: Schema, tree: dict[str, Any]) -> None:
    """Give output paths that the recipe leaves out their defaults, absolute like all others."""
    for setting in settings(schema):
        if setting.path == "output" and isinstance(setting.default, Path):
            name, leaf = setting.key.split(".")
            inner = tree.setdefault(name, {})
            if isinstance(inner, dict):
                inner.setdefault(leaf, str(Path.cwd() / setting.default))
