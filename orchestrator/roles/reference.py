"""The frozen reference model as the loop talks to it.

Servers that died are started again, and the batch that they held is passed again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.config import DeadlineConfig, RestartsConfig
from orchestrator.roles.revived import Revived
from rollout.failures import FailureKind
from rollout.samples import TrainingSample

if TYPE_CHECKING:
    from actors.reference_pool import ReferencePool


class Reference:
    """Log-probabilities of a frozen model, from servers that may die. For one caller at a time."""

    def __init__(
        self,
        launch: Callable[[], Awaitable[ReferencePool]],
        *,
        restarts: RestartsConfig,
        deadlines: DeadlineConfig,
        on_event: Callable[..., None],
    ) -> None:
        """`launch` starts all servers; further arguments as :class:`orchestrator.roles.revived.Revived`."""
        self._servers = Revived(
            "reference",
            launch,
            lambda pool: pool.stop(),
            is_death=lambda failure: failure.kind is FailureKind.INFRASTRUCTURE,
            restarts=restarts,
            deadlines=deadlines,
            on_event=on_event,
        )

    async def start(self) -> None:
        """Start the servers. Raises FailureError where they don't."""
        await self._servers.start()

    async def log_probs(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The reference's log-probabilities of the samples' completions, [tokens] float32 each, nats.

        Raises:
            FailureError: a sample is at fault; or `reference_lost`: the servers can't be kept alive.
        """
        return await self._servers.ask(lambda pool: pool.log_probs(samples))

    async def hidden_states(self, samples: list[TrainingSample]) -> list[NDArray[np.float16 | np.float32]]:
        """The inputs of the reference's output head at the completions' tokens, [tokens, width] each.

        Raises:
            FailureError: as :meth:`log_probs`.
        """
        return await self._servers.ask(lambda pool: pool.hidden_states(samples))

    async def stop(self) -> None:
        """End the servers."""
        await self._servers.stop()
