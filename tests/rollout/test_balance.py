"""Properties of the split over ranks and into micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.balance import (
    micro_batches,
    padding_share,
    row_lengths,
    rows_of_prompts,
    split_evenly,
    split_over_ranks,
)
from rollout.failures import DataError

lengths_of_samples = st.lists(st.integers(1, 500), max_size=80)


def test_a_worked_example_of_two_ranks() -> None:
    # 9 to rank 0, 7 to rank 1, 5 to rank 1 (12), 4 to rank 0 (13), 1 to rank 1 (13).
    assert split_over_ranks([4, 9, 1, 7, 5], 2) == [[0, 1], [2, 3, 4]]


def test_a_worked_example_of_micro_batches() -> None:
    # 9 | 7, 5 (2 x 7 = 14) | 4, 1: a third to 7 and 5 would be 21.
    assert micro_batches([4, 9, 1, 7, 5], range(5), 14) == [[1], [3, 4], [0, 2]]


@given(lengths_of_samples, st.integers(1, 9))
def test_every_sample_goes_to_exactly_one_rank(lengths: list[int], ranks: int) -> None:
    shares = split_over_ranks(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))


@given(lengths_of_samples, st.integers(1, 9))
def test_no_two_ranks_differ_by_more_than_the_longest_sample(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[index] for index in share) for share in split_over_ranks(lengths, ranks)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths_of_samples, st.integers(500, 5000))
def test_every_sample_is_in_exactly_one_micro_batch(lengths: list[int], bound: int) -> None:
    groups = micro_batches(lengths, range(len(lengths)), bound)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))


@given(lengths_of_samples, st.integers(500, 5000))
def test_no_micro_batch_exceeds_its_bound_with_its_padding(lengths: list[int], bound: int) -> None:
    for group in micro_batches(lengths, range(len(lengths)), bound):
        assert len(group) * max(lengths[index] for index in group) <= bound


@given(lengths_of_samples, st.integers(500, 5000))
def test_no_sample_is_longer_than_one_of_an_earlier_micro_batch(lengths: list[int], bound: int) -> None:
    order = [lengths[index] for group in micro_batches(lengths, range(len(lengths)), bound) for index in group]
    assert order == sorted(lengths, reverse=True)


def test_a_sample_beyond_the_bound_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"1,152 tokens.*512.*at least 1152") as caught:
        micro_batches([10, 1152], range(2), 512)
    assert caught.value.failure.reason == "sample_exceeds_micro_batch"


@given(st.integers(0, 200), st.integers(1, 12))
def test_even_parts_follow_each_other_and_differ_by_at_most_one(count: int, parts: int) -> None:
    ranges = split_evenly(count, parts)
    assert [index for part in ranges for index in part] == list(range(count))
    assert not ranges or max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_padding_share_counts_the_padding() -> None:
    assert padding_share([4, 2], [[0, 1]]) == pytest.approx(2 / 8)
    assert padding_share([], []) == 0.0


samples_of_prompts = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 200)), max_size=40)
PROMPT_LENGTHS = {"a": 5, "b": 60, "c": 400, "d": 30}


@given(samples_of_prompts, st.integers(1, 2000), st.integers(1, 10_000))
def test_every_sample_is_in_exactly_one_row_with_others_of_its_prompt(
    samples: list[tuple[str, int]], max_tokens: int, token_cost: int
) -> None:
    prompts, lengths = [name for name, _ in samples], [length for _, length in samples]
    prompt_lengths = [PROMPT_LENGTHS[name] for name in prompts]
    rows = rows_of_prompts(prompts, prompt_lengths, lengths, max_tokens=max_tokens, token_cost=token_cost)
    assert sorted(index for row in rows for index in row) == list(range(len(samples)))
    assert all(len({prompts[index] for index in row}) == 1 for row in rows)
    for row, length in zip(rows, row_lengths(rows, prompt_lengths, lengths), strict=True):
        assert len(row) == 1 or length <= max_tokens


def test_a_long_prompt_is_shared_and_a_short_one_before_long_answers_is_not() -> None:
    together = rows_of_prompts(["a"] * 4, [1000] * 4, [50] * 4, max_tokens=10_000, token_cost=768)
    assert together == [[0, 1, 2, 3]]
    apart = rows_of_prompts(["a"] * 4, [10] * 4, [2000] * 4, max_tokens=100_000, token_cost=768)
    assert apart == [[0], [1], [2], [3]]
