"""All generators as one role: which one takes a request, which has which policy version, which is started again.

A generator that died is started again and serves nothing until it has loaded the current version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.roles.delivery import DeliveryOutcome, Publication, Step, outcome_of
from orchestrator.roles.members import Health, Member, publication_of
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Generation

if TYPE_CHECKING:
    from actors.generator.handle import GeneratorHandle
    from actors.weights.canary import Canaries
    from actors.weights.offer import WeightsOffer
    from actors.weights.push.port import GeneratorPort
    from actors.weights.push.recipients import PushReport

    Push = Callable[[list[GeneratorPort]], Awaitable[PushReport]]

logger = logging.getLogger(__name__)

NO_GENERATOR = "no_generator"
"""Reason of the failure that no retry cures: every generator is lost."""
DISAGREEMENT = "weights_disagree"
"""Reason of the verdict on a generator that disagrees after a full resend and a restart."""
PAUSE_S = 1.0
"""Pause before the next attempt at a generator that nothing came through to."""
MAX_RESTARTS = 3
"""Restarts of one generator before the fleet continues without it."""


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
        """Start the generators side by side. None of them serves before the first :meth:`publish`.

        Raises:
            FailureError: one of them didn't start; the others are stopped.
        """
        names = [f"generator-{index}" for index in range(replicas)]
        launches = [asyncio.ensure_future(self.launch(name)) for name in names]
        try:
            handles = await asyncio.gather(*launches)
        except BaseException:
            for launch in launches:
                launch.cancel()
            ended = await asyncio.gather(*launches, return_exceptions=True)
            started = [handle for handle in ended if not isinstance(handle, BaseException)]
            await asyncio.gather(*(handle.stop() for handle in started), return_exceptions=True)
            raise
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

        Returns when all have it, or `grace_s` after the first has it. The others then serve nothing until they have
        caught up.

        Args:
            offer: the version.
            canaries: log-probabilities that its generators must reproduce, awaited from the trainer; None for a proof
                by digest alone.
            push: has the trainer push the version into the vLLM engines of these generators. Those that it doesn't
                reach pull it.
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
        return publication_of(offer, self.members, time.monotonic() - started)

    async def _push(self, offer: WeightsOffer, push: Push) -> None:
        """Push the version to all who are proven to have the one before; a push carries no frozen weights."""
        reachable = {m.name: m for m in self.members if m.health is Health.HEALTHY}
        if not reachable:
            return
        report = await push([m.handle.port(offer.version) for m in reachable.values() if m.handle is not None])
        for result in report.results:
            if result.name in report.current:
                reachable[result.name].pushed = result.answer
            else:
                self.on_event("push_failed", generator=result.name, version=offer.version, why=result.why)

    async def _until_delivered(self, offer: WeightsOffer) -> None:
        """Wait until all living generators have it, or one has it and the grace is over, or none can have it."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.deadline_s
        while True:
            if self._verdict is not None:
                raise self._verdict
            if _has_failed(self._canaries):
                return  # the trainer's failure, not the generators'
            living = [m for m in self.members if m.is_alive]
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
        living = [m for m in self.members if m.is_alive]
        is_over = self._verdict is not None or _has_failed(self._canaries)
        return is_over or all(m.order == offer.order for m in living)

    async def sleep(self, level: int) -> None:
        """Put every serving generator to sleep, which frees its memory; the next version wakes it. Level 0: none."""
        serving = [m for m in self.members if m.health is Health.HEALTHY and level > 0]
        await asyncio.gather(*(self._put_to_sleep(m, level) for m in serving))

    async def _put_to_sleep(self, member: Member, level: int) -> None:
        handle = member.handle
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
        await asyncio.gather(*(member.handle.stop() for member in self.members), return_exceptions=True)

    async def _acquire(self) -> Member:
        await self.until_serving()
        member = min((m for m in self.members if m.health is Health.HEALTHY), key=lambda m: m.running)
        member.running += 1
        return member

    async def until_serving(self) -> None:
        """Wait until a generator serves the current version; return at once where one does.

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
            message = f"no generator can serve: {states}. Their logs are in the Ray session's folder."
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, NO_GENERATOR, message))

    def _begin_delivery(self, member: Member) -> asyncio.Task[None] | None:
        """The task in which a living generator catches up with the current version; None where it is dead."""
        if not member.is_alive:
            return None
        handle, task = self._deliveries.get(member.name, (None, None))
        if task is None or handle is not member.handle:
            if task is not None:
                task.cancel()  # its process is gone
            task = asyncio.get_running_loop().create_task(self._catch_up(member, member.handle))
            self._deliveries[member.name] = member.handle, task
        return task

    async def _catch_up(self, member: Member, handle: GeneratorHandle) -> None:
        """Deliver to one generator until it has the current version."""
        try:
            while self.offer is not None and member.order != self.offer.order:
                if member.handle is not handle or not member.is_alive:
                    return
                offer, canaries = self.offer, self._canaries
                outcome, why = await self._deliver(member, handle, offer, canaries, anew=member.delivery.in_full)
                if member.handle is not handle or not member.is_alive or _has_failed(canaries):
                    return
                member.delivery, step = member.delivery.after(outcome)
                member.why = why or member.why
                if step is Step.DONE:
                    member.set_proven(offer)
                    if offer is self.offer:  # where a newer one was published meanwhile, it comes next
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
        """One attempt: load the version, then prove it. Returns how it ended, and why."""
        try:
            pushed, member.pushed = member.pushed, None
            is_there = pushed is not None and pushed.version == offer.version and not anew
            receipt = pushed if pushed and is_there else await handle.load_weights(offer, anew=anew)
            member.corrected = receipt.corrected or member.corrected
            if not is_there and (receipt.version, receipt.digest) != (offer.version, offer.trained.digest):
                why = f"it loaded version {receipt.version} with digest {receipt.digest}, not {offer.trained.digest}"
                self.on_event("digest_mismatch", generator=member.name, version=offer.version, why=why)
                return DeliveryOutcome.FAILED, why
            member.receipt, member.report = receipt, None
            if canaries is None:
                return DeliveryOutcome.PROVEN, ""
            await asyncio.wait({canaries})
            if _has_failed(canaries):
                return DeliveryOutcome.FAILED, "the trainer failed to compute the canaries"
            member.report = await handle.verify(canaries.result())
        except FailureError as error:
            if member.is_alive:  # a dead one fails because it is being ended
                logger.warning("%s could not be updated to version %d: %s", member.name, offer.version, error)
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
        """The verdict on a generator that disagrees after a full resend and a restart."""
        corrected = ", ".join(member.corrected[:20]) or "none"
        message = (
            f"{why}. It disagreed after a full resend and after a restart. Tensors of its vLLM engine that the full "
            f"resend changed: {corrected}."
        )
        return FailureError(Failure(FailureKind.BUG, DISAGREEMENT, message))

    async def _set(self, member: Member, health: Health) -> None:
        """Change the health of a living generator; a dead one stays dead until its restart."""
        async with self._changed:
            if member.is_alive:
                member.health = health
            self._changed.notify_all()

    def _bury(self, member: Member, handle: GeneratorHandle, why: str) -> None:
        """Take a generator for dead and restart it; of the many calls that fail with it, the first does it."""
        if not member.is_alive or member.handle is not handle:
            return
        member.die(why)
        self.on_event("generator_died", generator=member.name, why=why)
        task = asyncio.get_running_loop().create_task(self._restart(member))
        self._restarts.add(task)

    async def _restart(self, member: Member) -> None:
        """Start a dead generator again (STALE), and deliver the current version to it (HEALTHY)."""
        try:
            await member.handle.stop()
            if member.restarts >= MAX_RESTARTS or self._verdict is not None:
                self.on_event("generator_lost", generator=member.name, why=f"it died {member.restarts + 1} times")
                return
            member.restarts += 1
            member.restart(await self.launch(member.name))
            self.on_event("generator_restarted", generator=member.name, restarts=member.restarts)
            delivery = self._begin_delivery(member)
            if delivery is not None:
                await asyncio.wait({delivery})
        except Exception as error:  # whatever it is, the fleet goes on without this generator
            self.on_event("generator_lost", generator=member.name, why=str(error))
            member.die(str(error))
        finally:
            self._restarts.discard(asyncio.current_task())
            async with self._changed:
                self._changed.notify_all()


def _has_failed(work: asyncio.Future[Canaries] | None) -> bool:
    return work is not None and work.done() and (work.cancelled() or work.exception() is not None)
