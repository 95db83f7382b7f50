"""Calls to several actors of one role at once, with a deadline, whose failures say who, what and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from rollout.failures import PEER_REFUSED, Failure, FailureError, FailureKind

SETTLE_S = 5.0


@dataclass(frozen=True)
class ActorResources:
    """What one actor asks Ray for.

    Attributes:
        num_cpus, num_gpus: logical CPUs and GPUs.
        custom: Ray custom resources, which pin the role to nodes.
    """

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)

    def options(self, threads: int) -> dict[str, Any]:
        """Options of `ray.remote(...)` for an actor with so many torch threads."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": dict(self.custom),
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
        }


async def gather(calls: Mapping[str, Any], role: str, what: str, deadline_s: float) -> dict[str, Any]:
    """Results of calls by the name of the actor they went to.

    Args:
        calls: object references by name ("rank 0").
        role: what the actors are ("policy").
        what: what they were asked, as a verb ("update").
        deadline_s: for all of them together.
    Raises:
        FailureError: the actor's own; INFRASTRUCTURE where one died (`<role>_died`) or ran out of time
            (`<role>_timeout`); BUG where it raised anything else (`<role>_raised`, with its traceback).
    """
    started = time.monotonic()
    names = {asyncio.ensure_future(asyncio.wrap_future(call.future())): name for name, call in calls.items()}
    done, pending = await asyncio.wait(names, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
    failed = [task for task in done if task.exception() is not None]
    if failed and pending:
        # Peers that waited for the failed one fail with it; the first to say so need not be the one at fault.
        more, pending = await asyncio.wait(pending, timeout=min(SETTLE_S, deadline_s))
        failed += [task for task in more if task.exception() is not None]
    for task in pending:
        task.cancel()
    seconds = time.monotonic() - started
    failures = [_failure(task.exception(), f"{role} {names[task]}", role, what, seconds) for task in failed]
    if failures:
        failure, cause = min(failures, key=lambda item: _blame(item[0]))
        raise FailureError(failure) from cause
    if pending:
        late = ", ".join(sorted(names[task] for task in pending))
        raise FailureError(
            Failure(
                FailureKind.INFRASTRUCTURE,
                f"{role}_timeout",
                f"{role} {late} didn't {what} within {deadline_s:g} s. Its process is stuck or too slow; "
                "raise the deadline in the recipe if it is only slow.",
            )
        )
    return {names[task]: task.result() for task in done}


def _failure(
    error: BaseException | None, who: str, role: str, what: str, seconds: float
) -> tuple[Failure, BaseException | None]:
    cause = getattr(error, "cause", None)
    if isinstance(cause, FailureError):
        return cause.failure, error
    if isinstance(error, RayTaskError):
        return Failure(FailureKind.BUG, f"{role}_raised", f"{who} raised when asked to {what}: {error}"), error
    reason = f"{role}_died" if isinstance(error, RayActorError) else f"{role}_unreachable"
    message = f"{who} was lost {seconds:.1f} s after it was asked to {what}: {error}"
    return Failure(FailureKind.INFRASTRUCTURE, reason, message), error


def _blame(failure: Failure) -> int:
    """Lower is nearer to the cause: a refusal, then a death, then an error that may only follow from a death."""
    if failure.reason == PEER_REFUSED:
        return 3
    return {FailureKind.DATA: 0, FailureKind.USER_CODE: 0, FailureKind.INFRASTRUCTURE: 1, FailureKind.BUG: 2}[
        failure.kind
    ]
