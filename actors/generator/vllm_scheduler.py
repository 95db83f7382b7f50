"""vLLM's scheduler with a prefix cache that can be reset while requests run.

vLLM itself resets the prefix cache only where no request runs, or where all running requests are recomputed. A weight
update needs more: a request that waits while weights are loaded would find its prompt cached by the old weights and
sample all of its tokens with the new ones. Imported in the engine core's process.
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
    """Make the scheduler; vLLM calls it by name (`scheduler_cls`)."""
    is_asynchronous = vllm_config.scheduler_config.async_scheduling
    made = ResettableAsyncScheduler if is_asynchronous else ResettableScheduler
    return made(vllm_config=vllm_config, **arguments)


class _ResettablePrefixCache(Base):
    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Reset the prefix cache. Running requests keep their blocks, which no other request finds any more.

        Args:
            reset_running_requests: recompute running requests, too.
            reset_connector: reset the cache outside of this engine, too.
        """
        if reset_running_requests or reset_connector:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            pool = manager.block_pool
            pool.evict_blocks({block.block_id for block in pool.blocks if block.block_hash is not None})
        return True


class ResettableScheduler(_ResettablePrefixCache, Scheduler):
    """Synchronous: each step waits for the one before."""


class ResettableAsyncScheduler(_ResettablePrefixCache, AsyncScheduler):
    """Asynchronous: steps are scheduled ahead."""
