"""Worker processes, kept apart from the server: started, given one call at a time, killed at the deadline, replaced.

One thread and one process a slot, one socket between them: a death or a hang is that slot's alone. (A pool that shares
pipes between its workers breaks as a whole when one of them dies at the wrong moment.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reward.scoring import TRACEBACK_LINES, user_failure
from reward.worker_main import Call, CallResult, Check, SetUp
from rollout.failures import Failure, FailureKind

log = logging.getLogger(__name__)

_KILL_S = 5.0
_STACK_S = 0.5


@dataclass(frozen=True)
class Reply:
    """What became of a call.

    Attributes:
        outcomes: [requests] a value or a failure; None for those the worker didn't come to.
        takes_group: the function scores all completions at once.
        seconds: wall time in the worker.
    """

    outcomes: list[CallResult | None]
    takes_group: bool
    seconds: float


@dataclass(frozen=True)
class _Job:
    message: Call | Check
    done: Future[Any] = field(default_factory=Future)


class _BrokenError(Exception):
    """The worker is gone or was killed. Carries the reason and what a person reads."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason, self.problem = reason, problem


class _Worker:
    """One process and the socket to it."""

    def __init__(self, send_s: float) -> None:
        ours, theirs = socket.socketpair()
        bound = struct.pack("ll", int(send_s) + 1, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
        self._stack = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        descriptors = (theirs.fileno(), self._stack.fileno())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "reward.worker_main", *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self._connection = Connection(ours.detach())

    def send(self, message: SetUp | Check | Call) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._ended() from error

    def receive(self, deadline_s: float) -> Any:
        """The next answer. Raises _BrokenError where the process dies or the deadline passes, and kills it then."""
        try:
            if self._connection.poll(deadline_s):
                return self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._ended() from error
        if self.process.poll() is not None:
            raise self._ended()
        where = self._where()
        self.kill()
        raise _BrokenError("reward_timeout", f"not done after {deadline_s:g} s; its worker was killed.{where}")

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):  # it went first
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_KILL_S)

    def close(self) -> None:
        self.kill()
        self._connection.close()
        self._stack.close()

    def _ended(self) -> _BrokenError:
        try:
            code = self.process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return _BrokenError("reward_worker_died", "its worker closed the connection, and was killed")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return _BrokenError(
            "reward_worker_died", f"its worker process {how} during the call; a crash or os._exit in it?"
        )

    def _where(self) -> str:
        """The stack at which the worker hangs, from the worker itself, if it can still say."""
        os.kill(self.process.pid, signal.SIGUSR1)
        end = time.monotonic() + _STACK_S
        text = b""
        while not text and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.02)
            text = os.pread(self._stack.fileno(), 1 << 16, 0)
        lines = text.decode(errors="replace").splitlines()[1 : TRACEBACK_LINES - 1]  # the first only names the thread
        return "\nIt was at (innermost first):\n" + "\n".join(lines) if lines else ""


class WorkerPool:
    """A fixed number of slots that take calls from one queue, first come first served."""

    def __init__(self, *, workers: int, modules: tuple[Path, ...], start_s: float, deadline_s: float) -> None:
        """Start the slots. ``start_s`` bounds a worker's start with its imports, ``deadline_s`` one call."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        slots = [_Slot(self._jobs, self._stopping, SetUp(modules), start_s, deadline_s) for _ in range(workers)]
        self._slots = slots
        self.started: list[Future[Failure | None]] = [slot.started for slot in slots]
        for slot in slots:
            slot.start()

    def submit(self, message: Call | Check) -> Future[Any]:
        """Queue a message. A Call gives a Reply, a Check gives None or a Failure; both a Failure when stopped."""
        job = _Job(message)
        self._jobs.put(job)
        if self._stopping.is_set():
            self._drain()
        return job.done

    def stop(self) -> None:
        """Kill the workers and fail what still waits. Returns within seconds."""
        self._stopping.set()
        for slot in self._slots:
            self._jobs.put(None)
            slot.kill()
        for slot in self._slots:
            slot.join(_KILL_S)
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.done.set_running_or_notify_cancel():
                    job.done.set_result(_stopped())


class _Slot(threading.Thread):
    """Runs jobs one at a time in a worker, which it replaces when it dies."""

    def __init__(
        self,
        jobs: queue.SimpleQueue[_Job | None],
        stopping: threading.Event,
        set_up: SetUp,
        start_s: float,
        deadline_s: float,
    ) -> None:
        super().__init__(name="reward-worker", daemon=True)
        self._jobs, self._stopping, self._set_up = jobs, stopping, set_up
        self._start_s, self._deadline_s = start_s, deadline_s
        self._worker: _Worker | None = None
        self.started: Future[Failure | None] = Future()

    def run(self) -> None:
        try:
            try:
                self.started.set_result(self._ensure_worker())
            except Exception as error:
                self.started.set_exception(error)
            while (job := self._jobs.get()) is not None and not self._stopping.is_set():
                if job.done.set_running_or_notify_cancel():
                    self._finish(job)
            if job is not None and job.done.set_running_or_notify_cancel():
                job.done.set_result(_stopped())
        finally:
            self._discard()

    def kill(self) -> None:
        """From another thread: end the worker, so that this thread sees it die."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _finish(self, job: _Job) -> None:
        try:
            failure = self._ensure_worker()
            job.done.set_result(failure if failure is not None else self._run(job.message))
        except Exception as error:
            log.exception("reward worker slot")
            self._discard()
            job.done.set_exception(error)

    def _ensure_worker(self) -> Failure | None:
        """Start a worker where there is none (or it died idle); its modules' failure, if they don't import."""
        if self._worker is not None and self._worker.process.poll() is None:
            return None
        self._discard()
        try:
            self._worker = _Worker(self._deadline_s)
            if self._stopping.is_set():  # stop() may have looked for the worker just before it was there
                self._discard()
                return _stopped()
            self._worker.send(self._set_up)
            failure: Failure | None = self._worker.receive(self._start_s)
        except _BrokenError as broken:
            names = ", ".join(map(str, self._set_up.modules)) or "none"
            problem = f"a reward worker didn't start (reward.modules: {names}): {broken.problem}"
            failure = Failure(FailureKind.INFRASTRUCTURE, "reward_worker_start", problem)
        except OSError as error:
            failure = Failure(
                FailureKind.INFRASTRUCTURE, "reward_worker_start", f"can't start a reward worker: {error}"
            )
        if failure is not None:
            self._discard()
        return failure

    def _run(self, message: Call | Check) -> Reply | Failure | None:
        assert self._worker is not None
        begin = time.monotonic()
        outcomes: list[CallResult | None] = []
        takes_group = False
        try:
            self._worker.send(message)
            if isinstance(message, Check):
                result: Failure | None = self._worker.receive(self._deadline_s)
                return result
            while len(outcomes) < len(message.requests):
                chunk = self._worker.receive(self._deadline_s)
                takes_group = len(chunk) > 1
                outcomes += chunk
        except _BrokenError as broken:
            self._discard()
            if self._stopping.is_set():
                return _stopped()
            if isinstance(message, Check):
                return Failure(FailureKind.USER_CODE, broken.reason, f"the check of reward functions: {broken.problem}")
            prompt_id = message.requests[0].prompt_id
            outcomes.append(user_failure(broken.reason, message.label, prompt_id, broken.problem))
            outcomes += [None] * (len(message.requests) - len(outcomes))
        return Reply(outcomes, takes_group, time.monotonic() - begin)

    def _discard(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _stopped() -> Failure:
    return Failure(FailureKind.INFRASTRUCTURE, "reward_server_stopped", "the reward server was stopped")
