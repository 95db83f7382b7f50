"""Calls to actors: results by name, deadlines, cancellation, and failures that are named by role."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import calls
from actors.calls import PEER_REFUSED, START, call, gather
from rollout.failures import DataError, Failure, FailureError, FailureKind


class Reference:
    """Stands for Ray's object reference: the future of a result."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.result


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The references that Ray was asked to cancel."""
    asked: list[Any] = []
    monkeypatch.setattr(calls.ray, "cancel", asked.append)
    return asked


async def failure_of(waiting: Any) -> Failure:
    with pytest.raises(FailureError) as caught:
        await waiting
    return caught.value.failure


def own(reason: str, kind: FailureKind = FailureKind.BUG) -> Exception:
    """A failure that an actor raised, as Ray hands it over."""
    return ray.exceptions.RayTaskError("method", "traceback", FailureError(Failure(kind, reason, reason)))


async def test_results_come_back_by_the_name_of_the_actor(cancelled: list[Any]) -> None:
    ranks = {"rank 0": Reference(), "rank 1": Reference()}
    ranks["rank 1"].result.set_result("b")
    ranks["rank 0"].result.set_result("a")
    assert await gather(ranks, "policy", "update", 5.0) == {"rank 0": "a", "rank 1": "b"}
    assert cancelled == []


async def test_the_deadline_names_who_is_late_and_cancels_those_calls_alone(cancelled: list[Any]) -> None:
    ranks = {f"rank {number}": Reference() for number in range(3)}
    ranks["rank 1"].result.set_result(None)
    failure = await failure_of(gather(ranks, "policy", "update", 0.05))
    assert (failure.kind, failure.reason) == (FailureKind.INFRASTRUCTURE, "policy_timeout")
    assert failure.message.startswith("policy rank 0, policy rank 2 didn't update within 0.05 s.")
    assert cancelled == [ranks["rank 0"], ranks["rank 2"]]


async def test_a_late_start_is_told_with_the_resources_it_may_wait_for(cancelled: list[Any]) -> None:
    waiting = call(Reference(), role="generator", who="generator-3", what=START, deadline_s=0.01)
    failure = await failure_of(waiting)
    assert failure.reason == "generator_timeout"
    assert "ray status" in failure.message


async def test_a_caller_that_is_cancelled_cancels_the_calls(cancelled: list[Any]) -> None:
    ranks = {"rank 0": Reference(), "rank 1": Reference()}
    waiting = asyncio.create_task(gather(ranks, "policy", "update", 60.0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cancelled == list(ranks.values())


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([own(PEER_REFUSED), own("sample_too_long", FailureKind.DATA)], "sample_too_long"),
        ([own(PEER_REFUSED), ray.exceptions.RayActorError()], "policy_died"),
        ([own("not_finite"), ray.exceptions.RayActorError()], "policy_died"),
        ([own(PEER_REFUSED), ray.exceptions.RayTaskError("update", "KeyError", KeyError("x"))], "policy_raised"),
    ],
)
@pytest.mark.parametrize("is_swapped", [False, True])
async def test_of_several_failures_the_one_nearest_to_the_cause_is_raised(
    cancelled: list[Any], errors: list[Exception], reason: str, is_swapped: bool
) -> None:
    ranks = {"rank 0": Reference(), "rank 1": Reference()}
    waiting = asyncio.create_task(gather(ranks, "policy", "update", 5.0))
    for reference, error in zip(ranks.values(), reversed(errors) if is_swapped else errors, strict=True):
        await asyncio.sleep(0.01)  # the first to fail need not be the one at fault
        reference.result.set_exception(error)
    assert (await failure_of(waiting)).reason == reason


async def test_a_failure_is_not_held_up_by_calls_that_hang(
    cancelled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SETTLE_S", 0.05)
    ranks = {"rank 0": Reference(), "rank 1": Reference()}
    ranks["rank 0"].result.set_exception(ray.exceptions.RayActorError())
    failure = await failure_of(gather(ranks, "policy", "update", 600.0))
    assert failure.reason == "policy_died"
    assert failure.message.startswith("policy rank 0 died")
    assert cancelled == [ranks["rank 1"]]


class Actor:
    """An asynchronous actor that does what it is told."""

    async def answer(self, value: str) -> str:
        return value

    async def refuse(self) -> None:
        raise DataError("prompt_too_long", "prompt 3 has 999 tokens")

    async def fail(self) -> None:
        raise TimeoutError("a timeout of the actor's own")

    async def die(self) -> None:
        os._exit(1)

    async def hang(self, file: str) -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            Path(file).write_text("cancelled")
            raise


async def file_appears(file: Path) -> bool:
    end = time.monotonic() + 30
    while not file.exists() and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return file.exists()


@pytest.mark.engine
async def test_a_real_actor_answers_refuses_raises_hangs_and_dies(ray_session: None, tmp_path: Path) -> None:
    actor: Any = ray.remote(Actor).options(num_cpus=0).remote()

    async def ask(reference: Any, deadline_s: float = 60.0) -> Any:
        return await call(reference, role="server", who="server 1", what="do it", deadline_s=deadline_s)

    assert await ask(actor.answer.remote("yes")) == "yes"
    both = {"1": actor.answer.remote("a"), "2": actor.answer.remote("b")}
    assert await gather(both, "server", "do it", 60.0) == {"1": "a", "2": "b"}

    assert await failure_of(ask(actor.refuse.remote())) == Failure(
        FailureKind.DATA, "prompt_too_long", "prompt 3 has 999 tokens"
    )

    raised = await failure_of(ask(actor.fail.remote()))
    assert (raised.kind, raised.reason) == (FailureKind.BUG, "server_raised")
    assert raised.message.startswith("server 1 raised when asked to do it")
    assert "a timeout of the actor's own" in raised.message

    late = await failure_of(ask(actor.hang.remote(str(tmp_path / "late")), 0.5))
    assert (late.kind, late.reason) == (FailureKind.INFRASTRUCTURE, "server_timeout")
    assert await file_appears(tmp_path / "late")

    waiting = asyncio.create_task(ask(actor.hang.remote(str(tmp_path / "given up"))))
    await asyncio.sleep(0.5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await file_appears(tmp_path / "given up")

    dead = await failure_of(ask(actor.die.remote()))
    assert (dead.kind, dead.reason) == (FailureKind.INFRASTRUCTURE, "server_died")
    assert dead.message.startswith("server 1 died")
