"""The generator's side of a push: the trainer sends a version into the paused vLLM engine (nccl, ipc).

The trainer calls the methods in the order in which they stand here. After a failure the generator serves its former
version where the engine still holds it whole, and is stale otherwise.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.generator.vllm_weights import VllmWeights
from actors.weights.offer import WeightsReceipt
from rollout.failures import FailureError

ROUTE = "push"


class VllmPush:
    """Receives one push at a time into one vLLM engine."""

    def __init__(self, weights: VllmWeights, engine: Any) -> None:
        self._weights = weights
        self._engine = engine
        self._began = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer group. Generation continues meanwhile."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def begin(self, version: int) -> None:
        """Pause generation, open the session and start its deadline.

        Raises:
            FailureError: `weights_not_paused`: requests that must end first were still running at the deadline.
        """
        await self._weights.begin_update()
        try:
            self._began = time.monotonic()
            await self._weights.pause_for(version)
            await self._engine.start_weight_update()
        except BaseException:
            await self._engine.resume_generation()
            self._weights.end_update()
            raise
        self._watch = asyncio.create_task(self._until_deadline(version))

    async def update(self, update_info: dict[str, Any]) -> None:
        """Receive tensors, or compare the received ones with the trainer's digests.

        Raises:
            Exception: the engine's own. Where its text says that the model is untouched, the former version is served.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._watch is None:
            raise FailureError(
                self._weights.failure("push_over", "this push has already ended, by failure or by its deadline")
            )
        try:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except BaseException as error:
            await self._fail(error)
            raise

    async def finish(self, version: int, digest: str) -> WeightsReceipt:
        """Serve the version. Raises the exceptions of :meth:`update`."""
        if self._watch is None:
            raise FailureError(
                self._weights.failure("push_over", "this push has already ended, by failure or by its deadline")
            )
        try:
            await self._engine.finish_weight_update(str(version))
            await self._weights.invalidate(has_frozen=False)
        except BaseException as error:
            await self._fail(error)
            raise
        self._stop_watching()
        await self._engine.resume_generation()
        await self._weights.set_loaded(version)
        self._weights.end_update()
        seconds = time.monotonic() - self._began
        return WeightsReceipt(version, digest, seconds, seconds, seconds, route=ROUTE)

    async def _fail(self, error: BaseException) -> None:
        """Serve the former version where the engine still holds it whole; otherwise become stale."""
        from actors.weights.push.group import UNTOUCHED

        self._stop_watching()
        tensor_parallel = self._weights.spec.config.tensor_parallel
        if not (tensor_parallel == 1 and UNTOUCHED in str(error)):
            await self._weights.set_broken(error)
        await self._engine.resume_generation()
        self._weights.end_update()

    async def _until_deadline(self, version: int) -> None:
        """Abandon the session at its deadline, so that generation resumes when the trainer is lost."""
        deadline_s = self._weights.spec.deadlines.sync_s
        await asyncio.sleep(deadline_s)
        self._watch = None
        why = f"the push of version {version} took longer than deadlines.sync_s = {deadline_s:g} s"
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"abandon": why}))
        except Exception as error:  # it always raises
            await self._fail(error)

    def _stop_watching(self) -> None:
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
