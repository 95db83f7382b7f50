"""A client's connection to a weight server: sends requests and waits for answers with a deadline. Not thread-safe."""

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
"""Time for the last message to be sent after the connection is closed."""
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
DAMAGED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
LOST = DAMAGED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
"""The server is down, the connection ended, or damaged data ended it: pending requests get no answer."""
LOST_S = 0.25
"""Pause after a lost connection: a refusal may still arrive, and a connection that always ends is retried slowly."""


class NoAnswerError(Exception):
    """The server sent no answer within the deadline."""


class KeysRefusedError(Exception):
    """The server refused this run's keys, or has another key than expected."""


class NotServedError(Exception):
    """The server does not serve that version, or no longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A server's answer: its header (bucket, slice, encoding) and payload."""

    header: dict[str, Any]
    payload: memoryview

    @property
    def index(self) -> int:
        """Index of the bucket; -1 where the header has none."""
        found = self.header.get("index")
        return found if isinstance(found, int) else -1

    @property
    def slice(self) -> int:
        """Index of the slice within the bucket; -1 where the header is malformed."""
        found = self.header.get("slice", 0)
        return found if isinstance(found, int) else -1


class Connection:
    """A connection to one server. Call :meth:`reconnect` after a timeout: a link that was cut may need a new one."""

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
        """Drop the connection with all pending requests and open another."""
        self.close(linger_ms=0)
        self._open()

    @property
    def is_lost(self) -> bool:
        """Whether the connection ended, rather than the server being silent."""
        return self._ends_at < math.inf

    def close(self, *, linger_ms: int = FAREWELL_MS) -> None:
        """Close the connection without waiting."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)

    def ask(self, operation: str, digest: str, **fields: Any) -> None:
        """Send a request. One that cannot be sent now is dropped; the caller asks again when no answer comes."""
        request = {"op": operation, "digest": digest, **fields}
        with contextlib.suppress(zmq.Again):  # the queue to an unreachable server is full
            self._socket.send(msgpack.packb(request), flags=zmq.NOBLOCK)

    def answer(self, operation: str, digest: str, until: float) -> Answer:
        """Wait for the next answer to a kind of request.

        Args:
            operation, digest: those of the request; answers to others are late and are skipped.
            until: deadline on the monotonic clock.
        Raises:
            NoAnswerError: none came by the deadline, or the connection was lost.
            NotServedError: the server refused the request; the text is the server's.
            KeysRefusedError: the server refused this run's keys.
        """
        while True:
            try:
                frames = self._socket.recv_multipart(copy=False, flags=zmq.NOBLOCK)
            except zmq.Again:
                self._check_events()
                left_s = min(until, self._ends_at) - time.monotonic()
                if left_s <= 0:
                    raise NoAnswerError from None
                self._socket.poll(min(POLL_MS, 1 + int(left_s * 1000)))
                continue
            header, payload = _parsed(frames)
            if header.get("digest") != digest or header.get("op") != operation:
                continue
            if "error" in header:
                raise NotServedError(str(header["error"]))
            return Answer(header, payload)

    def _check_events(self) -> None:
        """Check the socket's events for a refusal and for the end of the connection."""
        events = 0
        while self._monitor.poll(0):
            events |= recv_monitor_message(self._monitor)["event"]
        if events & REFUSED:
            raise KeysRefusedError(f"the weight server at {self.endpoint} refused this run's keys")
        if events & LOST:
            self._ends_at = min(self._ends_at, time.monotonic() + LOST_S)


def _parsed(frames: Any) -> tuple[dict[str, Any], memoryview]:
    try:
        head, payload = frames
        header = msgpack.unpackb(head.buffer, raw=False)
        return (header, payload.buffer) if isinstance(header, dict) else ({}, memoryview(b""))
    except (msgpack.UnpackException, ValueError):
        return {}, memoryview(b"")
