"""The invariants of AdmissionScheduler's docstring: worked examples, then properties."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout.admission import AdmissionScheduler
from rollout.failures import FailureError
from rollout.groups import (
    Admit,
    Consume,
    Drop,
    FinishGeneration,
    FinishScoring,
    Group,
    Groups,
    GroupState,
    StartGeneration,
)


def group(number: int, served_version: int, *, ready: bool = True) -> Group:
    state = GroupState.READY if ready else GroupState.GENERATING
    return Group(f"g{number}", f"p{number}", number, served_version, state)


def test_synchronous_training_admits_one_batch_and_then_waits_for_the_next_version() -> None:
    scheduler = AdmissionScheduler(batch_groups=4, max_staleness=0)
    assert scheduler.capacity([], next_batch=0, served_version=0) == 4
    batch = [group(n, 0) for n in range(4)]
    assert scheduler.capacity(batch, next_batch=0, served_version=0) == 0
    # Batch 0 is being learned from; the generators still serve version 0.
    assert scheduler.capacity([], next_batch=1, served_version=0) == 0
    assert scheduler.capacity([], next_batch=1, served_version=1) == 4


def test_with_staleness_one_the_next_batch_is_admitted_while_the_first_is_learned_from() -> None:
    scheduler = AdmissionScheduler(batch_groups=4, max_staleness=1)
    assert scheduler.capacity([], next_batch=0, served_version=0) == 8
    assert scheduler.capacity([group(n, 0) for n in range(4, 8)], next_batch=1, served_version=0) == 0
    assert scheduler.capacity([group(n, 0) for n in range(4, 8)], next_batch=1, served_version=1) == 4


def test_a_dropped_group_frees_its_slot_at_once() -> None:
    scheduler = AdmissionScheduler(batch_groups=4, max_staleness=0)
    assert scheduler.capacity([group(0, 0), group(2, 0), group(3, 0)], next_batch=0, served_version=0) == 1


def test_a_generator_that_lags_behind_gets_nothing_it_could_not_finish_in_time() -> None:
    scheduler = AdmissionScheduler(batch_groups=4, max_staleness=1)
    assert scheduler.capacity([], next_batch=3, served_version=1) == 0
    assert scheduler.capacity([group(0, 3)], next_batch=3, served_version=2) == 4


def test_ready_groups_overtake_a_slow_one_that_still_has_time() -> None:
    scheduler = AdmissionScheduler(batch_groups=2, max_staleness=1)
    slow, *quick = [group(0, 0, ready=False), group(1, 0), group(2, 0), group(3, 0, ready=False)]
    assert scheduler.batch([slow, *quick], next_batch=0) == (quick[0], quick[1])


def test_a_slow_group_at_its_deadline_holds_the_batch_up() -> None:
    scheduler = AdmissionScheduler(batch_groups=2, max_staleness=1)
    slow, newer = group(0, 0, ready=False), [group(4, 1), group(5, 1)]
    assert scheduler.batch([slow, *newer], next_batch=1) is None
    slow = group(0, 0)
    assert scheduler.batch([slow, *newer], next_batch=1) == (slow, newer[0])


def test_no_group_is_admitted_that_no_batch_of_the_run_would_take() -> None:
    scheduler = AdmissionScheduler(batch_groups=4, max_staleness=3, batches=2)
    assert scheduler.capacity([], next_batch=0, served_version=0) == 8
    assert scheduler.capacity([group(n, 0) for n in range(3)], next_batch=1, served_version=1) == 1
    assert scheduler.capacity([], next_batch=2, served_version=2) == 0


def test_a_group_open_past_its_deadline_is_reported_as_a_bug() -> None:
    with pytest.raises(FailureError, match="g0, admitted at version 0, is open at batch 2"):
        AdmissionScheduler(batch_groups=1, max_staleness=1).batch([group(0, 0)], next_batch=2)


@pytest.mark.parametrize(("batch_groups", "max_staleness"), [(0, 0), (1, -1)])
def test_impossible_settings_are_refused(batch_groups: int, max_staleness: int) -> None:
    with pytest.raises(ValueError, match="at least one group"):
        AdmissionScheduler(batch_groups, max_staleness)


class World:
    """A trainer and two generators around the real scheduler and the real group state machine."""

    def __init__(self, batch_groups: int, max_staleness: int) -> None:
        self.scheduler = AdmissionScheduler(batch_groups, max_staleness)
        self.groups = Groups()
        self.next_batch = 0
        self.trainer_version = 0
        self.served = [0, 0]

    @property
    def open(self) -> list[Group]:
        return list(self.groups.open.values())

    def admit(self, generator: int) -> bool:
        version = self.served[generator]
        if self.scheduler.capacity(self.open, next_batch=self.next_batch, served_version=version) == 0:
            return False
        name = f"g{self.groups.admitted}"
        self.groups, _ = self.groups.on(Admit(name, "p", version, 0.0))
        return True

    def advance(self, group: Group) -> None:
        """One state further, up to ready."""
        match group.state:
            case GroupState.ADMITTED:
                self.groups, _ = self.groups.on(StartGeneration(group.group_id, 0.0))
            case GroupState.GENERATING:
                version = group.served_version
                self.groups, _ = self.groups.on(FinishGeneration(group.group_id, "x", version, version, 0.0))
            case GroupState.SCORING:
                self.groups, _ = self.groups.on(FinishScoring(group.group_id, 0.0, 0.0))

    def drop(self, group: Group) -> None:
        self.groups, _ = self.groups.on(Drop(group.group_id, "reward_timeout", 0.0))

    def consume(self) -> bool:
        """Make a batch if the trainer is free and there is one."""
        if self.trainer_version != self.next_batch:
            return False
        batch = self.scheduler.batch(self.open, next_batch=self.next_batch)
        if batch is None:
            return False
        assert len(batch) == self.scheduler.batch_groups
        for member in batch:
            # Invariants 1 and 5.
            assert 0 <= self.next_batch - member.served_version <= self.scheduler.max_staleness
            self.groups, _ = self.groups.on(Consume(member.group_id, self.next_batch, 0.0))
        self.next_batch += 1
        return True

    def finish_update(self) -> None:
        self.trainer_version = self.next_batch

    def sync(self, generator: int) -> None:
        self.served[generator] = self.trainer_version

    def check(self) -> None:
        batch_groups, staleness = self.scheduler.batch_groups, self.scheduler.max_staleness
        for until in range(self.next_batch, self.next_batch + staleness + 2):
            due = sum(group.served_version + staleness <= until for group in self.open)
            assert due <= (until - self.next_batch + 1) * batch_groups  # Invariant 2.
        newest = max(self.served)
        bound = (staleness + newest + 1) * batch_groups - self.groups.consumed - len(self.open)
        assert bound >= 0
        capacity = self.scheduler.capacity(self.open, next_batch=self.next_batch, served_version=newest)
        assert capacity == bound  # Invariant 3.
        is_idle = self.trainer_version == self.next_batch and newest == self.next_batch
        if is_idle and all(group.state is GroupState.READY for group in self.open):
            batch = self.scheduler.batch(self.open, next_batch=self.next_batch)
            assert batch is not None or capacity > 0  # Invariant 4.


class Schedule(RuleBasedStateMachine):
    world: World

    @initialize(batch_groups=st.integers(1, 4), max_staleness=st.integers(0, 3))
    def start(self, batch_groups: int, max_staleness: int) -> None:
        self.world = World(batch_groups, max_staleness)

    @rule(generator=st.integers(0, 1), times=st.integers(1, 4))
    def admit(self, generator: int, times: int) -> None:
        for _ in range(times):
            self.world.admit(generator)

    @precondition(lambda self: self.world.groups.open)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def advance(self, data: st.DataObject, steps: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.groups.open)))
        for _ in range(steps):
            self.world.advance(self.world.groups.open[name])

    @precondition(lambda self: self.world.groups.open)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.world.drop(self.world.groups.open[data.draw(st.sampled_from(sorted(self.world.groups.open)))])

    @rule()
    def consume(self) -> None:
        self.world.consume()

    @rule()
    def finish_update(self) -> None:
        self.world.finish_update()

    @rule(generator=st.integers(0, 1))
    def sync(self, generator: int) -> None:
        self.world.sync(generator)

    @invariant()
    def the_documented_invariants_hold(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_the_invariants_hold_over_thirty_thousand_random_events_and_training_goes_on(max_staleness: int) -> None:
    world, random_ = World(batch_groups=5, max_staleness=max_staleness), random.Random(max_staleness)
    for _ in range(30_000):
        choice = random_.random()
        if choice < 0.35:
            world.admit(random_.randrange(2))
        elif choice < 0.85 and world.open:
            world.advance(random_.choice(world.open))
        elif choice < 0.87 and world.open:
            world.drop(random_.choice(world.open))
        elif choice < 0.92:
            world.consume()
        elif choice < 0.95:
            world.finish_update()
        else:
            world.sync(random_.randrange(2))
        world.check()
    assert world.next_batch > 100
    assert world.groups.account().is_balanced


def test_without_overtaking_the_kth_group_is_admitted_at_version_k_div_batch_less_staleness() -> None:
    world = World(batch_groups=3, max_staleness=2)
    versions = []
    for _ in range(20):
        while world.admit(0):
            versions.append(world.served[0])
        for member in world.open:
            for _ in range(3):
                world.advance(world.groups.open[member.group_id])
        assert world.consume()
        world.finish_update()
        world.sync(0)
        world.sync(1)
    assert all(version >= k // 3 - 2 for k, version in enumerate(versions))
    assert all(earlier <= later for earlier, later in pairwise(versions))
