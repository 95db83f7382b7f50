"""Turns a row of a data set into a prompt: columns and chat messages into typed messages and stored media."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet
from PIL import Image

from rollout.config import DatasetConfig
from rollout.failures import DataError, Failure, FailureKind
from rollout.media import MediaRef, MediaStore
from rollout.prompts import MediaPart, Message, Part, Prompt, Role, TextPart

IMAGE_PLACEHOLDER = "<image>"
NO_TARGET = "set target_column: null if no reward needs a target"


def read_rows(path: Path) -> tuple[list[str] | None, Iterator[tuple[int, dict[str, Any] | Failure]]]:
    """The columns of a .parquet file (None for .jsonl, which has no header), and the rows, numbered from 1."""
    if path.suffix == ".parquet":
        # Opened here, so that a file that isn't Parquet is refused before the first row is asked for.
        parquet = pyarrow.parquet.ParquetFile(path)
        return list(parquet.schema_arrow.names), _parquet_rows(parquet)
    return None, _jsonl_rows(path)


def column_is_filled(row: dict[str, Any], column: str) -> bool:
    """Whether the column of the row has a value: anything but null, NaN and blank text."""
    value = row.get(column)
    if isinstance(value, float):
        return not math.isnan(value)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def prompt_from_row(
    row: Prompt | dict[str, Any], config: DatasetConfig, media: MediaStore, images_base: Path
) -> Prompt:
    """The prompt of one row; its images are checked and stored.

    Raises:
        DataError: ``prompt_missing``, ``target_missing``, ``placeholder_mismatch``, ``message_malformed``,
            ``media_url_refused``, or a reason of the media store's.
    """
    if isinstance(row, Prompt):
        _check_prompt(row, config, media)
        return row
    if config.target_column is not None and not column_is_filled(row, config.target_column):
        raise DataError("target_missing", f"column {config.target_column!r} is empty; {NO_TARGET}")
    if not column_is_filled(row, config.prompt_column):
        raise DataError("prompt_missing", f"column {config.prompt_column!r} is empty")
    images = _image_cells(row.get(config.images_column) if config.images_column else None)
    messages = _messages(row[config.prompt_column], images, media, images_base)
    if config.system_prompt is not None:
        messages = (Message("system", (TextPart(config.system_prompt),)), *messages)
    used = {config.prompt_column, config.images_column, config.target_column}
    metadata = {key: _plain(value) for key, value in row.items() if key not in used and not isinstance(value, bytes)}
    target = _plain(row[config.target_column]) if config.target_column is not None else None
    return Prompt(messages, target, metadata)


def _check_prompt(prompt: Prompt, config: DatasetConfig, media: MediaStore) -> None:
    if config.target_column is not None and prompt.target is None:
        raise DataError("target_missing", f"the prompt has no target; {NO_TARGET}")
    if not any(message.role == "user" for message in prompt.messages):
        raise DataError("prompt_missing", "the prompt has no user message")
    for ref in prompt.media:
        if ref.kind == "image":
            media.load_image(ref)
        else:
            media.read(ref)


def _messages(prompt: Any, images: list[Any], media: MediaStore, images_base: Path) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise _malformed(f"a prompt must be text or a list of chat messages; this one is {type(prompt).__name__}")
    drafts = [(_role(turn), _content(turn["content"])) for turn in turns]
    if drafts[-1][0] == "assistant":
        raise _malformed("the last message has the role assistant, but the policy writes that message; remove it")
    placeholders = sum(part is IMAGE_PLACEHOLDER for _, parts in drafts for part in parts)
    if placeholders != len(images):
        raise DataError(
            "placeholder_mismatch",
            f"the prompt has {placeholders} image placeholder(s) but the row has {len(images)} image(s)",
        )
    queue = iter(images)

    def finish(part: object) -> Part:
        if isinstance(part, TextPart):
            return part
        return MediaPart(_store(next(queue) if part is IMAGE_PLACEHOLDER else part, media, images_base))

    return tuple(Message(role, tuple(finish(part) for part in parts)) for role, parts in drafts)


def _role(turn: Any) -> Role:
    if not isinstance(turn, dict) or "role" not in turn or turn.get("content") is None:
        raise _malformed(f"a chat message needs a role and content; this one is {str(turn)[:80]}")
    if turn["role"] not in get_args(Role):
        raise _malformed(f"the role {turn['role']!r:.80} is not one of {', '.join(get_args(Role))}")
    role: Role = turn["role"]
    return role


def _content(content: Any) -> list[object]:
    """Parts of a message: TextPart, IMAGE_PLACEHOLDER for the next image of the row, or the part's own image."""
    if isinstance(content, str):
        return _split_text(content)
    if not isinstance(content, list):
        raise _malformed(f"a message's content must be text or a list of parts; this one is {type(content).__name__}")
    parts: list[object] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            # Structured content says where images go, so "<image>" within its text is text.
            parts.append(TextPart(part["text"]))
        elif kind == "image":
            own = part.get("image") or part.get("path") or part.get("url")
            parts.append(IMAGE_PLACEHOLDER if own is None else own)
        else:
            raise _malformed(f"a message part must be of type text (with text) or image; this one is {str(part)[:80]}")
    return parts


def _split_text(text: str) -> list[object]:
    pieces = text.split(IMAGE_PLACEHOLDER)
    parts: list[object] = [TextPart(pieces[0])] if pieces[0] else []
    for piece in pieces[1:]:
        parts.append(IMAGE_PLACEHOLDER)
        if piece:
            parts.append(TextPart(piece))
    return parts


def _image_cells(cell: Any) -> list[Any]:
    if cell is None:
        return []
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _store(image: Any, media: MediaStore, base: Path) -> MediaRef:
    """Store an image given as a path, bytes, a PIL image, a reference, or {"bytes": …, "path": …} (Hugging Face)."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, MediaRef):
        media.load_image(image)
        return image
    if isinstance(image, Image.Image):
        return media.put_image(image)
    if isinstance(image, bytes):
        return media.put_bytes(image, "image", "", source="the image in the row")
    if isinstance(image, str) and image.partition("://")[0] in ("http", "https", "s3", "gs"):
        problem = f"the image is the URL {image[:200]}; download it beside the data file and give its path"
        raise DataError("media_url_refused", problem)
    if isinstance(image, str | Path) and str(image):
        return media.put_file(base / image, "image")
    problem = f"an image must be a path, bytes or a PIL image; this one is {type(image).__name__}"
    raise DataError("media_missing", problem)


def _plain(value: Any) -> Any:
    """The value in JSON's types; a value of another type (a date, a decimal) as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Failure]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                message = f"{path.name}, line {number} is not JSON: {error}"
                yield number, Failure(FailureKind.DATA, "row_not_json", message)
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                message = f"{path.name}, line {number} is a JSON {type(row).__name__}; it must be an object"
                yield number, Failure(FailureKind.DATA, "row_not_an_object", message)


def _parquet_rows(parquet: pyarrow.parquet.ParquetFile) -> Iterator[tuple[int, dict[str, Any] | Failure]]:
    number = 0
    for batch in parquet.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _malformed(message: str) -> DataError:
    return DataError("message_malformed", message)
