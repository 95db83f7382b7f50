"""Pulls a policy version from a publisher into a file, checks every bucket, and resumes where it was interrupted."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from actors.weights.manifest import Manifest, ManifestError, content_digest
from actors.weights.offer import WeightsOffer
from rollout.failures import Failure, FailureError, FailureKind

logger = logging.getLogger(__name__)

OUTSTANDING = 3
MAX_ATTEMPTS = 4
POLL_MS = 100
SHARED_MEMORY = Path("/dev/shm")
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True, slots=True)
class ReceivedWeights:
    """A whole, checked version: its manifest and the file in which its buckets lie end to end."""

    manifest: Manifest
    path: Path


class _Partial:
    """A version of which some buckets have arrived."""

    def __init__(self, manifest: Manifest, digest: str, folder: Path) -> None:
        self.manifest = manifest
        self.digest = digest
        self.path = folder / f"version-{manifest.version}-{digest[:12]}"
        self.missing = set(range(len(manifest.buckets)))
        self._starts = manifest.starts
        with open(self.path, "wb") as file:
            file.truncate(max(1, manifest.nbytes))
        with open(self.path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def accept(self, index: int, content: memoryview) -> bool:
        """Take a bucket where size and digest agree."""
        expected = self.manifest.buckets[index]
        if len(content) != expected.nbytes or content_digest(content) != expected.digest:
            return False
        self._map[self._starts[index] : self._starts[index] + expected.nbytes] = bytes(content)
        self.missing.discard(index)
        return True

    def close(self) -> None:
        self._map.close()
        self.path.unlink(missing_ok=True)


class WeightReceiver:
    """The generator's side. Keeps what has arrived of a version until it is whole or another is offered."""

    def __init__(self, *, retry_s: float = 5.0, folder: Path | None = None) -> None:
        """Args:
        retry_s: a bucket that hasn't arrived after so long is asked for again.
        folder: where versions are assembled; by default shared memory where there is room, else the temporary folder.
        """
        self._retry_s = retry_s
        self._given_folder = folder
        self._folder: Path | None = None
        self._partial: _Partial | None = None
        self._busy = threading.Lock()

    def receive(self, offer: WeightsOffer, deadline_s: float) -> ReceivedWeights:
        """Pull a version; blocks. The file stays until the next call with another version, or :meth:`close`.

        Raises:
            FailureError: INFRASTRUCTURE with reason `weights_refused` (keys), `weights_timeout` (silent publisher),
                `weights_corrupt` (a digest disagreed again and again) or `weights_gone` (no longer served).
        """
        until = time.monotonic() + deadline_s
        with self._busy, contextlib.closing(_Pull(offer, until, deadline_s, self._retry_s)) as pull:
            partial = self._partial
            if partial is None or partial.digest != offer.manifest_digest:
                manifest = pull.manifest()
                if manifest.version != offer.version:
                    raise pull.failure("weights_corrupt", f"its manifest says version {manifest.version}")
                self._forget()
                partial = self._partial = _Partial(manifest, offer.manifest_digest, self._room(manifest.nbytes))
            pull.buckets(partial)
        return ReceivedWeights(partial.manifest, partial.path)

    def close(self) -> None:
        """Remove everything that was received."""
        self._forget()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _forget(self) -> None:
        if self._partial is not None:
            self._partial.close()
            self._partial = None

    def _room(self, nbytes: int) -> Path:
        if self._folder is None:
            parent = self._given_folder
            if parent is None and SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
                parent = SHARED_MEMORY if shutil.disk_usage(SHARED_MEMORY).free > 2 * nbytes else None
            self._folder = Path(tempfile.mkdtemp(prefix="counterpoint-weights-", dir=parent))
        return self._folder


