"""Groups from admission to the batch, with roles that die, fail and refuse: no group is lost, stuck or made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator.roles.fleet import GeneratorFleet
from orchestrator.roles.rewards import Rewards
from orchestrator.step.rollouts import Batch, Rollouts
from rollout.config import RolloutConfig
from rollout.cursor import PromptCursor
from rollout.equal_rewards import EQUAL_REWARDS, MAX_BATCHES
from rollout.failures import Failure, FailureError, FailureKind
from rollout.ledger import Ledger, LedgerError
from tests.orchestrator.stand_ins import (
    AT_ONCE,
    DEADLINE_S,
    Events,
    Generators,
    RewardServer,
    fleet_of,
    infrastructure,
    offer,
    prompt_set,
    rewards_of,
    until,
)


@dataclass
class Stage:
    """Rollouts with their stand-in roles."""

    rollouts: Rollouts
    fleet: GeneratorFleet
    generators: Generators
    rewards: RewardServer
    reward_role: Rewards
    cursor: PromptCursor
    ledger: Ledger
    events: Events

    async def collect(self) -> Batch:
        async with asyncio.timeout(DEADLINE_S):
            return await self.rollouts.collect()

    async def next_version(self, version: int) -> None:
        """As the loop does after an update."""
        self.rollouts.learned()
        await self.fleet.publish(offer(version))
        self.rollouts.admit()

    @property
    def requests(self) -> list[str]:
        return [text for generator in self.generators.started for text, _, _ in generator.requests]


def by_index(text: str) -> float:
    """Rewards of a group that differ."""
    return float(text.split("-")[1])


@pytest_asyncio.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Puts roles and rollouts together; at the end the account must be balanced with nothing open."""
    made: list[Stage] = []

    async def make(*, prompts: int = 24, replicas: int = 1, steps: int = 10, seed: int = 0, **settings: Any) -> Stage:
        config = RolloutConfig(**{"prompts_per_step": 4, "group_size": 2, **settings})
        events = Events()
        fleet, generators = await fleet_of(replicas, events)
        rewards = RewardServer(by_index)
        scorer = await rewards_of(rewards, events)
        cursor = PromptCursor(prompt_set(prompts), seed=0)
        ledger = Ledger(tmp_path / f"ledger-{len(made)}.db")
        rollouts = Rollouts(
            config,
            steps=steps,
            first_step=0,
            seed=seed,
            cursor=cursor,
            fleet=fleet,
            rewards=scorer,
            ledger=ledger,
            on_event=events,
        )
        made.append(Stage(rollouts, fleet, generators, rewards, scorer, cursor, ledger, events))
        return made[-1]

    yield make
    for one in made:
        assert one.ledger.account().is_balanced
        await one.rollouts.stop()
        await one.fleet.stop()
        account = one.ledger.account()
        one.ledger.close()
        assert account.is_balanced
        assert account.open == 0


async def test_a_batch_holds_as_many_scored_groups_as_the_recipe_says(stage: Callable[..., Any]) -> None:
    one = await stage()
    batch = await one.collect()
    assert len(batch.groups) == 4
    for group in batch.groups:
        assert [score.value for score in group.scores] == [0.0, 1.0]
    assert one.ledger.account().consumed == 4


async def test_synchronous_training_admits_nothing_beyond_the_batch_until_the_next_version(
    stage: Callable[..., Any],
) -> None:
    one = await stage(max_staleness=0)
    await one.collect()
    await asyncio.sleep(0.05)
    assert len(one.requests) == 4
    await one.next_version(1)
    batch = await one.collect()
    assert len(one.requests) == 8
    assert {int(c.policy_versions.min()) for g in batch.groups for c in g.generation.completions} == {1}


async def test_with_staleness_one_the_next_batch_is_generated_before_the_next_version(
    stage: Callable[..., Any],
) -> None:
    one = await stage(max_staleness=1)
    await one.collect()
    await asyncio.sleep(0.05)
    assert len(one.requests) == 8
    await one.next_version(1)
    batch = await one.collect()
    assert {int(c.policy_versions.min()) for g in batch.groups for c in g.generation.completions} == {0}


async def test_nothing_is_admitted_that_no_batch_would_take(stage: Callable[..., Any]) -> None:
    one = await stage(max_staleness=3, steps=1)
    await one.collect()
    await asyncio.sleep(0.05)
    assert len(one.requests) == 4


async def test_a_group_whose_generator_died_is_generated_by_another_with_the_same_seed(
    stage: Callable[..., Any],
) -> None:
    one = await stage(replicas=2)
    first, second = one.generators.started
    first.gate.clear()
    collecting = asyncio.ensure_future(one.collect())
    await until(lambda: len(first.requests) == 2)
    first.die()
    batch = await collecting
    assert {group.generation.generator for group in batch.groups} == {"generator-1"}
    lost = {(text, seed) for text, seed, _ in first.requests}
    assert lost <= {(text, seed) for text, seed, _ in second.requests}
    assert len(one.events.of("generation_retried")) == 2
    assert one.ledger.account().dropped == {}


