"""The generators as one voice: who takes the next request, who has which policy version, who has to be started again.

A generator that died is started anew and serves nothing until it has loaded the current version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from orchestrator.roles.delivery import Delivery, DeliveryOutcome, Step, outcome_of
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Generation

if TYPE_CHECKING:
    from actors.generator.handle import GeneratorHandle
    from actors.weights.canary import Canaries, CanaryReport
    from actors.weights.offer import WeightsOffer, WeightsReceipt
    from actors.weights.push.port import GeneratorPort
    from actors.weights.push.recipients import PushReport

    Push = Callable[[list[GeneratorPort]], Awaitable[PushReport]]

logger = logging.getLogger(__name__)

NO_GENERATOR = "no_generator"
"""Reason of the failure for which no retry helps: every generator is lost."""
DISAGREEMENT = "weights_disagree"
"""Reason of the verdict on a generator whose log-probabilities nothing brings to the trainer's."""
PAUSE_S = 1.0
"""Before a generator that nothing came through to is tried again."""
MAX_RESTARTS = 3
"""Restarts of one generator before the fleet goes on without it."""


class Health(StrEnum):
    """What a generator may be used for."""

    HEALTHY = "healthy"
    """Is proven to have a version that it may serve."""
    STALE = "stale"
    """Runs, but isn't proven to have the current version; serves nothing."""
    DEAD = "dead"
    """Gone. The only way back is a restart, which ends in STALE."""


@dataclass
class Member:
    """One generator of the fleet."""

    name: str
    handle: GeneratorHandle | None
    health: Health
    version: int = -1
    """The last version that it was proven to have."""
    order: tuple[int, int] = (-1, -1)
    """The same, with the publisher's epoch."""
    delivery: Delivery = field(default_factory=Delivery)
    receipt: WeightsReceipt | None = None
    pushed: WeightsReceipt | None = None
    """Of a version that the trainer has sent into its engine, not proven yet."""
    report: CanaryReport | None = None
    running: int = 0
    restarts: int = 0
    why: str = ""
    """What was last wrong with it."""
    corrected: tuple[str, ...] = ()
    """Tensors of its engine that a full resend changed, when its log-probabilities disagreed."""


@dataclass(frozen=True)
class Publication:
    """What became of one policy version on its way to the fleet. Seconds and gaps are the worst generator's.

    Attributes:
        version: the policy version.
        delivered: generators that were proven to have it.
        bytes: size of what changes.
        seconds: from the offer until then.
        gather_s: for the trainer to read, cast and digest it, before the offer.
        transfer_s, stage_s, load_s, pause_s: see :class:`actors.weights.offer.WeightsReceipt`.
        verify_s: for a generator to compute the canaries.
        canary_gap: mean of the worst canary, nats; None without canaries.
        received_bytes: over the network, of all generators together.
        egress_bytes: what the publisher had sent for the version before.
        changed_share: of the elements; None where it wasn't measured.
        routes: how many generators took it from memory, over the network, as a delta.
        verified: proven version of each generator.
    """

    version: int
    delivered: int
    bytes: int
    seconds: float
    gather_s: float
    transfer_s: float
    stage_s: float
    load_s: float
    pause_s: float
    verify_s: float
    canary_gap: float | None
    received_bytes: int
    egress_bytes: int
    changed_share: float | None
    routes: dict[str, int]
    verified: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """For the record, under `weights/`."""
        found = {
            "version": self.version,
            "verified_version": min(self.verified.values(), default=-1),
            "delivered": self.delivered,
            "bytes": self.bytes,
            "sync_s": self.gather_s + self.seconds,
            "gather_s": self.gather_s,
            "transfer_s": self.transfer_s,
            "stage_s": self.stage_s,
            "load_s": self.load_s,
            "pause_s": self.pause_s,
            "verify_s": self.verify_s,
            "received_bytes": self.received_bytes,
            "egress_bytes": self.egress_bytes,
            **{f"route_{route}": count for route, count in self.routes.items()},
            **{f"verified_version/{name}": version for name, version in self.verified.items()},
        }
        if self.canary_gap is not None:
            found["canary_gap"] = self.canary_gap
        if self.changed_share is not None:
            found["changed_share"] = self.changed_share
        return {f"weights/{name}": float(value) for name, value in found.items()}


