"""The process that sends a run's spool to MLflow: ``python -m orchestrator.tracking.sender RUN_FOLDER``.

It runs while its standard input is open. A line with a number of seconds tells it to finish within them. An end of
the input without such a line means that the driver died; the run is then marked KILLED. After the deadline it exits.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.tracking.spool import Item, Spool

if TYPE_CHECKING:
    from orchestrator.tracking.items import RunWriter

logger = logging.getLogger("counterpoint.tracking")

ORPHAN_S = 10.0
POLL_S = 0.5
LONGEST_BACKOFF_S = 30.0
LAST_TRIES = 3
TRIES = 8
"""Tries of one item while the server answers otherwise; then it is set aside, so that it can't hold up the rest."""
SYSTEM_METRICS_S = 10.0
ITEMS_AT_ONCE = 200
REQUEST_S = 10

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # retrying is done here, where the deadline is known
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Leash:
    """Watches standard input, and ends the process at the deadline it gives."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.is_orphan = False
        threading.Thread(target=self._watch, name="leash", daemon=True).start()

    def _watch(self) -> None:
        line = sys.stdin.buffer.readline()
        try:
            remaining = float(line)
        except ValueError:
            remaining, self.is_orphan = ORPHAN_S, True
        self.ending.set()
        time.sleep(remaining)
        logger.warning("the deadline is over; the items not sent stay in the spool")
        os._exit(3)


class SystemMetrics:
    """MLflow's own system metrics monitors, read at an interval and put in the spool like everything else."""

    def __init__(self, spool: Spool, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id="", tracking_uri=uri)
        self._spool = spool
        self._step = int(spool.fact("system_step") or 0)
        self._next = time.monotonic() + 1.0

    def tick(self) -> None:
        """Measure if the interval is over."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SYSTEM_METRICS_S
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._step += 1
        self._spool.set_facts(system_step=str(self._step))
        values = {f"system/{key}": repr(float(value)) for key, value in values.items()}
        self._spool.put("metrics", {"step": self._step, "values": values})


class Sender:
    """Sends the items of the spool, oldest first, until it is told to end and the spool is empty."""

    def __init__(self, folder: Path, leash: Leash) -> None:
        self.spool = Spool(folder)
        self._leash = leash
        self._writer: RunWriter | None = None
        self._failures = self._last_tries = 0
        self._error: str | None = None
        self._stuck, self._tries = -1, 0

    def run(self) -> None:
        """Send until the end. An error on the way to the server is noted, and the item is sent again later."""
        system = SystemMetrics(self.spool, self.spool.fact("uri") or "") if self.spool.fact("system_metrics") else None
        is_marked = False
        while True:
            ending = self._leash.ending.is_set()
            if ending and self._leash.is_orphan and not is_marked:
                is_marked = True
                self.spool.put("tags", {"tags": {"counterpoint.end": "the driver died without finishing the run"}})
                self.spool.put("finish", {"status": "KILLED"})
            if system is not None and not ending:
                system.tick()
            try:
                is_empty = self._send_some()
            except Exception as error:  # any client, socket or database error: kept, reported and tried again
                self._failed(error)
                if ending and self._last_tries >= LAST_TRIES:
                    return
                self._pause(ending)
                continue
            self._failures = 0
            self._set_error(None)
            if is_empty and ending:
                return
            if is_empty:
                self._leash.ending.wait(POLL_S)

    def _send_some(self) -> bool:
        from orchestrator.tracking.items import RunWriter, is_refusal

        if self._writer is None:
            self._writer = RunWriter.connect(self.spool)
        items = self.spool.take(ITEMS_AT_ONCE)
        for group in groups(items):
            try:
                self._settle(group, self._writer.send(group))
            except Exception as error:
                self._tries = self._tries + 1 if group[0].id == self._stuck else 1
                self._stuck = group[0].id
                if not is_refusal(error) and self._tries < TRIES:
                    raise
                if not self._writer.is_run_active():
                    self._writer = None
                    raise
                self._one_by_one(group, is_last_try=not is_refusal(error))
        return not items

    def _pause(self, ending: bool) -> None:
        if ending:
            time.sleep(POLL_S)
        else:
            self._leash.ending.wait(min(2.0 ** min(self._failures, 10), LONGEST_BACKOFF_S))

    def _one_by_one(self, group: list[Item], is_last_try: bool) -> None:
        """Send each item of a group that failed, and set aside those that the server refuses."""
        from orchestrator.tracking.items import is_refusal

        assert self._writer is not None
        for item in group:
            try:
                self._settle([item], self._writer.send([item]))
            except Exception as error:
                if not is_refusal(error) and not is_last_try:
                    raise
                logger.error("MLflow refuses item %d (%s): %s", item.id, item.kind, error)
                self.spool.refuse(item, str(error))

    def _settle(self, group: list[Item], reached: dict[str, int]) -> None:
        assert self._writer is not None
        self.spool.settle(group, reached)
        self._writer.reached |= reached

    def _failed(self, error: Exception) -> None:
        from orchestrator.tracking.items import is_gone

        self._failures += 1
        self._last_tries += self._leash.ending.is_set()
        if is_gone(error):
            self._writer = None
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        self._set_error(f"{type(error).__name__}: {first_line}")

    def _set_error(self, error: str | None) -> None:
        if error != self._error:
            self._error = error
            self.spool.set_facts(error=error)
            logger.warning("sending fails: %s", error) if error else logger.info("sending works again")


def groups(items: list[Item]) -> Iterator[list[Item]]:
    """Items in order, neighbouring metrics together."""
    group: list[Item] = []
    for item in items:
        if group and not (item.kind == group[-1].kind == "metrics"):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@contextmanager
def only_sender(folder: Path, leash: Leash) -> Iterator[bool]:
    """Hold the folder's lock, so that one sender sends its items; False if told to end before the lock is free."""
    with (folder / "spool.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if leash.ending.wait(POLL_S):
                    yield False
                    return
            else:
                yield True
                return


def main(arguments: list[str]) -> int:
    """Send the spool of the run folder named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.environ.update(MLFLOW_SETTINGS)
    os.nice(5)
    folder = Path(arguments[0])
    leash = Leash()
    with only_sender(folder, leash) as is_mine:
        if not is_mine:
            logger.warning("another process sends the items of this run; this one ends")
            return 1
        sender = Sender(folder, leash)
        try:
            sender.run()
        except sqlite3.Error as error:
            logger.error("%s: %s", sender.spool.path, error)
            return 2
        finally:
            sender.spool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
