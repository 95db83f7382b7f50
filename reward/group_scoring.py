"""Scores groups through the pool of worker processes: which functions are called, what is tried again, the scores.

How processes are kept is in ``reward.worker_pool``; what a returned value means is in ``reward.returned_values``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from reward.config import RewardComponentConfig, RewardConfig
from reward.registry import RewardRequest
from reward.returned_values import ComponentValues, combine, component_labels
from reward.worker_main import Call, Check
from reward.worker_pool import Reply, WorkerPool
from rollout.failures import Failure, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Completion, Score

_PERMANENT = frozenset({"reward_unknown_function", "module_missing", "module_failed", "reward_server_stopped"})


class GroupScorer:
    """Scores groups. Use it from one event loop; the functions run in ``config.workers`` worker processes."""

    def __init__(self, config: RewardConfig, media_folder: Path, *, start_s: float = 60.0) -> None:
        """Start the workers, which import ``config.modules`` within ``start_s`` seconds. Doesn't wait for them."""
        self._config = config
        self._media_folder = media_folder
        self._labels = component_labels(config.components)
        self._pool = WorkerPool(
            workers=config.workers, modules=config.modules, start_s=start_s, deadline_s=config.deadline_s
        )

    async def ready(self) -> Failure | None:
        """Wait until every worker has started or failed, within ``start_s``. The first failure, or None."""
        for failure in await asyncio.gather(*[_result(started) for started in self._pool.started]):
            if failure is not None:
                assert isinstance(failure, Failure)
                return failure
        return None

    async def check(self) -> Failure | None:
        """None if all functions exist and accept their arguments, or the failure that names the first that doesn't."""
        result: Failure | None = await _result(self._pool.submit(Check(self._config.components)))
        return result

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Score, ...] | Failure:
        """A score for each completion, in order; or the failure of one that still fails after the last attempt."""
        if not completions:
            return ()
        requests = [
            RewardRequest(prompt, c.text, c.token_ids, c.finish_reason, self._media_folder) for c in completions
        ]
        by_component = await asyncio.gather(
            *[self._component(*pair, requests) for pair in zip(self._labels, self._config.components, strict=True)]
        )
        columns: list[list[ComponentValues]] = []
        for values in by_component:
            if isinstance(values, Failure):
                return values
            columns.append(values)
        scores: list[Score] = []
        for row in zip(*columns, strict=True):
            score = combine(self._config.components, row, prompt.prompt_id)
            if isinstance(score, Failure):
                return score
            scores.append(score)
        return tuple(scores)

    def stop(self) -> None:
        """Kill the worker processes. Groups that are being scored end with the failure ``reward_server_stopped``."""
        self._pool.stop()

    async def _component(
        self, label: str, component: RewardComponentConfig, requests: Sequence[RewardRequest]
    ) -> list[ComponentValues] | Failure:
        """One function's values for the group.

        What fails is tried again: with all completions if the function takes groups, else with those that failed.
        """
        values: dict[int, ComponentValues] = {}
        failure: Failure | None = None
        for _ in range(self._config.max_attempts):
            pending = [i for i in range(len(requests)) if i not in values]
            if not pending:
                break
            call = Call(label, component.function, component.arguments, tuple(requests[i] for i in pending))
            reply: Reply | Failure = await _result(self._pool.submit(call))
            failure = reply if isinstance(reply, Failure) else _take(reply, pending, values)
            if failure is not None and not _may_heal(failure):
                return failure
        return failure if failure is not None else [values[i] for i in range(len(requests))]


def _take(reply: Reply, pending: Sequence[int], values: dict[int, ComponentValues]) -> Failure | None:
    """Put the reply's values under their indices; returns its first failure."""
    failures = [result for result in reply.results if isinstance(result, Failure)]
    if not (failures and reply.takes_group):
        values |= {i: given for i, given in zip(pending, reply.results, strict=True) if isinstance(given, dict)}
    return failures[0] if failures else None


def _may_heal(failure: Failure) -> bool:
    return failure.kind is not FailureKind.DATA and failure.reason not in _PERMANENT


async def _result(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)