class _Pull:
    """One connection to a publisher, with its deadline."""

    def __init__(self, offer: WeightsOffer, until: float, deadline_s: float, retry_s: float) -> None:
        self._offer = offer
        self._until = until
        self._deadline_s = deadline_s
        self._retry_s = retry_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.curve_serverkey = offer.server_public_key
        self._socket.curve_publickey = offer.client_public_key
        self._socket.curve_secretkey = offer.client_secret_key
        self._monitor = self._socket.get_monitor_socket(REFUSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self._socket.connect(offer.endpoint)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    def manifest(self) -> Manifest:
        """Ask until a manifest with the offered digest arrives."""
        for _ in range(MAX_ATTEMPTS):
            self._ask("manifest", 0)
            content = self._wait("manifest", {0: time.monotonic()})[1]
            if content_digest(content).hex() == self._offer.manifest_digest:
                try:
                    return Manifest.unpack(bytes(content))
                except ManifestError as error:
                    raise self.failure("weights_corrupt", str(error)) from error
            logger.warning("manifest of version %d arrived with a wrong digest; asking again", self._offer.version)
        raise self.failure("weights_corrupt", "its manifest never had the digest that was offered")

    def buckets(self, partial: _Partial) -> None:
        """Fill in what is missing, a few buckets under way at a time."""
        waiting = deque(sorted(partial.missing))
        attempts = dict.fromkeys(waiting, 0)
        asked: dict[int, float] = {}
        while partial.missing:
            while waiting and len(asked) < OUTSTANDING:
                index = waiting.popleft()
                self._ask("bucket", index)
                asked[index] = time.monotonic()
            index, content = self._wait("bucket", asked)
            asked.pop(index, None)
            if index not in partial.missing or partial.accept(index, content):
                continue
            attempts[index] += 1
            logger.warning(
                "bucket %d of version %d arrived with a wrong digest; asking again", index, self._offer.version
            )
            if attempts[index] >= MAX_ATTEMPTS:
                raise self.failure("weights_corrupt", f"bucket {index} had a wrong digest {MAX_ATTEMPTS} times")
            waiting.appendleft(index)

    def _ask(self, operation: str, index: int) -> None:
        request = {"op": operation, "digest": self._offer.manifest_digest, "index": index}
        with contextlib.suppress(zmq.Again):  # the queue to a publisher that is away is full: asked again later
            self._socket.send(msgpack.packb(request), flags=zmq.NOBLOCK)

    def _wait(self, operation: str, asked: dict[int, float]) -> tuple[int, memoryview]:
        """The next answer; what has been asked for too long ago is asked for again meanwhile."""
        while True:
            now = time.monotonic()
            if now >= self._until:
                raise self.failure("weights_timeout", f"the publisher didn't deliver within {self._deadline_s:g} s")
            self._check_refused()
            for index, since in asked.items():
                if now - since > self._retry_s:
                    self._ask(operation, index)
                    asked[index] = now
            if not self._socket.poll(min(POLL_MS, 1 + int((self._until - now) * 1000))):
                continue
            header, payload = self._receive()
            if header.get("digest") != self._offer.manifest_digest or header.get("op") != operation:
                continue
            if "error" in header:
                raise self.failure("weights_gone", str(header["error"]))
            answered = header.get("index")
            if isinstance(answered, int) and answered in asked:
                return answered, payload

    def _receive(self) -> tuple[dict[str, Any], memoryview]:
        frames = self._socket.recv_multipart(copy=False)
        try:
            head, payload = frames
            header = msgpack.unpackb(head.buffer, raw=False)
            return (header, payload.buffer) if isinstance(header, dict) else ({}, memoryview(b""))
        except (msgpack.UnpackException, ValueError):
            return {}, memoryview(b"")

    def _check_refused(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event & REFUSED:
                raise self.failure("weights_refused", "it refused this run's keys")

    def failure(self, reason: str, why: str) -> FailureError:
        """What went wrong with this offer."""
        message = f"weights of policy version {self._offer.version} from {self._offer.endpoint}: {why}"
        return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, message))
