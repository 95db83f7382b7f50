"""A role that may die: the budget of its restarts by hand and for any history, then deaths, one after another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import DeadlineConfig, RestartsConfig
from orchestrator.roles.revived import RestartBudget, Revived
from rollout.failures import Failure, FailureError, FailureKind
from tests.orchestrator.stand_ins import AT_ONCE, DEADLINES, Events, infrastructure, until


def test_the_first_restart_comes_at_once_and_each_further_one_waits_twice_as_long_up_to_the_longest_pause() -> None:
    budget = RestartBudget(RestartsConfig(budget=5, backoff_s=1.0, backoff_max_s=3.0))
    times: list[float | None] = []
    for _ in range(6):
        budget, at_s = budget.after_failure(100.0)
        times.append(at_s)
    assert times == [100.0, 101.0, 102.0, 103.0, 103.0, None]


def test_answers_in_a_row_refill_the_budget() -> None:
    budget = RestartBudget(RestartsConfig(budget=1, refill_after=2))
    budget, _ = budget.after_failure(0.0)
    assert budget.after_answer().after_failure(0.0)[1] is None
    assert budget.after_answer().after_answer() == RestartBudget(budget.config)


CONFIGS = st.builds(
    RestartsConfig,
    budget=st.integers(0, 6),
    backoff_s=st.floats(0.0, 5.0),
    backoff_max_s=st.floats(0.0, 60.0),
    refill_after=st.integers(1, 4),
)
HISTORIES = st.lists(st.tuples(st.booleans(), st.floats(0.0, 1e3)), max_size=80)
"""Whether the role answered or failed, and how many seconds after the event before."""


@given(CONFIGS, HISTORIES)
def test_the_budget_is_spent_exactly_when_its_restarts_are_and_only_answers_in_a_row_refill_it(
    config: RestartsConfig, history: list[tuple[bool, float]]
) -> None:
    budget, now_s, restarts, answers, last_pause_s = RestartBudget(config), 0.0, 0, 0, 0.0
    for is_answer, later_s in history:
        now_s += later_s
        if is_answer:
            budget, answers = budget.after_answer(), answers + 1
            if answers >= config.refill_after:
                restarts, last_pause_s = 0, 0.0
        else:
            budget, at_s = budget.after_failure(now_s)
            assert (at_s is None) == (restarts == config.budget)
            if at_s is None:
                continue  # a role that is lost answers no more; the state stays as it is
            pause_s = at_s - now_s
            assert 0.0 <= pause_s <= config.backoff_max_s + 1e-6
            assert pause_s >= last_pause_s - 1e-6
            restarts, answers, last_pause_s = restarts + 1, 0, pause_s
        assert budget.used == restarts


class Server:
    """Answers with its number until it is dead."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_dead = False
        self.is_ended = False

    async def answer(self) -> int:
        await asyncio.sleep(0)
        if self.is_dead:
            raise infrastructure("server_died")
        return self.number

    async def end(self) -> None:
        self.is_ended = True


class Stage:
    """A revived role and every server that it has started."""

    def __init__(self, restarts: RestartsConfig = AT_ONCE, deadlines: DeadlineConfig = DEADLINES) -> None:
        self.servers: list[Server] = []
        self.events = Events()
        self.launch_failures: list[Exception] = []
        """What the next launches raise."""
        self.may_launch = asyncio.Event()
        self.may_launch.set()
        self.role: Revived[Server] = Revived(
            "judge_server",
            self.launch,
            Server.end,
            is_death=lambda failure: failure.reason == "server_died",
            restarts=restarts,
            deadlines=deadlines,
            on_event=self.events,
        )

    async def launch(self) -> Server:
        await self.may_launch.wait()
        if self.launch_failures:
            raise self.launch_failures.pop(0)
        self.servers.append(Server(len(self.servers)))
        return self.servers[-1]

    async def ask(self) -> int:
        return await self.role.ask(Server.answer)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events.all]


async def started(**how: Any) -> Stage:
    stage = Stage(**how)
    await stage.role.start()
    return stage


async def test_a_question_that_a_death_cut_short_is_asked_again_after_the_restart() -> None:
    stage = await started()
    assert await stage.ask() == 0
    stage.servers[0].is_dead = True
    assert await stage.ask() == 1
    assert stage.servers[0].is_ended
    assert stage.events.all == [
        ("judge_server_died", {"why": "for a test: server_died"}),
        ("judge_server_restarted", {"restarts": 1}),
    ]


