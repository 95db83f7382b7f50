"""Loads prompts from files and registered builders. A bad row is quarantined and counted; a bad data set is refused."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollout.config import DatasetConfig
from rollout.failures import DataError, Failure, FailureError, FailureKind
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.rows import prompt_from_row, read_rows
from rollout.user_code import user_traceback

Builder = Callable[..., Iterable[Prompt | dict[str, Any]]]
Rows = Iterable[tuple[int, Prompt | dict[str, Any] | Failure]]

_builders: dict[str, Builder] = {}


class DatasetError(FailureError, ValueError):
    """The whole data set can't be used: a file, column or builder is missing, or no row is usable."""

    def __init__(self, what: str | Failure) -> None:
        super().__init__(what if isinstance(what, Failure) else Failure(FailureKind.DATA, "dataset_unusable", what))


def dataset_builder(name: str) -> Callable[[Builder], Builder]:
    """Register a data-set builder under a name that recipes use (``data.train.builder``).

    The function is called as ``build(media, split, **arguments)`` with the media store, the split and the recipe's
    arguments, and yields prompts, or rows: dictionaries that map to prompts as the rows of a file do, where images may
    also be PIL images. A row that can't be used is quarantined. An exception ends the run.

    Raises:
        ValueError: another function has the name already.
    """

    def register(build: Builder) -> Builder:
        known = _builders.get(name)
        if known is not None and _origin(known) != _origin(build):
            raise ValueError(f"dataset builder {name!r} is registered twice: by {_origin(known)} and {_origin(build)}")
        _builders[name] = build
        return build

    return register


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a data set, and the rows that are quarantined.

    Attributes:
        name: what messages and lineage call it (file name, or builder and split).
        source: the file, or the builder with its arguments.
        prompts: in the order of the source.
        quarantined: rows that can't be used, each with its number (from 1) and the failure.
    """

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    quarantined: tuple[tuple[int, Failure], ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prompt ids in order. Equal digests mean equal prompts, media included."""
        return hashlib.sha256("\n".join(prompt.prompt_id for prompt in self.prompts).encode()).hexdigest()

    @property
    def quarantined_by_reason(self) -> dict[str, int]:
        """How many rows are quarantined, by reason."""
        return dict(Counter(failure.reason for _, failure in self.quarantined))

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(config: DatasetConfig, media: MediaStore, *, base: Path) -> PromptSet:
    """Load the prompts that `config` names, and store their media.

    A row's text becomes a user message, each ``<image>`` in it one image of the images column in turn; a row may also
    hold chat messages ([{"role": …, "content": text or parts}]). Columns that the config doesn't name become metadata.

    Args:
        config: where the prompts are and what the columns mean. With `limit`, reading stops at that many usable ones.
        media: the store that takes the images.
        base: folder that a relative ``config.path`` is relative to. Image paths are relative to the data file, those
            from a builder to `base`.
    Raises:
        DatasetError: the file, a column or the builder doesn't exist, the file can't be parsed at all, the builder
            raised, or no row is usable.
    """
    if (config.path is None) == (config.builder is None):
        raise DatasetError("a data set needs either a path (.jsonl, .parquet) or a builder: set exactly one of the two")
    if config.path is not None:
        path = (base / config.path).resolve()
        images_base, name, source = path.parent, path.stem, str(path)
        rows: Rows = _rows_of_file(path, config)
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in sorted(config.arguments.items()))
        name, source = f"{config.builder}-{config.split}", f"{config.builder}({config.split!r}, {arguments})"
        images_base = base.resolve()
        rows = _rows_of_builder(config, media)
    return _collect(rows, config, media, images_base, name, source)


