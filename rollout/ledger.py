"""The ledger: what became of every group, as an append-only SQLite file of transitions that survives any crash."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout.failures import Failure, FailureError, FailureKind
from rollout.groups import EDGES, Account, GroupState, Transition

RUN_INTERRUPTED = "run_interrupted"

_COLUMNS = (
    "group_id",
    "from_state",
    "to_state",
    "at_s",
    "prompt_id",
    "version",
    "min_version",
    "max_version",
    "generator",
    "mean_reward",
    "reason",
    "detail",
)
_ALLOWED = ", ".join(f"'{origin}>{target}'" for origin, targets in EDGES.items() for target in sorted(targets))

# The file itself refuses what the state machine doesn't allow, so that no writer can unbalance the account.
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS transitions (
    seq INTEGER PRIMARY KEY,
    group_id TEXT NOT NULL,
    from_state TEXT,
    to_state TEXT NOT NULL,
    at_s REAL NOT NULL,
    prompt_id TEXT,
    version INTEGER,
    min_version INTEGER,
    max_version INTEGER,
    generator TEXT,
    mean_reward REAL,
    reason TEXT,
    detail TEXT,
    CHECK ((from_state IS NULL AND to_state = 'admitted' AND prompt_id IS NOT NULL)
           OR from_state || '>' || to_state IN ({_ALLOWED})),
    CHECK ((to_state = 'dropped') = (reason IS NOT NULL))
) STRICT;
CREATE INDEX IF NOT EXISTS transitions_of_group ON transitions (group_id, seq);
CREATE INDEX IF NOT EXISTS transitions_by_outcome ON transitions (to_state, reason);
CREATE TRIGGER IF NOT EXISTS follows_on BEFORE INSERT ON transitions
WHEN NEW.from_state IS NOT (SELECT to_state FROM transitions WHERE group_id = NEW.group_id ORDER BY seq DESC LIMIT 1)
BEGIN SELECT RAISE(ABORT, 'the transition does not start from the state of the group'); END;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON transitions
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON transitions
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE VIEW IF NOT EXISTS lineage AS
SELECT
    group_id,
    MAX(prompt_id) AS prompt_id,
    (SELECT to_state FROM transitions AS latest WHERE latest.group_id = t.group_id ORDER BY seq DESC LIMIT 1) AS state,
    MAX(reason) AS reason,
    MAX(detail) AS detail,
    MAX(CASE to_state WHEN 'admitted' THEN version END) AS served_version,
    MAX(min_version) AS min_version,
    MAX(max_version) AS max_version,
    MAX(CASE to_state WHEN 'consumed' THEN version END) AS consumed_version,
    MAX(generator) AS generator,
    MAX(mean_reward) AS mean_reward,
    MIN(at_s) AS admitted_at_s,
    MAX(at_s) AS changed_at_s
FROM transitions AS t GROUP BY group_id;
"""

_OPEN_GROUPS = """
SELECT group_id, prompt_id FROM transitions AS t
WHERE to_state = 'admitted' AND NOT EXISTS (
    SELECT 1 FROM transitions AS last WHERE last.group_id = t.group_id AND last.to_state IN ('consumed', 'dropped'))
ORDER BY seq
"""


