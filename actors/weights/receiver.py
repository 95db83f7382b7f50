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
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq

from actors.weights.connection import Answer, Connection, GoneError, RefusedError, SilentError
from actors.weights.manifest import Manifest, ManifestError, Part, bucket_digest
from actors.weights.memory import Memory, MemoryAddress, NoRoomError, host_identity
from actors.weights.offer import Keys, PartOffer, WeightsOffer
from actors.weights.relays import ROOT, Relay
from actors.weights.server import LOOPBACK, SLICE_BYTES, Holding, WeightServer
from actors.weights.writer import apply_delta
from rollout.failures import Failure, FailureError, FailureKind

logger = logging.getLogger(__name__)

WINDOW = 2
"""Buckets under way at a time. So many of them are the memory that is needed beyond the version itself, and one more
while one is being decrypted."""
MAX_ATTEMPTS = 4
"""How often a bucket may arrive damaged from one source."""
MAX_PATIENCE_S = 60.0


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


@dataclass(eq=False)
class _Own:
    """What this process holds of one part in memory of its own.

    Attributes:
        holding: the part, perhaps not whole yet.
        found: digest of what lies in each bucket, and of the manifest it came with; None where nothing useful does.
    """

    holding: Holding
    found: list[tuple[bytes, str] | None]


