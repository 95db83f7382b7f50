"""The trainer's side: reads a version into memory, keeps at most two, and serves them until the generators have them.

The memory of a version is written anew in place once nobody reads it any more; a generator that is slow keeps the
version it is reading, and holds up neither the trainer nor the others.
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
from actors.weights.pull.server import LOOPBACK, Holding, WeightServer
from actors.weights.pull.writer import VersionWriter
from actors.weights.source import WeightSource

logger = logging.getLogger(__name__)

LATE = 4.0
"""A member is late, or slow, if it takes so many times as long as others."""


@dataclass(eq=False)
class _Published:
    """One part of a version, and the tree of those who pull it."""

    holding: Holding
    tree: RelayTree
    began: dict[str, tuple[Relay, float]] = field(default_factory=dict)
    """Which process by that name asked for a source, and when it first did, on the monotonic clock."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds from then until it had all of it, of those that pulled it over the network."""

    @property
    def slow(self) -> set[str]:
        """Members that held up others with this version, or did before and still take much longer than most."""
        usual = median(self.took.values()) if self.took else 0.0
        return {name for name in self.tree.slow if self.took.get(name, float("inf")) > LATE * usual}

    @property
    def digest(self) -> str:
        return self.holding.manifest.digest


class WeightPublisher:
    """Serves policy versions. On the rank that publishes."""

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
            host: address to bind to; on a cluster this node's address, as generators on other nodes see it.
            port: 0 takes a free one.
            bucket_bytes: size of a bucket, a multiple of 64.
            fan_out: generators that pull from the publisher, and from each of those that serve onward.
            is_encrypted: CURVE; without it only loopback is served.
            has_delta: keep what changed since the version before, once somebody has pulled over the network.
            folder: put the memory into files there.
            epoch: of this publisher; by default the time, so that a later publisher's versions count as later.
        Raises:
            ValueError: `bucket_bytes` isn't such a multiple.
            NotLoopbackError: without encryption, weights would leave the host.
            zmq.ZMQError: the address can't be bound.
        """
        if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT:
            raise ValueError(f"buckets of {bucket_bytes} bytes: it has to be a multiple of {ALIGNMENT}")
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
        self.server = WeightServer(host=host, port=port, keys=self._keys, directory=self)

    @property
    def endpoint(self) -> str:
        """Where it serves."""
        return self.server.endpoint

    @property
    def holdings(self) -> list[Holding]:
        """What it holds now, the current version last."""
        return [each.holding for each in (self._frozen, self._older, self._current) if each is not None]

    def publish(self, version: int, trained: WeightSource, frozen: WeightSource | None = None) -> WeightsOffer:
        """Read a version and serve it from now on. Returns what a generator needs.

        Collective: the other ranks call :meth:`WeightSource.read` of the same sources, in the same order, at the same
        time.

        Args:
            version: number of the policy version.
            trained: what training changes.
            frozen: all the rest; read at the first call only.
        Raises:
            NoRoomError: neither memory nor disk has room for it.
        """
        started = time.perf_counter()
        if self._frozen is None and frozen is not None:
            self._frozen, _ = self._written(version, frozen, None)
            self.server.hold(self._frozen.holding)
        published, delta = self._written(version, trained, self._current)
        self._replace(published)
        self.server.hold(published.holding)
        egress, self._told_egress = self.server.egress_bytes - self._told_egress, self.server.egress_bytes
        parts = [part for part in (self._frozen, published) if part is not None]
        return WeightsOffer(
            epoch=self.epoch,
            version=version,
            endpoint=self.endpoint,
            server_key=self.server.server_key,
            keys=self._keys,
            parts=tuple(_offered(part.holding) for part in parts),
            host=self._host_identity,
            gather_s=time.perf_counter() - started,
            egress_bytes=egress,
            changed_share=None if delta is None else delta.changed_words / max(1, delta.words),
        )

    def stop(self) -> None:
        """Stop serving and free the port and the memory. May be called twice."""
        self.server.stop()
        self._frozen = self._current = self._older = None

    def _written(
        self, version: int, source: WeightSource, previous: _Published | None
    ) -> tuple[_Published, Delta | None]:
        memory = self._memory_for(source, previous)
        wants_delta = self._has_delta and previous is not None and self.server.egress_bytes > 0
        base = previous.holding if previous is not None and wants_delta else None
        if base is not None:
            _return_freed_memory()  # of messages that went whole
        writer = VersionWriter(source, memory, bucket_bytes=self._bucket_bytes, base=base)
        source.read(writer)
        manifest, delta = writer.finish(self.epoch, version)
        memory.unclaim()
        if base is not None:
            del writer
            _return_freed_memory()  # of what it took to compare and to code
        holding = Holding(manifest, memory)
        if delta is not None:
            holding.deltas = {delta.base: delta.buckets}
        with self._lock:
            slow = set() if previous is None else previous.slow
        return _Published(holding, RelayTree(self._fan_out, self._host_identity, slow)), delta

    def _memory_for(self, source: WeightSource, previous: _Published | None) -> Memory:
        """Claimed memory to write into; what lies in it isn't served any more."""
        for each in (previous, self._older if previous is not None else None):
            if each is None or each.holding.memory.nbytes != source.nbytes or self.server.is_pulled(each.digest):
                continue
            if each.holding.memory.try_claim():
                self._forget(each)
                return each.holding.memory
        memory = Memory.create(source.nbytes, self._folder)
        memory.try_claim()
        return memory

    def _forget(self, published: _Published) -> None:
        """Its memory is written over: whatever comes of that, it is served no longer, and no delta starts from it."""
        with self._lock:
            self._current = None if self._current is published else self._current
            self._older = None if self._older is published else self._older
        self.server.drop(published.digest)
        published.holding.deltas.clear()  # before the next version's come

    def _replace(self, published: _Published) -> None:
        """At most two versions: the new one, and the older one that somebody is still pulling."""
        others = [each for each in (self._older, self._current) if each is not None]
        older = next((each for each in others if self._is_read(each)), None)
        with self._lock:  # the server asks for sources under its own lock: it isn't called within this one
            self._older, self._current = older, published
        for each in others:
            if each is not older:
                self.server.drop(each.digest)

    def _is_read(self, published: _Published) -> bool:
        """Whether a generator is pulling or mapping it."""
        memory = published.holding.memory
        if self.server.is_pulled(published.digest) or not memory.try_claim():
            return True
        memory.unclaim()
        return False

    def source(self, digest: str, member: Relay, lost: str | None, *, waits: bool) -> Relay | None:
        """See :class:`actors.weights.pull.server.Directory`."""
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
            return published.tree.relieve(member, is_late=now - began > LATE * longest)

    def done(self, digest: str, name: str) -> None:
        """See :class:`actors.weights.pull.server.Directory`."""
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
    """Give back to the system what the C library would keep: beside a delta that counts, and it hardly takes time."""
    with contextlib.suppress(AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def read_on_other_ranks(sources: Sequence[WeightSource]) -> None:
    """What ranks that don't publish do while the publishing one reads."""
    for source in sources:
        source.read(None)


def _offered(holding: Holding) -> PartOffer:
    manifest = holding.manifest
    return PartOffer(WeightsPart(manifest.part), manifest.digest, manifest.nbytes)
