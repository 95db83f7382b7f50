"""A role that may die. It is asked through one door and started again where it died, until its budget is spent.

:class:`RestartBudget` decides, without a clock of its own; :class:`Revived` carries the decisions out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from actors.config import DeadlineConfig, RestartsConfig
from rollout.failures import Failure, FailureError, FailureKind

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RestartBudget:
    """The restarts that a role has left. Pure: failures and answers in, next state out; time comes with the event.

    Invariants: between two refills there are at most `config.budget` restarts; a refill follows only
    `config.refill_after` answers in a row; pauses grow from 0 to at most `config.backoff_max_s`.

    Attributes:
        config: the budget, the pauses and when the budget is refilled.
        used: restarts since the budget was full.
        answers: answers since the last restart.
    """

    config: RestartsConfig
    used: int = 0
    answers: int = 0

    def after_failure(self, now_s: float) -> tuple[RestartBudget, float | None]:
        """The role died, or a restart of it failed.

        Returns:
            The next state, and the time of the next restart; None where the budget is spent.
        """
        if self.used >= self.config.budget:
            return self, None
        pause_s = min(self.config.backoff_max_s, self.config.backoff_s * 2 ** (self.used - 1)) if self.used else 0.0
        return replace(self, used=self.used + 1, answers=0), now_s + pause_s

    def after_answer(self) -> RestartBudget:
        """The role has answered a question."""
        if self.used == 0:
            return self
        answers = self.answers + 1
        if answers >= self.config.refill_after:
            return RestartBudget(self.config)
        return replace(self, answers=answers)


class Revived(Generic[S]):
    """A role without a state of its own, whose servers may die. Lives in the driver's event loop.

    A new server is as good as the old one, so a question that a death cut short is asked again.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Awaitable[S]],
        end: Callable[[S], Awaitable[None]],
        *,
        is_death: Callable[[Failure], bool],
        restarts: RestartsConfig,
        deadlines: DeadlineConfig,
        on_event: Callable[..., None],
    ) -> None:
        """Nothing runs before :meth:`start`.

        Args:
            name: of the role in events and reasons ("reward_server").
            launch: starts the server, or leaves nothing running where it fails.
            end: ends a server, which may be dead.
            is_death: whether a failure of a question means that the server is dead.
            restarts: the budget.
            deadlines: of a launch (`start_s`) and of an end (`stop_s`).
            on_event: told of deaths and restarts (kind, data).
        """
        self._name = name
        self._launch = launch
        self._end = end
        self._is_death = is_death
        self._deadlines = deadlines
        self._on_event = on_event
        self._budget = RestartBudget(restarts)
        self._server: S | None = None
        self._restarts = 0
        self._lost: FailureError | None = None
        self._reviving = asyncio.Lock()

    async def start(self) -> None:
        """Start the server.

        Raises:
            FailureError: it didn't start, or not in time (`<name>_start_timeout`).
        """
        self._server = await self._launched()

    async def ask(self, question: Callable[[S], Awaitable[T]]) -> T:
        """The answer of a living server. A question that a death cut short is asked again after the restart.

        Args:
            question: a call to the server, which has a deadline of its own.
        Raises:
            FailureError: what the question raised, where it is no death; `<name>_lost` where the budget is spent.
        """
        while True:
            async with self._reviving:  # whoever comes during a restart waits for its end
                server, life = self._living(), self._restarts
            try:
                answer = await question(server)
            except FailureError as error:
                if not self._is_death(error.failure):
                    raise
                await self._revive(life, error.failure)
            else:
                if life == self._restarts:
                    self._budget = self._budget.after_answer()
                return answer

    async def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            await self._ended(self._server)

    def _living(self) -> S:
        if self._lost is not None:
            raise self._lost
        if self._server is None:
            raise RuntimeError(f"{self._name} was asked before it was started")
        return self._server

    async def _revive(self, life: int, failure: Failure) -> None:
        """Replace the server that died in its `life`; of many questions that find it dead, the first does it."""
        async with self._reviving:
            if life != self._restarts or self._lost is not None:
                return
            self._on_event(f"{self._name}_died", why=failure.message)
            await self._ended(self._living())
            while True:
                await self._until_restart(failure)
                try:
                    self._server = await self._launched()
                except FailureError as error:
                    if error.failure.kind is not FailureKind.INFRASTRUCTURE:
                        raise
                    failure = error.failure
                    self._on_event(f"{self._name}_restart_failed", why=failure.message)
                else:
                    self._restarts += 1
                    self._on_event(f"{self._name}_restarted", restarts=self._restarts)
                    return

    async def _until_restart(self, failure: Failure) -> None:
        """Wait until the server may be started again. Raises the verdict where the budget is spent."""
        now_s = asyncio.get_running_loop().time()
        self._budget, at_s = self._budget.after_failure(now_s)
        if at_s is None:
            budget = self._budget.config.budget
            times = "once" if budget == 0 else f"{budget + 1} times"
            message = (
                f"the {self._name.replace('_', ' ')} died or failed to start {times}, which is more than "
                f"restarts.budget = {budget} allows. The last time: {failure.message}"
            )
            self._lost = FailureError(Failure(FailureKind.INFRASTRUCTURE, f"{self._name}_lost", message))
            raise self._lost
        await asyncio.sleep(at_s - now_s)

    async def _launched(self) -> S:
        """A new server; the launch has a deadline of its own, and this one bounds what comes after that."""
        deadline_s = self._deadlines.start_s + self._deadlines.stop_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._launch()
        except TimeoutError as error:
            message = f"the {self._name.replace('_', ' ')} didn't start within {deadline_s:g} s"
            failure = Failure(FailureKind.INFRASTRUCTURE, f"{self._name}_start_timeout", message)
            raise FailureError(failure) from error

    async def _ended(self, server: S) -> None:
        """End a server within the deadline; one that can't be ended is left to Ray, which ends with the run."""
        try:
            async with asyncio.timeout(2 * self._deadlines.stop_s):
                await self._end(server)
        except (FailureError, TimeoutError) as error:
            logger.warning("the %s could not be ended: %s", self._name.replace("_", " "), error or "it took too long")
