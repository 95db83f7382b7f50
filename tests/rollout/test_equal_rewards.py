"""Groups of equal rewards: which they are, how many came in a row, and when there is nothing left to learn."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.equal_rewards import MAX_BATCHES, EqualRewards, teaches_nothing
from rollout.failures import FailureKind

EQUAL, DIFFERENT = (0.5, 0.5, 0.5), (0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.0, 1.0], True), ([1.0], True), ([0.0, -0.0], True), ([1.0, 1.0, 1.0 + 1e-12], False), ([0.0, 1.0], False)],
)
def test_a_group_teaches_nothing_when_all_its_rewards_are_equal(rewards: list[float], expected: bool) -> None:
    assert teaches_nothing(rewards) is expected


def test_there_is_nothing_to_learn_after_twenty_batches_of_equal_rewards_in_a_row() -> None:
    # batches of 4 groups: the verdict comes with group 80
    count = EqualRewards(batch_groups=4)
    for _ in range(79):
        count = count.after(EQUAL)
        assert count.verdict() is None
    verdict = count.after(EQUAL).verdict()
    assert verdict is not None
    assert (verdict.kind, verdict.reason) == (FailureKind.DATA, "nothing_to_learn")
    assert "last 80 groups" in verdict.message
    assert "rollout.drop_equal_rewards" in verdict.message


def test_one_group_of_different_rewards_starts_the_count_anew() -> None:
    count = EqualRewards(batch_groups=1)
    for rewards in [*[EQUAL] * (MAX_BATCHES - 1), DIFFERENT, EQUAL]:
        count = count.after(rewards)
    assert count.in_a_row == 1
    assert count.verdict() is None


@given(st.lists(st.sampled_from([EQUAL, DIFFERENT])), st.integers(1, 3))
def test_the_count_is_the_length_of_the_last_run_of_equal_groups(
    groups: list[tuple[float, ...]], batch_groups: int
) -> None:
    count = EqualRewards(batch_groups)
    for rewards in groups:
        count = count.after(rewards)
    assert count.in_a_row == len(list(itertools.takewhile(lambda rewards: rewards == EQUAL, reversed(groups))))
    assert (count.verdict() is not None) == (count.in_a_row >= MAX_BATCHES * batch_groups)
