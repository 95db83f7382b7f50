"""Generators that die, lie or lag: who serves, who is started again, and when the run is told that nobody can."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.weights.canary import Canaries, CanaryReport
from actors.weights.offer import WeightsReceipt
from orchestrator.roles.fleet import MAX_RESTARTS, NO_GENERATOR, GeneratorFleet
from orchestrator.roles.members import Health
from rollout.config import SamplingConfig
from rollout.failures import FailureError, FailureKind
from tests.orchestrator.stand_ins import (
    DEADLINE_S,
    Events,
    Generator,
    Generators,
    canaries,
    fleet_of,
    infrastructure,
    offer,
    prompt,
    until,
)

SAMPLING = SamplingConfig()


async def proof(version: int) -> Canaries:
    """What the trainer computes of a version."""
    return canaries(version)


async def test_a_request_goes_to_the_generator_with_the_fewest() -> None:
    fleet, generators = await fleet_of(2, Events())
    for generator in generators.started:
        generator.gate.clear()
    asked = [asyncio.ensure_future(fleet.generate(prompt(str(i)), 1, SAMPLING, 0, str(i))) for i in range(4)]
    await until(lambda: sum(len(g.requests) for g in generators.started) == 4)
    assert [len(g.requests) for g in generators.started] == [2, 2]
    for generator in generators.started:
        generator.gate.set()
    await asyncio.gather(*asked)


async def test_what_a_dead_generator_held_is_an_infrastructure_failure_and_the_others_go_on() -> None:
    events = Events()
    fleet, generators = await fleet_of(2, events)
    generators.may_start.clear()
    generators.started[0].die()
    with pytest.raises(FailureError) as caught:
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    assert caught.value.failure.kind is FailureKind.INFRASTRUCTURE
    assert [m.health for m in fleet.members] == [Health.DEAD, Health.HEALTHY]
    for index in range(3):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, str(index))
    assert len(generators.started[1].requests) == 3
    assert [e["generator"] for e in events.of("generator_died")] == ["generator-0"]
    await fleet.stop()


async def test_a_restarted_generator_serves_nothing_until_it_is_current() -> None:
    fleet, generators = await fleet_of(1, Events())
    await fleet.publish(offer(1))
    generators.prepare = lambda generator: generator.loading.clear()
    generators.started[0].die()
    with pytest.raises(FailureError):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    await until(lambda: fleet.members[0].health is Health.STALE)
    waiting = asyncio.ensure_future(fleet.generate(prompt("0"), 1, SAMPLING, 0, "1"))
    await asyncio.sleep(0.05)
    restarted = generators.started[1]
    assert restarted.requests == []
    assert fleet.served_version == -1
    restarted.loading.set()
    await waiting
    assert restarted.loads == [1]
    assert [version for _, _, version in restarted.requests] == [1]


async def test_a_generator_whose_version_was_overtaken_while_it_loaded_serves_only_the_newer() -> None:
    fleet, generators = await fleet_of(2, Events())
    generators.prepare = lambda generator: generator.loading.clear()
    generators.started[0].die()
    with pytest.raises(FailureError):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    await until(lambda: fleet.members[0].health is Health.STALE)
    seen: list[int] = []
    publishing = asyncio.ensure_future(fleet.publish(offer(1)))
    await until(lambda: generators.started[1].version == 1)
    generators.started[2].loading.set()
    while not publishing.done():
        seen += [m.version for m in fleet.members if m.health is Health.HEALTHY and m.name == "generator-0"]
        await asyncio.sleep(0)
    assert set(seen) <= {1}
    assert fleet.served_version == 1


async def test_a_generator_that_cannot_load_a_version_is_started_again_and_then_has_it() -> None:
    events = Events()
    fleet, generators = await fleet_of(2, events)
    generators.started[1].refuses_loads = 2
    published = await fleet.publish(offer(1))
    assert published.delivered == 1
    assert len(events.of("update_failed")) == 2
    await until(lambda: all(m.health is Health.HEALTHY for m in fleet.members))
    assert generators.started[1].is_stopped
    assert generators.started[2].loads == [1]


async def test_one_refused_update_is_sent_again_before_anything_is_restarted() -> None:
    fleet, generators = await fleet_of(1, Events())
    generators.started[0].refuses_loads = 1
    assert (await fleet.publish(offer(1))).delivered == 1
    assert len(generators.started) == 1


async def test_a_version_counts_as_delivered_only_with_its_own_digest() -> None:
    class Liar(Generator):
        async def load_weights(self, offer, *, anew=False):  # type: ignore[no-untyped-def]
            await super().load_weights(offer, anew=anew)
            return WeightsReceipt(offer.version, "another digest", 0.0, 0.0, 0.0)

    events = Events()
    fleet, _ = await fleet_of(2, events)
    liar = Liar("generator-0")
    fleet.members[0].handle = liar  # type: ignore[assignment]
    published = await fleet.publish(offer(1))
    assert published.delivered == 1
    assert len(events.of("digest_mismatch")) == 2
    assert liar.is_stopped or fleet.members[0].health is not Health.HEALTHY
    await fleet.stop()


async def test_when_every_generator_is_lost_the_verdict_comes_at_once_and_names_them() -> None:
    fleet, generators = await fleet_of(2, Events(), deadline_s=60.0)
    generators.refuses_starts = True
    for generator in generators.started:
        generator.die()
    for _ in range(2):
        with pytest.raises(FailureError):
            await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    async with asyncio.timeout(5):
        with pytest.raises(FailureError, match=r"generator-0 dead .*start_failed; generator-1 dead") as caught:
            await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    assert caught.value.failure.reason == NO_GENERATOR


async def test_a_generator_that_keeps_dying_is_given_up() -> None:
    events = Events()
    fleet, generators = await fleet_of(1, events)
    for _ in range(MAX_RESTARTS + 1):
        generators.started[-1].die()
        with pytest.raises(FailureError):
            await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
        await until(lambda: not fleet._restarts)
    assert len(generators.started) == 1 + MAX_RESTARTS
    with pytest.raises(FailureError) as caught:
        await fleet.publish(offer(1))
    assert caught.value.failure.reason == NO_GENERATOR
    assert [e["generator"] for e in events.of("generator_lost")] == ["generator-0"]


async def test_a_restart_that_takes_too_long_ends_in_a_verdict() -> None:
    fleet, generators = await fleet_of(1, Events(), deadline_s=0.1)
    generators.may_start.clear()
    generators.started[0].die()
    with pytest.raises(FailureError):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    with pytest.raises(FailureError) as caught:
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    assert caught.value.failure.reason == NO_GENERATOR
    await fleet.stop()


async def test_when_one_generator_does_not_start_the_others_are_stopped() -> None:
    generators = Generators()

    async def launch(name: str) -> Any:
        if name == "generator-1":
            await until(lambda: generators.started)
            raise infrastructure("engine_start_failed")
        return await generators.launch(name)

    fleet = GeneratorFleet(launch, DEADLINE_S, Events())
    with pytest.raises(FailureError, match="engine_start_failed"):
        await fleet.start(3)
    assert [generator.is_stopped for generator in generators.started] == [True, True]


async def test_stopping_ends_every_generator_and_every_restart() -> None:
    fleet, generators = await fleet_of(2, Events())
    generators.may_start.clear()
    generators.started[0].die()
    with pytest.raises(FailureError):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    await fleet.stop()
    assert all(restart.done() for restart in fleet._restarts)
    assert all(generator.is_stopped for generator in generators.started)


async def test_a_bug_in_a_generator_is_not_taken_for_its_death() -> None:
    fleet, generators = await fleet_of(1, Events())

    async def broken(*_: object) -> None:
        failure = infrastructure("generator_raised").failure
        raise FailureError(type(failure)(FailureKind.BUG, failure.reason, failure.message))

    generators.started[0].generate = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(FailureError) as caught:
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    assert caught.value.failure.kind is FailureKind.BUG
    assert fleet.members[0].health is Health.HEALTHY


async def test_a_version_is_delivered_only_when_its_canaries_agree_too() -> None:
    fleet, generators = await fleet_of(2, Events())
    published = await fleet.publish(offer(1), proof(1))
    assert published.delivered == 2
    assert published.canary_gap == 0.0
    assert published.verified == {"generator-0": 1, "generator-1": 1}
    assert all(generator.proofs == [1] for generator in generators.started)


async def test_a_generator_that_disagrees_gets_everything_once_more_in_full() -> None:
    events = Events()
    fleet, generators = await fleet_of(2, events)
    generators.started[1].error_nats = 0.5
    published = await fleet.publish(offer(1), proof(1))
    assert published.delivered == 2
    assert generators.started[1].loads_anew == [False, False, True]
    assert [e["generator"] for e in events.of("weights_disagree")] == ["generator-1"]
    assert len(generators.started) == 2


async def test_a_generator_that_still_disagrees_is_started_again_and_meanwhile_serves_nothing() -> None:
    fleet, generators = await fleet_of(2, Events())
    generators.started[1].error_nats, generators.started[1].is_cured_by_resending = 0.5, False
    assert (await fleet.publish(offer(1), proof(1))).delivered == 1
    assert generators.started[1].requests == []
    await until(lambda: all(m.health is Health.HEALTHY for m in fleet.members))
    assert generators.started[2].name == "generator-1"
    assert generators.started[2].proofs == [1]


async def test_a_generator_that_disagrees_even_after_a_restart_ends_the_run_and_the_verdict_names_tensors() -> None:
    fleet, generators = await fleet_of(1, Events())

    def disagree(generator: Generator) -> None:
        generator.error_nats, generator.is_cured_by_resending = 0.5, False

    disagree(generators.started[0])
    generators.prepare = disagree
    with pytest.raises(FailureError, match=r"layers\.0\.qkv_proj\.weight") as caught:
        await fleet.publish(offer(1), proof(1))
    assert caught.value.failure.reason == "weights_disagree"
    assert len(generators.started) == 2


async def test_a_slow_generator_holds_nobody_up_and_catches_up_alone() -> None:
    events = Events()
    fleet, generators = await fleet_of(2, events)
    fleet.grace_s = 0.05
    slow = generators.started[1]
    slow.loading.clear()
    assert (await fleet.publish(offer(1))).delivered == 1
    assert [m.health for m in fleet.members] == [Health.HEALTHY, Health.STALE]
    assert fleet.served_version == 1
    assert (await fleet.publish(offer(2))).delivered == 1
    slow.loading.set()
    await until(lambda: fleet.members[1].health is Health.HEALTHY)
    assert slow.loads == [0, 1, 2]
    assert [e["generator"] for e in events.of("generator_late")] == ["generator-1"]


async def test_a_generator_behind_a_broken_link_is_tried_again_before_it_is_started_again() -> None:
    fleet, generators = await fleet_of(2, Events())
    fleet.grace_s = 0.05
    generators.started[1].refuses_loads, generators.started[1].refusal = 2, "weights_timeout"
    assert (await fleet.publish(offer(1))).delivered == 1
    await until(lambda: fleet.members[1].health is Health.HEALTHY)
    assert len(generators.started) == 2
    assert fleet.members[1].version == 1


async def test_a_trainer_that_fails_to_compute_canaries_is_not_taken_for_a_generators_fault() -> None:
    async def fails() -> Canaries:
        raise infrastructure("policy_died")

    fleet, generators = await fleet_of(1, Events())
    with pytest.raises(FailureError) as caught:
        await fleet.publish(offer(1), fails())
    assert caught.value.failure.reason == "policy_died"
    assert len(generators.started) == 1
    await fleet.stop()


async def test_generators_sleep_while_the_trainer_learns_if_the_recipe_says_so() -> None:
    fleet, generators = await fleet_of(2, Events())
    await fleet.sleep(0)
    assert [g.naps for g in generators.started] == [[], []]
    await fleet.sleep(2)
    assert [g.naps for g in generators.started] == [[2], [2]]


async def test_a_generator_that_dies_falling_asleep_is_started_again() -> None:
    fleet, generators = await fleet_of(2, Events())
    generators.started[0].die()
    await fleet.sleep(1)
    await until(lambda: all(m.health is Health.HEALTHY for m in fleet.members))
    assert len(generators.started) == 3


async def test_a_generator_that_died_is_not_brought_back_by_a_proof_that_it_had_just_given() -> None:
    fleet, generators = await fleet_of(1, Events())
    proving, proven = asyncio.Event(), asyncio.Event()
    generator = generators.started[0]
    verify = generator.verify

    async def verify_late(wanted: Canaries) -> CanaryReport:
        proving.set()
        await proven.wait()
        return await verify(wanted)

    generator.verify = verify_late  # type: ignore[method-assign]
    generators.may_start.clear()
    publishing = asyncio.ensure_future(fleet.publish(offer(1), proof(1)))
    await proving.wait()
    generator.die()
    with pytest.raises(FailureError):
        await fleet.generate(prompt("0"), 1, SAMPLING, 0, "0")
    proven.set()
    await until(lambda: not fleet._deliveries)
    assert (fleet.members[0].health, fleet.members[0].version) == (Health.DEAD, -1)
    generators.may_start.set()
    await publishing
    await until(lambda: fleet.members[0].health is Health.HEALTHY)
    assert [each.loads for each in generators.started] == [[0, 1], [1]]
    assert fleet.members[0].restarts == 1
