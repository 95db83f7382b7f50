"""The reference model as one voice: servers that died are started again, and the batch they held is passed anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from rollout.failures import Failure, FailureError, FailureKind
from rollout.samples import TrainingSample

if TYPE_CHECKING:
    from actors.reference_pool import ReferencePool

MAX_RESTARTS = 3
"""Restarts of the reference before the run stops."""
T = TypeVar("T")


class Reference:
    """What a frozen model says, from servers that may die. Lives in the driver's event loop, for one caller at a time.

    A reference holds no state of the run, so a new one is as good as the old.
    """

    def __init__(self, launch: Callable[[], Awaitable[ReferencePool]], *, on_event: Callable[..., None]) -> None:
        """`launch` starts all servers; `on_event` hears of deaths and restarts."""
        self._launch = launch
        self._on_event = on_event
        self._pool: ReferencePool | None = None
        self._restarts = 0

    async def start(self) -> None:
        """Start the servers. Raises FailureError where they don't."""
        self._pool = await self._launch()

    async def log_probs(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The reference's log-probabilities of the samples' completions, [tokens] float32 each, nats.

        Raises:
            FailureError: a sample is at fault, or the servers can't be kept alive.
        """
        return await self._asked(lambda pool: pool.log_probs(samples))

    async def hidden_states(self, samples: list[TrainingSample]) -> list[NDArray[np.float16 | np.float32]]:
        """What the reference's output head makes the completions' logits of, [tokens, width] each.

        Raises:
            FailureError: as :meth:`log_probs`.
        """
        return await self._asked(lambda pool: pool.hidden_states(samples))

    async def stop(self) -> None:
        """End the servers."""
        if self._pool is not None:
            await self._pool.stop()

    async def _asked(self, question: Callable[[ReferencePool], Awaitable[T]]) -> T:
        while True:
            assert self._pool is not None
            try:
                return await question(self._pool)
            except FailureError as error:
                if error.failure.kind is not FailureKind.INFRASTRUCTURE:
                    raise
                await self._revive(self._pool, error.failure)

    async def _revive(self, dead: ReferencePool, failure: Failure) -> None:
        if self._restarts >= MAX_RESTARTS:
            message = f"the reference was lost {self._restarts + 1} times; the last time: {failure.message}"
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "reference_lost", message))
        self._restarts += 1
        self._on_event("reference_died", why=failure.message)
        await dead.stop()
        self._pool = await self._launch()
        self._on_event("reference_restarted", restarts=self._restarts)