async def test_many_questions_that_find_the_server_dead_restart_it_once() -> None:
    stage = await started()
    stage.servers[0].is_dead = True
    assert await asyncio.gather(*(stage.ask() for _ in range(20))) == [1] * 20
    assert stage.kinds == ["judge_server_died", "judge_server_restarted"]


async def test_a_question_that_comes_during_the_restart_waits_for_the_new_server() -> None:
    stage = await started()
    stage.servers[0].is_dead = True
    stage.may_launch.clear()
    first = asyncio.ensure_future(stage.ask())
    await until(lambda: stage.kinds == ["judge_server_died"])
    second = asyncio.ensure_future(stage.ask())
    await asyncio.sleep(0.01)
    assert not second.done()
    stage.may_launch.set()
    assert [await first, await second] == [1, 1]


async def test_a_failure_that_is_no_death_is_the_questions_own() -> None:
    async def refused(server: Server) -> int:
        raise FailureError(Failure(FailureKind.DATA, "prompt_too_long", "prompt 3"))

    stage = await started()
    with pytest.raises(FailureError, match="prompt 3"):
        await stage.role.ask(refused)
    assert stage.events.all == []


async def test_a_restart_that_fails_counts_against_the_budget_and_is_tried_again() -> None:
    stage = await started(restarts=RestartsConfig(budget=3, backoff_s=0.0))
    stage.servers[0].is_dead = True
    stage.launch_failures = [infrastructure("server_start_failed"), infrastructure("server_start_failed")]
    assert await stage.ask() == 1
    assert stage.kinds == ["judge_server_died", *["judge_server_restart_failed"] * 2, "judge_server_restarted"]
    stage.servers[1].is_dead = True
    with pytest.raises(FailureError, match="4 times"):
        await stage.ask()


async def test_the_users_fault_in_a_restart_is_not_tried_again() -> None:
    stage = await started()
    stage.servers[0].is_dead = True
    stage.launch_failures = [FailureError(Failure(FailureKind.USER_CODE, "module_failed", "rewards.py, line 3"))]
    with pytest.raises(FailureError, match="line 3"):
        await stage.ask()


async def test_a_role_whose_budget_is_spent_is_lost_for_all_who_ask_and_the_verdict_says_what_died_last() -> None:
    stage = await started(restarts=RestartsConfig(budget=0))
    stage.servers[0].is_dead = True
    found = await asyncio.gather(*(stage.ask() for _ in range(3)), return_exceptions=True)
    for error in (*found, *await asyncio.gather(stage.ask(), return_exceptions=True)):
        assert isinstance(error, FailureError)
        assert (error.failure.kind, error.failure.reason) == (FailureKind.INFRASTRUCTURE, "judge_server_lost")
        assert "the judge server died or failed to start once" in str(error)
        assert "restarts.budget = 0" in str(error)
        assert "The last time: for a test: server_died" in str(error)
    assert stage.kinds == ["judge_server_died"]


async def test_progress_refills_the_budget() -> None:
    stage = await started(restarts=RestartsConfig(budget=1, backoff_s=0.0, refill_after=3))
    for number in range(5):
        stage.servers[-1].is_dead = True
        assert [await stage.ask() for _ in range(3)] == [number + 1] * 3
    stage.servers[-1].is_dead = True
    assert [await stage.ask() for _ in range(2)] == [6, 6]
    stage.servers[-1].is_dead = True
    with pytest.raises(FailureError, match="2 times"):
        await stage.ask()


async def test_a_launch_that_never_ends_runs_out_of_time() -> None:
    stage = Stage(deadlines=DeadlineConfig(start_s=0.02, stop_s=0.02))
    stage.may_launch.clear()
    with pytest.raises(FailureError) as caught:
        await stage.role.start()
    assert caught.value.failure.reason == "judge_server_start_timeout"


async def test_a_server_that_cannot_be_ended_does_not_hold_up_the_restart() -> None:
    stage = await started(deadlines=DeadlineConfig(start_s=5.0, stop_s=0.01))

    async def never_ends() -> None:
        await asyncio.sleep(60)

    stage.servers[0].end = never_ends  # type: ignore[method-assign]
    stage.role._end = lambda server: server.end()
    stage.servers[0].is_dead = True
    async with asyncio.timeout(5):
        assert await stage.ask() == 1


async def test_stopping_ends_the_server() -> None:
    stage = await started()
    await stage.role.stop()
    assert stage.servers[0].is_ended
    await Stage().role.stop()  # one that was never started has nothing to end
