"""The loop's order of events, and what is left when it is cut, with real rollouts, record and checkpoints."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from algorithms.kl import make_kl_controller
from orchestrator.checkpoints import Checkpoints, RunState, read_state
from orchestrator.config import cross_checks
from orchestrator.config.schema import Config
from orchestrator.interruption import uninterrupted
from orchestrator.loop import Training
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import RunRecord
from orchestrator.step.appraisal import Appraiser
from orchestrator.step.rollouts import Rollouts
from orchestrator.telemetry import Telemetry
from orchestrator.tracking.tracker import Tracker
from rollout.cursor import PromptCursor
from rollout.failures import Failure, FailureError, FailureKind
from rollout.ledger import Ledger
from rollout.media import MediaStore
from tests.conftest import overridden, rows, steps
from tests.orchestrator.stand_ins import Critic, Events, Policy, RewardServer, fleet_of, prompt_set, rewards_of, until

PLAIN = {
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}},
    "reward": {"components": [{"function": "value"}]},
    "rollout": {"prompts_per_step": 2, "group_size": 2},
    "trainer": {"steps": 3},
    "tracking": {"enabled": False},
    "checkpoint": {"every_steps": 2},
}


def value(text: str) -> float:
    return float(text.split("-")[1])


class Run:
    """A run's parts, with stand-in roles whose acts are written down in one list."""

    def __init__(self, training: Training, policy: Policy, generators: Any, ledger: Ledger, folder: Path) -> None:
        self.training, self.policy, self.generators, self.ledger = training, policy, generators, ledger
        self.folder = folder
        self.checkpoints = Checkpoints(folder, keep=2)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Puts a run together from the plain recipe with overrides, anew or from its newest checkpoint."""
    with ExitStack() as stack:

        async def make_run(*, held_out: int = 0, is_resumed: bool = False, critic: Any = None, **overrides: Any) -> Run:
            config = Config(**overridden(PLAIN, **{"run__folder": str(tmp_path), **overrides}))
            assert cross_checks.problems(config) == []
            checkpoints = Checkpoints(tmp_path, keep=config.checkpoint.keep)
            latest = checkpoints.latest() if is_resumed else None
            state = read_state(latest) if latest else RunState()
            tracker = Tracker.start(config.tracking, tmp_path, "test", {})
            record = stack.enter_context(RunRecord(tmp_path, resume_step=state.version if is_resumed else None))
            progress = Progress(3, mode="quiet", console=Console(file=io.StringIO()))
            telemetry = Telemetry(config.tracking, record, tracker, progress, MediaStore(tmp_path / "media"))
            ledger = stack.enter_context(Ledger(tmp_path / "ledger.db"))
            ledger.recover(at_s=0.0)
            fleet, generators = await fleet_of(1, Events())
            prompts = prompt_set(12)
            cursor = PromptCursor.restore(prompts, state.cursor) if state.cursor else PromptCursor(prompts, seed=0)
            rewards = await rewards_of(RewardServer(value), Events())
            rollouts = Rollouts(
                config.rollout,
                steps=config.trainer.steps,
                first_step=state.version,
                seed=0,
                cursor=cursor,
                fleet=fleet,
                rewards=rewards,
                ledger=ledger,
                on_event=telemetry.event,
                with_greedy=config.algorithm.advantage == "remax",
            )
            policy = Policy()
            training = Training(
                config,
                policy,  # type: ignore[arg-type]
                fleet,
                None,
                rewards,
                critic,
                rollouts,
                cursor,
                list(prompts.prompts[:held_out]),
                list(prompts.prompts[:1]),
                list(prompts.prompts[:2]),
                make_kl_controller(config.algorithm.kl),
                Appraiser(config, state.multipliers or None),
                state,
                checkpoints,
                telemetry,
            )
            return Run(training, policy, generators, ledger, tmp_path)

        yield make_run


async def test_a_synchronous_step_learns_only_from_the_version_it_published(make: Callable[..., Any]) -> None:
    run = await make(rollout__max_staleness=0)
    await run.training.train()
    acts = [act for act in run.policy.acts if act != "save"]
    assert acts == ["publish 0", "update", "publish 1", "update", "publish 2", "update", "publish 3"]
    for version, samples in enumerate(run.policy.updates):
        assert {int(v) for s in samples for v in s.policy_versions} == {version}
    await run.training.stop()


async def test_with_staleness_one_samples_are_at_most_one_version_old_and_some_are(make: Callable[..., Any]) -> None:
    run = await make(rollout__max_staleness=1, trainer__steps=6)
    await run.training.train()
    ages = [
        version - int(v)
        for version, samples in enumerate(run.policy.updates)
        for s in samples
        for v in s.policy_versions
    ]
    assert max(ages) == 1
    assert min(ages) == 0
    await run.training.stop()


async def test_with_staleness_one_generation_goes_on_during_the_update(make: Callable[..., Any]) -> None:
    run = await make(rollout__max_staleness=1)
    run.policy.gate.clear()
    training = asyncio.ensure_future(run.training.train())
    await until(lambda: "update" in run.policy.acts)
    (generator,) = run.generators.started
    await until(lambda: len(generator.requests) >= 4 + 2)
    assert run.policy.updates == []
    run.policy.gate.set()
    await training
    await run.training.stop()


async def test_every_step_is_told_once_and_the_account_is_balanced(make: Callable[..., Any]) -> None:
    run = await make()
    await run.training.train()
    await run.training.stop()
    assert list(steps(run.folder)) == [1, 2, 3]
    account = run.ledger.account()
    assert (account.admitted, account.consumed, account.open) == (6, 6, 0)


async def test_the_agreement_of_trainer_and_generators_is_told_at_every_staleness(make: Callable[..., Any]) -> None:
    for staleness in (0, 1):
        run = await make(rollout__max_staleness=staleness)
        await run.training.train()
        await run.training.stop()
        for told in steps(run.folder).values():
            assert told["rollout/mismatch_kl"] == 0.0


async def test_an_agreement_check_lost_with_a_generator_leaves_no_figure_and_does_not_stop_the_run(
    make: Callable[..., Any],
) -> None:
    run = await make(rollout__max_staleness=1)

    async def lost(samples: Any) -> Any:
        raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "generator_died", "it died"))

    run.policy.log_probs = lost
    await run.training.train()
    await run.training.stop()
    assert all("rollout/mismatch_kl" not in told for told in steps(run.folder).values())
    assert len(rows(run.folder, "events", "no_agreement_check")) == 3


async def test_an_alarm_stops_the_run_where_the_recipe_says_so(make: Callable[..., Any]) -> None:
    run = await make(weights__on_alarm="stop", rollout__max_staleness=1)
    run.policy.log_prob = -3.0
    with pytest.raises(FailureError, match="trainer and generators disagree"):
        await run.training.train()
    assert len(rows(run.folder, "events", "alarm")) == 1
    assert steps(run.folder)[1]["rollout/max_logprob_gap"] == pytest.approx(2.0)
    await run.training.stop()


async def test_held_out_prompts_are_evaluated_before_during_and_after_in_every_mode(make: Callable[..., Any]) -> None:
    run = await make(
        held_out=4, trainer__steps=4, evaluation__every_steps=2, evaluation__prompts=3, data__evaluation={"path": "e"}
    )
    await run.training.train()
    await run.training.stop()
    found = [(row["step"], row["mode"], row["n"]) for row in rows(run.folder, "evaluations")]
    assert found == [(s, mode, n) for s, n in ((0, 4), (2, 3), (4, 4)) for mode in ("greedy", "sampled")]


async def test_checkpoints_come_at_their_steps_and_at_the_end(make: Callable[..., Any]) -> None:
    run = await make(trainer__steps=5, checkpoint__every_steps=2, checkpoint__keep=9)
    await run.training.train()
    await run.training.stop()
    assert [path.name for path in run.checkpoints.whole()] == ["step-000002", "step-000004", "step-000005"]


async def test_a_run_goes_on_from_its_checkpoint_with_the_next_step_and_no_prompt_is_lost(
    make: Callable[..., Any],
) -> None:
    first = await make(trainer__steps=2)
    await first.training.train()
    await first.training.stop()
    second = await make(trainer__steps=6, is_resumed=True)
    await second.training.train()
    await second.training.stop()
    assert list(steps(second.folder)) == [1, 2, 3, 4, 5, 6]
    seen = [s.prompt.target for run in (first, second) for batch in run.policy.updates for s in batch]
    assert sorted(set(seen), key=int) == [str(i) for i in range(12)]
    assert len(seen) == 24
    assert second.ledger.account().is_balanced


async def test_a_run_interrupted_in_an_update_finishes_it_and_then_leaves_a_checkpoint_of_it(
    make: Callable[..., Any],
) -> None:
    run = await make()
    run.policy.gate.clear()
    training = asyncio.ensure_future(run.training.train())
    await until(lambda: "update" in run.policy.acts)
    training.cancel()
    await asyncio.sleep(0.05)
    assert not training.done()
    run.policy.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert run.training.is_whole
    assert run.training.state.version == 1
    assert list(steps(run.folder)) == [1], "the step that was made is told"
    await run.training.checkpoint()
    await run.training.stop()
    latest = run.checkpoints.latest()
    assert latest is not None
    assert (latest.name, (latest / "policy" / "weights").read_text()) == ("step-000001", "after 1 updates")


async def test_a_second_interrupt_cuts_the_update_and_the_trainer_is_then_at_no_version(
    make: Callable[..., Any],
) -> None:
    run = await make()
    run.policy.gate.clear()
    training = asyncio.ensure_future(run.training.train())
    await until(lambda: "update" in run.policy.acts)
    training.cancel()
    await asyncio.sleep(0)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert not run.training.is_whole
    await run.training.stop()


async def test_an_update_that_failed_leaves_the_trainer_at_no_version(make: Callable[..., Any]) -> None:
    run = await make()
    run.policy.raises["update"] = FailureError(Failure(FailureKind.INFRASTRUCTURE, "policy_died", "rank 0 was lost"))
    with pytest.raises(FailureError, match="rank 0"):
        await run.training.train()
    assert not run.training.is_whole
    assert run.training.state.version == 0
    await run.training.stop()
    assert run.ledger.account().is_balanced


async def test_prompts_of_a_batch_that_was_not_learned_from_are_given_back(make: Callable[..., Any]) -> None:
    run = await make(trainer__steps=3, checkpoint__every_steps=1)
    run.policy.gate.clear()
    training = asyncio.ensure_future(run.training.train())
    await until(lambda: "update" in run.policy.acts)
    state = run.training.cursor.state(run.training.rollouts.open_prompts)
    assert len(state["given_back"]) == 2
    training.cancel()
    run.policy.gate.set()
    await asyncio.gather(training, return_exceptions=True)
    await run.training.stop()


async def test_an_uninterrupted_act_ends_before_the_cancellation_is_heard() -> None:
    done = []

    async def act() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    task = asyncio.ensure_future(uninterrupted(act()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


async def test_a_critic_values_each_batch_learns_its_returns_and_is_kept_with_the_policy(
    make: Callable[..., Any],
) -> None:
    # A reward of 0 or 1 at the last of 2 tokens, no discount: both tokens should have been worth the reward.
    critic = Critic(value=0.25)
    options = {"algorithm__advantage": "gae", "algorithm__advantage_options": {"whiten": False, "trace_decay": 1.0}}
    run = await make(critic=critic, trainer__steps=2, critic__warmup_steps=1, **options)
    await run.training.train()
    assert [act for act in run.policy.acts if act == "update"] == ["update"]  # the first step was the critic's alone
    assert len(critic.updates) == 2
    for samples in critic.updates:
        assert sorted(float(s.returns[0]) for s in samples) == [0.0, 0.0, 1.0, 1.0]
        assert all((s.returns == s.returns[0]).all() and (s.values == 0.25).all() for s in samples)
        np.testing.assert_allclose([s.advantages[0] for s in samples], [s.returns[0] - 0.25 for s in samples])
    latest = run.checkpoints.latest()
    assert (latest / "critic" / "weights").read_text() == "after 2 updates"
    await run.training.stop()


async def test_a_greedy_completion_of_each_prompt_is_the_baseline_where_the_estimator_wants_one(
    make: Callable[..., Any],
) -> None:
    # The stand-in's greedy completion is number 0, reward 0; the samples are numbers 0 and 1: advantages 0 and 1.
    run = await make(trainer__steps=1, algorithm__advantage="remax")
    await run.training.train()
    (samples,) = run.policy.updates
    assert [float(s.advantages[0]) for s in samples] == [0.0, 1.0, 0.0, 1.0]
    await run.training.stop()


async def test_multipliers_of_constraints_rise_while_they_are_broken_and_survive_a_resume(
    make: Callable[..., Any],
) -> None:
    # The mean of the component is 0.5 and must be 0.75: with step size 1 the multiplier rises by 0.25 a step.
    options = {
        "algorithm__combination": "constrained",
        "algorithm__combination_options": {
            "constraints": [{"component": "value", "threshold": 0.75}],
            "step_size": 1.0,
            "initial": 0.0,
        },
    }
    run = await make(trainer__steps=2, checkpoint__every_steps=1, **options)
    await run.training.train()
    await run.training.stop()
    assert run.training.appraiser.state() == {"value": 0.5}
    again = await make(trainer__steps=3, is_resumed=True, **options)
    await again.training.train()
    await again.training.stop()
    assert again.training.appraiser.state() == {"value": 0.75}
