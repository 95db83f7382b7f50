"""The driver's side of MLflow tracking: it puts items into the spool, and a process of its own sends them.

Importing MLflow and creating its tables take seconds and 240 MB, and its requests hold the interpreter lock, so that
another process does it: the sender (:mod:`orchestrator.tracking.sender`) reads the spool
(:mod:`orchestrator.tracking.spool`) and ends with the driver, also when the driver is killed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from orchestrator.config.schema import TrackingConfig
from orchestrator.record.jsonl import set_aside
from orchestrator.record.run_record import SampleRow
from orchestrator.tracking.spool import SPOOL, SPOOL_FILES, Spool
from rollout.media import MediaRef

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
FINISH_S = 15.0
"""How long :meth:`Tracker.finish` waits for the last items to be sent."""
CHECK_S = 10.0
RESTART_S = 30.0


class MediaPaths(Protocol):
    """Gives the files of media, as `rollout.media.MediaStore` does."""

    def path(self, ref: MediaRef, /) -> Path:
        """The file of a medium."""
        ...


@dataclass(frozen=True, slots=True)
class TrackingStatus:
    """Which items of a run were sent to MLflow, and which were not.

    Attributes:
        run_id: MLflow's id of the run, None until the server was reached for the first time.
        uri: the tracking URI.
        waiting: items not sent yet.
        refused: items that the server refuses (each is in the log).
        error: why sending fails at present, or None.
    """

    run_id: str | None
    uri: str | None
    waiting: int
    refused: int
    error: str | None


def resolve_uri(uri: str | None, folder: Path) -> str:
    """The tracking URI to use: SQLite in the run folder by default.

    Raises:
        ValueError: MLflow 3.17 keeps no runs behind such a URI.
    """
    if uri is None:
        return f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if ":" not in uri or scheme not in SCHEMES:
        raise ValueError(
            f"tracking.uri = {uri!r} is not a tracking store of MLflow 3, which takes no plain folders. Use "
            f"http(s)://host:port, sqlite:///path.db, postgresql://..., or leave it out for SQLite in the run folder."
        )
    return uri


class Tracker:
    """Sends a run to MLflow in the background. No method waits for the server, and none raises because of it."""

    def __init__(self, config: TrackingConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder.resolve()
        self._uri = resolve_uri(config.uri, folder)
        self._spool: Spool | None = Spool(self._folder) if config.enabled else None
        self._sender: subprocess.Popen[bytes] | None = None
        self._started = self._checked = 0.0
        self._warned: str | None = None
        self._final = TrackingStatus(None, None, 0, 0, None)

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        folder: Path,
        run_name: str,
        params: Mapping[str, Any],
        run_id: str | None = None,
        *,
        is_resumed: bool = True,
    ) -> Tracker:
        """Start sending, to the MLflow run of this folder or of `run_id` if there is one. Returns at once.

        Args:
            params: the resolved configuration, nested or flat. A parameter that differs from what the run already
                has is not an error: it becomes a tag and a `config_changes` artifact.
            run_id: the MLflow run to continue, if the caller knows it; by default the one of the folder's spool.
            is_resumed: False starts another MLflow run where the folder already has one; what that one has not sent
                yet is moved to `previous/`, a folder that :func:`flush_spool` takes.
        Raises:
            ValueError: tracking.uri names no store that MLflow 3.17 has.
        """
        if config.enabled and not is_resumed:
            set_aside(folder, SPOOL_FILES)
        tracker = cls(config, folder)
        spool = tracker._spool
        if spool is None:
            return tracker
        known = spool.fact("run_id") if spool.fact("uri") in (None, tracker._uri) else None
        spool.set_facts(
            uri=tracker._uri,
            experiment=config.experiment,
            run_name=run_name,
            run_id=run_id or known,
            run_key=spool.fact("run_key") or uuid.uuid4().hex,
            artifacts=None if config.uri else (tracker._folder / "mlartifacts").as_uri(),
            system_metrics="yes" if config.system_metrics else None,
            error=None,
        )
        spool.put("running", {})
        spool.put("params", {"params": flatten(params)})
        tracker._start_sender()
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server has not been reached yet."""
        return self._spool.fact("run_id") if self._spool else self._final.run_id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step. A step that this run already sent for a metric (before a resume) is not sent again."""
        self._put("metrics", {"step": step, "values": {key: repr(float(value)) for key, value in values.items()}})

    def samples(self, step: int, rows: Sequence[SampleRow], media: MediaPaths, name: str = "samples") -> None:
        """A table of completions with their images; its files are read when it is sent."""
        table = []
        for row in rows[: self._config.samples]:
            paths = [str(media.path(ref).resolve()) for ref in row.media if ref.kind == "image"]
            table.append({**asdict(row), "media": paths})
        self._put("table", {"step": step, "name": name, "rows": table})

    def dataset(self, name: str, digest: str, rows: int, context: str, source: str = "") -> None:
        """Lineage: which prompts the run used, and for what ("training", "evaluation")."""
        body = {"name": name, "digest": digest[:36], "rows": rows, "context": context, "source": source}
        self._put("dataset", body)

    def artifact(self, path: Path, artifact_folder: str = "") -> None:
        """A file or folder, read when it is sent; sending the same name again replaces it."""
        self._put("artifact", {"path": str(path.resolve()), "folder": artifact_folder})

    def status(self) -> TrackingStatus:
        """How many items wait to be sent, and why sending fails if it does."""
        return spool_status(self._spool) if self._spool else self._final

    def finish(self, status: RunStatus = "FINISHED", deadline_s: float = FINISH_S) -> TrackingStatus:
        """Send the last items and end the run. Items not sent after `deadline_s` stay in the spool."""
        if self._spool is None:
            return self.status()
        self._spool.put("finish", {"status": status})
        if self._sender is not None:
            if self._sender.poll() is not None and self.status().waiting:
                self._start_sender()
            _end(self._sender, deadline_s)
            self._sender = None
        self._final = result = self.status()
        self._spool.close()
        self._spool = None
        if result.waiting:
            logger.warning(
                "%d items were not sent to MLflow at %s (%s). They are kept in %s; "
                "`counterpoint track %s` or the next --resume sends them.",
                result.waiting,
                result.uri,
                result.error or "the time was over",
                self._folder / SPOOL,
                self._folder,
            )
        return result

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._spool is not None:
            self.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")

    def _put(self, kind: str, body: Mapping[str, Any]) -> None:
        if self._spool is None:
            return
        self._spool.put(kind, body)
        now = time.monotonic()
        if now - self._checked >= CHECK_S:
            self._checked = now
            self._check(now)

    def _check(self, now: float) -> None:
        status = self.status()
        if status.error and not self._warned:
            logger.warning(
                "MLflow at %s takes no items: %s. Training goes on; %d items wait.",
                self._uri,
                status.error,
                status.waiting,
            )
        elif self._warned and not status.error:
            logger.info("MLflow at %s takes items again; %d wait.", self._uri, status.waiting)
        self._warned = status.error
        if self._sender is not None and self._sender.poll() is not None and now - self._started >= RESTART_S:
            logger.warning(
                "the process that sends to MLflow ended with code %s; another one is started", self._sender.returncode
            )
            self._start_sender()

    def _start_sender(self) -> None:
        self._started = time.monotonic()
        self._sender = start_sender(self._folder)


def start_sender(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that sends the spool of a run folder. It ends soon after its standard input closes."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (logs / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.tracking.sender", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the driver, which then lets the sender finish
        )


def _end(sender: subprocess.Popen[bytes], deadline_s: float) -> None:
    try:
        if sender.stdin is not None:
            sender.stdin.write(f"{deadline_s}\n".encode())
            sender.stdin.close()
    except OSError:
        logger.debug("the process that sends to MLflow ended before it was told to")
    try:
        sender.wait(deadline_s + 1.0)
    except subprocess.TimeoutExpired:
        sender.kill()
        sender.wait(5.0)


def spool_status(spool: Spool) -> TrackingStatus:
    """How many items of a spool wait, and why sending fails if it does."""
    waiting, refused = spool.counts()
    return TrackingStatus(spool.fact("run_id"), spool.fact("uri"), waiting, refused, spool.fact("error") or spool.error)


def flush_spool(folder: Path, deadline_s: float = 60.0) -> TrackingStatus:
    """Send the items that an earlier run did not send, in a process of its own, and count those left.

    Raises:
        FileNotFoundError: the folder has no spool.
    """
    folder = folder.resolve()
    if not (folder / SPOOL).exists():
        raise FileNotFoundError(f"{folder} has no {SPOOL}, so it is not the folder of a tracked run.")
    spool = Spool(folder)
    try:
        spool.readmit()
        if spool.counts()[0]:
            _end(start_sender(folder), deadline_s)
        return spool_status(spool)
    finally:
        spool.close()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys with text values; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple, Mapping)):
            flat[name] = json.dumps(value, default=str)
        else:
            flat[name] = str(value)
    return flat