async def test_the_only_generator_dies_and_its_groups_wait_for_the_restarted_one(stage: Callable[..., Any]) -> None:
    one = await stage()
    one.generators.started[0].die()
    batch = await one.collect()
    assert len(batch.groups) == 4
    assert len(one.generators.started) == 2


async def test_a_run_goes_on_when_every_group_was_dropped_while_no_generator_served(stage: Callable[..., Any]) -> None:
    one = await stage(max_attempts=1, max_dropped_share=1.0)
    one.generators.started[0].die()
    one.generators.may_start.clear()
    collecting = asyncio.ensure_future(one.collect())
    await until(lambda: one.rollouts.dropped == 4)
    await asyncio.sleep(0.05)
    one.generators.may_start.set()
    assert len((await collecting).groups) == 4


async def test_when_all_generators_are_lost_the_run_gets_a_verdict(stage: Callable[..., Any]) -> None:
    one = await stage(replicas=2)
    one.generators.refuses_starts = True
    for generator in one.generators.started:
        generator.die()
    with pytest.raises(FailureError, match="no generator can serve"):
        await one.collect()


async def test_a_prompt_at_fault_is_dropped_counted_and_never_drawn_again(stage: Callable[..., Any]) -> None:
    one = await stage(prompts=8, max_dropped_share=1.0)
    failure = Failure(FailureKind.DATA, "prompt_too_long", "prompt 3 has 999 tokens")
    bad = one.cursor._set.prompts[3]
    one.generators.started[0].refused["3"] = failure
    for version in range(1, 6):
        await one.collect()
        await one.next_version(version)
    assert one.requests.count("3") == 1
    assert one.ledger.account().dropped == {"prompt_too_long": 1}
    assert one.cursor.quarantined == {bad.prompt_id}
    (event,) = one.events.of("group_dropped")
    assert (event["reason"], event["prompt"], event["failure"]) == ("prompt_too_long", bad.prompt_id, "data")


async def test_when_every_prompt_is_at_fault_the_run_says_so(stage: Callable[..., Any]) -> None:
    one = await stage(prompts=5, max_dropped_share=1.0)
    for text in map(str, range(5)):
        one.generators.started[0].refused[text] = Failure(FailureKind.DATA, "media_truncated", "cut off")
    with pytest.raises(FailureError, match="every one of the 5 prompts"):
        await one.collect()


async def test_a_group_whose_reward_failed_is_dropped_with_the_reason_and_another_takes_its_place(
    stage: Callable[..., Any],
) -> None:
    one = await stage(max_dropped_share=1.0)
    first = one.cursor._set.prompts[one.cursor._order[0]].target
    one.rewards.failures[first] = Failure(FailureKind.USER_CODE, "reward_nan", "returned nan")
    batch = await one.collect()
    assert len(batch.groups) == 4
    assert first not in {group.prompt.target for group in batch.groups}
    assert batch.dropped == {"reward_nan": 1}
    assert one.ledger.account().dropped == {"reward_nan": 1}
    assert one.cursor.quarantined == set()


async def test_too_many_failures_end_the_run_with_the_last_one_told(stage: Callable[..., Any]) -> None:
    one = await stage(max_dropped_share=0.5)
    for text in map(str, range(24)):
        one.rewards.failures[text] = Failure(FailureKind.USER_CODE, "reward_raised", "KeyError in rewards.py, line 3")
    with pytest.raises(FailureError, match=r"rollout.max_dropped_share = 0.5 .* line 3") as caught:
        await one.collect()
    assert caught.value.failure.kind is FailureKind.USER_CODE
    assert one.ledger.account().consumed == 0


async def test_failures_below_the_budget_do_not_end_the_run(stage: Callable[..., Any]) -> None:
    one = await stage(max_dropped_share=0.5, prompts=24)
    for text in map(str, range(0, 24, 3)):
        one.rewards.failures[text] = Failure(FailureKind.USER_CODE, "reward_raised", "sometimes")
    for version in range(1, 9):
        await one.collect()
        await one.next_version(version)
    account = one.ledger.account()
    assert account.consumed == 32
    assert set(account.dropped) == {"reward_raised"}


async def test_groups_of_equal_rewards_are_dropped_and_others_sampled(stage: Callable[..., Any]) -> None:
    one = await stage(drop_equal_rewards=True)
    one.rewards.value = lambda text: 1.0 if int(text.split("-")[0]) % 2 else by_index(text)
    batch = await one.collect()
    assert all(int(group.prompt.target) % 2 == 0 for group in batch.groups)
    dropped = one.ledger.account().dropped
    assert set(dropped) == {EQUAL_REWARDS}
    assert batch.dropped == dropped


async def test_equal_rewards_are_kept_where_the_recipe_does_not_drop_them(stage: Callable[..., Any]) -> None:
    one = await stage()
    one.rewards.value = lambda text: 1.0
    assert len((await one.collect()).groups) == 4


async def test_when_nothing_can_be_learned_the_run_ends_and_says_why(stage: Callable[..., Any]) -> None:
    one = await stage(drop_equal_rewards=True)
    one.rewards.value = lambda text: 1.0
    with pytest.raises(FailureError, match="drop_equal_rewards"):
        await one.collect()
    assert one.ledger.account().dropped[EQUAL_REWARDS] >= MAX_BATCHES * 4


