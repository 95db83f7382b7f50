"""What reward functions return, read as values or failures and combined to scores."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.config import RewardComponentConfig
from reward.returned_values import bounded_repr, combine, component_labels, raised, read_value, read_values
from rollout.failures import DataError, Failure, FailureKind
from rollout.samples import Score


def components(**weights: float) -> list[RewardComponentConfig]:
    return [RewardComponentConfig(function=name, weight=weight) for name, weight in weights.items()]


def test_the_score_is_the_weighted_sum_and_keeps_the_values_before_weights() -> None:
    # 2 * 0.5 + 0.1 * (1 - 3) = 0.8
    values = [{"right": 0.5}, {"style/short": 1.0, "style/rude": -3.0}]
    score = combine(components(right=2.0, style=0.1), values, "p")
    assert isinstance(score, Score)
    assert score.value == pytest.approx(0.8)
    assert score.components == {"right": 0.5, "style/short": 1.0, "style/rude": -3.0}


def test_one_failed_component_fails_the_completion() -> None:
    failure = Failure(FailureKind.USER_CODE, "reward_nan", "...")
    assert combine(components(a=1.0, b=1.0), [{"a": 1.0}, failure], "p") is failure


def test_a_sum_that_overflows_is_a_failure() -> None:
    result = combine(components(a=10.0), [{"a": 1e308}], "p")
    assert isinstance(result, Failure)
    assert result.reason == "reward_infinite"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1),
        (False, 0),
        (3, 3),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2),
        (np.bool_(True), 1),
        (Fraction(1, 4), 0.25),
    ],
)
def test_real_numbers_and_booleans_are_values(value: Any, number: float) -> None:
    assert read_value("f", "p", value) == {"f": number}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "reward_missing"),
        ({}, "reward_missing"),
        ("1.0", "reward_not_a_number"),
        (1j, "reward_not_a_number"),
        ([1.0], "reward_not_a_number"),
        (torch.tensor(1.0), "reward_not_a_number"),
        (float("nan"), "reward_nan"),
        (np.float32("nan"), "reward_nan"),
        (float("-inf"), "reward_infinite"),
        (10**400, "reward_infinite"),
        ({"a": None}, "reward_missing"),
        ({"a": 1.0, "b": math.nan}, "reward_nan"),
        ({1: 1.0}, "reward_bad_key"),
    ],
)
def test_what_is_not_a_finite_real_number_is_a_failure_that_says_where_and_what(value: Any, reason: str) -> None:
    failure = read_value("my_reward", "0123abcd", value)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.reason) == (FailureKind.USER_CODE, reason)
    assert "'my_reward'" in failure.message
    assert "0123abcd" in failure.message
    assert len(failure.message) < 500


def test_a_dicts_entries_are_named_after_the_function_and_the_key() -> None:
    assert read_value("f", "p", {"a": 1, "b": True}) == {"f/a": 1.0, "f/b": 1.0}


@given(st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(), st.complex_numbers()))
def test_a_value_becomes_a_finite_number_or_a_failure(value: Any) -> None:
    result = read_value("f", "p", value)
    assert isinstance(result, Failure) or math.isfinite(result["f"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0], "reward_wrong_count"),
        ([1.0] * 3, "reward_wrong_count"),
        (1.0, "reward_wrong_count"),
        (None, "reward_missing"),
    ],
)
def test_a_list_of_the_wrong_length_fails_every_completion(values: Any, reason: str) -> None:
    results = read_values("f", "p", values, 2)
    assert [r.reason for r in results if isinstance(r, Failure)] == [reason] * 2


def test_an_array_is_a_list_of_values() -> None:
    assert read_values("f", "p", np.array([1.0, 2.0], np.float32), 2) == [{"f": 1.0}, {"f": 2.0}]


def test_a_long_traceback_is_cut_to_its_last_lines() -> None:
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("at the bottom")
        deep(n - 1)

    with pytest.raises(ValueError, match="bottom") as caught:
        deep(100)
    failure = raised("f", "p", caught.value)
    assert failure.reason == "reward_raised"
    assert failure.message.endswith("ValueError: at the bottom")
    assert len(failure.message.splitlines()) <= 21


def test_a_typed_failure_raised_inside_a_function_keeps_its_kind() -> None:
    failure = raised("f", "p", DataError("media_truncated", "the image ends early"))
    assert (failure.kind, failure.reason) == (FailureKind.DATA, "media_truncated")


def test_a_repr_that_raises_or_is_huge_is_bounded() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert "Rude" in bounded_repr(Rude())
    assert len(bounded_repr("x" * 10**6)) <= 120
    assert len(bounded_repr([["x" * 50] * 50] * 50)) <= 120


def test_a_function_used_twice_has_two_labels() -> None:
    twice = [RewardComponentConfig(function="contains"), RewardComponentConfig(function="contains")]
    assert component_labels(twice) == ["contains", "contains#2"]
