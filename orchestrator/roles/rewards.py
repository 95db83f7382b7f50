"""The reward server as the loop talks to it.

A server that died is started again, and the groups that it held are scored again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from actors.config import DeadlineConfig, RestartsConfig
from orchestrator.roles.revived import Revived
from rollout.failures import Failure, FailureError
from rollout.prompts import Prompt
from rollout.samples import Completion, Score

if TYPE_CHECKING:
    from actors.reward.server import RewardHandle


class Rewards:
    """Scores groups through a reward server that may die; many groups at once."""

    def __init__(
        self,
        launch: Callable[[], Awaitable[RewardHandle]],
        *,
        restarts: RestartsConfig,
        deadlines: DeadlineConfig,
        on_event: Callable[..., None],
    ) -> None:
        """`launch` starts a server; `deadlines.score_s` bounds one group's scoring; further arguments as
        :class:`orchestrator.roles.revived.Revived`."""
        self._deadline_s = deadlines.score_s
        self._server = Revived(
            "reward_server",
            launch,
            lambda handle: handle.stop(deadline_s=deadlines.stop_s),
            is_death=lambda failure: failure.reason == "reward_server_died",
            restarts=restarts,
            deadlines=deadlines,
            on_event=on_event,
        )

    async def start(self) -> None:
        """Start the server and check its functions. Raises FailureError where a function can't be used."""
        await self._server.start()

    async def score(self, prompt: Prompt, completions: tuple[Completion, ...]) -> tuple[Score, ...] | Failure:
        """A score for each completion, or the failure for which the group is to be dropped.

        Raises:
            FailureError: the server has a defect; or `reward_server_lost`: it can't be kept alive.
        """
        try:
            return await self._server.ask(lambda handle: handle.score(prompt, completions, deadline_s=self._deadline_s))
        except FailureError as error:
            if error.failure.reason == "reward_server_timeout":
                return error.failure
            raise

    async def stop(self) -> None:
        """Stop the server and its workers."""
        await self._server.stop()
