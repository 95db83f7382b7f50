"""Scoring of groups by functions that run in worker processes: attempts, counts, and the combined score."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward.config import RewardComponentConfig, RewardConfig
from reward.registry import RewardRequest
from reward.scoring import ComponentValues, combine, component_labels
from reward.worker_main import Call, Check
from reward.worker_pool import Reply, WorkerPool
from rollout.failures import Failure, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Completion, Score

_PERMANENT = frozenset({"reward_unknown_function", "module_missing", "module_failed", "reward_server_stopped"})


@dataclass(frozen=True)
class RewardCounters:
    """What the workers have done since they started.

    Attributes:
        groups: groups asked for.
        calls: attempts of one function on one group.
        retries: those of them that repeat a failed one.
        call_failures: failed completions by reason, retried ones included.
        group_failures: groups that ended in a failure, by reason.
        seconds: wall time inside workers, summed over calls.
    """

    groups: int = 0
    calls: int = 0
    retries: int = 0
    call_failures: Mapping[str, int] = field(default_factory=dict)
    group_failures: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class GroupScorer:
    """Scores groups. Use it from one event loop; functions run in ``config.workers`` processes apart from it."""

    def __init__(self, config: RewardConfig, media_folder: Path, *, start_s: float = 60.0) -> None:
        """Start the workers, which import ``config.modules`` within ``start_s`` seconds. Doesn't wait for them."""
        self._config = config
        self._media_folder = media_folder
        self._labels = component_labels(config.components)
        self._pool = WorkerPool(
            workers=config.workers, modules=config.modules, start_s=start_s, deadline_s=config.deadline_s
        )
        self._groups = self._calls = self._retries = 0
        self._seconds = 0.0
        self._call_failures: Counter[str] = Counter()
        self._group_failures: Counter[str] = Counter()

    async def ready(self) -> Failure | None:
        """Wait for the workers to have started (their own deadline bounds it); the first failure among them."""
        for failure in await asyncio.gather(*[_result(started) for started in self._pool.started]):
            if failure is not None:
                assert isinstance(failure, Failure)
                return failure
        return None

    async def check(self) -> Failure | None:
        """Whether the functions exist and accept their arguments; the failure that says which doesn't."""
        result: Failure | None = await _result(self._pool.submit(Check(self._config.components)))
        return result

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Score, ...] | Failure:
        """A score for each completion, in order; or, where one still fails after the last attempt, its failure."""
        self._groups += 1
        result = await self._score(prompt, completions)
        if isinstance(result, Failure):
            self._group_failures[result.reason] += 1
        return result

    def counters(self) -> RewardCounters:
        """A snapshot."""
        return RewardCounters(
            self._groups,
            self._calls,
            self._retries,
            dict(self._call_failures),
            dict(self._group_failures),
            self._seconds,
        )

    def stop(self) -> None:
        """Kill the workers; calls in flight end with a failure."""
        self._pool.stop()

    async def _score(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Score, ...] | Failure:
        if not completions:
            return ()
        requests = [
            RewardRequest(prompt, c.text, c.token_ids, c.finish_reason, self._media_folder) for c in completions
        ]
        by_component = await asyncio.gather(
            *[self._component(*pair, requests) for pair in zip(self._labels, self._config.components, strict=True)]
        )
        columns: list[list[ComponentValues]] = []
        for parts in by_component:
            if isinstance(parts, Failure):
                return parts
            columns.append(parts)
        scores: list[Score] = []
        for row in zip(*columns, strict=True):
            score = combine(self._config.components, row, prompt.prompt_id)
            if isinstance(score, Failure):
                return score
            scores.append(score)
        return tuple(scores)

    async def _component(
        self, label: str, component: RewardComponentConfig, requests: Sequence[RewardRequest]
    ) -> list[ComponentValues] | Failure:
        """One function's values for the group. Only completions that failed are tried again, unless it takes groups."""
        values: dict[int, ComponentValues] = {}
        failure: Failure | None = None
        for attempt in range(self._config.max_attempts):
            pending = [i for i in range(len(requests)) if i not in values]
            if not pending:
                break
            self._calls += 1
            self._retries += attempt > 0
            call = Call(label, component.function, component.arguments, tuple(requests[i] for i in pending))
            reply: Reply | Failure = await _result(self._pool.submit(call))
            failure = reply if isinstance(reply, Failure) else self._take(reply, pending, values)
            if failure is not None and not _may_heal(failure):
                return failure
        return failure if failure is not None else [values[i] for i in range(len(requests))]

    def _take(self, reply: Reply, pending: Sequence[int], values: dict[int, ComponentValues]) -> Failure | None:
        """Note the reply's values under their index; its first failure."""
        self._seconds += reply.seconds
        failures = [outcome for outcome in reply.outcomes if isinstance(outcome, Failure)]
        self._call_failures.update(failure.reason for failure in failures)
        if not (failures and reply.takes_group):
            values |= {i: o for i, o in zip(pending, reply.outcomes, strict=True) if isinstance(o, dict)}
        return failures[0] if failures else None


def _may_heal(failure: Failure) -> bool:
    return failure.kind is not FailureKind.DATA and failure.reason not in _PERMANENT


async def _result(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)
