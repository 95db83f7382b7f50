"""Reward shapes against figures worked by hand, loops by their definitions, and their invariants."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.registry import REWARD_SHAPES, RegistryError
from algorithms.shaping import ShapingInputs, informative_groups, overlong_filter, repeated_share, shape_rewards

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("overlong", {"cache_tokens": 4}),
    ("cosine_length", {}),
    ("repetition", {"ngram_tokens": 2}),
]


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(
    rewards: list[float], completions: list[list[int]], max_tokens: int = 10, truncated: list[bool] | None = None
) -> ShapingInputs:
    lengths = torch.tensor([len(completion) for completion in completions])
    return ShapingInputs(
        float64(rewards),
        lengths,
        torch.tensor(truncated or [False] * len(rewards)),
        torch.tensor([token for completion in completions for token in completion], dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(completions)), lengths),
        max_tokens,
    )


def test_the_overlong_penalty_by_hand() -> None:
    # Limit 10, cache 4: nothing up to 6 tokens, then a quarter of the penalty 2 a token.
    batch = inputs_of([1.0] * 6, [[0] * n for n in (1, 6, 7, 9, 10, 12)])
    shaped = shape_rewards("overlong", batch, {"cache_tokens": 4, "penalty": 2.0})
    assert shaped.tolist() == [1.0, 1.0, 0.5, -0.5, -1.0, -1.0]


def test_the_cosine_reward_by_hand() -> None:
    # The cosine's height is 1 at no length, 1/2 halfway and 0 at the limit; the last was truncated.
    batch = inputs_of([1.0, 0.0, 1.0, 0.0, 1.0], [[0] * n for n in (5, 5, 10, 10, 10)], truncated=[False] * 4 + [True])
    values = {"correct_at_zero": 2.0, "correct_at_limit": 1.0, "wrong_at_zero": -10.0, "wrong_at_limit": 0.0}
    shaped = shape_rewards("cosine_length", batch, {**values, "truncated": -7.0})
    torch.testing.assert_close(shaped, float64([1.5, -5.0, 1.0, 0.0, -7.0]))
    empty = shape_rewards("cosine_length", inputs_of([1.0, 0.0], [[], []]), values)
    torch.testing.assert_close(empty, float64([2.0, -10.0]))


@given(lengths=st.lists(st.integers(0, 20), min_size=2, max_size=10))
@settings(max_examples=50, deadline=None)
def test_the_cosine_reward_prefers_short_when_right_and_long_when_wrong(lengths: list[int]) -> None:
    completions = [[0] * n for n in sorted(lengths)]
    right = shape_rewards("cosine_length", inputs_of([1.0] * len(lengths), completions, 20))
    wrong = shape_rewards("cosine_length", inputs_of([0.0] * len(lengths), completions, 20))
    assert bool((right.diff() <= 1e-12).all())
    assert bool((wrong.diff() >= -1e-12).all())
    assert float(right.min()) > float(wrong.max())


def test_the_repetition_penalty_by_hand() -> None:
    # Pairs of 1 2 1 2 1: 12 21 12 21, of which 2 of 4 are repetitions. 1 2 3 has none, a single token no pair. The
    # pair 3 1 across completions isn't one, nor is 1 2 in the second a repetition of the first's.
    batch = inputs_of([1.0, 1.0, 1.0], [[1, 2, 1, 2, 1], [1, 2, 3], [1]])
    shaped = shape_rewards("repetition", batch, {"ngram_tokens": 2, "penalty": 0.5})
    assert shaped.tolist() == [0.75, 1.0, 1.0]


def test_rewards_from_a_threshold_on_are_spared_the_repetition_penalty() -> None:
    batch = inputs_of([1.0, 0.0], [[1, 1, 1], [1, 1, 1]])
    assert shape_rewards("repetition", batch, {"ngram_tokens": 1, "spared_from": 1.0}).tolist() == [1.0, -2 / 3]


@given(completions=st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=8), ngram=st.integers(1, 11))
@settings(max_examples=60, deadline=None)
def test_repetitions_agree_with_a_set_of_ngrams(completions: list[list[int]], ngram: int) -> None:
    batch = inputs_of([0.0] * len(completions), completions)
    shares = repeated_share(batch.token_ids, batch.sample, len(completions), ngram)
    expected = []
    for completion in completions:
        grams = [tuple(completion[i : i + ngram]) for i in range(len(completion) - ngram + 1)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    torch.testing.assert_close(shares, float64(expected))


def test_many_different_ngrams_are_told_apart() -> None:
    # 200,000 tokens whose triples all differ: counting up, with neighbours, reversals and large ids among them.
    tokens = torch.arange(200_000) * 7 % 199_999 + (torch.arange(200_000) % 3) * 2**33
    assert float(repeated_share(tokens, torch.zeros_like(tokens), 1, 3)) == 0.0


@pytest.mark.parametrize(("name", "options"), SHAPES)
@given(
    data=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0]), st.lists(st.integers(0, 2), max_size=10), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_the_order_of_samples_does_not_matter(
    name: str, options: dict[str, Any], data: list[tuple[float, list[int], bool]], seed: int
) -> None:
    def shaped(rows: list[tuple[float, list[int], bool]]) -> Tensor:
        rewards, completions, truncated = (list(column) for column in zip(*rows, strict=True))
        return shape_rewards(name, inputs_of(rewards, completions, truncated=truncated), options)

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    torch.testing.assert_close(shaped([data[i] for i in order]), shaped(data)[order])


@pytest.mark.parametrize(("name", "options"), SHAPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_naming_the_sample(
    name: str, options: dict[str, Any], bad: float
) -> None:
    with pytest.raises(NonFiniteError, match="the reward of sample 1 is"):
        shape_rewards(name, inputs_of([0.0, bad], [[1], [1]]), options)


def test_a_cache_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_tokens = 11 .* above the limit of 10"):
        shape_rewards("overlong", inputs_of([1.0], [[1]]), {"cache_tokens": 11})


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (
            ShapingInputs(torch.zeros(2), torch.ones(1), torch.zeros(2), torch.zeros(1), torch.zeros(1), 1),
            r"\[2\], \[1\]",
        ),
        (ShapingInputs(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(3), torch.zeros(2), 1), "token_ids"),
        (
            ShapingInputs(torch.tensor([1]), torch.ones(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), 1),
            "floating",
        ),
        (ShapingInputs(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), 0), "max_tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(batch: ShapingInputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shape_rewards("cosine_length", batch)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'overlong'"):
        shape_rewards("overlng", inputs_of([1.0], [[1]]))


def test_no_samples_keep_their_shape() -> None:
    for name, options in SHAPES:
        empty = ShapingInputs(
            float64([]), torch.tensor([]), torch.tensor([]).bool(), torch.tensor([]).long(), torch.tensor([]).long(), 9
        )
        assert shape_rewards(name, empty, options).shape == (0,)


def test_the_filter_leaves_out_the_tokens_of_truncated_completions() -> None:
    mask, sample = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 2])
    assert overlong_filter(mask, sample, torch.tensor([False, True, False])).tolist() == [True, False, False, True]


def test_only_groups_whose_rewards_differ_teach_something() -> None:
    # Ids 3, 5, 9: a group of equal rewards, one that differs, one of a single sample; 0.1 + 0.2 is 0.3.
    rewards, group = float64([0.1 + 0.2, 1.0, 0.3, 0.0, 7.0]), torch.tensor([3, 5, 3, 5, 9])
    assert informative_groups(rewards, group).tolist() == [False, True, False]
    with pytest.raises(NonFiniteError, match="sample 0"):
        informative_groups(float64([math.nan]), torch.tensor([0]))


def test_every_shape_says_what_it_is() -> None:
    for name, _ in SHAPES:
        entry = REWARD_SHAPES.get(name)
        assert all((entry.formula, entry.source, entry.use_when))
        assert all(field.description for field in entry.options.model_fields.values())
