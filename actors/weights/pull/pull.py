"""One pull of a version: what is asked of whom, what is taken of the answers, and what follows silence or damage."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actors.weights.manifest import Manifest, ManifestError, bucket_digest
from actors.weights.offer import WeightsOffer
from actors.weights.pull.connection import Answer, Connection, GoneError, RefusedError, SilentError
from actors.weights.pull.delta import apply_delta
from actors.weights.pull.memory import MemoryAddress
from actors.weights.pull.relays import ROOT, Relay
from actors.weights.pull.server import Holding
from rollout.failures import Failure, FailureError, FailureKind

if TYPE_CHECKING:
    from actors.weights.pull.receiver import ReceiverSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Flow:
    """What is under way at a time: with it, memory beyond the version itself is bounded.

    Attributes:
        slice_bytes: of a bucket in one message.
        window: messages.
    """

    slice_bytes: int
    window: int


ENCRYPTED = Flow(1 << 20, 3)
"""CURVE holds three copies of a message while it is under way, on each side."""
PLAIN = Flow(2 << 20, 4)
"""It is so much faster that more has to be under way, lest it wait for requests."""
MAX_ATTEMPTS = 4
"""How often a bucket may arrive damaged from one source."""
MAX_PATIENCE_S = 60.0
RELIEF_S = 2.0
"""For the publisher to say whether there is a better source."""


@dataclass(eq=False)
class Own:
    """What this process holds of one part in memory of its own.

    Attributes:
        holding: the part, perhaps not whole yet.
        found: digest of what lies in each bucket, and of the manifest it came with; None where nothing useful does.
    """

    holding: Holding
    found: list[tuple[bytes, str] | None]


@dataclass(eq=False)
class Traffic:
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
    """A relay is dead, silent, or serves damage; or it is slow, and there is a better one (`is_slow`)."""

    def __init__(self, name: str, why: str, *, is_slow: bool = False) -> None:
        super().__init__(why)
        self.name = name
        self.is_slow = is_slow


class Wanted:
    """Which messages are still to be asked for. A bucket comes as its changes, in one, or whole, in several."""

    def __init__(self, own: Own, slice_bytes: int) -> None:
        self._own = own
        self._slice_bytes = slice_bytes
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
        parts = range(max(1, -(-(end - start) // self._slice_bytes)))
        self._left[index] = set(parts)
        return [(index, part) for part in parts]


class Pull:
    """One call of a receiver: its deadline, its connection to the publisher, what it has moved."""

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
        """Its deadline is now; noticed with the next message, or once the source has been silent for too long."""
        self._until = 0.0

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
        return self._named(self._ask_root("sources", digest, member=_fields(member), lost=lost))

    def _relieved(self, digest: str, member: Relay, source: Relay) -> bool:
        """Whether the publisher has a better source by now than this one; it may be busy, and is asked once."""
        self.root.ask("sources", digest, member=_fields(member), waits=True)
        try:
            answer = self.root.answer("sources", digest, min(self._until, time.monotonic() + RELIEF_S))
            return self._named(answer) != source
        except SilentError:
            self.root.reconnect()  # else a late answer would be taken for another one's
        except (GoneError, RefusedError) as error:
            logger.info("no other source of version %d: %s", self.offer.version, error)
        return False

    def _named(self, answer: Answer) -> Relay | None:
        told = answer.header.get("source")
        try:
            return None if told is None else Relay(*map(str, told))
        except TypeError as error:
            raise self.failure("weights_corrupt", f"its publisher named a source {told!r}") from error

    def address(self, connection: Connection, name: str, digest: str) -> MemoryAddress | None:
        """Where a server's memory of a version is, once it has all of it; None where it doesn't say.

        Raises:
            SourceLostError: this generator doesn't answer.
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

    def done(self, digest: str, member: str, connection: Connection | None = None) -> None:
        """Tell a source, or the publisher, that nothing more is needed of it."""
        (connection or self.root).ask("done", digest, member=member)

    def buckets(
        self, own: Own, connection: Connection, member: Relay, source: Relay | None, arrived: Callable[[], None]
    ) -> None:
        """Fill in what is missing, a few buckets under way at a time.

        Args:
            member: this process.
            source: whose the connection is; None for the publisher's.
        Raises:
            SourceLostError: this relay doesn't serve any more, or the publisher has a better source.
            FailureError: the publisher doesn't, or time is up.
        """
        digest, name = own.holding.manifest.digest, ROOT if source is None else source.name
        look_around = time.monotonic() + self._patience_s
        self.traffic.is_mapped, self.traffic.source = False, name
        wanted = Wanted(own, self.flow.slice_bytes)
        attempts: Counter[int] = Counter()
        while own.holding.missing:
            if time.monotonic() >= self._until:
                self._silent(connection, name)
            if source is not None and time.monotonic() >= look_around:
                if self._relieved(digest, member, source):
                    raise SourceLostError(name, "it is slow, and there is a better source", is_slow=True)
                look_around = time.monotonic() + self._patience_s
            for index, part, base in wanted.next(self.flow.window):
                connection.ask("bucket", digest, index=index, part=part, size=self.flow.slice_bytes, base=base)
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
                raise SourceLostError(name, str(error)) from error
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
                raise SourceLostError(name, why)

    def _accept(self, own: Own, answer: Answer, wanted: Wanted) -> bool | None:
        """Take a message.

        Returns:
            True where its bucket has the digest that the manifest names now, False where it is damaged, None where more
            of it has to come, or it isn't wanted any more.
        """
        index, encoding = answer.index, str(answer.header.get("encoding"))
        if not wanted.came(index, answer.part):
            return None
        manifest, place, before = own.holding.manifest, own.holding.content(index), own.found[index]
        own.found[index] = None  # what lies there is neither the one nor the other until the last part is in
        if encoding == "delta":
            try:
                apply_delta(answer.payload, np.frombuffer(place, dtype=np.uint8))
            except ValueError:
                return False
        else:
            start = answer.part * self.flow.slice_bytes
            there = place[start : start + self.flow.slice_bytes]
            if len(answer.payload) != len(there):
                return False
            there[:] = answer.payload
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
            raise SourceLostError(name, why)
        if not connection.is_lost:
            self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
        connection.reconnect()

    def _refused(self, name: str, error: RefusedError) -> Exception:
        """A relay that refuses this run's keys is another run's, at the address of one that has ended."""
        return self.failure("weights_refused", str(error)) if name == ROOT else SourceLostError(name, str(error))

    def failure(self, reason: str, why: str) -> FailureError:
        """What went wrong with this offer."""
        return refusal(reason, f"weights of policy version {self.offer.version} from {self.offer.endpoint}: {why}")


def _fields(member: Relay) -> list[str]:
    return [member.name, member.host, member.endpoint, member.server_key]


def refusal(reason: str, message: str) -> FailureError:
    return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, message))
