"""The generator's side: gets a policy version by the best way there is, checks every byte, and serves it onward.

The ways, best first: map the memory of a process on the same host that has it; pull what changed since the version
that is held; pull whole buckets. What has arrived is kept across broken connections, dead sources and failed calls.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import zmq

from actors.weights.manifest import Manifest, WeightsPart, bucket_digest
from actors.weights.offer import Keys, PartOffer, WeightsOffer
from actors.weights.pull.connection import Connection
from actors.weights.pull.memory import Memory, MemoryAddress, NoRoomError, host_identity
from actors.weights.pull.pull import Own, Pull, SourceLostError, refusal
from actors.weights.pull.relays import ROOT, Relay
from actors.weights.pull.server import LOOPBACK, Holding, WeightServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceiverSettings:
    """How a generator receives.

    Attributes:
        maps_memory: take versions from the memory of processes on the same host.
        serves: serve what arrived onward to other hosts.
        listen: address to serve at, as other hosts see it.
        patience_s: a source that is silent for so long is given up; doubled each time, for slow links.
        folder: put the memory into files there; by default into memory.
    """

    maps_memory: bool = True
    serves: bool = True
    listen: str = LOOPBACK
    patience_s: float = 5.0
    folder: Path | None = None


@dataclass(eq=False)
class ReceivedPart:
    """One part of a version, whole and checked."""

    holding: Holding
    is_mapped: bool

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""
        return self.holding.manifest

    @property
    def path(self) -> str:
        """Where other processes of this host find its bytes."""
        return self.holding.memory.path


@dataclass(eq=False)
class ReceivedWeights:
    """A whole, checked version, ready to be loaded.

    Attributes:
        parts: what has to be loaded, in this order.
        received_bytes: that came over the network for it.
        route, source: see :class:`actors.weights.offer.WeightsReceipt`.
    """

    parts: tuple[ReceivedPart, ...]
    received_bytes: int
    route: str
    source: str


class WeightReceiver:
    """Receives versions, one at a time. Blocking; call it from a thread."""

    def __init__(self, name: str = "generator", settings: ReceiverSettings = ReceiverSettings()) -> None:
        self.name = name
        self.settings = settings
        self._busy = threading.Lock()
        self._context = zmq.Context()
        self._root: Connection | None = None
        self._root_of: tuple[str, bytes, Keys | None] = ("", b"", None)
        self._server: WeightServer | None = None
        self._server_keys: Keys | None = None
        self._own: dict[WeightsPart, Own] = {}
        self._older: dict[WeightsPart, Own] = {}  # the version before, where it couldn't be written over
        self._mapped: dict[WeightsPart, tuple[MemoryAddress, Holding]] = {}
        self._loaded: set[str] = set()
        self._pull: Pull | None = None
        self._newest = (-1, -1)
        self._host = host_identity() if settings.maps_memory else f"apart:{id(self)}:{time.time_ns()}"

    def receive(self, offer: WeightsOffer, deadline_s: float, *, anew: bool = False) -> ReceivedWeights:
        """Get a version. Its memory stays as it is until :meth:`loaded`, or the next call.

        Args:
            offer: what to get, and where.
            deadline_s: for all of it.
            anew: forget all that was received before: every part, whole.
        Raises:
            FailureError: INFRASTRUCTURE with reason `weights_superseded` (older than what was received already),
                `weights_refused` (keys), `weights_timeout` (silent sources), `weights_corrupt` (damaged again and
                again), `weights_gone` (no longer served) or `weights_no_room` (neither memory nor disk).
        """
        with self._busy:
            if offer.order < self._newest:
                why = f"policy version {offer.version} is older than version {self._newest[1]}, which is here already"
                raise refusal("weights_superseded", why)
            if anew:
                self._forget()
            pull = self._pull = Pull(
                self.root(offer), self.settings, offer, time.monotonic() + deadline_s, deadline_s, checks_all=anew
            )
            try:
                parts = [self._obtain(part, pull) for part in offer.parts if self._is_wanted(part)]
            except NoRoomError as error:
                raise pull.failure("weights_no_room", str(error)) from error
            self._newest = offer.order
            traffic = pull.traffic
            return ReceivedWeights(tuple(parts), traffic.received_bytes, traffic.route, traffic.source)

    def interrupt(self) -> None:
        """Nobody waits for what is being received: its deadline is now. What has arrived is kept. From any thread."""
        if self._pull is not None:
            self._pull.interrupt()

    def loaded(self, received: ReceivedWeights) -> None:
        """The engine has loaded it: give leases back; frozen weights needn't come again."""
        with self._busy:
            for part in received.parts:
                if part.manifest.part is WeightsPart.FROZEN:
                    self._loaded.add(part.manifest.digest)
                if part.is_mapped:
                    part.holding.memory.unclaim()

    def forget_loaded(self) -> None:
        """The engine has lost its weights: everything has to come again."""
        with self._busy:
            self._forget()

    def close(self) -> None:
        """Give up everything that was received."""
        with self._busy:
            self._forget()
            if self._server is not None:
                self._server.stop()
                self._server = None
            if self._root is not None:
                self._root.close(linger_ms=0)
                self._root = None
            self._context.destroy(linger=0)

    @property
    def served_bytes(self) -> int:
        """What this process has sent onward."""
        return 0 if self._server is None else self._server.egress_bytes

    def _is_wanted(self, part: PartOffer) -> bool:
        return part.part is not WeightsPart.FROZEN or part.digest not in self._loaded

    def _forget(self) -> None:
        for own in (*self._own.values(), *self._older.values()):
            self._unserve(own)
        self._own.clear()
        self._older.clear()
        for _, mapped in self._mapped.values():
            mapped.memory.close()
        self._mapped.clear()
        self._loaded.clear()

    def _unserve(self, own: Own) -> None:
        if self._server is not None:
            self._server.drop(own.holding.manifest.digest)

    def root(self, offer: WeightsOffer) -> Connection:
        """The connection to the publisher; kept from version to version."""
        wanted = (offer.endpoint, offer.server_key, offer.keys)
        if self._root is not None and self._root_of != wanted:
            self._root.close()
            self._root = None
        if self._root is None:
            self._root = Connection(self._context, offer.endpoint, offer.server_key, offer.keys)
            self._root_of = wanted
        return self._root

    def connect(self, relay: Relay, offer: WeightsOffer) -> Connection:
        """A connection to another generator."""
        return Connection(self._context, relay.endpoint, relay.server_key.encode(), offer.keys)

    def member(self, offer: WeightsOffer) -> Relay:
        """How this process is known in the tree; starts serving if it is to serve, to those who have the same keys."""
        if self._server is not None and self._server_keys != offer.keys:
            self._server.stop()
            self._server = None
        if self._server is None and self.settings.serves:
            self._server = WeightServer(host=self.settings.listen, keys=offer.keys)
            self._server_keys = offer.keys
        if self._server is None:
            return Relay(self.name, self._host, "", "")
        return Relay(self.name, self._host, self._server.endpoint, self._server.server_key.decode())

    def _obtain(self, part: PartOffer, pull: Pull) -> ReceivedPart:
        own = self._own.get(part.part)
        if own is not None and own.holding.manifest.digest == part.digest and not own.holding.missing:
            return ReceivedPart(own.holding, is_mapped=False)
        if own is not None and own.holding.manifest.digest == part.digest:
            manifest = own.holding.manifest
        else:
            manifest = pull.manifest(part.digest)
        if self.settings.maps_memory and self._host == pull.offer.host:
            holding = self._map_from(pull.root, ROOT, manifest, pull)
            if holding is not None:
                pull.done(manifest.digest, self.name)
                return ReceivedPart(holding, is_mapped=True)
        return self._pull_part(manifest, pull)

    def _pull_part(self, manifest: Manifest, pull: Pull) -> ReceivedPart:
        """Over the network, or from another generator's memory on this host; a source that fails is replaced."""
        member, lost = self.member(pull.offer), None
        while True:
            source = pull.source(manifest.digest, member, lost)
            try:
                if source is None:
                    pull.buckets(self._prepare(manifest), pull.root, member, None, self._arrived)
                    break
                with contextlib.closing(self.connect(source, pull.offer)) as connection:
                    holding = None
                    if self.settings.maps_memory and source.host == self._host:
                        holding = self._map_from(connection, source.name, manifest, pull)
                    if holding is None:
                        pull.buckets(self._prepare(manifest), connection, member, source, self._arrived)
                    pull.done(manifest.digest, self.name, connection)
                if holding is not None:
                    pull.done(manifest.digest, self.name)
                    return ReceivedPart(holding, is_mapped=True)
                break
            except SourceLostError as error:
                logger.info("%s: %s no longer serves version %d: %s", self.name, error.name, manifest.version, error)
                lost = None if source is None or error.is_slow else source.endpoint
        pull.done(manifest.digest, self.name)
        return ReceivedPart(self._own[manifest.part].holding, is_mapped=False)

    def _arrived(self) -> None:
        if self._server is not None:
            self._server.arrived()

    def _map_from(self, connection: Connection, name: str, manifest: Manifest, pull: Pull) -> Holding | None:
        """The memory of a process of this host, once it has all of it; None where there is none to be had.

        Raises:
            SourceLostError: this generator doesn't answer.
        """
        address = pull.address(connection, name, manifest.digest)
        holding = None if address is None else self._map(manifest, address, checks_all=pull.checks_all)
        if holding is None:
            return None
        pull.traffic.is_mapped, pull.traffic.source = True, name
        own = self._own.pop(manifest.part, None)
        if own is not None:  # memory of its own isn't needed any more
            self._unserve(own)
            own.holding.memory.close()
        return holding

    def _prepare(self, manifest: Manifest) -> Own:
        """Memory for a version, with what is there of it already: an interrupted pull, or buckets that didn't change.

        The version before is written over, unless somebody pulls or maps it.
        """
        before = self._own.get(manifest.part)
        if before is not None and before.holding.manifest.digest == manifest.digest:
            return before
        fits = before is not None and _fits(before.holding.manifest, manifest)
        memory = before.holding.memory if before is not None and fits and self._is_free(before) else None
        found: list[tuple[bytes, str] | None] = list(before.found) if before is not None and fits else []
        if memory is None:
            memory = Memory.create(manifest.nbytes, self.settings.folder)
            memory.try_claim()
            if before is not None and fits:
                _copy_found(before, memory)
        _, mapped = self._mapped.pop(manifest.part, (None, None))  # an older version, in another process's memory
        if mapped is not None:
            if before is None and _fits(mapped.manifest, manifest):
                found = _copy_mapped(mapped, memory)
            mapped.memory.close()
        found = found or [None] * len(manifest.digests)
        missing = set()
        for index, digest in enumerate(manifest.digests):
            there = found[index]
            if there is not None and there[0] == digest:
                found[index] = (digest, manifest.digest)
            else:
                missing.add(index)
        memory.clear_checked()
        if not missing:
            memory.unclaim()
        self._retire(manifest.part, before, is_written_over=before is not None and before.holding.memory is memory)
        own = self._own[manifest.part] = Own(Holding(manifest, memory, missing), found)
        if self._server is not None:
            self._server.hold(own.holding)
        return own

    def _retire(self, part: WeightsPart, before: Own | None, *, is_written_over: bool) -> None:
        """There is a later version: the one before is served until the next one, if somebody is still pulling it."""
        older = self._older.pop(part, None)
        if older is not None:
            self._unserve(older)
        if before is None:
            return
        if is_written_over or not self._is_pulled(before):
            self._unserve(before)
            before.holding.deltas.clear()  # before the next version's come, whoever still holds this one
        else:
            self._older[part] = before

    def _is_pulled(self, own: Own) -> bool:
        return self._server is not None and self._server.is_pulled(own.holding.manifest.digest)

    def _is_free(self, own: Own) -> bool:
        """Whether nobody pulls or maps it; then it is claimed."""
        return not self._is_pulled(own) and own.holding.memory.try_claim()

    def _map(self, manifest: Manifest, address: MemoryAddress, *, checks_all: bool) -> Holding | None:
        """Another process's memory, leased and checked; None where it can't be had or holds something else."""
        kept_address, kept = self._mapped.pop(manifest.part, (None, None))
        memory = None
        if kept is not None and kept_address == address and kept.memory.try_lease():
            memory = kept.memory
        elif kept is not None:
            kept.memory.close()
        memory = memory or Memory.open(address)
        if memory is None:
            return None
        holding = Holding(manifest, memory)
        if memory.nbytes == manifest.nbytes and self._check(holding, checks_all):
            self._mapped[manifest.part] = (address, holding)
            return holding
        logger.warning("%s: shared memory doesn't hold version %d", self.name, manifest.version)
        memory.close()
        return None

    def _check(self, holding: Holding, checks_all: bool) -> bool:
        """Whether mapped memory has the digests that the manifest names.

        Readers of one host share the work: what another has checked, under a lease like this one's, isn't read again,
        unless something is wrong (`checks_all`).
        """
        digests, memory = holding.manifest.digests, holding.memory
        start = zlib.crc32(self.name.encode()) % max(1, len(digests))  # each begins somewhere else
        for index in (*range(start, len(digests)), *range(start)):
            if not checks_all and memory.is_checked(index, digests[index]):
                continue
            if bucket_digest(holding.content(index)) != digests[index]:
                return False
            memory.mark_checked(index, digests[index])
        return True


def _fits(before: Manifest, after: Manifest) -> bool:
    return (before.nbytes, before.bucket_bytes) == (after.nbytes, after.bucket_bytes)


def _copy_found(before: Own, memory: Memory) -> None:
    """What an old version's buckets hold, into new memory: unchanged ones stay, deltas start from the others."""
    for index, there in enumerate(before.found):
        if there is not None:
            start, end = before.holding.manifest.span(index)
            memory.view[start:end] = before.holding.content(index)


def _copy_mapped(mapped: Holding, memory: Memory) -> list[tuple[bytes, str] | None]:
    """The same from another process's memory, where its owner may be writing something else by now.

    Returns:
        What of it was found, by bucket.
    """
    found: list[tuple[bytes, str] | None] = []
    for index, digest in enumerate(mapped.manifest.digests):
        start, end = mapped.manifest.span(index)
        memory.view[start:end] = mapped.content(index)
        is_there = bucket_digest(memory.view[start:end]) == digest
        found.append((digest, mapped.manifest.digest) if is_there else None)
    return found
