"""Calls to actors: one actor, or several of one role at once. Each has a deadline; a failure says who, what, how long.

Both ways run the same code, so every role reports the same three failures: `<role>_died`, `<role>_timeout` and
`<role>_raised`. A push of weights calls generators from a trainer's own thread and doesn't come through here
(:mod:`actors.weights.push.port`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rollout.failures import PEER_REFUSED, Failure, FailureError, FailureKind

START = "start"
"""What an actor is asked first; a timeout of it names the resources too, which may be what the actor waits for."""
SETTLE_S = 5.0
"""How long the other calls of a :func:`gather` may still take after one has failed, to find the one at fault."""


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


async def call(reference: Any, *, role: str, who: str, what: str, deadline_s: float) -> Any:
    """The result of one call. If this is cancelled or runs out of time, Ray cancels the call.

    Args:
        reference: what `actor.method.remote(...)` returned.
        role: what the reasons of failures start with ("generator").
        who: what messages call the actor ("generator-3").
        what: what it was asked, as a verb ("load policy version 7"); :data:`START` for the first call.
        deadline_s: from now.
    Raises:
        FailureError: the actor's own, as it is; INFRASTRUCTURE where the actor died or couldn't be reached
            (`<role>_died`) or ran out of time (`<role>_timeout`); BUG where it raised anything else (`<role>_raised`,
            with its traceback).
    """
    return (await _results({who: reference}, role, what, deadline_s))[who]


async def gather(calls: Mapping[str, Any], role: str, what: str, deadline_s: float) -> dict[str, Any]:
    """The results of several calls, by the name of the actor that each went to.

    Where several fail, the failure nearest to the cause is raised: peers that waited for the one at fault fail too.
    If this is cancelled, runs out of time or fails, Ray cancels the calls that are still running.

    Args:
        calls: object references by name ("rank 0").
        role: what the actors are ("policy").
        what: as in :func:`call`.
        deadline_s: for all of them together.
    Raises:
        FailureError: as :func:`call`.
    """
    names = {f"{role} {name}": name for name in calls}
    results = await _results({who: calls[name] for who, name in names.items()}, role, what, deadline_s)
    return {names[who]: result for who, result in results.items()}


async def _results(references: Mapping[str, Any], role: str, what: str, deadline_s: float) -> dict[str, Any]:
    """The result of each call, by who was asked."""
    started = time.monotonic()
    answers = {who: asyncio.wrap_future(reference.future()) for who, reference in references.items()}
    try:
        await _wait(answers.values(), deadline_s, asyncio.FIRST_EXCEPTION)
        if any(answer.done() and answer.exception() is not None for answer in answers.values()):
            await _wait(answers.values(), min(SETTLE_S, deadline_s), asyncio.ALL_COMPLETED)
        late = [who for who, answer in answers.items() if not answer.done()]
    finally:
        for who, answer in answers.items():
            if not answer.done():
                answer.cancel()
                ray.cancel(references[who])
    seconds = time.monotonic() - started
    errors = {who: answer.exception() for who, answer in answers.items() if who not in late}
    failures = [(_failure(error, who, role, what, seconds), error) for who, error in errors.items() if error]
    if failures:
        failure, cause = min(failures, key=lambda item: _distance_from_cause(item[0]))
        raise FailureError(failure) from cause
    if late:
        raise FailureError(_timeout(late, role, what, deadline_s))
    return {who: answer.result() for who, answer in answers.items()}


async def _wait(answers: Iterable[asyncio.Future[Any]], deadline_s: float, until: str) -> None:
    """Wait for the answers, at most until the deadline. `asyncio.wait` raises none of their own errors."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):  # wait_for may forget that it was cancelled, before Python 3.12
            await asyncio.wait(answers, return_when=until)


def _failure(error: BaseException, who: str, role: str, what: str, seconds: float) -> Failure:
    cause = getattr(error, "cause", None)
    if isinstance(cause, FailureError):
        return cause.failure
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        message = (
            f"{who} died or couldn't be reached, {seconds:.1f} s after it was asked to {what}: "
            f"{type(error).__name__}: {error}"
        )
        return Failure(FailureKind.INFRASTRUCTURE, f"{role}_died", message)
    return Failure(FailureKind.BUG, f"{role}_raised", f"{who} raised when asked to {what}: {error}")


def _timeout(late: list[str], role: str, what: str, deadline_s: float) -> Failure:
    why = "or the cluster lacks the resources it asks for (see `ray status`)" if what == START else "or is too slow"
    return Failure(
        FailureKind.INFRASTRUCTURE,
        f"{role}_timeout",
        f"{', '.join(late)} didn't {what} within {deadline_s:g} s. The process hangs, {why}. If it only needs longer, "
        "raise the deadline in the recipe.",
    )


def _distance_from_cause(failure: Failure) -> int:
    """Lower is nearer to the cause: a refusal, then a death, then an error that may only follow from a death."""
    if failure.reason == PEER_REFUSED:
        return 3
    return {FailureKind.DATA: 0, FailureKind.USER_CODE: 0, FailureKind.INFRASTRUCTURE: 1, FailureKind.BUG: 2}[
        failure.kind
    ]
