"""JSON Lines files that survive a crash, a full disk and a resume. What the rows hold is up to the caller."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BACKLOG_LINES = 10_000
"""Lines kept in memory while the disk refuses them."""


class JsonLines:
    """A file to which rows are appended, one JSON object a line.

    Each line reaches the operating system before :meth:`append` returns.
    On a full disk a line is removed from the file again where half of it was written, kept in memory, and written
    before the next line. :attr:`unwritten` counts the lines in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=BACKLOG_LINES)
        self._is_failing = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        if self._end and os.pread(self._file, 1, self._end - 1) != b"\n":
            self._waiting.append(b"")  # ends the line that a crash left half-written; readers skip it
        os.set_inheritable(self._file, False)

    @property
    def unwritten(self) -> int:
        """Lines that are in memory until the disk has room."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Values that JSON can't hold are written as text."""
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str)
        self._waiting.append(text.encode("utf-8", "replace"))
        self.flush()

    def flush(self) -> None:
        """Write the lines in memory, in order; on an error keep them and warn once."""
        while self._waiting:
            line = self._waiting[0] + b"\n"
            try:
                _write_all(self._file, line, self._end)
            except OSError as error:
                if not self._is_failing:
                    logger.warning(
                        "%s can't be written (%s); new lines are kept in memory until it can", self.path, error
                    )
                self._is_failing = True
                return
            self._end += len(line)
            self._waiting.popleft()
        if self._is_failing:
            logger.info("%s can be written again; no line was lost", self.path)
        self._is_failing = False

    def close(self) -> None:
        """Write the lines in memory and close. Lines that the disk refuses are lost, and the log says so."""
        if self._file < 0:
            return
        self.flush()
        if self._waiting:
            logger.error(
                "%s: %d lines are lost, because the disk refused them until the end", self.path, len(self._waiting)
            )
        os.close(self._file)
        self._file = -1


def _write_all(file: int, line: bytes, offset: int) -> None:
    written = 0
    try:
        while written < len(line):
            written += os.pwrite(file, line[written:], offset + written)
    except OSError:
        os.ftruncate(file, offset)
        raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file, oldest first. A missing file has none; a line that a crash left half-written is skipped."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                logger.warning("%s: skipped a line that is not whole", path)
                continue
            if isinstance(row, dict):
                yield row


def keep_only(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a file with only some of its rows, all or nothing; returns how many rows were removed."""
    rows = list(read_lines(path))
    kept = [row for row in rows if is_kept(row)]
    if len(kept) == len(rows):
        return 0
    temporary = path.with_suffix(".trimmed")
    with temporary.open("w", encoding="utf-8") as file:
        for row in kept:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(rows) - len(kept)


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move an earlier run's files of these names to `previous/<time>/`; None where there are none."""
    left = [folder / name for name in names if (folder / name).exists()]
    if not left:
        return None
    target = folder / "previous" / time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target.mkdir(parents=True, exist_ok=True)
    for path in left:
        os.replace(path, target / path.name)
    logger.info("%s: files of an earlier run were moved to %s", folder, target)
    return target


def finite(value: Any) -> tuple[Any, int]:
    """A value with every NaN and infinity in it replaced by None, and how many there were."""
    if isinstance(value, Mapping):
        pairs = {str(key): finite(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = [finite(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()  # a scalar of NumPy or torch
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    return value, 0
