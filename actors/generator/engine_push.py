"""A generator's part in a push: the trainer sends a version into its engine (nccl, ipc) while generation stands still.

The trainer calls the methods in their order; whatever fails leaves the generator on its old version, whole, or stale.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.generator.engine_weights import EngineWeights
from actors.weights.offer import WeightsReceipt
from rollout.failures import FailureError

ROUTE = "push"


class EnginePush:
    """One push at a time into one engine."""

    def __init__(self, weights: EngineWeights, engine: Any) -> None:
        self._weights = weights
        self._engine = engine
        self._began = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's group. Generation may go on."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def begin(self, version: int) -> None:
        """Stop generation and open the session; from now on a deadline runs.

        Raises:
            FailureError: requests that must end first didn't.
        """
        await self._weights.hold()
        try:
            self._began = time.monotonic()
            await self._weights.pause_for(version)
            await self._engine.start_weight_update()
        except BaseException:
            await self._engine.resume_generation()
            self._weights.release()
            raise
        self._watch = asyncio.create_task(self._until_deadline(version))

    async def update(self, update_info: dict[str, Any]) -> None:
        """Receive, or hold what was received against what was sent.

        Raises:
            Exception: the engine's own. Where its words say that nothing was touched, the old version is served on.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._watch is None:
            raise FailureError(self._weights.failure("push_over", "this push has ended already"))
        try:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except BaseException as error:
            await self._fail(error)
            raise

    async def finish(self, version: int, digest: str) -> WeightsReceipt:
        """Serve the version. Raises what :meth:`update` does."""
        if self._watch is None:
            raise FailureError(self._weights.failure("push_over", "this push has ended already"))
        try:
            await self._engine.finish_weight_update(str(version))
            await self._weights.invalidate(has_frozen=False)
        except BaseException as error:
            await self._fail(error)
            raise
        self._stop_watching()
        await self._engine.resume_generation()
        await self._weights.set_loaded(version)
        self._weights.release()
        seconds = time.monotonic() - self._began
        return WeightsReceipt(version, digest, seconds, seconds, seconds, route=ROUTE)

    async def _fail(self, error: BaseException) -> None:
        """Go on with the old version where it is whole; else serve nothing."""
        from actors.weights.push.group import UNTOUCHED

        self._stop_watching()
        tensor_parallel = self._weights.spec.config.tensor_parallel
        if not (tensor_parallel == 1 and UNTOUCHED in str(error)):
            await self._weights.set_broken(error)
        await self._engine.resume_generation()
        self._weights.release()

    async def _until_deadline(self, version: int) -> None:
        """A trainer that was lost in the middle must not keep generation standing still."""
        deadline_s = self._weights.spec.deadlines.sync_s
        await asyncio.sleep(deadline_s)
        self._watch = None
        why = f"the push of version {version} didn't end within {deadline_s:g} s"
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"abandon": why}))
        except Exception as error:  # it always raises
            await self._fail(error)

    def _stop_watching(self) -> None:
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
