"""The schema as a list of settings: dotted key, what is allowed, default, description. For messages and documents."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchestrator.config.schema import Output

ANY_ENTRY = "*"
"""Stands for an index or a free key in the key of a setting ("reward.components.*.weight")."""

Schema = type[BaseModel]


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the schema.

    Attributes:
        key: dotted, with ``*`` for an entry of a list.
        annotation: its type.
        allowed: what it may be, in words that follow "must be".
        default: its default; meaningless where ``is_required``.
        is_required: whether a recipe must give it.
        description: the schema's sentence about it.
        path: "input" is relative to the recipe, "output" to the working directory; None is not a path.
    """

    key: str
    annotation: Any
    allowed: str
    default: Any
    is_required: bool
    description: str
    path: Literal["input", "output"] | None


def settings(schema: Schema) -> list[Setting]:
    """Every setting of a schema, in the order in which it declares them."""
    return list(_walk(schema, "", required=True))


def without_none(annotation: Any) -> Any:
    """The annotation without its ``| None`` and its ``Annotated``; a real union stays as it is."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        return without_none(kinds[0]) if len(kinds) == 1 else annotation
    return annotation


def section(annotation: Any) -> Schema | None:
    """The model class behind an annotation, or None where it isn't a section."""
    kind = without_none(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def entry(annotation: Any) -> Any | None:
    """Annotation of a list's entries, or None where it isn't a list."""
    kind = without_none(annotation)
    return get_args(kind)[0] if get_origin(kind) in (tuple, list) else None


def is_output(field: FieldInfo) -> bool:
    """Whether the run writes to the path in this field."""
    return any(isinstance(mark, Output) for mark in field.metadata)


def general_key(location: Sequence[str | int]) -> str:
    """The key of a setting for a place in a document: indices become ``*``."""
    return ".".join(ANY_ENTRY if isinstance(part, int) or part.isdigit() else part for part in location)


def _walk(schema: Schema, prefix: str, *, required: bool) -> Iterable[Setting]:
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        needed = required and field.is_required()
        inner, entries = section(field.annotation), entry(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{key}.", required=needed or (required and not _is_optional(field)))
            continue
        yield Setting(
            key=key,
            annotation=field.annotation,
            allowed=_allowed(field.annotation, field.metadata),
            default=None if field.is_required() else field.get_default(call_default_factory=True),
            is_required=needed and field.default is PydanticUndefined,
            description=field.description or "",
            path=_path_kind(field),
        )
        if entries is not None and (each := section(entries)) is not None:
            yield from _walk(each, f"{key}.{ANY_ENTRY}.", required=True)


def _is_optional(field: FieldInfo) -> bool:
    return types.NoneType in get_args(field.annotation)


def _path_kind(field: FieldInfo) -> Literal["input", "output"] | None:
    leaf = entry(field.annotation) or without_none(field.annotation)
    if leaf is not Path:
        return None
    return "output" if is_output(field) else "input"


def _allowed(annotation: Any, marks: Sequence[Any]) -> str:
    kind = without_none(annotation)
    words = _allowed_kind(kind, marks)
    return f"{words}, or null" if types.NoneType in get_args(annotation) else words


def _allowed_kind(kind: Any, marks: Sequence[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(value) for value in arguments)
    if origin in (tuple, list):
        return _allowed_list(arguments, marks)
    if origin is dict:
        return "a mapping from text to " + ("numbers" if arguments[1] in (int, float) else "any value")
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    words = names.get(kind, "any value")
    return " ".join([words, *(bound for mark in marks if (bound := _bound(mark)))])


def _allowed_list(arguments: tuple[Any, ...], marks: Sequence[Any]) -> str:
    if arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} entries, each {_allowed_kind(arguments[0], ())}"
    least = next((mark.min_length for mark in marks if isinstance(mark, annotated_types.MinLen)), 0)
    at_least = f" with at least {least} entry" if least else ""
    inner = section(arguments[0])
    if inner is not None:
        return f"a list{at_least}, each with the settings {', '.join(inner.model_fields)}"
    return f"a list{at_least}, each {_allowed_kind(arguments[0], ())}"


def _bound(mark: Any) -> str:
    match mark:
        case annotated_types.Ge():
            return f"of at least {mark.ge:g}"
        case annotated_types.Gt():
            return f"above {mark.gt:g}"
        case annotated_types.Le():
            return f"up to {mark.le:g}"
        case annotated_types.Lt():
            return f"below {mark.lt:g}"
    return ""


def default_text(default: Any) -> str:
    """A default as a recipe would write it."""
    match default:
        case None:
            return "null"
        case bool():
            return str(default).lower()
        case tuple() | list():
            return f"[{', '.join(default_text(value) for value in default)}]"
        case float():
            return f"{default:g}"
    return str(default)
