"""Evaluation: means and intervals over what could be judged, and what happens to the rest."""

from __future__ import annotations

import pytest

from orchestrator.step.evaluation import evaluate
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from tests.orchestrator.stand_ins import Events, RewardServer, fleet_of, infrastructure, prompt, rewards_of

SAMPLING = SamplingConfig(temperature=0.7)


async def run(count: int, server: RewardServer, mode: str = "sampled", **how: object):  # type: ignore[no-untyped-def]
    events = Events()
    fleet, generators = await fleet_of(1, events)
    rewards = await rewards_of(server, events)
    for name, value in how.items():
        setattr(generators.started[0], name, value)
    prompts = [prompt(str(index)) for index in range(count)]
    found = await evaluate(fleet, rewards, prompts, SAMPLING, mode, version=3, seed=100, shown=2)  # type: ignore[arg-type]
    return found, generators


def even(text: str) -> float:
    return float(int(text.split("-")[0]) % 2 == 0)


async def test_the_mean_comes_with_an_interval_that_holds_it() -> None:
    found, _ = await run(10, RewardServer(even))
    assert (found.result.reward, found.result.n) == (0.5, 10)
    assert 0.0 < found.result.low < 0.5 < found.result.high < 1.0
    assert found.metrics()["eval/sampled/reward"] == 0.5
    assert found.metrics()["eval/sampled/failed"] == 0.0


async def test_rows_are_always_of_the_same_first_prompts() -> None:
    found, _ = await run(10, RewardServer(even))
    assert [row.target for row in found.rows] == ["0", "1"]


async def test_each_prompt_has_its_own_seed_the_same_at_every_version() -> None:
    _, generators = await run(3, RewardServer(even))
    assert sorted((text, seed) for text, seed, _ in generators.started[0].requests) == [
        ("0", 100),
        ("1", 101),
        ("2", 102),
    ]


async def test_what_cannot_be_judged_is_counted_and_in_no_mean() -> None:
    server = RewardServer(even)
    server.failures["1"] = Failure(FailureKind.USER_CODE, "reward_nan", "returned nan")
    found, _ = await run(20, server)
    assert found.failed == {"reward_nan": 1}
    assert found.result.n == 19
    assert found.result.reward == pytest.approx(10 / 19)


async def test_an_evaluation_of_which_too_much_failed_says_nothing_and_raises_the_reason() -> None:
    server = RewardServer(even)
    for text in ("1", "2", "3"):
        server.failures[text] = Failure(FailureKind.USER_CODE, "reward_raised", "KeyError at rewards.py:3")
    with pytest.raises(FailureError, match=r"3 of 20 .* rewards.py:3") as caught:
        await run(20, server)
    assert caught.value.failure.kind is FailureKind.USER_CODE


async def test_a_generator_that_dies_during_an_evaluation_costs_no_prompt() -> None:
    events = Events()
    fleet, generators = await fleet_of(1, events)
    rewards = await rewards_of(RewardServer(even), events)
    generators.started[0].die()
    prompts = [prompt(str(index)) for index in range(10)]
    found = await evaluate(fleet, rewards, prompts, SAMPLING, "greedy", version=0, seed=0, shown=2)
    assert found.failed == {}
    assert found.result.n == 10
    assert len(generators.started) == 2


async def test_a_lost_reward_server_stops_the_evaluation() -> None:
    server = RewardServer(even)
    server.raises = [infrastructure("reward_server_died") for _ in range(100)]
    with pytest.raises(FailureError, match="reward server died"):
        await run(10, server)
