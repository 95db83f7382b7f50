"""Intervals of a mean, against values from the literature and against their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rollout.intervals import interval_method, mean_interval


def test_zeros_and_ones_get_the_wilson_interval() -> None:
    # 8 of 10 at 95%: centre (0.8 + 1.92/10) / 1.384 = 0.7167, half width 0.2265 (Wilson 1927).
    mean, low, high = mean_interval([1] * 8 + [0] * 2)
    assert mean == pytest.approx(0.8)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert interval_method([1, 0, 1.0]) == "wilson"


def test_other_values_get_students_t_interval() -> None:
    # Mean 3, s = sqrt(2.5), t(0.975, 4) = 2.7764: half width 2.7764 * 1.5811 / sqrt(5) = 1.9632.
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert (low, high) == (pytest.approx(3 - 1.9632, abs=1e-4), pytest.approx(3 + 1.9632, abs=1e-4))
    assert interval_method([1, 2]) == "t"


@pytest.mark.parametrize("value", [0, 1])
def test_all_equal_binary_values_still_have_a_width_and_hold_their_mean(value: int) -> None:
    mean, low, high = mean_interval([value] * 20)
    assert 0 <= low <= mean <= high <= 1
    assert high - low == pytest.approx(0.1611, abs=1e-4)


def test_one_value_that_is_not_binary_bounds_nothing() -> None:
    assert mean_interval([0.3]) == (0.3, -math.inf, math.inf)


def test_one_binary_value_has_a_wide_interval() -> None:
    assert mean_interval([1]) == (1.0, pytest.approx(0.2065, abs=1e-4), 1.0)


@pytest.mark.parametrize(("values", "message"), [([], "at least one value"), ([1.0, math.nan], "value 1 of 2 is nan")])
def test_a_mean_of_nothing_or_of_a_number_that_is_not_finite_is_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_outside_zero_and_one_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([0, 1], level)


@pytest.mark.parametrize("kind", ["binary", "normal"])
def test_intervals_cover_the_true_mean_as_often_as_they_say(kind: str) -> None:
    generator = np.random.default_rng(0)
    draws = generator.random((2000, 40)) < 0.3 if kind == "binary" else generator.normal(0.3, 1, (2000, 40))
    covered = sum(low <= 0.3 <= high for _, low, high in (mean_interval(row.tolist()) for row in draws.astype(float)))
    assert 0.93 < covered / 2000 < 0.97
