"""The generators as one voice: who takes the next request, who has which policy version, who has to be started again.

A generator that died is started anew and serves nothing until it has loaded the current version.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Generation

if TYPE_CHECKING:
    from actors.generator_handle import GeneratorHandle
    from actors.weights.offer import WeightsOffer, WeightsReceipt

logger = logging.getLogger(__name__)

NO_GENERATOR = "no_generator"
"""Reason of the failure for which no retry helps: every generator is lost."""
MAX_RESTARTS = 3
"""Restarts of one generator before the fleet goes on without it."""


class Health(StrEnum):
    """What a generator may be used for."""

    HEALTHY = "healthy"
    """Serves the current version."""
    STALE = "stale"
    """Runs, but has not loaded the current version; serves nothing."""
    DEAD = "dead"
    """Gone. The only way back is a restart, which ends in STALE."""


@dataclass
class Member:
    """One generator of the fleet."""

    name: str
    handle: GeneratorHandle | None
    health: Health
    version: int = -1
    running: int = 0
    restarts: int = 0
    why: str = ""
    """What was last wrong with it."""


@dataclass(frozen=True)
class Publication:
    """What became of one policy version on its way to the fleet. Seconds are the slowest generator's."""

    version: int
    delivered: int
    bytes: int
    transfer_s: float
    load_s: float
    pause_s: float


@dataclass
class GeneratorFleet:
    """All generators of a run. Lives in the driver's event loop.

    Attributes:
        launch: starts the generator of a name and returns its handle.
        deadline_s: longest wait for a healthy generator.
        on_event: told of deaths and restarts (kind, data), for the record.
    """

    launch: Callable[[str], Awaitable[GeneratorHandle]]
    deadline_s: float
    on_event: Callable[..., None]
    members: list[Member] = field(default_factory=list)
    offer: WeightsOffer | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _restarts: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, replicas: int) -> None:
        """Start the generators side by side. None of them serves before the first :meth:`publish`."""
        names = [f"generator-{index}" for index in range(replicas)]
        handles = await asyncio.gather(*(self.launch(name) for name in names))
        self.members = [Member(name, handle, Health.STALE) for name, handle in zip(names, handles, strict=True)]

    @property
    def served_version(self) -> int:
        """The oldest version that any serving generator has."""
        return min((m.version for m in self.members if m.health is Health.HEALTHY), default=-1)

    async def generate(
        self, prompt: Prompt, n: int, sampling: SamplingConfig, seed: int | None, request_id: str
    ) -> Generation | Failure:
        """One prompt's completions, from the healthy generator with the fewest requests.

        Returns:
            The completions, or a failure of the data (which no other generator would cure).
        Raises:
            FailureError: of kind infrastructure: the generator died or ran out of time, or none came up in time.
        """
        member = await self._acquire()
        handle = member.handle
        assert handle is not None
        try:
            return await handle.generate(prompt, n, sampling, seed, request_id)
        except FailureError as error:
            if error.failure.kind is FailureKind.INFRASTRUCTURE:
                self._bury(member, handle, error.failure.message)
            raise
        finally:
            member.running -= 1

    async def publish(self, offer: WeightsOffer) -> Publication:
        """Bring a version to every living generator; it counts as delivered when its digest agrees.

        Raises:
            FailureError: no generator has the version, after restarts.
        """
        self.offer = offer
        living = [m for m in self.members if m.health is not Health.DEAD]
        receipts = [r for r in await asyncio.gather(*(self._deliver(m, offer) for m in living)) if r is not None]
        if not receipts:
            await self.until_serving()
        return Publication(
            offer.version,
            len(receipts),
            offer.nbytes,
            *(max((getattr(r, name) for r in receipts), default=0.0) for name in ("transfer_s", "load_s", "pause_s")),
        )

    async def stop(self) -> None:
        """Stop every generator and every restart under way."""
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        handles = [m.handle for m in self.members if m.handle is not None]
        await asyncio.gather(*(handle.stop() for handle in handles), return_exceptions=True)

    async def _acquire(self) -> Member:
        await self.until_serving()
        member = min((m for m in self.members if m.health is Health.HEALTHY), key=lambda m: m.running)
        member.running += 1
        return member

    async def until_serving(self) -> None:
        """Wait until a generator serves the current version; at once where one does.

        Raises:
            FailureError: `no_generator`: all are lost, or none came back in time.
        """

        def is_settled() -> bool:
            return any(m.health is Health.HEALTHY for m in self.members) or not self._restarts

        try:
            async with asyncio.timeout(self.deadline_s), self._changed:
                await self._changed.wait_for(is_settled)
        except TimeoutError:
            pass
        if not any(m.health is Health.HEALTHY for m in self.members):
            states = "; ".join(f"{m.name} {m.health} after {m.restarts} restarts: {m.why}" for m in self.members)
            message = f"no generator can serve. {states}. Their logs are in the Ray session's folder."
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, NO_GENERATOR, message))

    async def _deliver(self, member: Member, offer: WeightsOffer) -> WeightsReceipt | None:
        """Load a version into one generator; resend once; then give the generator up for a restart."""
        handle = member.handle
        assert handle is not None
        for attempt in (1, 2):
            try:
                receipt = await handle.load_weights(offer)
            except FailureError as error:
                logger.warning("%s: update to version %d failed: %s", member.name, offer.version, error)
                self.on_event("update_failed", generator=member.name, version=offer.version, why=str(error))
                if attempt == 2:
                    self._bury(member, handle, str(error))
                continue
            if member.handle is not handle:
                return None
            if receipt.version == offer.version and receipt.digest == offer.manifest_digest:
                member.version = offer.version
                if offer is self.offer:  # a newer one may have been published meanwhile; it comes next
                    await self._set(member, Health.HEALTHY)
                return receipt
            self.on_event("digest_mismatch", generator=member.name, version=offer.version)
            if attempt == 2:
                self._bury(member, handle, f"loaded version {receipt.version} with digest {receipt.digest}")
        return None

    async def _set(self, member: Member, health: Health) -> None:
        async with self._changed:
            member.health = health
            self._changed.notify_all()

    def _bury(self, member: Member, handle: GeneratorHandle, why: str) -> None:
        """Give a generator up for a restart; of the many calls that fail with it, the first does it."""
        if member.health is Health.DEAD or member.handle is not handle:
            return
        member.health, member.version, member.why = Health.DEAD, -1, why
        self.on_event("generator_died", generator=member.name, why=why)
        task = asyncio.get_running_loop().create_task(self._restart(member))
        self._restarts.add(task)

    async def _restart(self, member: Member) -> None:
        """DEAD → STALE → HEALTHY, by way of the current version."""
        try:
            if member.handle is not None:
                await member.handle.stop()
            if member.restarts >= MAX_RESTARTS:
                self.on_event("generator_lost", generator=member.name, why=f"it died {member.restarts + 1} times")
                return
            member.restarts += 1
            member.handle = await self.launch(member.name)
            member.health = Health.STALE
            self.on_event("generator_restarted", generator=member.name, restarts=member.restarts)
            while member.health is Health.STALE and self.offer is not None and member.version != self.offer.version:
                await self._deliver(member, self.offer)
        except Exception as error:  # whatever it is, the fleet has to go on without this one
            self.on_event("generator_lost", generator=member.name, why=str(error))
            member.health, member.why = Health.DEAD, str(error)
        finally:
            self._restarts.discard(asyncio.current_task())
            async with self._changed:
                self._changed.notify_all()
