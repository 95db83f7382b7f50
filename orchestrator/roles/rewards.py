"""The reward server as one voice: a server that died is started again, and the group it held is scored anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Completion, Score

if TYPE_CHECKING:
    from actors.reward.server import RewardHandle

MAX_RESTARTS = 3
"""Restarts of the reward server before the run stops."""


class Rewards:
    """Scores groups through a reward server that may die. Lives in the driver's event loop."""

    def __init__(
        self,
        launch: Callable[[], Awaitable[RewardHandle]],
        *,
        deadline_s: float,
        stop_s: float,
        on_event: Callable[..., None],
    ) -> None:
        """`launch` starts a server; `deadline_s` bounds one group's scoring; `on_event` hears of deaths."""
        self._launch = launch
        self._deadline_s = deadline_s
        self._stop_s = stop_s
        self._on_event = on_event
        self._handle: RewardHandle | None = None
        self._lock = asyncio.Lock()
        self._restarts = 0

    async def start(self) -> None:
        """Start the server and check its functions. Raises FailureError where a function can't be used."""
        self._handle = await self._launch()

    async def score(self, prompt: Prompt, completions: tuple[Completion, ...]) -> tuple[Score, ...] | Failure:
        """A score for each completion, or the failure for which the group is to be dropped.

        Raises:
            FailureError: the server can't be kept alive, or is at fault itself.
        """
        while True:
            handle = self._handle
            assert handle is not None
            try:
                return await handle.score(prompt, completions, deadline_s=self._deadline_s)
            except FailureError as error:
                if error.failure.reason == "reward_server_timeout":
                    return error.failure
                if error.failure.reason != "reward_server_died":
                    raise
                await self._revive(handle, error.failure)

    async def stop(self) -> None:
        """Stop the server and its workers."""
        if self._handle is not None:
            await self._handle.stop(deadline_s=self._stop_s)

    async def _revive(self, dead: RewardHandle, failure: Failure) -> None:
        """Replace a dead server; of many groups that find it dead, the first does it."""
        async with self._lock:
            if self._handle is not dead:
                return
            if self._restarts >= MAX_RESTARTS:
                message = f"the reward server died {self._restarts + 1} times; the last time: {failure.message}"
                raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "reward_server_lost", message))
            self._restarts += 1
            self._on_event("reward_server_died", why=failure.message)
            self._handle = await self._launch()
            self._on_event("reward_server_restarted", restarts=self._restarts)