@dataclass(eq=False)
class _Traffic:
    received_bytes: int = 0
    encodings: Counter[str] = field(default_factory=Counter)
    source: str = ROOT
    is_mapped: bool = False

    @property
    def route(self) -> str:
        if self.is_mapped:
            return "memory"
        return "delta" if self.encodings["delta"] > self.encodings["full"] else "network"


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
        self._own: dict[Part, _Own] = {}
        self._older: dict[Part, _Own] = {}  # the version before, where it couldn't be written over
        self._mapped: dict[Part, tuple[MemoryAddress, Holding]] = {}
        self._loaded: set[str] = set()
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
                raise _failure("weights_superseded", why)
            if anew:
                self._forget()
            pull = _Pull(self, offer, time.monotonic() + deadline_s, deadline_s, checks_all=anew)
            try:
                parts = [self._obtain(part, pull) for part in offer.parts if self._is_wanted(part)]
            except NoRoomError as error:
                raise pull.failure("weights_no_room", str(error)) from error
            self._newest = offer.order
            traffic = pull.traffic
            return ReceivedWeights(tuple(parts), traffic.received_bytes, traffic.route, traffic.source)

    def loaded(self, received: ReceivedWeights) -> None:
        """The engine has loaded it: give leases back; frozen weights needn't come again."""
        with self._busy:
            for part in received.parts:
                if part.manifest.part is Part.FROZEN:
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
        return part.part is not Part.FROZEN or part.digest not in self._loaded

    def _forget(self) -> None:
        for own in (*self._own.values(), *self._older.values()):
            self._unserve(own)
        self._own.clear()
        self._older.clear()
        for _, mapped in self._mapped.values():
            mapped.memory.close()
        self._mapped.clear()
        self._loaded.clear()

    def _unserve(self, own: _Own) -> None:
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

    def _obtain(self, part: PartOffer, pull: _Pull) -> ReceivedPart:
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
                pull.done(manifest.digest)
                return ReceivedPart(holding, is_mapped=True)
        return self._pull_part(manifest, pull)

    def _pull_part(self, manifest: Manifest, pull: _Pull) -> ReceivedPart:
        """Over the network, or from another generator's memory on this host; a source that fails is replaced."""
        member, lost = self.member(pull.offer), None
        while True:
            source = pull.source(manifest.digest, member, lost)
            try:
                if source is None:
                    pull.buckets(self._prepare(manifest), pull.root, ROOT, self._arrived)
                    break
                with contextlib.closing(self.connect(source, pull.offer)) as connection:
                    holding = None
                    if self.settings.maps_memory and source.host == self._host:
                        holding = self._map_from(connection, source.name, manifest, pull)
                    if holding is None:
                        pull.buckets(self._prepare(manifest), connection, source.name, self._arrived)
                    pull.done(manifest.digest, connection)
                if holding is not None:
                    pull.done(manifest.digest)
                    return ReceivedPart(holding, is_mapped=True)
                break
            except _SourceLostError as error:
                logger.info("%s: %s no longer serves version %d: %s", self.name, error.name, manifest.version, error)
                lost = None if source is None else source.endpoint
        pull.done(manifest.digest)
        return ReceivedPart(self._own[manifest.part].holding, is_mapped=False)

    def _arrived(self) -> None:
        if self._server is not None:
            self._server.arrived()

    def _map_from(self, connection: Connection, name: str, manifest: Manifest, pull: _Pull) -> Holding | None:
        """The memory of a process of this host, once it has all of it; None where there is none to be had.

        Raises:
            _SourceLostError: this generator doesn't answer.
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

    def _prepare(self, manifest: Manifest) -> _Own:
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
        own = self._own[manifest.part] = _Own(Holding(manifest, memory, missing), found)
        if self._server is not None:
            self._server.hold(own.holding)
        return own

    def _retire(self, part: Part, before: _Own | None, *, is_written_over: bool) -> None:
        """There is a later version: the one before is served until the next one, if somebody is still pulling it."""
        older = self._older.pop(part, None)
        if older is not None:
            self._unserve(older)
        if before is None:
            return
        if is_written_over or not self._is_pulled(before):
            self._unserve(before)
        else:
            self._older[part] = before

    def _is_pulled(self, own: _Own) -> bool:
        return self._server is not None and self._server.is_pulled(own.holding.manifest.digest)

    def _is_free(self, own: _Own) -> bool:
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


class _SourceLostError(Exception):
    """A relay is dead, silent, or serves damage."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class _Wanted:
    """Which messages are still to be asked for. A bucket comes as its changes, in one, or whole, in several."""

    def __init__(self, own: _Own) -> None:
        self._own = own
        self._waiting: deque[tuple[int, int]] = deque()
        self._asked: set[tuple[int, int]] = set()
        self._left: dict[int, set[int]] = {}  # parts to come, of buckets that come whole
        for index in sorted(own.holding.missing):
            if own.found[index] is None:
                self._waiting.extend(self._whole(index))
            else:
                self._waiting.append((index, 0))

    def next(self, window: int) -> Iterator[tuple[int, int, str]]:
        """Bucket, part and base of what to ask for now, so that so many messages are under way."""
        while self._waiting and len(self._asked) < window:
            index, part = self._waiting.popleft()
            self._asked.add((index, part))
            there = self._own.found[index]
            yield index, part, "" if there is None or index in self._left else there[1]

    def came(self, index: int, part: int) -> bool:
        """A message is here. Whether it is wanted."""
        is_expected = (index, part) in self._asked
        self._asked.discard((index, part))
        if is_expected and index in self._left:
            self._left[index].discard(part)
        return is_expected and index in self._own.holding.missing

    def more(self, index: int) -> bool:
        """Whether parts of a bucket that comes whole are to come yet; they are, if its changes were hoped for."""
        if index not in self._left:
            self._waiting.extendleft(reversed(self._whole(index)[1:]))
            self._left[index].discard(0)
        return bool(self._left[index])

    def damaged(self, index: int) -> None:
        """A bucket has to come again, whole."""
        self._own.found[index] = None
        self._asked = {unit for unit in self._asked if unit[0] != index}
        self._waiting = deque(unit for unit in self._waiting if unit[0] != index)
        self._waiting.extendleft(reversed(self._whole(index)))

    def ask_again(self) -> None:
        """Nothing that is under way will come."""
        self._waiting.extendleft(sorted(self._asked, reverse=True))
        self._asked.clear()

    def _whole(self, index: int) -> list[tuple[int, int]]:
        start, end = self._own.holding.manifest.span(index)
        parts = range(max(1, -(-(end - start) // SLICE_BYTES)))
        self._left[index] = set(parts)
        return [(index, part) for part in parts]


class _Pull:
    """One call of :meth:`WeightReceiver.receive`: its deadline, its connection to the publisher, what it has moved."""

    def __init__(
        self, receiver: WeightReceiver, offer: WeightsOffer, until: float, deadline_s: float, *, checks_all: bool
    ) -> None:
        self.offer = offer
        self.checks_all = checks_all
        self.root = receiver.root(offer)
        self.traffic = _Traffic()
        self._until = until
        self._deadline_s = deadline_s
        self._patience_s = receiver.settings.patience_s
        self._serves = receiver.settings.serves

    def manifest(self, digest: str) -> Manifest:
        """Ask the publisher until a manifest with the offered digest arrives."""
        for _ in range(MAX_ATTEMPTS):
            answer = self._ask_root("manifest", digest)
            try:
                manifest = Manifest.unpack(bytes(answer.payload))
            except ManifestError as error:
                logger.warning("the manifest of version %d arrived damaged: %s", self.offer.version, error)
                continue
            if manifest.digest == digest:
                return manifest
            logger.warning("the manifest of version %d arrived with a wrong digest", self.offer.version)
        raise self.failure("weights_corrupt", "its manifest never had the digest that was offered")

    def source(self, digest: str, member: Relay, lost: str | None) -> Relay | None:
        """Whom to pull from; None for the publisher."""
        fields = {"member": [member.name, member.host, member.endpoint, member.server_key], "lost": lost}
        told = self._ask_root("sources", digest, **fields).header.get("source")
        try:
            return None if told is None else Relay(*map(str, told))
        except TypeError as error:
            raise self.failure("weights_corrupt", f"its publisher named a source {told!r}") from error

    def address(self, connection: Connection, name: str, digest: str) -> MemoryAddress | None:
        """Where a server's memory of a version is, once it has all of it; None where it doesn't say.

        Raises:
            _SourceLostError: this generator doesn't answer.
            FailureError: the publisher doesn't, and time is up; or it refuses this run's keys.
        """
        try:
            while True:
                connection.ask("memory", digest)
                with contextlib.suppress(SilentError):
                    answer = connection.answer("memory", digest, self._patient_until())
                    return MemoryAddress.of_fields(answer.header["memory"])
                connection.ask("manifest", digest)  # while it is still pulling, it answers that at once
                connection.answer("manifest", digest, self._patient_until())
        except SilentError:
            self._silent(connection, name)
        except RefusedError as error:
            raise self._refused(name, error) from error
        except (GoneError, KeyError, TypeError, ValueError) as error:
            logger.info("no memory of version %d to be mapped: %r", self.offer.version, error)
        return None

    def done(self, digest: str, connection: Connection | None = None) -> None:
        """Tell a source, or the publisher, that nothing more is needed of it."""
        (connection or self.root).ask("done", digest)

    def buckets(self, own: _Own, connection: Connection, name: str, arrived: Callable[[], None]) -> None:
        """Fill in what is missing, a few buckets under way at a time.

        Raises:
            _SourceLostError: this relay doesn't serve any more.
            FailureError: the publisher doesn't, or time is up.
        """
        digest = own.holding.manifest.digest
        self.traffic.is_mapped, self.traffic.source = False, name
        wanted = _Wanted(own)
        attempts: Counter[int] = Counter()
        while own.holding.missing:
            for index, part, base in wanted.next(WINDOW):
                connection.ask("bucket", digest, index=index, part=part, base=base)
            try:
                answer = connection.answer("bucket", digest, self._patient_until())
            except SilentError:
                self._silent(connection, name)
                wanted.ask_again()
                continue
            except RefusedError as error:
                raise self._refused(name, error) from error
            except GoneError as error:
                if name == ROOT:
                    raise self.failure("weights_gone", str(error)) from error
                raise _SourceLostError(name, str(error)) from error
            index = answer.index
            is_right = self._accept(own, answer, wanted)
            del answer  # and its payload, before more is asked for
            if is_right:
                arrived()
            if is_right is not False:
                continue
            attempts[index] += 1
            wanted.damaged(index)
            logger.warning("bucket %d of version %d arrived damaged", index, self.offer.version)
            if attempts[index] >= MAX_ATTEMPTS:
                why = f"bucket {index} was damaged {MAX_ATTEMPTS} times"
                if name == ROOT:
                    raise self.failure("weights_corrupt", why)
                raise _SourceLostError(name, why)

    def _accept(self, own: _Own, answer: Answer, wanted: _Wanted) -> bool | None:
        """Take a message.

        Returns:
            True where its bucket has the digest that the manifest names now, False where it is damaged, None where more
            of it has to come, or it isn't wanted any more.
        """
        index, encoding = answer.index, str(answer.header.get("encoding"))
        if not wanted.came(index, answer.part):
            return None
        manifest, place, before = own.holding.manifest, own.holding.content(index), own.found[index]
        if encoding == "delta":
            try:
                content = apply_delta(answer.payload, np.frombuffer(place, dtype=np.uint8))
            except ValueError:
                return False
            if bucket_digest(content) != manifest.digests[index]:
                return False
            place[:] = content.data
        else:
            own.found[index] = None  # what lies there is neither the one nor the other until the last part is in
            start = answer.part * SLICE_BYTES
            if len(answer.payload) != len(place[start : start + SLICE_BYTES]):
                return False
            place[start : start + SLICE_BYTES] = answer.payload
            if wanted.more(index):
                self.traffic.received_bytes += len(answer.payload)
                return None
            if bucket_digest(place) != manifest.digests[index]:
                return False
        self.traffic.received_bytes += len(answer.payload)
        self.traffic.encodings[encoding] += 1
        if encoding == "delta" and before is not None and self._serves:
            own.holding.deltas.setdefault(before[1], {})[index] = bytes(answer.payload)
        own.found[index] = (manifest.digests[index], manifest.digest)
        if own.holding.missing == {index}:
            own.holding.memory.unclaim()  # before others are told that it is whole
        own.holding.missing.discard(index)
        return True

    def _ask_root(self, operation: str, digest: str, **fields: object) -> Answer:
        while True:
            self.root.ask(operation, digest, **fields)
            try:
                return self.root.answer(operation, digest, self._patient_until())
            except SilentError:
                self._silent(self.root, ROOT)
            except RefusedError as error:
                raise self._refused(ROOT, error) from error
            except GoneError as error:
                raise self.failure("weights_gone", str(error)) from error

    def _patient_until(self) -> float:
        return min(self._until, time.monotonic() + self._patience_s)

    def _silent(self, connection: Connection, name: str) -> None:
        """Nothing came in time: a relay is given up, the publisher gets another connection and more time."""
        if time.monotonic() >= self._until:
            who = f"generator {name}" if name != ROOT else "the publisher"
            raise self.failure("weights_timeout", f"{who} didn't deliver within {self._deadline_s:g} s")
        if name != ROOT:
            why = "the connection ended" if connection.is_lost else f"nothing came for {self._patience_s:g} s"
            raise _SourceLostError(name, why)
        if not connection.is_lost:
            self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
        connection.reconnect()

    def _refused(self, name: str, error: RefusedError) -> Exception:
        """A relay that refuses this run's keys is another run's, at the address of one that has ended."""
        return self.failure("weights_refused", str(error)) if name == ROOT else _SourceLostError(name, str(error))

    def failure(self, reason: str, why: str) -> FailureError:
        """What went wrong with this offer."""
        return _failure(reason, f"weights of policy version {self.offer.version} from {self.offer.endpoint}: {why}")


def _failure(reason: str, message: str) -> FailureError:
    return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, message))


def _fits(before: Manifest, after: Manifest) -> bool:
    return (before.nbytes, before.bucket_bytes) == (after.nbytes, after.bucket_bytes)


def _copy_found(before: _Own, memory: Memory) -> None:
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
