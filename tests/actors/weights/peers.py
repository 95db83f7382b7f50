"""A generator's receiver in a process of its own, which can be told to receive, and killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.weights.offer import WeightsOffer
from actors.weights.pull.pull import ReceiverSettings
from actors.weights.pull.receiver import WeightReceiver
from rollout.failures import FailureError

SPAWN = multiprocessing.get_context("spawn")
DEADLINE_S = 60.0
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Received:
    """How an attempt ended.

    Attributes:
        failure: its reason; "" where a version was received.
        route, source, received_bytes: of the version.
        content: hex digest (BLAKE2b) of the last part's bytes.
        private_bytes: by how much the process's own memory had grown at most, shared memory not counted.
    """

    failure: str = ""
    route: str = ""
    source: str = ""
    received_bytes: int = 0
    content: str = ""
    private_bytes: int = 0


class Peer:
    """Receives in a process of its own; use it in a `with` block."""

    def __init__(self, name: str, **settings: Any) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._served = SPAWN.Value("q", 0)
        arguments = (theirs, self._served, name, ReceiverSettings(**settings))
        self._process = SPAWN.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, offer: WeightsOffer, deadline_s: float = DEADLINE_S) -> None:
        """Have it receive; go on meanwhile."""
        self._pipe.send((offer, deadline_s))

    def ended(self) -> Received:
        """How the attempt that was begun ended."""
        assert self._pipe.poll(2 * DEADLINE_S), "the peer doesn't answer"
        received: Received = self._pipe.recv()
        return received

    def received(self, offer: WeightsOffer, deadline_s: float = DEADLINE_S) -> Received:
        """Have it receive, and wait."""
        self.begin(offer, deadline_s)
        return self.ended()

    @property
    def served_bytes(self) -> int:
        """What it has sent onward, as of an instant ago."""
        return int(self._served.value)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.join(DEADLINE_S)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._pipe.close()


def content_digest(content: Any) -> str:
    """Of a whole version."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _serve(pipe: Connection, served: Any, name: str, settings: ReceiverSettings) -> None:
    receiver = WeightReceiver(name, settings)
    threading.Thread(target=_tell_served, args=(receiver, served), daemon=True).start()
    while True:
        offer, deadline_s = pipe.recv()
        with _Growth() as growth:
            try:
                received = receiver.receive(offer, deadline_s)
            except FailureError as error:
                pipe.send(Received(failure=error.failure.reason))
                continue
        digest = content_digest(received.parts[-1].held.memory.view)
        receiver.loaded(received)
        pipe.send(Received("", received.route, received.source, received.received_bytes, digest, growth.peak_bytes))


def served_bytes(receiver: WeightReceiver) -> int:
    """What a receiver has sent to others."""
    return 0 if receiver._server is None else receiver._server.egress_bytes


def _tell_served(receiver: WeightReceiver, served: Any) -> None:
    while True:
        served.value = served_bytes(receiver)
        time.sleep(SAMPLE_S)


class _Growth:
    """Peak of this process's own (anonymous) memory over what it was, sampled."""

    def __enter__(self) -> _Growth:
        self._start, self.peak_bytes, self._is_over = _own_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(DEADLINE_S)

    def _sample(self) -> None:
        while not self._is_over.is_set():
            self.peak_bytes = max(self.peak_bytes, _own_bytes() - self._start)
            time.sleep(SAMPLE_S)


def _own_bytes() -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
