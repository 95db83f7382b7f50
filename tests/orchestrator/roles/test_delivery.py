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
    DeliveryOutcome,
    Step,
    outcome_of,
)

ENDS = (Step.DONE, Step.RESTART, Step.STOP)
OUTCOMES = st.lists(st.sampled_from(DeliveryOutcome), max_size=80)
LONGEST = (MAX_FAILURES - 1) + (MAX_SILENCES - 1) + (MAX_RETURNS - 1) + 1
"""Attempts until a restart where each kind of outcome comes as often as it may."""


def steps_after(outcomes: Iterable[DeliveryOutcome]) -> list[Step]:
    delivery, steps = Delivery(), []
    for outcome in outcomes:
        delivery, step = delivery.after(outcome)
        steps.append(step)
    return steps


def state_after(*outcomes: DeliveryOutcome) -> Delivery:
    delivery = Delivery()
    for outcome in outcomes:
        delivery, _ = delivery.after(outcome)
    return delivery


@pytest.mark.parametrize(
    ("outcome", "steps"),
    [
        (DeliveryOutcome.PROVEN, [Step.DONE] * 3),
        (DeliveryOutcome.FAILED, [Step.SEND, Step.RESTART] * 2),
        (DeliveryOutcome.SILENT, [Step.SEND_LATER, Step.SEND_LATER, Step.RESTART] * 2),
        (DeliveryOutcome.OVERTAKEN, [*[Step.SEND] * 7, Step.RESTART] * 2),
        (DeliveryOutcome.DEAD, [Step.RESTART] * 3),
        (DeliveryOutcome.DISAGREES, [Step.SEND, Step.RESTART, Step.STOP, Step.STOP]),
    ],
)
def test_what_follows_when_the_same_happens_again_and_again(outcome, steps):
    assert steps_after([outcome] * len(steps)) == steps


def test_a_generator_that_disagrees_gets_everything_anew_then_a_new_process_then_the_run_ends():
    disagrees, proven, dead = DeliveryOutcome.DISAGREES, DeliveryOutcome.PROVEN, DeliveryOutcome.DEAD
    assert steps_after([disagrees, proven, disagrees]) == [Step.SEND, Step.DONE, Step.SEND]
    assert steps_after([disagrees, dead, disagrees, disagrees]) == [
        Step.SEND,
        Step.RESTART,
        Step.RESTART,
        Step.STOP,
    ]


def test_after_a_disagreement_every_attempt_is_in_full_until_it_agrees_whatever_comes_between():
    assert not Delivery().in_full
    for between in DeliveryOutcome:
        state = state_after(DeliveryOutcome.DISAGREES, between)
        assert state.in_full == (between not in (DeliveryOutcome.PROVEN, DeliveryOutcome.DISAGREES))


def test_each_kind_of_outcome_is_counted_apart():
    outcomes = [
        DeliveryOutcome.FAILED,
        DeliveryOutcome.SILENT,
        DeliveryOutcome.OVERTAKEN,
        DeliveryOutcome.SILENT,
        DeliveryOutcome.FAILED,
    ]
    assert steps_after(outcomes) == [Step.SEND, Step.SEND_LATER, Step.SEND, Step.SEND_LATER, Step.RESTART]


def test_a_restart_begins_the_count_of_attempts_anew_and_keeps_that_of_disagreements():
    assert state_after(
        DeliveryOutcome.DISAGREES, DeliveryOutcome.SILENT, DeliveryOutcome.FAILED, DeliveryOutcome.FAILED
    ) == Delivery(disagreements=1)
    assert state_after(DeliveryOutcome.DISAGREES, DeliveryOutcome.DEAD) == Delivery(disagreements=1)


def test_a_version_that_was_loaded_begins_the_count_of_attempts_anew_though_it_disagrees():
    assert state_after(DeliveryOutcome.FAILED, DeliveryOutcome.SILENT, DeliveryOutcome.DISAGREES) == Delivery(
        disagreements=1
    )


def test_success_is_a_new_beginning():
    for outcome in DeliveryOutcome:
        assert state_after(outcome, DeliveryOutcome.PROVEN) == Delivery()


@given(OUTCOMES)
def test_done_follows_only_a_proof_and_always_follows_one(outcomes):
    for outcome, step in zip(outcomes, steps_after(outcomes), strict=True):
        assert (step is Step.DONE) == (outcome is DeliveryOutcome.PROVEN)


@given(OUTCOMES)
def test_the_run_ends_on_the_third_disagreement_and_on_nothing_else(outcomes):
    disagreements = 0
    for outcome, step in zip(outcomes, steps_after(outcomes), strict=True):
        disagreements += outcome is DeliveryOutcome.DISAGREES
        disagreements = 0 if outcome is DeliveryOutcome.PROVEN else disagreements
        if outcome is DeliveryOutcome.DISAGREES:
            assert step is {1: Step.SEND, 2: Step.RESTART}.get(disagreements, Step.STOP)
        else:
            assert step is not Step.STOP


@given(OUTCOMES)
def test_disagreements_are_counted_across_everything_but_a_proof(outcomes):
    since_proof = (
        outcomes[len(outcomes) - outcomes[::-1].index(DeliveryOutcome.PROVEN) :]
        if DeliveryOutcome.PROVEN in outcomes
        else outcomes
    )
    assert state_after(*outcomes).disagreements == since_proof.count(DeliveryOutcome.DISAGREES)


@given(
    st.lists(
        st.sampled_from([o for o in DeliveryOutcome if o not in (DeliveryOutcome.PROVEN, DeliveryOutcome.DISAGREES)]),
        min_size=LONGEST,
    )
)
def test_without_a_proof_a_restart_comes_after_a_bounded_number_of_attempts(outcomes):
    steps = steps_after(outcomes)
    for start in range(len(steps) - LONGEST + 1):
        assert Step.RESTART in steps[start : start + LONGEST]


def test_the_bound_is_reached_and_not_passed():
    outcomes = [DeliveryOutcome.OVERTAKEN] * 7 + [DeliveryOutcome.SILENT] * 2 + [DeliveryOutcome.FAILED] * 2
    assert len(outcomes) == LONGEST
    assert [step in ENDS for step in steps_after(outcomes)] == [False] * (LONGEST - 1) + [True]


@given(st.lists(st.sampled_from([o for o in DeliveryOutcome if o is not DeliveryOutcome.PROVEN]), min_size=2 * LONGEST))
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
        ("weights_timeout", DeliveryOutcome.SILENT),
        ("weights_gone", DeliveryOutcome.OVERTAKEN),
        ("weights_superseded", DeliveryOutcome.OVERTAKEN),
        ("canary_version", DeliveryOutcome.OVERTAKEN),
        ("generator_died", DeliveryOutcome.DEAD),
        ("generator_timeout", DeliveryOutcome.DEAD),
        ("engine_dead", DeliveryOutcome.DEAD),
        ("weights_corrupt", DeliveryOutcome.FAILED),
        ("weights_refused", DeliveryOutcome.FAILED),
        ("weights_no_room", DeliveryOutcome.FAILED),
        ("weights_not_loaded", DeliveryOutcome.FAILED),
        ("something_new", DeliveryOutcome.FAILED),
    ],
)
def test_the_reason_of_a_failure_says_how_an_attempt_ended(reason, outcome):
    assert outcome_of(reason) is outcome
