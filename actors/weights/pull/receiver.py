"""The receiver, the generator's side of a pull: obtains a version by the best route, checks every byte and relays it.

The routes, best first: map the memory of a process on the same host; pull deltas from the held version; pull whole
buckets. Checked buckets are kept across broken connections, dead sources and failed calls.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from dataclasses import dataclass

import zmq

from actors.weights.manifest import Manifest, WeightsPart, bucket_digest
from actors.weights.offer import Keys, PartOffer, WeightsOffer
from actors.weights.pull.connection import Connection
from actors.weights.pull.memory import Memory, MemoryAddress, NoRoomError, host_identity
from actors.weights.pull.pull import OwnCopy, Pull, ReceiverSettings, SourceLostError, refusal
from actors.weights.pull.relays import ROOT, Relay
from actors.weights.pull.server import HeldPart, WeightServer

logger = logging.getLogger(__name__)

DEFAULTS = ReceiverSettings()


@dataclass(eq=False)
class ReceivedPart:
    """One part of a version, whole and checked."""

    held: HeldPart
    is_mapped: bool

    @property
    def manifest(self) -> Manifest:
        """Manifest of the part."""
        return self.held.manifest

    @property
    def path(self) -> str:
        """Path from which other processes of this host map its bytes."""
        return self.held.memory.path


@dataclass(eq=False)
class ReceivedWeights:
    """A whole, checked version, ready to be loaded.

    Attributes:
        parts: the parts to load, in this order.
        received_bytes: bytes received over the network.
        route, source: see :class:`actors.weights.offer.WeightsReceipt`.
    """

    parts: tuple[ReceivedPart, ...]
    received_bytes: int
    route: str
    source: str


class WeightReceiver:
    """Receives versions, one at a time. Its methods block; call them from a thread."""

    def __init__(self, name: str = "generator", settings: ReceiverSettings = DEFAULTS) -> None:
        self.name = name
        self.settings = settings
        self._busy = threading.Lock()
        self._context = zmq.Context()
        self._root: Connection | None = None
        self._root_of: tuple[str, bytes, Keys | None] = ("", b"", None)
        self._server: WeightServer | None = None
        self._server_keys: Keys | None = None
        self._own: dict[WeightsPart, OwnCopy] = {}
        self._older: dict[WeightsPart, OwnCopy] = {}  # the previous version, where it is still being read
        self._mapped: dict[WeightsPart, tuple[MemoryAddress, HeldPart]] = {}
        self._loaded: set[str] = set()
        self._pull: Pull | None = None
        self._newest = (-1, -1)
        self._host = host_identity() if settings.maps_memory else f"apart:{id(self)}:{time.time_ns()}"

    def receive(self, offer: WeightsOffer, deadline_s: float, *, anew: bool = False) -> ReceivedWeights:
        """Receive a version. Its memory is unchanged until :meth:`loaded` or the next call.

        Args:
            offer: the version and its publisher.
            deadline_s: bounds the whole call.
            anew: discard everything received before and receive every part whole.
        Raises:
            FailureError: INFRASTRUCTURE with reason `weights_superseded` (older than a received version),
                `weights_refused` (keys), `weights_timeout` (sources without an answer), `weights_corrupt` (repeated
                damage), `weights_gone` (no longer served) or `weights_no_room` (neither memory nor disk).
        """
        with self._busy:
            if offer.order < self._newest:
                why = (
                    f"{self.name}: policy version {offer.version} is older than the received version {self._newest[1]}"
                )
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
        """End the call of :meth:`receive` in progress. Arrived buckets are kept. Thread-safe."""
        if self._pull is not None:
            self._pull.interrupt()

    def loaded(self, received: ReceivedWeights) -> None:
        """Record that the vLLM engine has loaded the version: end leases and remember its frozen part."""
        with self._busy:
            for part in received.parts:
                if part.manifest.part is WeightsPart.FROZEN:
                    self._loaded.add(part.manifest.digest)
                if part.is_mapped:
                    part.held.memory.unclaim()

    def forget_loaded(self) -> None:
        """Discard everything received, because the vLLM engine has discarded its weights."""
        with self._busy:
            self._forget()

    def close(self) -> None:
        """Release everything received and stop serving."""
        with self._busy:
            self._forget()
            if self._server is not None:
                self._server.stop()
                self._server = None
            if self._root is not None:
                self._root.close(linger_ms=0)
                self._root = None
            self._context.destroy(linger=0)

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

    def _unserve(self, own: OwnCopy) -> None:
        if self._server is not None:
            self._server.drop(own.held.manifest.digest)

    def root(self, offer: WeightsOffer) -> Connection:
        """The connection to the publisher, kept from version to version."""
        wanted = (offer.endpoint, offer.server_key, offer.keys)
        if self._root is not None and self._root_of != wanted:
            self._root.close()
            self._root = None
        if self._root is None:
            self._root = Connection(self._context, offer.endpoint, offer.server_key, offer.keys)
            self._root_of = wanted
        return self._root

    def connect(self, relay: Relay, offer: WeightsOffer) -> Connection:
        """A connection to a relay."""
        return Connection(self._context, relay.endpoint, relay.server_key.encode(), offer.keys)

    def member(self, offer: WeightsOffer) -> Relay:
        """This process as a member of the relay tree. Where it relays, starts its server for the offer's keys."""
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
        if own is not None and own.held.manifest.digest == part.digest and not own.held.missing:
            return ReceivedPart(own.held, is_mapped=False)
        if own is not None and own.held.manifest.digest == part.digest:
            manifest = own.held.manifest
        else:
            manifest = pull.manifest(part.digest)
        if self.settings.maps_memory and self._host == pull.offer.host:
            held = self._map_from(pull.root, ROOT, manifest, pull)
            if held is not None:
                pull.done(manifest.digest, self.name)
                return ReceivedPart(held, is_mapped=True)
        return self._pull_part(manifest, pull)

    def _pull_part(self, manifest: Manifest, pull: Pull) -> ReceivedPart:
        """Pull over the network, or map another generator's memory on this host. A source that fails is replaced."""
        member, lost = self.member(pull.offer), None
        while True:
            source = pull.source(manifest.digest, member, lost)
            try:
                if source is None:
                    pull.buckets(self._prepare(manifest), pull.root, member, None, self._arrived)
                    break
                with contextlib.closing(self.connect(source, pull.offer)) as connection:
                    held = None
                    if self.settings.maps_memory and source.host == self._host:
                        held = self._map_from(connection, source.name, manifest, pull)
                    if held is None:
                        pull.buckets(self._prepare(manifest), connection, member, source, self._arrived)
                    pull.done(manifest.digest, self.name, connection)
                if held is not None:
                    pull.done(manifest.digest, self.name)
                    return ReceivedPart(held, is_mapped=True)
                break
            except SourceLostError as error:
                logger.info(
                    "%s: source %s of version %d is replaced: %s", self.name, error.name, manifest.version, error
                )
                lost = None if source is None or error.is_slow else source.endpoint
        pull.done(manifest.digest, self.name)
        return ReceivedPart(self._own[manifest.part].held, is_mapped=False)

    def _arrived(self) -> None:
        if self._server is not None:
            self._server.arrived()

    def _map_from(self, connection: Connection, name: str, manifest: Manifest, pull: Pull) -> HeldPart | None:
        """Map the memory of a process of this host once that has the whole version; None where that is impossible.

        Raises:
            SourceLostError: the relay sends no answer.
        """
        address = pull.address(connection, name, manifest.digest)
        held = None if address is None else self._map(manifest, address, checks_all=pull.checks_all)
        if held is None:
            return None
        pull.traffic.is_mapped, pull.traffic.source = True, name
        own = self._own.pop(manifest.part, None)
        if own is not None:  # its own memory is no longer needed
            self._unserve(own)
            own.held.memory.close()
        return held

    def _prepare(self, manifest: Manifest) -> OwnCopy:
        """Memory for a version, with the buckets that are there already: of an interrupted pull, or unchanged ones.

        The previous version is overwritten, unless a process pulls or maps it.
        """
        before = self._own.get(manifest.part)
        if before is not None and before.held.manifest.digest == manifest.digest:
            return before
        fits = before is not None and _fits(before.held.manifest, manifest)
        memory = before.held.memory if before is not None and fits and self._is_free(before) else None
        found: list[tuple[bytes, str] | None] = list(before.found) if before is not None and fits else []
        if memory is None:
            memory = Memory.create(manifest.nbytes, self.settings.folder)
            memory.try_claim()
            if before is not None and fits:
                _copy_found(before, memory)
        _, mapped = self._mapped.pop(manifest.part, (None, None))  # an older version in another process's memory
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
        self._retire(manifest.part, before, is_written_over=before is not None and before.held.memory is memory)
        own = self._own[manifest.part] = OwnCopy(HeldPart(manifest, memory, missing), found)
        if self._server is not None:
            self._server.hold(own.held)
        return own

    def _retire(self, part: WeightsPart, before: OwnCopy | None, *, is_written_over: bool) -> None:
        """Stop serving the previous version; one that is still being pulled is served until the next version."""
        older = self._older.pop(part, None)
        if older is not None:
            self._unserve(older)
        if before is None:
            return
        if is_written_over or not self._is_pulled(before):
            self._unserve(before)
            before.held.deltas.clear()  # before the next version's arrive, in case the part is still referenced
        else:
            self._older[part] = before

    def _is_pulled(self, own: OwnCopy) -> bool:
        return self._server is not None and self._server.is_pulled(own.held.manifest.digest)

    def _is_free(self, own: OwnCopy) -> bool:
        """Claim its memory. Returns False where a process pulls or maps it."""
        return not self._is_pulled(own) and own.held.memory.try_claim()

    def _map(self, manifest: Manifest, address: MemoryAddress, *, checks_all: bool) -> HeldPart | None:
        """Another process's memory, leased and checked; None where it cannot be opened or holds something else."""
        kept_address, kept = self._mapped.pop(manifest.part, (None, None))
        memory = None
        if kept is not None and kept_address == address and kept.memory.try_lease():
            memory = kept.memory
        elif kept is not None:
            kept.memory.close()
        memory = memory or Memory.open(address)
        if memory is None:
            return None
        held = HeldPart(manifest, memory)
        if memory.nbytes == manifest.nbytes and self._check(held, checks_all):
            self._mapped[manifest.part] = (address, held)
            return held
        logger.warning(
            "%s: the shared memory does not hold version %d; pulling it instead", self.name, manifest.version
        )
        memory.close()
        return None

    def _check(self, held: HeldPart, checks_all: bool) -> bool:
        """Whether mapped memory has the manifest's digests.

        Readers of one host share the work: a bucket that another has marked as checked is skipped, unless `checks_all`.
        """
        digests, memory = held.manifest.digests, held.memory
        start = zlib.crc32(self.name.encode()) % max(1, len(digests))  # each reader starts at another bucket
        for index in (*range(start, len(digests)), *range(start)):
            if not checks_all and memory.is_checked(index, digests[index]):
                continue
            if bucket_digest(held.content(index)) != digests[index]:
                return False
            memory.mark_checked(index, digests[index])
        return True


def _fits(before: Manifest, after: Manifest) -> bool:
    return (before.nbytes, before.bucket_bytes) == (after.nbytes, after.bucket_bytes)


def _copy_found(before: OwnCopy, memory: Memory) -> None:
    """Copy an old version's buckets into new memory: unchanged ones are kept, deltas start from the others."""
    for index, there in enumerate(before.found):
        if there is not None:
            start, end = before.held.manifest.span(index)
            memory.view[start:end] = before.held.content(index)


def _copy_mapped(mapped: HeldPart, memory: Memory) -> list[tuple[bytes, str] | None]:
    """Copy an old version's buckets from another process's memory, which its owner may be overwriting.

    Returns:
        Digests of the buckets that were whole; None for the others.
    """
    found: list[tuple[bytes, str] | None] = []
    for index, digest in enumerate(mapped.manifest.digests):
        start, end = mapped.manifest.span(index)
        memory.view[start:end] = mapped.content(index)
        is_there = bucket_digest(memory.view[start:end]) == digest
        found.append((digest, mapped.manifest.digest) if is_there else None)
    return found
