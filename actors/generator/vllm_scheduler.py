"""vLLM's scheduler, whose cached prefixes can be forgotten while requests run.

vLLM forgets them only where nothing runs, or where everything that runs is computed anew. Between two versions that
isn't enough: a request that waits while weights are loaded would find its prompt as the old weights computed it, and
sample all of its tokens with the new ones. Imported in the engine's process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    Base = Scheduler
else:
    Base = object


def make_scheduler(*, vllm_config: Any, **arguments: Any) -> Scheduler:
    """For vLLM, which calls it where it would make its own scheduler."""
    is_asynchronous = vllm_config.scheduler_config.async_scheduling
    made = ForgettingAsyncScheduler if is_asynchronous else ForgettingScheduler
    return made(vllm_config=vllm_config, **arguments)


class _Forgetting(Base):
    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. Running requests keep the blocks that they have, and nobody else finds them.

        Args:
            reset_running_requests: compute running requests anew, too.
            reset_connector: forget those outside of this engine, too.
        """
        if reset_running_requests or reset_connector:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            pool = manager.block_pool
            pool.evict_blocks({block.block_id for block in pool.blocks if block.block_hash is not None})
        return True


class ForgettingScheduler(_Forgetting, Scheduler):
    """Where each step waits for the one before."""


class ForgettingAsyncScheduler(_Forgetting, AsyncScheduler):
    """Where steps are scheduled ahead."""
