"""The publisher, the trainer's side of a pull: reads versions into memory, keeps at most two and serves them.

A version's memory is overwritten in place once no process reads it. A slow generator keeps the version that it is
reading, and delays neither the trainer nor other generators.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import zmq

from actors.weights.manifest import ALIGNMENT, WeightsPart
from actors.weights.offer import Keys, PartOffer, WeightsOffer
from actors.weights.pull.delta import Delta
from actors.weights.pull.memory import Memory, host_identity
from actors.weights.pull.relays import Relay, RelayTree
from actors.weights.pull.server import LOOPBACK, HeldPart, WeightServer
from actors.weights.pull.writer import VersionWriter
from actors.weights.source import PolicyPartSource

logger = logging.getLogger(__name__)

SLOW_FACTOR = 4.0
"""A member is slow if it takes so many times as long as others."""


@dataclass(eq=False)
class _Published:
    """One part of a version and the relay tree of its readers."""

    held: HeldPart
    tree: RelayTree
    began: dict[str, tuple[Relay, float]] = field(default_factory=dict)
    """By name: the process that asked for a source, and when it first asked, on the monotonic clock."""
    took: dict[str, float] = field(default_factory=dict)
    """By name: seconds from then until it had the whole version, for members that pull over the network."""

    @property
    def slow(self) -> set[str]:
        """Members that delayed others with this version, or did before and still take much longer than most."""
        usual = median(self.took.values()) if self.took else 0.0
        return {name for name in self.tree.slow if self.took.get(name, float("inf")) > SLOW_FACTOR * usual}

    @property
    def digest(self) -> str:
        return self.held.manifest.digest


class WeightPublisher:
    """Publishes policy versions, on trainer rank 0."""

    def __init__(
        self,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        bucket_bytes: int = 8 << 20,
        fan_out: int = 2,
        is_encrypted: bool = True,
        has_delta: bool = True,
        folder: Path | None = None,
        epoch: int | None = None,
    ) -> None:
        """Bind and start serving.

        Args:
            host: address to bind to; on a cluster, this node's address for generators on other nodes.
            port: 0 chooses a free port.
            bucket_bytes: size of a bucket, a multiple of 64.
            fan_out: number of generators that pull from the publisher, and from each relay.
            is_encrypted: use CURVE; without it, only loopback is allowed.
            has_delta: make deltas, once a generator has pulled over the network.
            folder: folder for files that hold versions; None holds them in memory.
            epoch: number of this publisher; by default the time, so that a later publisher's versions count as later.
        Raises:
            ValueError: `bucket_bytes` is no such multiple.
            NotLoopbackError: without encryption, weights would leave the host.
            zmq.ZMQError: the address cannot be bound.
        """
        if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT:
            raise ValueError(f"bucket_bytes = {bucket_bytes} must be a positive multiple of {ALIGNMENT}")
        public, secret = zmq.curve_keypair()
        self._keys = Keys(public, secret) if is_encrypted else None
        self._bucket_bytes = bucket_bytes
        self._fan_out = fan_out
        self._has_delta = has_delta
        self._folder = folder
        self._host_identity = host_identity()
        self._lock = threading.Lock()
        self._frozen: _Published | None = None
        self._current: _Published | None = None
        self._older: _Published | None = None
        self._told_egress = 0
        self.epoch = time.time_ns() if epoch is None else epoch
        self.server = WeightServer(host=host, port=port, keys=self._keys, assigner=self)

    @property
    def endpoint(self) -> str:
        """Address that it serves at."""
        return self.server.endpoint

    @property
    def held_parts(self) -> list[HeldPart]:
        """The parts that it holds, the current version last."""
        return [each.held for each in (self._frozen, self._older, self._current) if each is not None]

    def publish(self, version: int, trained: PolicyPartSource, frozen: PolicyPartSource | None = None) -> WeightsOffer:
        """Read a version and serve it from now on. Returns the offer for generators.

        Collective: the other ranks call :meth:`PolicyPartSource.read` of the same sources in the same order.

        Args:
            version: number of the policy version.
            trained: the trained part.
            frozen: the frozen part, read at the first call only.
        Raises:
            NoRoomError: neither memory nor disk has room for it.
        """
        started = time.perf_counter()
        if self._frozen is None and frozen is not None:
            self._frozen, _ = self._written(version, frozen, None)
            self.server.hold(self._frozen.held)
        published, delta = self._written(version, trained, self._current)
        self._replace(published)
        self.server.hold(published.held)
        egress, self._told_egress = self.server.egress_bytes - self._told_egress, self.server.egress_bytes
        parts = [part for part in (self._frozen, published) if part is not None]
        return WeightsOffer(
            epoch=self.epoch,
            version=version,
            endpoint=self.endpoint,
            server_key=self.server.server_key,
            keys=self._keys,
            parts=tuple(_offered(part.held) for part in parts),
            host=self._host_identity,
            gather_s=time.perf_counter() - started,
            egress_bytes=egress,
            changed_share=None if delta is None else delta.changed_words / max(1, delta.words),
        )

    def stop(self) -> None:
        """Stop serving and free the port and the memory. Safe to call twice."""
        self.server.stop()
        self._frozen = self._current = self._older = None

    def _written(
        self, version: int, source: PolicyPartSource, previous: _Published | None
    ) -> tuple[_Published, Delta | None]:
        memory = self._memory_for(source, previous)
        wants_delta = self._has_delta and previous is not None and self.server.egress_bytes > 0
        base = previous.held if previous is not None and wants_delta else None
        if base is not None:
            _return_freed_memory()  # of whole buckets in messages
        writer = VersionWriter(source, memory, bucket_bytes=self._bucket_bytes, base=base)
        source.read(writer)
        manifest, delta = writer.finish(self.epoch, version)
        memory.unclaim()
        if base is not None:
            del writer
            _return_freed_memory()  # of comparing and coding
        held = HeldPart(manifest, memory)
        if delta is not None:
            held.deltas = {delta.base: delta.buckets}
        with self._lock:
            slow = set() if previous is None else previous.slow
        return _Published(held, RelayTree(self._fan_out, self._host_identity, slow)), delta

    def _memory_for(self, source: PolicyPartSource, previous: _Published | None) -> Memory:
        """Claimed memory to write into. Its former content is no longer served."""
        for each in (previous, self._older if previous is not None else None):
            if each is None or each.held.memory.nbytes != source.nbytes or self.server.is_pulled(each.digest):
                continue
            if each.held.memory.try_claim():
                self._forget(each)
                return each.held.memory
        memory = Memory.create(source.nbytes, self._folder)
        memory.try_claim()
        return memory

    def _forget(self, published: _Published) -> None:
        """Stop serving a version whose memory is about to be overwritten, and drop its deltas."""
        with self._lock:
            self._current = None if self._current is published else self._current
            self._older = None if self._older is published else self._older
        self.server.drop(published.digest)
        published.held.deltas.clear()  # before the next version's are made

    def _replace(self, published: _Published) -> None:
        """Keep at most two versions: the new one, and an older one that a generator still reads."""
        others = [each for each in (self._older, self._current) if each is not None]
        older = next((each for each in others if self._is_read(each)), None)
        with self._lock:  # the server asks for sources under its own lock, so it is never called within this one
            self._older, self._current = older, published
        for each in others:
            if each is not older:
                self.server.drop(each.digest)

    def _is_read(self, published: _Published) -> bool:
        """Whether a generator pulls or maps it."""
        memory = published.held.memory
        if self.server.is_pulled(published.digest) or not memory.try_claim():
            return True
        memory.unclaim()
        return False

    def source(self, digest: str, member: Relay, lost: str | None, *, waits: bool) -> Relay | None:
        """See :class:`actors.weights.pull.server.SourceAssigner`."""
        with self._lock:
            published = self._published(digest)
            if published is None:
                return None
            now, (process, began) = time.monotonic(), published.began.get(member.name, (None, 0.0))
            if process != member:
                began, published.began[member.name] = now, (member, now)
            if not waits:
                return published.tree.join(member, lost)
            longest = max(published.took.values(), default=float("inf"))
            return published.tree.reassign(member, is_late=now - began > SLOW_FACTOR * longest)

    def done(self, digest: str, name: str) -> None:
        """See :class:`actors.weights.pull.server.SourceAssigner`."""
        with self._lock:
            published = self._published(digest)
            if published is None or name not in published.began:
                return
            published.tree.done(name)
            if published.tree.pulls(name):
                published.took[name] = time.monotonic() - published.began[name][1]

    def _published(self, digest: str) -> _Published | None:
        held = (self._current, self._frozen, self._older)
        return next((each for each in held if each is not None and each.digest == digest), None)


def _return_freed_memory() -> None:
    """Have the C library return freed memory to the system: as much as a delta takes, in a few milliseconds."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def read_on_other_ranks(sources: Sequence[PolicyPartSource]) -> None:
    """Take part in gathering on the ranks that do not publish, while rank 0 reads."""
    for source in sources:
        source.read(None)


def _offered(held: HeldPart) -> PartOffer:
    manifest = held.manifest
    return PartOffer(WeightsPart(manifest.part), manifest.digest, manifest.nbytes)
