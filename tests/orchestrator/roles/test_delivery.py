"""What follows each attempt to bring a version to a generator: the table by hand, then what holds for any sequence."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.roles.delivery import (
    MAX_FAILURES,
    MAX_RETURNS,
    MAX_SILENCES,
    Delivery,
    Outcome,
    Step,
    outcome_of,
)

ENDS = (Step.DONE, Step.RESTART, Step.STOP)
OUTCOMES = st.lists(st.sampled_from(Outcome), max_size=80)
LONGEST = (MAX_FAILURES - 1) + (MAX_SILENCES - 1) + (MAX_RETURNS - 1) + 1
"""Attempts until a restart where each kind of outcome comes as often as it may."""


def steps_after(outcomes: Iterable[Outcome]) -> list[Step]:
    delivery, steps = Delivery(), []
    for outcome in outcomes:
        delivery, step = delivery.after(outcome)
        steps.append(step)
    return steps


def state_after(*outcomes: Outcome) -> Delivery:
    delivery = Delivery()
    for outcome in outcomes:
        delivery, _ = delivery.after(outcome)
    return delivery


@pytest.mark.parametrize(
    ("outcome", "steps"),
    [
        (Outcome.PROVEN, [Step.DONE] * 3),
        (Outcome.FAILED, [Step.SEND, Step.RESTART] * 2),
        (Outcome.SILENT, [Step.SEND_LATER, Step.SEND_LATER, Step.RESTART] * 2),
        (Outcome.OVERTAKEN, [*[Step.SEND] * 7, Step.RESTART] * 2),
        (Outcome.DEAD, [Step.RESTART] * 3),
        (Outcome.DISAGREES, [Step.SEND, Step.RESTART, Step.STOP, Step.STOP]),
    ],
)
def test_what_follows_when_the_same_happens_again_and_again(outcome, steps):
    assert steps_after([outcome] * len(steps)) == steps


def test_a_generator_that_disagrees_gets_everything_anew_then_a_new_process_then_the_run_ends():
    disagrees, proven, dead = Outcome.DISAGREES, Outcome.PROVEN, Outcome.DEAD
    assert steps_after([disagrees, proven, disagrees]) == [Step.SEND, Step.DONE, Step.SEND]
    assert steps_after([disagrees, dead, disagrees, disagrees]) == [
        Step.SEND,
        Step.RESTART,
        Step.RESTART,
        Step.STOP,
    ]


def test_after_a_disagreement_every_attempt_is_in_full_until_it_agrees_whatever_comes_between():
    assert not Delivery().in_full
    for between in Outcome:
        state = state_after(Outcome.DISAGREES, between)
        assert state.in_full == (between not in (Outcome.PROVEN, Outcome.DISAGREES))


def test_each_kind_of_outcome_is_counted_apart():
    outcomes = [Outcome.FAILED, Outcome.SILENT, Outcome.OVERTAKEN, Outcome.SILENT, Outcome.FAILED]
    assert steps_after(outcomes) == [Step.SEND, Step.SEND_LATER, Step.SEND, Step.SEND_LATER, Step.RESTART]


def test_a_restart_begins_the_count_of_attempts_anew_and_keeps_that_of_disagreements():
    assert state_after(Outcome.DISAGREES, Outcome.SILENT, Outcome.FAILED, Outcome.FAILED) == Delivery(disagreements=1)
    assert state_after(Outcome.DISAGREES, Outcome.DEAD) == Delivery(disagreements=1)


def test_a_version_that_was_loaded_begins_the_count_of_attempts_anew_though_it_disagrees():
    assert state_after(Outcome.FAILED, Outcome.SILENT, Outcome.DISAGREES) == Delivery(disagreements=1)


def test_success_is_a_new_beginning():
    for outcome in Outcome:
        assert state_after(outcome, Outcome.PROVEN) == Delivery()


@given(OUTCOMES)
def test_done_follows_only_a_proof_and_always_follows_one(outcomes):
    for outcome, step in zip(outcomes, steps_after(outcomes), strict=True):
        assert (step is Step.DONE) == (outcome is Outcome.PROVEN)


@given(OUTCOMES)
def test_the_run_ends_on_the_third_disagreement_and_on_nothing_else(outcomes):
    disagreements = 0
    for outcome, step in zip(outcomes, steps_after(outcomes), strict=True):
        disagreements += outcome is Outcome.DISAGREES
        disagreements = 0 if outcome is Outcome.PROVEN else disagreements
        if outcome is Outcome.DISAGREES:
            assert step is {1: Step.SEND, 2: Step.RESTART}.get(disagreements, Step.STOP)
        else:
            assert step is not Step.STOP


@given(OUTCOMES)
def test_disagreements_are_counted_across_everything_but_a_proof(outcomes):
    since_proof = (
        outcomes[len(outcomes) - outcomes[::-1].index(Outcome.PROVEN) :] if Outcome.PROVEN in outcomes else outcomes
    )
    assert state_after(*outcomes).disagreements == since_proof.count(Outcome.DISAGREES)


@given(
    st.lists(st.sampled_from([o for o in Outcome if o not in (Outcome.PROVEN, Outcome.DISAGREES)]), min_size=LONGEST)
)
def test_without_a_proof_a_restart_comes_after_a_bounded_number_of_attempts(outcomes):
    steps = steps_after(outcomes)
    for start in range(len(steps) - LONGEST + 1):
        assert Step.RESTART in steps[start : start + LONGEST]


def test_the_bound_is_reached_and_not_passed():
    outcomes = [Outcome.OVERTAKEN] * 7 + [Outcome.SILENT] * 2 + [Outcome.FAILED] * 2
    assert len(outcomes) == LONGEST
    assert [step in ENDS for step in steps_after(outcomes)] == [False] * (LONGEST - 1) + [True]


@given(st.lists(st.sampled_from([o for o in Outcome if o is not Outcome.PROVEN]), min_size=2 * LONGEST))
def test_with_disagreements_too_it_takes_at_most_twice_as_many(outcomes):
    # One disagreement, at most, is answered by another attempt, which begins the count anew.
    steps = steps_after(outcomes)
    assert any(step in ENDS for step in steps[: 2 * LONGEST])


@given(OUTCOMES)
def test_the_state_stays_small(outcomes):
    state = state_after(*outcomes)
    assert state.failures < MAX_FAILURES
    assert state.silences < MAX_SILENCES
    assert state.returns < MAX_RETURNS


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("weights_timeout", Outcome.SILENT),
        ("weights_gone", Outcome.OVERTAKEN),
        ("weights_superseded", Outcome.OVERTAKEN),
        ("canary_version", Outcome.OVERTAKEN),
        ("generator_died", Outcome.DEAD),
        ("generator_timeout", Outcome.DEAD),
        ("engine_dead", Outcome.DEAD),
        ("weights_corrupt", Outcome.FAILED),
        ("weights_refused", Outcome.FAILED),
        ("weights_no_room", Outcome.FAILED),
        ("weights_not_loaded", Outcome.FAILED),
        ("something_new", Outcome.FAILED),
    ],
)
def test_the_reason_of_a_failure_says_how_an_attempt_ended(reason, outcome):
    assert outcome_of(reason) is outcome
