"""The weight server: serves the held parts of policy versions over an authenticated ZMQ socket, in a thread of its own.

The publisher runs one, and so does every generator that relays. Protocol: a client sends one MessagePack frame; the
answer is a MessagePack header and a payload frame. Requests name a manifest's digest, so answers of different versions
cannot be confused. A relay answers a request for a missing bucket once the bucket has arrived.

    manifest {digest}                   -> {}, packed manifest
    bucket   {digest, index, slice, size, base} -> {encoding: full | delta}, content. base: digest of the manifest that
                                           the client's bucket is from; a full bucket comes in slices of that size
    memory   {digest}                   -> {memory}, where processes of this host map it, once it is whole
    sources  {digest, member, lost, waits} -> {source} to pull from, told by the publisher alone. waits: the member has
                                           been waiting for its present source
    done     {digest, member}           no answer; the client needs nothing more of it
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.weights.manifest import Manifest, exactly
from actors.weights.offer import Keys
from actors.weights.pull.memory import Memory
from actors.weights.pull.relays import Relay

logger = logging.getLogger(__name__)

POLL_MS = 500
LOOPBACK = "127.0.0.1"
ZAP_DOMAIN = "weights"
ZERO_COPY_BYTES = 65536
MAX_SLICE_BYTES = 16 << 20
"""Largest slice of a bucket in one message."""
WAKE = "inproc://wake"
KEPT_NAMES = 16
MAX_WAITING = 10_000
IDLE_S = 90.0
"""A client without a request for so long has ended its pull: the longest timeout of a client is 60 s."""
MAX_REQUEST_BYTES = 1 << 20


class SourceAssigner(Protocol):
    """Assigns each member of the relay tree its source."""

    def source(self, digest: str, member: Relay, lost: str | None, *, waits: bool) -> Relay | None:
        """The source of a member; None is this server.

        Args:
            lost: endpoint of its former source, which was lost.
            waits: it has been waiting for its present source.
        """

    def done(self, digest: str, name: str) -> None:
        """Record that a member has the whole version."""


class NotLoopbackError(ValueError):
    """Weights would leave the host without encryption."""


@dataclass(eq=False)
class HeldPart:
    """One part of a version as a process holds it, whole or incomplete.

    Attributes:
        manifest: the part's manifest.
        memory: its buckets; the content of those in `missing` is undefined.
        missing: buckets that have not arrived.
        deltas: deltas by bucket, by the digest of the manifest that they start from.
    """

    manifest: Manifest
    memory: Memory
    missing: set[int] = field(default_factory=set)
    deltas: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def content(self, bucket: int) -> memoryview:
        """The bytes of a bucket."""
        start, end = self.manifest.span(bucket)
        return self.memory.view[start:end]


@dataclass(frozen=True, eq=False)
class _Request:
    client: bytes
    operation: str
    digest: str
    index: int
    slice: int
    base: str
    fields: dict[str, Any]

    @property
    def key(self) -> tuple[bytes, str, str, int, int]:
        return self.client, self.operation, self.digest, self.index, self.slice

    @property
    def header(self) -> dict[str, Any]:
        return {"op": self.operation, "digest": self.digest, "index": self.index, "slice": self.slice}


class WeightServer:
    """Serves held parts until :meth:`stop`."""

    def __init__(
        self, *, host: str = LOOPBACK, port: int = 0, keys: Keys | None, assigner: SourceAssigner | None = None
    ) -> None:
        """Bind and start serving.

        Args:
            host: address to bind to; on a cluster, this node's address for other hosts.
            port: 0 chooses a free port.
            keys: the run's keys; None serves without CURVE, on loopback only.
            assigner: assigns sources; only the publisher has one.
        Raises:
            NotLoopbackError: without CURVE, weights would leave the host.
            zmq.ZMQError: the address cannot be bound.
        """
        if keys is None and not is_loopback(host):
            raise NotLoopbackError(
                f"weights.encryption = false is for loopback only, and {host} is another address. Set it to true."
            )
        self._assigner = assigner
        self._held_parts: dict[str, HeldPart] = {}
        self._waiting: dict[tuple[bytes, str, str, int, int], _Request] = {}
        self._pulling: dict[str, dict[bytes, float]] = {}
        self._dropped: deque[str] = deque(maxlen=KEPT_NAMES)
        self._refused: set[bytes] = set()
        self._client_key = keys.client_public if keys is not None else b""
        self._lock = threading.RLock()
        self._stopping = False
        self.egress_bytes = 0
        """Bytes of buckets sent over the network since the start."""
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.server_key, secret = zmq.curve_keypair() if keys is not None else (b"", b"")
        if keys is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(ZAP_DOMAIN, self)
        self._socket = self._bind(host, port, secret)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_receiver = self._context.socket(zmq.PULL)
        self._wake_receiver.bind(WAKE)
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.connect(WAKE)
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def hold(self, held: HeldPart) -> None:
        """Serve a part from now on, whole or as its buckets arrive."""
        with self._lock:
            self._held_parts[held.manifest.digest] = held
        self._wake()

    def drop(self, digest: str) -> None:
        """Stop serving a part and tell the clients that wait for it."""
        with self._lock:
            if self._held_parts.pop(digest, None) is not None:
                self._dropped.append(digest)
            self._pulling.pop(digest, None)
        self._wake()

    def arrived(self) -> None:
        """Answer clients that wait for buckets which have arrived."""
        with self._lock:
            is_awaited = bool(self._waiting)
        if is_awaited:
            self._wake()

    def is_pulled(self, digest: str) -> bool:
        """Whether a client is pulling the part."""
        with self._lock:
            since = time.monotonic() - IDLE_S
            return any(last > since for last in self._pulling.get(digest, {}).values())

    def stop(self) -> None:
        """Stop serving and free the port. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        self._wake()
        self._thread.join(timeout=4 * POLL_MS / 1000)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)
        with self._lock:
            self._held_parts.clear()

    def callback(self, domain: str, key: bytes) -> bool:
        """Admit the run's client key and refuse all others, each logged once (ZAP's callback)."""
        if key == self._client_key:
            return True
        if key not in self._refused and len(self._refused) < 1000:
            self._refused.add(key)
            logger.warning("weight server %s refused a client with another key than this run's", self.endpoint)
        return False

    def _bind(self, host: str, port: int, secret: bytes) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a failed send raises and is not counted
        socket.setsockopt(zmq.IPV6, int(":" in host))
        for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 10), (zmq.TCP_KEEPALIVE_INTVL, 5)):
            socket.setsockopt(option, value)
        if secret:
            socket.curve_server = True
            socket.curve_secretkey = secret
            socket.zap_domain = ZAP_DOMAIN.encode()
        address = f"[{host}]" if ":" in host else host
        socket.bind(f"tcp://{address}:{port or '*'}")
        return socket

    def _wake(self) -> None:
        # The socket is used from whichever thread has something new; when it is full, the server will wake anyway.
        with self._lock, contextlib.suppress(zmq.Again):
            self._waker.send(b"", flags=zmq.NOBLOCK)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_receiver, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll(POLL_MS))
            if self._wake_receiver in ready:
                while self._wake_receiver.poll(0):
                    self._wake_receiver.recv()
                self._answer_waiting()
            if self._socket in ready:
                client, *frames = self._socket.recv_multipart()
                request = self._parse(client, frames)
                if request is not None:
                    self._answer(request)
        self._socket.close(linger=0)
        self._wake_receiver.close(linger=0)

    def _parse(self, client: bytes, frames: list[bytes]) -> _Request | None:
        try:
            (frame,) = frames
            fields = msgpack.unpackb(frame, raw=False)
            return _Request(
                client,
                exactly(str, fields["op"]),
                exactly(str, fields["digest"]),
                exactly(int, fields.get("index", 0)),
                exactly(int, fields.get("slice", 0)),
                exactly(str, fields.get("base", "")),
                fields,
            )
        except (msgpack.UnpackException, KeyError, TypeError, ValueError, AttributeError) as error:
            self._send(client, {"error": f"not a request for weights: {error}"}, b"")
            return None

    def _answer_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        for request in waiting:
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        with self._lock:
            if request.operation == "done":
                self._pulling.get(request.digest, {}).pop(request.client, None)
                if self._assigner is not None:
                    self._assigner.done(request.digest, str(request.fields.get("member", "")))
                return
            held = self._held_parts.get(request.digest)
            reply = ({"error": "this version is no longer served here"}, b"")
            if held is None and self._assigner is None and request.digest not in self._dropped:
                self._wait(request)  # a relay that has not begun with it
                return
            if held is not None:
                self._pulling.setdefault(request.digest, {})[request.client] = time.monotonic()
                try:
                    found = self._reply(request, held)
                except (KeyError, TypeError, ValueError) as error:
                    found = {"error": f"not a request for weights: {error}"}, b""
                if found is None:
                    self._wait(request)
                    return
                reply = found
        self._send(request.client, request.header | reply[0], reply[1])

    def _wait(self, request: _Request) -> None:
        """Answer a request later; a repeated request is kept once."""
        self._waiting.pop(request.key, None)
        self._waiting[request.key] = request
        while len(self._waiting) > MAX_WAITING:
            self._waiting.pop(next(iter(self._waiting)))

    def _reply(self, request: _Request, held: HeldPart) -> tuple[dict[str, Any], Any] | None:
        """Header and payload, or None where the request has to wait."""
        match request.operation:
            case "manifest":
                return {}, held.manifest.packed
            case "memory":
                return None if held.missing else ({"memory": held.memory.address.as_fields()}, b"")
            case "sources" if self._assigner is not None:
                member = Relay(*(exactly(str, field) for field in request.fields["member"]))
                lost = exactly(str, request.fields.get("lost") or "")
                waits = exactly(bool, request.fields.get("waits", False))
                source = self._assigner.source(request.digest, member, lost or None, waits=waits)
                told = None if source is None else [source.name, source.host, source.endpoint, source.server_key]
                return {"source": told}, b""
            case "bucket" if 0 <= request.index < len(held.manifest.digests):
                if request.index in held.missing:
                    return None
                delta = held.deltas.get(request.base, {}).get(request.index)
                if delta is not None:
                    return {"encoding": "delta"}, delta
                content = held.content(request.index)
                size = exactly(int, request.fields.get("size", MAX_SLICE_BYTES))
                start = request.slice * size
                if 0 < size <= MAX_SLICE_BYTES and (start == 0 or 0 < start < len(content)):
                    return {"encoding": "full"}, content[start : start + size]
        return {"error": f"there is no {request.operation[:20]} {request.index}"}, b""

    def _send(self, client: bytes, header: dict[str, Any], payload: Any) -> None:
        nbytes = len(payload) if "encoding" in header else 0
        self.egress_bytes += nbytes  # before the client has it
        try:
            frames = [client, msgpack.packb(header), payload]
            self._socket.send_multipart(frames, copy=len(payload) < ZERO_COPY_BYTES, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the client has ended or its queue is full: it asks again
            logger.info("weight server %s could not send an answer: %s", self.endpoint, error)
            self.egress_bytes -= nbytes


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this host only."""
    return host in (LOOPBACK, "::1", "localhost") or host.startswith("127.")
