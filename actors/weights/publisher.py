"""The trainer's side: reads a version into memory, keeps at most two, and serves them until the generators have them.

The memory of a version is written anew in place once nobody reads it any more; a generator that is slow keeps the
version it is reading, and holds up neither the trainer nor the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from actors.weights.manifest import ALIGNMENT, Part
from actors.weights.memory import Memory, host_identity
from actors.weights.offer import Keys, PartOffer, WeightsOffer
from actors.weights.relays import Relay, RelayTree
from actors.weights.server import LOOPBACK, Holding, WeightServer
from actors.weights.source import WeightSource
from actors.weights.writer import Delta, VersionWriter

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Published:
    """One part of a version, and the tree of those who pull it."""

    holding: Holding
    tree: RelayTree

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
        self.server = WeightServer(host=host, port=port, keys=self._keys, directory=self._source_of)

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
        writer = VersionWriter(source, memory, bucket_bytes=self._bucket_bytes, base=base)
        source.read(writer)
        manifest, delta = writer.finish(self.epoch, version)
        memory.unclaim()
        holding = Holding(manifest, memory)
        if delta is not None:
            holding.deltas = {delta.base: delta.buckets}
        return _Published(holding, RelayTree(self._fan_out, self._host_identity)), delta

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

    def _source_of(self, digest: str, member: Relay, lost: str | None) -> Relay | None:
        with self._lock:
            for each in (self._current, self._frozen, self._older):
                if each is not None and each.digest == digest:
                    return each.tree.join(member, lost)
        return None


def read_on_other_ranks(sources: Sequence[WeightSource]) -> None:
    """What ranks that don't publish do while the publishing one reads."""
    for source in sources:
        source.read(None)


def _offered(holding: Holding) -> PartOffer:
    manifest = holding.manifest
    return PartOffer(Part(manifest.part), manifest.digest, manifest.nbytes)
