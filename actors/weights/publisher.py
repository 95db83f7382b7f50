"""Serves policy versions to generators over an authenticated, encrypted ZMQ socket, from a thread of its own.

Protocol: a client sends one MessagePack frame `{"op": "manifest" | "bucket", "digest": …, "index": …}`; the answer is
a MessagePack header frame and a payload frame. Requests name the manifest's digest, so an answer can't be mixed up
between versions.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Any

import msgpack
import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.weights.offer import WeightsOffer
from actors.weights.source import WeightSnapshot

logger = logging.getLogger(__name__)

KEPT_VERSIONS = 2
POLL_MS = 200
LOOPBACK = "127.0.0.1"
ZAP_DOMAIN = "weights"


class _OnlyClient:
    """ZAP credentials: exactly one client key is admitted."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key


class WeightPublisher:
    """Holds at most two policy versions and hands them out until :meth:`stop`."""

    def __init__(self, *, host: str = LOOPBACK, port: int = 0) -> None:
        """Bind and start serving.

        Args:
            host: address to bind to; on a cluster this node's address, as generators on other nodes see it.
            port: 0 takes a free one.
        Raises:
            zmq.ZMQError: the address can't be bound.
        """
        self._server_public, self._server_secret = zmq.curve_keypair()
        self._client_public, self._client_secret = zmq.curve_keypair()
        self._versions: OrderedDict[str, WeightSnapshot] = OrderedDict()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, _OnlyClient(self._client_public))
        self._socket = self._bind(host, port)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="weight-publisher", daemon=True)
        self._thread.start()

    def publish(self, snapshot: WeightSnapshot) -> WeightsOffer:
        """Serve a version from now on; the oldest beyond two is forgotten. Returns what a generator needs."""
        digest = snapshot.manifest.digest
        with self._lock:
            self._versions[digest] = snapshot
            self._versions.move_to_end(digest)
            while len(self._versions) > KEPT_VERSIONS:
                self._versions.popitem(last=False)
        return WeightsOffer(
            version=snapshot.manifest.version,
            endpoint=self.endpoint,
            server_public_key=self._server_public,
            client_public_key=self._client_public,
            client_secret_key=self._client_secret,
            manifest_digest=digest,
            nbytes=snapshot.manifest.nbytes,
        )

    def stop(self) -> None:
        """Stop serving and free the port. May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(timeout=10 * POLL_MS / 1000)
        self._authenticator.stop()
        self._context.destroy(linger=0)

    def _bind(self, host: str, port: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int(":" in host))
        socket.curve_server = True
        socket.curve_secretkey = self._server_secret
        socket.zap_domain = ZAP_DOMAIN.encode()
        address = f"[{host}]" if ":" in host else host
        socket.bind(f"tcp://{address}:{port or '*'}")
        return socket

    def _serve(self) -> None:
        while not self._stopping.is_set():
            if not self._socket.poll(POLL_MS):
                continue
            client, *frames = self._socket.recv_multipart()
            header, payload = self._answer(frames)
            try:
                reply = [client, msgpack.packb(header), payload]
                self._socket.send_multipart(reply, copy=len(payload) < 65536, flags=zmq.NOBLOCK)
            except zmq.ZMQError as error:  # the client is gone or doesn't read: it will ask again
                logger.info("weight publisher: an answer could not be sent: %s", error)
        self._socket.close(linger=0)

    def _answer(self, frames: list[bytes]) -> tuple[dict[str, Any], bytes]:
        try:
            (frame,) = frames
            request = msgpack.unpackb(frame, raw=False)
            operation, digest, index = str(request["op"]), str(request["digest"]), int(request["index"])
        except (msgpack.UnpackException, KeyError, TypeError, ValueError) as error:
            return {"error": f"not a request for weights: {error}"}, b""
        with self._lock:
            snapshot = self._versions.get(digest)
        header = {"op": operation, "digest": digest, "index": index}
        if snapshot is None:
            return header | {"error": "this version is no longer served"}, b""
        if operation == "manifest":
            return header, snapshot.manifest.pack()
        if operation == "bucket" and 0 <= index < len(snapshot.buckets):
            return header, snapshot.buckets[index]
        return header | {"error": f"there is no {operation} {index}"}, b""
