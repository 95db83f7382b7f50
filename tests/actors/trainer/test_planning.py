"""Which sequences go to which optimiser step, rank and micro-batch; those that a loss compares stay together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.trainer.planning import Split, Together, optimiser_batches, split_batch
from rollout.failures import DataError, FailureError
from rollout.samples import TokenSequence
from tests.actors.trainer.sequences import sequence

MAX_TOKENS = 400
TOKEN_COSTS = st.sampled_from([None, 10, 10_000])


@st.composite
def pairs(draw: st.DrawFn) -> list[TokenSequence]:
    """Pairs whose members have the same prompt, or two (as a worse image makes of one), of at most 100 tokens each."""
    found = []
    for number in range(draw(st.integers(1, 12))):
        prompt_tokens = draw(st.integers(1, 60))
        other = draw(st.sampled_from([f"prompt {number % 3}", f"other {number % 3}"]))
        for name in (f"prompt {number % 3}", other):
            found.append(sequence(name, prompt_tokens, draw(st.integers(1, 40))))
    return found


@st.composite
def groups(draw: st.DrawFn) -> list[TokenSequence]:
    """Groups of one to four answers; a later group may have an earlier one's prompt."""
    found = []
    for number in range(draw(st.integers(1, 8))):
        prompt_tokens = draw(st.integers(1, 60))
        sizes = draw(st.integers(1, 4))
        found += [sequence(f"prompt {number % 3}", prompt_tokens, draw(st.integers(1, 40))) for _ in range(sizes)]
    return found


def members(split: Split) -> list[list[int]]:
    """Indices of each micro-batch of all ranks, in the order of their rows."""
    return [[index for row in micro_batch for index in row] for rank in split.ranks for micro_batch in rank]


def test_a_worked_example_of_pairs_on_two_ranks() -> None:
    lengths = [(9, 1), (2, 2), (6, 6), (1, 1)]
    samples = [sequence(f"{n}{m}", 1, length) for n, pair in enumerate(lengths) for m, length in enumerate(pair)]
    split = split_batch(samples, together=Together.PAIR, ranks=2, max_tokens=20, token_cost=None)
    # Tokens of the pairs, prompts included: 12, 6, 14, 4. Rank 0 gets 14 and 4, rank 1 gets 12 and 6. Longest rows are
    # 7 and 2, then 10 and 3: four rows would be padded to 28 and 40 tokens, so each pair has its own micro-batch.
    assert members(split) == [[4, 5], [6, 7], [0, 1], [2, 3]]
    # 2x7 + 2x2 + 2x10 + 2x3 tokens with padding, of which 36 are real
    assert split.padding_share == pytest.approx(1 - 36 / 44)


def test_answers_of_a_group_share_rows_and_stay_in_one_micro_batch() -> None:
    samples = [*(sequence("one", 50, 2) for _ in range(3)), *(sequence("two", 50, 2) for _ in range(2))]
    split = split_batch(samples, together=Together.GROUP, ranks=2, max_tokens=150, token_cost=10_000)
    assert split.ranks == [[[[0, 1, 2]]], [[[3, 4]]]]


@given(pairs(), st.integers(1, 4), TOKEN_COSTS)
def test_a_pair_is_never_split_over_ranks_or_micro_batches(
    samples: list[TokenSequence], ranks: int, token_cost: int | None
) -> None:
    split = split_batch(samples, together=Together.PAIR, ranks=ranks, max_tokens=MAX_TOKENS, token_cost=token_cost)
    assert len(split.ranks) == ranks
    found = members(split)
    assert sorted(index for each in found for index in each) == list(range(len(samples)))
    for each in found:
        assert all(first % 2 == 0 and second == first + 1 for first, second in zip(each[::2], each[1::2], strict=True))


@given(groups(), st.integers(1, 4), TOKEN_COSTS)
def test_a_group_is_never_split_over_ranks_or_micro_batches(
    samples: list[TokenSequence], ranks: int, token_cost: int | None
) -> None:
    split = split_batch(samples, together=Together.GROUP, ranks=ranks, max_tokens=MAX_TOKENS, token_cost=token_cost)
    found = members(split)
    assert sorted(index for each in found for index in each) == list(range(len(samples)))
    for each in found:
        for place, index in enumerate(each):
            if index > 0 and samples[index].prompt == samples[index - 1].prompt:
                assert each[place - 1] == index - 1


@given(pairs(), st.integers(1, 4), TOKEN_COSTS)
def test_no_micro_batch_exceeds_its_bound_with_its_padding(
    samples: list[TokenSequence], ranks: int, token_cost: int | None
) -> None:
    split = split_batch(samples, together=Together.PAIR, ranks=ranks, max_tokens=MAX_TOKENS, token_cost=token_cost)
    for rank in split.ranks:
        for rows in rank:
            lengths = [
                len(samples[row[0]].prompt_token_ids) + sum(len(samples[index].token_ids) for index in row)
                for row in rows
            ]
            assert len(rows) * max(lengths) <= MAX_TOKENS
            assert all(len({samples[index].prompt.prompt_id for index in row}) == 1 for row in rows)


@given(pairs(), st.integers(1, 5))
def test_optimiser_steps_take_whole_pairs_in_order(samples: list[TokenSequence], steps: int) -> None:
    parts = optimiser_batches(samples, Together.PAIR, steps)
    assert [sample for part in parts for sample in part] == samples
    assert all(len(part) % 2 == 0 for part in parts)
    assert len(parts) == min(steps, len(samples) // 2)


@given(groups(), st.integers(1, 5))
def test_optimiser_steps_take_whole_groups_in_order(samples: list[TokenSequence], steps: int) -> None:
    parts = optimiser_batches(samples, Together.GROUP, steps)
    assert [sample for part in parts for sample in part] == samples
    for before, after in pairwise(parts):
        assert before[-1].prompt != after[0].prompt


def test_an_odd_number_of_sequences_cannot_be_pairs() -> None:
    with pytest.raises(FailureError, match="3 sequences can't be put into pairs"):
        optimiser_batches([sequence("one", 1, 1)] * 3, Together.PAIR, 1)


def test_a_pair_too_large_for_a_micro_batch_is_refused_with_the_size_it_needs() -> None:
    samples = [sequence("one", 10, 30), sequence("two", 10, 5)]
    with pytest.raises(DataError, match=r"2 rows that must stay together.* of 40 tokens.*to at least 80"):
        split_batch(samples, together=Together.PAIR, ranks=1, max_tokens=79, token_cost=None)
