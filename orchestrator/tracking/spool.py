"""The spool: items to be sent to MLflow, on disk. The driver puts items in; the sender's process takes them out.

An item leaves the spool in the same transaction that notes what was sent, so each is sent once or, when a crash falls
between, again with the same content and timestamps, which MLflow's stores take as the same points.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPOOL = "spool.db"
SPOOL_FILES = (SPOOL, f"{SPOOL}-wal", f"{SPOOL}-shm")
BUSY_S = 1.0
"""How long a write waits for the other process's transaction (each takes milliseconds)."""
BACKLOG_ITEMS = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, kind TEXT, body TEXT, refused TEXT);
CREATE TABLE IF NOT EXISTS reached (key TEXT PRIMARY KEY, step INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Item:
    """Something to send: its kind ("metrics", "params", "tags", ...), its content and when it happened."""

    id: int
    time: float
    kind: str
    body: dict[str, Any]


class Spool:
    """The spool of one run folder. Processes open one each; threads may share one, whose calls are serialised."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        self._lock = threading.Lock()
        self._backlog: deque[tuple[float, str, str]] = deque(maxlen=BACKLOG_ITEMS)
        self.error: str | None = None
        """Why the last write failed, or None; its items are kept in memory."""
        folder.mkdir(parents=True, exist_ok=True)
        self._database: sqlite3.Connection | None = None
        with self._lock:
            self._try(lambda database: None)

    def put(self, kind: str, body: Mapping[str, Any]) -> None:
        """Keep an item for sending. On a full disk it stays in memory and is written later."""
        with self._lock:
            self._backlog.append((time.time(), kind, json.dumps(body, default=str)))
            if self._try(self._write_backlog):
                self._backlog.clear()

    def take(self, limit: int) -> list[Item]:
        """The oldest items, at most `limit`, without removing them."""
        query = "SELECT id, time, kind, body FROM items WHERE refused IS NULL ORDER BY id LIMIT ?"
        rows = self._read(query, (limit,))
        return [Item(number, when, kind, json.loads(body)) for number, when, kind, body in rows]

    def settle(self, items: Sequence[Item], reached: Mapping[str, int]) -> None:
        """Remove items that were sent, and note the last step sent of each metric. Raises sqlite3.Error."""

        def write(database: sqlite3.Connection) -> None:
            database.executemany("DELETE FROM items WHERE id = ?", [(item.id,) for item in items])
            _note_reached(database, reached)

        self._must(write)

    def refuse(self, item: Item, why: str) -> None:
        """Set aside an item that the server refuses. Raises sqlite3.Error."""
        self._must(lambda database: database.execute("UPDATE items SET refused = ? WHERE id = ?", (why, item.id)))

    def readmit(self) -> None:
        """Let refused items be tried again. Raises sqlite3.Error."""
        self._must(lambda database: database.execute("UPDATE items SET refused = NULL"))

    def reached(self) -> dict[str, int]:
        """The last step sent, by metric."""
        return dict(self._read("SELECT key, step FROM reached"))

    def set_reached(self, reached: Mapping[str, int]) -> None:
        """Note the last step that the server already has, by metric. Raises sqlite3.Error."""
        self._must(lambda database: _note_reached(database, reached))

    def clear_reached(self) -> None:
        """Forget the last steps sent, because another MLflow run takes the items now. Raises sqlite3.Error."""
        self._must(lambda database: database.execute("DELETE FROM reached"))

    def counts(self) -> tuple[int, int]:
        """How many items wait to be sent, and how many were refused."""
        rows = self._read("SELECT COALESCE(SUM(refused IS NULL), 0), COALESCE(SUM(refused IS NOT NULL), 0) FROM items")
        waiting, refused = rows[0] if rows else (0, 0)
        return waiting + len(self._backlog), refused

    def fact(self, name: str) -> str | None:
        """A fact about the run ("run_id", "uri"), or None."""
        rows = self._read("SELECT value FROM facts WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def set_facts(self, **facts: str | None) -> bool:
        """Set facts, remove those that are None; False if the disk refused."""

        def write(database: sqlite3.Connection) -> None:
            for name, value in facts.items():
                if value is None:
                    database.execute("DELETE FROM facts WHERE name = ?", (name,))
                else:
                    database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

        with self._lock:
            return self._try(write)

    def close(self) -> None:
        """Write the items in memory if the disk takes them, and close."""
        with self._lock:
            if self._backlog and self._try(self._write_backlog):
                self._backlog.clear()
            if self._database is not None:
                self._database.close()
                self._database = None

    def _write_backlog(self, database: sqlite3.Connection) -> None:
        database.executemany("INSERT INTO items (time, kind, body) VALUES (?, ?, ?)", list(self._backlog))

    def _read(self, query: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            rows: list[Any] = []
            self._try(lambda database: rows.extend(database.execute(query, arguments).fetchall()))
            return rows

    def _must(self, write: Any) -> None:
        with self._lock:
            if not self._try(write):
                raise sqlite3.OperationalError(f"{self.path}: {self.error}")

    def _try(self, write: Any) -> bool:
        try:
            if self._database is None:
                self._database = _open(self.path)
            with self._database:
                write(self._database)
        except sqlite3.Error as error:
            self.error = str(error)
            return False
        self.error = None
        return True


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")  # survives a killed process; a power cut may cost the last items
    database.executescript(_SCHEMA)
    return database


def _note_reached(database: sqlite3.Connection, reached: Mapping[str, int]) -> None:
    database.executemany(
        "INSERT INTO reached VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET step = MAX(step, excluded.step)",
        list(reached.items()),
    )
