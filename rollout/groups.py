"""The states of a group from admission to the trainer. A pure state machine: events in, new state and transitions out.

ADMITTED → GENERATING → SCORING → READY → CONSUMED, and from each of the first four DROPPED with a reason. A retry is
no transition: the group stays in GENERATING or SCORING.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import assert_never

from rollout.failures import Failure, FailureError, FailureKind


class GroupState(StrEnum):
    """The state of a group."""

    ADMITTED = "admitted"
    """Its prompt was drawn; no generator has it yet."""
    GENERATING = "generating"
    """A generator samples its completions."""
    SCORING = "scoring"
    """The reward server scores its completions."""
    READY = "ready"
    """It is scored and waits for its batch."""
    CONSUMED = "consumed"
    """It is part of a training batch. Final."""
    DROPPED = "dropped"
    """It is given up, with a reason. Final."""


EDGES: Mapping[GroupState, frozenset[GroupState]] = MappingProxyType(
    {
        GroupState.ADMITTED: frozenset({GroupState.GENERATING, GroupState.DROPPED}),
        GroupState.GENERATING: frozenset({GroupState.SCORING, GroupState.DROPPED}),
        GroupState.SCORING: frozenset({GroupState.READY, GroupState.DROPPED}),
        GroupState.READY: frozenset({GroupState.CONSUMED, GroupState.DROPPED}),
        GroupState.CONSUMED: frozenset(),
        GroupState.DROPPED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class Admit:
    """A prompt becomes a group. `served_version` is the oldest policy version that may sample for it."""

    group_id: str
    prompt_id: str
    served_version: int
    at_s: float


@dataclass(frozen=True, slots=True)
class StartGeneration:
    """The group was handed to a generator."""

    group_id: str
    at_s: float


@dataclass(frozen=True, slots=True)
class FinishGeneration:
    """A generator returned every completion; versions are the oldest and newest that sampled any of their tokens."""

    group_id: str
    generator: str
    min_version: int
    max_version: int
    at_s: float


@dataclass(frozen=True, slots=True)
class FinishScoring:
    """Every completion has its reward."""

    group_id: str
    mean_reward: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Consume:
    """The group goes into the training batch that the policy of `version` learns from."""

    group_id: str
    version: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Drop:
    """The group is given up. `reason` is a short stable name that is counted; `detail` is what a person reads."""

    group_id: str
    reason: str
    at_s: float
    detail: str = ""


GroupEvent = Admit | StartGeneration | FinishGeneration | FinishScoring | Consume | Drop


@dataclass(frozen=True, slots=True)
class Transition:
    """One group's change of state, with what became known of the group. The ledger keeps these.

    Attributes:
        group_id: the group.
        from_state: None on admission.
        to_state: the state it is in now.
        at_s: Unix time, seconds.
        prompt_id: on admission.
        version: on admission the served policy version, on consumption the version of the policy that learns.
        min_version, max_version: after generation, the oldest and newest version that sampled a token.
        generator: after generation, who made the completions.
        mean_reward: after scoring, over the group's completions.
        reason, detail: on a drop.
    """

    group_id: str
    from_state: GroupState | None
    to_state: GroupState
    at_s: float
    prompt_id: str | None = None
    version: int | None = None
    min_version: int | None = None
    max_version: int | None = None
    generator: str | None = None
    mean_reward: float | None = None
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """An open group.

    Attributes:
        group_id, prompt_id: which group, of which prompt.
        number: how many groups were admitted before it.
        served_version: the oldest policy version that may sample for it; its deadline follows from it.
        state: one of the four open states.
    """

    group_id: str
    prompt_id: str
    number: int
    served_version: int
    state: GroupState


@dataclass(frozen=True, slots=True)
class Account:
    """How many groups were admitted, and what became of them: admitted = consumed + dropped + open."""

    admitted: int
    consumed: int
    dropped: Mapping[str, int]
    open: int

    @property
    def is_balanced(self) -> bool:
        """Whether every admitted group is counted exactly once."""
        return self.admitted == self.consumed + sum(self.dropped.values()) + self.open


class IllegalTransitionError(FailureError):
    """An event asked for a change of state that the state machine doesn't have: a bug of the caller's."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of a run. Pure: an event gives a new value, and the transitions to append to the ledger.

    Only open groups are held (admission bounds how many), those that ended are counted. At every moment
    ``admitted == consumed + sum(dropped) + len(open)``.
    """

    open: Mapping[str, Group] = field(default_factory=dict)
    admitted: int = 0
    consumed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def account(self) -> Account:
        """The counts, as the ledger gives them."""
        return Account(self.admitted, self.consumed, dict(self.dropped), len(self.open))

    def on(self, event: GroupEvent) -> tuple[Groups, list[Transition]]:
        """The groups after one event, and its transitions.

        Raises:
            IllegalTransitionError: the group's state has no such edge, the group isn't open, or it was admitted
                already. This value stays as it is.
        """
        match event:
            case Admit():
                return self._admit(event)
            case StartGeneration(group_id, at_s):
                return self._move(group_id, GroupState.GENERATING, at_s)
            case FinishGeneration(group_id, generator, low, high, at_s):
                return self._move(
                    group_id, GroupState.SCORING, at_s, generator=generator, min_version=low, max_version=high
                )
            case FinishScoring(group_id, mean_reward, at_s):
                return self._move(group_id, GroupState.READY, at_s, mean_reward=mean_reward)
            case Consume(group_id, version, at_s):
                return self._move(group_id, GroupState.CONSUMED, at_s, version=version)
            case Drop(group_id, reason, at_s, detail):
                return self._move(group_id, GroupState.DROPPED, at_s, reason=reason, detail=detail)
            case _:
                assert_never(event)

    def _admit(self, event: Admit) -> tuple[Groups, list[Transition]]:
        if event.group_id in self.open:
            raise _illegal(event.group_id, self.open[event.group_id].state, GroupState.ADMITTED)
        group = Group(event.group_id, event.prompt_id, self.admitted, event.served_version, GroupState.ADMITTED)
        transition = Transition(
            event.group_id,
            None,
            GroupState.ADMITTED,
            event.at_s,
            prompt_id=event.prompt_id,
            version=event.served_version,
        )
        state = replace(self, open={**self.open, event.group_id: group}, admitted=self.admitted + 1)
        return state, [transition]

    def _move(
        self, group_id: str, to_state: GroupState, at_s: float, **learned: str | int | float
    ) -> tuple[Groups, list[Transition]]:
        group = self.open.get(group_id)
        if group is None or to_state not in EDGES[group.state]:
            raise _illegal(group_id, group.state if group else None, to_state)
        transition = Transition(group_id, group.state, to_state, at_s, **learned)  # type: ignore[arg-type]
        if EDGES[to_state]:
            return replace(self, open={**self.open, group_id: replace(group, state=to_state)}), [transition]
        still_open = {name: other for name, other in self.open.items() if name != group_id}
        if to_state is GroupState.CONSUMED:
            return replace(self, open=still_open, consumed=self.consumed + 1), [transition]
        reason = str(learned["reason"])
        dropped = {**self.dropped, reason: self.dropped.get(reason, 0) + 1}
        return replace(self, open=still_open, dropped=dropped), [transition]


def _illegal(group_id: str, from_state: GroupState | None, to_state: GroupState) -> IllegalTransitionError:
    origin = from_state.value if from_state else "not open (never admitted, or consumed or dropped already)"
    message = f"group {group_id} can't go from {origin} to {to_state.value}; the loop sent it an event out of order"
    return IllegalTransitionError(Failure(FailureKind.BUG, "illegal_group_transition", message))
