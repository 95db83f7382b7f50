"""The group state machine: its table of edges, its account, and what an illegal event says."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rollout.failures import FailureKind
from rollout.groups import (
    EDGES,
    Admit,
    Consume,
    Drop,
    FinishGeneration,
    FinishScoring,
    GroupEvent,
    Groups,
    GroupState,
    IllegalTransitionError,
    StartGeneration,
)

PATH = [GroupState.ADMITTED, GroupState.GENERATING, GroupState.SCORING, GroupState.READY]


def event_to(state: GroupState, group_id: str) -> GroupEvent:
    events: dict[GroupState, GroupEvent] = {
        GroupState.ADMITTED: Admit(group_id, f"prompt-of-{group_id}", 3, 0.0),
        GroupState.GENERATING: StartGeneration(group_id, 1.0),
        GroupState.SCORING: FinishGeneration(group_id, "generator-0", 3, 4, 2.0),
        GroupState.READY: FinishScoring(group_id, 0.5, 3.0),
        GroupState.CONSUMED: Consume(group_id, 4, 4.0),
        GroupState.DROPPED: Drop(group_id, "reward_timeout", 5.0, "took 10 s"),
    }
    return events[state]


def groups_in(state: GroupState, group_id: str = "g0") -> Groups:
    groups = Groups()
    for step in PATH[: PATH.index(state) + 1]:
        groups, _ = groups.on(event_to(step, group_id))
    return groups


def test_a_group_that_goes_well_takes_five_transitions_and_is_consumed() -> None:
    groups, transitions = Groups(), []
    for state in [*PATH, GroupState.CONSUMED]:
        groups, taken = groups.on(event_to(state, "g0"))
        transitions += taken
    assert [(t.from_state, t.to_state) for t in transitions] == [
        (None, GroupState.ADMITTED),
        (GroupState.ADMITTED, GroupState.GENERATING),
        (GroupState.GENERATING, GroupState.SCORING),
        (GroupState.SCORING, GroupState.READY),
        (GroupState.READY, GroupState.CONSUMED),
    ]
    assert (groups.admitted, groups.consumed, len(groups.open)) == (1, 1, 0)


def test_transitions_carry_what_was_learned_of_the_group() -> None:
    _, [scoring] = groups_in(GroupState.GENERATING).on(event_to(GroupState.SCORING, "g0"))
    assert (scoring.generator, scoring.min_version, scoring.max_version) == ("generator-0", 3, 4)
    _, [dropped] = groups_in(GroupState.SCORING).on(event_to(GroupState.DROPPED, "g0"))
    assert (dropped.reason, dropped.detail) == ("reward_timeout", "took 10 s")


@pytest.mark.parametrize("state", PATH)
def test_a_group_can_be_dropped_from_every_open_state_and_is_counted_by_reason(state: GroupState) -> None:
    groups, _ = groups_in(state).on(Drop("g0", "prompt_too_long", 1.0))
    assert groups.account().dropped == {"prompt_too_long": 1}
    assert groups.account().is_balanced


@pytest.mark.parametrize(
    ("origin", "target"), [(a, b) for a, b in product(PATH, GroupState) if b not in EDGES[a]], ids=str
)
def test_an_edge_outside_the_table_names_the_group_and_both_states(origin: GroupState, target: GroupState) -> None:
    with pytest.raises(IllegalTransitionError, match=rf"g0 .*{origin.value}.*{target.value}") as raised:
        groups_in(origin).on(event_to(target, "g0"))
    assert raised.value.failure.kind is FailureKind.BUG


@pytest.mark.parametrize("end", [GroupState.CONSUMED, GroupState.DROPPED])
def test_nothing_follows_the_end_of_a_group(end: GroupState) -> None:
    groups, _ = groups_in(GroupState.READY).on(event_to(end, "g0"))
    with pytest.raises(IllegalTransitionError, match=r"g0 .*not open"):
        groups.on(Drop("g0", "late", 9.0))


class Life(RuleBasedStateMachine):
    """Any events in any order: legal ones move the group and keep the account, illegal ones change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = Groups()
        self.states: dict[str, GroupState] = {}

    @rule(number=st.integers(0, 6), state=st.sampled_from(GroupState))
    def any_event(self, number: int, state: GroupState) -> None:
        group_id, target = f"g{number}", state
        known = self.states.get(group_id)
        # A group that ended may not come back under its name; the ledger refuses that, memory has forgotten it.
        if target is GroupState.ADMITTED and known is not None and not EDGES[known]:
            return
        is_legal = known is None if target is GroupState.ADMITTED else known is not None and target in EDGES[known]
        before = self.groups
        if is_legal:
            self.groups, [transition] = before.on(event_to(target, group_id))
            assert (transition.from_state, transition.to_state) == (known, target)
            self.states[group_id] = target
        else:
            with pytest.raises(IllegalTransitionError):
                before.on(event_to(target, group_id))

    @invariant()
    def the_account_is_what_the_groups_went_through(self) -> None:
        account, ends = self.groups.account(), list(self.states.values())
        assert account.is_balanced
        assert account.admitted == len(ends)
        assert account.consumed == ends.count(GroupState.CONSUMED)
        assert sum(account.dropped.values()) == ends.count(GroupState.DROPPED)
        assert {g.group_id: g.state for g in self.groups.open.values()} == {
            name: state for name, state in self.states.items() if EDGES[state]
        }


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_the_account_balances_after_each_of_two_hundred_thousand_transitions() -> None:
    random_ = random.Random(0)
    groups, names = Groups(), 0
    for _ in range(200_000):
        if not groups.open or (len(groups.open) < 12 and random_.random() < 0.3):
            groups, _ = groups.on(Admit(f"g{names}", "p", 0, 0.0))
            names += 1
        else:
            group = random_.choice(list(groups.open.values()))
            target = random_.choice(sorted(EDGES[group.state]))
            groups, _ = groups.on(event_to(target, group.group_id))
        assert groups.admitted == groups.consumed + sum(groups.dropped.values()) + len(groups.open)