async def test_a_reward_server_that_died_is_started_again_and_the_group_scored_anew(stage: Callable[..., Any]) -> None:
    one = await stage()
    one.rewards.raises = [infrastructure("reward_server_died")]
    batch = await one.collect()
    assert len(batch.groups) == 4
    assert len(one.events.of("reward_server_restarted")) == 1
    assert one.rewards.calls == 5
    assert one.ledger.account().dropped == {}


async def test_a_reward_server_that_keeps_dying_ends_the_run(stage: Callable[..., Any]) -> None:
    one = await stage()
    one.rewards.raises = [infrastructure("reward_server_died") for _ in range(50)]
    with pytest.raises(FailureError, match=f"reward server died .* {AT_ONCE.budget + 1} times"):
        await one.collect()


async def test_a_group_that_was_not_scored_in_time_is_dropped_not_the_run(stage: Callable[..., Any]) -> None:
    one = await stage(max_dropped_share=1.0)
    one.rewards.raises = [infrastructure("reward_server_timeout")]
    batch = await one.collect()
    assert len(batch.groups) == 4
    assert batch.dropped == {"reward_server_timeout": 1}


async def test_a_defect_anywhere_in_a_groups_life_reaches_the_loop(stage: Callable[..., Any]) -> None:
    one = await stage()

    def broken(text: str) -> float:
        raise ZeroDivisionError(text)

    one.rewards.value = broken
    with pytest.raises(ZeroDivisionError):
        await one.collect()


async def test_stopping_closes_the_account_of_what_was_open(stage: Callable[..., Any]) -> None:
    one = await stage()
    one.generators.started[0].gate.clear()
    one.rollouts.admit()
    await until(lambda: len(one.requests) == 4)
    await one.rollouts.stop()
    account = one.ledger.account()
    assert account.dropped == {"run_stopped": 4}
    assert account.open == 0


async def test_where_the_ledger_refuses_nothing_has_moved_and_the_refusal_is_what_the_run_hears(
    stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await stage()
    append = one.ledger.append

    def full(transitions: Any) -> None:
        if one.events.all or any(t.to_state == "scoring" for t in transitions):
            one.events("disk_full")
            raise LedgerError(Failure(FailureKind.INFRASTRUCTURE, "ledger_disk_full", "the disk is full"))
        append(transitions)

    monkeypatch.setattr(one.ledger, "append", full)
    with pytest.raises(LedgerError, match="the disk is full"):
        await one.collect()
    await one.rollouts.stop()
    (left,) = one.events.of("account_left_open")
    assert left["open"] == one.ledger.account().open == 4
    monkeypatch.undo()
    assert len(one.ledger.recover(at_s=0.0)) == 4
    one.rollouts._groups = type(one.rollouts._groups)()


async def test_open_prompts_are_those_a_checkpoint_has_to_give_back(stage: Callable[..., Any]) -> None:
    one = await stage(max_staleness=1)
    batch = await one.collect()
    await until(lambda: len(one.requests) == 8)
    handed_out = [group.prompt for group in batch.groups]
    assert one.rollouts.open_prompts[:4] == handed_out
    assert len(one.rollouts.open_prompts) == 8
    one.rollouts.learned()
    assert len(one.rollouts.open_prompts) == 4
    assert not {p.prompt_id for p in one.rollouts.open_prompts} & {p.prompt_id for p in handed_out}


async def test_a_resumed_run_samples_with_the_seeds_of_an_uninterrupted_one(
    stage: Callable[..., Any], tmp_path: Path
) -> None:
    straight = await stage(seed=5)
    await straight.collect()
    await straight.next_version(1)
    await straight.collect()
    expected = [(text, seed) for text, seed, _ in straight.generators.started[0].requests]

    cut = await stage(seed=5)
    await cut.collect()
    await cut.next_version(1)
    await until(lambda: len(cut.requests) == 8)
    state = cut.cursor.state(cut.rollouts.open_prompts)
    cursor = PromptCursor.restore(cut.cursor._set, state)
    with Ledger(tmp_path / "resumed.db") as ledger:
        fleet, generators = await fleet_of(1, Events())
        await fleet.publish(offer(1))
        rollouts = Rollouts(
            RolloutConfig(prompts_per_step=4, group_size=2),
            steps=10,
            first_step=1,
            seed=5,
            cursor=cursor,
            fleet=fleet,
            rewards=cut.reward_role,
            ledger=ledger,
            on_event=cut.events,
        )
        await rollouts.collect()
        await rollouts.stop()
    assert [(text, seed) for text, seed, _ in generators.started[0].requests] == expected[4:]


async def test_a_prompt_drawn_twice_at_one_version_is_sampled_with_two_seeds(stage: Callable[..., Any]) -> None:
    one = await stage(prompts=2)
    await one.collect()
    asked = [(text, seed) for text, seed, _ in one.generators.started[0].requests]
    assert len(set(asked)) == 4
    assert len({text for text, _ in asked}) == 2
