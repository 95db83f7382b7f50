"""The reference: its servers may die, its samples may be at fault, and it may be lost for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.roles.reference import Reference
from rollout.failures import Failure, FailureError, FailureKind
from tests.orchestrator.stand_ins import AT_ONCE, DEADLINES, Events, infrastructure


class Pool:
    """Servers that fail in the given ways before they answer."""

    def __init__(self, failures: list[FailureError]) -> None:
        self.failures = failures
        self.stops = 0

    async def log_probs(self, samples: list[Any]) -> list[np.ndarray]:
        if self.failures:
            raise self.failures.pop(0)
        return [np.zeros(1, np.float32)]

    async def hidden_states(self, samples: list[Any]) -> list[np.ndarray]:
        return [states[:, None] for states in await self.log_probs(samples)]

    async def stop(self) -> None:
        self.stops += 1


async def started(pool: Pool) -> tuple[Reference, Events, list[int]]:
    launches: list[int] = []
    events = Events()

    async def launch() -> Any:
        launches.append(1)
        return pool

    reference = Reference(launch, restarts=AT_ONCE, deadlines=DEADLINES, on_event=events)
    await reference.start()
    return reference, events, launches


async def test_a_reference_that_died_is_started_again_and_the_batch_passed_anew() -> None:
    pool = Pool([infrastructure("reference_died")])
    reference, events, launches = await started(pool)
    assert len(await reference.log_probs([])) == 1
    assert (len(launches), pool.stops) == (2, 1)
    assert len(events.of("reference_restarted")) == 1


async def test_hidden_states_are_asked_for_anew_as_well() -> None:
    reference, events, _ = await started(Pool([infrastructure("reference_died")]))
    assert [states.shape for states in await reference.hidden_states([])] == [(1, 1)]
    assert len(events.of("reference_restarted")) == 1


async def test_samples_at_fault_are_not_tried_again() -> None:
    reference, _, launches = await started(
        Pool([FailureError(Failure(FailureKind.DATA, "prompt_expansion_mismatch", "prompt 3"))])
    )
    with pytest.raises(FailureError, match="prompt 3"):
        await reference.log_probs([])
    assert len(launches) == 1


async def test_a_reference_that_keeps_dying_ends_the_run() -> None:
    reference, _, launches = await started(Pool([infrastructure("reference_died") for _ in range(20)]))
    with pytest.raises(FailureError, match=f"{AT_ONCE.budget + 1} times") as caught:
        await reference.log_probs([])
    assert (caught.value.failure.kind, caught.value.failure.reason) == (FailureKind.INFRASTRUCTURE, "reference_lost")
    assert len(launches) == 1 + AT_ONCE.budget