class LedgerError(FailureError):
    """The ledger can't be read or written, or was given a transition that the state machine doesn't have."""


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What is known of one group. Attributes as in :class:`rollout.groups.Transition`."""

    group_id: str
    prompt_id: str
    state: GroupState
    reason: str | None
    detail: str | None
    served_version: int
    min_version: int | None
    max_version: int | None
    consumed_version: int | None
    generator: str | None
    mean_reward: float | None
    admitted_at_s: float
    changed_at_s: float


class Ledger:
    """The transitions of every group of a run, in the file ``path`` (SQLite, write-ahead log).

    ``append`` writes a batch in one transaction: after a crash of the process all of it is there or none. One process
    writes; any number of others may read meanwhile with ``read_only=True``. Methods may be called from any thread.
    The file must be on a local disk: SQLite's write-ahead log doesn't work across hosts.

    Raises (every method): :class:`LedgerError`, of kind infrastructure with reason ``ledger_disk_full``,
    ``ledger_locked``, ``ledger_corrupt`` or ``ledger_unavailable``; of kind bug with ``ledger_illegal_transition``.
    """

    def __init__(self, path: Path, *, read_only: bool = False, deadline_s: float = 10.0) -> None:
        """Open the ledger, or make it. `deadline_s` bounds every wait for a lock of another process."""
        self.path = path
        self._lock = threading.Lock()
        with self._explained():
            if read_only:
                if not path.is_file():
                    raise sqlite3.OperationalError("the file does not exist")
                uri = f"{path.resolve().as_uri()}?mode=ro"
                self._connection = sqlite3.connect(uri, uri=True, timeout=deadline_s, check_same_thread=False)
            else:
                self._connection = sqlite3.connect(path, timeout=deadline_s, check_same_thread=False)
            self._connection.isolation_level = None
            try:
                if not read_only:
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.execute("PRAGMA synchronous = NORMAL")
                    self._connection.executescript(_SCHEMA)
                else:
                    self._connection.execute("SELECT count(*) FROM transitions WHERE seq < 0")
            except BaseException:
                self._connection.close()
                raise

    def append(self, transitions: Iterable[Transition]) -> None:
        """Record transitions in order: all of them or none."""
        rows = [tuple(getattr(transition, column) for column in _COLUMNS) for transition in transitions]
        if not rows:
            return
        marks = ", ".join("?" * len(_COLUMNS))
        with self._transaction():
            self._connection.executemany(f"INSERT INTO transitions ({', '.join(_COLUMNS)}) VALUES ({marks})", rows)

    def account(self) -> Account:
        """What became of every group at one moment, resumed parts of the run included."""
        with self._lock, self._explained():
            rows = self._connection.execute(
                "SELECT to_state, reason, count(*) FROM transitions "
                "WHERE to_state IN ('admitted', 'consumed', 'dropped') GROUP BY to_state, reason"
            ).fetchall()
        counts = {(state, reason): count for state, reason, count in rows}
        dropped = {reason: count for (state, reason), count in counts.items() if state == GroupState.DROPPED}
        admitted = counts.get((GroupState.ADMITTED, None), 0)
        consumed = counts.get((GroupState.CONSUMED, None), 0)
        # A group ends at most once (the table refuses more), so what has not ended is open.
        return Account(admitted, consumed, dropped, admitted - consumed - sum(dropped.values()))

    def open_groups(self) -> list[GroupRecord]:
        """Groups that are neither consumed nor dropped, in the order of admission."""
        with self._lock, self._explained():
            return [self._record(group_id) for group_id, _ in self._connection.execute(_OPEN_GROUPS).fetchall()]

    def group(self, group_id: str) -> GroupRecord | None:
        """What is known of one group, or None if it was never admitted."""
        with self._lock, self._explained():
            known = self._connection.execute("SELECT 1 FROM transitions WHERE group_id = ? LIMIT 1", (group_id,))
            return self._record(group_id) if known.fetchone() else None

    def recover(self, *, at_s: float) -> list[GroupRecord]:
        """Drop the groups that an interrupted run left open, reason ``run_interrupted``; returns them as they were.

        Call it once, before a resumed run admits anything. The cursor of the checkpoint draws their prompts again.
        """
        left_open = self.open_groups()
        self.append(
            Transition(
                group.group_id,
                group.state,
                GroupState.DROPPED,
                at_s,
                reason=RUN_INTERRUPTED,
                detail="open when the run was interrupted",
            )
            for group in left_open
        )
        return left_open

    def close(self) -> None:
        """Close the file. Every transition that was appended is on disk already."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, group_id: str) -> GroupRecord:
        row = self._connection.execute("SELECT * FROM lineage WHERE group_id = ?", (group_id,)).fetchone()
        group, prompt, state, *rest = row
        return GroupRecord(group, prompt, GroupState(state), *rest)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise SQLite's errors as failures that say what to do."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            failure = Failure(
                FailureKind.BUG, "ledger_illegal_transition", f"the ledger {self.path} refused a transition: {error}"
            )
            raise LedgerError(failure) from error
        except sqlite3.Error as error:
            raise LedgerError(Failure(FailureKind.INFRASTRUCTURE, *_explain(self.path, error))) from error


def _explain(path: Path, error: sqlite3.Error) -> tuple[str, str]:
    """Reason and message of an SQLite error (codes: sqlite.org/rescode.html; extended codes end in the primary one)."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return "ledger_disk_full", f"the disk of the ledger {path} is full. Free space and resume; its records are kept"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "ledger_locked", f"another process has locked the ledger {path}. Stop the run that uses this folder"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return "ledger_corrupt", f"{path} is damaged or not a ledger ({error}). Move it away or choose another folder"
    return "ledger_unavailable", f"the ledger {path} can't be used: {error}. Its folder must exist and be writable"