def _collect(
    rows: Rows,
    config: DatasetConfig,
    media: MediaStore,
    images_base: Path,
    name: str,
    source: str,
) -> PromptSet:
    prompts: list[Prompt] = []
    quarantined: list[tuple[int, Failure]] = []
    columns: dict[str, None] = {}
    wanted = _wanted_columns(config)
    for number, row in rows:
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        try:
            if isinstance(row, Failure):
                raise DataError(row)
            prompts.append(prompt_from_row(row, config, media, images_base))
        except DataError as error:
            quarantined.append((number, error.failure))
        if len(prompts) == config.limit:
            break
    if columns:
        for key, column in wanted.items():
            if column not in columns:
                raise DatasetError(_missing_column(source, key, column, list(columns)))
    if not prompts:
        raise DatasetError(_nothing_usable(source, quarantined))
    return PromptSet(name, source, tuple(prompts), tuple(quarantined))


def _rows_of_file(path: Path, config: DatasetConfig) -> Rows:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DatasetError(f"the data file {path} {what}.{_did_you_mean(path.name, siblings)}")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DatasetError(f"the data file {path} is neither .jsonl nor .parquet; convert it, or use a dataset builder")
    try:
        columns, rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"the data file {path} can't be read: {error}") from error
    if columns is not None:
        for key, column in _wanted_columns(config).items():
            if column not in columns:
                raise DatasetError(_missing_column(str(path), key, column, columns))
    return _guarded(rows, path)


def _guarded(rows: Rows, path: Path) -> Rows:
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise DatasetError(f"the data file {path} can't be read to its end: {error}") from error


def _rows_of_builder(config: DatasetConfig, media: MediaStore) -> Rows:
    name = str(config.builder)
    build = _builders.get(name)
    if build is None:
        known = ", ".join(sorted(_builders)) or "none"
        raise DatasetError(
            f"no dataset builder is registered as {name!r}.{_did_you_mean(name, _builders)} Registered: {known}. "
            "Name the file that registers it in data.modules"
        )
    try:
        inspect.signature(build).bind(media, config.split, **config.arguments)
    except TypeError as error:
        parameters = list(inspect.signature(build).parameters)[2:]
        hints = [_did_you_mean(key, parameters) for key in config.arguments if key not in parameters]
        takes = ", ".join(parameters) or "no arguments"
        raise DatasetError(f"dataset builder {name!r}: {error}; it takes {takes}.{''.join(hints)}") from error
    try:
        for number, row in enumerate(build(media, config.split, **config.arguments), start=1):
            if not isinstance(row, Prompt | dict):
                raise DatasetError(
                    f"dataset builder {name!r} yielded a {type(row).__name__} as row {number}; yield a Prompt or a dict"
                )
            yield number, row
    except DatasetError:
        raise
    except Exception as error:
        where = user_traceback(error, own_file=__file__)
        raise DatasetError(f"dataset builder {name!r} ({_origin(build)}) failed at {where}") from error


def _wanted_columns(config: DatasetConfig) -> dict[str, str]:
    """The columns that must exist, by the setting that names each."""
    columns = {
        "prompt_column": config.prompt_column,
        "images_column": config.images_column,
        "target_column": config.target_column,
    }
    return {key: column for key, column in columns.items() if column is not None}


def _missing_column(source: str, key: str, column: str, columns: list[str]) -> str:
    advice = " Set target_column: null if no reward needs a target." if key == "target_column" else ""
    return (
        f"{source} has no column {column!r} ({key}).{_did_you_mean(column, columns)} "
        f"It has: {', '.join(map(repr, columns))}.{advice}"
    )


def _nothing_usable(source: str, quarantined: list[tuple[int, Failure]]) -> str:
    if not quarantined:
        return f"{source} has no rows"
    counts = Counter(failure.reason for _, failure in quarantined)
    reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    examples = "; ".join(f"row {number}: {failure.message}" for number, failure in quarantined[:3])
    return f"{source} has no usable row: all {len(quarantined)} are quarantined ({reasons}). {examples}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _origin(build: Builder) -> str:
    code = getattr(build, "__code__", None)
    return f"{code.co_filename}:{build.__qualname__}" if code else repr(build)
