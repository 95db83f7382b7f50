"""One pull of a version: requests to its sources, checks of their answers, and the handling of timeouts and damage."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.weights.manifest import Manifest, ManifestError, bucket_digest
from actors.weights.offer import WeightsOffer
from actors.weights.pull.connection import Answer, Connection, KeysRefusedError, NoAnswerError, NotServedError
from actors.weights.pull.delta import apply_delta
from actors.weights.pull.memory import MemoryAddress
from actors.weights.pull.relays import ROOT, Relay
from actors.weights.pull.server import LOOPBACK, HeldPart
from rollout.failures import Failure, FailureError, FailureKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceiverSettings:
    """Settings of a generator's receiver.

    Attributes:
        maps_memory: map versions from the memory of processes on the same host.
        serves: relay received versions to other hosts.
        listen: address to serve at, reachable for other hosts.
        patience_s: timeout of an answer: a relay that exceeds it is replaced; for the publisher it doubles each time.
        folder: folder for files that hold versions; None holds them in memory.
    """

    maps_memory: bool = True
    serves: bool = True
    listen: str = LOOPBACK
    patience_s: float = 5.0
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class FlowControl:
    """Limits on messages in flight, which bound the memory needed beyond the version itself.

    Attributes:
        slice_bytes: largest part of a bucket in one message.
        window: largest number of messages in flight.
    """

    slice_bytes: int
    window: int


ENCRYPTED = FlowControl(1 << 20, 3)
"""With CURVE, which holds three copies of a message in flight on each side."""
PLAIN = FlowControl(2 << 20, 4)
"""Without CURVE, which is faster and needs more in flight to keep the link busy."""
MAX_ATTEMPTS = 4
"""Damaged arrivals of one bucket after which its source is replaced."""
MAX_PATIENCE_S = 60.0
REASSIGN_S = 2.0
"""Timeout of the question to the publisher whether there is a better source."""


@dataclass(eq=False)
class OwnCopy:
    """One part of a version in this process's own memory.

    Attributes:
        held: the part, whole or incomplete.
        found: for each bucket, the digest of its present content and of the manifest it came with; None where the
            content is undefined.
    """

    held: HeldPart
    found: list[tuple[bytes, str] | None]


@dataclass(eq=False)
class Traffic:
    """What a pull has received, and from where."""

    received_bytes: int = 0
    encodings: Counter[str] = field(default_factory=Counter)
    source: str = ROOT
    is_mapped: bool = False

    @property
    def route(self) -> str:
        if self.is_mapped:
            return "memory"
        return "delta" if self.encodings["delta"] > self.encodings["full"] else "network"


class SourceLostError(Exception):
    """A relay has to be replaced: it is dead, timed out or serves damage, or a better one exists (`is_slow`)."""

    def __init__(self, name: str, why: str, *, is_slow: bool = False) -> None:
        super().__init__(why)
        self.name = name
        self.is_slow = is_slow


class PendingSlices:
    """The messages to request. A bucket comes as a delta in one message, or whole in one message for each slice."""

    def __init__(self, own: OwnCopy, slice_bytes: int) -> None:
        self._own = own
        self._slice_bytes = slice_bytes
        self._waiting: deque[tuple[int, int]] = deque()
        self._asked: set[tuple[int, int]] = set()
        self._left: dict[int, set[int]] = {}  # outstanding slices of buckets that come whole
        for index in sorted(own.held.missing):
            if own.found[index] is None:
                self._waiting.extend(self._whole(index))
            else:
                self._waiting.append((index, 0))

    def next(self, window: int) -> Iterator[tuple[int, int, str]]:
        """Bucket, slice and base of the messages to request now, up to `window` in flight."""
        while self._waiting and len(self._asked) < window:
            index, slice_index = self._waiting.popleft()
            self._asked.add((index, slice_index))
            there = self._own.found[index]
            yield index, slice_index, "" if there is None or index in self._left else there[1]

    def came(self, index: int, slice_index: int) -> bool:
        """Record that a message has arrived. Returns whether it was expected."""
        is_expected = (index, slice_index) in self._asked
        self._asked.discard((index, slice_index))
        if is_expected and index in self._left:
            self._left[index].discard(slice_index)
        return is_expected and index in self._own.held.missing

    def more(self, index: int) -> bool:
        """Whether slices of a whole bucket are outstanding; they are requested where a delta was expected."""
        if index not in self._left:
            self._waiting.extendleft(reversed(self._whole(index)[1:]))
            self._left[index].discard(0)
        return bool(self._left[index])

    def damaged(self, index: int) -> None:
        """Request a bucket again, whole."""
        self._own.found[index] = None
        self._asked = {unit for unit in self._asked if unit[0] != index}
        self._waiting = deque(unit for unit in self._waiting if unit[0] != index)
        self._waiting.extendleft(reversed(self._whole(index)))

    def ask_again(self) -> None:
        """Request everything in flight again."""
        self._waiting.extendleft(sorted(self._asked, reverse=True))
        self._asked.clear()

    def _whole(self, index: int) -> list[tuple[int, int]]:
        start, end = self._own.held.manifest.span(index)
        slices = range(max(1, -(-(end - start) // self._slice_bytes)))
        self._left[index] = set(slices)
        return [(index, slice_index) for slice_index in slices]


class Pull:
    """One call of a receiver: its deadline, its connection to the publisher and its traffic."""

    def __init__(
        self,
        root: Connection,
        settings: ReceiverSettings,
        offer: WeightsOffer,
        until: float,
        deadline_s: float,
        *,
        checks_all: bool,
    ) -> None:
        self.offer = offer
        self.checks_all = checks_all
        self.root = root
        self.traffic = Traffic()
        self.flow = PLAIN if offer.keys is None else ENCRYPTED
        self._until = until
        self._deadline_s = deadline_s
        self._patience_s = settings.patience_s
        self._serves = settings.serves

    def interrupt(self) -> None:
        """Set the deadline to now. The pull ends with the next message or timeout."""
        self._until = 0.0

    def manifest(self, digest: str) -> Manifest:
        """Request a manifest from the publisher until one with the offered digest arrives."""
        for _ in range(MAX_ATTEMPTS):
            answer = self._ask_root("manifest", digest)
            try:
                manifest = Manifest.unpack(bytes(answer.payload))
            except ManifestError as error:
                logger.warning("the manifest of version %d arrived damaged: %s", self.offer.version, error)
                continue
            if manifest.digest == digest:
                return manifest
            logger.warning(
                "the manifest of version %d arrived with another digest than was offered", self.offer.version
            )
        raise self.failure("weights_corrupt", f"its manifest had another digest than was offered, {MAX_ATTEMPTS} times")

    def source(self, digest: str, member: Relay, lost: str | None) -> Relay | None:
        """Ask the publisher for a source; None is the publisher itself."""
        return self._named(self._ask_root("sources", digest, member=_fields(member), lost=lost))

    def _has_better_source(self, digest: str, member: Relay, source: Relay) -> bool:
        """Whether the publisher knows a better source than this one. Asked once, because the publisher may be busy."""
        self.root.ask("sources", digest, member=_fields(member), waits=True)
        try:
            answer = self.root.answer("sources", digest, min(self._until, time.monotonic() + REASSIGN_S))
            return self._named(answer) != source
        except NoAnswerError:
            self.root.reconnect()  # so that a late answer is not taken for a later request's
        except (NotServedError, KeysRefusedError) as error:
            logger.info("version %d keeps its source: %s", self.offer.version, error)
        return False

    def _named(self, answer: Answer) -> Relay | None:
        told = answer.header.get("source")
        try:
            return None if told is None else Relay(*map(str, told))
        except TypeError as error:
            raise self.failure(
                "weights_corrupt", f"the publisher named a malformed source: {str(told)[:200]!r}"
            ) from error

    def address(self, connection: Connection, name: str, digest: str) -> MemoryAddress | None:
        """The address of a server's memory of a version, once the server has all of it; None where it tells none.

        Raises:
            SourceLostError: a relay sends no answer.
            FailureError: the publisher sends none by the deadline, or refuses this run's keys.
        """
        try:
            while True:
                connection.ask("memory", digest)
                with contextlib.suppress(NoAnswerError):
                    answer = connection.answer("memory", digest, self._patient_until())
                    return MemoryAddress.of_fields(answer.header["memory"])
                connection.ask("manifest", digest)  # which it answers at once, even while it pulls
                connection.answer("manifest", digest, self._patient_until())
        except NoAnswerError:
            self._timed_out(connection, name)
        except KeysRefusedError as error:
            raise self._refused(name, error) from error
        except (NotServedError, KeyError, TypeError, ValueError) as error:
            logger.info("the memory of version %d cannot be mapped: %r", self.offer.version, error)
        return None

    def done(self, digest: str, member: str, connection: Connection | None = None) -> None:
        """Tell a source, or the publisher, that this pull needs nothing more of it."""
        (connection or self.root).ask("done", digest, member=member)

    def buckets(
        self, own: OwnCopy, connection: Connection, member: Relay, source: Relay | None, arrived: Callable[[], None]
    ) -> None:
        """Pull the missing buckets, with bounded messages in flight.

        Args:
            own: the part to fill.
            connection: connection to the source.
            member: this process.
            source: the relay at the other end; None for the publisher.
            arrived: called for each bucket.
        Raises:
            SourceLostError: the relay no longer serves, or the publisher knows a better source.
            FailureError: the publisher no longer serves, or the deadline has passed.
        """
        digest, name = own.held.manifest.digest, ROOT if source is None else source.name
        look_around = time.monotonic() + self._patience_s
        self.traffic.is_mapped, self.traffic.source = False, name
        pending = PendingSlices(own, self.flow.slice_bytes)
        attempts: Counter[int] = Counter()
        while own.held.missing:
            if time.monotonic() >= self._until:
                self._timed_out(connection, name)
            if source is not None and time.monotonic() >= look_around:
                if self._has_better_source(digest, member, source):
                    raise SourceLostError(name, "it is slow and a better source exists", is_slow=True)
                look_around = time.monotonic() + self._patience_s
            for index, slice_index, base in pending.next(self.flow.window):
                connection.ask("bucket", digest, index=index, slice=slice_index, size=self.flow.slice_bytes, base=base)
            try:
                answer = connection.answer("bucket", digest, self._patient_until())
            except NoAnswerError:
                self._timed_out(connection, name)
                pending.ask_again()
                continue
            except KeysRefusedError as error:
                raise self._refused(name, error) from error
            except NotServedError as error:
                if name == ROOT:
                    raise self.failure("weights_gone", str(error)) from error
                raise SourceLostError(name, str(error)) from error
            index = answer.index
            is_right = self._accept(own, answer, pending)
            del answer  # frees its payload before more is requested
            if is_right:
                arrived()
            if is_right is not False:
                continue
            attempts[index] += 1
            pending.damaged(index)
            logger.warning("bucket %d of version %d arrived damaged", index, self.offer.version)
            if attempts[index] >= MAX_ATTEMPTS:
                why = f"bucket {index} arrived damaged {MAX_ATTEMPTS} times"
                if name == ROOT:
                    raise self.failure("weights_corrupt", why)
                raise SourceLostError(name, why)

    def _accept(self, own: OwnCopy, answer: Answer, pending: PendingSlices) -> bool | None:
        """Write a message into its bucket.

        Returns:
            True where the bucket now has the manifest's digest, False where it is damaged, None where slices are
            outstanding or the message was not expected.
        """
        index, encoding = answer.index, str(answer.header.get("encoding"))
        if not pending.came(index, answer.slice):
            return None
        manifest, place, before = own.held.manifest, own.held.content(index), own.found[index]
        own.found[index] = None  # the content is undefined until the last slice has arrived
        if encoding == "delta":
            try:
                apply_delta(answer.payload, np.frombuffer(place, dtype=np.uint8))
            except ValueError:
                return False
        else:
            start = answer.slice * self.flow.slice_bytes
            there = place[start : start + self.flow.slice_bytes]
            if len(answer.payload) != len(there):
                return False
            there[:] = answer.payload
            if pending.more(index):
                self.traffic.received_bytes += len(answer.payload)
                return None
        if bucket_digest(place) != manifest.digests[index]:
            return False
        self.traffic.received_bytes += len(answer.payload)
        self.traffic.encodings[encoding] += 1
        if encoding == "delta" and before is not None and self._serves:
            own.held.deltas.setdefault(before[1], {})[index] = bytes(answer.payload)
        own.found[index] = (manifest.digests[index], manifest.digest)
        if own.held.missing == {index}:
            own.held.memory.unclaim()  # before other processes learn that it is whole
        own.held.missing.discard(index)
        return True

    def _ask_root(self, operation: str, digest: str, **fields: object) -> Answer:
        while True:
            self.root.ask(operation, digest, **fields)
            try:
                return self.root.answer(operation, digest, self._patient_until())
            except NoAnswerError:
                self._timed_out(self.root, ROOT)
            except KeysRefusedError as error:
                raise self._refused(ROOT, error) from error
            except NotServedError as error:
                raise self.failure("weights_gone", str(error)) from error

    def _patient_until(self) -> float:
        return min(self._until, time.monotonic() + self._patience_s)

    def _timed_out(self, connection: Connection, name: str) -> None:
        """Handle a timeout: replace a relay, or reconnect to the publisher with a longer one; raise at the deadline."""
        if time.monotonic() >= self._until:
            who = f"generator {name}" if name != ROOT else "the publisher"
            raise self.failure("weights_timeout", f"{who} did not deliver it within {self._deadline_s:g} s")
        if name != ROOT:
            why = (
                "the connection ended"
                if connection.is_lost
                else f"no answer for {self._patience_s:g} s (weights.patience_s)"
            )
            raise SourceLostError(name, why)
        if not connection.is_lost:
            self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
        connection.reconnect()

    def _refused(self, name: str, error: KeysRefusedError) -> Exception:
        """The error for refused keys. A relay that refuses them belongs to another run, at a reused address."""
        return self.failure("weights_refused", str(error)) if name == ROOT else SourceLostError(name, str(error))

    def failure(self, reason: str, why: str) -> FailureError:
        """A failure of this pull."""
        return refusal(reason, f"weights of policy version {self.offer.version} from {self.offer.endpoint}: {why}")


def _fields(member: Relay) -> list[str]:
    return [member.name, member.host, member.endpoint, member.server_key]


def refusal(reason: str, message: str) -> FailureError:
    """An infrastructure failure as an exception."""
    return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, message))
