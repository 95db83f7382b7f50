"""The pool of worker processes: started, given one call at a time, killed at the deadline, replaced.

What runs inside a worker is in ``reward.worker_main``. Each slot of the pool is a thread, a worker process and the
socket between them, so a death or a hang affects one slot only. (A pool whose workers share pipes breaks as a whole
when one of them dies at the wrong moment.)
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

from reward.returned_values import TRACEBACK_LINES, user_failure
from reward.worker_main import Call, CallResult, Check, SetUp
from rollout.failures import Failure, FailureKind

log = logging.getLogger(__name__)

_KILL_S = 5.0
_STACK_S = 0.5


@dataclass(frozen=True)
class Reply:
    """The worker's answers to one call.

    Attributes:
        results: [requests] values or a failure; None for the requests after one at which the worker died.
        takes_group: the function scores all completions at once.
    """

    results: list[CallResult | None]
    takes_group: bool


@dataclass(frozen=True)
class _Job:
    message: Call | Check
    done: Future[Any] = field(default_factory=Future)


class _BrokenError(Exception):
    """A worker died or was killed: the reason of its failure, and the problem as its message tells it."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason, self.problem = reason, problem


class _Worker:
    """One worker process and the socket to it."""

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
        """The next answer. If the process dies or the deadline passes, it is killed and _BrokenError raised."""
        try:
            if self._connection.poll(deadline_s):
                return self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._ended() from error
        if self.process.poll() is not None:
            raise self._ended()
        where = self._where()
        self.kill()
        problem = f"it ran longer than {deadline_s:g} s, and its worker process was killed.{where}"
        raise _BrokenError("reward_timeout", problem)

    def kill(self) -> None:
        """Kill the process and every process of its group."""
        with contextlib.suppress(ProcessLookupError):  # it has ended already
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
            return _BrokenError("reward_worker_died", "its worker process closed the connection and was killed")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        problem = f"its worker process {how} during the call; look for a crash or os._exit in the function"
        return _BrokenError("reward_worker_died", problem)

    def _where(self) -> str:
        """The stack at which the worker hangs, which the worker itself writes on SIGUSR1; "" if it doesn't."""
        os.kill(self.process.pid, signal.SIGUSR1)
        end = time.monotonic() + _STACK_S
        text = b""
        while not text and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.02)
            text = os.pread(self._stack.fileno(), 1 << 16, 0)
        lines = text.decode(errors="replace").splitlines()[1 : TRACEBACK_LINES - 1]  # the first only names the thread
        return "\nIts stack was (innermost call first):\n" + "\n".join(lines) if lines else ""


class WorkerPool:
    """A fixed number of workers that take calls from one queue, in the order in which they were submitted."""

    def __init__(self, *, workers: int, modules: tuple[Path, ...], start_s: float, deadline_s: float) -> None:
        """Start the workers. ``start_s`` bounds a worker's start with its imports, ``deadline_s`` one call."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        slots = [_Slot(self._jobs, self._stopping, SetUp(modules), start_s, deadline_s) for _ in range(workers)]
        self._slots = slots
        self.started: list[Future[Failure | None]] = [slot.started for slot in slots]
        for slot in slots:
            slot.start()

    def submit(self, message: Call | Check) -> Future[Any]:
        """Queue a message. The future of a Call is a Reply, that of a Check is None; of either, it may be a Failure."""
        job = _Job(message)
        self._jobs.put(job)
        if self._stopping.is_set():
            self._drain()
        return job.done

    def stop(self) -> None:
        """Kill the workers. Calls that run or wait end with the failure ``reward_server_stopped``. Takes seconds."""
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
    """One place in the pool: a thread that runs jobs one at a time in its worker and replaces the worker if it dies."""

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
        """Kill the worker. Called from another thread; this slot's thread then sees the worker die."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _finish(self, job: _Job) -> None:
        try:
            failure = self._ensure_worker()
            job.done.set_result(failure if failure is not None else self._run(job.message))
        except Exception as error:
            log.exception("a reward worker's thread failed; its worker is replaced")
            self._discard()
            job.done.set_exception(error)

    def _ensure_worker(self) -> Failure | None:
        """Start a worker if there is none, or it died between calls. The failure, if it or its modules can't start."""
        if self._worker is not None and self._worker.process.poll() is None:
            return None
        self._discard()
        try:
            self._worker = _Worker(self._deadline_s)
            if self._stopping.is_set():  # stop() may have come before there was a worker to kill
                self._discard()
                return _stopped()
            self._worker.send(self._set_up)
            failure: Failure | None = self._worker.receive(self._start_s)
        except _BrokenError as broken:
            names = ", ".join(map(str, self._set_up.modules)) or "none"
            problem = f"a worker process for reward functions didn't start (reward.modules: {names}): {broken.problem}"
            failure = Failure(FailureKind.INFRASTRUCTURE, "reward_worker_start", problem)
        except OSError as error:
            problem = f"a worker process for reward functions can't be started: {error}"
            failure = Failure(FailureKind.INFRASTRUCTURE, "reward_worker_start", problem)
        if failure is not None:
            self._discard()
        return failure

    def _run(self, message: Call | Check) -> Reply | Failure | None:
        assert self._worker is not None
        results: list[CallResult | None] = []
        takes_group = False
        try:
            self._worker.send(message)
            if isinstance(message, Check):
                failure: Failure | None = self._worker.receive(self._deadline_s)
                return failure
            while len(results) < len(message.requests):
                received = self._worker.receive(self._deadline_s)
                takes_group = len(received) > 1
                results += received
        except _BrokenError as broken:
            self._discard()
            if self._stopping.is_set():
                return _stopped()
            if isinstance(message, Check):
                return Failure(FailureKind.USER_CODE, broken.reason, f"the check of reward functions: {broken.problem}")
            prompt_id = message.requests[0].prompt_id
            results.append(user_failure(broken.reason, message.label, prompt_id, broken.problem))
            results += [None] * (len(message.requests) - len(results))
        return Reply(results, takes_group)

    def _discard(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _stopped() -> Failure:
    return Failure(FailureKind.INFRASTRUCTURE, "reward_server_stopped", "the reward server was stopped")
