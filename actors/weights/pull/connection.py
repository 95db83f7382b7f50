"""One client's connection to a weight server: asks, waits with a deadline, notices a refusal. Not thread-safe."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from actors.weights.offer import Keys

POLL_MS = 100
FAREWELL_MS = 1000
"""For what was said last to arrive, after the connection was closed."""
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
DAMAGED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
LOST = DAMAGED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
"""Nobody listens there, the connection ended, or damage arrived, which ends it: what was asked isn't answered."""
LOST_S = 0.25
"""For a better word on why it ended, and so that one doesn't ask without a pause where it ends each time."""


class SilentError(Exception):
    """The server hasn't answered for longer than one is willing to wait for it."""


class RefusedError(Exception):
    """The server doesn't take this run's keys, or isn't the one that it should be."""


class GoneError(Exception):
    """The server doesn't serve that version (any more)."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a server sent: which bucket, how it is encoded, and the payload."""

    header: dict[str, Any]
    payload: memoryview

    @property
    def index(self) -> int:
        """The bucket it is about."""
        found = self.header.get("index")
        return found if isinstance(found, int) else -1

    @property
    def part(self) -> int:
        """Which part of the bucket it is."""
        found = self.header.get("part", 0)
        return found if isinstance(found, int) else -1


class Connection:
    """To one server. After silence, :meth:`reconnect`: a link that was cut may need a connection of its own."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, server_key: bytes, keys: Keys | None) -> None:
        self._context = context
        self.endpoint = endpoint
        self._server_key = server_key
        self._keys = keys
        self._open()

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in self.endpoint))
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if self._keys is not None:
            self._socket.curve_serverkey = self._server_key
            self._socket.curve_publickey = self._keys.client_public
            self._socket.curve_secretkey = self._keys.client_secret
        self._monitor = self._socket.get_monitor_socket(REFUSED | LOST)
        self._socket.connect(self.endpoint)
        self._ends_at = math.inf

    def reconnect(self) -> None:
        """Drop the connection with all that is under way on it, and make another."""
        self.close(linger_ms=0)
        self._open()

    @property
    def is_lost(self) -> bool:
        """Whether it ended before an answer came, rather than that the server is silent."""
        return self._ends_at < math.inf

    def close(self, *, linger_ms: int = FAREWELL_MS) -> None:
        """End the connection. Doesn't wait."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)

    def ask(self, operation: str, digest: str, **fields: Any) -> None:
        """Send a request; what can't be sent now is asked again by whoever waits for the answer."""
        request = {"op": operation, "digest": digest, **fields}
        with contextlib.suppress(zmq.Again):  # the queue to a server that is away is full
            self._socket.send(msgpack.packb(request), flags=zmq.NOBLOCK)

    def answer(self, operation: str, digest: str, until: float) -> Answer:
        """The next answer to requests of this kind.

        Args:
            operation, digest: of the requests; other answers are late ones, and are passed over.
            until: on the monotonic clock.
        Raises:
            SilentError: there was none; sooner where the connection was lost.
            GoneError: the server refused the request; with its words.
            RefusedError: the server doesn't take this run's keys.
        """
        while True:
            try:
                frames = self._socket.recv_multipart(copy=False, flags=zmq.NOBLOCK)
            except zmq.Again:
                self._look_after()
                left_s = min(until, self._ends_at) - time.monotonic()
                if left_s <= 0:
                    raise SilentError from None
                self._socket.poll(min(POLL_MS, 1 + int(left_s * 1000)))
                continue
            header, payload = _parsed(frames)
            if header.get("digest") != digest or header.get("op") != operation:
                continue
            if "error" in header:
                raise GoneError(str(header["error"]))
            return Answer(header, payload)

    def _look_after(self) -> None:
        """Notice a refusal, and that the connection has ended."""
        events = 0
        while self._monitor.poll(0):
            events |= recv_monitor_message(self._monitor)["event"]
        if events & REFUSED:
            raise RefusedError(f"the weight server at {self.endpoint} refused this run's keys")
        if events & LOST:
            self._ends_at = min(self._ends_at, time.monotonic() + LOST_S)


def _parsed(frames: Any) -> tuple[dict[str, Any], memoryview]:
    try:
        head, payload = frames
        header = msgpack.unpackb(head.buffer, raw=False)
        return (header, payload.buffer) if isinstance(header, dict) else ({}, memoryview(b""))
    except (msgpack.UnpackException, ValueError):
        return {}, memoryview(b"")