@dataclass
class GeneratorFleet:
    """All generators of a run. Lives in the driver's event loop.

    Attributes:
        launch: starts the generator of a name and returns its handle.
        deadline_s: longest wait for a healthy generator.
        on_event: told of deaths and restarts (kind, data), for the record.
        grace_s: how long a publication waits for further generators once one has the version.
    """

    launch: Callable[[str], Awaitable[GeneratorHandle]]
    deadline_s: float
    on_event: Callable[..., None]
    grace_s: float = 10.0
    members: list[Member] = field(default_factory=list)
    offer: WeightsOffer | None = None
    _canaries: asyncio.Future[Canaries] | None = None
    _verdict: FailureError | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _restarts: set[asyncio.Task[None]] = field(default_factory=set)
    _deliveries: dict[str, tuple[GeneratorHandle, asyncio.Task[None]]] = field(default_factory=dict)

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

    async def publish(
        self, offer: WeightsOffer, canaries: Awaitable[Canaries] | None = None, push: Push | None = None
    ) -> Publication:
        """Bring a version to every living generator; it counts as delivered when digest and canaries agree.

        Returns when all have it, or `grace_s` after the first has: the others serve nothing until they have caught up,
        and hold nobody up.

        Args:
            offer: the version.
            canaries: what its generators must reproduce, once the trainer has computed it; None for no such proof.
            push: has the trainer send the version into the engines of these generators; those that it doesn't reach
                get it as if there were none.
        Raises:
            FailureError: no generator has the version, after restarts; or one computes other log-probabilities than
                the trainer after a full resend and a restart (`weights_disagree`).
        """
        started = time.monotonic()
        self.offer = offer
        self._canaries = None if canaries is None else asyncio.ensure_future(canaries)
        if push is not None:
            await self._push(offer, push)
        for member in self.members:
            self._begin_delivery(member)
        try:
            await self._until_delivered(offer)
        finally:
            if self._canaries is not None and self._verdict is not None:
                self._canaries.cancel()
        if self._canaries is not None:
            await self._canaries  # raises what the trainer's attempt at them did
        return self._publication(offer, time.monotonic() - started)

    async def _push(self, offer: WeightsOffer, push: Push) -> None:
        """Have the version sent to all who were proven to have the one before: frozen weights don't come this way."""
        reachable = {m.name: m for m in self.members if m.health is Health.HEALTHY and m.handle is not None}
        if not reachable:
            return
        report = await push([m.handle.port(offer.version) for m in reachable.values() if m.handle is not None])
        for result in report.results:
            if result.name in report.current:
                reachable[result.name].pushed = result.answer
            else:
                self.on_event("push_failed", generator=result.name, version=offer.version, why=result.why)

    def _publication(self, offer: WeightsOffer, seconds: float) -> Publication:
        current = [m for m in self.members if m.order == offer.order]
        receipts = [m.receipt for m in current if m.receipt is not None]
        reports = [m.report for m in current if m.report is not None]
        return Publication(
            version=offer.version,
            delivered=len(current),
            bytes=offer.nbytes,
            seconds=seconds,
            gather_s=offer.gather_s,
            transfer_s=max((r.transfer_s for r in receipts), default=0.0),
            stage_s=max((r.stage_s for r in receipts), default=0.0),
            load_s=max((r.load_s for r in receipts), default=0.0),
            pause_s=max((r.pause_s for r in receipts), default=0.0),
            verify_s=max((r.seconds for r in reports), default=0.0),
            canary_gap=max((r.mean_gap for r in reports), default=None),
            received_bytes=sum(r.received_bytes for r in receipts),
            egress_bytes=offer.egress_bytes,
            changed_share=offer.changed_share,
            routes=dict(Counter(r.route for r in receipts if r.route)),
            verified={m.name: m.version for m in self.members},
        )

    async def _until_delivered(self, offer: WeightsOffer) -> None:
        """Until all living generators have it, or one has and the grace is over, or none can."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.deadline_s
        while True:
            if self._verdict is not None:
                raise self._verdict
            if _has_failed(self._canaries):
                return  # the trainer's failure, not the generators'
            living = [m for m in self.members if m.health is not Health.DEAD]
            current = [m for m in living if m.order == offer.order]
            if not living:
                await self.until_serving()
                return
            if len(current) == len(living):
                return
            if current:
                until = min(until, loop.time() + self.grace_s)
            if loop.time() >= until:
                break
            try:
                async with asyncio.timeout_at(until), self._changed:
                    if not self._has_settled(offer):
                        await self._changed.wait()
            except TimeoutError:
                break
        for member in self.members:
            if member.health is Health.HEALTHY and member.order != offer.order:
                self.on_event("generator_late", generator=member.name, version=offer.version)
                await self._set(member, Health.STALE)
        await self.until_serving()

    def _has_settled(self, offer: WeightsOffer) -> bool:
        living = [m for m in self.members if m.health is not Health.DEAD]
        is_over = self._verdict is not None or _has_failed(self._canaries)
        return is_over or all(m.order == offer.order for m in living)

    async def sleep(self, level: int) -> None:
        """Have every generator give its memory to the trainer; the next version wakes it. Level 0 does nothing."""
        serving = [m for m in self.members if m.health is Health.HEALTHY and level > 0]
        await asyncio.gather(*(self._put_to_sleep(m, level) for m in serving))

    async def _put_to_sleep(self, member: Member, level: int) -> None:
        handle = member.handle
        assert handle is not None
        try:
            await handle.sleep(level)
        except FailureError as error:
            self._bury(member, handle, str(error))

    async def stop(self) -> None:
        """Stop every generator and every restart under way."""
        tasks = [*self._restarts, *(task for _, task in self._deliveries.values())]
        for task in tasks:
            task.cancel()
        if self._canaries is not None:
            self._canaries.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
            return any(m.health is Health.HEALTHY for m in self.members) or not (self._restarts or self._deliveries)

        try:
            async with asyncio.timeout(self.deadline_s), self._changed:
                await self._changed.wait_for(is_settled)
        except TimeoutError:
            pass
        if self._verdict is not None:
            raise self._verdict
        if not any(m.health is Health.HEALTHY for m in self.members):
            states = "; ".join(f"{m.name} {m.health} after {m.restarts} restarts: {m.why}" for m in self.members)
            message = f"no generator can serve. {states}. Their logs are in the Ray session's folder."
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, NO_GENERATOR, message))

    def _begin_delivery(self, member: Member) -> asyncio.Task[None] | None:
        """Have a living generator catch up with what is current, unless it is about it; None where it is dead."""
        if member.health is Health.DEAD or member.handle is None:
            return None
        handle, task = self._deliveries.get(member.name, (None, None))
        if task is None or handle is not member.handle:
            if task is not None:
                task.cancel()  # to a process that is gone
            task = asyncio.get_running_loop().create_task(self._catch_up(member, member.handle))
            self._deliveries[member.name] = member.handle, task
        return task

    async def _catch_up(self, member: Member, handle: GeneratorHandle) -> None:
        """Deliveries to one generator, until it has what is current."""
        try:
            while self.offer is not None and member.order != self.offer.order:
                if member.handle is not handle or member.health is Health.DEAD:
                    return
                offer, canaries = self.offer, self._canaries
                outcome, why = await self._deliver(member, handle, offer, canaries, anew=member.delivery.in_full)
                if member.handle is not handle or member.health is Health.DEAD or _has_failed(canaries):
                    return
                member.delivery, step = member.delivery.after(outcome)
                member.why = why or member.why
                if step is Step.DONE:
                    member.version, member.order, member.corrected = offer.version, offer.order, ()
                    if offer is self.offer:  # a newer one may have been published meanwhile; it comes next
                        await self._set(member, Health.HEALTHY)
                elif step is Step.SEND_LATER:
                    await self._set(member, Health.STALE)
                    await asyncio.sleep(PAUSE_S)
                elif step in (Step.RESTART, Step.STOP):
                    if step is Step.STOP:
                        self._verdict = self._disagreement(member, why)
                    self._bury(member, handle, why)
                    return
        finally:
            if self._deliveries.get(member.name, (None, None))[0] is handle:
                del self._deliveries[member.name]
            async with self._changed:
                self._changed.notify_all()

    async def _deliver(
        self,
        member: Member,
        handle: GeneratorHandle,
        offer: WeightsOffer,
        canaries: asyncio.Future[Canaries] | None,
        *,
        anew: bool,
    ) -> tuple[DeliveryOutcome, str]:
        """One attempt: load, then prove. How it ended, and why."""
        try:
            pushed, member.pushed = member.pushed, None
            is_there = pushed is not None and pushed.version == offer.version and not anew
            receipt = pushed if pushed and is_there else await handle.load_weights(offer, anew=anew)
            member.corrected = receipt.corrected or member.corrected
            if not is_there and (receipt.version, receipt.digest) != (offer.version, offer.trained.digest):
                why = f"loaded version {receipt.version} with digest {receipt.digest}"
                self.on_event("digest_mismatch", generator=member.name, version=offer.version, why=why)
                return DeliveryOutcome.FAILED, why
            member.receipt, member.report = receipt, None
            if canaries is None:
                return DeliveryOutcome.PROVEN, ""
            await asyncio.wait({canaries})
            if _has_failed(canaries):
                return DeliveryOutcome.FAILED, "the trainer computed no canaries"
            member.report = await handle.verify(canaries.result())
        except FailureError as error:
            if member.health is not Health.DEAD:  # what fails because it is being ended needs no telling
                logger.warning("%s: update to version %d failed: %s", member.name, offer.version, error)
                self.on_event("update_failed", generator=member.name, version=offer.version, why=str(error))
            return outcome_of(error.failure.reason), str(error)
        if member.report.agrees:
            return DeliveryOutcome.PROVEN, ""
        why = f"{member.name} has version {offer.version}, but {member.report.words}"
        self.on_event(
            "weights_disagree",
            generator=member.name,
            version=offer.version,
            why=why,
            mean_gap=member.report.mean_gap,
            corrected=list(member.corrected),
        )
        return DeliveryOutcome.DISAGREES, why

    def _disagreement(self, member: Member, why: str) -> FailureError:
        """The verdict on a generator that nothing helps."""
        corrected = ", ".join(member.corrected[:20]) or "none"
        message = (
            f"{why}, after everything was sent again in full and after a restart. Tensors of its engine that the full "
            f"resend changed: {corrected}."
        )
        return FailureError(Failure(FailureKind.BUG, DISAGREEMENT, message))

    async def _set(self, member: Member, health: Health) -> None:
        """Of a living one; of a dead one, only a restart makes something else."""
        async with self._changed:
            if member.health is not Health.DEAD:
                member.health = health
            self._changed.notify_all()

    def _bury(self, member: Member, handle: GeneratorHandle, why: str) -> None:
        """Give a generator up for a restart; of the many calls that fail with it, the first does it."""
        if member.health is Health.DEAD or member.handle is not handle:
            return
        member.health, member.version, member.order, member.why = Health.DEAD, -1, (-1, -1), why
        self.on_event("generator_died", generator=member.name, why=why)
        task = asyncio.get_running_loop().create_task(self._restart(member))
        self._restarts.add(task)

    async def _restart(self, member: Member) -> None:
        """DEAD → STALE → HEALTHY, by way of the current version."""
        try:
            if member.handle is not None:
                await member.handle.stop()
            if member.restarts >= MAX_RESTARTS or self._verdict is not None:
                self.on_event("generator_lost", generator=member.name, why=f"it died {member.restarts + 1} times")
                return
            member.restarts += 1
            member.handle = await self.launch(member.name)
            member.health = Health.STALE
            self.on_event("generator_restarted", generator=member.name, restarts=member.restarts)
            delivery = self._begin_delivery(member)
            if delivery is not None:
                await asyncio.wait({delivery})
        except Exception as error:  # whatever it is, the fleet has to go on without this one
            self.on_event("generator_lost", generator=member.name, why=str(error))
            member.health, member.why = Health.DEAD, str(error)
        finally:
            self._restarts.discard(asyncio.current_task())
            async with self._changed:
                self._changed.notify_all()


def _has_failed(work: asyncio.Future[Canaries] | None) -> bool:
    return work is not None and work.done() and (work.cancelled() or work.exception() is not None)
